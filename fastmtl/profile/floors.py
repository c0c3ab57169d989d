"""Lower bounds of a step's times on a device that is not at hand, from its data sheet.

    forward    2 F n / peak for n tokens, F numbers in the layers' weight matrices; backward twice
               that
    surgery    2 passes over J / bandwidth; `kept`: 2 forwards, and backward once
    optimiser  7 V 4 / bandwidth, V trained numbers: gradient, weight, two moments are read, all but
               the gradient written; hand-over 3 V 4 / bandwidth

No real step is faster. The time of a step without communication is at least the sum of these
bounds.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastmtl.errors import unknown_name
from fastmtl.profile.deepspeed import FLOAT
from fastmtl.profile.scale_out import ALONE, Parts
from fastmtl.profile.shape import Shape


@dataclass(frozen=True)
class Device:
    """A device's data sheet.

    half, single: operations per second in 16 and 32 bits, without sparsity. bandwidth: bytes per
    second of its memory. source: the name of the sheet, with its numbers.
    """

    half: float
    single: float
    bandwidth: float
    source: str


DEVICES = {
    "h200": Device(989e12, 67e12, 4.8e12, "NVIDIA's H200 data sheet: 989 and 67 TFLOP/s, 4.8 TB/s"),
    "a100": Device(312e12, 19.5e12, 2.0e12, "NVIDIA's A100 80GB data sheet: 312 and 19.5 TFLOP/s, 2.0 TB/s"),
}


def floors(shape: Shape, name: str) -> Parts:
    """Return lower bounds of a step's parts on a device. Raise UserError for an unknown device."""
    if name not in DEVICES:
        raise unknown_name("device", name, DEVICES)
    device = DEVICES[name]
    tokens = sum(load.tokens for load in shape.loads)
    forward = 2 * shape.linears * tokens / (device.half if shape.number_bytes < FLOAT else device.single)
    twice = 2 if shape.storage == "replay" else 1
    kept = shape.storage == "kept" and not shape.joint  # surgery computes the weights' products, twice
    surgery = 0.0 if shape.joint else ALONE * shape.tasks * shape.dense * shape.j_bytes / device.bandwidth
    number = shape.trained * FLOAT / device.bandwidth
    seconds = {
        "data": 0.0,
        "forward": twice * forward,
        "backward": (1 if kept else 2) * twice * forward,
        "surgery": 2 * forward if kept else surgery,
        "communication": 0.0 if shape.joint else 3 * number,
        "optimiser": 7 * number,
        "the rest": 0.0,
    }
    return Parts(seconds, shape.tasks, f"floors, not measured: {device.source}")
