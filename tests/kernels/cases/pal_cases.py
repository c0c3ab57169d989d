"""Cases of pal and their check, for its tests on CPUs, in the interpreter and on GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from hypothesis import strategies as st
from row_cases import DTYPES, LAYOUTS, assert_close, nan_filled, strided
from torch import Tensor

from fastmtl_kernels.task_maps.pal import pal

ACTIVATIONS = ["identity", "gelu", "relu"]


@dataclass(frozen=True)
class Case:
    """lengths: of each task's sequences. tail: rows of no task, NaN in them.

    The other fields are those of low_rank_cases.
    """

    lengths: tuple[tuple[int, ...], ...]
    tail: int
    columns: int
    num_heads: int
    head_dim: int
    dtype: torch.dtype
    layout: str
    transposed: bool
    biases: bool
    activation: str
    dropout_p: float
    rate: float
    seed: int

    @property
    def offsets(self) -> tuple[int, ...]:
        return 0, *accumulate(sum(lengths) for lengths in self.lengths)

    @property
    def cu_seqlens(self) -> tuple[int, ...]:
        return 0, *accumulate(length for lengths in self.lengths for length in lengths)

    def tensors(self, device: str) -> tuple[dict[str, Any], Tensor]:
        """Return the inputs by name, and the gradient of y."""
        generator = torch.Generator().manual_seed(self.seed)
        num_tasks, size = len(self.lengths), self.num_heads * self.head_dim
        shapes = {
            "x": (self.offsets[-1] + self.tail, self.columns),
            "down": (num_tasks, self.columns, size),
            "qkv": (num_tasks, size, 3 * size),
            "up": (num_tasks, size, self.columns),
        }
        if self.biases or self.activation == "relu":
            shapes |= {"down_bias": (num_tasks, size), "qkv_bias": (num_tasks, 3 * size)}
            shapes |= {"up_bias": (num_tasks, self.columns)}
        made = {}
        for name in (*shapes, "dy"):
            shape = shapes.get(name, shapes["x"])
            values = torch.randn(shape, generator=generator)
            if len(shape) == 3:
                values /= shape[1] ** 0.5
            if self.activation == "relu" and name == "up_bias":
                # No rounding moves a sum across relu's kink.
                values = 32 * values.sign()
            values = values.to(device, self.dtype)
            if name in ("x", "dy"):
                values[self.offsets[-1] :] = float("nan")
                values = strided(values, self.layout)
            elif self.transposed and len(shape) == 3:
                values = values.mT.contiguous().mT
            made[name] = values.detach()
        return made, made.pop("dy")


def cases(max_length: int = 40, max_columns: int = 100, max_head_dim: int = 20) -> st.SearchStrategy[Case]:
    """One-token and empty sequences, tasks without sequences, with and without a tail."""
    lengths = st.lists(st.sampled_from([0, 1, 2, 7, max_length]), max_size=3).map(tuple)
    return st.builds(
        Case,
        lengths=st.lists(lengths, min_size=1, max_size=3).map(tuple),
        tail=st.sampled_from([0, 0, 1, 5]),
        columns=st.integers(1, max_columns),
        num_heads=st.sampled_from([1, 2, 3]),
        head_dim=st.integers(1, max_head_dim),
        dtype=st.sampled_from(DTYPES),
        layout=st.sampled_from(LAYOUTS),
        transposed=st.booleans(),
        biases=st.booleans(),
        activation=st.sampled_from(ACTIVATIONS),
        dropout_p=st.sampled_from([0.0, 0.2]),
        rate=st.sampled_from([0.0, 0.3]),
        seed=st.integers(0, 2**31),
    )


def run(case: Case, impl: Any, device: str, wide: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return y and the gradients by name."""
    tensors, dy = case.tensors(device)
    if wide is not None:
        tensors, dy = {name: tensor.to(wide) for name, tensor in tensors.items()}, dy.to(wide)
    for tensor in tensors.values():
        tensor.requires_grad_()
    y = pal(
        **tensors,
        cu_seqlens=torch.tensor(case.cu_seqlens, dtype=torch.int32, device=device),
        token_offsets=torch.tensor(case.offsets, dtype=torch.int32, device=device),
        num_heads=case.num_heads,
        activation=case.activation,  # type: ignore[arg-type]
        dropout_p=case.dropout_p,
        out_dropout_p=case.rate,
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
    for name, value in found.items():
        assert value.dtype == case.dtype
        assert torch.equal(value, again[name]), f"{name} differs between two runs"
        if name in ("y", "x"):
            assert not value[case.offsets[-1] :].any(), f"{name} is not zero in the tail"
        assert_close(value, exact[name], oracle[name], scales[name], case.dtype)


def magnitudes(case: Case, device: str) -> dict[str, float]:
    """Return each result with absolute values of all products, the scale of its roundings."""
    tensors, dy = case.tensors(device)
    largest = dict.fromkeys(("y", *tensors), 0.0)
    scale = case.head_dim**-0.5
    for task, lengths in enumerate(case.lengths):
        start = case.offsets[task]
        down, qkv, up = (tensors[name][task].double() for name in ("down", "qkv", "up"))
        down_bias, qkv_bias, up_bias = (
            tensors[name][task].double() if name in tensors else 0.0 for name in ("down_bias", "qkv_bias", "up_bias")
        )
        sums: dict[str, Tensor | float] = dict.fromkeys(tensors, 0.0)
        for length in lengths:
            if not length:
                continue
            x = tensors["x"][start : start + length].double()
            g = dy[start : start + length].double().abs() / (1 - case.rate)
            start += length
            e = x @ down + down_bias
            q, k, v = (e @ qkv + qkv_bias).view(length, 3, case.num_heads, -1).permute(1, 2, 0, 3)
            scores = scale * q @ k.mT
            p = scores.softmax(-1) / (1 - case.dropout_p)
            # A rounding of a score, or of its operands, moves P by as much.
            moved = 1 + scale * (q.abs() @ k.abs().mT).max()
            z = (p @ v.abs() * moved).transpose(0, 1).flatten(1)
            dz = (g @ up.abs().T * (2 + z.abs().max())).unflatten(1, (case.num_heads, -1)).transpose(0, 1)
            dp = dz @ v.abs().mT
            ds = p * (dp + (p * dp).sum(-1, keepdim=True)) * moved * scale
            parts = torch.stack([ds @ k.abs(), ds.mT @ q.abs(), p.mT @ dz * moved])
            dqkv = parts.permute(2, 0, 1, 3).flatten(1)
            de = dqkv @ qkv.abs().T
            y = z @ up.abs() + torch.as_tensor(up_bias).abs()
            found = {"y": y / (1 - case.rate), "x": de @ down.abs().T}
            summed = {
                "down": x.abs().T @ de, "qkv": e.abs().T @ dqkv, "up": z.T @ g, "down_bias": de.sum(0),
                "qkv_bias": dqkv.sum(0), "up_bias": g.sum(0),
            }  # fmt: skip
            for name in sums.keys() & summed.keys():
                sums[name] = sums[name] + summed[name]
            for name, value in found.items():
                largest[name] = max(largest[name], float(value.max()))
        for name, value in sums.items():
            largest[name] = max(largest[name], float(torch.as_tensor(value).max()))
    return largest
