"""Cases of embed_layer_norm and their check, for tests on CPUs, in the interpreter and on GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from row_cases import DTYPES, LAYOUTS, RecordingSink, assert_close, nan_filled, split_points, strided
from torch import Tensor

from fastmtl_kernels.embed_layer_norm.api import embed_layer_norm

TABLES = {"words": 53, "positions": 17, "types": 2}
IDS = {"input_ids": "words", "position_ids": "positions", "token_type_ids": "types"}
EPS = 1e-5


@dataclass(frozen=True)
class Case:
    """sizes: rows of each task, None without offsets. tail: rows of no task.

    left_out: the parameters that the model does not have.
    """

    sizes: tuple[int, ...] | None
    tail: int
    columns: int
    dtype: torch.dtype
    id_dtype: torch.dtype
    layout: str
    dropout_p: float
    sink: bool
    seed: int
    left_out: tuple[str, ...] = ()

    @property
    def offsets(self) -> tuple[int, ...] | None:
        return None if self.sizes is None else split_points(self.sizes)

    @property
    def num_rows(self) -> int:
        return self.tail if self.offsets is None else self.offsets[-1] + self.tail

    def tensors(self, device: str) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """Return the ids, the parameters and the gradient of y, which has NaN in its tail."""
        generator = torch.Generator().manual_seed(self.seed)
        ids = {
            name: torch.randint(TABLES[table], (self.num_rows,), generator=generator).to(device, self.id_dtype)
            for name, table in IDS.items()
            if table not in self.left_out
        }
        shapes: dict[str, tuple[int, ...]] = {name: (size, self.columns) for name, size in TABLES.items()}
        shapes |= {"weight": (self.columns,), "bias": (self.columns,)}
        parameters = {
            name: strided(torch.randn(shape, generator=generator).to(device, self.dtype), self.layout)
            for name, shape in shapes.items()
            if name not in self.left_out
        }
        dy = torch.randn(self.num_rows, self.columns, generator=generator).to(device, self.dtype)
        if self.offsets is not None:
            dy[self.offsets[-1] :] = float("nan")
        return ids, parameters, strided(dy, self.layout)


def cases(max_rows: int = 90, max_columns: int = 140) -> st.SearchStrategy[Case]:
    """One-token, odd and empty tasks, with and without a tail."""
    sizes = st.lists(st.sampled_from([0, 1, 2, 7, max_rows // 2, max_rows]), min_size=1, max_size=4).map(tuple)
    return st.builds(
        Case,
        sizes=st.none() | sizes,
        tail=st.sampled_from([0, 0, 1, 5]),
        columns=st.integers(1, max_columns) | st.sampled_from([1, 8, 31, 33, max_columns]),
        dtype=st.sampled_from(DTYPES),
        id_dtype=st.sampled_from([torch.int64, torch.int32]),
        layout=st.sampled_from(LAYOUTS),
        dropout_p=st.sampled_from([0.0, 0.1, 0.7]),
        sink=st.booleans(),
        seed=st.integers(0, 2**31),
        left_out=st.sets(st.sampled_from(["positions", "types", "bias"])).map(sorted).map(tuple),
    )


def run(case: Case, impl: Any, device: str, wide: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return y and the gradients by name; those that a sink receives are [T, ...]."""
    ids, parameters, dy = case.tensors(device)
    if wide is not None:
        parameters, dy = {name: tensor.to(wide) for name, tensor in parameters.items()}, dy.to(wide)
    for parameter in parameters.values():
        parameter.requires_grad_()
    sink = RecordingSink(anchor=torch.zeros((), device=device, requires_grad=True))
    offsets = None if case.offsets is None else torch.tensor(case.offsets, dtype=torch.int32, device=device)
    use_sink = case.sink and offsets is not None
    y = embed_layer_norm(
        **{**dict.fromkeys((*IDS, *TABLES, "bias")), **ids, **parameters},  # type: ignore[arg-type]
        dropout_p=case.dropout_p,
        eps=EPS,
        seed=torch.tensor([case.seed * 2**20 + 1], device=device),
        token_offsets=offsets,
        task_grads=sink if use_sink else None,
        impl=impl,
    )
    assert y.dtype == parameters["words"].dtype
    y.backward(dy)
    results = {"y": y.detach()}
    if use_sink:
        assert sorted(sink.expected) == sorted(id(parameter) for parameter in parameters.values())
        assert sink.anchor.grad is not None and sink.anchor.grad == 0
    for name, parameter in parameters.items():
        if use_sink:
            assert parameter.grad is None
            results[name] = sink.table(parameter) if name in TABLES else sink.dense[id(parameter)]
        else:
            assert parameter.grad is not None and parameter.grad.dtype == parameter.dtype
            results[name] = parameter.grad
    return results


def check(case: Case, impl: Any, device: str = "cpu") -> None:
    """Check y and all gradients: error against float64, bits of two runs, unwritten memory."""
    found = nan_filled(lambda: run(case, impl, device))
    again = run(case, impl, device)
    exact, oracle = run(case, "reference", device, torch.float64), run(case, "reference", device)
    ids, parameters, dy = case.tensors(device)
    stop = case.num_rows if case.offsets is None else case.offsets[-1]
    assert found.keys() == exact.keys()
    for name, value in found.items():
        assert torch.equal(value, again[name]), f"{name} differs between two runs"
    assert not found["y"][stop:].any()
    if stop == 0:
        assert not any(value.any() for value in found.values())
        return
    z = torch.stack([parameters[IDS[name]].double()[index.long()] for name, index in ids.items()]).sum(0)[:stop]
    rstd = (z.var(-1, unbiased=False) + EPS).rsqrt()[:, None]
    h = dy[:stop].double().abs() / (1 - case.dropout_p)
    moved = (z.abs().amax(-1, keepdim=True) * rstd).clamp(min=1)
    g = (h * parameters["weight"].double().abs()).amax(-1, keepdim=True)
    dz = (g * rstd * moved * (1 + rstd * z.abs().amax())).max()
    y_scale = (moved * parameters["weight"].double().abs()).max()
    y_scale = y_scale + parameters.get("bias", torch.zeros(1)).double().abs().max()
    scales = {"y": y_scale / (1 - case.dropout_p), "weight": (h * moved).sum(0).max(), "bias": h.sum(0).max()}
    for name, value in found.items():
        scale = scales.get(name, dz * stop)
        assert_close(value, exact[name].double(), oracle[name], scale, case.dtype, on_average=case.columns >= 32)
