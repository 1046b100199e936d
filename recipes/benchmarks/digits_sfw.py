"""SFW against SGD with weight decay on the digits: accuracy after one-shot compression, five seeds, paired.

Every arm gets the same tuning budget: four settings, one seed, judged on a validation split of the training data by
the patterns that it is for. The test split (30 %, by class, another one for every seed) is only looked at by the final
runs. SGD is tuned anew for every group of patterns. Beside: SFW-Init on, and rescaling by the diameter instead of by
the gradient. Nothing is retrained; all variants have recalibrated batch norms.

    OMP_NUM_THREADS=1 python recipes/benchmarks/digits_sfw.py --output recipes/benchmarks/results/digits_sfw.json
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

GOALS = {
    "sparse": ["unstructured:0.8", "unstructured:0.9", "unstructured:0.95"],
    "filters": ["filters:0.5"],
    "rank": ["low_rank:0.5", "low_rank:0.75"],
}
PATTERNS = [pattern for goal in GOALS.values() for pattern in goal]
SGD = {"rho": 0.0, "patterns": []}  # CrAM with nothing to be aware of is the wrapped SGD, bit for bit
SGD_GRID = [{"learning_rate": lr, "weight_decay": wd} for lr, wd in itertools.product((0.05, 0.1), (5e-4, 2e-3))]


def grid(constraint: str, ks: tuple[str, ...], radii: tuple[str, ...]) -> list[dict[str, Any]]:
    return [{"constraint": constraint, "k": k, "radius": f"init:{r}"} for k, r in itertools.product(ks, radii)]


REGIONS = {
    "k_sparse": ("sparse", grid("k_sparse", ("0.05", "0.1"), ("1", "2"))),
    "group": ("filters", grid("group_k_support", ("0.1", "0.3"), ("1", "2"))),
    "spectral": ("rank", grid("spectral_k_support", ("0.05", "0.1"), ("1", "2"))),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args()
    start = time.time()
    arms, tuning = tuned(options.epochs)
    runs: dict[str, list[Any]] = {}
    done: dict[str, Any] = {}  # two goals may have chosen the same setting of SGD
    for seed, (arm, (recipe, setting)) in itertools.product(range(options.seeds), arms.items()):
        key = json.dumps([recipe, setting, seed])
        done[key] = row = done.get(key) or {"seed": seed, **run(recipe, setting, PATTERNS, seed, options.epochs)}
        runs.setdefault(arm, []).append(row)
        print(arm, row, flush=True)
    result = {
        "what": __doc__,
        "command": "OMP_NUM_THREADS=1 python " + " ".join(sys.argv),
        **facts(),
        "minutes": round((time.time() - start) / 60, 1),
        "epochs": options.epochs,
        "tuning": tuning,
        "chosen": {arm: setting for arm, (_, setting) in arms.items()},
        "runs": runs,
        "mean": {arm: {p: mean(rows, p) for p in ("dense", *PATTERNS)} for arm, rows in runs.items()},
        "minus_sgd": {arm: against_sgd(runs, arm) for arm in runs if not arm.startswith("sgd")},
    }
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({k: result[k] for k in ("chosen", "mean", "minus_sgd", "minutes")}, indent=2))


def tuned(epochs: int) -> tuple[dict[str, tuple[str, dict[str, Any]]], dict[str, Any]]:
    """The best setting of every arm, and all that was tried."""
    tuning = {
        name: [{**s, **run("digits_sfw", s, PATTERNS, 0, epochs, tuning=True)} for s in settings]
        for name, (_, settings) in REGIONS.items()
    }
    tuning["sgd"] = [{**s, **run("digits_cram", {**SGD, **s}, PATTERNS, 0, epochs, tuning=True)} for s in SGD_GRID]
    arms: dict[str, tuple[str, dict[str, Any]]] = {}
    for name, (goal, settings) in REGIONS.items():
        judged_by = ("dense", *GOALS[goal])
        arms[name] = ("digits_sfw", best_of(tuning[name], list(settings[0]), judged_by))
        sgd = best_of(tuning["sgd"], list(SGD_GRID[0]), judged_by)
        arms[f"sgd_for_{goal}"] = ("digits_cram", {**SGD, **sgd})
    best = arms["k_sparse"][1]
    arms["k_sparse_with_init"] = ("digits_sfw", {**best, "sfw_init_steps": 60})
    by_diameter = [{**best, "rescale": "diameter", "learning_rate": lr} for lr in (0.03, 0.1, 0.3, 1.0)]
    tuning["k_sparse_by_diameter"] = [
        {**s, **run("digits_sfw", s, PATTERNS, 0, epochs, tuning=True)} for s in by_diameter
    ]
    keys = list(by_diameter[0])
    chosen = best_of(tuning["k_sparse_by_diameter"], keys, ("dense", *GOALS["sparse"]))
    arms["k_sparse_by_diameter"] = ("digits_sfw", chosen)
    return arms, tuning


def against_sgd(runs: dict[str, list[Any]], arm: str) -> dict[str, Any]:
    goal = REGIONS[arm][0] if arm in REGIONS else "sparse"
    return {p: paired(runs[arm], runs[f"sgd_for_{goal}"], p) for p in ("dense", *GOALS[goal])}


if __name__ == "__main__":
    main()
