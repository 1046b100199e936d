"""Bits for each weight and F1 over time: LilNetX fine-tunes a pretrained MiniLM-L6 in question answering.

4,000 questions, windows of 256 tokens, batch 16, two epochs of AdamW (learning rate 1.5e-4, linear, warm-up 10 %,
clipping 1.0) in bfloat16 autocast, as in minilm_squad.py, whose AdamW is the dense net to compare with. Every run has
another step and another weight of the bits, neither tuned. Every 125 steps the validation questions are answered,
and the entropy of the whole numbers is taken; at the end all files that `from_pretrained` needs are counted, and the
checkpoint is loaded back and scored.

Runs are kept in a folder, so that the script goes on where it was interrupted; several processes
share them. --data is a folder with train.parquet and validation.parquet in the form of SQuAD.

    OMP_NUM_THREADS=1 python recipes/benchmarks/minilm_lilnetx.py --model MINILM --data FOLDER --runs FOLDER \\
        --output recipes/benchmarks/results/minilm_lilnetx.json
"""

from __future__ import annotations

import functools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from kept import QUIET, all_kept, parser
from machine import facts
from minilm_squad import DATA, TRAINING
from transformers import TrainerCallback, set_seed

import hf_compress as hfc
from hf_compress.codec import entropy_bits
from hf_compress.family.coded import round_rest_, save_coded
from hf_compress.family.footprint import disk_bytes
from hf_compress.methods.lilnetx import integers, latent_count
from hf_compress.tasks.question_answering import QuestionAnsweringArguments, prepare

POINTS = ((3.0, 0.0), (2.0, 5.0))  # steps_per_std and rate_weight
EVERY = 125  # steps from one look to the next


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--model", required=True, help="folder of MiniLM-L6")
    flags.add_argument("--data", type=Path, required=True, help="folder with train.parquet and validation.parquet")
    options = flags.parse_args()
    runs = [{"steps_per_std": steps, "rate_weight": rate, "seed": 0, "data": DATA} for steps, rate in POINTS]
    measure = functools.partial(run, model=options.model, folder=options.data)
    found = all_kept(options.runs, runs, measure)
    options.output.write_text(json.dumps(summary(found), indent=2) + "\n")
    draw(found, options.output.with_suffix(""))


class Looks(TrainerCallback):
    """The entropy of the whole numbers, and the score, at every evaluation."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, model: Any = None, **_: Any
    ) -> None:
        latents, _decoders = integers(model)
        bits = sum(entropy_bits(each) for each in latents.values()) / latent_count(model)
        self.seen.append({"step": state.global_step, "bits": round(bits, 4), "f1": round(metrics["eval_f1"], 3)})


def run(settings: dict[str, Any], model: str, folder: Path) -> dict[str, Any]:
    """Train once, looking on; then the file."""
    seed = settings["seed"]
    set_seed(seed)
    files = {"train_file": str(folder / "train.parquet"), "eval_file": str(folder / "validation.parquet")}
    parts = prepare(QuestionAnsweringArguments(model, **files, **settings["data"], data_seed_split=seed))
    parts["data_collator"].pad_to_multiple_of = 16
    parts["model"].set_attn_implementation("eager")  # faster than torch's on CPUs when probabilities are not dropped
    for layer in parts["model"].bert.encoder.layer:
        layer.attention.self.dropout.p = 0.0
    own = {k: v for k, v in settings.items() if k != "data"}
    looks, start = Looks(), time.time()
    with tempfile.TemporaryDirectory() as name:
        looking = {"eval_strategy": "steps", "eval_steps": EVERY, "eval_on_start": True}
        args = hfc.LilNetXConfig(name, **{**TRAINING, **QUIET, **looking, **own})
        trainer = hfc.LilNetXTrainer(args=args, callbacks=[looks], **parts)
        trainer.train()
        seconds = round(time.time() - start, 1)
        round_rest_(trainer.model)
        save_coded(trainer.model.eval(), Path(name) / "coded")
        loaded = type(trainer.model).from_pretrained(Path(name) / "coded")
        scores = trainer.evaluate_variant(loaded)
        size = disk_bytes(Path(name) / "coded")[0]
    final = {key: round(scores[key], 3) for key in ("exact_match", "f1")}
    return {"over_time": looks.seen, "loaded": final, "bytes": size, "seconds": seconds}


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The result file."""
    return {"what": __doc__, **facts(), "training": TRAINING, "runs": found}


def draw(found: list[dict[str, Any]], stem: Path) -> None:
    """Bits and F1 over steps, a color for each run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    bits, f1 = figure.subplots(1, 2)
    colors = ("#8a8a8a", "#2a6fbb")
    for color, one in zip(colors, found, strict=True):
        own, seen = one["settings"], one["over_time"]
        name = f"{own['steps_per_std']:g} steps a deviation, rate weight {own['rate_weight']:g}"
        for axes, key in ((bits, "bits"), (f1, "f1")):
            axes.plot(
                [s["step"] for s in seen], [s[key] for s in seen], color=color, marker="o", markersize=4, label=name
            )
    bits.set_title("bits for each weight of the encoder", loc="left", fontsize=10)
    f1.set_title("F1", loc="left", fontsize=10)
    for axes in (bits, f1):
        axes.set_xlabel("optimizer step")
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    bits.legend(frameon=False, loc="lower left", fontsize=8)
    for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
        figure.savefig(stem.with_suffix(suffix), dpi=160, metadata=metadata)


if __name__ == "__main__":
    main()
