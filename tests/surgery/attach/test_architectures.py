"""Task gradients of unmodified public architectures: one pass of the attached model equals T
passes.
"""

from __future__ import annotations

import architectures
import pytest
from one_pass import WAYS

# Each architecture has other sizes in each way; tests/soak/task_gradients.py takes all ways.
EVERY_WAY = ("bert", "llama", "vit")
OTHERS = [way for way in WAYS if not way.startswith("stacked")]
CASES = [
    (name, way, 10 * k + n)
    for k, name in enumerate(architectures.BUILDERS)
    for n, way in enumerate(WAYS)
    if name in EVERY_WAY or way.startswith("stacked") or way == OTHERS[k % len(OTHERS)]
]


@pytest.mark.parametrize(("name", "way", "seed"), CASES)
def test_one_pass_equals_a_pass_per_task(name: str, way: str, seed: int) -> None:
    WAYS[way].check(name, seed)
