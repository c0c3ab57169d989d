"""DeepSpeed and its launcher: a step of two ranks equals one process with the joined batch.

This holds in every ZeRO stage.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import attached_cases
import choices
import choices_cases
import deepspeed_cases as cases
import loads
import pytest
import several_cases
import torch
from launch import cpu_environment, two_processes
from safetensors.torch import load_file

from fastmtl.surgery.methods.order import draw_order

pytestmark = pytest.mark.slow(70)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cases")
    environment = cpu_environment()
    launcher = two_processes()
    run = subprocess.run(
        [*launcher, cases.__file__, str(directory)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    return directory


def reference(case: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the model before and after the same steps with a torch optimiser on the joined batch.

    With `reduce: local`, the steps use the batch of one rank after the other. A packed encoder
    takes the place of transformers' modules.
    """
    recipe = cases.make_recipe(case)
    recipe.encoder.implementation = "auto"
    model = cases.make_model(recipe, case.family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameter_groups(recipe.optimizer), lr=recipe.optimizer.lr, momentum=0.9)
    parts = 2 if case.variant == "local" else 1
    surgeries = [cases.make_surgery(optimizer, model, recipe) for _ in range(parts)]

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.engine.clip)
        optimizer.step()
        optimizer.zero_grad()

    data = cases.make_data(recipe)
    for index in range(cases.STEPS):
        for part, surgery in enumerate(surgeries):
            batch = cases.step_batches(data, index, part, parts)
            counts = dict(zip(recipe.task_names, batch.group_counts, strict=True))  # type: ignore[arg-type]
            surgery.run([batch], lambda batch, task_grads: model(batch, task_grads), counts)
        step()
    return before, model.state_dict()


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_two_ranks_equal_one_process(results: Path, case: Any) -> None:
    found = {
        name.replace("encoder.model.", "encoder."): tensor
        for name, tensor in load_file(results / f"{case.name}.safetensors").items()
    }
    before, expected = reference(case)
    assert found.keys() == expected.keys()
    moved = torch.cat([(expected[name] - before[name]).flatten() for name in expected])
    error = torch.cat([(found[name] - expected[name]).flatten() for name in expected])
    assert moved.norm() > 0.01
    if case.variant.endswith("autocast"):  # float32 weights, products of 8 bits: a small but nonzero error
        assert 1e-6 * moved.norm() < error.norm() <= 0.05 * moved.norm()
    elif case.precision == "fp32":
        assert error.abs().max() <= 1e-5 * moved.abs().max()
    else:  # bf16 weights: each is rounded to 8 bits, and so are its gradients
        magnitude = torch.cat([expected[name].flatten() for name in expected]).norm()
        assert error.norm() <= 2**-8 * magnitude + 0.05 * moved.norm()


@pytest.mark.parametrize("zero", [1, 2])
def test_two_ranks_wait_for_few_numbers(results: Path, zero: int) -> None:
    """One read of the step's result, and one of each rank's number of embedding rows."""
    for rank in (0, 1):
        waits = (results / f"waits-zero{zero}-{rank}.txt").read_text().splitlines()
        assert 1 <= len(waits) <= 3, waits
        assert sum("solver.py" in line for line in waits) == 1


@pytest.mark.parametrize("variant", ["pieces", "backward-pieces", "graphs-pieces"])
def test_columns_go_to_the_ranks_during_backward(results: Path, variant: str) -> None:
    """The second step knows the order and sends early, with the bits of sending at the end."""
    name, late = (cases.Case(2, 4, "pcgrad", variant=each).name for each in (variant, "late"))
    for rank in (0, 1):
        lines = (results / f"{name}-{rank}.txt").read_text().splitlines()
        first, *others = [tuple(map(int, line.split())) for line in lines]
        assert first[0] == 0 and first[1] > 10 and len(others) == cases.STEPS - 1
        assert all(early == pieces for early, pieces in others), others
    if variant == "graphs-pieces":  # without an adapter, so another model
        return
    found, expected = (load_file(results / f"{each}.safetensors") for each in (name, late))
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("case", choices_cases.CASES, ids=lambda case: case.name)
def test_every_pooling_head_and_loss(results: Path, case: choices_cases.Case) -> None:
    """Two ranks equal one process with the joined batch.

    Negatives come from the other rank, and from other micro-batches.
    """
    found = load_file(results / f"{case.name}.safetensors")
    recipe = choices.make_recipe(case.method, case.zero)
    model = choices.make_model(recipe)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=recipe.optimizer.lr)

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    choices_cases.run_steps(optimizer, model, case.method, [0], 1, step)
    expected = model.state_dict()
    assert found.keys() == expected.keys()
    for part in ("encoder.", "adapter.", "heads."):
        names = [name for name in expected if name.startswith(part)]
        moved = max((expected[name] - before[name]).abs().max() for name in names)
        error = max((found[name] - expected[name]).abs().max() for name in names)
        assert moved > 1e-3 and error <= 2e-5 * moved, part


