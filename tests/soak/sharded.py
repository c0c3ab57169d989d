"""Surgery on parameters of fully_shard (FSDP2).

The cases of tests/surgery/test_sharded.py and HSDP on four ranks against one process, and public
architectures on two ranks against the same ranks without fully_shard.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import warnings
from datetime import timedelta
from pathlib import Path

import architectures
import sharded_cases as cases
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from trunk_examples import Example

from fastmtl.surgery import GradientSurgery
from fastmtl.surgery.losses import Losses


class Net(nn.Module):
    """The trunk of an example, and two heads."""

    def __init__(self, example: Example) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.features = example.trunk, example.features
        self.heads = nn.ModuleList([nn.Linear(example.width, 2) for _ in range(2)])

    def forward(self, inputs: dict[str, Tensor]) -> list[Tensor]:
        hidden = self.features(self.trunk, inputs)
        return [head(hidden) for head in self.heads]


def gradients(name: str, *, sharded: bool) -> dict[str, Tensor]:
    """Return the gradients of a step, without dropout, whose masks would differ."""
    example = architectures.build(name, 3, dropout=0.0)
    net = Net(example)
    if sharded:
        lists = [module for module in net.trunk.modules() if isinstance(module, nn.ModuleList)]
        for block in (block for blocks in lists for block in blocks if not isinstance(block, nn.ModuleList)):
            if not any(isinstance(parameter, cases.DTensor) for parameter in block.parameters()):
                fully_shard(block)
        fully_shard(net)
    optimizer = torch.optim.SGD([parameter for parameter in net.parameters() if parameter.requires_grad])
    surgery = GradientSurgery(optimizer, tasks=["a", "b"], model=net.trunk, storage="replay")
    here = torch.arange(example.rows) % 3 % 2 == dist.get_rank()
    tasks = (torch.arange(example.rows) % 2)[here]

    def loss_fn(inputs: dict[str, Tensor]) -> Losses:
        with surgery.rows(tasks):
            outputs = net(inputs)
        rows = [(output[tasks == task] - 3 * task + 1, task) for task, output in enumerate(outputs)]
        return {"ab"[task]: (found.square().sum(), len(found)) for found, task in rows}

    surgery.run([{name: tensor[here] for name, tensor in example.inputs.items()}], loss_fn)
    return cases.whole((name, parameter.grad) for name, parameter in net.named_parameters())


def compare_architectures() -> None:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    for name in architectures.BUILDERS:
        plain, sharded = (gradients(name, sharded=flag) for flag in (False, True))
        assert plain.keys() == sharded.keys(), name
        one, other = (torch.cat([found[key].flatten() for key in plain]) for found in (plain, sharded))
        assert (one - other).norm() <= 1e-5 * one.norm(), name
    dist.destroy_process_group()


def main() -> None:
    every = [*cases.CASES, *cases.HYBRID]
    with tempfile.TemporaryDirectory(prefix="fastmtl-soak-") as directory:
        for command in ([cases.__file__, directory, "4"], [__file__, "architectures"]):
            status = subprocess.run([sys.executable, *command], stdout=sys.stderr).returncode
            if status:
                sys.exit(status)
        ranks = [torch.load(Path(directory) / f"{rank}.pt", weights_only=False) for rank in range(4)]
    for case in every:
        expected = cases.train_alone(case)
        for rank in ranks:
            cases.compare(rank[case.name], expected, case)
    figures = {
        "equal to one process on four ranks": ", ".join(case.name for case in every),
        "equal to the same ranks without fully_shard": ", ".join(architectures.BUILDERS),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    if sys.argv[1:] == ["architectures"]:
        for each in architectures.BUILDERS:  # imports their modules before the ranks are forked
            architectures.build(each, 3)
        run_ranks(2, compare_architectures, deepspeed=False)
    else:
        main()
