"""Other tools of today, each a function that cuts one of our nets in place, for todays_tools.py.

Each is imported where it is called, so that one that is not installed, or no longer can what its documents say, fails
alone. Most sparsifiers know Linear layers alone: `as_matrices` lets them cut a net that computes the same with these.
"""

from __future__ import annotations

import copy
import itertools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

import hf_compress as hfc

EXAMPLE = torch.zeros(1, 3, 32, 32)
Batches = list[dict[str, torch.Tensor]]


def torch_pruning(model: Any, share: float, is_global: bool, is_inside: bool) -> None:
    """By group magnitude: what a residual addition ties goes together, or only what lies inside a block."""
    import torch_pruning

    net = model.timm_model
    inside = [block.conv1 for stage in (net.layer1, net.layer2, net.layer3) for block in stage]
    tied = [m for m in net.modules() if isinstance(m, nn.Conv2d) and m not in inside]
    torch_pruning.pruner.BasePruner(
        net,
        EXAMPLE,
        importance=torch_pruning.importance.GroupMagnitudeImportance(),  # MagnitudeImportance is its second name
        global_pruning=is_global,
        pruning_ratio=share,
        ignored_layers=[net.linear, *(tied if is_inside else [])],
    ).step()


def shortcuts(model: Any) -> dict[str, Any]:
    """Which channel of later stages torch-pruning ties to channel 0 of the first, and which one holds it."""
    try:
        import torch_pruning

        net = copy.deepcopy(model.timm_model)
        graph = torch_pruning.DependencyGraph().build_dependency(net, EXAMPLE)
        group = graph.get_pruning_group(net.conv1, torch_pruning.prune_conv_out_channels, idxs=[0])
    except Exception as error:
        return {"error": said(error)}
    stages = ("layer2.0", "layer3.0")
    tied = {s: list(index) for each, index in group for s in stages if each.target.name.startswith(f"{s}.bn2 ")}
    shifts = itertools.accumulate(net.get_submodule(stage).shortcut.before for stage in stages)  # padding moves it
    return {"tied": tied, "held_by": {stage: [shift] for stage, shift in zip(stages, shifts, strict=True)}}


