"""`hf-compress train`: a recipe and flags in, a family of checkpoints out."""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser, set_seed

from ..callbacks import SparsityLock
from ..family.manifest import MANIFEST
from ..methods.registry import METHODS, Method
from ..training import recipe_of
from .recipes import ABOUT, nearest, packaged, read_recipe
from .table import VariantPrinter

# Name of a task to its module and the dataclass of its arguments.
TASKS = {
    "image-classification": ("image_classification", "ImageClassificationArguments"),
    "text-classification": ("text_classification", "TextClassificationArguments"),
    "question-answering": ("question_answering", "QuestionAnsweringArguments"),
    "supervised-finetuning": ("supervised_finetuning", "SupervisedFinetuningArguments"),
}

# A pretrained model takes the place of the new one of a recipe, and the other way round.
_OF_NEW_MODELS = ("architecture", "model_args", "image_size")
_REPLACES = {"model_name_or_path": _OF_NEW_MODELS, "architecture": ("model_name_or_path",)}


@dataclasses.dataclass
class CommandArguments:
    """What the command does beside training; in Python these are callbacks.

    Args:
        lock_zeros: weights that are zero at the start stay zero, see `SparsityLock`.
    """

    lock_zeros: bool = dataclasses.field(default=False, metadata={"help": "Keep zero what is zero at the start."})


@dataclasses.dataclass(frozen=True)
class Run:
    """What a command line asks for."""

    method: Method
    task_name: str
    task: Any
    task_args: Any
    args: Any
    command: CommandArguments

    @property
    def recipe(self) -> dict[str, Any]:
        """What is trained, in the form of a recipe: the flags that differ from their defaults."""
        names = {"method": self.method.name, "task": self.task_name}
        return {**names, **recipe_of(self.task_args, self.args, self.command)}


def train(argv: Sequence[str]) -> None:
    """Train as a recipe and flags say, then cut, measure and save the family."""
    if _asks_how(argv):
        print(_usage())
        return
    run = parse(argv)
    has_variants = bool(run.args.variants) or run.method.mixin_class.makes_variant
    if run.args.push_to_hub and not has_variants:
        raise ValueError("--push_to_hub publishes the family: say with --variants which patterns to cut, such as 2:4")
    with _output(Path(run.args.output_dir)):
        set_seed(run.args.seed)
        trainer: Any = run.method.trainer_class(args=run.args, **_prepared(run))
    if run.command.lock_zeros:
        trainer.add_callback(SparsityLock(run.args.include, run.args.exclude))
    if trainer.is_world_process_zero():
        processes = trainer.accelerator.num_processes
        print(f"{run.method.name} on {processes} process{'es' if processes > 1 else ''}", flush=True)
        if has_variants and ((family := Path(run.args.output_dir) / "_family") / MANIFEST).is_file():
            print(f"at the end a new family takes the place of the one in {family}", flush=True)
    resume = run.args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if str(resume).lower() == "true" else resume)
    trainer.save_model()
    if has_variants:
        printer = VariantPrinter(trainer.is_world_process_zero())
        printer.finish(trainer.build_family(recipe=run.recipe, task=run.task_name, progress=printer))
        if run.args.push_to_hub:  # build_family has sent everything; this finds that it is there
            printer.say(f"published {trainer.push_to_hub().url}")
    # A process that exits while another still waits for it makes that one abort.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def parse(argv: Sequence[str]) -> Run:
    """Read a recipe and the flags that override it.

    Raises:
        ValueError: for anything that is unknown or of a wrong form, with the nearest right name.
    """
    method, task_name, recipe, flags = _read_command(list(argv))
    task = importlib.import_module(f"..tasks.{TASKS[task_name][0]}", __package__)
    if hasattr(task, "compose"):  # it brings a trainer of its own
        method = task.compose(method)
    parser = _RecipeParser((getattr(task, TASKS[task_name][1]), method.config_class, CommandArguments))
    return Run(method, task_name, task, *parser.parse_with_recipe({**task.DEFAULT_FLAGS, **recipe}, flags))


