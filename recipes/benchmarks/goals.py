"""Runs every benchmark of costs, one after the other, and prints one table: what was aimed at, and what was measured.

Each benchmark is a script of its own here that keeps its numbers in results/; this one starts them, reads these, and
writes results/goals.json and results/goals.md.
Ratios are of the minima over rounds, on the processor clock of one thread. "copies" are copies of the weights into
memory that is there already, "steps" are fused steps of SGD with momentum. "floor" is what the bytes that must move
take, at the speed of a copy where it is counted in copies; "published" is the code of the papers beside ours, from
checkouts in a folder (see published.py), times ours.

    OMP_NUM_THREADS=1 python recipes/benchmarks/goals.py --published FOLDER --model FOLDER

`--read` prints the table of the numbers that are kept, and runs nothing. Two quiet cores take about 30 minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import facts

HERE = Path(__file__).parent
RESULTS = HERE / "results"
SCRIPTS: dict[str, tuple[str, ...]] = {  # and the flags of this script that they take
    "selection_cost": (),
    "cram_cost": ("published",),
    "sfw_cost": ("published",),
    "tpp_cost": (),
    "lilnetx_cost": (),
    "removed_speed": (),
    "codec_rate": ("model",),
}
R, B = "resnet50", "bert-base"
Numbers = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    """One line of the table: `find` gives the measured numbers, each beside the most (or least) that is aimed at."""

    number: int
    what: str
    find: Callable[[Numbers], list[tuple[float, str, float]]]
    floor: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", type=Path, help="folder of checkouts, see published.py")
    parser.add_argument("--model", type=Path, help="folder of a BERT-like model, for the codec")
    parser.add_argument("--only", nargs="*", default=list(SCRIPTS), help="of the benchmarks")
    parser.add_argument("--read", action="store_true", help="print the numbers that are kept")
    options = parser.parse_args()
    for name in () if options.read else options.only:
        run(name, options)
    kept = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in SCRIPTS}
    rows = table(kept)
    if not options.read:
        result = {"what": __doc__, **facts(), "goals": rows}
        (RESULTS / "goals.json").write_text(json.dumps(result, indent=2) + "\n")
        (RESULTS / "goals.md").write_text(as_text(rows) + "\n")
    print(as_text(rows))


def run(name: str, options: argparse.Namespace) -> None:
    command = [sys.executable, str(HERE / f"{name}.py"), "--output", str(RESULTS / f"{name}.json")]
    for flag in SCRIPTS[name]:
        if getattr(options, flag) is not None:
            command += [f"--{flag}", str(getattr(options, flag))]
        elif flag == "model":
            print(f"{name} needs --model; its numbers stay as they are", flush=True)
            return
    print(f"{name} ...", flush=True)
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)


def at(numbers: Numbers, *keys: str) -> float:
    """The ratio of minima that stands there."""
    for key in keys:
        numbers = numbers[key]
    return float(numbers["ratio_of_minima"])


def most(limit: float, *values: float) -> list[tuple[float, str, float]]:
    return [(value, "<=", limit) for value in values]


def least(limit: float, *values: float) -> list[tuple[float, str, float]]:
    return [(value, ">=", limit) for value in values]


def selection(kept: Numbers, form: str, *nets: str) -> list[float]:
    return [at(kept["selection_cost"]["nets"], net, form) for net in nets]


def faster(kept: Numbers, slow: str, fast: str, *nets: str) -> list[float]:
    pairs = zip(selection(kept, slow, *nets), selection(kept, fast, *nets), strict=True)
    return [theirs / ours for theirs, ours in pairs]


def sfw(kept: Numbers, form: str, *nets: str) -> list[float]:
    return [at(kept["sfw_cost"]["nets"], net, form) for net in nets]


def sfw_faster(kept: Numbers, form: str, net: str, theirs: str = "") -> list[float]:
    found = kept["sfw_cost"]["nets"][net]
    return (
        [at(found, f"published {theirs or form}") / at(found, form)] if f"published {theirs or form}" in found else []
    )


def over_two_passes(kept: Numbers, net: str) -> float:
    steps = kept["cram_cost"]["steps"][net]
    return at(steps, "cram") / at(steps, "two passes")


def published_over_ours(kept: Numbers, part: str, net: str) -> list[float]:
    found = kept["cram_cost"][part][net]
    return [found["published_over_ours"]] if "published_over_ours" in found else []


def kept_of_removed(kept: Numbers, runtime: str) -> list[float]:
    cases = kept["removed_speed"]["cases"]
    return [case[runtime]["kept"] for name, case in cases.items() if name.startswith("ResNet")]


GOALS = [
    Goal(
        1,
        "exact global threshold, 90 %, in copies (ResNet-50, BERT); times a sorted topk",
        lambda k: (
            most(4, *selection(k, "global 0.9", R, B)) + least(20, *faster(k, "topk, global 0.9", "global 0.9", R, B))
        ),
        "0.6",
    ),
    Goal(
        2,
        "the same at 50 % and 95 %",
        lambda k: (
            most(4.5, *selection(k, "global 0.5", R, B), *selection(k, "global 0.95", R, B))
            + least(40, *faster(k, "topk, global 0.5", "global 0.5", R, B))
            + least(15, *faster(k, "topk, global 0.95", "global 0.95", R, B))
        ),
        "0.6",
    ),
    Goal(
        3,
        "exact threshold of each layer",
        lambda k: (
            most(6, *selection(k, "each layer 0.9", R, B))
            + least(9, *faster(k, "topk, each layer 0.9", "each layer 0.9", R, B))
        ),
        "0.6",
    ),
    Goal(
        4,
        "2:4 masks: NCHW; channels_last and BERT; times argsort",
        lambda k: (
            most(4.8, *selection(k, "2:4", R))
            + most(4, *selection(k, "2:4", f"{R}, channels_last", B))
            + least(8, *faster(k, "argsort, 2:4", "2:4", R))
            + least(13, *faster(k, "argsort, 2:4", "2:4", B))
        ),
        "0.6",
    ),
    Goal(5, "4:8 masks", lambda k: most(9, *selection(k, "4:8", R, f"{R}, channels_last", B)), "0.6"),
    Goal(
        6,
        "CrAM+ bookkeeping with SGD, in steps; times published",
        lambda k: (
            most(8, *(k["cram_cost"]["bookkeeping"][net]["cram_alone"] for net in (R, B)))
            + least(12, *published_over_ours(k, "bookkeeping", R))
            + least(30, *published_over_ours(k, "bookkeeping", B))
        ),
        "2.8",
    ),
    Goal(
        7,
        "CrAM+ step over two passes and SGD: ResNet-18, BERT-mini, BERT-tiny",
        lambda k: (
            most(1.05, over_two_passes(k, "resnet18"))
            + most(1.15, over_two_passes(k, "bert-mini"))
            + most(1.35, over_two_passes(k, "bert-tiny"))
        ),
        "1",
    ),
    Goal(
        8,
        "published CrAM+ step over ours",
        lambda k: (
            least(1.7, *published_over_ours(k, "steps", "resnet18"))
            + least(1.5, *published_over_ours(k, "steps", "bert-mini"))
            + least(2.2, *published_over_ours(k, "steps", "bert-tiny"))
        ),
    ),
    Goal(
        9,
        "peak memory of CrAM+ on BERT, copies",
        lambda k: most(5.2, k["cram_cost"]["memory"]["cram"]["copies"]),
        "4.2",
    ),
    Goal(
        10,
        "SFW K-sparse in steps: global, layer; by gradient; times published",
        lambda k: (
            most(6, *sfw(k, "k_sparse, global", R, B))
            + most(8, *sfw(k, "k_sparse", R, B))
            + most(8.5, *sfw(k, "k_sparse, global, gradient", R, B))
            + most(10.5, *sfw(k, "k_sparse, gradient", R, B))
            + least(6, *sfw_faster(k, "k_sparse", R))
            + least(11, *sfw_faster(k, "k_sparse, global", R))
        ),
        "1.2",
    ),
    Goal(
        11,
        "peak memory of SFW, copies",
        lambda k: most(
            3.15,
            *(
                form["peak"]["copies"]
                for net in (R, B)
                for form in k["sfw_cost"]["nets"][net].values()
                if "peak" in form
            ),
        ),
        "3",
    ),
    Goal(
        12,
        "SFW groups in steps; times published",
        lambda k: most(2.8, *sfw(k, "group", R, B)) + least(1.7, *sfw_faster(k, "group", R)),
        "1.2",
    ),
    Goal(
        13,
        "SFW spectral: times published qrpartial and full SVD; largest and median gap",
        lambda k: (
            least(3.5, *sfw_faster(k, "spectral", R, "spectral, qrpartial"))
            + least(11, *sfw_faster(k, "spectral", R))
            + most(0.01, *(net["largest"] for net in k["sfw_cost"]["gaps"].values()))
            + most(0.0015, *(net["median"] for net in k["sfw_cost"]["gaps"].values()))
        ),
    ),
    Goal(
        15,
        "TPP penalty: published form over ours: ResNet-56, ResNet-50, BERT",
        lambda k: (
            least(2.5, k["tpp_cost"]["cases"]["resnet56, 90 % of the filters"]["target_over_closed"])
            + least(3.5, k["tpp_cost"]["cases"]["resnet50, 2.31 x"]["target_over_closed"])
            + least(2.5, k["tpp_cost"]["cases"]["bert-base, 50 % of the neurons"]["target_over_closed"])
        ),
    ),
    Goal(
        17,
        "optimizer with nothing to constrain, in steps",
        lambda k: most(1.05, *sfw(k, "nothing constrained", R, B)),
        "1",
    ),
    Goal(
        18,
        "share of the saved MACs that time shows, ResNet-50 at 50 % of the filters: eager; onnxruntime",
        lambda k: least(0.8, *kept_of_removed(k, "eager")) + least(0.9, *kept_of_removed(k, "onnxruntime")),
        "1",
    ),
    Goal(
        19,
        "coded bits over entropy; decoding, MB/s of int32",
        lambda k: (
            most(
                1.002,
                k["codec_rate"]["cases"]["Laplace, d = 1"]["bits"]["ours"]
                / k["codec_rate"]["cases"]["Laplace, d = 1"]["bits"]["entropy"],
            )
            + least(150, 4 * k["codec_rate"]["cases"]["Laplace, d = 1"]["million_values_per_second"]["ours decode"])
        ),
        "1",
    ),
]
BY_TEST = {
    14: (
        "zero, NaN, tiny and huge gradients leave every state fit for the next step",
        "tests/methods/sfw/test_sfw_optimizer.py",
    ),
    16: ("square sums to 1e-6 at 100 million entries", "tests/methods/sfw/constraints/test_chunks.py"),
}


def table(kept: Numbers) -> list[Numbers]:
    """Of every goal the measured numbers, and whether all of them are met."""
    rows: list[Numbers] = []
    for goal in GOALS:
        found = goal.find(kept)
        numbers = [{"measured": round(v, 4), "goal": f"{sign} {limit:g}"} for v, sign, limit in found]
        are_met = [value <= limit if sign == "<=" else value >= limit for value, sign, limit in found]
        for number, is_met in zip(numbers, are_met, strict=True):
            number["met"] = is_met
        rows.append({"number": goal.number, "what": goal.what, "floor": goal.floor, "numbers": numbers})
    rows += [{"number": n, "what": what, "floor": "", "test": test} for n, (what, test) in BY_TEST.items()]
    return sorted(rows, key=lambda row: row["number"])


def as_text(rows: list[Numbers]) -> str:
    """A table of Markdown; numbers that miss their goal are marked."""
    lines = ["| # | what | measured (goal) | floor |", "| --- | --- | --- | --- |"]
    for row in rows:
        numbers = [
            f"{n['measured']:.3g} ({n['goal']}){'' if n['met'] else ' **missed**'}" for n in row.get("numbers", [])
        ]
        found = ", ".join(numbers) if numbers else f"held by {row['test']}"
        lines.append(f"| {row['number']} | {row['what']} | {found} | {row['floor']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
