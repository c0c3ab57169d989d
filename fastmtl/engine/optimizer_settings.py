"""Settings of an optimiser and its schedule, which loading a checkpoint has to keep."""

from __future__ import annotations

from typing import Any

NAMES = ("initial_lr", "betas", "eps", "momentum", "weight_decay")

Settings = tuple[list[float], list[dict[str, Any]]]


def optimizer_settings(engine: Any) -> Settings:
    """Return the schedule's base rates and each group's settings.

    Groups may also have state, for example a count of steps.
    """
    groups = engine.optimizer.param_groups
    return list(engine.lr_scheduler.base_lrs), [{n: group[n] for n in NAMES if n in group} for group in groups]


def put_settings(engine: Any, settings: Settings) -> None:
    """Restore settings, with the schedule's learning rates after the loaded number of steps."""
    schedule = engine.lr_scheduler
    schedule.base_lrs, groups = list(settings[0]), settings[1]
    rates = [
        base * factor(schedule.last_epoch) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    for group, kept, rate in zip(engine.optimizer.param_groups, groups, rates, strict=True):
        group.update(kept, lr=rate)
    schedule._last_lr = rates
