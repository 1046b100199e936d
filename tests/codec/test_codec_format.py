"""Files of today are those of tomorrow, of other processes, and of other releases of constriction."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hf_compress.codec import Latents, byte_report, decode_latents, encode, rans, read_groups, weights_of
from hf_compress.codec.tables import Table, fit
from tests.codec import oracle
from tests.codec.cases import decoders, laplace, same
from tests.conftest import ROOT

RECORDED = Path(__file__).with_name("recorded.json")


def recorded_model():
    """Every codec, type of scales and kind of tables. A random generator's numbers might change one day."""
    steps = np.arange(3_000)
    skewed = ((steps * 7_919 % 101) ** 3 // 20_000 - 3).astype(np.int16)  # 47 values, small ones more often
    rows = (skewed[:2_700].reshape(5, 60, 9) + 3) // 12
    rows[:, steps[:60] % 4 > 0] = 0
    matrices = [np.array([[0.02]], np.float32), (np.arange(81).reshape(9, 9) / 64 - 0.5).astype(np.float32)]
    third = np.full(60, 1 / 3, np.float32)
    tensors = {
        "constant": Latents(np.full((3, 2), -300), gain=0.5),
        "raw": Latents(steps[:12].astype(np.int8).reshape(3, 4), scales=np.array([1, 0.5, -2], np.float32)),
        "raw16": Latents(np.array([-32_768, 32_767, 0, 1]), scales=third[:4]),
        "own": Latents(skewed.reshape(60, 50), gain=1.25, scales=third, is_transposed=True),
        "top": Latents(np.array([5, 6] * 40), scales=np.full(80, 2.0**100, np.float32)),
        **{f"shared{i}": Latents(part.reshape(5, 12, 3, 3), 9, 1) for i, part in enumerate(rows)},
    }
    return tensors, matrices


def test_recorded_files_stay_readable_and_are_still_written():
    tensors, matrices = recorded_model()
    recorded = json.loads(RECORDED.read_text())
    data = bytes.fromhex(recorded["groups"])
    groups = read_groups(data)
    for name, tensor in tensors.items():
        blob = bytes.fromhex(recorded["blobs"][name])
        assert same(decode_latents(blob, groups, tensor.shape), tensor)
        assert oracle.latents(blob, data)["values"] == tensor.values.reshape(-1).tolist()
        weights = weights_of(tensor, matrices[tensor.group])
        assert hashlib.sha256(weights.astype("<f4").tobytes()).hexdigest() == recorded["weights"][name]
    blobs, again = encode(tensors, matrices)
    assert again == data
    assert {name: blob.hex() for name, blob in blobs.items()} == recorded["blobs"]


def test_the_recorded_files_hold_every_form():
    blobs = [bytes.fromhex(blob) for blob in json.loads(RECORDED.read_text())["blobs"].values()]
    assert {blob[5] for blob in blobs} == {0, 1, 2}
    assert {flag for blob in blobs for flag in (1, 2, 4, 8) if blob[7] & flag} == {1, 2, 4, 8}
    assert any(blob[5] == 2 and not blob[7] & 2 for blob in blobs)
    at = [16 + 4 * blob[6] for blob in blobs]
    assert {blob[i] for blob, i in zip(blobs, at, strict=True) if blob[7] & 4} == {0, 1, 2}


SCRIPT = """
import hashlib, sys
import numpy as np
from hf_compress.codec import Latents, encode
rng, tensors = np.random.default_rng(0), {}
for i in range(9):
    rows = np.rint(rng.laplace(0, 1 + i, (9_000, 9))).astype(int)
    rows[rng.random(9_000) < i / 9] = 0
    tensors[f"sparse{i}"] = Latents(rows, 9, 1)
    tensors[f"dense{i}"] = Latents(np.rint(rng.laplace(0, 1 + i, 7_000)).astype(int))
blobs, groups = encode(tensors, [np.eye(1, dtype=np.float32), np.eye(9, dtype=np.float32)])
print(hashlib.sha256(groups + b"".join(blobs[name] for name in sorted(blobs))).hexdigest())
assert not {"torch", "transformers"} & sys.modules.keys()
"""


def test_processes_and_threads_write_the_same_bytes():
    found = set()
    for threads, seed in ((1, 1), (1, 2), (2, 3)):
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONHASHSEED": str(seed)}
        run = subprocess.run([sys.executable, "-c", SCRIPT], env=env, cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        found.add(run.stdout)
    assert len(found) == 1


def test_a_table_follows_from_its_weights():
    assert Table(0, np.array([1, 1, 2])).frequencies.tolist() == [16_383, 16_383, 32_770]
    assert Table(0, np.array([0, 65_535, 0])).frequencies.tolist() == [1, 65_534, 1]
    assert Table(0, np.array([3, 3])).frequencies.tolist() == [32_769, 32_767]
    rng = np.random.default_rng(0)
    for n in (1, 2, 255, 4_096):
        weights = rng.integers(0, rng.choice([2, 200, 65_536]), n)
        weights[rng.integers(n)] += 1
        f = Table(0, weights.clip(0, 65_535)).frequencies
        assert f.min() >= 1
        assert f.sum() == 65_536


def test_fit_covers_what_occurs_and_no_more():
    counts = np.zeros(500, np.int64)
    counts[[100, 103, 240]] = 1, 10**9, 7
    table = fit(-50, counts)
    assert (table.lo, table.hi) == (50, 190)
    assert all(table.weights[[0, 3, 140]] >= 1)
    assert table.weights.max() <= 65_535


def test_constriction_gives_the_symbols_of_the_description():
    """Random tables and symbols: the installed release against whole numbers."""
    rng = np.random.default_rng(0)
    for _ in range(150):
        n = int(rng.choice([2, 3, 17, 256, 4_096]))
        weights = rng.integers(0, rng.choice([2, 50, 65_536]), n)
        weights[rng.integers(n)] += 1
        table = Table(int(rng.integers(-300, 300)), weights.clip(0, 65_535))
        values = rng.choice(n, int(rng.integers(1, 300)), p=table.frequencies / 65_536) + table.lo
        (words,) = rans.encode_streams([values.astype(np.int16)], [table])
        found = oracle.symbols(words.tolist(), [table.frequencies.tolist()] * len(values))
        assert [table.lo + s for s in found] == values.tolist()
        assert len(words) <= len(values) // 2 + 2


def test_a_release_that_codes_otherwise_is_an_error(monkeypatch):
    monkeypatch.setattr(rans, "_WORDS", rans._WORDS[:8] + "01" + rans._WORDS[10:])
    rans.check_coder.cache_clear()
    tensor = Latents(laplace(900, 9), 9, 3)
    try:
        with pytest.raises(RuntimeError, match=r"constriction 0\.\d.*codes recorded symbols otherwise"):
            encode({"w": tensor}, decoders())
    finally:
        rans.check_coder.cache_clear()


def test_a_report_needs_the_groups_of_the_same_call():
    blobs, data = encode({"w": Latents(laplace(900, 9), 9, 3)}, decoders())
    with pytest.raises(ValueError, match="slices of 9 values"):
        byte_report(blobs, encode({}, decoders(rows=(1,)))[1])
    assert sum(byte_report(blobs, data).values()) == len(blobs["w"]) + len(data)
