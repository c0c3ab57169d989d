"""Comparison of measured performance on a GPU with the performance targets of the design.

A missed target is reported, and is not an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

SURGERY = "pcgrad stacked bf16"
RECORDED_SURGERY, RECORDED_JOINT = "pcgrad bf16, CUDA graphs", "sum, CUDA graphs"
OVERHEAD = {3: 0.08, 8: 0.15}  # most extra time of SURGERY, relative to the joint step, by the number of tasks
SHARE = 0.85  # least speed of the operations below, relative to a copy of as many bytes
ROW_WISE = ("add_layer_norm", "embed_layer_norm", "pool mean", "pool max")
TASK_GRADIENTS = ("gramian", "combine")  # one target for the sum of their times
ATTENTION_S = 6e-4  # most time of forward and backward, all layers of BERT-base, 8,192 tokens
ATTENTION_PEERS = ("torch varlen, no dropout", "sdpa padded", "sdpa nested")
# Least number of real tokens per second in the joint step of BERT-base, by a word of the GPU's
# name.
SPEEDS = {"H200": 0.7e6, "H100": 0.55e6}
TO_TRANSFORMERS = {"transformers": 4.0, "transformers compiled": 2.0}  # least time over that of fastmtl's joint step
SHORT_TOKENS, SHORT_S = 1000, 3e-3  # most time of a short engine step with flat parameters and CUDA graphs
PREDICTED = 0.05  # largest error of the predicted peak memory, relative to the measured one
ADAPTERS = {"pal": 0.10, "low_rank": 0.04}  # most extra time, relative to a step without an adapter


def bounds(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a list with one dict for each measured target: what, measured, bound, holds.

    result: may contain "step", "step-compiled", "graphs", "kernels" and "adapters", as their
    benchmarks return them, complete or not; "surgery", "engine" and "profile", lists of such
    results; "environment", whose device selects the targets of speed.
    """
    device = result.get("environment", {}).get("device", "")
    found = [*_steps(result, device), *_surgery(result.get("surgery", [])), *_engine(result.get("engine", []))]
    found += _profile(result.get("profile", []))
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
        variants = part["variants"]
        if SURGERY in variants and part["tasks"] in OVERHEAD:
            yield _bound(what, variants[SURGERY]["ratio_to_joint"] - 1, OVERHEAD[part["tasks"]])
        if RECORDED_SURGERY in variants and RECORDED_JOINT in variants and part["tasks"] in OVERHEAD:
            ratio = variants[RECORDED_SURGERY]["median_s"] / variants[RECORDED_JOINT]["median_s"]
            yield _bound(f"{what}, both as CUDA graphs", ratio - 1, OVERHEAD[part["tasks"]])


def _steps(result: dict[str, Any], device: str) -> Iterator[dict[str, Any]]:
    for key, ours in (
        ("step", "fastmtl sum"),
        ("step-compiled", "fastmtl sum"),
        ("graphs", "fastmtl sum, CUDA graphs"),
    ):
        part = result.get(key)
        if part is None or ours not in part["steps"]:
            continue
        seconds = part["steps"][ours]["median_s"]
        what = f"{part['shape']['name']}, {part['tokens']} tokens"
        for word, least in SPEEDS.items():
            if word in device and key != "step-compiled" and part["shape"]["name"] == "bert-base":
                yield _bound(f"real tokens/s of {ours}, {what}", part["tokens"] / seconds, least, least=True)
        peer = "transformers compiled" if key == "step-compiled" else "transformers"
        if key != "graphs" and peer in part["steps"]:
            ratio = part["steps"][peer]["median_s"] / seconds
            yield _bound(f"time of {peer} over {ours}, {what}", ratio, TO_TRANSFORMERS[peer], least=True)


def _engine(parts: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for part in parts:
        for name, entry in part["ways"].items():
            if part["tokens"] <= SHORT_TOKENS and {"flat", "graphs"} <= set(name.split(", ")):
                what = f"ms of an engine's step, {name}, {part['shape']['name']}, {part['tokens']} tokens"
                yield _bound(what, 1e3 * entry["median_s"], 1e3 * SHORT_S)


def _profile(parts: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for part in parts:
        for point in part["points"]:
            if "error" in point:
                what = f"error of the predicted peak, {point['series']}, batch size {point['batch_size']}"
                yield _bound(what, abs(point["error"]), PREDICTED)


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
    """Return the median seconds of fastmtl's fastest implementation."""
    return min(value for way, value in medians.items() if way.startswith("fastmtl "))
