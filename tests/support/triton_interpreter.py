"""Repairs of Triton's interpreter, without which it computes other numbers than a GPU, or none.

The interpreter keeps a bfloat16 as its bits in a uint16. In Triton 3.6 to 3.9, the newest when this was written:

- `InterpreterBuilder.create_dot` hands numpy these integers, so that a product of bfloat16 is off by 1e10. Here the
  operands are widened first. That is what tensor cores do: products of bfloat16 are exact in float32, as is the sum's
  dtype.
- `InterpreterBuilder.cast_impl` cuts a float32 off where GPUs round to the nearest bfloat16, ties to even, as torch.

In Triton 3.6, `__index__` of a tensor calls `int()` of an array of one element, which numpy refuses from 2.4 on; every
loop over a number that the kernel loads or is given ends there. Later versions squeeze the array, as is done here.

Each repair is right for a Triton without the fault, too: it computes what that one would.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def repair() -> None:
    """Change the interpreter of this process, before a kernel runs. Triton has to be installed."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    dot, cast, patch = builder.create_dot, builder.cast_impl, interpreter._patch_lang_tensor

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        wide = (cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, *wide, *rest)

    def cast_impl(self: Any, source: Any, kind: Any) -> Any:
        if source.dtype.scalar != tl.float32 or kind.scalar != tl.bfloat16:
            return cast(self, source, kind)
        rounded = torch.from_numpy(np.array(source.data)).to(torch.bfloat16).view(torch.int16).numpy()
        return interpreter.TensorHandle(rounded.view(np.uint16), tl.bfloat16)

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    builder.create_dot, builder.cast_impl = create_dot, cast_impl
    interpreter._patch_lang_tensor = patch_lang_tensor
