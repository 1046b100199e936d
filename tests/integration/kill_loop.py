"""Trains in forked processes that are killed at random moments, saves included, until two runs have got through."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

import hf_compress as hfc
from tests.conftest import image_samples, tiny_vit

STEPS = 12


METHODS = {
    "cram": (hfc.CrAMTrainer, hfc.CrAMConfig, {"patterns": ["unstructured:0.5", "2:4"], "rho": 0.1}),
    "sfw": (hfc.SFWTrainer, hfc.SFWConfig, {"constraint": "spectral_k_support", "k": "0.2", "radius": "init:2"}),
}


def train(folder: Path, resume: bool) -> None:
    trainer_class, config_class, method = METHODS[sys.argv[3]]
    args = config_class(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        **method,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=True,
    )
    model = tiny_vit(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    trainer = trainer_class(model=model, args=args, train_dataset=image_samples())
    trainer.train(resume_from_checkpoint=resume)
    torch.save(trainer.model.state_dict(), folder / "weights.partial")
    (folder / "weights.partial").rename(folder / "weights.pt")


def start(folder: Path) -> int:
    """A process that trains, from the last whole checkpoint if there is one."""
    child = os.fork()
    if child:
        return child
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    try:
        train(folder, resume=any((p / "trainer_state.json").is_file() for p in folder.glob("checkpoint-*")))
        os._exit(0)
    except ValueError as error:
        os._exit(3 if "no whole checkpoint" in str(error) else 1)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)


def main(folder: Path, kills: int) -> None:
    random.seed(0)
    tiny_vit()  # what it imports, children need not
    started = time.monotonic()
    assert os.waitstatus_to_exitcode(os.waitpid(start(folder / "whole"), 0)[1]) == 0
    seconds = time.monotonic() - started
    wanted = torch.load(folder / "whole" / "weights.pt", weights_only=True)
    facts = {"kills": 0, "in_saves": 0, "runs": 0, "equal": [], "failures": 0}
    while facts["kills"] < kills or facts["runs"] < 2:
        cut, before = folder / "cut", facts["kills"]
        shutil.rmtree(cut, ignore_errors=True)
        while not (cut / "weights.pt").exists():
            child = start(cut)
            if facts["kills"] < kills or facts["kills"] == before:  # no run without a kill
                time.sleep(random.uniform(0.0, seconds))
                os.kill(child, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            facts["kills"] += code == -signal.SIGKILL
            facts["failures"] += code not in (0, 3, -signal.SIGKILL)
            if code == 3:
                shutil.rmtree(cut)  # killed inside its first save
            facts["in_saves"] += any(
                not (p / "trainer_state.json").is_file() for p in cut.glob("checkpoint-*") if p.is_dir()
            )
            if facts["failures"]:
                break
        found = torch.load(cut / "weights.pt", weights_only=True) if not facts["failures"] else {}
        facts["runs"] += 1
        facts["equal"].append(bool(found) and all(torch.equal(found[name], wanted[name]) for name in wanted))
        if facts["failures"]:
            break
    (folder / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]))
