"""One thread (two spin against each other on small machines), no Hub, and the small nets that tests share."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "agg")

import pytest
import torch
from hypothesis import settings
from transformers.utils import logging

torch.set_num_threads(1)
logging.get_logger()  # its handler keeps the stderr of now, not that of the first test, which is closed behind it
settings.register_profile("default", deadline=None, max_examples=200)
settings.load_profile("default")

ROOT = Path(__file__).parents[1]


def pytest_collection_modifyitems(items):
    """Modules whose fixtures start processes stay on one worker, which makes each fixture once."""
    for item in items:
        folder, name = item.path.parent.name, item.path.name
        if folder == "distributed" or (folder, name) == ("integration", "test_readme.py"):
            item.add_marker(pytest.mark.xdist_group(name))


def tiny_vit(**overrides):
    from transformers import ViTConfig, ViTForImageClassification, set_seed

    set_seed(0)
    fields = {
        "image_size": 8,
        "patch_size": 4,
        "num_channels": 3,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "num_labels": 3,
    }
    return ViTForImageClassification(ViTConfig(**{**fields, **overrides}))


def tiny_resnet(**overrides):
    from transformers import ResNetConfig, ResNetForImageClassification, set_seed

    set_seed(0)
    fields = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic", "num_labels": 3}
    return ResNetForImageClassification(ResNetConfig(**{**fields, **overrides}))


def image_samples(count=48, size=8):
    """Images whose class can be learned: the mean of a channel decides."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(count, 3, size, size, generator=generator)
    labels = pixels.mean((2, 3)).argmax(1)
    return [{"pixel_values": x, "labels": y} for x, y in zip(pixels, labels, strict=True)]


def tiny_bert():
    import transformers as t

    t.set_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 3}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return t.BertForSequenceClassification(t.BertConfig(**sizes, **dropout, intermediate_size=24))


def text_samples():
    ids = torch.randint(5, 64, (48, 12), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": i, "labels": i.sum() % 3} for i in ids]


@pytest.fixture
def vit():
    return tiny_vit()


@pytest.fixture
def resnet():
    return tiny_resnet()


@pytest.fixture
def mlp():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