def said(error: Exception) -> str:
    """In one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def global_unstructured(model: Any, count: int) -> None:
    """torch.nn.utils.prune, with a count of zeros: of a share it takes the nearest count, and ours the one below."""
    from torch.nn.utils import prune

    layers = [(model.get_submodule(name.removesuffix(".weight")), "weight") for name in hfc.find_targets(model)]
    prune.global_unstructured(layers, prune.L1Unstructured, amount=count)
    for layer, name in layers:
        prune.remove(layer, name)


def weight_norm(model: Any, share: float | None, batches: Batches) -> None:
    """torch.ao.pruning: a share of every layer, or 2:4."""
    from torch.ao.pruning import WeightNormSparsifier

    form: dict[str, Any] = {"sparse_block_shape": (1, 1)}
    form = form if share else {"sparse_block_shape": (1, 4), "zeros_per_block": 2}
    sparsifier = WeightNormSparsifier(sparsity_level=share or 1.0, **form)
    sparsifier.prepare(model, _weights(model))
    sparsifier.step()
    sparsifier.squash_mask()


def torchao_fake(model: Any, share: None, batches: Batches) -> None:
    """2:4 by magnitude."""
    from torchao.sparsity import apply_fake_sparsity

    apply_fake_sparsity(model)


def torchao_semi(model: Any, share: None, batches: Batches) -> None:
    """The same in the storage of sparse tensor cores."""
    from torchao.sparsity import semi_sparse_weight, sparsify_

    torchao_fake(model, share, batches)
    sparsify_(model, semi_sparse_weight())


def torchao_wanda(model: Any, share: None, batches: Batches) -> None:
    """2:4 by magnitude times the norm of what a weight is multiplied with."""
    from torchao.sparsity import WandaSparsifier

    sparsifier = WandaSparsifier(semi_structured_block_size=4)
    sparsifier.prepare(model, _weights(model))
    for batch in batches:
        model(**batch)
    sparsifier.step()
    sparsifier.squash_mask()


def _weights(model: Any) -> list[dict[str, str]]:
    kinds = tuple(_kinds(model).values())
    return [{"tensor_fqn": f"{name}.weight"} for name, m in model.named_modules() if isinstance(m, kinds)]


def _kinds(model: Any) -> dict[str, type[nn.Module]]:
    """Of the layers to cut: convolutions too, in a net that has no matrices in their place."""
    is_flat = any(isinstance(layer, Patches) for layer in model.modules())
    return {"Linear": nn.Linear} if is_flat else {"Linear": nn.Linear, "Conv2d": nn.Conv2d}


def sparse_gpt(model: Any, share: float | None, batches: Batches) -> None:
    """llm-compressor: 2:4, or a share of every layer, with the other weights set anew to make up for it."""
    options = {"sparsity": share or 0.5, "mask_structure": "0:0" if share else "2:4"}
    _llmcompressor(model, batches, "SparseGPTModifier", options)


def wanda(model: Any, share: None, batches: Batches) -> None:
    """llm-compressor."""
    _llmcompressor(model, batches, "WandaPruningModifier", {"sparsity": 0.5, "mask_structure": "2:4"})


def magnitude(model: Any, share: None, batches: Batches) -> None:
    """llm-compressor."""
    shares = {"init_sparsity": 0.5, "final_sparsity": 0.5}
    _llmcompressor(model, batches, "MagnitudePruningModifier", {"mask_structure": "2:4", **shares})


def _llmcompressor(model: Any, batches: Batches, name: str, options: dict[str, Any]) -> None:
    os.environ["LLM_COMPRESSOR_LOG_LEVEL"] = "ERROR"  # else it writes lines for each layer to standard output
    from llmcompressor import oneshot
    from llmcompressor.modifiers import pruning

    modifier = getattr(pruning, name)(targets=list(_kinds(model)), **options)
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        model.config._name_or_path = folder  # it reads the config of every model from disk
        data = torch.utils.data.DataLoader(batches, batch_size=None)
        oneshot(model=model, recipe=[modifier], processor=object(), dataset=data, pipeline="basic")


class Patches(nn.Module):
    """What a convolution sees at every place, as a row (height, width, channel) of a matrix."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.kernel, self.stride = convolution.kernel_size[0], convolution.stride[0]
        self.pad = nn.ZeroPad2d(int(convolution.padding[0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = self.pad(x).unfold(2, self.kernel, self.stride).unfold(3, self.kernel, self.stride)
        return seen.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)


class Image(nn.Module):
    """The rows of a square image, back in its form."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2).unflatten(2, (round(x.shape[1] ** 0.5), -1))


@torch.no_grad()
def as_matrices(model: Any, cut: Callable[[Any], None], names: list[str]) -> None:
    """A tool cuts a net of Linear layers that computes the same; their weights are written back.

    Args:
        model: whose weights change.
        cut: the tool.
        names: of the layers that become matrices, whose columns lie as in `Patches`: 2:4 holds along channels.
    """
    flat = copy.deepcopy(model)
    for name in names:
        layer = flat.get_submodule(name)
        if isinstance(layer, nn.Conv2d):
            linear = nn.Linear(layer.weight[0].numel(), layer.out_channels, bias=False)
            linear.weight.copy_(layer.weight.permute(0, 2, 3, 1).flatten(1))
            flat.set_submodule(name, nn.Sequential(Patches(layer), linear, Image()))
    cut(flat)
    for name in names:
        layer, weight = flat.get_submodule(name), model.get_parameter(f"{name}.weight")
        if isinstance(layer, nn.Sequential):
            weight.copy_(layer[1].weight.unflatten(1, (*weight.shape[2:], -1)).permute(0, 3, 1, 2))
        else:
            weight.copy_(layer.weight)


def exported(model: Any, how: str, folder: Path, batches: Batches) -> Path:
    """A file of onnxruntime: "float32", "quantize_dynamic" or "quantize_static" (calibrated, scales per channel).

    Args:
        model: exported once for all files of a folder.
        how: one of these.
        folder: where the files are.
        batches: to calibrate with.
    """
    from onnxruntime.quantization import QuantFormat, quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    plain, small = folder / "plain.onnx", folder / f"{how}.onnx"
    pixels = [batch["pixel_values"].contiguous() for batch in batches]
    if not plain.is_file():
        torch.onnx.export(
            copy.deepcopy(model),
            (),
            plain,
            kwargs={"pixel_values": pixels[0]},
            dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    if how == "float32":
        return plain
    prepared = folder / "prepared.onnx"
    quant_pre_process(plain, prepared)
    if how == "quantize_dynamic":
        quantize_dynamic(prepared, small)
    else:
        feed = iter([{"pixel_values": each.numpy()} for each in pixels])
        reader: Any = SimpleNamespace(get_next=lambda: next(feed, None))
        quantize_static(prepared, small, reader, quant_format=QuantFormat.QDQ, per_channel=True)
    return small


class InOnnxruntime(nn.Module):
    """A file in onnxruntime, called as the net itself."""

    def __init__(self, path: Path) -> None:
        import onnxruntime

        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.place = nn.Parameter(torch.zeros(()))  # says on which device

    def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        (logits,) = self.session.run(None, {"pixel_values": pixel_values.contiguous().numpy()})
        return SimpleNamespace(logits=torch.from_numpy(logits))
