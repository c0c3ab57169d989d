"""The content of a wheel, importable from anywhere, built with or without a C++ compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.version import Version

from fastmtl.version import __version__

ROOT = Path(__file__).parents[1]
COMPILER = os.environ.get("CXX", "c++").split()[0]

# The compiler without optimisations, which take most of its time. The tests of the kernels use the
# optimised library.
FAST_COMPILER = f"""#!/bin/sh
exec {COMPILER} "$@" -O0
"""
# setup.py with a torch that claims to be built for CUDA 13.
FOR_CUDA = "import runpy, torch; torch.version.cuda = '13.0'; runpy.run_path('setup.py', run_name='__main__')"
# An nvcc that builds programs, but not fastmtl's kernels.
NVCC = """#!/bin/sh
case "$*" in
*--version*) echo "Cuda compilation tools, release 13.0, V13.0.88";;
*gradients.cu*) echo "csrc/gradients.cu(58): error: identifier is undefined" >&2; exit 2;;
esac
"""


def build_wheel(tree: Path, *setup: str, **environment: str) -> tuple[Path, str]:
    """Build the wheel of a copy of the checkout, offline; return it and the output."""
    skip = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "__pycache__", "runs", "tests", "docs")
    shutil.copytree(ROOT, tree, ignore=skip)
    command = [sys.executable, *(setup or ["setup.py"]), "bdist_wheel", "--dist-dir", "out"]
    built = subprocess.run(
        command, cwd=tree, env=os.environ | environment, capture_output=True, text=True, errors="replace"
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = (tree / "out").glob("*.whl")
    return wheel, built.stdout


def run_installed(wheel: Path, folder: Path, code: str) -> str:
    """Unpack the wheel, as pip does, and run code with it, outside the checkout."""
    zipfile.ZipFile(wheel).extractall(folder / "site")
    environment = os.environ | {"PYTHONPATH": str(folder / "site")}
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=100
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def package_files(tree: Path) -> set[str]:
    """Return every file of the two packages that a wheel must have, by its path there."""
    kinds = {".py", ".yaml", ".csv", ".conll", ".typed"}
    roots = {tree / "fastmtl": tree, tree / "kernels": tree / "kernels"}
    return {
        str(path.relative_to(base))
        for folder, base in roots.items()
        for path in folder.rglob("*")
        if path.suffix in kinds
    }


@pytest.mark.slow
def test_a_wheel_without_a_compiler_is_complete(tmp_path: Path) -> None:
    wheel, printed = build_wheel(tmp_path / "tree", CXX="no-such-compiler")
    assert wheel.name == f"fastmtl_torch-{__version__}-py3-none-any.whl"
    lines = [line for line in printed.splitlines() if "C++ kernels" in line]
    assert lines == ["fastmtl: building without the C++ kernels: there is no C++ compiler (no-such-compiler) on PATH."]
    names = set(zipfile.ZipFile(wheel).namelist())
    assert package_files(tmp_path / "tree") <= names
    assert {"fastmtl/py.typed", "fastmtl_kernels/py.typed", "fastmtl/recipes/demo.yaml"} <= names
    outside = {name for name in names if not name.startswith(("fastmtl/", "fastmtl_kernels/", "fastmtl_torch-"))}
    assert not outside
    code = (
        "import fastmtl_kernels as k, torch; print(k.__file__); print(k.gramian(torch.ones(2, 3)).sum().item());"
        "print(k.implementations()['gramian'][0])"
    )
    where, total, cpp = run_installed(wheel, tmp_path, code).splitlines()
    assert where.startswith(str(tmp_path / "site")) and total == "12.0"
    assert "available=False" in cpp and "--no-build-isolation" in cpp
    assert "not built: there is no C++ compiler (no-such-compiler) on PATH; after that" in cpp


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return the files of a compiled build, and its output; nvcc fails at the CUDA kernels."""
    folder = tmp_path_factory.mktemp("compiled")
    nvcc, compiler = folder / "cuda" / "bin" / "nvcc", folder / "compiler"
    nvcc.parent.mkdir(parents=True)
    for file, script in ((nvcc, NVCC), (compiler, FAST_COMPILER)):
        file.write_text(script)
        file.chmod(0o755)
    _, printed = build_wheel(folder / "tree", "-c", FOR_CUDA, CUDA_HOME=str(folder / "cuda"), CXX=str(compiler))
    return folder / "tree", printed


needs_compiler = pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no {COMPILER}")


@pytest.mark.slow(35)
@needs_compiler
def test_a_wheel_with_a_compiler_serves_every_python(compiled: tuple[Path, str], tmp_path: Path) -> None:
    tree, printed = compiled
    (wheel,) = (tree / "out").glob("*.whl")
    assert "-cp310-abi3-" in wheel.name and "without the C++ kernels" not in printed
    assert package_files(tree) | {"fastmtl_kernels/_C.abi3.so"} <= set(zipfile.ZipFile(wheel).namelist())
    code = "import fastmtl_kernels as k, torch; print(k.gramian(torch.ones(2, 3), 'cpp').sum().item())"
    assert run_installed(wheel, tmp_path, code) == "12.0\n"


@pytest.mark.slow
@needs_compiler
def test_cuda_kernels_that_do_not_compile_cost_nothing_else(compiled: tuple[Path, str], tmp_path: Path) -> None:
    tree, printed = compiled
    lines = [line for line in printed.splitlines() if line.startswith("fastmtl: ")]
    why = (
        f"{tree.parent}/cuda/bin/nvcc does not build csrc/*.cu: csrc/gradients.cu(58): error: identifier is undefined; "
        "install another release of that toolkit and set CUDA_HOME to its folder"
    )
    assert lines == [f"fastmtl: building without the CUDA kernels: {why}."]
    (wheel,) = (tree / "out").glob("*.whl")
    assert "fastmtl_kernels/_CUDA.abi3.so" not in zipfile.ZipFile(wheel).namelist()
    # The installed library still reports it without the build's folders.
    code = "from fastmtl_kernels import _native as g; print([g.why_unavailable()]); print(g.why_no_cuda_library())"
    cpp, cuda = run_installed(wheel, tmp_path, code).splitlines()
    assert cpp == "['']"
    assert cuda.startswith(f"the CUDA kernels are not built: {why}; after that `make -B install` or `pip install ")


def test_kernels_is_not_a_package() -> None:
    """`kernels` is another distribution, which transformers imports."""
    assert not list((ROOT / "kernels").glob("*.py"))


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)  # required by the format
    project = (ROOT / "pyproject.toml").read_text()
    dated = f"\n## [{__version__}] - {citation.get('date-released')}\n" in (ROOT / "CHANGELOG.md").read_text()
    assert dated != Version(__version__).is_devrelease
    assert citation["version"] == __version__ and f'\nlicense = "{citation["license"]}"\n' in project
