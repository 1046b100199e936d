"""Checkpoints that released versions wrote: each loads, in every storage, to the logits it had then."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as t

import hf_compress as hfc
from hf_compress.loading.statistics import STATISTICS
from tests.conftest import ROOT
from tests.fixtures.make import inputs_of

FIXTURES = ROOT / "tests" / "fixtures"
VERSIONS = sorted(p.name for p in FIXTURES.iterdir() if (p / "logits.json").is_file())
CASES = [(v, name) for v in VERSIONS for name in json.loads((FIXTURES / v / "logits.json").read_text())]
CLASSES = {"bert": t.AutoModelForSequenceClassification, "resnet": t.AutoModelForImageClassification}


def kind_of(name):
    return "bert" if name.startswith("bert") else "resnet"


def logits(folder, kind, **options):
    model = CLASSES[kind].from_pretrained(folder, **options).eval()
    with torch.no_grad():
        return model(**inputs_of(kind)).logits


def test_this_version_has_its_own():
    assert hfc.__version__ in VERSIONS


@pytest.mark.parametrize(("version", "name"), CASES)
def test_a_checkpoint_gives_the_logits_that_it_had(version, name):
    wanted = torch.tensor(json.loads((FIXTURES / version / "logits.json").read_text())[name])
    found = logits(FIXTURES / version / name, kind_of(name))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert wanted.abs().max() > 1e-2


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", CLASSES)
def test_a_family_is_read_with_all_its_hashes(version, kind):
    family = hfc.load_family(FIXTURES / version / kind)
    assert {f"{kind}/{v.path}" for v in family.checkpoints} == {n for v, n in CASES if v == version and kind in n}
    storages = {v.storage for v in family.checkpoints}
    assert storages == ({"dense", "factored", "int8", "coded"} if kind == "bert" else {"dense", "coded"})


@pytest.mark.parametrize("version", VERSIONS)
def test_statistics_of_an_earlier_pack_are_taken(version):
    folder = FIXTURES / version / "resnet"
    assert (folder / STATISTICS).is_file()
    wanted = torch.tensor(json.loads((FIXTURES / version / "logits.json").read_text())["resnet/unstructured-0.50"])
    found = logits(folder / "dense", "resnet", quantization_config=hfc.HfCompressConfig("unstructured:0.5"))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
