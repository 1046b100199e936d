"""CrAM against AdamW and SAM in question answering: F1 of a MiniLM-L6 cut in one shot, paired by seed.

All runs fine-tune the same pretrained encoder on 4,000 questions drawn by the seed, windows of 256 tokens, batch 16,
two epochs of AdamW (learning rate 1.5e-4, linear, warm-up 10 %, clipping 1.0) in bfloat16 autocast, without dropout of
attention probabilities, which takes much of the time on CPUs. SAM and CrAM take two gradients a step;
"adamw_equal_compute" is AdamW with twice the epochs. No arm was tuned. Every checkpoint is scored dense, cut in one
shot, and after a short fine-tuning of the cut model with its zeros locked, 30 steps of AdamW for all alike. The
validation questions are looked at by finished runs only.

Runs are kept in a folder, so that the script goes on where it was interrupted; several processes
share them. --data is a folder with train.parquet and validation.parquet in the form of SQuAD.

    OMP_NUM_THREADS=1 python recipes/benchmarks/minilm_squad.py --model MINILM --data FOLDER --runs FOLDER \\
        --output recipes/benchmarks/results/minilm_squad.json
"""

from __future__ import annotations

import copy
import functools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from kept import QUIET, all_kept, parser
from machine import facts
from transformers import set_seed

import hf_compress as hfc
from hf_compress.tasks.question_answering import QuestionAnsweringArguments, prepare

UNSTRUCTURED = ["unstructured:0.5", "unstructured:0.6", "unstructured:0.7", "unstructured:0.8"]
PATTERNS = [*UNSTRUCTURED, "2:4"]
PLAIN: dict[str, Any] = {"rho": 0.0, "patterns": []}  # CrAM with nothing to be aware of is the wrapped AdamW
ARMS: dict[str, dict[str, Any]] = {
    "adamw": PLAIN,
    "cram_multi": {"rho": 0.005, "patterns": UNSTRUCTURED},
    "cram_nm": {"rho": 0.005, "patterns": ["2:4", "4:8"]},
    "sam": {"rho": 0.05, "patterns": [], "plus": False, "normalize": True},
    "adamw_equal_compute": {**PLAIN, "num_train_epochs": 4},
}
TRAINING: dict[str, Any] = {
    "num_train_epochs": 2,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 8,
    "train_sampling_strategy": "group_by_length",
    "learning_rate": 1.5e-4,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.1,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "bf16": True,
}
TUNING: dict[str, Any] = {**TRAINING, **PLAIN, "max_steps": 30, "learning_rate": 5e-5, "warmup_steps": 0}
DATA = {"max_length": 256, "doc_stride": 64, "max_train_samples": 4000}
SEEDS = (0, 1)


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--model", required=True, help="folder of MiniLM-L6")
    flags.add_argument("--data", type=Path, required=True, help="folder with train.parquet and validation.parquet")
    flags.add_argument("--train_samples", type=int, default=DATA["max_train_samples"], help="for a trial")
    flags.add_argument("--eval_samples", type=int, help="for a trial")
    options = flags.parse_args()
    data = {**DATA, "max_train_samples": options.train_samples, "max_eval_samples": options.eval_samples}
    runs = [{"arm": arm, **ARMS[arm], "seed": seed, "data": data} for seed in SEEDS for arm in ARMS]
    measure = functools.partial(run, model=options.model, folder=options.data)
    found = all_kept(options.runs, runs, measure)
    options.output.write_text(json.dumps(summary(found), indent=2) + "\n")
    draw(found, options.output.with_suffix(""))


def run(settings: dict[str, Any], model: str, folder: Path) -> dict[str, Any]:
    """Train once; exact match and F1 dense, of every cut in one shot, and of every cut after fine-tuning."""
    seed = settings["seed"]
    set_seed(seed)
    files = {"train_file": str(folder / "train.parquet"), "eval_file": str(folder / "validation.parquet")}
    parts = prepare(QuestionAnsweringArguments(model, **files, **settings["data"], data_seed_split=seed))
    parts["data_collator"].pad_to_multiple_of = 16
    parts["model"].set_attn_implementation("eager")  # faster than torch's on CPUs when probabilities are not dropped
    for layer in parts["model"].bert.encoder.layer:
        layer.attention.self.dropout.p = 0.0
    own = {k: v for k, v in settings.items() if k not in ("arm", "data")}
    start = time.time()
    trainer = trained(parts, {**TRAINING, **own})
    seconds = round(time.time() - start, 1)
    scores = {"dense": scores_of(trainer, trainer.model)}
    for pattern in PATTERNS:
        cut = copy.deepcopy(trainer.model)
        hfc.compress(cut, pattern)
        one_shot = scores_of(trainer, cut)
        tuner = trained({**parts, "model": cut}, {**TUNING, "seed": seed}, [hfc.SparsityLock()])
        scores[pattern] = {**one_shot, "tuned": scores_of(tuner, cut)}
    return {"scores": scores, "seconds": seconds}


