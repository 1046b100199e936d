"""The table of rooms in the design is a law: a room imports only from rooms before it, or from inside itself."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "hf_compress"
# In order: a room may import what stands before it. The longest prefix of a module's name decides.
ORDER = [
    ("distributed", 1),
    ("selection", 1),
    ("targets", 1),
    ("patterns", 1),
    ("calibration", 1),
    ("models", 1),
    ("structure", 2),
    ("codec", 2),
    ("oneshot", 3),
    ("loading", 3),
    ("methods.*.settings", 4),
    ("methods.*.excursion", 4),
    ("methods.*.constraints", 4),
    ("methods.*.optimizer", 4),
    ("methods.*.init", 4),
    ("methods.*.factory", 4),
    ("methods.*.penalty", 4),
    ("methods.*.orthogonality", 4),
    ("methods.*.trainability", 4),
    ("methods.*.schedule", 4),
    ("methods.*.selection", 4),
    ("methods.*.parametrization", 4),
    ("methods.*.entropy_model", 4),
    ("methods.*.priors", 4),
    ("family.variant", 5),
    ("family.manifest", 5),
    ("family.table", 5),
    ("hub", 5),
    ("family", 6),
    ("report", 6),
    ("page", 6),
    ("training_data", 7),
    ("checkpoints", 7),
    ("compressed_evaluation", 7),
    ("distillation", 7),
    ("fused_sgd", 7),
    ("loss_scaling", 7),
    ("training", 7),
    ("callbacks", 7),
    ("methods.*.config", 7),
    ("methods.*.regularization", 7),
    ("methods.*.trainer", 7),
    ("methods.*", 7),
    ("methods.registry", 7),
    ("methods", 7),
    ("tasks", 8),
    ("cli", 9),
]
EXEMPT = {"", "__main__"}


def room_of(module: str) -> int:
    """Index in ORDER of the most specific room that holds a module, named without the package."""
    parts = module.split(".")
    best, length = -1, 0
    for i, (room, _) in enumerate(ORDER):
        wanted = room.split(".")
        fits = len(wanted) <= len(parts) and all(w in ("*", p) for w, p in zip(wanted, parts, strict=False))
        if fits and len(wanted) * 2 - ("*" in wanted) > length:
            best, length = i, len(wanted) * 2 - ("*" in wanted)
    return best


def imports_of(path: Path) -> list[tuple[str, int]]:
    """Modules that a file imports, absolute ones whole, its own without the package's name, and the line."""
    name = path.relative_to(PACKAGE).with_suffix("").parts
    package = name[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            target = [*base, *(node.module or "").split(".")] if node.module else [*base]
            found += [("hf_compress." + ".".join([*target, a.name]), node.lineno) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.module or "", node.lineno))
    return found


def own_module(name: str) -> str | None:
    """The module inside the package that an import means: the name itself or, for a name in a module, its module."""
    if not name.startswith("hf_compress"):
        return None
    parts = name.split(".")[1:]
    while parts and not (PACKAGE.joinpath(*parts).is_dir() or PACKAGE.joinpath(*parts).with_suffix(".py").is_file()):
        parts.pop()
    return ".".join(parts)


FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", FILES, ids=lambda p: module_name(p) or "hf_compress")
def test_a_room_imports_only_from_earlier_rooms(path):
    here = module_name(path)
    if here in EXEMPT:
        return
    assert room_of(here) >= 0, f"{here} is in no room of the design"
    outer = here.split(".")[0] if not here.startswith("methods.") else ".".join(here.split(".")[:2])
    for name, line in imports_of(path):
        there = own_module(name)
        if there is None or there in EXEMPT or there == here:
            continue
        if path.name == "__init__.py" and there.startswith(here + "."):
            continue  # a room's door shows what is inside
        room = ORDER[room_of(here)][0]
        own = ".".join(here.split(".")[: room.count(".") + 1]) if room.count(".") > 1 else outer
        inside = (there + ".").startswith(own + ".") and ("*" not in room or own != outer)
        assert inside or room_of(there) < room_of(here), f"{path.name}:{line}: {here} imports {there}, a later room"


def test_the_law_can_be_broken():
    assert room_of("methods.cram.optimizer") < room_of("family.build") < room_of("methods.cram.trainer")
    assert room_of("patterns.n_m") < room_of("oneshot") < room_of("training") < room_of("tasks.metrics")
    assert room_of("family.manifest") < room_of("family.build")
    assert room_of("somewhere") == -1
    assert own_module("hf_compress.patterns.Pattern") == "patterns"


@pytest.mark.parametrize("path", FILES, ids=lambda p: module_name(p) or "hf_compress")
def test_transformers_stays_out_of_the_first_two_layers_and_of_the_mathematics(path):
    layer = ORDER[room_of(module_name(path))][1] if module_name(path) not in EXEMPT else 0
    if layer in (1, 2, 4):
        assert not [name for name, _ in imports_of(path) if name.split(".")[0] == "transformers"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: module_name(p) or "hf_compress")
def test_files_and_functions_stay_short(path):
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert lines <= 50, f"{node.name} has {lines} lines"
