"""What a built wheel holds, and that it can be imported from anywhere: with and without a C++ compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILER = os.environ.get("CXX", "c++").split()[0]


def build_wheel(tree: Path, **environment: str) -> tuple[Path, str]:
    """Builds the wheel of a copy of the checkout, without index and isolation; returns it and what was printed."""
    skip = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "__pycache__", "runs", "tests", "docs")
    shutil.copytree(ROOT, tree, ignore=skip)
    command = [sys.executable, "setup.py", "bdist_wheel", "--dist-dir", "out"]
    built = subprocess.run(
        command, cwd=tree, env=os.environ | environment, capture_output=True, text=True, errors="replace"
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = (tree / "out").glob("*.whl")
    return wheel, built.stdout


def run_installed(wheel: Path, folder: Path, code: str) -> str:
    """Unpacks the wheel, as pip does, and runs code with it, outside the checkout."""
    zipfile.ZipFile(wheel).extractall(folder / "site")
    environment = os.environ | {"PYTHONPATH": str(folder / "site")}
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=100
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def package_files(tree: Path) -> set[str]:
    """Every file of the two packages that has to be in a wheel, by its path in there."""
    kinds = {".py", ".yaml", ".csv", ".typed"}
    roots = {tree / "fastmtl": tree, tree / "kernels": tree / "kernels"}
    return {
        str(path.relative_to(base))
        for folder, base in roots.items()
        for path in folder.rglob("*")
        if path.suffix in kinds
    }


def test_a_wheel_without_a_compiler_is_complete(tmp_path: Path) -> None:
    wheel, printed = build_wheel(tmp_path / "tree", CXX="no-such-compiler")
    assert wheel.name.endswith("-py3-none-any.whl")
    lines = [line for line in printed.splitlines() if "C++ kernels" in line]
    assert lines == ["fastmtl: building without the C++ kernels: there is no C++ compiler (no-such-compiler) on PATH."]
    names = set(zipfile.ZipFile(wheel).namelist())
    assert package_files(tmp_path / "tree") <= names
    assert {"fastmtl/py.typed", "fastmtl_kernels/py.typed", "fastmtl/recipes/demo.yaml"} <= names
    outside = {name for name in names if not name.startswith(("fastmtl/", "fastmtl_kernels/", "fastmtl-"))}
    assert not outside
    code = (
        "import fastmtl_kernels as k, torch; print(k.__file__); print(k.gramian(torch.ones(2, 3)).sum().item());"
        "print(k.implementations()['gramian'][0])"
    )
    where, total, cpp = run_installed(wheel, tmp_path, code).splitlines()
    assert where.startswith(str(tmp_path / "site")) and total == "12.0"
    assert "available=False" in cpp and "--no-build-isolation" in cpp


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no {COMPILER}")
def test_a_wheel_with_a_compiler_serves_every_python(tmp_path: Path) -> None:
    wheel, printed = build_wheel(tmp_path / "tree")
    assert "-cp310-abi3-" in wheel.name and "without the C++ kernels" not in printed
    assert package_files(tmp_path / "tree") | {"fastmtl_kernels/_C.abi3.so"} <= set(zipfile.ZipFile(wheel).namelist())
    code = "import fastmtl_kernels as k, torch; print(k.gramian(torch.ones(2, 3), 'cpp').sum().item())"
    assert run_installed(wheel, tmp_path, code) == "12.0\n"


def test_kernels_is_not_a_package() -> None:
    """`kernels` is another distribution, which transformers imports."""
    assert not list((ROOT / "kernels").glob("*.py"))
