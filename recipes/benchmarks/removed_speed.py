"""How much faster removal really is: ResNet-50 without half of its filters, BERT-base without half of its neurons.

Beside the dense model, in one run: eager PyTorch (ResNet-50 in channels_last) and onnxruntime, one thread, dense and
smaller in turns on the processor clock. "kept" is the measured speed-up divided by what the multiplications promise.
Weights are random; one image and 8 images of 224 pixels, and 4 texts of 128 tokens. What grows with the batch and does
not shrink with filters are norms, activations and additions of the residual stream, which multiplications do not count.

    OMP_NUM_THREADS=1 python recipes/benchmarks/removed_speed.py --output recipes/benchmarks/results/removed_speed.json
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import timm
import torch
from transformers import BertConfig, BertModel
from turns import in_turns, ratios

import hf_compress as hfc
from hf_compress.family.footprint import count_macs

ROUNDS = 11


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    packages = ("hf_compress", "torch", "timm", "transformers", "onnxruntime")
    result = {
        "what": __doc__,
        "command": "OMP_NUM_THREADS=1 python " + " ".join(sys.argv),
        "machine": {"processor": platform.processor() or platform.machine(), "python": platform.python_version()},
        "versions": {p: importlib.metadata.version(p) for p in packages},
        "rounds": ROUNDS,
        "cases": {
            "ResNet-50, filters:0.5, 1 image": resnet50(1),
            "ResNet-50, filters:0.5, 8 images": resnet50(8),
            "BERT-base, neurons:0.5, 4 texts": bert(),
        },
    }
    text = json.dumps(result, indent=2)
    if options.output:
        options.output.write_text(text + "\n")
    print(text)


def resnet50(count: int) -> dict[str, Any]:
    images = torch.randn(count, 3, 224, 224).to(memory_format=torch.channels_last)
    dense = timm.create_model("resnet50").eval().to(memory_format=torch.channels_last)
    return compared(dense, "filters:0.5", {"x": images})


def bert() -> dict[str, Any]:
    return compared(BertModel(BertConfig()).eval(), "neurons:0.5", {"input_ids": torch.randint(1, 30_000, (4, 128))})


@torch.no_grad()
def compared(dense: Any, pattern: str, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Speed-ups of the smaller model."""
    smaller = copy.deepcopy(dense)
    report = hfc.compress(smaller, pattern, remove=True)
    if "x" in inputs:
        smaller.to(memory_format=torch.channels_last)
    promised = count_macs(dense, inputs) / count_macs(smaller, inputs)
    eager = measured(lambda: dense(**inputs), lambda: smaller(**inputs))
    exported = measured(*(session(model, inputs) for model in (dense, smaller)))
    for numbers in (eager, exported):
        numbers["kept"] = round(numbers["speed_up"] / promised, 3)
    return {
        "parameters_removed": report.parameters_removed,
        "promised": round(promised, 3),
        "eager": eager,
        "onnxruntime": exported,
    }


def session(model: Any, inputs: dict[str, torch.Tensor]) -> Callable[[], Any]:
    """The model in onnxruntime, on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        plain = {k: v.clone(memory_format=torch.contiguous_format) for k, v in inputs.items()}
        torch.onnx.export(copy.deepcopy(model), (), path, kwargs=plain, dynamo=True, verbose=False)
        loaded = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [put.name for put in loaded.get_inputs()]
    feed = dict(zip(names, (value.numpy() for value in plain.values()), strict=True))
    return lambda: loaded.run(None, feed)


def measured(dense: Callable[[], Any], smaller: Callable[[], Any]) -> dict[str, Any]:
    seconds = in_turns({"dense": dense, "smaller": smaller}, ROUNDS)
    found = {f"{name}_milliseconds": round(1e3 * statistics.median(s), 2) for name, s in seconds.items()}
    return {**found, "speed_up": round(statistics.median(ratios(seconds, "dense", "smaller")), 3)}


if __name__ == "__main__":
    main()
