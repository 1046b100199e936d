"""Laws of patterns, with brute force as the oracle."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hf_compress as hfc
from hf_compress.patterns import n_m
from hf_compress.patterns.base import count_pruned
from hf_compress.targets import Target
from tests.methods.watch import Watch
from tests.test_selection import oracle

SHARES = st.one_of(
    st.floats(0, 1, exclude_max=True, allow_subnormal=False),
    st.integers(0, 999).map(lambda i: i / 1000),
    st.sampled_from([0.1 + 0.2, 0.7, 1e-7]),
)


@given(SHARES, st.sampled_from(["global", "layer"]))
def test_unstructured_reads_back(share, scope):
    pattern = hfc.Unstructured(share, scope=scope)
    assert hfc.parse_pattern(str(pattern)) == pattern
    assert "e" not in str(pattern).removeprefix("unstructured").removesuffix("layer")


@given(st.integers(1, 300), st.integers(1, 300))
def test_nm_reads_back(n, m):
    if n >= m:
        with pytest.raises(ValueError, match="allowed"):
            hfc.NM(n, m)
    else:
        assert hfc.parse_pattern(str(hfc.NM(n, m))) == hfc.NM(n, m)


@given(SHARES, st.integers(0, 10**7))
def test_counts_are_floors_of_the_decimal_share(share, total):
    assert count_pruned(share, total) == math.floor(Fraction(Decimal(repr(share))) * total)


def test_counts_are_free_of_float_noise():
    assert count_pruned(0.7, 10) == 7
    assert count_pruned(0.95, 1000) == 950
    assert count_pruned(0.29, 100) == 29  # 0.29 * 100 is 28.999999999999996


@pytest.mark.parametrize(
    ("text", "canonical", "revision"),
    [
        ("unstructured:0.9", "unstructured:0.9", "unstructured-0.90"),
        ("unstructured:0.90", "unstructured:0.9", "unstructured-0.90"),
        ("unstructured:.955:layer", "unstructured:0.955:layer", "unstructured-0.955-layer"),
        ("unstructured:0.5:global", "unstructured:0.5", "unstructured-0.50"),
        ("unstructured:0", "unstructured:0", "unstructured-0.00"),
        (" 2:4 ", "2:4", "nm-2of4"),
        ("1:16", "1:16", "nm-1of16"),
    ],
)
def test_texts(text, canonical, revision):
    pattern = hfc.parse_pattern(text)
    assert str(pattern) == canonical
    assert pattern.revision == revision
    assert hfc.parse_pattern(pattern) is pattern


WRONG_SHARES = ["unstructured", "unstructured:1", "unstructured:1.5", "unstructured:-0.1", "unstructured:nan"]
WRONG_FORMS = [
    "unstructured:0.5:row",
    "unstructured:0.5:layer:x",
    "unstructured:1e-3",
    "4:4",
    "0:4",
    "2:4:8",
    "sparse:0.5",
]


@pytest.mark.parametrize("text", ["", None, 3.5, True, *WRONG_SHARES, *WRONG_FORMS])
def test_wrong_texts_name_what_is_allowed(text):
    with pytest.raises(ValueError, match=r"allowed: .*such as"):
        hfc.parse_pattern(text)


@pytest.mark.parametrize("layout", ["linear", "conv1d", "nchw", "channels_last", "1x1", "strided"])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (4, 8), (3, 5), (1, 300)])
def test_chunks_on_the_cpu_give_the_mask_of_counting(layout, n, m, monkeypatch):
    """For every layout in memory, with ties, over several chunks."""
    monkeypatch.setattr(n_m, "CHUNK", 64 * m)
    generator = torch.Generator().manual_seed(m)
    shape, dim = {"linear": ((33, 2 * m), 1), "conv1d": ((4 * m, 19), 0), "1x1": ((9, 2 * m, 1, 1), 1)}.get(
        layout, ((9, 2 * m, 3, 3), 1)
    )
    weight = torch.randint(-3, 4, shape, generator=generator).float()
    if layout in ("channels_last", "1x1"):
        weight = weight.to(memory_format=torch.channels_last)
    if layout == "strided":
        weight = weight[:, :, ::2].transpose(2, 3)
    found = n_m._keep_in_chunks(weight, dim, n, m)
    assert torch.equal(found, n_m.keep_by_counting(weight, dim, n, m))
    assert found.sum() * m == n * weight.numel()
    assert n_m._keep_in_chunks(weight.double(), dim, n, m).equal(found)


@pytest.mark.parametrize(("number", "text"), [(124, "2:4"), (248, "4:8"), (61, "1:1")])
def test_yaml_base_60_numbers_are_quoted_back(number, text):
    with pytest.raises(ValueError, match=f'write "{text}"'):
        hfc.parse_pattern(number)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=3), SHARES, st.integers(0, 2**31))
def test_unstructured_counts_and_ties(sizes, share, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = {str(i): (2 * torch.randn(n, generator=generator)).round() for i, n in enumerate(sizes)}
    masks = hfc.Unstructured(share).masks(weights)
    wanted = oracle(list(weights.values()), count_pruned(share, sum(sizes)))
    assert all(torch.equal(m, w) for m, w in zip(masks.values(), wanted, strict=True))
    for name, mask in hfc.Unstructured(share, scope="layer").masks(weights).items():
        assert torch.equal(mask, oracle([weights[name]], count_pruned(share, weights[name].numel()))[0])


@given(st.integers(0, 2**31), SHARES, SHARES)
def test_masks_of_a_larger_share_lie_inside(seed, a, b):
    weights = {"w": (3 * torch.randn(101, generator=torch.Generator().manual_seed(seed))).round()}
    few, many = (hfc.Unstructured(s).masks(weights)["w"] for s in sorted((a, b)))
    assert not (many & ~few).any()


def brute_force_nm(weight, dim, n, m):
    rows = weight.movedim(dim, -1)
    keep = torch.ones(rows.shape, dtype=torch.bool)
    for index in torch.cartesian_prod(*[torch.arange(s) for s in rows.shape[:-1]]).reshape(-1, rows.ndim - 1).tolist():
        row = rows[tuple(index)]
        for start in range(0, row.numel(), m):
            group = sorted(range(start, start + m), key=lambda i: (abs(row[i].item()), i))
            for i in group[: m - n]:
                keep[(*index, i)] = False
    return keep.movedim(-1, dim)


@given(st.data())
def test_nm_against_brute_force(data):
    m = data.draw(st.integers(2, 8))
    n = data.draw(st.integers(1, m - 1))
    shape = [data.draw(st.integers(0, 3)) for _ in range(data.draw(st.sampled_from([2, 3, 4])))]
    dim = data.draw(st.sampled_from([0, 1]))
    shape[dim] = m * data.draw(st.integers(0, 2))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    weight = (
        (2 * torch.randn(shape, generator=generator))
        .round()
        .to(data.draw(st.sampled_from([torch.float32, torch.bfloat16])))
    )
    if data.draw(st.booleans()):
        weight = weight.flip(0).transpose(0, 1).contiguous().transpose(0, 1)
    mask = hfc.NM(n, m).masks({"w": Target(weight, dim, "linear")})["w"]
    assert mask.shape == weight.shape
    assert torch.equal(mask, brute_force_nm(weight, dim, n, m))


def test_nm_groups_run_along_the_reduction_axis_of_every_layer():
    from transformers.pytorch_utils import Conv1D

    model = torch.nn.Sequential(
        torch.nn.Conv2d(8, 6, 3), torch.nn.Conv1d(4, 5, 2), torch.nn.Linear(8, 3), Conv1D(5, 12)
    )
    report = hfc.compress(model, "2:4")
    assert not report.skipped
    for name, target in hfc.find_targets(model).items():
        groups = target.parameter.movedim(target.reduction_dim, -1).unflatten(-1, (-1, 4))
        assert (groups != 0).sum(-1).eq(2).all(), name


def test_nm_skips_what_is_no_multiple_and_says_so():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 8, 3, groups=8), torch.nn.Conv2d(8, 4, 1))
    before = model[0].weight.clone()
    report = hfc.compress(model, "2:4")
    assert set(report.skipped) == {"0.weight", "1.weight"}
    assert "axis of 3 is no multiple of 4" in report.skipped["0.weight"]
    assert torch.equal(model[0].weight, before)
    assert report.layers["2.weight"].sparsity == 0.5
    assert hfc.NM(2, 4).masks({"w": before})["w"].all()


@given(st.sampled_from(["unstructured:0.7", "unstructured:0.3:layer", "2:4", "3:7"]), st.integers(0, 2**31))
def test_projecting_twice_changes_nothing_more(text, seed):
    pattern = hfc.parse_pattern(text)
    weights = {"a": torch.randn(7, 28, generator=torch.Generator().manual_seed(seed)), "b": torch.ones(4, 28)}
    pattern.project_(weights)
    once = {k: v.clone() for k, v in weights.items()}
    pattern.project_(weights)
    assert all(torch.equal(weights[k], once[k]) for k in weights)


def test_kept_weights_are_untouched_and_pruned_ones_are_plus_zero():
    weight = torch.tensor([[-1.0, 2.0, float("inf"), -0.5]])
    hfc.parse_pattern("2:4").project_({"w": weight})
    assert weight.tolist() == [[0.0, 2.0, float("inf"), 0.0]]
    assert not torch.signbit(weight).any()


@pytest.mark.parametrize("text", ["unstructured:0.5", "2:4"])
def test_nan_is_named_and_nothing_changes(text):
    good, bad = torch.randn(4, 4), torch.randn(4, 4)
    bad[1, 2] = float("nan")
    before = good.clone()
    with pytest.raises(ValueError, match=r"'layer\.bad' holds NaN"):
        hfc.parse_pattern(text).project_({"good": good, "layer.bad": bad})
    assert torch.equal(good, before)


def test_integer_weights_are_refused():
    with pytest.raises(ValueError, match=r"'w' has dtype torch\.int8"):
        hfc.NM(2, 4).masks({"w": torch.ones(4, 4, dtype=torch.int8)})


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 3)])
def test_n_of_m_of_all_weights_at_once_is_that_of_each(n, m):
    """The path of accelerators: one set of calls for weights of any shape, type and reduction axis."""
    generator = torch.Generator().manual_seed(0)
    shapes = [((2 * m, 5), 0), ((3, 4 * m), 1), ((2, m, 3, 3), 1), ((m,), 0)]
    weights = [((4 * torch.randn(shape, generator=generator)).round(), dim) for shape, dim in shapes]
    weights[1] = weights[1][0].bfloat16(), 1
    weights[2] = weights[2][0].contiguous(memory_format=torch.channels_last), 1
    found = n_m.keep_in_all(weights, n, m)
    for mask, (weight, dim) in zip(found, weights, strict=True):
        assert mask.shape == weight.shape
        assert torch.equal(mask, n_m.keep_by_counting(weight, dim, n, m))


def test_n_of_m_takes_as_many_calls_for_many_weights_as_for_one():
    def calls(count):
        weights = {str(i): Target(torch.empty(8, 8, device="meta"), 1, "linear") for i in range(count)}
        with Watch() as watch:
            masks = n_m.NM(2, 4).select(weights)
        assert {mask.shape for mask in masks.values()} == {(8, 8)}
        return sum(name in ("le", "add_", "ge", "bitwise_not") for name in watch.names)

    assert calls(1) == calls(9) > 0
