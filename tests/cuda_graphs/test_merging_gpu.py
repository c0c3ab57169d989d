"""Gramian, weights and merging captured on a GPU, against the same operations run eagerly."""

from __future__ import annotations

import pytest
import torch
from written_rows import make_parameters, steps_of

from fastmtl.cuda_graphs.buffers import tables as static_tables
from fastmtl.cuda_graphs.merging import RecordedStep
from fastmtl.cuda_graphs.recorder import CudaRecorder, Recordings, Unrecorded
from fastmtl.surgery.methods.order import draw_order
from fastmtl.surgery.methods.table import find_method
from fastmtl.surgery.sinks.stack import StackSink

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("method", ["pcgrad", "gradvac"])
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
def test_graphs_equal_the_operations_bit_for_bit(
    method: str, kept: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(static_tables, "STEP", 16)
    device, parameters = torch.device("cuda"), make_parameters("cuda")
    sinks = [StackSink(parameters, 3, sparse=parameters[1:], dtype=kept) for _ in range(2)]
    both = [Recordings(), Recordings(Unrecorded())]
    methods = [find_method(method) for _ in both]
    steps = [
        RecordedStep(sink, method, 3, device, recordings)
        for sink, method, recordings in zip(sinks, methods, both, strict=True)
        if method is not None
    ]
    for _ in range(2):
        for number in steps_of(sinks, parameters):
            for step in steps:
                step.run(draw_order(3, 0, number), 2.0, 1.0)
            found, eager = ([s.gram, s.weights, *s.gradients().values()] for s in steps)
            assert all(torch.equal(*pair) and pair[0].isfinite().all() for pair in zip(found, eager, strict=True))
            expected = sinks[0].gramian() / 4
            assert (steps[0].gram - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert both[0].warned == []
    assert isinstance(both[0].recorder, CudaRecorder)
    assert methods[0] is not None and methods[1] is not None
    assert methods[0].state_dict() == methods[1].state_dict()
