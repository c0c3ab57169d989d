"""Checkpoints without the state of a setting, which the user has changed by --accept-changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fastmtl.errors import UserError
from fastmtl.model.multitask import MultiTaskModel
from fastmtl.training.objectives import Objectives

SETTINGS: dict[str, dict[str, Any]] = {
    "weighting.name: famo": {"weighting": {"name": "famo"}},
    "weighting.name: dwa": {"weighting": {"name": "dwa"}},
    "weighting.name: gradnorm": {"weighting": {"name": "gradnorm"}, "gradient": {"method": "equal"}},
    "smart": {"smart": {"strength": 1.0}},
    "train.ema: 0.5": {"train": {"ema": 0.5}},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_checkpoint_without_the_state_of_a_setting_is_refused(
    setting: str, make_model: Callable[..., MultiTaskModel]
) -> None:
    def made(**sections: Any) -> Objectives:
        model = make_model(**sections)
        return Objectives(model.recipe, model)

    with pytest.raises(UserError, match=f"^{setting}: the checkpoint has no state of it: keep the former setting"):
        made(**SETTINGS[setting]).load(made(weighting={"name": "rlw"}).state_dict(), {})


def test_a_teacher_that_a_checkpoint_lacks_is_named(make_model: Callable[..., MultiTaskModel]) -> None:
    model = make_model(smart={"strength": 1.0})
    without = Objectives(model.recipe, model).state_dict()
    model = make_model(smart={"strength": 1.0, "proximal": 1.0})
    with pytest.raises(UserError, match="^smart: the checkpoint has no state of it"):
        Objectives(model.recipe, model).load(without, {})
