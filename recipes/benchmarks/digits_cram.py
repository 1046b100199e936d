"""CrAM against SGD on the digits: accuracy after one-shot pruning, five seeds, paired.

Both methods get the same tuning budget: four settings each, one seed, judged on a validation split of the training
data. The test split (30 %, by class, another one for every seed) is only looked at by the final runs. SGD also runs
with twice the epochs, which cost what CrAM's two gradients cost. All variants have recalibrated batch norms.

    OMP_NUM_THREADS=1 python recipes/benchmarks/digits_cram.py --output recipes/benchmarks/results/digits_cram.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

from digits import best_of, facts, mean, paired, run

RECIPE = "digits_cram"
PATTERNS = ["unstructured:0.5", "unstructured:0.7", "unstructured:0.8", "unstructured:0.9", "unstructured:0.95", "2:4"]
JUDGED_BY = ("dense", "unstructured:0.9", "unstructured:0.95")
GRID = {
    "sgd": [{"learning_rate": lr, "weight_decay": wd} for lr, wd in itertools.product((0.05, 0.1), (5e-4, 2e-3))],
    "cram": [{"learning_rate": lr, "rho": rho} for lr, rho in itertools.product((0.05, 0.1), (0.05, 0.1))],
}
# CrAM with nothing to be aware of is the wrapped SGD, bit for bit.
FIXED: dict[str, dict[str, Any]] = {"sgd": {"rho": 0.0, "patterns": []}, "cram": {}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args()
    start = time.time()
    tuning = {
        name: [{**s, **run(RECIPE, {**FIXED[name], **s}, PATTERNS, 0, options.epochs, tuning=True)} for s in settings]
        for name, settings in GRID.items()
    }
    best = {name: best_of(rows, list(GRID[name][0]), JUDGED_BY) for name, rows in tuning.items()}
    arms = {"sgd": ("sgd", 1), "sgd_equal_compute": ("sgd", 2), "cram": ("cram", 1)}
    runs: dict[str, list[Any]] = {name: [] for name in arms}
    for seed in range(options.seeds):
        for arm, (name, factor) in arms.items():
            setting = {**FIXED[name], **best[name]}
            runs[arm].append({"seed": seed, **run(RECIPE, setting, PATTERNS, seed, factor * options.epochs)})
            print(arm, runs[arm][-1], flush=True)
    result = {
        "what": __doc__,
        "command": "OMP_NUM_THREADS=1 python " + " ".join(sys.argv),
        **facts(),
        "minutes": round((time.time() - start) / 60, 1),
        "epochs": options.epochs,
        "tuning": tuning,
        "chosen": best,
        "runs": runs,
        "mean": {arm: {p: mean(rows, p) for p in rows[0]["accuracy"]} for arm, rows in runs.items()},
        "cram_minus": {arm: {p: paired(runs["cram"], runs[arm], p) for p in ("dense", *PATTERNS)} for arm in arms},
    }
    del result["cram_minus"]["cram"]
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({k: result[k] for k in ("chosen", "mean", "cram_minus", "minutes")}, indent=2))


if __name__ == "__main__":
    main()
