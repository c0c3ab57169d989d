"""Samplers, subsample, oversampling and curriculum by their formulas; Gradient Compromise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fastmtl.config import Recipe, parse_recipe
from fastmtl.data.compromise import drawn_batches, free_shares, loss_divisors
from fastmtl.data.samplers import SAMPLERS
from fastmtl.data.schedule import Schedule
from fastmtl.errors import UserError

SIZES = (1400, 85, 60)


def recipe(epochs: int = 1, accumulation: int = 1, **sampler: Any) -> Recipe:
    task = {"type": "binary", "data": {"train": "x"}}
    values = {"tasks": dict.fromkeys(("para", "sst", "sts"), task), "sampler": {"batch_size": 8, **sampler}}
    return parse_recipe({**values, "train": {"epochs": epochs}, "engine": {"accumulation": accumulation}}, "test")


@pytest.mark.parametrize(
    ("name", "shares"),
    [
        ("proportional", (1400, 85, 60)),
        ("uniform", (1, 1, 1)),
        ("sqrt", (1400**0.5, 85**0.5, 60**0.5)),
        ("round_robin", (8, 4, 2)),
        ("joint", (8, 4, 2)),
    ],
)
def test_shares(name: str, shares: tuple[float, ...]) -> None:
    quotas = Schedule(SIZES, recipe(name=name, batch_size={"para": 8, "sst": 4, "sts": 2})).quotas(0)
    assert np.abs(quotas - np.array(shares) / sum(shares) * quotas.sum()).max() < 1


def test_joint_goes_once_through_the_largest_set() -> None:
    schedule = Schedule((1400, 85, 60), recipe(name="joint", batch_size=8), world=2)
    assert schedule.steps(0) == -(-1400 // 16)
    assert schedule.quotas(0).tolist() == [88 * 16] * 3  # the last step is filled up
    by_steps = Schedule((300, 290, 60), recipe(name="joint", batch_size={"para": 100, "sst": 10, "sts": 10}))
    assert by_steps.steps(0) == 29  # sst takes the most steps


@pytest.mark.parametrize("accumulation", [1, 3])
def test_sequential_steps_have_one_task(accumulation: int) -> None:
    schedule = Schedule(SIZES, recipe(name="sequential", accumulation=accumulation), world=2)
    stretches = schedule.stretches(0)
    assert [np.flatnonzero(stretch.counts).tolist() for stretch in stretches] == [[0], [1], [2]]
    assert [stretch.counts.sum() for stretch in stretches] == list(SIZES)
    rows_per_step = 8 * 2 * accumulation
    steps = [-(-size // rows_per_step) for size in SIZES]
    assert [stretch.micro_batches for stretch in stretches] == [number * accumulation for number in steps]
    assert schedule.steps(0) == sum(steps)


def test_subsample_and_oversampling() -> None:
    assert Schedule(SIZES, recipe(subsample={"para": 100, "sts": 1000})).quotas(0).tolist() == [100, 85, 60]
    assert Schedule(SIZES, recipe(oversample=5)).quotas(0).tolist() == [1400, 425, 300]
    assert Schedule(SIZES, recipe(oversample=20)).quotas(0).tolist() == [
        1400,
        1400,
        1200,
    ]  # no task exceeds the largest


def test_curriculum_brings_the_sets_in_by_size() -> None:
    schedule = Schedule((60, 1400, 85), recipe(epochs=6, curriculum=4))
    ramps = [schedule.quotas(epoch) / (60, 1400, 85) for epoch in range(6)]
    np.testing.assert_allclose(ramps, [(0, 1, 0), (0, 1, 0.5), (0, 1, 1), (0.5, 1, 1), (1, 1, 1), (1, 1, 1)], atol=0.02)
    both = Schedule(
        (60, 1400, 85), recipe(epochs=3, curriculum=2, oversample=50)
    )  # equal sizes, still decided by the file
    assert [both.quotas(epoch).tolist() for epoch in range(3)] == [[0, 1400, 0], [0, 1400, 1400], [1400] * 3]


def test_compromise_shares_are_the_algorithms() -> None:
    """p_b = clip((p n - 1) / (n - T)), scaled; for one batch per task the mean is p n if over 1."""
    sizes = np.array(SIZES, dtype=np.float64)
    for epoch, alpha in ((0, 1.0), (1, 0.6), (2, 0.2)):
        p = sizes**alpha / (sizes**alpha).sum()
        expected = np.clip((p * 16 - 1) / 13, 0, 1)
        shares = SAMPLERS["compromise"](sizes, sizes, epoch, 3)
        found = free_shares(shares / shares.sum(), 16)
        np.testing.assert_allclose(found, expected / expected.sum())
        if (p * 16 >= 1).all():
            np.testing.assert_allclose(1 + 13 * found, p * 16)
        drawn = drawn_batches(shares / shares.sum(), 16, 4000, np.random.default_rng(0))
        assert (drawn.sum(1) == 16).all() and drawn.min() == 1
        np.testing.assert_allclose(drawn.mean(0), 1 + 13 * found, rtol=0.05)
        beta = 0.2 + 0.8 * epoch / 2
        np.testing.assert_allclose(loss_divisors(sizes, epoch, 3), sizes**beta)
    np.testing.assert_allclose(loss_divisors(sizes, 0, 1), sizes**0.2)
    assert (drawn_batches(np.full(3, 1 / 3), 3, 5, np.random.default_rng(0)) == 1).all()


def test_compromise_steps_are_groups_of_batches() -> None:
    given = {"para": 4, "sst": 8, "sts": 8}
    config = recipe(name="compromise", epochs=3, accumulation=2, batch_size=given, batches_per_step=6)
    schedule = Schedule(SIZES, config, world=2)
    batches = np.array([stretch.counts for stretch in schedule.stretches(1)]) / (np.array([4, 8, 8]) * 2)
    assert (batches == batches.round()).all() and (batches.sum(1) == 6).all() and (batches >= 1).all()
    assert {stretch.micro_batches for stretch in schedule.stretches(1)} == {2}
    for step in (0, 3):
        weights = schedule.loss_weights(1, step)
        assert weights is not None  # k_t batches' mean losses added up, over S_t^b, b = 0.6
        np.testing.assert_allclose(list(weights.values()), batches[step] / np.array(SIZES) ** 0.6)
    rows = np.mean([schedule.quotas(epoch).sum() for epoch in range(3)])
    assert 0.8 < rows / sum(SIZES) < 1.3  # an epoch draws about as many rows as the data has
    again = Schedule(SIZES, config, world=2)
    assert all((a.counts == b.counts).all() for a, b in zip(again.stretches(2), schedule.stretches(2), strict=True))
    assert Schedule(SIZES, recipe()).loss_weights(0, 0) is None


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        ({"subsample": {"parra": 5}}, "Did you mean 'para'?"),
        ({"subsample": {"para": 0}}, "sampler.subsample of para is 0"),
        ({"name": "sequential", "steps_per_epoch": 3}, "does not go with sampler.name: sequential"),
        ({"name": "joint", "batch_tokens": 64}, "does not go with sampler.name: joint"),
        (
            {"name": "compromise", "batch_tokens": 64, "batches_per_step": 4},
            "does not go with sampler.name: compromise",
        ),
        ({"name": "compromise", "curriculum": 1, "batches_per_step": 4}, "every step has every task"),
        ({"name": "compromise"}, "neither without the other"),
        ({"batches_per_step": 4}, "neither without the other"),
        ({"name": "compromise", "batches_per_step": 2}, "a batch of each of 3 tasks"),
        ({"curriculum": 3}, "train.epochs is 3: lower it"),
        ({"name": "anealed"}, "Did you mean 'annealed'?"),
    ],
)
def test_settings_that_exclude_each_other(sampler: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        Schedule(SIZES, recipe(epochs=3, **sampler))
    assert message in str(error.value)
