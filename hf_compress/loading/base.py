"""What both loaders share."""

from __future__ import annotations

from typing import Any

from transformers.quantizers import HfQuantizer

# Arguments of `cached_file` that make it give None where there is no such file, or nothing can be asked.
IF_THERE: dict[str, Any] = {
    f"_raise_exceptions_for_{fault}": False for fault in ("gated_repo", "missing_entries", "connection_errors")
}


class Loader(HfQuantizer):
    """What both loaders share."""

    def is_serializable(self) -> bool:
        """A model that was loaded can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """And trained: it is plain."""
        return True

    def remove_quantization_config(self, model: Any) -> None:
        """As of every loader, from all parts of the model, but names that the checkpoint gave to weights are kept."""
        names_on_disk = vars(model).get("_weight_conversions")
        super().remove_quantization_config(model)
        if names_on_disk is not None:  # transformers 5.24 forgets them
            model._weight_conversions = names_on_disk
        for module in model.modules():  # some have a copy of the config
            config: Any = getattr(module, "config", None)
            if hasattr(config, "quantization_config"):
                del config.quantization_config


def refuse_offload(device_map: Any, done: str, way_out: str) -> None:
    """ValueError for a `device_map` that leaves weights on disk, or on the CPU beside an accelerator."""
    devices = {str(device) for device in device_map.values()} if isinstance(device_map, dict) else set()
    if "disk" in devices or (len(devices) > 1 and "cpu" in devices):
        raise ValueError(
            f"device_map puts weights on {', '.join(sorted(devices))}; offloaded weights cannot be {done}. "
            f"Load with device_map='cpu'{way_out}, save_pretrained(folder), and load that folder with the device_map"
        )
