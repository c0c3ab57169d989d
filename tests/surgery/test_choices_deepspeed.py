"""Every pooling, head and loss under DeepSpeed with two processes: the steps of one process with the joined batches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
import choices  # noqa: E402
import choices_cases as cases  # noqa: E402


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("choices")
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", "29631"]
    worker = str(Path(cases.__file__))
    run = subprocess.run(
        [*launcher, worker, str(directory)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    return directory


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_two_ranks_equal_one_process(results: Path, case: cases.Case) -> None:
    found = load_file(results / f"{case.name}.safetensors")
    recipe = choices.make_recipe(case.method)
    model = choices.make_model(recipe)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=recipe.optimizer.lr)

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    cases.run_steps(optimizer, model, case.method, [0], 1, step)
    expected = model.state_dict()
    assert found.keys() == expected.keys()
    for part in ("encoder.", "adapter.", "heads."):
        names = [name for name in expected if name.startswith(part)]
        moved = max((expected[name] - before[name]).abs().max() for name in names)
        error = max((found[name] - expected[name]).abs().max() for name in names)
        assert moved > 1e-3 and error <= 2e-5 * moved, part
