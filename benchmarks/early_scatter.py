"""The time saved by sending J's columns during backward.

    unshare -n python benchmarks/early_scatter.py

Steps of PCGrad with `reduce: exact` run on two ranks over a throttled loopback, in a separate
network namespace (see benchmarks/scale_out.py). In every second step, the columns are sent after
backward instead. The model has MiniLM's layers with random weights.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import numpy as np
from scale_out import in_namespace, rows, throttle, unthrottle

TASKS, ROWS, TOKENS = 3, 16, 20


def run_rank(arguments: argparse.Namespace) -> None:
    """Run the benchmark in one rank's process; rank 0 prints a line for each rate."""
    import torch
    import torch.distributed as dist
    from transformers import BertConfig

    from fastmtl.config import parse_recipe
    from fastmtl.engine.distributed import start
    from fastmtl.model.encoder.bert import PackedBert
    from fastmtl.model.multitask import MultiTaskModel
    from fastmtl.profile.steps import Steps
    from fastmtl.surgery.sinks.early_scatter import EarlyScatter

    ranks = start()
    torch.set_num_threads(1)
    config = BertConfig(
        vocab_size=1000, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    tasks = {f"task{k}": {"type": "binary", "data": {}} for k in range(TASKS)}
    recipe = parse_recipe({"tasks": tasks, "gradient": {"method": "pcgrad"}}, "made")
    torch.manual_seed(0)
    steps = Steps(recipe, MultiTaskModel(recipe, PackedBert(config)), ranks.world, ranks.device)
    batch = rows(ranks.world, ROWS, TOKENS)
    steps.step([batch])  # allocates the optimiser's state, and records the order of the pieces
    begin = EarlyScatter.begin

    def seconds(early: bool) -> float:
        EarlyScatter.begin = begin if early else _send_nothing  # type: ignore[method-assign, assignment]
        dist.barrier()
        begun = time.perf_counter()
        steps.step([batch])
        dist.barrier()
        return time.perf_counter() - begun

    for rate in (None, *arguments.rates):
        throttle(rate if ranks.is_main else None)
        dist.barrier()
        pairs = [[seconds(early) for early in order] for order in [(True, False), (False, True)] * arguments.rounds]
        pairs[1::2] = [pair[::-1] for pair in pairs[1::2]]
        if ranks.is_main:
            if rate is not None:
                unthrottle()
            early, late = np.transpose(pairs)
            ratios = sorted(early / late)
            print(
                f"{'not throttled' if rate is None else f'{rate:.0f} Mbit/s'}: sent in backward "
                f"{statistics.median(early):.3f} s, sent after backward {statistics.median(late):.3f} s, "
                f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
                flush=True,
            )
        dist.barrier()


def _send_nothing(*_: Any) -> None:
    """Replace EarlyScatter.begin, so that nothing is sent before the end of backward."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[5000, 2000, 600], help="Mbit/s")
    parser.add_argument("--rounds", type=int, default=4, help="half the number of pairs of steps")
    arguments = parser.parse_args()
    sys.exit(in_namespace(parser, 2, lambda: run_rank(arguments)))


if __name__ == "__main__":
    main()
