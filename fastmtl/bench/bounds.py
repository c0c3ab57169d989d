"""What the design promises of a GPU, beside what was measured. A bound that does not hold is told, and is no error."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

SURGERY = "pcgrad stacked bf16"
OVERHEAD = {3: 0.08, 8: 0.15}  # of SURGERY over the joint step, by the number of tasks
SHARE = 0.85  # of a copy's speed
ROW_WISE = ("add_layer_norm", "embed_layer_norm", "pool mean", "pool max")
TASK_GRADIENTS = ("gramian", "combine")  # together
ATTENTION_S = 6e-4  # forward and backward of all layers of BERT-base, 8,192 tokens
ATTENTION_PEERS = ("torch varlen, no dropout", "sdpa padded", "sdpa nested")
ADAPTERS = {"pal": 0.10, "low_rank": 0.04}  # of a step without adapter


def bounds(result: dict[str, Any]) -> list[dict[str, Any]]:
    """[{what, measured, bound, holds}]; for parts of the result that are there.

    result: "kernels", "surgery" (a list) and "adapters", as their benchmarks return them.
    """
    found = [*_surgery(result.get("surgery", []))]
    if "kernels" in result:
        found += _kernels(result["kernels"]["operations"], result["kernels"]["shape"]["layers"])
    if "adapters" in result:
        found += _adapters(result["adapters"]["steps"])
    return found


def _bound(what: str, measured: float, bound: float, least: bool = False) -> dict[str, Any]:
    return {
        "what": what,
        "measured": measured,
        "bound": bound,
        "holds": measured >= bound if least else measured <= bound,
    }


def _surgery(parts: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for part in parts:
        what = f"PCGrad over the joint step, {part['shape']['name']}, {part['tasks']} tasks, {part['tokens']} tokens"
        yield _bound(what, part["variants"][SURGERY]["ratio_to_joint"] - 1, OVERHEAD[part["tasks"]])


def _kernels(operations: dict[str, Any], layers: int) -> Iterator[dict[str, Any]]:
    medians = {
        name: {way: entry["median_s"] for way, entry in operation["passes"][_whole(operation)].items()}
        for name, operation in operations.items()
    }
    if all(name in medians for name in TASK_GRADIENTS):
        copies, own = (sum(of(medians[name]) for name in TASK_GRADIENTS) for of in (_copy, _own))
        yield _bound("gramian and combine of the copy's speed", copies / own, SHARE, least=True)
    for name in ROW_WISE:
        if name in medians:
            yield _bound(f"{name} of the copy's speed", _copy(medians[name]) / _own(medians[name]), SHARE, least=True)
    attention = medians.get("varlen_attention")
    if attention is not None:
        ms = 1e3 * layers * _own(attention)
        yield _bound(
            f"ms of attention, {layers} layers, {operations['varlen_attention']['about']}", ms, 1e3 * ATTENTION_S
        )
        for peer in ATTENTION_PEERS:
            if peer in attention:
                yield _bound(f"attention's time over that of {peer}", _own(attention) / attention[peer], 1.0)


def _adapters(steps: dict[str, Any]) -> Iterator[dict[str, Any]]:
    plain = steps["fastmtl sum"]["median_s"]
    for name, entry in steps.items():
        adapter = name.removeprefix("fastmtl sum, ").split()[0]
        if name.startswith("fastmtl sum, ") and adapter in ADAPTERS:
            yield _bound(f"{adapter} over a step without", entry["median_s"] / plain - 1, ADAPTERS[adapter])


def _whole(operation: dict[str, Any]) -> str:
    return "both" if "both" in operation["passes"] else "forward"


def _copy(medians: dict[str, float]) -> float:
    return medians["copy"]


def _own(medians: dict[str, float]) -> float:
    """Of the fastest implementation of fastmtl."""
    return min(value for way, value in medians.items() if way.startswith("fastmtl "))
