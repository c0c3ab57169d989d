"""A disk that becomes full at each write of a checkpoint, of model/ and of a run's other files.

A small tmpfs is filled, each time with less free space, and a run is trained into it. The failure
has to be one sentence that names the file. Once there is room again, --resume has to end with the
weights of a run without a full disk. The tmpfs is mounted in a user namespace, so no privilege is
needed if the system allows these.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from phase_cases import make_recipe, write_data
from safetensors.torch import load_file
from tiny_bert import save_tiny_bert

from fastmtl.errors import TrainingError, UserError
from fastmtl.loop import train
from fastmtl.training import prepare

SIZE = 24 << 20


def fill(file: Path, free: int) -> None:
    """Write `file` until `free` bytes of its disk are left."""
    with file.open("wb") as stream:
        stream.write(bytes(max(0, shutil.disk_usage(file.parent).free - free)))


def weights_of(run: Path) -> dict[str, bytes]:
    """Return the saved model's tensors as bytes, by file and name."""
    parts = ("model", "adapters", "heads")
    return {
        f"{part} {name}": tensor.numpy().tobytes()
        for part in parts
        for name, tensor in load_file(run / "model" / f"{part}.safetensors").items()
    }


def in_namespace(options: argparse.Namespace) -> None:
    """Run the part with a tmpfs at options.mount."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(options.mount)], check=True)
    directory = options.mount.parent
    recipe = make_recipe(
        directory,
        save_tiny_bert(directory / "bert", hidden=16, layers=1, heads=2),
        [],
        train={"checkpoint_every": 3, "epochs": 2},
    )
    write_data(directory)
    train(recipe, directory / "whole")
    prepare.check_room = lambda *_: None  # it would refuse most of the runs at once
    used = sum(path.stat().st_size for path in (directory / "whole").rglob("*") if path.is_file())
    expected, files, failed = weights_of(directory / "whole"), set(), 0
    for number in range(options.fillings):
        run, ballast = options.mount / "run", options.mount / "ballast"
        # From nothing to almost enough; at first in small steps, for the small files.
        fill(ballast, round(used * (number / options.fillings) ** 2))
        try:
            train(recipe, run)
        except (TrainingError, UserError) as error:  # a UserError as in `predict`
            failed += 1
            path, _, reason = str(error).removeprefix(f"cannot write {run}").partition(": ")
            if not str(error).startswith(f"cannot write {run}") or "No space left on device" not in reason:
                sys.exit(f"filling {number}: the message is {error}")
            files.add(path.strip("/") or "the folder")
        ballast.unlink()
        train(recipe, run, resume=run.exists())
        if weights_of(run) != expected:
            sys.exit(f"filling {number}: the run that went on has other weights")
        shutil.rmtree(run)
    if not failed:
        sys.exit("no run met a full disk")
    print(json.dumps({"fillings": options.fillings, "runs that failed and resumed": failed, "at": sorted(files)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fillings", type=int, default=40)
    parser.add_argument("--mount", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.mount is not None:
        return in_namespace(options)
    directory = Path(tempfile.mkdtemp(prefix="fastmtl-soak-"))
    try:
        (directory / "full").mkdir()
        command = ["unshare", "--user", "--map-root-user", "--mount", sys.executable, __file__]
        command += ["--fillings", str(options.fillings), "--mount", str(directory / "full")]
        status = subprocess.run(command, env=os.environ).returncode
    finally:
        shutil.rmtree(directory)
    sys.exit(status)


if __name__ == "__main__":
    main()
