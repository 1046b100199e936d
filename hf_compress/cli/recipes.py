"""Recipes: YAML files with the flags of a run, found by name or by path."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

_PACKAGED = Path(__file__).resolve().parent.parent / "recipes"
_CHECKOUT = Path(__file__).resolve().parent.parent.parent / "recipes"

# What a recipe says about itself rather than about the run.
ABOUT = ("description", "goal", "cost")


def list_recipes(argv: Sequence[str]) -> None:
    """Print every packaged recipe with its cost and goal."""
    argparse.ArgumentParser(
        prog="hf-compress recipes", description="List the packaged recipes, what they cost and what they reach."
    ).parse_args(argv)
    for name, path in sorted(packaged().items()):
        recipe = read_recipe(str(path))
        print(f"{name}\n  {recipe['description']}\n  cost: {recipe['cost']}\n  goal: {recipe['goal']}\n")
    print("Run one with: hf-compress train NAME [--flag value ...]")


def packaged() -> dict[str, Path]:
    """Name to path of the recipes that come with the package."""
    root = _PACKAGED if _PACKAGED.is_dir() else _CHECKOUT
    folders = (p for p in root.iterdir() if p.is_dir() and p.name not in ("accelerate", "benchmarks"))
    return {path.stem: path for folder in folders for path in folder.glob("*.yaml")}


def read_recipe(name_or_path: str) -> dict[str, Any]:
    """The keys of a recipe.

    Raises:
        ValueError: if there is none of that name, or it is no mapping in YAML or JSON.
    """
    path = Path(name_or_path)
    if not path.is_file():
        path = _find(name_or_path)
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (yaml.YAMLError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {path} cannot be read: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"recipe {path} must be a mapping of flags to values, such as `rho: 0.05`")
    return content


def nearest(word: str, allowed: Sequence[str]) -> str:
    """A hint for a mistyped word: the closest one that is allowed."""
    matches = difflib.get_close_matches(word, allowed, n=1, cutoff=0.4)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def _find(name: str) -> Path:
    recipes = packaged()
    if name in recipes:
        return recipes[name]
    looks_like_path = "/" in name or name.endswith((".yaml", ".yml", ".json"))
    what = "no file" if looks_like_path else "no recipe and no file"
    raise ValueError(f"{what} {name!r}{nearest(name, list(recipes))} (packaged recipes: {', '.join(sorted(recipes))})")
