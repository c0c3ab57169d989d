"""The choice of nvcc, with scripts in its place; torch, its CUDA and a GPU are not needed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from build_kernels import check_cpp, compile_cuda, leave_out, wheel_of
from cuda_toolkit import LeftOut, Toolkit, find_toolkit

NOWHERE = Path("/nowhere")
# Answers like nvcc and "builds": the last word is the output. Its arguments are appended to
# `calls`.
ANSWERS = """
case "$*" in
*--version*) echo "Cuda compilation tools, release 13.0, V13.0.88"; exit;;
*--dryrun*) echo '#$ TOP=/opt/cuda-13.0/bin/..' >&2; exit;;
esac
"""
WORKS = (
    ANSWERS
    + """
echo "$*" >> "$(dirname "$0")/calls"
eval "touch \\"\\${$#}\\""
"""
)
NO_CUDART = (
    ANSWERS
    + """
case "$*" in *-L*) eval "touch \\"\\${$#}\\""; exit;; esac
echo "/usr/bin/ld: cannot find -lcudart" >&2
exit 1
"""
)

Nvcc = Callable[..., dict[str, str]]


@pytest.fixture
def nvcc(tmp_path: Path) -> Nvcc:
    """Make an nvcc from a shell script; return an environment whose PATH or variable has it."""

    def make(script: str, name: str = "home", variable: str = "PATH") -> dict[str, str]:
        path = tmp_path / name / "bin" / "nvcc"
        path.parent.mkdir(parents=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        if variable == "PATH":
            return {"PATH": f"{path.parent}:/usr/bin:/bin"}
        return {"PATH": "/usr/bin:/bin", variable: str(path.parents[1])}

    return make


def found(environment: dict[str, str], scratch: Path, wheel: Path | None = None, usual: Path = NOWHERE) -> Toolkit:
    return find_toolkit("13.0", environment, wheel, scratch, ["-arch=sm_80"], usual)


def reason(environment: dict[str, str], scratch: Path, torch_cuda: str | None = "13.0") -> str:
    with pytest.raises(LeftOut) as left_out:
        find_toolkit(torch_cuda, environment, None, scratch, [], NOWHERE)
    assert "\n" not in str(left_out.value)
    return str(left_out.value)


def test_a_torch_without_cuda_needs_no_nvcc(tmp_path: Path) -> None:
    assert "the torch of the build has no CUDA; " in reason({"PATH": ""}, tmp_path, None)


def test_no_nvcc(tmp_path: Path) -> None:
    why = reason({"PATH": str(tmp_path)}, tmp_path)
    assert "no nvcc on PATH" in why and "install the whole CUDA 13 toolkit and set CUDA_HOME" in why


def test_a_wrapper_is_called_itself_and_its_folder_is_no_toolkit(nvcc: Nvcc, tmp_path: Path) -> None:
    nvcc(WORKS, "real")
    environment = nvcc(f'exec {tmp_path}/real/bin/nvcc "$@"', "wrapper")
    toolkit = found(environment, tmp_path)
    assert (toolkit.nvcc, toolkit.release) == (str(tmp_path / "wrapper/bin/nvcc"), "13.0")
    assert not [option for option in toolkit.options if option.startswith(("-I", "-L"))]
    assert "-arch=sm_80" in (tmp_path / "real/bin/calls").read_text()


def test_a_wrapper_with_no_toolkit_behind_it(nvcc: Nvcc, tmp_path: Path) -> None:
    environment = nvcc('exec /opt/cuda-gone/bin/nvcc "$@"')
    why = reason(environment, tmp_path)
    assert "home/bin/nvcc --version fails" in why and "cuda-gone" in why and "install the whole CUDA 13" in why


def test_a_toolkit_without_cudart_is_named_by_its_own_folder(nvcc: Nvcc, tmp_path: Path) -> None:
    why = reason(nvcc(NO_CUDART), tmp_path)
    assert "home/bin/nvcc (toolkit /opt/cuda-13.0)" in why
    assert "cannot find -lcudart" in why


def test_the_cudart_of_torch_s_wheel_serves_a_toolkit_without_one(nvcc: Nvcc, tmp_path: Path) -> None:
    wheel = tmp_path / "site" / "nvidia" / "cu13"
    (wheel / "lib").mkdir(parents=True)
    (wheel / "lib" / "libcudart.so.13").touch()
    assert wheel_of("13.0", tmp_path / "site" / "torch") == wheel
    assert wheel_of("12.8", tmp_path / "site" / "torch") is None
    toolkit = found(nvcc(NO_CUDART), tmp_path, wheel)
    assert (tmp_path / "libcudart.so").resolve() == wheel / "lib" / "libcudart.so.13"
    assert toolkit.options[-2:] == (f"-I{wheel}/include", f"-L{tmp_path}")


def test_another_major_version(nvcc: Nvcc, tmp_path: Path) -> None:
    environment = nvcc('echo "Cuda compilation tools, release 12.4, V12.4.131"')
    why = reason(environment, tmp_path)
    assert re.search(r"torch is built for CUDA 13.0 and \S+/home/bin/nvcc is CUDA 12.4; install the whole CUDA 13", why)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo 'nvcc fatal   : libnvvm cannot be loaded' >&2; exit 1", "fails: nvcc fatal   : libnvvm cannot be"),
        ("exit 3", "fails: exit status 3"),
        ("echo hello", "names no release"),
        ("case $1 in --version) echo release 13.1;; *) kill -9 $$;; esac", "runtime: exit status -9"),
    ],
)
def test_an_nvcc_that_fails(nvcc: Nvcc, tmp_path: Path, script: str, words: str) -> None:
    assert words in reason(nvcc(script), tmp_path)


def test_a_file_that_is_no_program(nvcc: Nvcc, tmp_path: Path) -> None:
    environment = nvcc("")
    (tmp_path / "home/bin/nvcc").write_bytes(b"\0\0")
    assert "Exec format error" in reason(environment, tmp_path)


def test_the_usual_toolkit_follows_one_on_path_that_cannot_be_used(nvcc: Nvcc, tmp_path: Path) -> None:
    nvcc(WORKS, "usual")
    toolkit = found(nvcc("exit 1", "path"), tmp_path, usual=tmp_path / "usual")
    assert toolkit.nvcc == str(tmp_path / "usual/bin/nvcc")


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_the_user_s_choice_is_the_only_one_and_is_checked(nvcc: Nvcc, tmp_path: Path, variable: str) -> None:
    good = nvcc(WORKS, "good", variable)
    assert found(good, tmp_path).nvcc == str(tmp_path / "good/bin/nvcc")
    bad = nvcc("exit 1", "bad", variable) | {"PATH": f"{tmp_path}/good/bin:/usr/bin:/bin"}
    why = reason(bad, tmp_path)
    assert "bad/bin/nvcc --version fails" in why and "good" not in why and f"unset {variable}" in why
    assert f"{variable} is /nowhere, which has no bin/nvcc; correct or unset" in reason(
        good | {variable: "/nowhere"}, tmp_path
    )


def test_a_compiler_of_the_user_s_is_nvcc_s_too(nvcc: Nvcc, tmp_path: Path) -> None:
    environment = nvcc(WORKS)
    assert "-ccbin" not in found(environment, tmp_path).options
    options = found(environment | {"CXX": "g++-12"}, tmp_path).options
    assert options[options.index("-ccbin") + 1] == "g++-12"
    assert "-ccbin" not in found(environment | {"CXX": "ccache g++"}, tmp_path).options


def test_an_error_in_the_kernels_is_the_reason(nvcc: Nvcc, tmp_path: Path) -> None:
    nvcc("echo 'In file included from x.h'; echo 'gradients.cu(58): error: y is undefined' >&2; exit 2")
    toolkit = Toolkit(str(tmp_path / "home/bin/nvcc"), "13.0", ())
    with pytest.raises(
        LeftOut, match=r"does not build csrc/\*\.cu: gradients\.cu\(58\): error: y is undefined; install"
    ):
        compile_cuda(toolkit, tmp_path, ["csrc/gradients.cu"], tmp_path / "_CUDA.abi3.so", os.environ)


def test_what_an_earlier_build_made_does_not_stay(tmp_path: Path) -> None:
    for name in ("_C.abi3.so", "_CUDA.abi3.so"):
        (tmp_path / name).touch()
    leave_out(tmp_path, "_CUDA", "CUDA", "nvcc fails")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["_C.abi3.so", "_CUDA.txt"]
    assert (tmp_path / "_CUDA.txt").read_text() == "nvcc fails\n"


def test_no_compiler_and_one_that_is_too_old(tmp_path: Path) -> None:
    old = tmp_path / "g++-9"
    old.write_text("#!/bin/sh\necho \"g++-9: error: unrecognized command line option '-std=c++20'\" >&2; exit 1\n")
    old.chmod(0o755)
    with pytest.raises(LeftOut, match=r"there is no C\+\+ compiler \(no-such-compiler\) on PATH"):
        check_cpp(os.environ | {"CXX": "no-such-compiler"})
    with pytest.raises(LeftOut, match=r"g\+\+-9 -O1 does not compile C\+\+20: g\+\+-9: error: unrecognized"):
        check_cpp(os.environ | {"CXX": f"{old} -O1"})


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_the_nvcc_of_this_machine(tmp_path: Path) -> None:
    printed = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    release = re.findall(r"release (\d+\.\d+)", printed)[0]
    toolkit = find_toolkit(release, os.environ, None, tmp_path)
    assert toolkit.release == release and (tmp_path / "probe").stat().st_size > 0
