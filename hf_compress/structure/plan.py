"""From a pattern of groups to outputs that can be removed, and to weights that can only be zeroed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..targets import Groups, Target, unwrap
from .belonging import Belonging
from .factored import reasons_to_stay
from .removal import merged

Kept = Mapping[str, list[tuple[Groups, torch.Tensor]]]


def plan_removal(
    model: nn.Module, targets: Mapping[str, Target], kept: Kept, belonging: Belonging, reasons: Mapping[str, str]
) -> tuple[dict[str, list[int]], dict[str, str]]:
    """What `remove` takes, and why the other weights keep their shape.

    Args:
        model: wrappers are looked through.
        targets: weights with their groups.
        kept: for each of them its groups, and a bool vector along their dimension, True for kept; see `Grouped.kept`.
        belonging: of the same model.
        reasons: why weights cannot change, for those that are known not to.

    Returns:
        Name of a layer to the indices of its outputs that go, one layer for those that go together; and name of a
        weight to the reason why it has none that can.
    """
    model = unwrap(model)
    reasons = {**reasons_to_stay(model, is_replaced=False), **reasons}
    plan: dict[str, list[int]] = {}
    stay: dict[str, str] = {}
    covered: set[str] = set()
    for name, target in targets.items():
        for groups, line in kept[name]:
            path, gone = name.rpartition(".")[0], (~line).nonzero().flatten().tolist()
            if groups.dim != target.output_dim or not gone or path in covered:
                continue
            try:
                lines = merged(model, {path: gone}, belonging)
            except ValueError as error:
                stay[name] = str(error)
                continue
            found = {layer: reasons[f"{layer}.weight"] for layer, _ in lines if f"{layer}.weight" in reasons}
            if found:
                layer, reason = next(iter(found.items()))
                together = [f"{member}.weight" for member, _ in lines if f"{member}.weight" in targets]
                stay |= dict.fromkeys(together, reason if layer == path else f"{layer!r} stays: {reason}")
                continue
            plan[path] = gone
            covered |= {layer for layer, part in lines if part == "outputs"}
    return plan, stay


def example_inputs(model: Any) -> Any:
    """A small batch as a model of transformers or timm takes it; None for others.

    Two images of the size that an image model says it takes (64 by 64 if it says nothing), or the token ids that
    transformers has for such a use.
    """
    model = unwrap(model)
    inner, config = getattr(model, "timm_model", model), getattr(model, "config", None)
    size = (getattr(inner, "pretrained_cfg", None) or {}).get("input_size")
    patches = getattr(getattr(inner, "patch_embed", None), "img_size", None)  # of timm, changed by arguments
    size = (size[0], *patches) if size is not None and isinstance(patches, tuple) else size
    edge = getattr(config, "image_size", None)
    if size is None and getattr(model, "main_input_name", None) == "pixel_values":
        edge = edge if isinstance(edge, int) else 64  # a net that does not say takes any
        size = (getattr(config, "num_channels", 3), edge, edge)
    if size is None:
        ids = getattr(model, "dummy_inputs", None) if config is not None else None
        return ids if isinstance(ids, dict) and "input_ids" in ids else None
    like = next(model.parameters())
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0)).to(like)
    return images if config is None else {"pixel_values": images}
