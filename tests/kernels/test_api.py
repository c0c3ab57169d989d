"""Validation and dispatch of fastmtl_kernels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastmtl_kernels
from fastmtl_kernels import _native, combine, dispatch, gradvac_weights, gramian, implementations, pcgrad_weights

ROWS = torch.ones(2, 3)
ORDER = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: gramian(torch.ones(3)), r"grads .*\[T, P\].*\[3\]"),
        (lambda: gramian(torch.ones(0, 3)), r"grads .*T >= 1"),
        (lambda: gramian(torch.ones(2, 3, dtype=torch.int64)), r"grads\[0\]\[0\] .*int64"),
        (lambda: gramian([]), "grads .*at least one task"),
        (lambda: gramian([[ROWS], []]), r"grads\[1\] .*\(1\), got 0"),
        (lambda: gramian([[ROWS], [ROWS.T]]), r"grads\[1\]\[0\] .*\[2, 3\].*\[3, 2\]"),
        (lambda: gramian([[ROWS], [ROWS.half()]]), r"grads\[1\]\[0\] .*float32.*float16"),
        (lambda: gramian([[ROWS, ROWS], [ROWS, ROWS.to("meta")]]), r"grads\[1\]\[1\] .*cpu.*meta"),
        (lambda: gramian([[ROWS], ["x"]]), r"grads\[1\]\[0\] .*'x'"),  # type: ignore[list-item]
        (lambda: gramian(ROWS, "triton4"), "impl .*'triton4'"),  # type: ignore[arg-type]
        (lambda: combine(ROWS, torch.ones(3)), r"weights .*\[2\].*\[3\]"),
        (lambda: combine(ROWS, torch.ones(2, dtype=torch.int64)), "weights .*int64"),
        (lambda: combine(ROWS, [1.0, 1.0]), r"weights .*\[1.0, 1.0\]"),  # type: ignore[arg-type]
        (lambda: combine(ROWS, torch.ones(2, device="meta")), "weights .*cpu.*meta"),
        (lambda: combine(ROWS, torch.ones(2), torch.ones(4)), r"out\[0\] .*\[3\].*\[4\]"),
        (lambda: combine(ROWS, torch.ones(2), torch.ones(6)[::2]), r"out\[0\] .*not contiguous"),
        (lambda: combine(ROWS, torch.ones(2), torch.ones(3).half()), r"out\[0\] .*float16"),
        (lambda: combine(ROWS, torch.ones(2), [torch.ones(3)]), "out must be a tensor"),
        (lambda: combine([[ROWS], [ROWS]], torch.ones(2), ROWS), "out must be a list"),
        (lambda: combine([[ROWS], [ROWS]], torch.ones(2), []), "out must hold 1"),
        (lambda: pcgrad_weights(ROWS), r"gram .*\[2, 3\]"),
        (lambda: pcgrad_weights(torch.eye(2).half()), "gram .*float16"),
        (lambda: pcgrad_weights(torch.eye(2), reduction="max"), "reduction .*'max'"),  # type: ignore[arg-type]
        (lambda: pcgrad_weights(torch.eye(2), torch.tensor([0.0, 1.0])), "order .*float32"),
        (lambda: pcgrad_weights(torch.eye(2), torch.tensor([0, 1, 2])), r"order .*\[2, 2\], got \[3\]"),
        (lambda: pcgrad_weights(torch.eye(2), torch.tensor([1, 1])), r"order .*permutations.*\[1, 1\]"),
        (lambda: gradvac_weights(torch.eye(2), torch.eye(3)), r"target .*\[2, 2\].*\[3, 3\]"),
        (lambda: gradvac_weights(torch.eye(2), ORDER), "target .*int64"),
        (lambda: gradvac_weights(torch.eye(2), torch.eye(2, device="meta")), "target .*meta"),
    ],
)
def test_a_wrong_argument_is_named(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def test_an_explicit_implementation_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "why_unavailable", lambda: "no library of C++ kernels")
    with pytest.raises(RuntimeError, match="impl='cpp' .*no library of C"):
        gramian(ROWS, "cpp")
    with pytest.raises(RuntimeError, match="impl='cpp' .*no library of C"):
        combine(ROWS, torch.ones(2), impl="cpp")
    assert torch.equal(gramian(ROWS), torch.full((2, 2), 3.0))


@pytest.mark.parametrize(
    ("rows", "words"),
    [(torch.ones(2, 3, device="meta"), "CPU tensors, not meta"), (ROWS.double(), "not torch.float64")],
)
def test_cpp_says_what_it_does_not_take(rows: torch.Tensor, words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        gramian(rows, "cpp")


@pytest.mark.parametrize("impl", ["cuda", "triton"])
def test_a_gpu_s_kernels_do_not_take_cpu_tensors(impl: Any) -> None:
    with pytest.raises(RuntimeError, match=f"impl='{impl}' .*CUDA tensors, not cpu"):
        gramian(ROWS, impl)
    with pytest.raises(RuntimeError, match=f"impl='{impl}' .*CUDA tensors, not cpu"):
        combine(ROWS, torch.ones(2), impl=impl)


def test_a_missing_or_broken_library_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(_native, "__file__", str(tmp_path / "gradients.py"))
    _native.why_unavailable.cache_clear()
    try:
        assert "not built" in _native.why_unavailable()
        (tmp_path / "_C.abi3.so").write_bytes(b"no library")
        _native.why_unavailable.cache_clear()
        assert "do not load" in _native.why_unavailable()
    finally:
        _native.why_unavailable.cache_clear()


def test_the_build_s_reason_is_told_in_place_of_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(_native, "__file__", str(tmp_path / "gradients.py"))
    monkeypatch.setattr(_native, "why_unavailable", lambda: "")
    _native.why_no_cuda_library.cache_clear()
    try:
        assert "not built; with nvcc and a CUDA build of torch" in _native.why_no_cuda_library()
        (tmp_path / "_CUDA.txt").write_text("nvcc fails; install another\n")
        _native.why_no_cuda_library.cache_clear()
        told = "the CUDA kernels are not built: nvcc fails; install another; after that `make -B install` or"
        assert _native.why_no_cuda_library().startswith(told)
        (tmp_path / "_CUDA.abi3.so").write_bytes(b"no library")
        _native.why_no_cuda_library.cache_clear()
        assert "the CUDA kernels do not load" in _native.why_no_cuda_library()
    finally:
        _native.why_no_cuda_library.cache_clear()


def test_the_cuda_library_is_not_taken_for_the_c_plus_plus_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(_native, "__file__", str(tmp_path / "gradients.py"))
    (tmp_path / "_CUDA.abi3.so").touch()
    _native.why_unavailable.cache_clear()
    try:
        assert "the C++ kernels are not built" in _native.why_unavailable()
    finally:
        _native.why_unavailable.cache_clear()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_implementations_agree_with_dispatch(device: str) -> None:
    listed = implementations(device)
    # add_layer_norm_with_sum has the implementations of add_layer_norm.
    others = {"implementations", "Implementation", "add_layer_norm_with_sum"}
    assert set(listed) | others == set(fastmtl_kernels.__all__)
    for impls in listed.values():
        chosen = [impl for impl in impls if impl.auto]
        assert len(chosen) == 1 and chosen[0] == next(impl for impl in impls if impl.available)
        assert all(impl.reason for impl in impls)
    found = {impl.impl: impl.available for impl in listed["gramian"]}
    assert list(found) == ["cpp", "cuda", "triton", "reference"] and found["reference"]
    assert found["cpp"] == (device == "cpu" and not _native.why_unavailable())
    if device == "cpu" or not torch.cuda.is_available():
        assert not found["cuda"] and not found["triton"]


@pytest.mark.parametrize(
    ("cuda", "triton", "flat", "chosen"),
    [
        ("", "", True, "cuda"),
        ("", "", False, "cuda"),
        ("not built", "", True, "triton"),
        ("not built", "", False, "reference"),
        ("not built", "absent", True, "reference"),
    ],
)
def test_auto_on_a_gpu(monkeypatch: pytest.MonkeyPatch, cuda: str, triton: str, flat: bool, chosen: str) -> None:
    """auto takes CUDA where it is built, Triton for one tensor per task, else plain torch.

    An explicit choice that cannot be used raises the reason.
    """
    monkeypatch.setattr(_native, "why_no_cuda", lambda device: cuda)
    monkeypatch.setattr(dispatch, "why_no_triton", lambda: triton)
    with FakeTensorMode():
        row = torch.empty(3, device="cuda")
        rows = [row] if flat else [row, row]

        def select(impl: Any, *tensors: torch.Tensor, tasks: int = 2) -> str:
            return dispatch.select("gramian", impl, *tensors, tasks=tasks, tensors=len(tensors))

        assert select("auto", *rows) == chosen
        assert select("auto", row.double()) == "reference"
        assert select("auto", row, tasks=65) == ("reference" if triton else "triton")
        reasons = {"cuda": cuda, "triton": triton or ("" if flat else "lists of 2")}
        for impl, reason in reasons.items():
            if reason:
                with pytest.raises(RuntimeError, match=f"impl='{impl}' .*{reason}"):
                    select(impl, *rows)
            else:
                assert select(impl, *rows) == impl
        with pytest.raises(RuntimeError, match="up to 64 tasks, not 65"):
            select("cuda", row, tasks=65)
    assert next(impl for impl in implementations("cuda")["combine"] if impl.auto).impl == (
        "triton" if chosen == "reference" and not triton else chosen
    )


@pytest.mark.parametrize(
    ("operation", "largest", "reason", "auto"),
    [
        ("low_rank", {"rank": 256}, "down must have a rank of at most 256 in torch.bfloat16", "torch"),
        ("lora", {"rank": 256}, "down must have a rank of at most 256 in torch.bfloat16", "torch"),
        ("pal", {"head_dim": 128}, "num_heads must give heads of at most 128 columns in torch.bfloat16", "torch"),
        ("varlen_attention", {"head_dim": 128}, "qkv must have head_dim <= 128 in torch.bfloat16", "reference"),
    ],
)
def test_sizes_that_triton_does_not_support(
    monkeypatch: pytest.MonkeyPatch, operation: str, largest: dict[str, int], reason: str, auto: str
) -> None:
    """auto falls back to the next implementation; an explicit choice names the argument."""
    monkeypatch.setattr(dispatch, "why_no_triton", lambda: "")
    too_large = {name: size + 1 for name, size in largest.items()}
    with FakeTensorMode():
        rows = torch.empty(3, dtype=torch.bfloat16, device="cuda")
    assert dispatch.select(operation, "auto", rows, **largest) == "triton"
    assert dispatch.select(operation, "auto", rows, **too_large) == auto
    with pytest.raises(ValueError, match=f"^{reason} for impl='triton', got {next(iter(too_large.values()))}$"):
        dispatch.select(operation, "triton", rows, **too_large)


def test_why_there_is_no_triton(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dispatch.importlib, "import_module", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert dispatch.why_no_triton.__wrapped__() == "triton needs a C compiler: CC, gcc or clang"
    monkeypatch.setenv("CC", "cc")
    assert dispatch.why_no_triton.__wrapped__() == ""

    def fail(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(dispatch.importlib, "import_module", fail)
    assert "No module named 'triton'" in dispatch.why_no_triton.__wrapped__()


def test_nothing_is_recorded_for_autograd() -> None:
    rows = torch.ones(2, 3, requires_grad=True)
    assert not gramian(rows).requires_grad
    assert not combine(rows, torch.ones(2, requires_grad=True)).requires_grad


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu(dtype: torch.dtype) -> None:
    """Results equal those on the CPU, and no step of the weights waits for the device."""
    rows = torch.randn(3, 10_001, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows[1] = -rows[0] + 0.1 * rows[1]
    gram = gramian(rows.cuda())
    torch.testing.assert_close(gram.cpu(), gramian(rows), rtol=1e-5, atol=1e-2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        weights = pcgrad_weights(gram, generator=torch.Generator().manual_seed(1))
        gradvac_weights(gram, torch.zeros_like(gram))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = pcgrad_weights(gram.cpu(), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(weights.cpu(), expected)
    merged = combine(rows.cuda(), weights)
    torch.testing.assert_close(merged.cpu(), combine(rows, weights.cpu()), rtol=torch.finfo(dtype).eps, atol=1e-5)
