"""Every number of a comparison in the README stands in the result that is linked beside it."""

from __future__ import annotations

import importlib
import itertools
import json
import re
import statistics

import pytest

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "recipes" / "benchmarks" / "results"


def result_of(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def test_the_table_is_that_of_a_run_that_happened(tmp_path):
    from dataclasses import replace

    from hf_compress.cli.table import render
    from hf_compress.family import Family, Variant

    content = json.loads((ROOT / "model_cards" / "digits_cram" / "family.json").read_text())
    dense, *variants = (Variant(**v) for v in (content["dense"], *content["variants"]))
    keys = ("method", "task", "base_model", "recipe", "versions", "files")
    family = Family(folder=tmp_path, dense=dense, variants=tuple(variants), **{k: content[k] for k in keys})
    assert render(family) in README
    assert render(replace(family, variants=())) + "\n\n" not in README


def test_numbers_of_the_slider_are_those_of_the_result():
    """At stored shares within 0.3 points of statistics from fresh data."""
    shares = result_of("slider_statistics")["shares"]
    rows = re.findall(r"^\| slider, ([\d.]+)(, mixed)? \| (.*) \|$", README, re.M)
    assert [share for share, _, _ in rows] == ["0.5", "0.7", "0.8", "0.9", "0.875"]
    for share, mixed, cells in rows:
        row = shares[share]
        assert cells.split(" | ") == [f"{row[key]:.1f}" for key in ("as_trained", "stored", "fresh")]
        assert row["is_stored"] == (not mixed)
        assert mixed or abs(row["stored"] - row["fresh"]) <= 0.3 + 1e-9


MINILM_ARMS = ("adamw", "sam", "adamw_equal_compute", "cram_multi", "cram_nm")


def test_numbers_of_question_answering_are_those_of_the_result():
    result = result_of("minilm_squad")
    rows = re.findall(r"^\| F1, (\S+?)(, tuned)? \| (.*) \|$", README, re.M)
    assert [pattern for pattern, tuned, _ in rows if not tuned] == list(result["mean_f1"]["adamw"])
    for pattern, tuned, cells in rows:
        means = [result["mean_f1_tuned" if tuned else "mean_f1"][arm][pattern] for arm in MINILM_ARMS]
        assert cells.split(" | ") == [f"{mean:.1f}" for mean in means]


def test_question_answering_meets_its_bars():
    """CrAM+ is 3 F1 ahead at what it trained for, by every seed, and at most 1 below when dense."""
    result = result_of("minilm_squad")
    scores = {}
    for arm, runs in result["runs"].items():
        for run in runs:
            for pattern, score in run["scores"].items():
                scores[arm, run["settings"]["seed"], pattern] = score["f1"]
    for arm, pattern in (("cram_multi", "unstructured:0.7"), ("cram_nm", "2:4")):
        for seed in (0, 1):
            assert scores[arm, seed, pattern] >= scores["adamw", seed, pattern] + 3
            assert scores[arm, seed, "dense"] >= scores["adamw", seed, "dense"] - 1
    mean = result["mean_f1"]
    recipe = (ROOT / "recipes" / "question-answering" / "minilm_squad_cram.yaml").read_text()
    for arm, pattern, where in (("cram_multi", "unstructured:0.7", "at 70 %"), ("cram_nm", "2:4", "at 2:4")):
        assert f"{mean[arm][pattern] - mean['adamw'][pattern]:+.1f} {where}" in recipe
        assert f"{mean[arm]['dense'] - mean['adamw']['dense']:+.1f} dense" in recipe


def test_the_rank_correlation_in_the_readme_is_that_of_the_result():
    result = result_of("report_ranking")
    means = [net["mean"][result["score_of_the_report"]] for net in result["nets"].values()]
    assert f"rank correlation of {means[0]:.2f} on the ResNet-20" in README
    assert f"and of {means[1]:.2f} on a" in README


SFW_ROWS = {
    "group": "group-K-support",
    "k_sparse": "K-sparse",
    "k_sparse, global": "K-sparse, global",
    "k_support": "K-support",
    "spectral": "spectral K-support",
}


def test_costs_of_sfw_are_those_of_the_result():
    nets = result_of("sfw_cost")["nets"]
    places = [(net, suffix) for suffix in (", gradient", "") for net in ("resnet50", "bert-base")]
    for region, name in SFW_ROWS.items():
        found = [nets[net].get(f"{region}{suffix}") for net, suffix in places]
        found.append(nets["resnet50"].get(f"published {region}"))
        cells = ["" if ratio is None else f"{ratio['ratio_of_minima']:.1f} x" for ratio in found]
        assert f"| {name} step | {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |") in README
    peaks = [form["peak"]["copies"] for net in nets.values() for form in net.values() if "peak" in form]
    assert len(peaks) == 10
    assert max(peaks) < 3.5
    gaps = result_of("sfw_cost")["gaps"].values()
    assert all(gap["median"] <= 0.0015 and gap["largest"] <= 0.01 for gap in gaps)


