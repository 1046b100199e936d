"""Public names: they exist, they are documented, they load lazily, and importing the package is cheap."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
import time

import pytest

import hf_compress as hfc
from tests.conftest import ROOT

MODULES = [
    ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for p in sorted((ROOT / "hf_compress").rglob("*.py"))
    if p.name != "__main__.py"
]


def undocumented(module) -> list[str]:
    """Public functions, classes and methods that a module defines and does not document."""
    missing = [] if module.__doc__ else [module.__name__]
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(value) or inspect.isclass(value):
            if not value.__doc__:
                missing.append(f"{module.__name__}.{name}")
            for attribute, member in vars(value).items() if inspect.isclass(value) else ():
                function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
                if (
                    not attribute.startswith("_")
                    and inspect.isfunction(function)
                    and not inspect.getdoc(getattr(value, attribute))
                ):
                    missing.append(f"{module.__name__}.{name}.{attribute}")
    return missing


@pytest.mark.parametrize("name", MODULES)
def test_public_names_are_documented(name):
    inherited = {"forward"}  # torch's contract
    assert [n for n in undocumented(importlib.import_module(name)) if n.split(".")[-1] not in inherited] == []


def test_a_name_without_documentation_is_found():
    module = type(sys)("hollow")
    exec("def bare(): pass\nclass Bare:\n    def method(self): pass", module.__dict__)
    assert undocumented(module) == ["hollow", "hollow.bare", "hollow.Bare", "hollow.Bare.method"]


def test_every_public_name_loads():
    for name in hfc.__all__:
        assert getattr(hfc, name) is not None
    assert set(hfc.__all__) == set(dir(hfc))
    with pytest.raises(AttributeError, match="no attribute 'Nope'"):
        _ = hfc.Nope


def test_no_public_name_equals_a_module_of_the_package():
    modules = {name.split(".")[1] for name in MODULES if "." in name}
    assert "oneshot" in modules
    assert not modules & set(hfc.__all__)


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_import_is_cheap():
    code = (
        "import time; t = time.perf_counter(); import hf_compress; s = time.perf_counter() - t; import sys;"
        "print(s, [m for m in ('torch', 'transformers', 'timm', 'numpy', 'matplotlib') if m in sys.modules])"
    )
    start = time.perf_counter()
    seconds, heavy = min((run(code).split(" ", 1) for _ in range(3)), key=lambda words: float(words[0]))
    assert time.perf_counter() - start > float(seconds)
    assert float(seconds) < 0.3
    assert heavy.strip() == "[]"


@pytest.mark.parametrize(
    "imports", ["import hf_compress, timm", "import timm, hf_compress", "import timm.models, hf_compress"]
)
def test_models_are_registered_in_both_orders_of_import(imports):
    assert run(f"{imports}; print(timm.is_model('resnet20_cifar'))").strip() == "True"


def test_models_are_not_registered_without_us():
    assert run("import timm; print(timm.is_model('resnet20_cifar'))").strip() == "False"


def test_the_optimizer_needs_no_transformers():
    code = "from hf_compress.methods.cram import CrAM; import sys; print('transformers' in sys.modules)"
    assert run(code).strip() == "False"
