"""Settings of an optimiser and its schedule that have to stay when a checkpoint is loaded."""

from __future__ import annotations

from typing import Any

NAMES = ("initial_lr", "betas", "eps", "momentum", "weight_decay")

# (base learning rate of each parameter group, settings of each parameter group)
Settings = tuple[list[float], list[dict[str, Any]]]


def optimizer_settings(engine: Any) -> Settings:
    """Return an engine's settings before a checkpoint is loaded, for `put_settings`.

    Only the keys in NAMES are returned: a parameter group may also have state, for example a count
    of steps, which has to be loaded.
    """
    groups = engine.optimizer.param_groups
    return list(engine.lr_scheduler.base_lrs), [{n: group[n] for n in NAMES if n in group} for group in groups]


def put_settings(engine: Any, settings: Settings) -> None:
    """Restore the settings that loading a checkpoint has replaced.

    settings: the result of `optimizer_settings`. The learning rates become those of the schedule at
    the step that was loaded.
    """
    schedule = engine.lr_scheduler
    schedule.base_lrs, groups = list(settings[0]), settings[1]
    rates = [
        base * factor(schedule.last_epoch) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    for group, kept, rate in zip(engine.optimizer.param_groups, groups, rates, strict=True):
        group.update(kept, lr=rate)
    schedule._last_lr = rates