def test_the_goals_are_those_of_the_results(monkeypatch):
    """The table is made again from the results it is of, and the tests that hold goals exist."""
    monkeypatch.syspath_prepend(RESULTS.parent)
    goals = importlib.import_module("goals")
    rows = goals.table({name: result_of(name) for name in goals.SCRIPTS})
    assert [row["number"] for row in rows] == list(range(1, 20))
    assert json.loads(json.dumps(rows)) == result_of("goals")["goals"]
    assert (RESULTS / "goals.md").read_text() == goals.as_text(rows) + "\n"
    assert all((ROOT / row["test"]).is_file() for row in rows if "test" in row)
    numbers = [number for row in rows for number in row.get("numbers", [])]
    missed = [number for number in numbers if not number["met"]]
    assert f"{len(numbers) - len(missed)} of {len(numbers)}" in README


def test_costs_of_steps_are_those_of_the_results():
    cram = result_of("cram_cost")
    names = {"resnet18": "ResNet-18", "bert-mini": "BERT-mini", "bert-tiny": "BERT-tiny"}
    for net, name in names.items():
        found = cram["steps"][net]
        ratios = [found[form]["ratio_of_minima"] for form in ("two passes", "cram", "published")]
        line = " | ".join(f"{ratio:.2f} x" for ratio in ratios)
        assert re.search(rf"^\| {name}, 16 .*\| {re.escape(line)} \|$", README, re.MULTILINE)
    beside = [
        100 * (cram["steps"][net]["cram"]["ratio_of_minima"] / cram["steps"][net]["two passes"]["ratio_of_minima"] - 1)
        for net in ("bert-mini", "resnet18")
    ]
    assert f"beside the two passes it is {beside[0]:.0f} % of BERT-mini and {beside[1]:.0f} % of ResNet-18" in README
    alone = [cram["bookkeeping"][net]["cram_alone"] for net in ("resnet50", "bert-base")]
    assert f"{alone[0]:.1f} (ResNet-50) and {alone[1]:.1f} (BERT-base) fused steps of SGD" in README
    peaks = [cram["memory"][name]["copies"] for name in ("cram", "plain")]
    assert f"{peaks[0]:.1f} times its weights, of a plain run {peaks[1]:.1f} times" in README
    shares = [100 * (case["lilnetx_over_plain"] - 1) for case in result_of("lilnetx_cost")["cases"].values()]
    wanted = "{:.0f} % of a step of ResNet-20 with 64 images, {:.0f} % with 128, {:.0f} % of BERT-mini"
    assert wanted.format(*shares) in README
    assert f"one pass, and {min(shares):.0f} to {max(shares):.0f} % more" in README


def test_costs_of_selection_are_those_of_the_result():
    nets = result_of("selection_cost")["nets"]

    def copies(form, *chosen):
        return [nets[net][form]["ratio_of_minima"] for net in chosen]

    both, last = ("resnet50", "bert-base"), "resnet50, channels_last"
    forms = [f"global {share}" for share in (0.5, 0.9, 0.95)]
    found = [ratio for form in forms for ratio in copies(form, *both)]
    assert f"takes {min(found):.1f} to {max(found):.1f} times as long as a copy of them, 5 times layer by" in README
    assert {round(ratio) for ratio in copies("each layer 0.9", *both)} == {5}
    assert {round(ratio) for form in forms for ratio in copies(form, last)} == {7}  # "and 7 times where convolutions"


