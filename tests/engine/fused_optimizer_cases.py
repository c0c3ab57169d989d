"""The process of tests/engine/test_fused_optimizers.py. Usage: fused_optimizer_cases.py DIRECTORY

Two steps with DeepSpeed's Adam, a checkpoint, and two more steps, once directly and once from the
checkpoint; all four also with torch's Adam.
"""

from __future__ import annotations

import sys
from pathlib import Path

import checkpoint_cases as cases

from fastmtl.engine.checkpoint import Checkpoints
from fastmtl.engine.distributed import start
from fastmtl.errors import UserError

if __name__ == "__main__":
    directory, ranks = Path(sys.argv[1]), start()
    recipe = cases.make_recipe("zero1")
    recipe.engine.fused_optimizer = "deepspeed"
    run = cases.Run(recipe, ranks)
    assert "DeepSpeedCPUAdam" in type(run.engine.optimizer.optimizer).__name__
    run.go_on(1, 2)
    run.write(directory / "begun.safetensors")
    Checkpoints(directory / "run", recipe, ranks).save(run.engine, 2, {"surgery": run.surgery.state_dict()})
    run.go_on(3, 4)
    run.write(directory / "straight.safetensors")
    run.engine.destroy()

    checkpoints = Checkpoints(directory / "run", recipe, ranks)
    found = checkpoints.find()
    assert found is not None
    run = cases.Run(recipe, ranks)
    run.surgery.load_state_dict(checkpoints.restore(run.engine, found)["surgery"])
    run.go_on(3, 4)
    run.write(directory / "resumed.safetensors")
    run.engine.destroy()

    of_torch = cases.make_recipe("zero1")
    try:
        Checkpoints(directory / "run", of_torch, ranks).find()
    except UserError as refusal:
        assert "fused_optimizer: deepspeed, this run has fused_optimizer: torch" in str(refusal)
    else:
        raise AssertionError("a checkpoint of DeepSpeed's Adam went on with torch's")
    run = cases.Run(of_torch, ranks)
    run.go_on(1, 4)
    run.write(directory / "torch.safetensors")
