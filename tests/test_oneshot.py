"""compress: one call on any model, in place."""

from __future__ import annotations

import pytest
import torch

import hf_compress as hfc


@pytest.mark.parametrize("share", [0, 0.3, 0.5, 0.95])
def test_exactly_the_asked_share_is_zero(vit, share):
    report = hfc.compress(vit, f"unstructured:{share}")
    targets = [t.parameter for t in hfc.find_targets(vit).values()]
    total = sum(p.numel() for p in targets)
    assert sum(int((p == 0).sum()) for p in targets) == int(share * total + 1e-9)
    assert report.sparsity == pytest.approx(int(share * total + 1e-9) / total)
    assert report.pattern == f"unstructured:{share}"
    assert report.parameters_removed == 0
    assert set(report.layers) == set(hfc.find_targets(vit))


def test_storage_stays_and_other_parameters_too(resnet):
    before = {n: (p.data_ptr(), p.clone()) for n, p in resnet.named_parameters()}
    hfc.compress(resnet, "2:4", exclude=["classifier.1"])
    targets = hfc.find_targets(resnet, exclude=["classifier.1"])
    for name, parameter in resnet.named_parameters():
        assert parameter.data_ptr() == before[name][0]
        if name not in targets:
            assert torch.equal(parameter, before[name][1])


def test_nan_is_named_and_the_model_unchanged(vit):
    name, target = list(hfc.find_targets(vit).items())[3]
    with torch.no_grad():
        target.parameter[0, 0] = float("nan")
    before = {n: p.clone() for n, p in vit.named_parameters()}
    with pytest.raises(ValueError, match=f"'{name}' holds NaN"):
        hfc.compress(vit, "unstructured:0.5")
    assert all(torch.equal(p.nan_to_num(), before[n].nan_to_num()) for n, p in vit.named_parameters())


def test_a_model_without_targets():
    with pytest.raises(ValueError, match="LayerNorm has no weight to compress"):
        hfc.compress(torch.nn.LayerNorm(4), "2:4")
