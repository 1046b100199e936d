"""Python that loads a checkpoint. It is copied and run, so whatever a manifest says stays inside a string of it."""

from __future__ import annotations

import json
import keyword
from typing import Any

from ..family.family import Family
from ..family.manifest import Manifest
from ..family.variant import Variant
from ..hub.card import AUTO_CLASSES
from ..hub.download import CARD, own_repository
from ..loading.base import IF_THERE
from ..loading.timm_classes import timm_class
from ..report import CheckpointReport

_FLOATS = {"F64", "F32", "F16", "BF16"}


def class_of(family: Manifest) -> str:
    """The class of transformers that loads a family's checkpoints: by its task, else by the config of the dense one."""
    if family.task in AUTO_CLASSES:
        return AUTO_CLASSES[family.task]
    config = _dense_config(family)
    if config.get("model_type") == "timm_wrapper":
        return "AutoModel" if timm_class(config) == "TimmWrapperModel" else "AutoModelForImageClassification"
    names = config.get("architectures")
    return _class_name(names[0] if isinstance(names, list) and names else None)


def load_variant(family: Manifest, variant: Variant, class_name: str) -> str:
    """The snippet for a checkpoint of a family: its revision or its own repository on the Hub, or its folder.

    Args:
        family: that it belongs to.
        variant: one of its checkpoints.
        class_name: of `class_of`.
    """
    lines = ["# needs: pip install compressed-tensors"] if variant.storage == "int8" else []
    lines += ["import hf_compress"] if variant.loads_with != "transformers" else []
    repo_id = getattr(family, "repo_id", None)
    if repo_id is None:
        place = quote((family.folder / variant.path).as_posix())
    elif _is_on_its_own(family, own := own_repository(repo_id, variant)):
        place = quote(own)
    else:
        place = quote(repo_id) + (f", revision={quote(variant.revision)}" if variant.pattern else "")
    lines += [f"from transformers import {class_name}", "", f"model = {class_name}.from_pretrained({place})"]
    return "\n".join(lines)


def cut_while_loading(report: CheckpointReport, pattern: str | None, revision: str | None) -> str | None:
    """The snippet that cuts a checkpoint to a pattern while it is loaded; None where `from_pretrained` cannot do it.

    Args:
        report: of the checkpoint.
        pattern: None to load it as it is.
        revision: of a checkpoint on the Hub.
    """
    is_plain = all(layer.dtype in _FLOATS for layer in report.layers)
    if report.architecture is None or not is_plain or report.model.endswith(".safetensors"):
        return None
    class_name = _class_name(report.architecture)
    place = quote(report.model) + (f", revision={quote(revision)}" if revision else "")
    if pattern is None:
        return f"from transformers import {class_name}\n\nmodel = {class_name}.from_pretrained({place})"
    globs = {"include": report.include, "exclude": report.exclude}
    chosen = [f", {name}=[{', '.join(map(quote, value))}]" for name, value in globs.items() if value is not None]
    return (
        f"from transformers import {class_name}\n\nfrom hf_compress import HfCompressConfig\n\n"
        f"config = HfCompressConfig({quote(pattern)}{''.join(chosen)})\n"
        f"model = {class_name}.from_pretrained({place}, quantization_config=config)"
    )


def quote(text: str) -> str:
    """A Python string that reads back as `text` and shows what is in it: nothing unprintable, in one line."""
    written = repr(text)
    return f'"{written[1:-1]}"' if '"' not in text and "'" not in text else written


def _is_on_its_own(family: Manifest, own: str) -> bool:
    """Whether a variant has a repository of its own: the card says it, which is read with the manifest."""
    card = family.folder / CARD
    return card.is_file() and f"`{own}`" in card.read_text(encoding="utf-8", errors="replace")


def _class_name(name: Any) -> str:
    is_name = isinstance(name, str) and name.isascii() and name.isidentifier() and not keyword.iskeyword(name)
    return name if is_name else "AutoModel"


def _dense_config(family: Manifest) -> dict[str, Any]:
    """config.json of the dense checkpoint, from the Hub if need be; empty where there is none that can be read."""
    path = family.folder / family.dense.path / "config.json"
    if isinstance(family, Family) and family.repo_id is not None:
        from transformers.utils import cached_file

        # The dense checkpoint stands beside the manifest, in the commit that the manifest was read from.
        found = cached_file(family.repo_id, "config.json", revision=family.folder.name, **IF_THERE)
        path = type(path)(found) if found else path
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}