def test_the_speed_of_answers_is_that_of_the_result():
    result = result_of("span_postprocessing")
    milliseconds = 1000 * statistics.median(result["seconds"]["hf_compress"])
    times = result["example_over"]["hf_compress"]
    assert f"from the logits of {result['questions']:,} questions in {milliseconds:.0f} ms" in README
    assert f"{times:.0f} times faster than by transformers' example" in README
    assert result["equal_answers"] == result["questions"]
    assert min(result["example_over"].values()) >= 1


def test_speeds_of_smaller_models_are_those_of_the_result():
    cases = result_of("removed_speed")["cases"]
    for name, found in cases.items():
        speeds = [found["promised"], found["eager"]["speed_up"], found["onnxruntime"]["speed_up"]]
        assert f"| {name} | {' | '.join(f'{speed:.2f} x' for speed in speeds)} |" in README
        assert found["eager"]["kept"] >= (0.8 if "ResNet" in name else 0.7)
    assert len(cases) == 3


def test_costs_of_the_penalty_are_those_of_the_result():
    cases = result_of("tpp_cost")["cases"]
    for name, found in cases.items():
        ratios = [f"{found[key]:.1f} x" for key in ("autograd_over_closed", "target_over_closed")]
        assert f"| {name} | {' | '.join(ratios)} | {100 * found['closed_over_training']:.1f} % |" in README
        assert found["target_over_closed"] >= 2.5
    assert len(cases) == 4


def test_sizes_of_coded_files_are_those_of_the_result():
    result = result_of("coded_sizes")["bytes"]
    rows = re.findall(r"^\| (\S+), MiniLM \| (.*) \|$", README, re.M)
    assert [pattern for pattern, _ in rows] == ["int8", "2:4+int8", "unstructured:0.8+int8", "int4"]
    for pattern, cells in rows:
        kinds = ("a byte each", "zstd -19", "coded", "entropy")
        sizes = [result[f"{pattern}, {kind}"]["weights"] for kind in kinds]
        assert cells.split(" | ") == [f"{size / 1e6:.2f}" for size in sizes]
        assert sizes[2] < sizes[1]
        assert sizes[2] <= 1.02 * sizes[3]


def test_rates_of_the_codec_are_those_of_the_result():
    cases = result_of("codec_rate")["cases"]
    rows = dict(re.findall(r"^\| codec, (.*?) \| (.*) \|$", README, re.M))
    assert list(rows) == list(cases)
    for name, case in cases.items():
        bits, rates = case["bits"], case["million_values_per_second"]
        wanted = [
            f"{bits['raw']:.0f}, {bits['zstd']:.2f}, {bits['ours']:.2f}",
            f"{rates['ours encode']:.0f}, {rates['ours decode']:.0f}",
            f"{case['encode_over_bare_from_int8']:.2f} x, {case['decode_over_bare_decode']:.2f} x",
        ]
        assert rows[name].split(" | ") == wanted
        assert case["decode_over_bare_decode"] >= 0.8
        assert bits["ours"] <= 1.01 * bits["entropy"]


def test_numbers_of_tpp_on_cifar10_are_those_of_the_result():
    """TPP is ahead by every seed, and by more than the spread of both."""
    result = result_of("cifar10_tpp")
    best = {1e-3: 0.0, 1e-2: 0.0}
    for trial in (t for t in result["tuning"] if t["settings"]["arm"] == "tpp"):
        rate = trial["settings"]["regularize_learning_rate"]
        best[rate] = max(best[rate], *trial["by_rate"].values())
    worse = f"{best[1e-2] - best[1e-3]:.0f} points worse"
    assert f"published 1e-3 it was {worse} in the trials" in README
    assert worse in (ROOT / "recipes" / "image-classification" / "cifar10_resnet20_tpp.yaml").read_text()
    rows = re.findall(r"^\| TPP, (\d+) % \| (.*) \|$", README, re.M)
    assert [float(share) / 100 for share, _ in rows] == [float(share) for share in result["mean"]]
    for (_, cells), (share, arms) in zip(rows, result["mean"].items(), strict=True):
        runs = {arm: [r for r in result["runs"] if r["settings"]["arm"] == arm] for arm in ("tpp", "l1")}
        runs = {arm: [r for r in own if str(r["settings"]["share"]) == share] for arm, own in runs.items()}
        wanted = [f"{arms[arm]['mean']:.1f} ± {arms[arm]['std']:.1f}" for arm in runs]
        wanted.append(", ".join(f"{d:+.1f}" for d in result["tpp_minus_l1"][share]))
        for of in (lambda r: f"{r['after_removal']}", lambda r: f"{r['trainability']['trainability']}"):
            means = [statistics.mean(float(of(r)) for r in own) for own in runs.values()]
            wanted.append(means)
        *found, after, values = cells.split(" | ")
        assert found == wanted[:3]
        assert after == ", ".join(f"{mean:.1f}" for mean in wanted[3])
        assert values == ", ".join(f"{mean:.2f}" for mean in wanted[4])
        assert min(result["tpp_minus_l1"][share]) > arms["tpp"]["std"] + arms["l1"]["std"]


