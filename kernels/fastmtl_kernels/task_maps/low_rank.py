"""Low-rank adapters of all tasks in one operation, on packed rows.

    y = dropout(activation(x down_t + down_bias_t) up_t + up_bias_t)      for the rows of task t

x [N, d], y [N, e]; down [T, d, r], up [T, r, e], down_bias [T, r], up_bias [T, e]. Dropout has a
probability for each task; its mask is that of fastmtl_kernels.philox. Triton needs one launch in
forward and three in backward: the rows, the partial gradients of the weights, and their sums.

Source: Stickland & Murray, BERT and PALs, 2019, section 3.1; Hu et al., LoRA, 2021.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastmtl_kernels.dispatch import select
from fastmtl_kernels.task_maps.common import (
    Activation,
    Impl,
    check_activation,
    check_parameter,
    check_rows,
    task_rates,
    to_autocast,
)
from fastmtl_kernels.task_maps.function import maps
from fastmtl_kernels.task_sink import TaskRows, TokenOffsets


def low_rank(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    token_offsets: TokenOffsets,
    *,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    activation: Activation = "identity",
    dropout_p: float | Sequence[float] | None = None,
    seed: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Return y = dropout(activation(x down_t + down_bias_t) up_t + up_bias_t) for all tasks t.

    Args:
        x: [N, d], floating point, any strides.
        down: [T, d, r]. Parameters of another dtype than x's are converted. A transposed view of a
            tensor [T, r, d] is as fast.
        up: [T, r, e], or a transposed view of a tensor [T, e, r].
        token_offsets: task t has the rows token_offsets[t]:token_offsets[t + 1]. An int32 [T + 1]
            on x's device, or a sequence of T + 1 integers, or an object with both as `offsets` and
            `host`. impl "torch" and "reference" need the integers, and wait for a GPU if only the
            tensor is given. A task may have no rows; its gradients are zero. Rows past the last
            offset are padding: zeros in y and in x's gradient.
        down_bias: [T, r].
        up_bias: [T, e].
        activation: "identity", "gelu" (by erf) or "relu".
        dropout_p: the probability of dropping an element of y, in [0, 1): one number, or one for
            each task.
        seed: int64 of one element on x's device; needed if any dropout_p > 0. Each call in a step
            needs its own seed, since equal seeds drop equal elements.
        impl: "auto", "reference", "torch" or "triton" (CUDA tensors, r <= 256, in float32 r <= 64).

    Returns:
        y [N, e] of x's dtype.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value; the message names it.
        RuntimeError: the implementation is not available here; the message gives the reason.
    """
    check_rows(x)
    tasks = TaskRows.make(token_offsets, x.shape[0], x.device)
    num_tasks = tasks.num_tasks
    check_parameter("down", down, (num_tasks, x.shape[1], None), x, "[T, d, r]")
    rank = down.shape[2]
    check_parameter("up", up, (num_tasks, rank, None), x, "[T, r, e]")
    if down_bias is not None:
        check_parameter("down_bias", down_bias, (num_tasks, rank), x, "[T, r]")
    if up_bias is not None:
        check_parameter("up_bias", up_bias, (num_tasks, up.shape[2]), x, "[T, e]")
    check_activation(activation)
    rates = task_rates("dropout_p", dropout_p, num_tasks, seed, x.device)
    x = to_autocast(x)
    chosen = select("low_rank", impl, x, rank=rank)
    return maps(x, down, down_bias, up, up_bias, tasks=tasks, impl=chosen, middle=activation, rates=rates, seed=seed)


def lora(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    token_offsets: TokenOffsets,
    down_bias: Tensor,
    up_bias: Tensor,
    *,
    dropout_p: float | Sequence[float] | None = None,
    seed: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Return low_rank with both biases and without an activation.

    The arguments, result and errors are those of `low_rank`.

    y = dropout((x down_t + down_bias_t) up_t + up_bias_t)
    """
    for name, bias in (("down_bias", down_bias), ("up_bias", up_bias)):
        if bias is None:
            raise ValueError(f"{name} must be given: lora has both biases; low_rank takes any of them or none")
    return low_rank(
        x, down, up, token_offsets, down_bias=down_bias, up_bias=up_bias, dropout_p=dropout_p, seed=seed, impl=impl
    )
