"""Variants of one family that join another, such as those of trainings that make one at a time."""

from __future__ import annotations

import shutil
from dataclasses import fields, replace
from pathlib import Path

from ..loading.statistics import STATISTICS
from ..patterns import parse_pattern
from .manifest import JOINED, Manifest, commit_folder, start_folder, verify_files, write_manifest
from .plots import plot_family
from .variant import Variant


def join(family: Manifest, other: Manifest) -> Path:
    """Copy the variants of another family into the folder of this one, which is replaced as a whole or not at all.

    Returns:
        The folder.

    Raises:
        ValueError: if there is nothing to add, two variants have one revision, the families are of different tasks or
            of dense models of different sizes, or a file differs from its hash.
    """
    _check(family, other)
    for each in (family, other):
        verify_files(each.folder, each.files)
    target = family.folder.absolute()
    partial = start_folder(target)
    added = tuple(_moved(variant, family.dense) for variant in other.variants)
    known = family.recipe.get(JOINED)
    recipes = {variant.revision: other.recipe for variant in added}
    recipe = {**family.recipe, JOINED: {**(known if isinstance(known, dict) else {}), **recipes}}
    try:
        for variant in family.checkpoints:
            _copy(family, variant, partial / variant.path)
        if STATISTICS in family.files:
            shutil.copyfile(family.folder / STATISTICS, partial / STATISTICS)
        for variant, here in zip(other.variants, added, strict=True):
            _copy(other, variant, partial / here.path)
        own = {f.name: getattr(family, f.name) for f in fields(Manifest)}  # not what a family on the Hub has beside
        joined = Manifest(**{**own, "folder": partial, "variants": (*family.variants, *added), "recipe": recipe})
        plot_family(joined, partial / "plots" / "sparsity")
        write_manifest(joined)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    commit_folder(partial, target)  # which keeps the folder where it fails
    return target


def _check(family: Manifest, other: Manifest) -> None:
    if not other.variants:
        raise ValueError(f"{other.folder} has no variants to add")
    if family.task != other.task:
        raise ValueError(f"{other.folder} is a family of {other.task}, this one of {family.task}; they do not join")
    counts = family.dense.parameters, other.dense.parameters
    if counts[0] != counts[1]:
        raise ValueError(
            f"{other.folder} is of a dense model of {counts[1]} parameters, this family of one of {counts[0]}; only "
            "variants of one model join"
        )
    taken = {name for variant in family.checkpoints for name in (variant.revision, variant.path)}
    for variant in other.variants:
        if (name := _revision(variant)) in taken:
            raise ValueError(f"there is a variant {variant.pattern} already; keep one of them")
        taken.add(name)


def _revision(variant: Variant) -> str:
    """By its pattern: the name in a manifest of others may be any text."""
    if variant.pattern is None:
        raise ValueError("a variant without a pattern cannot join a family")
    return parse_pattern(variant.pattern).revision


def _moved(variant: Variant, dense: Variant) -> Variant:
    name = _revision(variant)
    return replace(variant, revision=name, path=name, parameters_removed=dense.parameters - variant.parameters)


def _copy(family: Manifest, variant: Variant, folder: Path) -> None:
    for name in family.files_of(variant):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(family.folder / variant.path / name, folder / name)
