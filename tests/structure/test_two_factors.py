"""Layers in two factors: the projected layer, with fewer entries; described as JSON and built again."""

from __future__ import annotations

import copy
import json
from itertools import product

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import hf_compress as hfc
from hf_compress.structure import describe, factor, factored_layers, reasons_to_stay, rebuild
from tests.conftest import tiny_bert, tiny_resnet

KINDS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
VARIANTS = [
    {},
    {"stride": 2},
    {"padding": 2},
    {"padding": "same"},
    {"dilation": 2},
    {"stride": 2, "padding": 1, "dilation": 2},
    {"groups": 2},
    {"groups": 2, "stride": 2, "padding": 1},
    {"bias": False},
    *({"padding": 1, "padding_mode": mode} for mode in ("reflect", "replicate", "circular")),
    {"padding": "same", "padding_mode": "circular", "dilation": 2, "groups": 2},
]


def both_ways(layer, pattern, **options):
    """The layer with projected values, and the same in two factors."""
    projected, removed = nn.Sequential(copy.deepcopy(layer)), nn.Sequential(layer)
    hfc.compress(projected, pattern)
    return projected, removed, hfc.compress(removed, pattern, remove=True)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_convolution_gives_what_its_projection_gives(dims, options):
    torch.manual_seed(0)
    layer = KINDS[dims](6, 8, 3, **options)
    x = torch.randn(2, 6, *(9, 8, 7)[:dims])
    dense = layer(x)
    projected, removed, report = both_ways(layer, "low_rank:0.5")
    assert type(removed[0]).__name__ == f"FactoredConv{dims}d"
    torch.testing.assert_close(removed(x), projected(x), rtol=1e-5, atol=1e-5)
    assert (removed(x) - dense).abs().max() > 1e-3
    groups = options.get("groups", 1)
    rank = min(8 // groups, 6 // groups * 3**dims) // 2
    assert removed[0].rank == rank
    assert removed[0].factor.weight.shape == (groups * rank, 6 // groups, *[3] * dims)
    assert removed[0].weight.shape == (8, rank, *[1] * dims)
    size = groups * rank * (8 // groups + 6 // groups * 3**dims)
    assert report.layers["0.weight"].numel == report.layers["0.weight"].nonzero == size
    assert report.parameters_removed == 8 * 6 // groups * 3**dims - size
    assert (removed[0].bias is None) == (layer.bias is None)


def test_a_pointwise_convolution():
    layer = nn.Conv2d(12, 16, 1, stride=2)
    x = torch.randn(1, 12, 5, 5)
    projected, removed, _ = both_ways(layer, "low_rank:0.75")
    torch.testing.assert_close(removed(x), projected(x))
    assert removed[0].weight.shape == (16, 3, 1, 1) != layer.weight.shape


LINEAR = [lambda: nn.Linear(12, 20), lambda: nn.Linear(20, 12, bias=False), lambda: Conv1D(20, 12)]


@pytest.mark.parametrize(("make", "inputs"), list(zip(LINEAR, (12, 20, 12), strict=True)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_linear_layer_gives_what_its_projection_gives(make, inputs, dtype):
    torch.manual_seed(0)
    layer, x = make().to(dtype), torch.randn(3, inputs).to(dtype)
    projected, removed, _ = both_ways(layer, "low_rank:0.75")
    tolerance = 5e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(removed(x), projected(x), rtol=tolerance, atol=tolerance)
    assert removed[0].rank == 3
    assert {p.dtype for p in removed.parameters()} == {dtype}
    assert removed[0].in_features == inputs


def test_factors_share_the_singular_values():
    layer = nn.Linear(30, 20, bias=False)
    values = torch.linalg.svdvals(layer.weight)[:5]
    net = nn.Sequential(layer)
    hfc.compress(net, "low_rank:0.75", remove=True)
    for matrix in (net[0].weight, net[0].factor.weight):
        torch.testing.assert_close(torch.linalg.svdvals(matrix).square(), values)


def test_everything_else_of_the_model_is_kept():
    model = tiny_resnet().eval()
    model.classifier[1].weight.requires_grad_(False)
    state, numbers = model.state_dict(), torch.get_rng_state()
    biases = {n: p for n, p in model.named_parameters() if n.endswith("bias")}
    report = hfc.compress(model, "low_rank:0.75", remove=True)
    assert torch.equal(torch.get_rng_state(), numbers)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in biases.items())
    cut = {f"{name}.weight" for name, _ in factored_layers(model)}
    assert cut == report.layers.keys() - report.skipped.keys()
    for name, value in model.state_dict().items():
        if name not in cut and ".factor." not in name:
            assert torch.equal(value, state[name])
    assert not any(m.training for m in model.modules())
    head = model.classifier[1]
    assert [head.weight.requires_grad, head.factor.weight.requires_grad, head.bias.requires_grad] == [
        False,
        False,
        True,
    ]
    assert report.parameters_removed == sum(p.numel() for p in tiny_resnet().parameters()) - sum(
        p.numel() for p in model.parameters()
    )


def test_what_grows_stays_dense():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 40))
    weight = net[0].weight.detach().clone()
    report = hfc.compress(net, "low_rank:0.5", remove=True)
    assert report.skipped == {"0.weight": "two factors of rank 4 have 64 entries, and it has 64"}
    assert torch.equal(net[0].weight, weight)
    assert type(net[0]) is nn.Linear
    assert report.parameters_removed == 8 * 40 - 4 * 48


@pytest.mark.parametrize("pattern", ["low_rank:0.3:energy", "low_rank:0.5:parameters"])
def test_ranks_differ_from_layer_to_layer(pattern):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 64))
    with torch.no_grad():
        net[4].weight.mul_(1.5)
        net[2].weight.copy_(net[2].weight[:, :2] @ torch.randn(2, 48))
    projected = copy.deepcopy(net)
    wanted = hfc.parse_pattern(pattern).ranks(hfc.find_targets(net))
    expected = hfc.compress(projected, pattern)
    report = hfc.compress(net, pattern, remove=True)
    assert {f"{n}.weight": layer.rank for n, layer in factored_layers(net)} == wanted
    assert len(set(wanted.values())) > 1
    assert report.skipped == expected.skipped
    x = torch.randn(4, 16)
    torch.testing.assert_close(net(x), projected(x), rtol=1e-5, atol=1e-5)
    if pattern.endswith("parameters"):
        targets = sum(layer.numel for layer in report.layers.values())
        assert targets <= 0.5 * (16 * 48 * 2 + 16 * 64)


