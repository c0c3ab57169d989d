"""docs/compile-table.md matches the kernels, and its numbers are within their limits."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

import compile_table

# Bytes per thread that the largest kernels may spill. float32 is made exact by three products of
# operands that take two registers per number, and is for checks, not for speed.
SPILLED = {80: 160, 90: 0}
SPILLED_OF_FLOAT32 = {80: 2688, 90: 0}
# The same for sequences of more than 64 tokens in float32, by columns of a head. Neither more or
# fewer warps, nor loads without prefetch, nor products without tensor cores leave enough registers.
SPILLED_OF_LONG_FLOAT32 = {34: 344, 64: 176}
# The same under Triton 3.6. Neither 2, 8 or 16 warps nor other numbers of stages spill less.
SPILLED_OF_OLDER_LONG_FLOAT32 = {17: 72, 32: 40, 34: 448, 64: 320}
# Attention in float32 with a window or a bias: masks, distances and sums take further registers.
SPILLED_OF_FLOAT32_WINDOW = {80: 2688, 90: 240}
SPILLED_OF_OLDER_FLOAT32_WINDOW = {80: 2688, 90: 360}
SPILLED_OF_FLOAT32_BIAS = {80: 2688, 90: 584}
SPILLED_OF_OLDER_FLOAT32_BIAS = {80: 2824, 90: 1128}

Table = tuple[dict[str, str], dict[str, list[compile_table.Line]]]
PAGES = [compile_table.TABLE, compile_table.OLDER]


@pytest.fixture(scope="module", params=PAGES, ids=lambda page: page.stem)
def page(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture(scope="module")
def table(page: Path) -> Table:
    return compile_table.read(page.read_text())


@pytest.fixture(scope="module")
def lines(table: Table) -> list[compile_table.Line]:
    return [line for section in table[1].values() for line in section]


def test_no_source_changed_after_it(table: Table, page: Path) -> None:
    changed = compile_table.stale(table[0], cuda=page == compile_table.TABLE)
    assert not changed, f"{', '.join(changed)} changed after {page.name}: run `make compile-table`"


def test_each_names_its_version_of_triton_and_the_other_page() -> None:
    newest, older = (page.read_text() for page in PAGES)
    (version,) = re.findall(r"^Compiled by Triton (\d+\.\d+)\.\d+ and nvcc\.$", newest, re.MULTILINE)
    assert tuple(map(int, version.split("."))) > (3, 6) and f"({compile_table.OLDER.name})" in newest
    assert "\nCompiled by Triton 3.6.0.\n" in older and f"({compile_table.TABLE.name})" in older


def test_every_file_with_kernels_is_in_it(table: Table, page: Path) -> None:
    digests, sections = table
    with_kernels = {
        name
        for name in digests
        if "__global__ void" in (text := (compile_table.ROOT / name).read_text()) or "_kernel(\n    " in text
    }
    assert with_kernels - {"csrc/gradients_kernels.cuh"} <= sections.keys()
    assert ("csrc/gradients.cu" in sections) == (page == compile_table.TABLE)
    assert all(len(lines) >= 4 for lines in sections.values())


def test_a_change_is_seen(tmp_path: Path) -> None:
    digests, _ = compile_table.read(compile_table.TABLE.read_text())
    for name in digests:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(compile_table.ROOT / name, tmp_path / name)
    was = compile_table.stale(digests, tmp_path)
    assert was == compile_table.stale(digests)
    changed = "kernels/fastmtl_kernels/pool/triton.py"
    (tmp_path / changed).write_text((tmp_path / changed).read_text().replace("BLOCK_M = 16", "BLOCK_M = 32"))
    (tmp_path / "kernels/fastmtl_kernels/new_triton.py").write_text("import triton\n")
    assert set(compile_table.stale(digests, tmp_path)) == {*was, changed, "kernels/fastmtl_kernels/new_triton.py"}


@pytest.mark.parametrize("capability", compile_table.CAPABILITIES)
def test_spills_and_shared_memory(lines: list[compile_table.Line], page: Path, capability: int) -> None:
    older = page == compile_table.OLDER
    of_long = SPILLED_OF_OLDER_LONG_FLOAT32 if older else SPILLED_OF_LONG_FLOAT32
    of_window = SPILLED_OF_OLDER_FLOAT32_WINDOW if older else SPILLED_OF_FLOAT32_WINDOW
    of_bias = SPILLED_OF_OLDER_FLOAT32_BIAS if older else SPILLED_OF_FLOAT32_BIAS
    for line in lines:
        _, spilled, shared, _ = line.numbers[capability]
        allowed = (SPILLED_OF_FLOAT32 if "PRECISION=tf32x3" in line.configuration else SPILLED)[capability]
        if line.kernel.startswith("long_") and line.types == "fp32":
            (head_dim,) = map(int, re.findall(r"HEAD_DIM=(\d+)", line.configuration))
            allowed = max(allowed, of_long.get(head_dim, 0))
        if "PRECISION=tf32x3" in line.configuration:
            allowed = max(allowed, of_window[capability] if "WINDOW=" in line.configuration else 0)
            allowed = max(allowed, of_bias[capability] if "GROUPS=" in line.configuration else 0)
        if line.kernel == "_add_layer_norm_bwd_kernel":
            allowed = 0
        assert spilled <= allowed, line
        assert shared <= compile_table.SHARED[capability], line


def test_dots_are_done_by_tensor_cores(lines: list[compile_table.Line]) -> None:
    with_dots = [line for line in lines if line.dots]
    assert {"tile_fwd_kernel", "long_bwd_kernel", "maps_fwd_kernel", "_weights_kernel"} <= {
        line.kernel for line in with_dots
    }
    for line in with_dots:
        for numbers in line.numbers.values():
            assert numbers[3] >= line.dots, line
