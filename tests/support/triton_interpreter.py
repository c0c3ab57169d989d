"""Repairs of Triton's interpreter, which otherwise fails or computes other numbers than a GPU.

The interpreter stores a bfloat16 as its bits in a uint16. Faults in Triton 3.6 to 3.9, the newest
at the time of writing:

- `InterpreterBuilder.create_dot` passes these integers to numpy, so a product of bfloat16 is off by
  1e10. The repair widens the operands first, like tensor cores: products of bfloat16 are exact in
  float32, the dtype of the sum.
- `InterpreterBuilder.cast_impl` truncates a float32, while GPUs and torch round to the nearest
  bfloat16, ties to even.

In Triton 3.6, `__index__` of a tensor calls `int()` on an array of one element, which numpy refuses
from 2.4 on. Every loop over a loaded number or an argument fails there. Later versions squeeze the
array, and so does the repair.

Each repair is also correct for a Triton without the fault: it gives the same result.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def repair() -> None:
    """Change the interpreter of this process, before a kernel runs. Requires Triton."""
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
