"""Which class of transformers loads a checkpoint of timm: configs of timm itself name none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def timm_class(config: Mapping[str, Any]) -> str:
    """The name of the class; one without a classifier where the checkpoint has none.

    Args:
        config: content of its config.json.
    """
    is_bare = config.get("architectures") == ["TimmWrapperModel"] or config.get("num_classes") == 0
    return "TimmWrapperModel" if is_bare else "TimmWrapperForImageClassification"