def _asks_how(argv: Sequence[str]) -> bool:
    """Whether help is wanted before anything says which flags there are."""
    given = {word.split("=", 1)[0] for word in argv}
    has_recipe = (bool(argv) and not argv[0].startswith("-")) or "--config" in given
    return bool(given & {"-h", "--help"}) and not has_recipe and not given >= {"--method", "--task"}


def _usage() -> str:
    recipes = {name: read_recipe(str(path))["description"] for name, path in sorted(packaged().items())}
    methods = {name: method.description for name, method in METHODS.items()}
    lines = [
        "usage: hf-compress train RECIPE [--flag value ...]",
        "       hf-compress train --method METHOD --task TASK [--flag value ...]",
        "",
        "RECIPE is one of those below, or a path to a YAML or JSON file of flags. It comes first; flags override it.",
    ]
    for title, rows in (("recipes", recipes), ("methods", methods), ("tasks", dict.fromkeys(TASKS, ""))):
        lines += ["", f"{title}:", *(f"  {name:20}  {text}".rstrip() for name, text in rows.items())]
    lines += ["", "`hf-compress train RECIPE --help` lists all flags, as does --help beside --method and --task."]
    return "\n".join(lines)


def _read_command(argv: list[str]) -> tuple[Method, str, dict[str, Any], list[str]]:
    """Method and task, of the flags or of the recipe, the recipe, and the other flags."""
    name = argv.pop(0) if argv and not argv[0].startswith("-") else None
    options = {key: _take(argv, f"--{key}") for key in ("config", "method", "task")}
    if name and options["config"]:
        raise ValueError(f"two recipes: {name} and --config {options['config']}; give one")
    name = name or options["config"]
    recipe = read_recipe(name) if name else {}
    chosen = {key: options[key] or recipe.get(key) for key in ("method", "task")}
    for key, allowed in (("method", list(METHODS)), ("task", list(TASKS))):
        if chosen[key] is None:
            if name is None:
                _check_order(argv)
            raise ValueError(
                f"no {key}: give a recipe ({', '.join(sorted(packaged()))}) or --{key} (one of {', '.join(allowed)}); "
                "for the flags of a method and task add --help"
            )
        if chosen[key] not in allowed:
            raise ValueError(
                f"no {key} {chosen[key]!r}{nearest(str(chosen[key]), allowed)} (there are: {', '.join(allowed)})"
            )
    return METHODS[str(chosen["method"])], str(chosen["task"]), recipe, argv


def _check_order(words: Sequence[str]) -> None:
    """A recipe that stands behind flags would be taken for the value of one."""
    for before, word in zip(["", *words], words, strict=False):
        is_file = not word.startswith("-") and word.endswith((".yaml", ".yml", ".json"))
        is_value = word.endswith(".json") and before.startswith("-") and "=" not in before  # --deepspeed ds.json
        if word in packaged() or (is_file and not is_value):
            raise ValueError(f"the recipe comes first, and only one: hf-compress train {word} [--flag value ...]")


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


def _is_given(flag: str, words: Sequence[str]) -> bool:
    return any(word.split("=", 1)[0] == f"--{flag}" for word in words)


