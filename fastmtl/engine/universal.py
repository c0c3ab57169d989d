"""Checkpoints in DeepSpeed's universal form, which any number of ranks can load."""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from fastmtl.engine.distributed import Ranks
from fastmtl.engine.plain_path import plain_path


@contextmanager
def universal_copy(checkpoint: Path, ranks: Ranks) -> Iterator[Path]:
    """Yield a temporary folder that contains the universal form of a checkpoint's engine/.

    The folder is beside the checkpoint and is removed after the block. Every rank enters the block;
    rank 0 makes the folder.
    """
    made = Path(tempfile.mkdtemp(prefix=".universal-", dir=checkpoint.parent)) if ranks.is_main else None
    shared = ranks.all_gather(made)[0]
    assert shared is not None
    try:
        if ranks.is_main:
            with plain_path(checkpoint) as source, plain_path(shared) as target:
                _convert(source / "engine", target / "engine")
        ranks.barrier()
        yield shared
        ranks.barrier()
    finally:
        if ranks.is_main:
            shutil.rmtree(shared, ignore_errors=True)


@contextmanager
def keeps_groups(engine: Any) -> Iterator[None]:
    """Repair a torch optimiser after DeepSpeed 0.19 has loaded a universal ZeRO 3 checkpoint.

    On loading, DeepSpeed gives every group the first group's settings (learning rate, weight
    decay). It also gives all parameters the same step tensor, so every parameter's update would
    increment the step of all.
    """
    optimizer = engine.optimizer.optimizer
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    yield
    rates = engine.lr_scheduler.get_last_lr()
    for group, kept, rate in zip(optimizer.param_groups, settings, rates, strict=True):
        group.update(kept)
        group["lr"] = rate
    for state in optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].clone()


def _convert(source: Path, target: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    arguments = argparse.Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        ds_to_universal.main(arguments)
