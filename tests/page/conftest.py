"""One family of twelve checkpoints, built once; its metrics are made of its zeros, so that nothing is evaluated."""

from __future__ import annotations

import json
import re

import pytest
import torch

import hf_compress as hfc
from tests.conftest import tiny_vit

SHARES = ["unstructured:0.5", "unstructured:0.7", "unstructured:0.8", "unstructured:0.9", "unstructured:0.9:layer"]
PATTERNS = [*SHARES, "2:4", "4:8", "int8", "2:4+int8", "low_rank:0.75", "neurons:0.5"]


def evaluate(model):
    """Falls with the zeros; removed neurons count as zeros too."""
    kept = sum(float((p != 0).sum()) for p in model.parameters())
    return {"loss": 4000 / kept, "accuracy": min(0.9, kept / 8000), "eval_samples_per_second": 3.0}


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    inputs = {"pixel_values": torch.zeros(1, 3, 8, 8)}
    folder = tmp_path_factory.mktemp("families") / "twelve"
    options = {"method": "cram", "task": "image-classification", "example_inputs": inputs, "remove": True}
    return hfc.build_family(tiny_vit(), PATTERNS, evaluate, None, folder, **options)


def content_of(page):
    """What a page holds, as its script reads it."""
    (text,) = re.findall(r'<script id="content" type="application/json">(.*?)</script>', page, re.S)
    return json.loads(text)
