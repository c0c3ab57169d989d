"""Programs of torch.export from padded models, with dynamic numbers of texts, tokens and pairs."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_unflatten

from fastmtl.errors import UserError
from fastmtl.inference.exported.feeds import Run
from fastmtl.model.padded import PaddedModel

# Dimensions of the inputs by name; the graphs of ONNX have the same names.
TEXTS, TOKENS, PAIRS = "texts", "tokens", "pairs"
_TRIED = (3, 7)  # texts and tokens of the inputs for tracing; 0 and 1 would become constants


def trace(model: PaddedModel, max_length: int) -> ExportedProgram:
    """Return the program of a padded model in evaluation mode; its parameters need no gradients.

    Its inputs are keyword arguments with `model.inputs` as names. max_length: largest number of
    tokens of a text. Raises UserError for an encoder that torch.export cannot trace.
    """
    texts, tokens = _TRIED
    ids = torch.full((texts, tokens), 5)
    mask = (torch.arange(tokens) < torch.tensor([[tokens], [tokens - 2], [2]])).long()
    given = {
        "input_ids": ids,
        "attention_mask": mask,
        "token_type_ids": torch.zeros_like(ids),
        "pairs": torch.tensor([[0, 1], [1, 2]]),
    }
    rows, columns = Dim(TEXTS, min=1), Dim(TOKENS, min=1, max=max_length)
    dims = {name: {0: rows, 1: columns} for name in given} | {"pairs": {0: Dim(PAIRS, min=0)}}
    module = model.eval().requires_grad_(False)
    try:
        with torch.no_grad(), quiet():
            return torch.export.export(
                module,
                (),
                {name: given[name] for name in model.inputs},
                dynamic_shapes={name: dims[name] for name in model.inputs},
                strict=False,
            )
    except Exception as error:  # torch.export raises errors of many kinds
        name = type(model.encoder.module).__name__
        raise UserError(f"torch.export cannot trace {name} of transformers: {first_line(error)}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Drop what torch.export, torch.onnx and onnxruntime warn, log and print in the block.

    torch.export prints the graph so far to stderr before it raises an error.
    """
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def output_names(program: ExportedProgram) -> list[str]:
    """Return the names of the outputs in their order."""
    spec = program.call_spec.out_spec
    assert spec is not None
    places: dict[str, int] = tree_unflatten(range(spec.num_leaves), spec)
    return sorted(places, key=places.__getitem__)


def open_program(program: ExportedProgram) -> Run:
    """Return a function that runs a program of `trace`."""
    module = program.module()

    def run(feeds: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            return module(**feeds)

    return run
