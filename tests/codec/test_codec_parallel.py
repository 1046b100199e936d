"""Several processes decode the same as one, and no end of one of them is waited for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

from hf_compress.codec import CodecError, Latents, decode_all, encode
from tests.codec.cases import decoders, laplace, same
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def model():
    rng = np.random.default_rng(0)
    tensors = {f"conv{i}": Latents(laplace(9_000 * (i + 1), 9, i / 4, seed=i), 9, 3, i - 1.5) for i in range(5)}
    tensors["linear"] = Latents(laplace(60_000, 1, 0, 20).reshape(200, 300), 1, 0, 1, rng.random(200, np.float32), True)
    tensors["wide"] = Latents(rng.integers(-3_000, 3_000, (70, 2)), 2, 1)
    tensors["constant"] = Latents(np.full((2, 2, 1, 1, 1), 7))
    return tensors, *encode(tensors, decoders())


def shapes(tensors):
    return {name: tensor.shape for name, tensor in tensors.items()}


def children():
    """Processes that this one started and that have not ended."""
    return [child.pid for child in psutil.Process().children()]


@pytest.mark.parametrize("processes", [1, 2, 3, 50])
def test_all_tensors_come_whole(model, processes):
    tensors, blobs, data = model
    before = children()
    found = dict(decode_all(blobs, data, shapes(tensors), processes))
    assert found.keys() == tensors.keys()
    assert all(same(found[name], tensor) for name, tensor in tensors.items())
    assert all(latents.values.flags.writeable for latents in found.values())
    assert children() == before


def test_the_largest_files_come_first(model):
    tensors, blobs, data = model
    names = [name for name, _ in decode_all(blobs, data, shapes(tensors), 1)]
    assert names == sorted(names, key=lambda name: -len(blobs[name]))
    assert [*decode_all({}, data, {}, 3)] == []


@pytest.mark.parametrize("processes", [1, 2])
def test_a_damaged_tensor_is_named(model, processes):
    tensors, blobs, data = model
    damaged = blobs | {"wide": blobs["wide"][:-9] + b"x" + blobs["wide"][-8:]}
    before = children()
    with pytest.raises(CodecError, match="^wide: the check sum does not agree"):
        list(decode_all(damaged, data, shapes(tensors), processes))
    with pytest.raises(CodecError, match=r"^conv1: .* of shape \(2000, 9\), the model has \(9, 2000\)"):
        list(decode_all(blobs, data, shapes(tensors) | {"conv1": (9, 2_000)}, processes))
    with pytest.raises(CodecError, match="check sum"):
        list(decode_all(blobs, data[:-1] + b"x", shapes(tensors), processes))
    assert children() == before


def test_what_is_no_order_is_refused(model):
    tensors, blobs, data = model
    with pytest.raises(ValueError, match="at least 1 process decodes, got 0"):
        list(decode_all(blobs, data, shapes(tensors), 0))
    with pytest.raises(ValueError, match=r"no shape: \['constant', 'conv0'"):
        list(decode_all(blobs, data, {}, 2))


def test_a_killed_process_is_an_error_and_no_hang(model):
    tensors, blobs, data = model
    many = {f"{name}{i}": blob for name, blob in blobs.items() for i in range(30)}
    of_many = {f"{name}{i}": tensor.shape for name, tensor in tensors.items() for i in range(30)}
    before, start = set(children()), time.monotonic()
    found = decode_all(many, data, of_many, 2)
    next(found)
    os.kill(max(set(children()) - before), signal.SIGKILL)
    with pytest.raises(RuntimeError, match="the process that decoded it ended with code -9"):
        list(found)
    assert time.monotonic() - start < 30
    assert set(children()) == before


def test_processes_end_when_nobody_wants_more(model):
    tensors, blobs, data = model
    before = children()
    found = decode_all(blobs, data, shapes(tensors), 2)
    next(found)
    assert len(children()) == len(before) + 2
    found.close()
    assert children() == before


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
import numpy as np
from hf_compress.codec import Latents, decode_all, encode
print("started")
tensors = {{str(i): Latents(np.arange(i + 5)) for i in range(6)}}
blobs, groups = encode(tensors, [np.ones((1, 1), np.float32)])
shapes = {{name: t.shape for name, t in tensors.items()}}
print(len(dict(decode_all(blobs, groups, shapes, 2))))
"""


def test_a_script_runs_once_and_its_folder_is_not_imported(tmp_path):
    """No `if __name__ == "__main__"` in the script, and a numpy of its own in the folder where it runs."""
    script = tmp_path / "elsewhere" / "script.py"
    script.parent.mkdir()
    script.write_text(SCRIPT.format(root=str(ROOT)))
    (tmp_path / "numpy.py").write_text("raise SystemExit('the wrong numpy')")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run([sys.executable, script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert run.stdout.split() == ["started", "6"], run.stderr
    assert run.stderr == ""


def test_a_process_imports_neither_torch_nor_transformers(model):
    source = "import sys, hf_compress.codec.worker; print({'torch', 'transformers', 'timm'} & sys.modules.keys())"
    run = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == "set()", run.stderr
