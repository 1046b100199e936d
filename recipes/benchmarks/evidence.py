"""Runs a plan: arms that are tuned alike, then compared seed by seed; goes on where it was interrupted.

A plan is a YAML file: the task and its start weights, flags of all trainings, the arms with method, flags and a grid of
settings, seeds, variants and a budget. Its estimated hours are printed first, from the processor seconds of finished
runs, or of a few steps of each arm. Then come the settings of the grids, on training data alone, of which a part is
held out and judges, and then all arms with the first seed, with the second, and so on. Every run is a file named by the
hash of its settings; several processes share them. --arms takes some of the arms first, --partial only sums up what is
finished, --plot only draws a summary and writes its tables again.

    OMP_NUM_THREADS=1 python recipes/benchmarks/evidence.py recipes/benchmarks/plans/cifar10_resnet20.yaml \\
        --place cifar10=FOLDER --place resnet20_jpeg=FILE
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from pathlib import Path
from typing import Any

import yaml
from evidence_plots import counted_of, draw
from evidence_runs import measure, speed
from evidence_tables import as_markdown
from kept import Run, all_kept, kept
from machine import facts

HERE = Path(__file__).parent
FEW = 20  # steps that show how fast an arm is


def main() -> None:
    options = parsed()
    if not options.plot:
        plan = yaml.safe_load(options.plan.read_text())
        plan = trial(plan, options.steps) if options.steps else plan
        if unknown := set(options.arms or ()) - set(plan["arms"]):
            raise SystemExit(f"--arms: {sorted(unknown)} are not among {list(plan['arms'])}")
        places = dict(place.split("=", 1) for place in options.place)
        if not options.partial:
            some = {**plan, "arms": with_bases(plan, options.arms)} if options.arms else plan
            print_estimate(some, options.runs, places)
            if options.estimate:
                return
            run(some, options.runs, functools.partial(measure, places=places, weights=options.weights), options.arms)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(summary(plan, options.runs), indent=2) + "\n")
    result = json.loads(options.output.read_text())
    draw(result, options.output.with_suffix(""))
    tables = options.output.with_suffix(".md")
    tables.write_text(as_markdown(result))
    print(f"\n{as_markdown(result, ('Best of each pattern', 'Claims'))}")
    print(f"{tables} has all tables, .json, .png and .svg beside it the numbers and pictures")


def parsed() -> argparse.Namespace:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("plan", type=Path)
    flags.add_argument("--place", action="append", default=[], help="NAME=PATH of data or weights that the plan names")
    flags.add_argument("--runs", type=Path, help="folder of finished runs; by default beside the results, by name")
    flags.add_argument("--output", type=Path, help="the summary; by default among the results, by name")
    flags.add_argument("--arms", nargs="+", help="of the plan, to be run before the others; by default all")
    flags.add_argument("--weights", type=Path, help="folder that keeps trained weights, for other variants later")
    flags.add_argument("--estimate", action="store_true", help="only say how long it takes")
    flags.add_argument("--partial", action="store_true", help="only sum up what is finished")
    flags.add_argument("--plot", action="store_true", help="only plot and tables of an existing summary")
    flags.add_argument("--steps", type=int, help="for a trial: so many steps, one seed, one setting, new weights")
    options = flags.parse_args()
    options.runs = options.runs or HERE / "results" / f"{options.plan.stem}_runs"
    options.output = options.output or HERE / "results" / f"{options.plan.stem}.json"
    return options


def run(plan: Run, folder: Path, make: Any, arms: list[str] | None = None) -> None:
    """The settings of the grids, then seed by seed all arms, or those named."""
    tuning = [s for tried in tuning_runs(plan).values() for s in tried]
    all_kept(folder, tuning, make)
    final = final_runs(plan, chosen(plan, folder))
    all_kept(folder, [s for of_seed in final for name, s in of_seed.items() if name in (arms or of_seed)], make)


def with_bases(plan: Run, names: list[str]) -> Run:
    """These arms, and those that they are like."""
    found = {name: plan["arms"][name] for name in names}
    while missing := {arm["like"] for arm in found.values() if "like" in arm} - set(found):
        found |= {name: plan["arms"][name] for name in missing}
    return {name: arm for name, arm in plan["arms"].items() if name in found}


def trial(plan: Run, steps: int) -> Run:
    """The plan with runs of so many steps, to see that everything runs."""
    arms = {name: dict(arm) for name, arm in plan["arms"].items()}
    for arm in arms.values():
        few: Run = {"per_device_train_batch_size": 4} | {k: 2 for k in ("sfw_init_steps",) if k in arm.get("flags", {})}
        arm |= {"epochs": 1, "steps_per_epoch": steps, "epochs_factor": 1, "coded": []}
        arm |= {"task": {k: v for k, v in arm["task"].items() if not k.startswith("weights")}} if "task" in arm else {}
        arm |= {"variants": arm["variants"][:1]} if "variants" in arm else {}
        arm |= {"grid": arm["grid"][:1]} if "grid" in arm else {}
        arm |= {"gradual": {**arm["gradual"], "begin": 0, "end": 1.0, "every": 1}} if "gradual" in arm else {}
        arm["flags"] = {**arm.get("flags", {}), **few}
    short: Run = {"epochs": 1, "steps_per_epoch": steps, "seeds": plan["seeds"][:1], "variants": plan["variants"][:1]}
    tuning = {**plan["tuning"], "steps": steps, "held_out": 50} if "tuning" in plan else None
    task = {k: v for k, v in plan["task"].items() if not k.startswith("weights")}
    task |= {"max_train_samples": 64, "max_eval_samples": 16} if task["name"] == "questions" else {}
    training = {**plan["training"], "warmup_steps": 0, "dataloader_num_workers": 0}
    of_all: Run = {"few": steps, "arms": arms, "task": task, "training": training, "coded": [], "samples_as_cut": 0}
    return {**plan, **short, **of_all, **({"tuning": tuning} if tuning else {})}


def arm_of(plan: Run, name: str) -> Run:
    """What the plan says of an arm, with what it takes from the one it is like."""
    own = plan["arms"][name]
    if "like" not in own:
        return {"tuned_as": name, **own}
    base = arm_of(plan, own["like"])
    return {**base, **own, "flags": {**base.get("flags", {}), **own.get("flags", {})}, "tuned_as": base["tuned_as"]}


def settings_of(plan: Run, arm: Run, steps: int, seed: int, chosen: Run) -> Run:
    """All that a run depends on."""
    flags = {**plan["training"], "max_steps": steps, **arm.get("flags", {}), **chosen}
    flags |= {name: max(round(share * steps), 1) for name, share in arm.get("shares", {}).items()}
    task = {**plan["task"], **arm.get("task", {})}
    found = {"task": task, "method": arm["method"], "flags": flags, "seed": seed, "held_out": 0}
    found |= {"gradual": arm["gradual"]} if "gradual" in arm else {}
    of_plan = {key: arm.get(key, plan.get(key, [])) for key in ("variants", "coded")}
    return {**found, **of_plan, "samples_as_cut": plan["samples_as_cut"], "made": arm.get("made", "dense")}


def tuning_runs(plan: Run) -> dict[str, list[Run]]:
    """The settings that are tried for every arm that is tuned."""
    how, found = plan.get("tuning", {}), {}
    for name in plan["arms"]:
        arm = arm_of(plan, name)
        if arm["tuned_as"] == name and arm.get("grid"):
            own = {
                "variants": [p for p in arm["judged_by"] if p not in ("dense", arm.get("made"))],
                "samples_as_cut": 0,
            }
            own |= {"coded": [p for p in arm.get("coded", []) if p == "lilnetx"], "held_out": how["held_out"]}
            found[name] = [{**settings_of(plan, arm, how["steps"], how["seed"], s), **own} for s in arm["grid"]]
    return found


def final_runs(plan: Run, picked: dict[str, Run]) -> list[dict[str, Run]]:
    """For every seed the settings of every arm; without those that are finished elsewhere, or not tuned yet."""
    found: list[dict[str, Run]] = [{} for _ in plan["seeds"]]
    for name in plan["arms"]:
        arm = arm_of(plan, name)
        if "finished" in arm or (arm.get("grid") and arm["tuned_as"] not in picked):
            continue
        for i, seed in enumerate(plan["seeds"]):
            steps = steps_of(plan, arm)
            found[i][name] = settings_of(plan, arm, steps, seed, picked.get(arm["tuned_as"], {}))
    return found


def steps_of(plan: Run, arm: Run) -> int:
    epochs = arm.get("epochs", plan["epochs"]) * arm.get("epochs_factor", 1)
    return round(epochs * arm.get("steps_per_epoch", plan["steps_per_epoch"]))


def look(folder: Path, settings: Run) -> Run | None:
    """A finished run."""
    return kept(folder, settings, dict, measures=False)


def chosen(plan: Run, folder: Path) -> dict[str, Run]:
    """The setting of every arm whose variants score best on what was held out; without arms not tuned yet."""
    found = {}
    for name, tried in tuned(plan, folder).items():
        points = [row["points"] for row in tried if row["points"] is not None]
        if len(points) == len(tried):
            found[name] = tried[points.index(max(points))]["setting"]
    return found


def tuned(plan: Run, folder: Path) -> dict[str, list[Run]]:
    """What was tried for every arm, and its points: the mean over the variants that judge."""
    found: dict[str, list[Run]] = {}
    for name, runs in tuning_runs(plan).items():
        arm = arm_of(plan, name)
        for setting, own in zip(arm["grid"], runs, strict=True):
            row = look(folder, own)
            scores = {p: value(row["scores"][p]) for p in arm["judged_by"]} if row else {}
            points = round(statistics.mean(scores.values()), 3) if scores else None
            found.setdefault(name, []).append({"setting": setting, "points": points, "scores": scores})
    return found


def value(score: Run) -> float:
    return float(counted_of(score))


def print_estimate(plan: Run, folder: Path, places: dict[str, str]) -> None:
    """Hours left of every arm, on one thread of this machine when nothing else runs."""
    tuning, picked = tuning_runs(plan), chosen(plan, folder)
    guessed = picked | {name: arm_of(plan, name)["grid"][0] for name in tuning if name not in picked}
    final, per_arm = final_runs(plan, guessed), {}
    for name in final[0]:
        arm = arm_of(plan, name)
        runs = [*tuning.get(name, []), *(arms[name] for arms in final)]
        left = [s for s in runs if look(folder, s) is None]
        if left:
            step, judge = pace(plan, arm, folder, runs, places)
            per_arm[name] = sum(hours_of(plan, arm, s, step, judge) for s in left)
            print(f"{name:16} {len(left):3} runs left, {step:.3f} s a step, {per_arm[name]:6.2f} h", flush=True)
    total = sum(per_arm.values())
    print(f"{'all':16} {total:.2f} h on one thread, budget {plan['budget_hours']} h", flush=True)
    if total > plan["budget_hours"]:
        print("more than the budget: fewer epochs or seeds, or more processes", flush=True)


def pace(plan: Run, arm: Run, folder: Path, runs: list[Run], places: dict[str, str]) -> tuple[float, float]:
    """Seconds of a step and of judging one model: of finished runs of the arm, or of a few steps of what it is like."""
    found = [row for s in runs if (row := look(folder, s)) is not None and row["seconds"]["step"]]
    if not found:
        like = arm_of(plan, arm["tuned_as"])
        few = settings_of(plan, like, plan.get("few", FEW), 0, (like.get("grid") or [{}])[0])
        shown = functools.partial(speed, places=places)
        row = kept(folder / "speed", {**few, "variants": [], "coded": []}, shown) or {}
        return row["seconds"]["step"], row["seconds"]["judge_one"]
    judge = [row["seconds"]["judge"] / judgements(plan, row["settings"]) for row in found]
    return statistics.median(row["seconds"]["step"] for row in found), statistics.median(judge)


def judgements(plan: Run, settings: Run) -> float:
    """How many times a model is judged on all that there is."""
    as_cut = 0.25 * len(settings["variants"]) if settings["samples_as_cut"] else 0
    whole = 1 + len(settings["variants"]) + as_cut + len(settings["coded"])
    return whole * (plan["tuning"]["judge_share"] if settings["held_out"] else 1)


def hours_of(plan: Run, arm: Run, settings: Run, step: float, judge: float) -> float:
    steps = plan["tuning"]["steps"] if settings["held_out"] else steps_of(plan, arm)
    return (steps * step + judgements(plan, settings) * judge) / 3600


def summary(plan: Run, folder: Path) -> Run:
    """The result file: what was tried and chosen, means with spread, paired differences, of what is finished."""
    picked = chosen(plan, folder)
    rows: dict[str, dict[int, Run]] = {}
    for seed, arms in zip(plan["seeds"], final_runs(plan, picked), strict=True):
        for name, settings in arms.items():
            if (row := look(folder, settings)) is not None:
                rows.setdefault(name, {})[seed] = row
    rows |= {name: found for name in plan["arms"] if (found := finished_elsewhere(plan["arms"][name]))}
    rows = {name: rows[name] for name in plan["arms"] if name in rows}
    pairs = [(a, b) for b in plan.get("baselines", []) for a in rows if a != b]
    pairs += [tuple(pair) for pair in plan.get("pairs", [])]
    seconds = [sum(r["seconds"][k] for k in ("train", "judge")) for own in rows.values() for r in own.values()]
    minus: dict[str, Run] = {}
    for ours, theirs in pairs:
        if ours in rows and theirs in rows and (by := differences(rows[ours], rows[theirs])):
            minus.setdefault(ours, {})[theirs] = by
    return {
        "title": plan["title"],
        "plan": plan,
        **facts(),
        "hours": round(sum(seconds) / 3600, 2),
        "seeds": {name: sorted(rows.get(name, {})) for name in plan["arms"]},
        "tuning": tuned(plan, folder),
        "chosen": picked,
        "mean": {name: over_seeds(own, "scores") for name, own in rows.items()},
        "files": {name: over_seeds(own, "files") for name, own in rows.items()},
        "minus": minus,
    }


def over_seeds(rows: dict[int, Run], key: str) -> Run:
    """Mean, standard deviation and values by seed of every number."""
    found: Run = {}
    for name, numbers in next(iter(rows.values()))[key].items():
        for kind in numbers:
            values = [row[key][name][kind] for row in rows.values()]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            of_all = {"mean": round(statistics.mean(values), 4), "std": round(spread, 4), "by_seed": values}
            found.setdefault(name, {})[kind] = of_all
    return found


def differences(ours: dict[int, Run], theirs: dict[int, Run]) -> Run:
    """Of the numbers that count, over the seeds that both have, with the standard error of the mean."""
    seeds, found = sorted(ours.keys() & theirs.keys()), {}
    for name in ours[seeds[0]]["scores"] if seeds else ():
        if name in theirs[seeds[0]]["scores"]:
            pairs = [(value(ours[s]["scores"][name]), value(theirs[s]["scores"][name])) for s in seeds]
            by_seed = [round(a - b, 3) for a, b in pairs]
            error = statistics.stdev(by_seed) / len(by_seed) ** 0.5 if len(by_seed) > 1 else None
            found[name] = {
                "difference": round(statistics.mean(by_seed), 3),
                "standard_error": error,
                "by_seed": by_seed,
            }
    return found


def finished_elsewhere(arm: Run) -> dict[int, Run]:
    """Runs of an earlier script that an arm names, by seed, in the form of this one."""
    found: dict[int, Run] = {}
    of = arm.get("finished", {"folder": ""})
    for file in sorted((HERE / "results" / of["folder"]).glob("*.json")) if of["folder"] else ():
        row = json.loads(file.read_text())
        if of["settings"].items() <= row["settings"].items():
            scores = {p: {"one_shot": s["f1"]} for p, s in row.get("scores", {"dense": row.get("loaded")}).items()}
            files = {"lilnetx": {"bytes": row["bytes"], "as_loaded": row["loaded"]["f1"]}} if "bytes" in row else {}
            seconds = {"train": row["seconds"], "judge": 0.0}
            found[row["settings"]["seed"]] = {"scores": scores, "files": files, "seconds": seconds}
    return found


if __name__ == "__main__":
    main()
