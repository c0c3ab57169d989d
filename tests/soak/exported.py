"""`fastmtl export` with onnxruntime and torch.export on small random models.

Padded models in torch have all adapters, LoRAs and tops, all task types and heads, and every
encoder. Graphs and programs are those of all heads, of a pair task with each adapter, and of every
encoder with and without PALs. Results differ from `predict` by at most 1e-5, and those of padded
models in float64 by 1e-10, where a difference is divided by the largest value if this is above 1.
The client of docs/export.md runs as it is.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from encoder_families import FAMILY_CASES, save_encoder_of
from other_encoders import save_other
from saved_models import MORE_TASKS, TASKS, save_random_model
from tiny_bert import save_tiny_bert
from tiny_tokenizers import save_tokenizer
from transformers import AutoConfig, BertModel

import fastmtl
from fastmtl.inference.exported.compare import OpenGraph, largest_difference
from fastmtl.inference.exported.write import export_model
from fastmtl.model.padded import PaddedModel

# Padded models are compared in float64, where large random weights do not amplify rounding.
BOUNDS = {"padded models": 1e-10, "graphs and programs": 1e-5}
BI = {**TASKS["near"], "pooling": "mean"}
NONE = {"name": "none"}
OTHER_HEADS: dict[str, dict[str, Any]] = {
    "ordinal": {"type": "classification", "num_labels": 4, "loss": "ordinal", "pooling": "mean", "data": {}},
    "score": {"type": "classification", "num_labels": 4, "loss": "mse", "pooling": "max", "data": {}},
    "bins": {"type": "regression", "range": [0, 5], "loss": "cross_entropy", "data": {}},
    "cosine": {**BI, "head": {"name": "cosine", "squash": "sigmoid"}},
    "both": {**BI, "head": {"name": "linear_cosine", "projection": 8}},
    "within": {**BI, "head": {"name": "mlp", "hidden": [8], "squash": "sigmoid"}},
    "adjusted": {**TASKS["tone"], "head": {"adjustment": True}},
    "tagged": {**MORE_TASKS["words"], "loss": "crf"},
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "none": {"adapter": NONE},
    "pal": {"adapter": {"name": "pal", "size": 8, "heads": 2, "projections": 2, "activation": "gelu"}},
    "low rank": {"adapter": {"name": "low_rank", "size": 4, "layers": [1], "activation": "gelu"}},
    "lora beside": {"adapter": {"name": "lora", "size": 4, "top": "layer"}},
    "pal on top": {"adapter": {"name": "none", "top": "pal", "size": 8, "heads": 2}},
    "shared lora": {"adapter": NONE, "lora": {"rank": 4, "targets": "all-linear"}},
    "own lora": {"adapter": NONE, "lora": {"rank": 4, "tasks": "own", "targets": "all-linear", "rslora": True}},
    "pal and lora": {"adapter": {"name": "pal", "size": 8, "heads": 2}, "lora": {"rank": 4, "targets": "all-linear"}},
}


def written(model: Path, folder: Path, *, merge: bool) -> list[float]:
    """Return the largest difference from `predict` of each graph and program of a model."""
    lines: list[str] = []
    export_model(model, onnx_dir=folder / "onnx", torch_dir=folder / "torch", merge_adapters=merge, say=lines.append)
    for file, graph in json.loads((folder / "onnx" / "export.json").read_text(encoding="utf-8"))["graphs"].items():
        session = onnxruntime.InferenceSession(folder / "onnx" / file)
        shapes = {put.name: put.shape for put in (*session.get_inputs(), *session.get_outputs())}
        told = {name: put["shape"] for name, put in (graph["inputs"] | graph["outputs"]).items()}
        assert told == shapes, f"export.json has the shapes {told}, {file} has {shapes}"
    return [float(found[1]) for line in lines if (found := re.search(r"difference from predict (\S+)$", line))]


def padded(model: Path, *, merge: bool) -> list[float]:
    """Return the largest difference from `predict` of the padded model of each task, in float64."""
    predictor = fastmtl.load(model, device="cpu")
    predictor.model.double()
    found = []
    for name in predictor.recipe.task_names:
        twin = PaddedModel(predictor.model, [name], merge_lora=merge).eval()
        found.append(
            largest_difference(predictor, name, OpenGraph(lambda feeds, twin=twin: twin(**feeds), twin.inputs))
        )
    return found


def check_client(directory: Path, bert: Path) -> None:
    """Run the first Python block of docs/export.md, which prints the predictions of its texts."""
    page = Path(__file__).parents[2] / "docs" / "export.md"
    found = re.search(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    code = found[1]
    model = save_random_model(directory / "model", bert, {"sentiment": TASKS["tone"]}, **ADAPTERS["pal"])
    export_model(model, onnx_dir=directory / "graphs", say=lambda line: None)
    done = subprocess.run([sys.executable, "-c", code], cwd=directory, capture_output=True, text=True)
    assert done.returncode == 0, f"docs/export.md: its client fails: {done.stderr}"
    texts = ast.literal_eval(re.search(r"^texts = (.*)$", code, re.MULTILINE)[1])
    expected = [one.probabilities for one in fastmtl.load(model, device="cpu").predict("sentiment", texts)]
    printed = [float(number) for number in re.findall(r"\d\.\d*", done.stdout)]
    assert np.abs(np.array(expected).ravel() - printed).max() < 1e-4, f"docs/export.md: its client: {done.stdout}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="BERT without adapters and one other encoder")
    quick = parser.parse_args().quick
    checks: dict[str, list[float]] = {"padded models": [], "graphs and programs": []}
    with tempfile.TemporaryDirectory(prefix="fastmtl-soak-") as name, torch.no_grad():
        directory = Path(name)
        bert = save_tiny_bert(directory / "bert")
        check_client(directory / "client", bert)
        for number, (case, encoder, tasks, sections, writes) in enumerate(cases(directory, bert, quick=quick)):
            model = save_random_model(directory / f"model{number}", encoder, tasks, **sections)
            for merge in (False, True) if "lora" in sections and sections["adapter"] == NONE else (False,):
                if writes:
                    kind, found = "graphs and programs", written(model, directory / f"out{number}{merge}", merge=merge)
                else:
                    kind, found = "padded models", padded(model, merge=merge)
                print(f"{kind}, {case}{' merged' * merge}: {max(found):.1e}", file=sys.stderr, flush=True)
                assert max(found) <= BOUNDS[kind], f"{kind}, {case}, merged {merge}: results differ by {max(found):.1e}"
                checks[kind] += found
    print(
        json.dumps(
            {
                **{kind: len(found) for kind, found in checks.items()},
                **{f"largest difference of {kind}": max(found) for kind, found in checks.items()},
            }
        )
    )


def cases(
    directory: Path, bert: Path, *, quick: bool
) -> Iterator[tuple[str, Path, dict[str, dict], dict[str, Any], bool]]:
    """Yield the name, encoder, tasks and sections of each model, and if graphs are written."""
    every = {**TASKS, **MORE_TASKS, **OTHER_HEADS}
    near: dict[str, dict] = {"near": BI}
    yield "bert, all heads", bert, every, ADAPTERS["none"], True
    for adapter, sections in list(ADAPTERS.items())[: 2 if quick else None]:
        yield f"bert, {adapter}", bert, every, sections, False
        if adapter != "none":
            yield f"bert, {adapter}", bert, near, sections, True
    pooled = save_tiny_bert(directory / "pooled")
    BertModel(AutoConfig.from_pretrained(pooled)).save_pretrained(pooled)
    yield "bert, pooler", pooled, {"near": {**BI, "pooling": "pooler"}}, ADAPTERS["none"], True
    for family in list(FAMILY_CASES)[1 : 2 if quick else None]:
        encoder = save_encoder_of(family, directory / family.replace(", ", "-"), vocab_size=340)
        save_tokenizer("bytes", encoder)
        for adapter, sections in ADAPTERS.items():
            yield f"{family}, {adapter}", encoder, {**near, "words": MORE_TASKS["words"]}, sections, False
            if adapter in ("none", "pal"):
                yield f"{family}, {adapter}", encoder, near, sections, True
    for other in () if quick else ("convbert", "squeezebert", "megatron", "t5"):
        encoder = save_other(other, directory / other)
        yield other, encoder, near, {"adapter": NONE, "encoder": {"max_length": 24}}, True


if __name__ == "__main__":
    main()