class _RecipeParser(HfArgumentParser):
    """Flags as transformers parses them, with defaults from a recipe."""

    def __init__(self, dataclass_types: Any) -> None:
        super().__init__(dataclass_types, prog="hf-compress train RECIPE", allow_abbrev=False)

    def parse_with_recipe(self, recipe: dict[str, Any], flags: list[str]) -> tuple[Any, ...]:
        """One instance of each dataclass: flags win over the recipe, the recipe over defaults."""
        replaced = {old for flag, names in _REPLACES.items() if _is_given(flag, flags) for old in names}
        values = {k: v for k, v in recipe.items() if k not in (*ABOUT, "method", "task", *replaced)}
        hints = {name: hint for kind in self.dataclass_types for name, hint in get_type_hints(kind).items()}
        known = [f.name for kind in self.dataclass_types for f in dataclasses.fields(kind) if f.init]
        for key in values:
            if key not in known:
                raise ValueError(f"the recipe has a key {key!r} that is no flag{nearest(key, known)}")
        read: dict[str, Any] = {}
        for action in self._actions:
            if action.dest in values:
                if action.dest not in read:  # --no_plus stands behind --plus and is of no type
                    read[action.dest] = _converted(action, values[action.dest], hints[action.dest])
                action.default, action.required = read[action.dest], False
        *parsed, unknown = self.parse_args_into_dataclasses(flags, return_remaining_strings=True)
        if unknown:
            _check_order(unknown)
            word = unknown[0].lstrip("-").split("=")[0]
            others = [n for n, m in METHODS.items() if word in (f.name for f in dataclasses.fields(m.config_class))]
            hint = f"; it is one of {', '.join(others)}" if others else nearest(word, known)
            raise ValueError(f"no flag {unknown[0]!r}{hint}")
        return tuple(parsed)

    def error(self, message: str) -> Any:
        """argparse's message as an error of ours, without the usage text of 150 flags."""
        raise ValueError(message)


def _converted(action: Any, value: Any, hint: Any) -> Any:
    """A value of a recipe as its flag would read it: YAML takes 5e-5 for text, and one word for no list."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if value is None:
        if NoneType in kinds:
            return None
        raise ValueError(f"the recipe has {action.dest}: null, but this flag needs a value; remove it for the default")
    if action.nargs == "+":
        values = value if isinstance(value, list) else [value]
        if action.type is float and all(_is_a(v, float) for v in values):
            return [float(v) for v in values]
        for number in (v for v in values if not isinstance(v, str)):
            raise ValueError(f"the recipe has {action.dest}: {number!r}, where a text is needed{_quoted(number)}")
        return values
    if isinstance(value, str) and callable(action.type):
        try:
            return action.type(value)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"the recipe has {action.dest}: {value!r}, which is no value of this flag: {error}"
            ) from error
    if not any(_is_a(value, kind) for kind in kinds):
        allowed = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds if kind is not NoneType)
        advice = _quoted(value) if str in kinds and dict not in kinds else ""
        raise ValueError(f"the recipe has {action.dest}: {value!r}, but this flag takes {allowed}{advice}")
    return value


def _is_a(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    kind = get_origin(kind) or kind
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _quoted(value: Any) -> str:
    """What to write instead, also for 2:4 and no, which YAML reads as 124 and False."""
    if not isinstance(value, (int, float)):
        return ""
    meant = str(value)
    if isinstance(value, bool):
        meant = "yes" if value else "no"
    elif isinstance(value, int) and value >= 60:
        meant = f"{value // 60}:{value % 60}"
    return f'; YAML reads a bare {meant} as {value}: write "{meant}"'


def _prepared(run: Run) -> dict[str, Any]:
    """Model and data; what is no folder here is asked of the Hub, whose errors do not say so."""
    try:
        prepared: dict[str, Any] = run.task.prepare(run.task_args)
    except OSError as error:
        names = [getattr(run.task_args, flag, None) for flag in ("model_name_or_path", "dataset_name")]
        if not (absent := [name for name in names if name and "/" in name and not Path(name).exists()]):
            raise
        raise ValueError(f"there is no {' and no '.join(absent)} here, and as a Hub id: {error}") from error
    return prepared


@contextmanager
def _output(folder: Path) -> Iterator[None]:
    """An output folder that cannot be written fails now, not after the training; what fails leaves no empty one."""
    is_new = not folder.exists()
    check_output(folder)
    try:
        yield
    except BaseException:
        if is_new:
            with suppress(OSError):  # another process has put something there
                folder.rmdir()
        raise


def check_output(folder: Path) -> None:
    """ValueError where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror}; choose another --output_dir") from error
