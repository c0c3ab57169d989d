"""csrc/*.cu compile with nvcc and torch's headers for each architecture, without spills."""

from __future__ import annotations

from pathlib import Path

import pytest

import nvcc_aot


@pytest.mark.slow(12)
@pytest.mark.skipif(bool(nvcc_aot.why_no_nvcc()), reason=nvcc_aot.why_no_nvcc())
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("source", nvcc_aot.sources(), ids=lambda path: path.name)
def test_compiles_without_spills(source: Path, capability: int) -> None:
    kernels = nvcc_aot.compile_source(source, capability)
    assert len(kernels) >= 4
    for name, used in kernels.items():
        assert used["spilled"] == 0, (name, used)
        # At least one block of 256 threads fits, in the shared memory that every block may have.
        assert used["registers"] <= 255 and used["shared"] <= 48 << 10, (name, used)
        if "gramian_kernel" in name or "combine_kernel" in name:  # two blocks, to hide the latency of the loads
            assert used["registers"] <= 128, (name, used)
