"""family.json: what a family holds, with a hash for every file. It is written last; a folder without it is none."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from ..patterns import Pattern, parse_pattern
from .variant import Variant

MANIFEST = "family.json"
SCHEMA = 1
JOINED = "trained"  # key of a recipe: revision to recipe, of variants that have joined from other trainings
LOCAL = "local"  # key of a recipe: flags that it lacks, since they named paths of the machine of the training
_LARGEST = 2**53  # whole numbers below are exact in JavaScript too
_LATENCY = {"milliseconds", "dense_milliseconds", "device", "threads", "batch_size"}
_T = TypeVar("_T")


@dataclass(frozen=True)
class Manifest:
    """What family.json says: the dense checkpoint, its variants, and how they came to be.

    Attributes:
        folder: where it lies.
        method: that trained the dense checkpoint, "one_shot" for none.
        task: such as "image-classification", None if unknown.
        base_model: that the training started from; None for none, or for one that was given by an absolute path.
        dense: the dense checkpoint.
        variants: in the order in which they were asked for.
        recipe: how the dense checkpoint was trained.
        versions: of the packages that built it.
        files: relative path to SHA-256, for all files but the manifest.
    """

    folder: Path
    method: str
    task: str | None
    base_model: str | None
    dense: Variant
    variants: tuple[Variant, ...]
    recipe: dict[str, Any]
    versions: dict[str, str]
    files: dict[str, str]

    def __getitem__(self, pattern: str | Pattern) -> Variant:
        """The variant of a pattern ("2:4") or of a revision ("nm-2of4")."""
        for variant in self.variants:
            if pattern in (variant.pattern, variant.revision) or variant.pattern == _canonical(pattern):
                return variant
        raise KeyError(f"no variant {str(pattern)!r}; there are: {', '.join(str(v.pattern) for v in self.variants)}")

    @property
    def checkpoints(self) -> tuple[Variant, ...]:
        """The dense one and the variants."""
        return (self.dense, *self.variants)

    def files_of(self, variant: Variant) -> dict[str, str]:
        """Path inside the checkpoint's folder to SHA-256."""
        inside = f"{variant.path}/"
        return {name.removeprefix(inside): h for name, h in self.files.items() if name.startswith(inside)}


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a family; the files that it names are not looked at.

    Raises:
        ValueError: if there is none, or it cannot be understood.
    """
    if not (folder / MANIFEST).is_file():
        raise ValueError(
            f"{folder} holds no {MANIFEST}, so it is no family or was never finished; "
            "build one with build_family or hf-compress"
        )
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return _parse(folder, content)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{folder / MANIFEST} is no manifest of a family that this version reads: {error}") from error


def verify_files(folder: Path, files: Mapping[str, str]) -> None:
    """ValueError if a file is missing in a folder, or differs from its SHA-256."""
    for name, digest in files.items():
        path = folder / name
        if not path.is_file() or sha256(path) != digest:
            problem = "differs from its hash" if path.is_file() else "is missing"
            raise ValueError(f"{name} {problem}: {folder} is incomplete or was edited; build or download it again")


def write_manifest(manifest: Manifest) -> None:
    """Hash all files of the folder and write the manifest beside them."""
    content = asdict(manifest)
    del content["folder"]
    files = sorted(p for p in manifest.folder.rglob("*") if p.is_file())
    content["files"] = {p.relative_to(manifest.folder).as_posix(): sha256(p) for p in files}
    text = json.dumps({"schema": SCHEMA, **content}, indent=2) + "\n"
    (manifest.folder / MANIFEST).write_text(text, encoding="utf-8")


def check_target(target: Path) -> None:
    """ValueError where no finished folder can take this place: a mount point, a file, a folder of something else."""
    target = target.resolve()
    if _is_mount_point(target):
        raise ValueError(
            f"{target} is a mount point, whose place no other folder can take; choose a folder in it, such as "
            f"{target / 'family'}"
        )
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file; choose a folder")
    if target.is_dir() and any(target.iterdir()) and not (target / MANIFEST).is_file():
        raise ValueError(f"{target} is not empty and holds no family; choose another folder")


def start_folder(target: Path) -> Path:
    """A new folder beside `target`, to be filled and committed; of a link to a folder, beside what it points to.

    Raises:
        ValueError: as `check_target`, or if it cannot be written.
    """
    check_target(target)
    target = target.resolve()
    partial, old = (target.with_name(f".{target.name}.{state}") for state in ("partial", "old"))
    if old.is_dir() and not old.is_symlink() and not target.exists():
        old.rename(target)  # a process died between the two renames of a commit
    try:
        _clear(partial)
        partial.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"cannot write to {target.parent}: {error.strerror}; choose another output folder") from error
    return partial


def commit_folder(partial: Path, target: Path) -> None:
    """Flush everything to disk and put the new folder in the place of `target`; an older one goes last.

    Raises:
        OSError: if the system refuses; the new folder is whole then, and stays where it is.
    """
    target = target.resolve()
    old = target.with_name(f".{target.name}.old")
    try:
        for path in [*partial.rglob("*"), partial]:
            _flush(path)
        _clear(old)
        if target.exists():
            target.rename(old)
        try:
            partial.rename(target)
        except BaseException:
            if old.exists():
                old.rename(target)
            raise
    except OSError as error:
        raise OSError(
            f"cannot put {partial} in the place of {target}: {error.strerror}; the folder is finished and stays where "
            "it is: move it away before the next run"
        ) from error
    _flush(target.parent)
    _clear(old)


def _is_mount_point(folder: Path) -> bool:
    if os.path.ismount(folder):
        return True
    mounts = Path("/proc/self/mountinfo")  # a folder of the same file system can be mounted too
    lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines() if mounts.is_file() else []
    places = (line.split(" ")[4] for line in lines)
    return str(folder) in (re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), place) for place in places)


def _clear(leftover: Path) -> None:
    """Of a link only the link goes."""
    if leftover.is_symlink():
        leftover.unlink()
    else:
        shutil.rmtree(leftover, ignore_errors=True)


def _flush(path: Path) -> None:
    is_windows = os.name == "nt"
    if is_windows and path.is_dir():  # which it opens as no file
        return
    descriptor = os.open(path, os.O_RDWR if is_windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parse(folder: Path, content: Any) -> Manifest:
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise ValueError(f"its schema is not {SCHEMA}")
    variants = content.get("variants")
    if not isinstance(variants, list):
        raise ValueError("variants is no list")
    own = {"folder": folder, "dense": _typed(Variant, content.get("dense")), "variants": ()}
    manifest = _typed(Manifest, {**content, **own, "variants": tuple(_typed(Variant, v) for v in variants)})
    for name in manifest.files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or set(name) & {"\\", "\0"}:
            raise ValueError(f"{name!r} is not inside the folder")
    for variant in manifest.checkpoints:
        if not re.fullmatch(r"\w[\w.-]*", variant.revision, re.ASCII) or ".." in variant.revision:
            raise ValueError(f"{variant.revision!r:.80} is no revision of ours")
        if not manifest.files_of(variant):
            raise ValueError(f"{variant.path!r} is not inside the folder, or holds no file")
        _check_numbers(variant)
    _check_names(manifest)
    return manifest


def _check_names(manifest: Manifest) -> None:
    """Each checkpoint has a folder and a revision of its own, which its pattern gives; main is of the dense one."""
    if (manifest.dense.pattern, manifest.dense.revision) != (None, "main"):
        raise ValueError("the dense checkpoint has no pattern, and the revision main")
    paths, revisions = {PurePosixPath(manifest.dense.path), PurePosixPath("main")}, {"main"}
    for variant in manifest.variants:
        wanted = parse_pattern(variant.pattern or "").revision
        if variant.revision != wanted:
            raise ValueError(f"the revision of {variant.pattern} is {wanted}, got {variant.revision!r:.80}")
        path = PurePosixPath(variant.path)
        if path in paths or wanted in revisions:
            raise ValueError(f"{variant.path!r:.80} or {wanted!r} is the name of two checkpoints")
        paths.add(path)
        revisions.add(wanted)


def _check_numbers(variant: Variant) -> None:
    """Whole numbers are those of files and models, others are finite, and times can be divided by."""
    times = {} if variant.latency is None else variant.latency
    for name, value in [*vars(variant).items(), *variant.metrics.items(), *times.items()]:
        is_huge = isinstance(value, int) and abs(value) >= _LARGEST
        if is_huge or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"{name} of {variant.revision} is not finite, or larger than any file or model")
    if variant.latency is None:
        return
    if lacking := sorted(_LATENCY - times.keys()):
        raise ValueError(f"latency of {variant.revision} lacks {', '.join(lacking)}")
    for name in ("milliseconds", "dense_milliseconds"):
        if not _fits(times[name], float) or times[name] <= 0:
            raise ValueError(f"latency of {variant.revision} has {name} {times[name]!r:.40}, which is no time above 0")


def _typed(kind: type[_T], content: Any) -> _T:
    """An instance of a dataclass from JSON; KeyError or ValueError where a field is missing or of another type."""
    if not isinstance(content, dict):
        raise ValueError(f"{content!r:.40} is no {kind.__name__}")
    hints = get_type_hints(kind)
    values = {f.name: content[f.name] for f in fields(kind)}  # type: ignore[arg-type]
    for name, value in values.items():
        if not _fits(value, hints[name]):
            raise ValueError(f"{name} is {value!r:.40}")
    return kind(**values)


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) is UnionType:
        return any(_fits(value, option) for option in get_args(hint))
    if get_origin(hint) is dict:
        inner = get_args(hint)[1]
        return isinstance(value, dict) and (inner is Any or all(_fits(v, inner) for v in value.values()))
    if hint is float:
        hint = (int, float)
    return isinstance(value, get_origin(hint) or hint) and not isinstance(value, bool)


def _canonical(pattern: str | Pattern) -> str | None:
    try:
        return str(parse_pattern(pattern))
    except ValueError:
        return None