@pytest.mark.parametrize("case", attached_cases.CASES, ids=lambda case: case.name)
def test_one_pass_of_two_ranks_equals_a_pass_per_task(results: Path, case: attached_cases.Case) -> None:
    """Unmodified models equal one process with the joined batch and a pass per task."""
    found = load_file(results / f"{case.name}.safetensors")
    before, expected = attached_cases.reference(case.same_result)
    assert found.keys() == expected.keys()
    names = [name for name in expected if expected[name].is_floating_point()]
    moved = torch.cat([(expected[name] - before[name]).flatten() for name in names])
    error = torch.cat([(found[name] - expected[name]).flatten() for name in names])
    assert moved.norm() > 0.5
    if case.has("autocast"):
        assert 1e-6 * moved.norm() < error.norm() <= 0.05 * moved.norm()
    elif case.has("bf16"):
        magnitude = torch.cat([expected[name].flatten() for name in names]).norm()
        assert error.norm() <= 2**-8 * magnitude + 0.05 * moved.norm()
    else:
        assert error.norm() <= 1e-5 * moved.norm()


@pytest.mark.parametrize("case", several_cases.CASES, ids=lambda case: case.name)
def test_rows_of_several_tasks_and_features(results: Path, case: several_cases.Case) -> None:
    """Two ranks equal T float64 backward passes of the joined batch."""
    files = [f"{case.name}-{rank}" for rank in (0, 1)] if isinstance(case.target, str) else [case.name]
    before, expected = several_cases.Net().state_dict(), several_cases.expected(case)
    moved = max((expected[name] - before[name]).abs().max() for name in expected)
    for file in files:
        found = load_file(results / f"{file}.safetensors")
        error = max((found[name] - expected[name]).abs().max() for name in expected)
        assert moved > 0.1 and error <= (0.05 if case.precision == "bf16" else 1e-5) * moved


@pytest.mark.parametrize("number", range(len(cases.RANDOM)))
def test_any_batch_of_two_ranks_equals_the_textbook(results: Path, number: int) -> None:
    """One SGD step, compared with T float64 backward passes and projections pair by pair."""
    zero, load = cases.RANDOM[number]
    model = loads.make_model(load, zero)
    found = load_file(results / f"random{number}.safetensors")
    rows, own = loads.jacobian(loads.make_model(load, zero).double(), load)
    update, weights = loads.merge(rows, draw_order(len(load.rows), 3, 1))
    bound = 1e-5 * float((weights.abs() * rows.norm(dim=1)).sum())
    shared = {id(p) for p in model.shared_parameters()}
    before = dict(model.named_parameters())
    change = {name: (before[name].detach().double() - found[name].double()) / 0.1 for name in before}
    moved = torch.cat([change[name].flatten() for name, p in before.items() if id(p) in shared])
    # A float32 weight stores its change up to its own rounding, 6e-8 of some 0.3 over lr 0.1.
    assert (moved - update).norm() <= bound + 4e-7 * len(moved) ** 0.5
    for name, value in own.items():
        assert (change[name] - value).norm() <= 1e-5 * float(value.norm()) + 4e-6 * value.numel() ** 0.5


@pytest.mark.parametrize("zero", [0, 2])
@pytest.mark.parametrize("rank", [0, 1])
def test_losses_of_the_engine_itself_are_refused(results: Path, zero: int, rank: int) -> None:
    said = (results / f"engine-forward-zero{zero}-{rank}.txt").read_text()
    assert "call engine.module(...) in their place" in said
