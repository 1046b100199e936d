"""Every storage from a Hub, in a fresh process: from_pretrained, pipeline, device_map, and again without network."""

from __future__ import annotations

import json

import torch
from transformers import BertForSequenceClassification

import hf_compress as hfc
from hf_compress.family.storage import load_model
from tests.hub.conftest import run_python
from tests.text import tiny_text_model, tiny_tokenizer

READER = """
import json, sys
import hf_compress
import torch
from transformers import AutoModelForSequenceClassification, pipeline

found = {}
for revision in sys.argv[1:]:
    model = AutoModelForSequenceClassification.from_pretrained("tester/all", revision=revision, device_map="cpu").eval()
    with torch.no_grad():
        logits = model(input_ids=torch.arange(5, 17)[None]).logits.tolist()
    classify = pipeline("text-classification", model="tester/all", revision=revision, device="cpu")
    found[revision] = [logits, classify("a b c")[0]["score"]]
print("FOUND" + json.dumps(found))
"""


def build(folder):
    """One variant for each storage: dense, removed, factored, int8, coded."""
    model = BertForSequenceClassification.from_pretrained(tiny_text_model(folder / "model", "text-classification"))
    parts = {"processing_class": tiny_tokenizer(), "task": "text-classification"}
    family = hfc.build_family(
        model, ["2:4", "neurons:0.5", "low_rank:0.5", "int8"], None, None, folder / "all", remove=True, **parts
    )
    coded = ["unstructured:0.5+int8"]
    return family.add(hfc.build_family(model, coded, None, None, folder / "coded", storage="coded", **parts))


def test_every_storage_by_every_way(here, tmp_path):
    family = build(tmp_path)
    assert [v.storage for v in family.variants] == ["dense", "dense", "factored", "int8", "coded"]
    assert family["neurons:0.5"].parameters_removed > 0
    family.push_to_hub("all")
    revisions = [v.revision for v in family.checkpoints]
    environment = here.environment(tmp_path / "home")
    found = json.loads(run_python(READER, environment, *revisions).split("FOUND")[1])
    assert list(found) == revisions
    for variant in family.checkpoints:
        model = load_model(BertForSequenceClassification, family.path_to(variant)).eval()
        with torch.no_grad():
            wanted = model(input_ids=torch.arange(5, 17)[None]).logits
        logits, score = found[variant.revision]
        torch.testing.assert_close(torch.tensor(logits), wanted, rtol=1e-5, atol=1e-6)
        assert 1 / 2 <= score < 1
    assert len({json.dumps(logits) for logits, _ in found.values()}) == len(revisions)
    asked = len(here.requests)
    offline = run_python(READER, {**environment, "HF_HUB_OFFLINE": "1"}, *revisions)
    assert json.loads(offline.split("FOUND")[1]) == found
    assert len(here.requests) == asked
