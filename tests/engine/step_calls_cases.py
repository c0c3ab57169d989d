"""Prints, for test_step_calls.py, what a step of BERT-base's 12 layers calls in several ways, as JSON."""

from __future__ import annotations

import json

import torch

from fastmtl.bench.step_calls import StepCalls, count_step

WAYS = {
    "pcgrad": {},
    "pcgrad, flat": {"flat": True},
    "pcgrad, flat, graphs": {"flat": True, "graphs": True},
    "sum": {},
}


def told(found: StepCalls) -> dict[str, object]:
    return {"calls": found.calls.total(), "outside": found.outside_graphs, "waits": found.waits}


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = {
        name: told(count_step(name.split(",")[0], zero=1, layers=12, precision="bf16", **settings))
        for name, settings in WAYS.items()
    }
    print(json.dumps(results))