def trained(parts: dict[str, Any], flags: dict[str, Any], callbacks: list[Any] | None = None) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        args = hfc.CrAMConfig(folder, **{**flags, **QUIET})
        trainer = hfc.CrAMTrainer(args=args, callbacks=callbacks, **parts)
        trainer.train()
    return trainer


def scores_of(trainer: Any, model: Any) -> dict[str, float]:
    metrics = trainer.evaluate_variant(model)
    return {name: round(metrics[name], 3) for name in ("exact_match", "f1")}


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The result file: all runs, means over seeds, and the differences of F1 to AdamW by seed."""
    runs: dict[str, list[Any]] = {arm: [r for r in found if r["settings"]["arm"] == arm] for arm in ARMS}
    minus = {
        arm: {name: by_seed(rows, runs["adamw"], name) for name in ("dense", *PATTERNS)}
        for arm, rows in runs.items()
        if arm != "adamw"
    }
    return {
        "what": __doc__,
        **facts(),
        "training": TRAINING,
        "fine_tuning": TUNING,
        "runs": runs,
        "mean_f1": {arm: {p: average(rows, p) for p in ("dense", *PATTERNS)} for arm, rows in runs.items()},
        "mean_f1_tuned": {arm: {p: average(rows, p, tuned=True) for p in PATTERNS} for arm, rows in runs.items()},
        "f1_minus_adamw": minus,
    }


def f1_of(row: dict[str, Any], pattern: str, tuned: bool = False) -> float:
    scores = row["scores"][pattern]
    return float((scores["tuned"] if tuned else scores)["f1"])


def average(rows: list[dict[str, Any]], pattern: str, tuned: bool = False) -> float:
    return round(sum(f1_of(row, pattern, tuned) for row in rows) / len(rows), 3)


def by_seed(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], pattern: str) -> dict[str, Any]:
    values = [round(f1_of(a, pattern) - f1_of(b, pattern), 3) for a, b in zip(ours, theirs, strict=True)]
    return {"difference": round(sum(values) / len(values), 3), "by_seed": values}


LOOKS = {  # color, marker, name
    "adamw": ("#8a8a8a", "s", "AdamW"),
    "adamw_equal_compute": ("#444444", "v", "AdamW, twice the epochs"),
    "sam": ("#2a9d6f", "^", "SAM"),
    "cram_multi": ("#2a6fbb", "o", "CrAM+, unstructured 50 to 80 %"),
    "cram_nm": ("#d1603d", "D", "CrAM+, 2:4 and 4:8"),
}


def draw(found: list[dict[str, Any]], stem: Path) -> None:
    """F1 over sparsity in one shot, and at 2:4 in one shot and tuned; bars from the lowest to the highest seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    curves, tuned, marks = figure.subplots(1, 3, sharey=True, width_ratios=(2.2, 2.2, 1))
    shares = [0, *(100 * float(p.split(":")[1]) for p in UNSTRUCTURED)]
    for i, (arm, (color, marker, name)) in enumerate(LOOKS.items()):
        rows = [r for r in found if r["settings"]["arm"] == arm]
        for axes, patterns, x, is_tuned, line in (
            (curves, ["dense", *UNSTRUCTURED], shares, False, "-"),
            (tuned, UNSTRUCTURED, shares[1:], True, "-"),
            (marks, ["2:4"], [0.12 * (i - 2)], False, "none"),
            (marks, ["2:4"], [1 + 0.12 * (i - 2)], True, "none"),
        ):
            values = [[f1_of(row, p, is_tuned) for row in rows] for p in patterns]
            y = [sum(v) / len(v) for v in values]
            spread = [
                [m - min(v) for m, v in zip(y, values, strict=True)],
                [max(v) - m for m, v in zip(y, values, strict=True)],
            ]
            axes.errorbar(x, y, spread, color=color, marker=marker, markersize=5, linestyle=line, capsize=3, label=name)
    curves.set_ylabel("F1")
    curves.legend(frameon=False, loc="lower left", fontsize=8)
    for axes, title in ((curves, "one-shot"), (tuned, "after 30 steps with locked zeros"), (marks, "2:4")):
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axes.set_xlabel("zeros in the encoder's matrices, %" if axes is not marks else "")
    marks.set_xticks([0, 1], ["one-shot", "tuned"])
    figure.suptitle("MiniLM-L6, 4,000 questions: mean and range of two seeds", fontsize=11, x=0.01, ha="left")
    for suffix in (".png", ".svg"):
        figure.savefig(
            stem.with_suffix(suffix), dpi=160, metadata={"Software": None} if suffix == ".png" else {"Date": None}
        )


if __name__ == "__main__":
    main()
