"""What belongs together: the hidden neurons of feed-forward pairs, and attention heads.

They are found by the names that models give to these layers, and believed only where shapes agree and nothing but
elementwise functions stands between the layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..targets import Groups, Target, find_targets, kind_of, unwrap

# The layers that make hidden neurons (two where one gates the other), and the layer that reads them.
_FEED_FORWARD = (
    (("intermediate.dense",), "output.dense"),  # BERT
    (("fc1",), "fc2"),  # ViT, BART, timm
    (("fc1_g", "fc1_x"), "fc2"),  # SwiGLU of timm
    (("ffn",), "ffn_output"),  # ALBERT
    (("lin1",), "lin2"),  # DistilBERT
    (("c_fc",), "c_proj"),  # GPT-2
    (("gate_proj", "up_proj"), "down_proj"),  # Llama
    (("gate_up_proj",), "down_proj"),  # Phi-3
    (("wi",), "wo"),  # T5
    (("wi_0", "wi_1"), "wo"),
    (("Wi",), "Wo"),  # ModernBERT
    (("dense_h_to_4h",), "dense_4h_to_h"),  # GPT-NeoX
    (("linear1",), "linear2"),  # torch
)
_QUERY_KEY_VALUE = (
    ("query", "key", "value"),  # BERT
    ("q_proj", "k_proj", "v_proj"),  # ViT, Llama, BART
    ("q_lin", "k_lin", "v_lin"),  # DistilBERT
    ("q", "k", "v"),  # T5
)
_FUSED = ("qkv", "c_attn", "Wqkv")  # timm, GPT-2, ModernBERT: all queries, then all keys, then all values
_OUTPUT = ("o_proj", "out_proj", "out_lin", "o", "proj", "c_proj", "Wo", "dense")
_HEAD_SIZE = ("head_dim", "attention_head_size", "key_value_proj_dim")
_NUM_HEADS = ("num_heads", "num_attention_heads", "n_heads")

_NEITHER = {
    "neurons": "it is no layer of a feed-forward pair",
    "heads": "it is no projection of an attention whose heads are known",
}

_Modules = Mapping[str, nn.Module]
_Coupling = tuple[dict[str, Groups], str | None]  # layers that share groups, and why these are not their own, if so


def find_coupled_targets(
    model: nn.Module, include: Sequence[str] | None = None, exclude: Sequence[str] | None = None
) -> dict[str, Target]:
    """`find_targets`, each with the neurons and heads that it has a part in, or the reason why it has none.

    Args:
        model: see `find_targets`.
        include: globs on names, see `find_targets`.
        exclude: globs on names, see `find_targets`. Neurons and heads that have a part in an excluded weight are left
            alone as a whole.

    Returns:
        Name of the parameter to `Target`, with `groups`.

    Raises:
        ValueError: as `find_targets`.
    """
    targets = find_targets(model, include, exclude)
    modules = dict(unwrap(model).named_modules())
    groups: dict[str, dict[str, tuple[Groups, ...]]] = {name: {} for name in targets}
    reasons: dict[str, dict[str, str]] = {name: dict(_NEITHER) for name in targets}
    for kind, couplings in (("neurons", _feed_forwards(modules)), ("heads", _attentions(modules))):
        for layers, reason in couplings:
            parts = {f"{layer}.weight": part for layer, part in layers.items()}
            absent = [name for name in parts if name not in targets]
            if absent and reason is None:
                reason = f"{absent[0]!r} has a part in the same {kind} and is no target"
            for name in parts.keys() & targets.keys():
                if reason is None:
                    groups[name][kind] = (*groups[name].get(kind, ()), parts[name])
                else:
                    reasons[name][kind] = reason
    return {name: replace(target, groups={**reasons[name], **groups[name]}) for name, target in targets.items()}


def _feed_forwards(modules: _Modules) -> Iterator[_Coupling]:
    for path, module in modules.items():
        prefix = f"{path}." if path else ""
        for firsts, second in _FEED_FORWARD:
            names = [prefix + name for name in (*firsts, second)]
            if all(_is_linear(modules, name) for name in names):
                yield from _feed_forward(modules, names[:-1], names[-1])
        if isinstance(module, nn.Sequential):
            layers = [prefix + name for name, child in module.named_children() if kind_of(child)[0]]
            for pair in itertools.pairwise(layers):
                if all(_is_linear(modules, name) for name in pair):
                    yield from _feed_forward(modules, [pair[0]], pair[1])


def _feed_forward(modules: _Modules, firsts: list[str], second: str) -> Iterator[_Coupling]:
    count = _width(modules[second], is_input=True)
    blocks, rest = divmod(_width(modules[firsts[0]]), count)
    is_fused = len(firsts) == 1 and blocks == 2  # the layer and its gate lie in one weight
    if rest or not (is_fused or all(_width(modules[first]) == count for first in firsts)):
        return
    names = list(modules)
    between = [modules[name] for name in names[names.index(firsts[-1]) + 1 : names.index(second)]]
    mixing = [m for m in between if next(m.children(), None) is None and not _is_elementwise(m)]
    reason = f"a {type(mixing[0]).__name__} stands between the layers of its neurons" if mixing else None
    layers = {first: _outputs(modules[first], second, count, blocks) for first in firsts}
    yield {**layers, second: _inputs(modules[second], second, count)}, reason


def _attentions(modules: _Modules) -> Iterator[_Coupling]:
    for path, module in modules.items():
        projections = _projections(modules, f"{path}." if path else "")
        if not projections:
            continue
        parent = path.rpartition(".")[0]
        outputs = [*(f"{path}.{name}".lstrip(".") for name in _OUTPUT), f"{parent}.output.dense".lstrip(".")]
        output = next((name for name in outputs if _is_linear(modules, name)), None)
        widths = [_width(modules[name]) // blocks for name, blocks in projections.items()]
        size = _head_size(module, widths[0])
        reason = None
        if output is None or size is None:
            reason = f"the {'number of heads' if output else 'output projection'} of {path!r} cannot be found"
        elif not _fits(widths, size, _width(modules[output], is_input=True)):
            reason = f"its heads of {size} do not fit the widths of {path!r}: {widths}"
        elif mixing := _norm_of_all_heads(module, output.rpartition(".")[2], size, widths):
            reason = f"{mixing!r} takes all heads of {path!r} together"
        count = 1 if reason or size is None else widths[min(1, len(widths) - 1)] // size
        layers = {name: _outputs(modules[name], path, count, blocks) for name, blocks in projections.items()}
        if output:
            layers[output] = _inputs(modules[output], path, count)
        yield layers, reason


def _projections(modules: _Modules, prefix: str) -> dict[str, int]:
    """The layers that make queries, keys and values, and how many of the three each of them makes."""
    for names in _QUERY_KEY_VALUE:
        if all(_is_linear(modules, prefix + name) for name in names):
            return dict.fromkeys((prefix + name for name in names), 1)
    for name in _FUSED:
        if _is_linear(modules, prefix + name):
            query = f"{prefix}q_attn"  # of GPT-2, for attention to another sequence
            return {query: 1, prefix + name: 2} if _is_linear(modules, query) else {prefix + name: 3}
    return {}


def _head_size(module: Any, width: int) -> int | None:
    """Entries of one head, by what the module says of itself."""
    for names, is_size in ((_HEAD_SIZE, True), (_NUM_HEADS, False)):
        for name in names:
            value = getattr(module, name, None)
            if type(value) is int and value > 0 and (is_size or width % value == 0):
                return value if is_size else width // value
    return None


def _fits(widths: list[int], size: int, output: int) -> bool:
    """Whether queries come in heads, a whole number of them for each key and value, and the output reads them all."""
    query, value = widths[0], widths[-1]
    count = widths[min(1, len(widths) - 1)] // size
    if any(width % size for width in widths[:2]) or not count or query // size % count or value % count:
        return False
    return query // size * (value // count) == output


def _is_linear(modules: _Modules, name: str) -> bool:
    return name in modules and kind_of(modules[name])[0] in ("linear", "conv1d")


def _width(layer: Any, is_input: bool = False) -> int:
    reduction_dim = kind_of(layer)[1]
    width: int = layer.weight.shape[reduction_dim if is_input else 1 - reduction_dim]
    return width


def _outputs(layer: nn.Module, of: str, count: int, blocks: int) -> Groups:
    return Groups(of, 1 - kind_of(layer)[1], count, blocks)


def _inputs(layer: nn.Module, of: str, count: int) -> Groups:
    return Groups(of, kind_of(layer)[1], count)


def _norm_of_all_heads(module: nn.Module, output: str, size: int, widths: list[int]) -> str | None:
    """A norm of more than one head before the output, so that no head is by itself."""
    is_behind = False
    for name, child in module.named_children():
        is_behind |= name == output
        weight = child._parameters.get("weight")
        width = weight.numel() if weight is not None and weight.ndim == 1 else 0
        if size < width in widths and (not is_behind or name.startswith(("q_", "k_"))):
            return name
    return None


@torch.no_grad()
def _is_elementwise(module: nn.Module) -> bool:
    """Whether each output depends on the input in its place alone; tried, as activations have many names."""
    if isinstance(module, (nn.Dropout, nn.Identity)):
        return True
    if next(module.parameters(), None) is not None or next(module.buffers(), None) is not None:
        return False
    one = torch.linspace(-2, 2, 8)
    other = torch.cat([one[:4], one[4:] + 1])
    try:
        same = module(one)[:4], module(other)[:4]
    except Exception:  # whatever it is, it is no function of one number
        return False
    return same[0].shape == (4,) and torch.equal(*same)
