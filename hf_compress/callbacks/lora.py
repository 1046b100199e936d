"""LoRA adapters merged into a pruned model that stays pruned."""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..distributed import local
from ..patterns.masking import zero_

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D)


def merge_lora(model: nn.Module) -> nn.Module:
    """Merge the active LoRA adapters of a PEFT model into its base model, and keep the zeros there.

    Every zero in the weight of a Linear, Conv or Conv1D layer that has an adapter stays zero. Everything else is, bit
    for bit, what PEFT's `merge_and_unload` gives. At the zeros the change of the adapter is lost, so that the merged
    model is not the one that was trained: evaluate it. Initialisations of LoRA that rewrite the base weights (PiSSA,
    OLoRA) have undone its zeros before the training.

    Args:
        model: what `peft.get_peft_model` or `peft.PeftModel.from_pretrained` gave; it is used up.

    Returns:
        The base model, without anything of PEFT.

    Raises:
        ValueError: if it is no PEFT model with LoRA, if an adapter is merged already, or if a base weight is quantized.
    """
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer, LoraModel

    if not isinstance(model, PeftModel) or not isinstance(model.base_model, LoraModel):
        tuner = f" around a {type(model.base_model).__name__}" if isinstance(model, PeftModel) else ""
        raise ValueError(f"merge_lora takes a peft.PeftModel with LoRA adapters, got a {type(model).__name__}{tuner}")
    held = []
    for name, module in model.base_model.model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        layer = module.get_base_layer()
        if module.merged:
            raise ValueError(f"{name} is merged already, and its zeros are gone; call merge_lora before merge_adapter")
        if isinstance(layer, _LAYERS):
            if not layer.weight.is_floating_point():
                raise ValueError(f"the base weight of {name} is {layer.weight.dtype}; load it without quantization")
            held.append((layer, local(layer.weight) != 0))
    merged: nn.Module = model.merge_and_unload()
    with torch.no_grad():
        for layer, mask in held:
            zero_(local(layer.weight), mask)
    return merged
