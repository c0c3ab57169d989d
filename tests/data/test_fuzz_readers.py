"""The readers on 100 random files; tests/soak/fuzz_readers.py reads any number of others."""

from __future__ import annotations

from pathlib import Path

from fuzzed_reading import fuzz


def test_random_files_lose_no_row_and_raise_user_errors_only(tmp_path: Path) -> None:
    counts = fuzz(0, 100, tmp_path)
    assert counts["files"] == 100
    assert counts["rows"] > 200 and counts["bad rows reported"] > 50 and counts["files refused"] > 10