def test_sizes_of_lilnetx_on_cifar10_are_those_of_the_result():
    """At equal accuracy (half a point) LilNetX takes at most half of int8 behind zstd."""
    result = result_of("cifar10_lilnetx")
    mean = result["mean"]
    rows = re.findall(r"^\| size, (.*?) \| (.*) \|$", README, re.M)
    assert [name for name, _ in rows] == list(mean)
    zstd = mean["zstd"]
    for name, cells in rows:
        row = mean[name]
        wanted = [f"{row['kilobytes']:.1f}", f"{100 * row['kilobytes'] / zstd['kilobytes']:.0f} %"]
        wanted += [f"{row['points']:.1f}", ", ".join(f"{points:.1f}" for points in row["by_seed"])]
        assert cells.split(" | ") == wanted
    equal = [row for name, row in mean.items() if name.startswith("lilnetx") and row["points"] >= zstd["points"] - 0.5]
    assert min(row["kilobytes"] for row in equal) <= 0.5 * zstd["kilobytes"]


def test_bits_and_f1_over_time_are_those_of_the_result():
    """The weight of the bits lowers them; what was saved scores as what was trained."""
    result = result_of("minilm_lilnetx")
    assert f"where AdamW reaches {result_of('minilm_squad')['mean_f1']['adamw']['dense']:.1f} F1" in README
    rows = re.findall(r"^\| MiniLM, ([\d.]+) steps, rate ([\d.]+) \| (.*) \|$", README, re.M)
    assert len(rows) == len(result["runs"])
    for (steps, rate, cells), run in zip(rows, result["runs"], strict=True):
        own, seen = run["settings"], run["over_time"]
        assert (float(steps), float(rate)) == (own["steps_per_std"], own["rate_weight"])
        wanted = [", ".join(f"{s['bits']:.2f}" for s in seen), ", ".join(f"{s['f1']:.1f}" for s in seen)]
        assert cells.split(" | ") == [*wanted, f"{run['loaded']['f1']:.1f}", f"{run['bytes'] / 1e6:.1f}"]
        assert run["loaded"]["f1"] == pytest.approx(seen[-1]["f1"], abs=1)
        if own["rate_weight"]:
            assert seen[-1]["bits"] < seen[0]["bits"]


def test_differences_to_the_published_code_are_those_of_the_result():
    cases = result_of("published_parity")["cases"]
    for name, case in cases.items():
        if "qrpartial" not in name:  # which starts from random columns
            largest = case["aligned"]["10"]["largest"]
            assert largest <= 1e-6, name
            assert f"| {name} | {largest:.0e} |" in README
    assert len(cases) == 11


def test_rows_of_todays_tools_are_those_of_the_result(monkeypatch):
    monkeypatch.syspath_prepend(RESULTS.parent)
    lines = importlib.import_module("todays_tools").as_text(result_of("todays_tools")).splitlines()
    section = README.split("\n## Beside today's tools\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")]
    assert len(rows) == 23
    assert set(rows) <= set(lines)
    found = result_of("todays_tools")["checkpoints"]["start"]["rows"]
    inside = [(a, b) for a, b in itertools.pairwise(found) if a["tool"] == "torch-pruning" and "inside" in a["how"]]
    wins = sum(ours["recalibrated"] > theirs["recalibrated"] for theirs, ours in inside)
    assert (wins, len(inside)) == (3, 6)
    assert "win three of six comparisons each" in section
