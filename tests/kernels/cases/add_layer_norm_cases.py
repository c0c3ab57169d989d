"""Cases of add_layer_norm and their check, for tests on CPUs, in the interpreter, on GPUs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from row_cases import DTYPES, LAYOUTS, RecordingSink, assert_close, nan_filled, split_points, strided
from torch import Tensor

from fastmtl_kernels.add_layer_norm.api import add_layer_norm, add_layer_norm_with_sum

NAMES = ("residual", "x", "weight", "bias", "ts")
SHARED = ("weight", "bias")


@dataclass(frozen=True)
class Case:
    """sizes: rows of each task, None without offsets. tail: rows of no task, NaN in them.

    with_sum: the sum is a result too, without ts. alone: without x and dropout, unless with_sum.
    """

    sizes: tuple[int, ...] | None
    tail: int
    columns: int
    dtype: torch.dtype
    parameter_dtype: torch.dtype
    layout: str
    ts: bool
    dropout_p: float
    sink: bool
    seed: int
    bias: bool = True
    with_sum: bool = False
    alone: bool = False

    @property
    def offsets(self) -> tuple[int, ...] | None:
        return None if self.sizes is None else split_points(self.sizes)

    @property
    def num_rows(self) -> int:
        return self.tail if self.offsets is None else self.offsets[-1] + self.tail

    def tensors(self, device: str) -> tuple[dict[str, Any], Tensor]:
        """Return the inputs by name, and the gradient of y."""
        made = self._made(device)
        left_out = {"ts": not self.ts or self.with_sum, "bias": not self.bias, "dsum": True, "x": not self.has_x}
        made = {name: value for name, value in made.items() if not left_out.get(name)}
        return made, made.pop("dy")

    @property
    def has_x(self) -> bool:
        return self.with_sum or not self.alone

    def gradients(self, device: str) -> list[Tensor]:
        """Return the gradient of y, and of the sum if it is a result."""
        made = self._made(device)
        return [made["dy"], made["dsum"]] if self.with_sum else [made["dy"]]

    def _made(self, device: str) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(self.seed)
        made = {}
        for name in (*NAMES, "dy", "dsum"):
            rows = name in ("residual", "x", "ts", "dy", "dsum")
            shape = (self.num_rows, self.columns) if rows else (self.columns,)
            dtype = self.dtype if rows else self.parameter_dtype
            values = torch.randn(shape, generator=generator).to(device, dtype)
            if rows and self.offsets is not None:
                values[self.offsets[-1] :] = float("nan")
            made[name] = strided(values, self.layout).detach()
        return made


def cases(max_rows: int = 90, max_columns: int = 140) -> st.SearchStrategy[Case]:
    """One-token, odd and empty tasks, with and without a tail."""
    sizes = st.lists(st.sampled_from([0, 1, 2, 7, max_rows // 2, max_rows]), min_size=1, max_size=4).map(tuple)
    return st.builds(
        Case,
        sizes=st.none() | sizes,
        tail=st.sampled_from([0, 0, 1, 5]),
        columns=st.integers(1, max_columns) | st.sampled_from([1, 8, 31, 33, max_columns]),
        dtype=st.sampled_from(DTYPES),
        parameter_dtype=st.sampled_from(DTYPES),
        layout=st.sampled_from(LAYOUTS),
        ts=st.booleans(),
        dropout_p=st.sampled_from([0.0, 0.1, 0.7]),
        sink=st.booleans(),
        seed=st.integers(0, 2**31),
        bias=st.booleans(),
        with_sum=st.booleans(),
        alone=st.booleans(),
    )


Results = tuple[dict[str, Tensor], RecordingSink]
EPS = 1e-5


def run(case: Case, impl: Any, device: str, wide: torch.dtype | None = None) -> Results:
    """Return y, y recomputed and the gradients by name, and the sink.

    Gradients that the sink receives are [T, d]; the others are autograd's.
    """
    (tensors, _), gradients = case.tensors(device), case.gradients(device)
    if wide is not None:
        tensors = {name: tensor.to(wide) for name, tensor in tensors.items()}
        gradients = [gradient.to(wide) for gradient in gradients]
    for tensor in tensors.values():
        tensor.requires_grad_()
    sink = RecordingSink()
    offsets = None if case.offsets is None else torch.tensor(case.offsets, dtype=torch.int32, device=device)
    use_sink = case.sink and offsets is not None
    makers: list[Callable[[], Tensor]] = []
    operation: Callable[..., Any] = add_layer_norm_with_sum if case.with_sum else add_layer_norm
    found = operation(
        **{"x": None, "bias": None, **tensors},
        dropout_p=case.dropout_p if case.has_x else 0.0,
        eps=EPS,
        seed=torch.tensor([case.seed * 2**20 + 1], device=device),
        token_offsets=offsets,
        task_grads=sink if use_sink else None,
        register=lambda _, make: makers.append(make),
        impl=impl,
    )
    *sums, y = found if case.with_sum else (found,)
    results = dict(zip(("y", "z"), (part.detach() for part in (y, *sums)), strict=False))
    if makers:
        results["y again"] = makers[0]()
    torch.autograd.backward([y, *sums], gradients)
    for name, tensor in tensors.items():
        if use_sink and name in SHARED:
            assert tensor.grad is None and id(tensor) in sink.expected
            results[name] = sink.dense[id(tensor)]
        else:
            assert tensor.grad is not None and tensor.grad.dtype == tensor.dtype
            results[name] = tensor.grad
    return results, sink


def check(case: Case, impl: Any, device: str = "cpu") -> None:
    """Check y and all gradients: error against float64, bits of two runs, unwritten memory."""
    found, _ = nan_filled(lambda: run(case, impl, device))
    assert torch.equal(found["y"], found.pop("y again"))
    again, _ = run(case, impl, device)
    exact, _ = run(case, "reference", device, torch.float64)
    oracle, _ = run(case, "reference", device)
    (tensors, _), (dy, *dsums) = case.tensors(device), case.gradients(device)
    stop = case.num_rows if case.offsets is None else case.offsets[-1]
    z = sum_of_parts(tensors)[:stop]
    assert found.keys() == exact.keys()
    if case.num_rows == 0 or stop == 0:
        assert all(torch.equal(found[name], torch.zeros_like(found[name])) for name in found)
        return
    rstd = (z.var(-1, unbiased=False) + EPS).rsqrt()[:, None]
    bias = tensors.get("bias", torch.zeros(1))
    g = dy[:stop].double().abs() * tensors["weight"].double().abs()
    # A rounding of z is relative to its largest element, and moves h by rstd times as much.
    moved = (z.abs().amax(-1, keepdim=True) * rstd).clamp(min=1)
    rows_scale = (g.amax(-1, keepdim=True) * rstd * moved * (1 + rstd * z.abs().amax())).max() / (1 - case.dropout_p)
    rows_scale = rows_scale + sum(dsum[:stop].double().abs().max() for dsum in dsums) / (1 - case.dropout_p)
    sums_scale = (dy[:stop].double().abs() * moved).sum(0).max()
    scales = {
        "y": (moved * tensors["weight"].double().abs()).max() + bias.double().abs().max(),
        "z": z.abs().max() / (1 - case.dropout_p),
        "residual": rows_scale,
        "x": rows_scale,
        "ts": rows_scale,
        "weight": sums_scale,
        "bias": dy[:stop].double().abs().sum(0).max(),
    }
    for name, value in found.items():
        assert torch.equal(value, again[name]), f"{name} differs between two runs"
        dtype = case.dtype if case.dtype != torch.float32 else value.dtype
        assert_close(value, exact[name].double(), oracle[name], scales[name], dtype, on_average=case.columns >= 32)
        if name not in SHARED:
            assert not value[stop:].any(), f"{name} is not zero in the tail"


def sum_of_parts(tensors: dict[str, Tensor]) -> Tensor:
    """Return z without dropout, float64, for magnitudes."""
    return sum((tensors[name].double() for name in ("x", "ts") if name in tensors), tensors["residual"].double())