class Scaled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


def hooked():
    layer = nn.Linear(8, 40)
    layer.register_forward_hook(lambda module, args, output: 2 * output)
    return layer


def shared():
    net = nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 8), nn.ReLU(), nn.Linear(8, 40))
    net[4].weight = net[0].weight
    return net


@pytest.mark.parametrize(
    ("net", "name", "reason"),
    [
        (nn.Sequential(Scaled(8, 40)), "0.weight", "Scaled is more than its matrix"),
        (nn.Sequential(hooked()), "0.weight", "the layer has hooks"),
        (shared(), "0.weight", "several layers share it"),
        (nn.Linear(8, 40), "weight", "it is the model itself"),
        (nn.TransformerEncoderLayer(8, 2, 40), "linear1.weight", "TransformerEncoderLayer does not call the layer"),
        (nn.MultiheadAttention(16, 2), "out_proj.weight", "MultiheadAttention does not call the layer"),
    ],
)
def test_layers_that_cannot_be_replaced_get_the_same_values(net, name, reason):
    net.eval()
    projected = copy.deepcopy(net)
    hfc.compress(projected, "low_rank:0.75")
    report = hfc.compress(net, "low_rank:0.75", remove=True)
    assert report.skipped[name].startswith(f"it keeps its shape: {reason}")
    assert torch.equal(net.get_parameter(name), projected.get_parameter(name))
    assert report.layers[name].numel == net.get_parameter(name).numel()


def test_without_a_factor_there_is_nothing_to_describe():
    model = tiny_bert()
    report = hfc.compress(model, "low_rank:0.1", remove=True)
    assert report.skipped.keys() == report.layers.keys()
    assert not hasattr(model.config, "quantization_config")


def test_a_factored_model_can_be_pruned_and_is_factored_once():
    model = tiny_bert()
    hfc.compress(model, "low_rank:0.75", remove=True)
    before = describe(model)
    report = hfc.compress(model, "unstructured:0.5")
    assert "bert.encoder.layer.0.intermediate.dense.factor.weight" in report.layers
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)
    hfc.compress(model, "low_rank:0.5", remove=True)
    assert describe(model) == before
    assert "it is a factor already" in set(reasons_to_stay(model).values())


@pytest.mark.parametrize("pattern", ["unstructured:0.5", "int8", "2:4+int8"])
def test_only_ranks_and_groups_are_removed(pattern):
    model = tiny_bert()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError,
        match="remove=True changes shapes, which low_rank:SHARE, .* heads:SHARE can; ",
    ):
        hfc.compress(model, pattern, remove=True)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("of", ["", ":energy"])
def test_a_model_with_numbers_that_are_none_is_unchanged(value, of):
    net = nn.Sequential(nn.Linear(8, 40), nn.Linear(40, 8))
    with torch.no_grad():
        net[1].weight[0, 0] = value
    with pytest.raises(ValueError, match="'1.weight'"):
        hfc.compress(net, f"low_rank:0.75{of}", remove=True)
    assert [type(layer) for layer in net] == [nn.Linear, nn.Linear]


