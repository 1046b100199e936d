"""A run that is killed again and again ends where the uninterrupted one ends, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, image_samples, tiny_vit
from tests.methods.cram.test_trainer import config, train


@pytest.mark.slow
@pytest.mark.parametrize(("method", "kills"), [("cram", 25), ("sfw", 8)])
def test_kills_at_random_moments(tmp_path, method, kills):
    script = Path(__file__).with_name("kill_loop.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(kills), method],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["kills"] >= kills
    assert facts["failures"] == 0, done.stderr
    assert facts["equal"] == [True] * facts["runs"]
    assert facts["runs"] >= 2


def test_a_save_that_was_interrupted_is_passed_over(tmp_path):
    import hf_compress as hfc

    train(tmp_path, tiny_vit(), save_strategy="steps", save_steps=1)
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text('{"epoch": ')
    (tmp_path / "checkpoint-3" / "trainer_state.json").unlink()
    trainer = hfc.CrAMTrainer(model=tiny_vit(), args=config(tmp_path), train_dataset=image_samples())
    with pytest.raises(ValueError, match="checkpoint-4 is no checkpoint, or its save was interrupted"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    trainer.train(resume_from_checkpoint=True)
    whole = train(tmp_path / "whole", tiny_vit())
    assert all((a == b).all() for a, b in zip(trainer.model.parameters(), whole.model.parameters(), strict=True))
    for name in ("1", "2", "3", "4"):
        (tmp_path / f"checkpoint-{name}" / "trainer_state.json").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="no whole checkpoint in"):
        trainer.train(resume_from_checkpoint=True)
