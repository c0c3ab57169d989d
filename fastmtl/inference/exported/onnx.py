"""ONNX graphs: written by torch.onnx, run and quantised by onnxruntime."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from fastmtl.errors import UserError
from fastmtl.inference.exported.feeds import Run
from fastmtl.inference.exported.program import PAIRS, TEXTS, TOKENS, first_line, output_names, quiet

OPSET = 20


def check_libraries() -> None:
    """Raise UserError unless the libraries of the extra `onnx` are installed."""
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]
    if missing:
        raise UserError(f"--onnx needs {', '.join(missing)}: pip install 'fastmtl-torch[onnx]'")


def write_graph(program: ExportedProgram, inputs: Sequence[str], path: Path) -> None:
    """Write a program as an ONNX graph with its weights. inputs: names, in the program's order.

    A graph of more than 2 GB has its weights in a second file, path + ".data". Raises UserError for
    a program that torch.onnx cannot convert.
    """
    texts = {0: TEXTS, 1: TOKENS}
    with quiet():
        try:
            graph = torch.onnx.export(
                program,
                (),
                dynamo=True,
                opset_version=OPSET,
                input_names=list(inputs),
                output_names=output_names(program),
                dynamic_shapes={name: {0: PAIRS} if name == "pairs" else texts for name in inputs},
                verbose=False,
            )
        except Exception as error:  # of many kinds
            raise UserError(f"torch.onnx cannot convert {path.stem}: {first_line(error)}") from error
        assert graph is not None
        graph.save(path)


def open_graph(path: Path) -> Run:
    """Return a function that runs a graph with onnxruntime on the CPU."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(feeds: dict[str, Tensor]) -> dict[str, Tensor]:
        found = session.run(names, {name: tensor.numpy() for name, tensor in feeds.items()})
        return {name: torch.from_numpy(value) for name, value in zip(names, found, strict=True)}

    return run


def quantize(source: Path, target: Path) -> None:
    """Write a graph with weights in int8; onnxruntime quantises activations while it runs.

    Each column of a weight of a linear layer has its own scale; the tables of embeddings are
    quantised too.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with quiet():
        quantize_dynamic(source, target, weight_type=QuantType.QInt8, per_channel=True)
