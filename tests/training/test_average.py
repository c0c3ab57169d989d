"""The moving average of the weights: its values, and that the model gets its own weights back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastmtl.config import Recipe
from fastmtl.errors import UserError
from fastmtl.training.average import WeightAverage
from fastmtl.training.phases import split


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_average_over_steps_and_a_resume(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(dtype)
    model[1].bias.requires_grad_(False)
    average = WeightAverage(model, 0.9)
    expected = {name: weight.detach().double() for name, weight in model.named_parameters() if weight.requires_grad}
    for _ in range(5):
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight))
        average.update()
        for name, weight in model.named_parameters():
            if name in expected:
                expected[name] = 0.9 * expected[name] + 0.1 * weight.detach().double()
        again = WeightAverage(model, 0.9)
        again.load(average.tensors())
        average = again
    assert average.tensors().keys() == expected.keys() == {"0.weight", "0.bias", "1.weight"}
    for name, value in average.tensors().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    with pytest.raises(ZeroDivisionError), average.in_model():
        for name, weight in model.named_parameters():
            wanted = expected[name].to(dtype) if name in expected else before[name]
            torch.testing.assert_close(weight.detach(), wanted)
        raise ZeroDivisionError
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name])


def test_zero_3_is_refused() -> None:
    tasks = {"x": {"type": "binary", "data": {"train": "x.csv"}}}
    recipe = Recipe.model_validate({"tasks": tasks, "engine": {"zero": 3}, "train": {"ema": 0.9}})
    with pytest.raises(UserError, match="train.ema.*ZeRO 3"):
        split(recipe)
