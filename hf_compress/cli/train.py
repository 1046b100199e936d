"""`hf-compress train`: a recipe and flags in, a family of checkpoints out."""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser, set_seed

from ..methods.registry import METHODS
from .recipes import ABOUT, nearest, packaged, read_recipe
from .table import VariantPrinter

# Name of a task to its module and the dataclass of its arguments.
TASKS = {"image-classification": ("image_classification", "ImageClassificationArguments")}


def train(argv: Sequence[str]) -> None:
    """Train as a recipe and flags say, then cut, measure and save the family."""
    method, task_name, recipe, flags = _read_command(list(argv))
    task = importlib.import_module(f"..tasks.{TASKS[task_name][0]}", __package__)
    parser = _RecipeParser((getattr(task, TASKS[task_name][1]), method.config_class))
    task_args, args = parser.parse_with_recipe(recipe, flags)
    _check_output(Path(args.output_dir))
    set_seed(args.seed)
    trainer = method.trainer_class(args=args, **task.prepare(task_args))
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    if args.variants:
        printer = VariantPrinter(trainer.is_world_process_zero())
        family = trainer.build_family(recipe=recipe, task=task_name, progress=printer)
        printer.finish(family)


def _read_command(argv: list[str]) -> tuple[Any, str, dict[str, Any], list[str]]:
    """Method, task, the recipe's keys with overriding `method` and `task`, and the other flags."""
    name = argv.pop(0) if argv and not argv[0].startswith("-") else None
    options = {key: _take(argv, f"--{key}") for key in ("config", "method", "task")}
    if name and options["config"]:
        raise ValueError(f"two recipes: {name} and --config {options['config']}; give one")
    name = name or options["config"]
    recipe = read_recipe(name) if name else {}
    chosen = {key: options[key] or recipe.get(key) for key in ("method", "task")}
    for key, allowed in (("method", list(METHODS)), ("task", list(TASKS))):
        if chosen[key] is None:
            raise ValueError(
                f"no {key}: give a recipe ({', '.join(sorted(packaged()))}) or --{key} (one of {', '.join(allowed)}); "
                "for the flags of a method and task add --help"
            )
        if chosen[key] not in allowed:
            raise ValueError(
                f"no {key} {chosen[key]!r}{nearest(str(chosen[key]), allowed)} (there are: {', '.join(allowed)})"
            )
    return METHODS[str(chosen["method"])], str(chosen["task"]), {**recipe, **chosen}, argv


def _take(argv: list[str], flag: str) -> str | None:
    """Remove a flag and its value from the command."""
    for i, word in enumerate(argv):
        if word == flag or word.startswith(flag + "="):
            words = word.split("=", 1) if "=" in word else argv[i : i + 2]
            if len(words) < 2:
                raise ValueError(f"{flag} needs a value")
            del argv[i : i + (1 if "=" in word else 2)]
            return words[1]
    return None


class _RecipeParser(HfArgumentParser):
    """Flags as transformers parses them, with defaults from a recipe."""

    def __init__(self, dataclass_types: Any) -> None:
        super().__init__(dataclass_types, prog="hf-compress train RECIPE", allow_abbrev=False)

    def parse_with_recipe(self, recipe: dict[str, Any], flags: list[str]) -> tuple[Any, ...]:
        """One instance of each dataclass: flags win over the recipe, the recipe over defaults."""
        values = {k: v for k, v in recipe.items() if k not in (*ABOUT, "method", "task")}
        known = [f.name for kind in self.dataclass_types for f in dataclasses.fields(kind) if f.init]
        for key in values:
            if key not in known:
                raise ValueError(f"the recipe has a key {key!r} that is no flag{nearest(key, known)}")
        for action in self._actions:
            if action.dest in values:
                value = values[action.dest]
                # YAML reads 5e-5 as text, and argparse converts only the words of the command line.
                if isinstance(value, str) and callable(action.type) and action.nargs is None:
                    value = action.type(value)
                action.default, action.required = value, False
        *parsed, unknown = self.parse_args_into_dataclasses(flags, return_remaining_strings=True)
        if unknown:
            word = unknown[0].lstrip("-").split("=")[0]
            raise ValueError(f"no flag {unknown[0]!r}{nearest(word, known)}")
        return tuple(parsed)

    def error(self, message: str) -> Any:
        """argparse's message as an error of ours, without the usage text of 150 flags."""
        raise ValueError(message)


def _check_output(folder: Path) -> None:
    """An output folder that cannot be written fails now, not after the training."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror}; choose another --output_dir") from error
