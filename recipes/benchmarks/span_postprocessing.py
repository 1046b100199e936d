"""From logits to answers: hfc's n-best search beside the post-processing of transformers' question answering example.

Both get the windows and the same logits of all questions of a validation set, noise with a peak at the answer, and
choose an answer for every question out of the 20 best, which the example always lists and we on request. --example is
the path of the example's `utils_qa.py`, run as it is, with its defaults (20 starts by 20 ends, answers of at most 30
tokens). Time is the processor clock of one thread, in turns, so that a busy machine slows all alike.

    OMP_NUM_THREADS=1 python recipes/benchmarks/span_postprocessing.py --model MINILM --data FOLDER \\
        --example utils_qa.py --output recipes/benchmarks/results/span_postprocessing.json
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, load_dataset
from machine import facts
from transformers import AutoTokenizer
from transformers.utils import logging
from turns import in_turns, ratios

from hf_compress.tasks.question_answering import QuestionAnsweringArguments, features
from hf_compress.tasks.spans import Windows, answers, best_spans

ROUNDS = 9
PEAK, WIDTH = 8.0, 2.0  # height of the peak above the noise, whose deviation is 1, and its width in tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="whose tokenizer cuts the windows")
    parser.add_argument("--data", type=Path, required=True, help="folder with validation.parquet")
    parser.add_argument("--example", type=Path, required=True, help="utils_qa.py of transformers' example")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    logging.set_verbosity_error()
    validation = str(options.data / "validation.parquet")
    questions: Any = load_dataset("parquet", data_files={"validation": validation}, split="validation")
    args = QuestionAnsweringArguments(options.model, max_length=256, doc_stride=64)
    encoded, windows = features(questions, AutoTokenizer.from_pretrained(options.model), args, "evaluation")
    logits = peaked(encoded, windows)
    names, contexts = list(questions["id"]), list(questions["context"])
    theirs = load(options.example).postprocess_qa_predictions
    rows = as_the_example_has_them(windows, names)
    runs = {
        "hf_compress": lambda: best_answers(logits, windows, names, contexts, 1),
        "hf_compress_20_best": lambda: best_answers(logits, windows, names, contexts, 20),
        "example": lambda: theirs(questions, rows, logits),
    }
    chosen = {name: run() for name, run in runs.items()}
    seconds = in_turns(runs, ROUNDS, warm_up=0)
    result = {
        "what": __doc__,
        **facts(),
        "example_sha256": hashlib.sha256(options.example.read_bytes()).hexdigest(),
        "questions": len(questions),
        "windows": len(windows.example),
        "seconds": {name: [round(s, 4) for s in values] for name, values in seconds.items()},
        "example_over": {
            name: round(statistics.median(ratios(seconds, "example", name)), 2) for name in runs if name != "example"
        },
        "equal_answers": sum(chosen["example"][n] == chosen["hf_compress"][n] for n in names),
    }
    text = json.dumps(result, indent=2)
    options.output.write_text(text + "\n")
    print(text)


def peaked(encoded: Dataset, windows: Windows) -> tuple[np.ndarray, np.ndarray]:
    """Logits of starts and ends, (w, t) each: noise, and a peak at the labelled token."""
    random = np.random.default_rng(0)
    token = np.arange(windows.offsets.shape[1])
    found = []
    for name in ("start_positions", "end_positions"):
        distance = token - np.array(encoded[name])[:, None]
        noise = random.standard_normal(distance.shape)
        found.append((noise + PEAK * np.exp(-((distance / WIDTH) ** 2) / 2)).astype(np.float32))
    return found[0], found[1]


def best_answers(
    logits: tuple[np.ndarray, np.ndarray], windows: Windows, names: list[str], contexts: list[str], n_best: int
) -> dict[str, str]:
    spans = best_spans(*logits, windows)
    found = answers(spans, windows, contexts, n_best)
    return {name: listed[0].text for name, listed in zip(names, found, strict=True)}


def as_the_example_has_them(windows: Windows, names: list[str]) -> Dataset:
    """Its evaluation features: id of the question, and offsets that are None outside of the context."""
    offsets = [[pair if pair[0] >= 0 else None for pair in row] for row in windows.offsets.tolist()]
    return Dataset.from_dict({"example_id": [names[i] for i in windows.example], "offset_mapping": offsets})


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
