"""Optional libraries: imports without them, and errors that name the install command."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastmtl.config import Recipe
from fastmtl.data import huggingface
from fastmtl.errors import UserError
from fastmtl.inference.exported import onnx
from fastmtl.integrations.accelerate import AcceleratedSurgery
from fastmtl.integrations.fabric import FabricSurgery
from fastmtl.profile.nvml import Nvml
from fastmtl.serving.command import check_libraries
from fastmtl.surgery.methods import torchjd
from fastmtl.surgery.methods.table import find_method
from fastmtl.sweep.compare import Comparison, settings_of
from fastmtl.sweep.search import check_optuna
from fastmtl.system.extras import EXTRAS
from fastmtl.tracking.backends import BACKENDS, check_tracking

ROOT = Path(__file__).parents[1]
SOURCES = [*ROOT.glob("fastmtl/**/*.py"), *ROOT.glob("kernels/**/*.py")]
# The modules that may import an optional library when they are imported themselves.
ALLOWED = {
    "fastapi": {"fastmtl/serving/app.py", "fastmtl/serving/problems.py"},
    "starlette": {"fastmtl/serving/app.py", "fastmtl/serving/middleware.py", "fastmtl/serving/problems.py"},
    "prometheus_client": {"fastmtl/serving/app.py"},
    "lightning": {"fastmtl/integrations/lightning.py"},
    "pytest": {"fastmtl/bench/gpu_check/outcomes.py"},
    "triton": {
        path.relative_to(ROOT).as_posix()
        for path in ROOT.glob("kernels/**/*.py")
        if "triton" in path.relative_to(ROOT).as_posix() or path.name == "row_blocks.py"
    },
}
OPTIONAL = "accelerate apex datasets fastapi lightning liger_kernel mlflow onnx onnxruntime onnxscript optuna peft"
OPTIONAL += " prometheus_client pynvml pytest sqlalchemy starlette torchjd trackio triton uvicorn wandb"


def at_import(node: ast.AST) -> set[str]:
    """Return the libraries that a module imports when it is imported."""
    found: set[str] = set()
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            found |= {alias.name.split(".")[0] for alias in child.names}
        elif isinstance(child, ast.ImportFrom):
            found.add(str(child.module).split(".")[0])
        elif not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and not (
            isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")
        ):
            found |= at_import(child)
    return found


def test_only_their_own_modules_import_optional_libraries() -> None:
    wrong = []
    for path in SOURCES:
        name = path.relative_to(ROOT).as_posix()
        libraries = at_import(ast.parse(path.read_bytes())) & set(OPTIONAL.split())
        wrong += [f"{name}: {library}" for library in libraries if name not in ALLOWED.get(library, ())]
    assert not wrong


def test_install_commands_name_extras_of_this_package() -> None:
    section = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    extras = set(re.findall(r"^(\w+) = ", section, re.MULTILINE))
    named = {
        (path.name, extra)
        for path in [*SOURCES, *ROOT.glob("docs/*.md"), ROOT / "README.md"]
        for group in re.findall(r"fastmtl-torch\[([\w,]+)\]", path.read_text(encoding="utf-8"))
        for extra in group.split(",")
    }
    assert {"serve", "optuna", "torchjd", "data"} <= {extra for _, extra in named}
    assert not {(file, extra) for file, extra in named if extra not in extras}


def test_the_doctor_knows_every_optional_library() -> None:
    """The table has the libraries of each extra in pyproject.toml, and those of the trackers."""
    tomllib = pytest.importorskip("tomllib")  # since Python 3.11
    section = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra in EXTRAS:
        if extra.name in section:
            assert {re.split(r"[\[>]", each)[0] for each in section[extra.name]} == set(extra.libraries)
        else:
            assert BACKENDS[extra.name][3] == extra.command
    tools = {"triton", "test", "bench", "release", "soak", "lint", "docs", "dev"}
    assert {*section, *BACKENDS} - {extra.name for extra in EXTRAS} == {*tools, "tensorboard"}


def recipe(*trackers: str) -> Recipe:
    return Recipe.model_validate(
        {"tasks": {"x": {"type": "binary", "data": {"train": "x.csv"}}}, "tracking": list(trackers)}
    )


def compare(*methods: str) -> None:
    Comparison(Path("out"), "demo", [], methods, [1], None, (), print).check()


@pytest.mark.parametrize(
    ("library", "call", "command"),
    [
        ("fastapi", check_libraries, "fastmtl-torch[serve]"),
        ("uvicorn", check_libraries, "fastmtl-torch[serve]"),
        ("prometheus_client", check_libraries, "fastmtl-torch[serve]"),
        *((name, onnx.check_libraries, "fastmtl-torch[onnx]") for name in ("onnx", "onnxruntime", "onnxscript")),
        ("optuna", check_optuna, "fastmtl-torch[optuna]"),
        ("optuna", lambda: compare("sum", "tuned"), "fastmtl-torch[optuna]"),
        ("torchjd", lambda: find_method("upgrad"), "fastmtl-torch[torchjd]"),
        ("torchjd", lambda: settings_of("upgrad"), "fastmtl-torch[torchjd]"),
        ("datasets", lambda: huggingface._open(Path("x"), "x"), "fastmtl-torch[data]"),
        ("accelerate", lambda: AcceleratedSurgery(None, None, None), "fastmtl-torch[accelerate]"),
        ("lightning", lambda: FabricSurgery(None, None, None), "fastmtl-torch[lightning]"),
        *((name, lambda name=name: check_tracking(recipe(name)), BACKENDS[name][3]) for name in BACKENDS),
    ],
)
def test_a_missing_library_is_one_sentence(
    library: str, call: Callable[[], object], command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)  # as if it were not installed
    torchjd._classes.cache_clear()
    with pytest.raises(UserError, match=rf"pip install ['\"]?{re.escape(command)}") as error:
        call()
    torchjd._classes.cache_clear()
    assert len(error.value.lines) == 1 and library in str(error.value).lower()


def test_without_nvml_the_memory_is_that_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: None)
    assert Nvml(torch.device("cuda")).reason == "nvidia-ml-py is not installed: pip install 'fastmtl-torch[gpu]'"
