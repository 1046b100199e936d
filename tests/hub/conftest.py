"""A Hub on loopback for the client of this process, and a family of six to push."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.conftest import tiny_bert
from tests.hub.server import HubServer

PATTERNS = ["unstructured:0.5", "unstructured:0.9", "2:4", "int8", "2:4+int8"]


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture
def here(hub, monkeypatch, tmp_path):
    """This process talks to `hub`: its libraries read the address at import, so that it is set in three places."""
    import huggingface_hub.constants as constants
    import transformers.utils.hub as transformers_hub

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(transformers_hub, "_hf_api", None)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    return hub


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    import hf_compress as hfc

    def evaluate(model):
        return {"accuracy": 0.5 + float((model.bert.encoder.layer[0].output.dense.weight != 0).float().mean()) / 4}

    folder = tmp_path_factory.mktemp("families") / "six"
    recipe = {"method": "cram", "task": "text-classification", "rho": 0.05}
    return hfc.build_family(
        tiny_bert(), PATTERNS, evaluate, None, folder, method="cram", task="text-classification", recipe=recipe
    )


def run_python(code, environment, *arguments, check=True):
    """A fresh process; its standard output."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done.stdout