def test_gradients_reach_both_factors():
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Flatten(), nn.LazyLinear(20))
    x = torch.randn(2, 3, 6, 6)
    net(x)
    hfc.compress(net, "low_rank:0.75", remove=True)
    net(x).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in net.parameters())


def plain():
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Conv2d(3, 12, 3), nn.Conv2d(12, 12, 3, groups=2))
    return nn.ModuleDict({"body": inner, "head": nn.Linear(12, 30)})


def test_what_is_described_is_built_again():
    net, copied = plain(), plain()
    factor(net, {"body.0.weight": 3, "body.1.weight": 2, "head.weight": 5})
    described = json.loads(json.dumps(describe(net)))
    assert described == {
        "body.0": {"kind": "factored", "rank": 3},
        "body.1": {"kind": "factored", "rank": 2},
        "head": {"kind": "factored", "rank": 5},
    }
    with torch.device("meta"):
        empty = plain()
    for target in (empty, copied):
        rebuild(target, described)
        assert describe(target) == described
        target.load_state_dict(net.state_dict(), assign=True)
        for name, value in net.state_dict().items():
            assert torch.equal(target.state_dict()[name], value)
    x = torch.randn(1, 3, 6, 6)
    assert torch.equal(copied["body"](x), net["body"](x))


def test_names_with_and_without_a_prefix():
    layers = {"body.0": {"kind": "factored", "rank": 3}, "head": {"kind": "factored", "rank": 5}}
    bare = plain()["body"]
    rebuild(bare, layers, "body.", is_whole=False)
    assert describe(bare) == {"0": {"kind": "factored", "rank": 3}}
    whole = plain()
    rebuild(whole, {"0": {"kind": "factored", "rank": 3}}, "body.")
    assert describe(whole) == {"body.0": {"kind": "factored", "rank": 3}}
    with pytest.raises(ValueError, match="'head' is no layer of this model"):
        rebuild(plain()["body"], layers, "body.")


GOOD = {"kind": "factored", "rank": 3}
HOSTILE = [
    ([], "a description of layers is an object, got list"),
    (None, "got NoneType"),
    ("body.0", "got str"),
    ({"body.0": None}, "'body.0' is described by None; known is"),
    ({"body.0": 3}, "described by 3"),
    ({"body.0": []}, "described by \\[\\]"),
    ({"body.0": {"rank": 3}}, "described by"),
    ({"body.0": {**GOOD, "module": "os.system"}}, "described by"),
    ({"body.0": {**GOOD, "kind": "pickled"}}, "described by"),
    ({"body.0": {**GOOD, "kind": ["factored"]}}, "described by"),
    *(
        ({"body.0": {**GOOD, "rank": rank}}, "has a rank of at least 1 and below 12, got")
        for rank in (0, -1, 12, 10**18, 2.0, "3", True, None, [3], {}, float("nan"))
    ),
    ({"nope": GOOD}, "'nope' is no layer of this model"),
    ({"": GOOD}, "'' is no layer of this model"),
    ({"body": GOOD}, "'body' is no layer"),
    ({"body.0.weight": GOOD}, "is no layer"),
    ({"../body.0": GOOD}, "is no layer"),
    ({"/etc/passwd": GOOD}, "is no layer"),
    ({"__class__": GOOD}, "is no layer"),
    ({"body.__init__.__globals__": GOOD}, "is no layer"),
    ({"body.0": GOOD, "net.body.0": GOOD}, "'net.body.0' is described twice"),
    ({"shared": GOOD}, "cannot have two factors: several layers share it"),
]


@pytest.mark.parametrize(("layers", "message"), HOSTILE, ids=[str(h[0])[:50] for h in HOSTILE])
def test_a_description_is_not_trusted(layers, message):
    net = plain()
    if isinstance(layers, dict) and "shared" in layers:
        net["shared"], net["other"] = nn.Linear(8, 40), nn.Linear(8, 40)
        net["other"].weight = net["shared"].weight
    before = [type(m) for m in net.modules()]
    with pytest.raises(ValueError, match=message):
        rebuild(net, layers, "net.")
    assert [type(m) for m in net.modules()] == before


def test_no_shape_of_a_factor_is_that_of_a_weight():
    for rows, columns, kernel in product((2, 3, 8), (2, 3, 8), (1, 3)):
        full = min(rows, columns * kernel * kernel)
        for rank in range(1, full):
            net = nn.Sequential(nn.Conv2d(columns, rows, kernel), nn.Linear(columns, rows), Conv1D(rows, columns))
            shapes = [layer.weight.shape for layer in net]
            ranks = {"0.weight": rank}
            if rank < min(rows, columns):
                ranks |= {"1.weight": rank, "2.weight": rank}
            factor(net, ranks)
            for name in ranks:
                index = int(name[0])
                assert net[index].weight.shape != shapes[index]
