"""Parts of a model that torch.compile has compiled; surgery's modules run between their graphs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from fastmtl.errors import UserError
from fastmtl.surgery.attach.forward import OUTSIDE, compiler_is_imported
from fastmtl.surgery.attach.sites import Site


def check_compiled(model: nn.Module, sites: Sequence[Site], per_task: str) -> None:
    """Raise UserError for a compiled module that runs outside of graphs as a whole.

    per_task: of the target, for the message.
    """
    compiled = dict[int, tuple[str, nn.Module]]()
    for name, module in model.named_modules():
        if getattr(module, "_compiled_call_impl", None) is not None or type(module).__name__ == "OptimizedModule":
            inner = getattr(module, "_orig_mod", module)
            compiled |= {id(module): (name, inner), id(inner): (name, inner)}
    for site in sites:
        for module in (site.module,) if site.beneath is None else site.module.modules():
            if id(module) not in compiled:
                continue
            name, inner = compiled[id(module)]
            which = f"module {name} ({type(inner).__name__}) is compiled" if name else "model: it is compiled"
            raise UserError(
                f"{which} as a whole (torch.compile), but {OUTSIDE}: compile smaller blocks that have no shared "
                f"parameter of their own and do not run once per task, compile nothing, or use {per_task}"
            )


@contextmanager
def explained() -> Iterator[None]:
    """Raise UserError for a block that is compiled with fullgraph=True."""
    try:
        yield
    except RuntimeError as error:
        if OUTSIDE not in str(error):
            raise
        raise UserError(
            f"model: a block is compiled with fullgraph=True, but {OUTSIDE}: compile it without fullgraph"
        ) from None


def eager() -> AbstractContextManager[Any]:
    """Return the context in which compiled functions run as they were before torch.compile."""
    return torch.compiler.set_stance("force_eager") if compiler_is_imported() else nullcontext()
