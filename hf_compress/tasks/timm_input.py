"""What transformers needs to know of a timm model: its input, its names on disk, its image processor."""

from __future__ import annotations

from typing import Any

# What timm needs to know of a new model; the rest of its registry is about weights that this model does not have.
INPUT_KEYS = "input_size fixed_input_size interpolation crop_pct crop_mode mean std first_conv classifier".split()


def describe_timm(config: Any, classes: list[str]) -> None:
    """Make the config of a timm checkpoint tell of the model that it becomes: its classes and its input."""
    import timm

    # timm's own files give num_classes here too, and transformers passes it a second time.
    config.model_args = {k: v for k, v in (config.model_args or {}).items() if k != "num_classes"}
    config.label_names = classes
    registered: Any = timm.get_pretrained_cfg(config.architecture)
    about = getattr(config, "pretrained_cfg", None) or registered.to_dict()
    stale = ("num_classes", "label_names", "label_descriptions", "label_offset")
    about = {k: v for k, v in about.items() if k not in stale}
    config.pretrained_cfg = {**fit_input(about, config.model_args), "custom_load": False}
    if hasattr(config, "label_descriptions"):
        del config.label_descriptions


def fit_input(about: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """timm's facts of a model, with the channels and the image size that arguments of the model set."""
    channels, *size = about.get("input_size") or (3, 224, 224)
    channels = arguments.get("in_chans") or channels
    if arguments.get("img_size") is not None:
        given = arguments["img_size"]
        size = [given, given] if isinstance(given, int) else list(given)
    about = {**about, "input_size": (channels, *size)}
    for key in ("mean", "std"):
        if about.get(key):
            about[key] = one_per_channel(about[key], channels)
    for key in ("test_input_size", "min_input_size"):
        if about.get(key):
            about[key] = (channels, *about[key][1:])
    return about


def one_per_channel(values: Any, channels: int) -> list[float]:
    """Means or deviations for as many channels; the average of others for each where the number differs."""
    return list(values) if len(values) == channels else [sum(values) / len(values)] * channels


def timm_processor(config: Any, **overrides: Any) -> Any:
    """The image processor of a timm model, as its config describes the input."""
    from transformers import TimmWrapperImageProcessor

    return TimmWrapperImageProcessor(
        pretrained_cfg={**config.pretrained_cfg, **overrides}, architecture=config.architecture
    )


def with_native_names(model: Any) -> Any:
    """The model, to be saved under timm's own names, so that timm loads the checkpoint too."""
    from transformers.core_model_loading import PrefixChange

    model._weight_conversions = [PrefixChange(prefix_to_add="timm_model")]
    return model
