"""Find the nvcc that builds the CUDA kernels for an installed torch, and check that it can link.

setup.py imports this module before anything is installed, so it needs only the standard library.
nvcc is always called by the path that was found, even if this is a wrapper script: nvcc itself
finds its toolkit. torch instead takes the folder above nvcc for CUDA_HOME, but the folder above a
wrapper has no toolkit.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

USUAL = Path("/usr/local/cuda")
ERROR_LINE = re.compile(r"error|fatal|cannot find|undefined reference|not found", re.IGNORECASE)
# A program that includes all CUDA headers of csrc/*.cu, launches a kernel and calls the runtime.
PROBE = """
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
__global__ void nothing() {}
int main() {
  nothing<<<1, 1>>>();
  return cudaGetLastError();
}
"""


class LeftOut(Exception):
    """Raised for a part that cannot be built. The message is one line with reason and remedy."""


@dataclass(frozen=True)
class Toolkit:
    """An nvcc that has built a program: its path, its release, and the options for every call."""

    nvcc: str
    release: str
    options: tuple[str, ...]


def find_toolkit(
    torch_cuda: str | None,
    environment: Mapping[str, str],
    wheel: Path | None,
    scratch: Path,
    architectures: Sequence[str] = (),
    usual: Path = USUAL,
) -> Toolkit:
    """Return the first nvcc that has torch's major version of CUDA and links a program with cudart.

    If the user sets CUDA_HOME or CUDA_PATH, only this folder is searched; otherwise PATH, `usual`
    and `wheel`, in this order.

    Args:
        torch_cuda: torch.version.cuda, such as "13.0"; None for a torch without CUDA.
        environment: like os.environ; PATH, CUDA_HOME, CUDA_PATH and CXX are read.
        wheel: the folder of NVIDIA's packages beside torch's wheel, which has cudart.
        scratch: a folder for trial builds; the toolkit's options may name files in it.
        architectures: nvcc's options for the GPUs to build for.

    Raises:
        LeftOut: no nvcc can be used; the message names each one found and the reason.
    """
    if torch_cuda is None:
        raise LeftOut("the torch of the build has no CUDA; for an NVIDIA GPU install a CUDA build of torch")
    major = torch_cuda.split(".")[0]
    reasons = []
    for nvcc in _candidates(environment, wheel, usual):
        try:
            return _checked(nvcc, torch_cuda, environment, wheel, scratch, architectures)
        except LeftOut as reason:
            reasons.append(str(reason))
    why = "; ".join(reasons) or f"there is no nvcc on PATH or in {usual}"
    raise LeftOut(f"{why}; {_advice(major, environment)}")


def run(command: Sequence[str], environment: Mapping[str, str], timeout: float = 600) -> str:
    """Return the output of a command.

    Raises:
        LeftOut: the command fails or cannot start; the message is the first error line.
    """
    try:
        done = subprocess.run(
            command, env=dict(environment), capture_output=True, text=True, errors="replace", timeout=timeout
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LeftOut(str(error)) from None
    if done.returncode:
        lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        error_lines = [line for line in lines if ERROR_LINE.search(line)]
        # setuptools prints the build's log; the message has only its first error.
        print("\n".join(lines))
        raise LeftOut([*error_lines, *lines[-1:], f"exit status {done.returncode}"][0].rstrip("."))
    return done.stdout


def host_compiler(environment: Mapping[str, str]) -> list[str]:
    """Return nvcc's option for the compiler of the C++ part, [] if the user did not choose one.

    CXX may hold options or a launcher such as ccache, which nvcc does not accept. nvcc then uses
    its default.
    """
    words = shlex.split(environment.get("CXX", ""))
    return ["-ccbin", words[0]] if len(words) == 1 else []


def _chosen(environment: Mapping[str, str]) -> str | None:
    """Return the name of the variable with which the user chose a toolkit, None if there is none.

    torch reads the same two variables in this order.
    """
    return next((name for name in ("CUDA_HOME", "CUDA_PATH") if environment.get(name)), None)


def _advice(major: str, environment: Mapping[str, str]) -> str:
    name = _chosen(environment)
    where = f"set {name} to its folder or unset {name}" if name else "set CUDA_HOME to its folder"
    return f"install the whole CUDA {major} toolkit and {where}"


def _candidates(environment: Mapping[str, str], wheel: Path | None, usual: Path) -> Iterator[str]:
    name = _chosen(environment)
    if name is not None:
        nvcc = shutil.which("nvcc", path=str(Path(environment[name]) / "bin"))
        if nvcc is None:
            raise LeftOut(f"{name} is {environment[name]}, which has no bin/nvcc; correct or unset {name}")
        yield nvcc
        return
    folders = [environment.get("PATH", ""), str(usual / "bin"), *([str(wheel / "bin")] if wheel else [])]
    found = [nvcc for folder in folders if (nvcc := shutil.which("nvcc", path=folder))]
    yield from dict.fromkeys(found)


def _checked(
    nvcc: str,
    torch_cuda: str,
    environment: Mapping[str, str],
    wheel: Path | None,
    scratch: Path,
    architectures: Sequence[str],
) -> Toolkit:
    release = re.search(r"release (\d+\.\d+)", _asked(nvcc, "--version", environment))
    if release is None:
        raise LeftOut(f"{nvcc} --version names no release")
    if release[1].split(".")[0] != torch_cuda.split(".")[0]:
        raise LeftOut(f"torch is built for CUDA {torch_cuda} and {nvcc} is CUDA {release[1]}")
    # No kernel launches other kernels, so the device runtime is not needed.
    own = ("-cudart=shared", "-cudadevrt=none", *host_compiler(environment), *architectures)
    source = scratch / "probe.cu"
    source.write_text(PROBE)
    reasons = []
    for options in [own, *([(*own, *_runtime_of(wheel, scratch))] if wheel else [])]:
        try:
            run([nvcc, *options, str(source), "-o", str(scratch / "probe")], environment, 120)
            return Toolkit(nvcc, release[1], options)
        except LeftOut as reason:
            reasons.append(str(reason))
    # The first reason is a fault of the toolkit itself; torch's runtime is only a second attempt.
    raise LeftOut(f"{nvcc} ({_place(nvcc, environment)}) cannot build a program with CUDA's runtime: {reasons[0]}")


def _asked(nvcc: str, option: str, environment: Mapping[str, str]) -> str:
    try:
        return run([nvcc, option], environment, 60)
    except LeftOut as reason:
        raise LeftOut(f"{nvcc} {option} fails: {reason}") from None


def _runtime_of(wheel: Path, scratch: Path) -> tuple[str, ...]:
    """Return nvcc's options for the headers and the cudart beside torch's wheel.

    The library's name there ends in a version, so `scratch` gets a link with the name that linkers
    expect.
    """
    link = scratch / "libcudart.so"
    if not link.is_symlink():
        link.symlink_to(sorted((wheel / "lib").glob("libcudart.so.*"))[0])
    return f"-I{wheel / 'include'}", f"-L{scratch}"


def _place(nvcc: str, environment: Mapping[str, str]) -> str:
    """Return a text with nvcc's toolkit, for error messages: a wrapper's path does not show it."""
    try:
        done = subprocess.run(
            [nvcc, "--dryrun", "probe.cu"], env=dict(environment), capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return "toolkit unknown"
    top = re.search(r"^#\$ TOP=(.+)$", done.stderr + done.stdout, re.MULTILINE)
    return f"toolkit {Path(top[1].strip()).resolve()}" if top else "toolkit unknown"
