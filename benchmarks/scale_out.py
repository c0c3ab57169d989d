"""The traffic that fastmtl/profile/traffic.py predicts, compared with ranks on a slow loopback.

    unshare -n python benchmarks/scale_out.py

It runs in a separate network namespace (as root, or by `unshare -rn`), whose only interface is a
loopback that this script brings up and throttles by `tc`; the host's interfaces stay unchanged.
Each way runs a few steps at full speed and a few throttled. All ranks share the loopback, so the
time that throttling adds to a step should be the bytes that all ranks send, divided by the rate.
The loopback itself counts the bytes, including packet headers and acknowledgements.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

WAYS = ({"method": "sum"}, *({"method": "pcgrad", "reduce": reduce} for reduce in ("exact", "local", "sketch")))
TASKS, ROWS, TOKENS = 3, 4, 12


def run_rank(arguments: argparse.Namespace) -> None:
    """Run the benchmark in one rank's process; rank 0 prints a line of JSON for each way."""
    import torch
    import torch.distributed as dist
    from transformers import BertConfig

    from fastmtl.config import parse_recipe
    from fastmtl.engine.distributed import start
    from fastmtl.model.encoder.bert import PackedBert
    from fastmtl.model.multitask import MultiTaskModel
    from fastmtl.profile.load import Load
    from fastmtl.profile.shape import Shape
    from fastmtl.profile.steps import Steps
    from fastmtl.profile.traffic import traffic

    ranks = start()
    torch.set_num_threads(1)
    config = BertConfig(
        vocab_size=1000,
        hidden_size=arguments.hidden,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=4 * arguments.hidden,
    )
    batch = rows(ranks.world)
    for way in WAYS:
        values = {
            "tasks": {f"task{k}": {"type": "binary", "data": {}} for k in range(TASKS)},
            "gradient": {**way, "sketch_size": 4096},
            "engine": {"zero": arguments.zero},
        }
        recipe = parse_recipe(values, "made")
        torch.manual_seed(0)
        model = MultiTaskModel(recipe, PackedBert(config))
        on_meta = copy.deepcopy(model).to("meta")
        steps = Steps(recipe, model, ranks.world, ranks.device)
        shape = Shape.of(recipe, on_meta, [Load.of(batch)], steps.storage, ranks.world, on_gpu=False)
        steps.step([batch])  # allocates the optimiser's state

        def run(steps: Steps = steps) -> tuple[float, float]:
            """Return a step's median seconds on this rank, and its mean bytes on the loopback."""
            samples = []
            dist.barrier()
            before = bytes_so_far()
            for _ in range(arguments.steps):
                begun = time.perf_counter()
                steps.step([batch])
                dist.barrier()
                samples.append(time.perf_counter() - begun)
            return statistics.median(samples), (bytes_so_far() - before) / arguments.steps

        fast, nbytes = run()
        throttle(arguments.rate if ranks.is_main else None)
        dist.barrier()
        slow, _ = run()
        if ranks.is_main:
            unthrottle()
        dist.barrier()
        sent = ranks.world * sum(one.sent(ranks.world) for one in traffic(shape))
        if ranks.is_main:
            added = sent / (arguments.rate * 1e6 / 8)
            found = {"way": " ".join(way.values()), "bytes": nbytes, "model_bytes": sent}
            print(json.dumps(found | {"fast_s": fast, "slow_s": slow, "model_added_s": added}), flush=True)


def bytes_so_far() -> int:
    """Return the bytes that this namespace's loopback has sent.

    They are read from /proc, since /sys shows the namespace in which /sys was mounted.
    """
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    (counters,) = (line.partition(":")[2].split() for line in lines if line.strip().startswith("lo:"))
    return int(counters[8])


def rows(world: int, number: int = ROWS, tokens: int = TOKENS) -> Any:
    from fastmtl.data.packing import pack
    from fastmtl.data.tokenized import TokenizedDataset

    random = np.random.default_rng(0)
    parts = []
    for _ in range(TASKS):
        dataset = TokenizedDataset(
            tokens=random.integers(0, 1000, number * tokens).astype(np.int32),
            offsets=np.arange(number + 1) * tokens,
            second_text=np.full(number, tokens, np.int32),
            sequences_per_example=1,
            labels=np.arange(number, dtype=np.float32) % 2,
            ids=[str(row) for row in range(number)],
            truncated=0,
            skipped=[],
            path=Path("random"),
        )
        parts.append((dataset, np.arange(number)))
    return pack(parts, [number * world] * TASKS)


def throttle(megabits: float | None) -> None:
    if megabits is not None:
        rate = ["tbf", "rate", f"{megabits}mbit", "burst", "256kb", "latency", "1s"]
        subprocess.run(["tc", "qdisc", "add", "dev", "lo", "root", *rate], check=True)


def unthrottle() -> None:
    subprocess.run(["tc", "qdisc", "del", "dev", "lo", "root"], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rate", type=float, default=200, help="Mbit/s of the throttled loopback")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--zero", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    sys.exit(in_namespace(parser, arguments.ranks, lambda: run_rank(arguments)))


def in_namespace(parser: argparse.ArgumentParser, ranks: int, run: Callable[[], None]) -> int:
    """Start this script once per rank and return the largest exit code; in a rank, call `run`."""
    if "RANK" in os.environ:
        run()
        return 0
    if [name for _, name in socket.if_nameindex()] != ["lo"]:
        parser.error("this network namespace has more than a loopback: run this script under `unshare -n`")
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    common |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen([sys.executable, *sys.argv], env={**os.environ, **common, "RANK": rank, "LOCAL_RANK": rank})
        for rank in map(str, range(ranks))
    ]
    return max(process.wait() for process in processes)


if __name__ == "__main__":
    main()
