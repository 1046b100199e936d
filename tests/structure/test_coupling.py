"""What belongs together is found, and is true: what one group makes, only that group's columns read."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers as t
from torch import nn

import hf_compress as hfc
from hf_compress.structure import find_coupled_targets
from hf_compress.targets import Groups
from tests.structure.conftest import EXPECTED, SIZES, llama, make, mlp, run, timm_vit, vit

KINDS = ("neurons", "heads")


def couplings(model, kind):
    """Name of the groups to the layers that have a part in them."""
    found: dict[str, dict[str, Groups]] = {}
    for name, target in find_coupled_targets(model).items():
        for part in target.groups[kind] if isinstance(target.groups[kind], tuple) else ():
            found.setdefault(part.of, {})[name.removesuffix(".weight")] = part
    return found


def makes(layer, part):
    """Whether the groups are outputs of a layer."""
    return part.dim == (1 if type(layer).__name__ == "Conv1D" else 0)


def disturb(model, parts, chosen):
    """What the reading layer gets when the outputs of the chosen groups are changed, and where it may differ."""
    modules, seen, handles = dict(model.named_modules()), [], []
    (reader,) = [n for n, p in parts.items() if not makes(modules[n], p)]

    def add_noise(part):
        def hook(module, args, output):
            lines = torch.zeros(part.blocks, part.count, output.shape[-1] // part.blocks // part.count)
            lines[:, chosen] = 1
            return output + lines.flatten() * torch.linspace(1, 2, output.shape[-1])

        return hook

    handles.append(modules[reader].register_forward_pre_hook(lambda module, args: seen.append(args[0].detach())))
    run(model)
    for name, part in parts.items():
        if name != reader:
            handles.append(modules[name].register_forward_hook(add_noise(part)))
    before = len(seen)
    run(model)
    for handle in handles:
        handle.remove()
    first, second = seen[0], seen[before]
    return (first != second).unflatten(-1, (parts[reader].count, -1)).any(-1).flatten(0, -2)


CASES = [(build, kind) for build, counts in EXPECTED.items() for kind, n in zip(KINDS, counts, strict=True) if n]


@pytest.mark.parametrize(("build", "kind"), CASES, ids=[f"{b.__name__}-{k}" for b, k in CASES])
def test_groups_are_their_own(build, kind):
    model = make(build)
    found = couplings(model, kind)
    assert len(found) == EXPECTED[build][KINDS.index(kind)]
    for parts in found.values():
        count = next(iter(parts.values())).count
        assert count > 1
        chosen = torch.arange(count) % 2 == 1
        changed = disturb(model, parts, chosen)
        assert not changed[:, ~chosen].any()
        assert changed[:, chosen].any(0).all()


@pytest.mark.parametrize("build", [timm_vit, llama])
def test_another_layout_is_no_coupling(build):
    model = make(build)
    parts = next(iter(couplings(model, "heads").values()))
    wrong = {n: replace(p, blocks=1, count=p.count) if p.blocks > 1 else p for n, p in parts.items()}
    if build is llama:  # single query heads do not go alone
        wrong = {n: replace(p, count=2 * p.count) for n, p in parts.items()}
    chosen = torch.arange(next(iter(wrong.values())).count) % 2 == 1
    assert disturb(model, wrong, chosen)[:, ~chosen].any()


@pytest.mark.parametrize("build", EXPECTED, ids=lambda b: b.__name__)
def test_only_known_pairs_are_found(build):
    model = make(build)
    assert tuple(len(couplings(model, kind)) for kind in KINDS) == EXPECTED[build]
    targets = find_coupled_targets(model)
    assert targets.keys() == hfc.find_targets(model).keys()
    assert all(set(t.groups) == set(KINDS) for t in targets.values())
    for target in targets.values():
        for found in target.groups.values():
            assert found
            assert isinstance(found, (str, tuple))


def reasons(model, kind, **globs):
    return {n: t.groups[kind] for n, t in find_coupled_targets(model, **globs).items() if t.groups[kind]}


def test_queries_go_with_their_key_and_value():
    parts = couplings(make(llama), "heads")["layers.0.self_attn"]
    assert {n.split(".")[-1]: (p.dim, p.count) for n, p in parts.items()} == {
        "q_proj": (0, 2),
        "k_proj": (0, 2),
        "v_proj": (0, 2),
        "o_proj": (1, 2),
    }


def test_an_excluded_weight_leaves_its_groups_alone():
    model = make(vit)
    found = reasons(model, "neurons", exclude=["layers.0.mlp.fc1"])
    assert (
        found["layers.0.mlp.fc2.weight"] == "'layers.0.mlp.fc1.weight' has a part in the same neurons and is no target"
    )
    assert isinstance(found["layers.1.mlp.fc2.weight"], tuple)
    report = hfc.compress(model, "neurons:0.5", exclude=["layers.0.mlp.fc1"])
    assert report.layers["layers.0.mlp.fc2.weight"].sparsity == 0
    assert "is no target" in report.skipped["layers.0.mlp.fc2.weight"]


def test_a_norm_of_all_heads_is_a_reason():
    model = make(lambda: t.Olmo2Model(t.Olmo2Config(**SIZES)))
    assert set(reasons(model, "heads").values()) >= {"'q_norm' takes all heads of 'layers.0.self_attn' together"}
    with pytest.raises(ValueError, match="finds no heads in these .*'q_norm' takes all heads"):
        hfc.compress(model, "heads:0.5")


class Attention(nn.Module):
    def __init__(self, output=True, **facts):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(12, 12) for _ in range(3))
        if output:
            self.o_proj = nn.Linear(12, 12)
        vars(self).update(facts)


@pytest.mark.parametrize(
    ("attention", "reason"),
    [
        (Attention(), "the number of heads of '0' cannot be found"),
        (Attention(num_heads=True), "the number of heads of '0' cannot be found"),
        (Attention(num_heads=5), "the number of heads of '0' cannot be found"),
        (Attention(head_dim=5), "its heads of 5 do not fit the widths of '0'"),
        (Attention(output=False, num_heads=3), "the output projection of '0' cannot be found"),
    ],
)
def test_heads_that_cannot_be_told_apart_are_skipped(attention, reason):
    net = nn.Sequential(attention, make(llama).layers[0].self_attn)
    report = hfc.compress(net, "heads:0.5")
    assert reason in report.skipped["0.q_proj.weight"]
    assert report.layers["0.q_proj.weight"].sparsity == 0
    assert report.layers["1.q_proj.weight"].sparsity == 0.5


@pytest.mark.parametrize("between", [nn.LayerNorm(6), nn.Softmax(-1), nn.GLU(), nn.BatchNorm1d(6), nn.PReLU(6)])
def test_what_mixes_neurons_stands_in_the_way(between):
    width = 3 if isinstance(between, nn.GLU) else 6
    net = nn.Sequential(nn.Linear(4, 6), between, nn.Linear(width, 5), nn.Hardswish(), nn.Linear(5, 2))
    found = reasons(net, "neurons")
    if not isinstance(between, nn.GLU):
        assert found["0.weight"] == f"a {type(between).__name__} stands between the layers of its neurons"
    assert isinstance(found["0.weight"], str)
    assert found["2.weight"] == (Groups("4", 0, 5),)


def test_a_model_in_a_wrapper():
    model = make(mlp)
    wrapped = nn.DataParallel(model)
    assert couplings(wrapped, "neurons") == couplings(model, "neurons")
