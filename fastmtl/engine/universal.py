"""A checkpoint in DeepSpeed's universal form, which any number of ranks can load."""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastmtl.engine.distributed import Ranks


@contextmanager
def universal_copy(checkpoint: Path, ranks: Ranks) -> Iterator[Path]:
    """A temporary directory beside `checkpoint` with the universal form of its engine/ folder. Every rank calls it."""
    made = Path(tempfile.mkdtemp(prefix=".universal-", dir=checkpoint.parent)) if ranks.is_main else None
    shared = ranks.all_gather(made)[0]
    assert shared is not None
    try:
        if ranks.is_main:
            _convert(checkpoint / "engine", shared / "engine")
        ranks.barrier()
        yield shared
        ranks.barrier()
    finally:
        if ranks.is_main:
            shutil.rmtree(shared, ignore_errors=True)


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
