"""Model cards, rendered from the manifest: every number on them was measured, every snippet is run by a test."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..family.manifest import JOINED, LOCAL, Manifest
from ..family.table import is_less_better, main_metric, table_rows
from ..family.variant import Variant
from ..loading.statistics import AS_TRAINED, STATISTICS, StatisticsPack
from ..loading.timm_classes import timm_class
from .download import own_repository

_TEMPLATES = Path(__file__).parent / "templates"
AUTO_CLASSES = {  # by the name of a task
    "image-classification": "AutoModelForImageClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "supervised-finetuning": "AutoModelForCausalLM",
    "text-classification": "AutoModelForSequenceClassification",
}
# How a card says what the training did, for the methods that there are; the first ones prepare the dense checkpoint.
_PREPARING = {
    "cram": "Trained with CrAM (compression-aware minimizer): every step adds a second gradient, taken at compressed "
    "weights, so that accuracy survives one-shot pruning.",
    "sfw": "Trained with SFW (stochastic Frank-Wolfe): weights stay in regions whose vertices are sparse, of few "
    "filters or of low rank, so that they can be cut to such ones.",
}
_METHODS = {
    **_PREPARING,
    "tpp": "The trained variants come from the dense checkpoint by TPP (trainability preserving pruning): filters, "
    "neurons or heads were chosen, made needless by a growing penalty and removed, and the rest was retrained.",
    "lilnetx": "Trained with LilNetX: weights are decoded from whole numbers whose entropy is part of the loss. The "
    "dense checkpoint and the coded one have the same weights; the coded file takes a few bits for each of them.",
}
_EMBEDDED_DATA = ("digits",)


def render_card(manifest: Manifest, repo_id: str, own_repositories: bool = False) -> str:
    """The card of a family, in Markdown with metadata on top.

    Args:
        manifest: of the family; its folder holds the dense checkpoint.
        repo_id: where it is, or will be, published.
        own_repositories: whether variants are in repositories of their own instead of revisions.
    """
    metric = main_metric(manifest.dense.metrics)
    header, *rows = table_rows(manifest)
    place = _places(repo_id, own_repositories)
    cells = [[*header, "repository" if own_repositories else "revision"]]
    cells += [[*row, place(v, "`")] for row, v in zip(rows, manifest.checkpoints, strict=True)]
    best = _best_variant(manifest, metric)
    card = ModelCard.from_template(
        _card_data(manifest, repo_id, metric),
        template_path=str(_TEMPLATES / "family.md"),
        repo_id=repo_id,
        place=place,
        has_own=own_repositories,
        title=repo_id.split("/")[-1],
        manifest=manifest,
        is_prepared=manifest.method in _PREPARING,
        training=_METHODS.get(manifest.method),
        made=_made(manifest),
        joined=_joined(manifest),
        local=_local(manifest),
        table=_markdown_table(cells),
        plot=next((name for name in manifest.files if name == "plots/sparsity.png"), None),
        metric=metric,
        model_class=_model_class(manifest),
        example=best,
        slider_pattern="unstructured:0.6",
        slider_known=_slider_patterns(manifest),
        needs_us=[v for v in manifest.checkpoints if v.loads_with != "transformers"],
        stored_int8=[v for v in manifest.variants if v.storage == "int8"],
        skipped=[v for v in manifest.variants if v.skipped],
        citation=_citations(manifest),
    )
    return str(card)


def render_variant_card(manifest: Manifest, variant: Variant, repo_id: str, own_repositories: bool = False) -> str:
    """The page of one revision, or own repository: its row beside the dense one, and where the family is."""
    rows = table_rows(manifest)
    own = rows[1 + manifest.checkpoints.index(variant)]
    card = ModelCard.from_template(
        ModelCardData(library_name="transformers", tags=_tags(manifest), pipeline_tag=_task_of_hub(manifest)),
        template_path=str(_TEMPLATES / "variant.md"),
        repo_id=repo_id,
        place=_places(repo_id, own_repositories),
        has_own=own_repositories,
        variant=variant,
        table=_markdown_table([rows[0], rows[1], own]),
        model_class=_model_class(manifest),
    )
    return str(card)


def render_recipe(manifest: Manifest) -> str:
    """The recipe of the training, as `hf-compress train` takes it."""
    own = {key: value for key, value in manifest.recipe.items() if key not in (JOINED, LOCAL)}
    return yaml.safe_dump(own, sort_keys=False, allow_unicode=True)


def _places(repo_id: str, own_repositories: bool) -> Callable[[Variant, str], str]:
    """Says where a checkpoint is: as arguments of `from_pretrained` in double quotes, or as the cell of a table."""

    def place(variant: Variant, quote: str = '"') -> str:
        own = own_repository(repo_id, variant) if own_repositories and variant.pattern else repo_id
        if quote != '"':
            return f"{quote}{own if own_repositories else variant.revision}{quote}"
        return f'"{own}"' + ("" if own_repositories else f', revision="{variant.revision}"')

    return place


def _slider_patterns(manifest: Manifest) -> str:
    """The patterns whose batch-norm statistics are stored, as text; empty for none."""
    if STATISTICS not in manifest.files:
        return ""
    known = StatisticsPack.read(manifest.folder / STATISTICS).tensors
    return ", ".join(f"`{pattern}`" for pattern in known if pattern != str(AS_TRAINED))


def _made(manifest: Manifest) -> str:
    """How many variants were made in which way."""
    ways = {"one_shot": "compressed in one shot", "trained": "trained"}
    counts = {way: sum(v.made_by == way for v in manifest.variants) for way in ways}
    said = [f"{count} {ways[way]}" for way, count in counts.items() if count]
    return f"{' and '.join(said)} from it" if said else "no variant of it"


def _joined(manifest: Manifest) -> dict[str, str]:
    """Revision to method, of variants that have joined from other trainings."""
    found = manifest.recipe.get(JOINED)
    recipes = found.items() if isinstance(found, dict) else ()
    return {k: str(v.get("method")) for k, v in recipes if isinstance(v, dict) and v.get("method") in _METHODS}


def _local(manifest: Manifest) -> list[str]:
    """Flags that the recipe lacks, since they named paths of the machine of the training."""
    found = manifest.recipe.get(LOCAL)
    return [name for name in found if re.fullmatch(r"\w+", str(name))] if isinstance(found, list) else []


def _card_data(manifest: Manifest, repo_id: str, metric: str | None) -> ModelCardData:
    data = manifest.recipe.get("dataset_name")
    dataset = data if isinstance(data, str) and _is_hub_name(data) and data not in _EMBEDDED_DATA else None
    results = []
    if metric is not None:
        for variant in manifest.checkpoints:
            if (value := variant.metrics.get(metric)) is not None:
                results.append(_result(manifest, variant, metric, value, str(data or "unknown")))
    return ModelCardData(
        base_model=manifest.base_model if _is_hub_name(manifest.base_model) else None,
        datasets=dataset,
        library_name="transformers",
        pipeline_tag=_task_of_hub(manifest),
        tags=_tags(manifest),
        metrics=[metric] if metric else None,
        model_name=repo_id.split("/")[-1] if results else None,
        eval_results=results or None,
    )


def _result(manifest: Manifest, variant: Variant, metric: str, value: float, dataset: str) -> EvalResult:
    return EvalResult(
        task_type=_task_of_hub(manifest) or "other",
        dataset_type=dataset,
        dataset_name=dataset,
        metric_type=metric,
        metric_value=round(value, 6),
        metric_name=metric if variant.pattern is None else f"{metric}, {variant.pattern} (revision {variant.revision})",
    )


def _task_of_hub(manifest: Manifest) -> str | None:
    """What the Hub calls the task; it knows tasks by what a model does, not by how it was trained."""
    return "text-generation" if manifest.task == "supervised-finetuning" else manifest.task


def _tags(manifest: Manifest) -> list[str]:
    own = [manifest.method] if manifest.method in _METHODS else []
    parts = [part for v in manifest.variants for part in str(v.pattern).split("+")]
    kinds = {"quantization" if part.startswith(("int", "lilnetx")) else "sparsity" for part in parts}
    timm = ["timm"] if _config(manifest).get("model_type") == "timm_wrapper" else []
    return ["hf_compress", "compression-aware", *own, *sorted(kinds), *timm]


def _model_class(manifest: Manifest) -> str:
    """The class of transformers that loads the checkpoints."""
    architecture = (_config(manifest).get("architectures") or ["AutoModel"])[0]
    return AUTO_CLASSES.get(manifest.task or "", architecture)


def _config(manifest: Manifest) -> dict[str, Any]:
    path = manifest.folder / manifest.dense.path / "config.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    # What timm wrote, or an older transformers, names no class.
    if config.get("model_type") == "timm_wrapper":
        config["architectures"] = [timm_class(config)]
    return config


def _best_variant(manifest: Manifest, metric: str | None) -> Variant | None:
    """The one to try first: the most zeros at a loss of at most one hundredth of the metric, or else the least loss."""
    reference = manifest.dense.metrics.get(metric) if metric else None
    if metric is None or reference is None:
        return max(manifest.variants, key=lambda v: v.sparsity, default=None)
    sign = -1 if is_less_better(metric) else 1
    gains = [(sign * (value - reference), v) for v in manifest.variants if (value := v.metrics.get(metric)) is not None]
    good = [v for gain, v in gains if gain >= -0.01 * abs(reference)]
    if good or not gains:
        return max(good or manifest.variants, key=lambda v: v.sparsity, default=None)
    return max(gains, key=lambda pair: pair[0])[1]


def _markdown_table(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    columns = ["---"] + ["---:" if column != "revision" else "---" for column in rows[0][1:]]
    return "\n".join([lines[0], "| " + " | ".join(columns) + " |", *lines[1:]])


def _is_hub_name(name: str | None) -> bool:
    return name is not None and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not Path(name).exists()


def _citations(manifest: Manifest) -> str:
    methods = dict.fromkeys([manifest.method, *_joined(manifest).values()])
    files = [_TEMPLATES / f"{method}.bib" for method in methods if method in _METHODS]
    return "\n\n".join(path.read_text(encoding="utf-8").strip() for path in files)
