"""Makes every result in results/ and every card in model_cards/ again, by one command.

Each line of JOBS is a script here with the data that it takes; those whose data are not given are named and left out.
What takes runs keeps them as files, so that an interrupted command goes on where it was; they are made anew where
--runs names an empty folder. The minutes are those of one thread of a machine without accelerator and are printed
first. Times of costs (goals.py) are worth something on a quiet machine only, so they come first.

    OMP_NUM_THREADS=1 python recipes/benchmarks/everything.py --runs FOLDER --place cifar10=FOLDER \\
        --place resnet20_jpeg=FILE --place resnets=FOLDER --place qa=FOLDER --place minilm_l6=FOLDER \\
        --place published=FOLDER --place utils_qa=FILE

Data: cifar10 and qa are folders of parquet files, resnet20_jpeg the start weights (safetensors), resnets a folder with
these and resnet32_jpeg.safetensors, published the checkouts that published.py names, utils_qa the file of transformers'
example of question answering. `--list` only prints the commands.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from string import Formatter

HERE = Path(__file__).parent
RESULTS = HERE / "results"


@dataclass(frozen=True)
class Job:
    """One script: what it makes, its flags with {places}, and minutes on one thread."""

    script: str
    makes: tuple[str, ...]
    flags: str
    minutes: float


COSTS = ("selection_cost", "cram_cost", "sfw_cost", "tpp_cost", "lilnetx_cost", "removed_speed", "codec_rate", "goals")
CIFAR = "--data {cifar10} --weights {resnet20_jpeg} --output {results}/"
QA = "--data {qa} --model {minilm_l6} --runs {runs}/"
PLAN = "{here}/plans/%s.yaml --runs {runs}/%s_runs --output {results}/%s.json "
JOBS = (
    Job("goals", COSTS, "--published {published} --model {minilm_l6}", 50),
    Job("coded_sizes", ("coded_sizes",), "--model {minilm_l6} --output {results}/coded_sizes.json", 2),
    Job("span_postprocessing", ("span_postprocessing",), "--data {qa} --model {minilm_l6} --example {utils_qa} "
        "--output {results}/span_postprocessing.json", 2),
    Job("report_ranking", ("report_ranking",), "--data {cifar10} --weights {resnets} "
        "--output {results}/report_ranking.json", 7),
    Job("slider_statistics", ("slider_statistics",), CIFAR + "slider_statistics.json", 5),
    Job("todays_tools", ("todays_tools",), "--data {cifar10} --checkpoint start={resnet20_jpeg} "
        "--output {results}/todays_tools.json", 23),
    Job("cifar10_tpp", ("cifar10_tpp",), CIFAR + "cifar10_tpp.json --runs {runs}/cifar10_tpp_runs", 94),
    Job("cifar10_lilnetx", ("cifar10_lilnetx",), CIFAR + "cifar10_lilnetx.json --runs {runs}/cifar10_lilnetx_runs", 17),
    Job("minilm_squad", ("minilm_squad",), QA + "minilm_squad_runs --output {results}/minilm_squad.json", 180),
    Job("minilm_lilnetx", ("minilm_lilnetx",), QA + "minilm_lilnetx_runs --output {results}/minilm_lilnetx.json", 30),
    Job("published_parity", ("published_parity",), CIFAR + "published_parity.json --published {published} "
        "--runs {runs}/published_parity_runs", 60),
    Job("evidence", ("digits_methods",), PLAN % (("digits_methods",) * 3), 30),
    Job("evidence", ("minilm_qa",), PLAN % (("minilm_qa",) * 3)
        + "--place qa={qa} --place minilm_l6={minilm_l6}", 150),
    Job("evidence", ("cifar10_resnet20",), PLAN % (("cifar10_resnet20",) * 3)
        + "--place cifar10={cifar10} --place resnet20_jpeg={resnet20_jpeg}", 720),
    Job("evidence", ("cifar10_sfw_radii",), PLAN % (("cifar10_sfw_radii",) * 3)
        + "--place cifar10={cifar10} --place resnet20_jpeg={resnet20_jpeg}", 65),
    Job("evidence", ("cifar10_scratch",), PLAN % (("cifar10_scratch",) * 3) + "--place cifar10={cifar10}", 180),
    Job("model_cards", (), "--output {cards} --recipe digits_cram digits_sfw digits_tpp digits_lilnetx", 6),
    Job("model_cards", (), "--output {cards} --recipe cifar10_resnet20_cram_tune --place cifar10={cifar10} "
        "--place resnet20_jpeg={resnet20_jpeg}", 30),
    Job("model_cards", (), "--output {cards} --recipe minilm_squad_cram --place qa={qa} --place minilm_l6={minilm_l6}",
        50),
)  # fmt: skip


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--place", action="append", default=[], help="NAME=PATH of data, weights or checkouts")
    flags.add_argument("--runs", type=Path, default=RESULTS, help="folder of finished runs; those kept by default")
    flags.add_argument("--only", nargs="+", help="names of results; all by default")
    flags.add_argument("--list", action="store_true", help="only print the commands")
    options = flags.parse_args()
    places = dict(place.split("=", 1) for place in options.place)
    places |= {"here": str(HERE), "results": str(RESULTS), "runs": str(options.runs)}
    places |= {"cards": str(HERE.parents[1] / "model_cards")}
    jobs = [job for job in JOBS if not options.only or set(options.only) & {job.script, *job.makes}]
    able = [job for job in jobs if not lacking(job.flags, places)]
    for job in jobs:
        lacks = lacking(job.flags, places)
        print(f"{job.minutes:6.0f} min  {shlex.join(command(job, places)) if not lacks else left_out(job, lacks)}")
    print(f"{sum(job.minutes for job in able) / 60:.1f} h on one thread; finished runs are not made again", flush=True)
    for job in able if not options.list else ():
        subprocess.run(command(job, places), check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def lacking(flags: str, places: dict[str, str]) -> list[str]:
    """The places that flags name and that are not given."""
    return sorted({name for _, name, _, _ in Formatter().parse(flags) if name and name not in places})


def command(job: Job, places: dict[str, str]) -> list[str]:
    return [sys.executable, str(HERE / f"{job.script}.py"), *(part.format(**places) for part in job.flags.split())]


def left_out(job: Job, lacks: list[str]) -> str:
    return f"{', '.join(job.makes) or job.script} left out: give {' '.join(f'--place {name}=PATH' for name in lacks)}"


if __name__ == "__main__":
    main()
