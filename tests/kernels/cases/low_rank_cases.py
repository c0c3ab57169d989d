"""Cases of low_rank and their check, for its tests on CPUs, in the interpreter and on GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from row_cases import DTYPES, LAYOUTS, assert_close, nan_filled, split_points, strided
from torch import Tensor

from fastmtl_kernels.task_maps.low_rank import low_rank

ACTIVATIONS = ["identity", "gelu", "relu"]


@dataclass(frozen=True)
class Case:
    """sizes: rows of each task. tail: rows of no task, NaN in them.

    rates: dropout, cut to the number of tasks. transposed: the parameters' memory is [T, out, in],
    as that of torch's linear layers. out: columns of y; None for `columns`.
    """

    sizes: tuple[int, ...]
    tail: int
    columns: int
    rank: int
    dtype: torch.dtype
    layout: str
    transposed: bool
    down_bias: bool
    up_bias: bool
    activation: str
    rates: tuple[float, ...] | float | None
    seed: int
    out: int | None = None

    @property
    def offsets(self) -> tuple[int, ...]:
        return split_points(self.sizes)

    @property
    def dropout_p(self) -> tuple[float, ...] | float | None:
        return self.rates[: len(self.sizes)] if isinstance(self.rates, tuple) else self.rates

    def tensors(self, device: str) -> tuple[dict[str, Any], Tensor]:
        """Return the inputs by name, and the gradient of y."""
        generator = torch.Generator().manual_seed(self.seed)
        num_tasks, out = len(self.sizes), self.out or self.columns
        shapes = {
            "x": (self.offsets[-1] + self.tail, self.columns),
            "down": (num_tasks, self.columns, self.rank),
            "up": (num_tasks, self.rank, out),
            "down_bias": (num_tasks, self.rank),
            "up_bias": (num_tasks, out),
        }
        made = {}
        for name in (*shapes, "dy"):
            shape = shapes.get(name, (shapes["x"][0], out))
            values = torch.randn(shape, generator=generator)
            if len(shape) == 3 and not (self.activation == "relu" and name == "down"):
                values /= shape[1] ** 0.5
            if self.activation == "relu" and name in ("x", "down", "down_bias"):
                # Exact sums: no rounding moves a sum across relu's kink.
                values = (2 * values).round()
            values = values.to(device, self.dtype)
            if name in ("x", "dy"):
                values[self.offsets[-1] :] = float("nan")
                values = strided(values, self.layout)
            elif self.transposed and len(shape) == 3:
                values = values.mT.contiguous().mT
            made[name] = values.detach()
        for name in ("down_bias", "up_bias"):
            if not getattr(self, name):
                del made[name]
        return made, made.pop("dy")


def cases(max_rows: int = 90, max_columns: int = 140, max_rank: int = 70) -> st.SearchStrategy[Case]:
    """One-token, odd and empty tasks, with and without a tail."""
    return st.builds(
        Case,
        sizes=st.lists(st.sampled_from([0, 1, 2, 7, max_rows // 2, max_rows]), min_size=1, max_size=4).map(tuple),
        tail=st.sampled_from([0, 0, 1, 5]),
        columns=st.integers(1, max_columns) | st.sampled_from([1, 8, 31, 33, max_columns]),
        rank=st.integers(1, max_rank) | st.sampled_from([1, 8, 16, 17, max_rank]),
        dtype=st.sampled_from(DTYPES),
        layout=st.sampled_from(LAYOUTS),
        transposed=st.booleans(),
        down_bias=st.booleans(),
        up_bias=st.booleans(),
        activation=st.sampled_from(ACTIVATIONS),
        rates=st.sampled_from([None, 0.0, 0.3, (0.5, 0.0, 0.1, 0.9)]),
        seed=st.integers(0, 2**31),
        out=st.sampled_from([None, None, 1, 33]),
    )


def run(case: Case, impl: Any, device: str, wide: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return y and the gradients by name."""
    tensors, dy = case.tensors(device)
    if wide is not None:
        tensors, dy = {name: tensor.to(wide) for name, tensor in tensors.items()}, dy.to(wide)
    for tensor in tensors.values():
        tensor.requires_grad_()
    y = low_rank(
        **tensors,
        token_offsets=torch.tensor(case.offsets, dtype=torch.int32, device=device),
        activation=case.activation,  # type: ignore[arg-type]
        dropout_p=case.dropout_p,
        seed=torch.tensor([case.seed * 2**20 + 1], device=device),
        impl=impl,
    )
    return {"y": y.detach()} | dict(zip(tensors, torch.autograd.grad(y, list(tensors.values()), dy), strict=True))


def check(case: Case, impl: Any, device: str = "cpu") -> None:
    """Check y and all gradients: error against float64, bits of two runs, unwritten memory."""
    found = nan_filled(lambda: run(case, impl, device))
    again = run(case, impl, device)
    exact = run(case, "reference", device, torch.float64)
    oracle = run(case, "reference", device)
    scales = magnitudes(case, device)
    stop = case.offsets[-1]
    for name, value in found.items():
        assert value.dtype == case.dtype
        assert torch.equal(value, again[name]), f"{name} differs between two runs"
        assert_close(value, exact[name], oracle[name], scales[name], case.dtype)
        if name in ("y", "x"):
            assert not value[stop:].any(), f"{name} is not zero in the tail"
        for task, size in enumerate(case.sizes):
            assert name in ("y", "x") or size or not value[task].any(), f"{name} of an absent task is not zero"


def magnitudes(case: Case, device: str) -> dict[str, float]:
    """Return each result with absolute values of all products, the scale of its roundings."""
    tensors, dy = case.tensors(device)
    part = {name: tensor.double().abs() for name, tensor in tensors.items()}
    rates = case.dropout_p if isinstance(case.dropout_p, tuple) else (case.dropout_p or 0.0,) * len(case.sizes)
    largest = dict.fromkeys(("y", *tensors), 0.0)
    for task, rate in enumerate(rates):
        start, stop = case.offsets[task : task + 2]
        if start == stop:
            continue
        x, down, up = part["x"][start:stop], part["down"][task], part["up"][task]
        z = x @ down + (part["down_bias"][task] if case.down_bias else 0)
        y = z @ up + (part["up_bias"][task] if case.up_bias else 0)
        # A rounding of z moves gelu' by as much, so that dh gets it times z.
        g = dy[start:stop].double().abs() / (1 - rate)
        dh = (g @ up.T) * (1 + (z if case.activation == "gelu" else 0))
        found = {
            "y": y / (1 - rate), "x": dh @ down.T, "down": x.T @ dh, "down_bias": dh.sum(0), "up": z.T @ g,
            "up_bias": g.sum(0),
        }  # fmt: skip
        for name in largest:
            largest[name] = max(largest[name], float(found[name].max()))
    return largest
