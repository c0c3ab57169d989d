"""Options that make a step cheaper do not change results: losses over 200 steps of every option.

They are compared with the plain path, which is the textbook's: one backward per task, PCGrad pair
by pair on flat gradients, the kernels' oracles, clip_grad_norm_, torch.optim.AdamW. Dropout is on
everywhere, as all implementations draw the same masks.

If only the order of float32 sums differs, losses diverge slowly. The plain path itself gives the
allowed difference: its own rounding error, propagated by training, is its distance from a run in
float64. An option rounds as much in another way, so the two differ by up to twice that. The bound
is twice this again, as a run is one draw of such noise. PCGrad adds nothing to it: if the sign of
an inner product is uncertain, the projection is nearly 0.

`pytest tests/runs/test_200_steps.py -s` prints the differences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
import training_ways as ways
from scripts import run_script

from fastmtl_kernels._native import why_unavailable

MARGIN = 4
# Ways whose losses are equal to the last bit.
SAME_BITS = {
    "recompute: cheap": ways.KERNELS,
    "recompute: full": ways.KERNELS,
    "prefetch": ways.KERNELS,
}
Yardstick = Callable[[str], tuple[ways.Run, float]]

pytestmark = [
    pytest.mark.skipif(bool(why_unavailable()), reason=why_unavailable() or "built"),
    pytest.mark.slow(65),
]


@pytest.fixture(scope="module")
def yardstick() -> Yardstick:
    """Return the plain path of a way's model, and its largest difference from a float64 run."""

    @cache
    def of_model(dropout: float, adapter: bool) -> tuple[ways.Run, float]:
        way = replace(ways.PLAIN, dropout=dropout, adapter=adapter)
        plain = ways.train(way)
        found = difference(ways.train(replace(way, dtype=torch.float64)).losses, plain)
        model = f"dropout {dropout}, {'with' if adapter else 'without'} adapter"
        print(f"\nthe plain path, {model}, in float64 {found:.1e}, so the bound is {MARGIN * found:.1e}")
        return plain, found

    return lambda name: of_model(ways.WAYS[name].dropout, ways.WAYS[name].adapter)


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], np.ndarray]:
    """Return the losses of a way by name. All ways under DeepSpeed run in the same processes."""
    directory = tmp_path_factory.mktemp("ways")

    @cache
    def under_deepspeed() -> dict[str, np.ndarray]:
        run_script(ways.__file__, directory)
        return {name: losses for world in (1, 2) for name, losses in np.load(directory / f"{world}.npz").items()}

    @cache
    def losses_of(name: str) -> np.ndarray:
        return under_deepspeed()[name] if name in ways.UNDER_DEEPSPEED else ways.train(ways.WAYS[name]).losses

    return losses_of


def difference(losses: np.ndarray, plain: ways.Run) -> float:
    """Return the largest difference of a step and task, relative to the loss.

    If a step's loss is below the task's mean loss, the difference is relative to the mean.
    """
    return float((np.abs(losses - plain.losses) / np.maximum(plain.losses, plain.losses.mean(0))).max())


@pytest.mark.parametrize("name", [ways.KERNELS, "all on two ranks"])
def test_it_is_training(name: str, yardstick: Yardstick) -> None:
    """Losses fall and gradients conflict; otherwise the tests would compare noise or sums."""
    plain, _ = yardstick(name)
    assert plain.losses.shape == (ways.STEPS, len(ways.TASKS))
    first, last = plain.losses[:40].mean(0), plain.losses[-40:].mean(0)
    print(f"\nmean losses of the first and the last 40 steps {first.round(2)} {last.round(2)}")
    print(f"pairs of tasks in conflict {plain.conflicts.mean():.0%}")
    assert (last < 0.5 * first).all()
    assert 0.1 < plain.conflicts.mean() < 0.9


@pytest.mark.parametrize("name", ways.WAYS)
def test_losses_are_those_of_the_plain_path(
    name: str, losses: Callable[[str], np.ndarray], yardstick: Yardstick
) -> None:
    made, bits, (plain, rounding) = losses(name), SAME_BITS.get(name), yardstick(name)
    found = difference(made, plain)
    print(f"\n{name:20} {found:.1e}" + (f", the bits of: {bits}" if bits else ""))
    assert made.shape == plain.losses.shape
    assert found <= MARGIN * rounding
    if bits:
        assert np.array_equal(made, losses(bits))
    assert not np.array_equal(made, plain.losses)  # otherwise the oracles have not run


def test_a_task_weight_off_by_a_thousandth_is_seen(yardstick: Yardstick) -> None:
    """The bound is narrow enough to reject a different meaning."""
    plain, rounding = yardstick(ways.KERNELS)
    found = difference(ways.train(replace(ways.ONE_PASS, weight=1.001 * ways.ONE_PASS.weight)).losses, plain)
    print(f"\na task's weight times 1.001 {found:.1e}")
    assert found > 2 * MARGIN * rounding
