"""LoRA beside PEFT's, on the same weights, for every family of encoders."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_families import padded_hidden, save_encoder_of
from packed_batches import build_model
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModel

from fastmtl.data.packed_batch import PackedBatch
from fastmtl.errors import UserError
from fastmtl.model.encoder.context import ForwardContext
from fastmtl.model.encoder.encoder import PackedEncoder
from fastmtl.model.encoder.families import FAMILIES
from fastmtl.model.lora.peft_files import MATRICES, PREFIX, write_folder
from fastmtl.model.lora.targets import transformers_name
from fastmtl.model.multitask import MultiTaskModel
from fastmtl.surgery.sinks.stack import StackSink

MakeBatch = Callable[..., PackedBatch]
MakeModel = Callable[..., MultiTaskModel]

LENGTHS = [[5, 1, 17, 9], [3, 30], [12, 7]]
# Families with other layers than BERT's, or with other names in transformers.
CASES = ["bert", "roberta", "distilbert", "albert", "deberta-v2", "modernbert"]
NO_DROPOUT = {"hidden_dropout": 0.0, "attention_dropout": 0.0}


def filled(model: MultiTaskModel) -> MultiTaskModel:
    """Return the model with random numbers in every B, which is zero in a new model."""
    assert model.lora is not None
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.lora.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def batch_for(model: MultiTaskModel, make_batch: MakeBatch) -> PackedBatch:
    """Return a batch whose token types the encoder has: two, or only 0."""
    batch = make_batch(LENGTHS, pairs=[False, False, True])
    if model.encoder.settings.type_vocab_size > 1:
        return batch
    return dataclasses.replace(batch, token_type_ids=torch.zeros_like(batch.token_type_ids))


def pefts(model: MultiTaskModel, base: Path, folder: Path, task: int | None) -> Any:
    """Return PEFT's model of the encoder in `base`, from a folder that fastmtl writes."""
    assert model.lora is not None and isinstance(model.encoder, PackedEncoder)
    write_folder(folder, model.lora, model.encoder, str(base), task)
    found = PeftModel.from_pretrained(AutoModel.from_pretrained(str(base)), str(folder), is_trainable=True)
    return found.double().eval().requires_grad_(True)


def gradients_of(theirs: nn.Module, model: MultiTaskModel) -> dict[str, tuple[Tensor, Tensor]]:
    """Return PEFT's gradients of (A, B) under the names of the layers in our encoder."""
    found = dict(theirs.named_parameters())
    assert model.lora is not None and isinstance(model.encoder, PackedEncoder)
    modules = {name: transformers_name(model.encoder, name) for name in model.lora.pairs}
    return {
        name: tuple(found[f"{PREFIX}{module}.{key}.default.weight"].grad for key in MATRICES)
        for name, module in modules.items()
    }


@pytest.mark.parametrize(
    ("case", "tasks"), [*((case, "shared") for case in CASES), ("bert", "own"), ("deberta-v2", "own")]
)
def test_outputs_and_gradients_equal_pefts(case: str, tasks: str, make_batch: MakeBatch, tmp_path: Path) -> None:
    """Every linear layer has a LoRA; float64, and outputs in float32 too."""
    base = save_encoder_of(case, tmp_path / "base")
    lora = {"rank": 3, "alpha": 5.0, "targets": "all-linear", "rslora": True, "tasks": tasks}
    model = filled(build_model(base, encoder=NO_DROPOUT, lora=lora))
    assert model.lora is not None
    batch = batch_for(model, make_batch)
    single = model.encoder(batch, lora=model.lora)
    hidden = model.double().encoder(batch, lora=model.lora)
    upstream = torch.randn(hidden.shape, dtype=hidden.dtype, generator=torch.Generator().manual_seed(1))
    hidden.backward(upstream)
    rows = [slice(0, None)]
    if tasks == "own":
        rows = [slice(*bounds) for bounds in zip(batch.host.token_offsets, batch.host.token_offsets[1:], strict=False)]
    summed: dict[str, Tensor] = {}
    for task, part in enumerate(rows):
        theirs = pefts(model, base, tmp_path / str(task), task if tasks == "own" else None)
        expected = padded_hidden(theirs, batch if tasks == "shared" else batch.task(task))
        torch.testing.assert_close(hidden[part], expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(single[part].double(), expected, rtol=0, atol=1e-5)
        expected.backward(upstream[part])
        for name, of_peft in gradients_of(theirs, model).items():
            pair = model.lora.pairs[name]
            for parameter, gradient in zip((pair.lora_A, pair.lora_B), of_peft, strict=True):
                assert parameter.grad is not None and gradient.abs().max() > 0
                ours = parameter.grad if tasks == "shared" else parameter.grad[task]
                torch.testing.assert_close(ours, gradient, rtol=0, atol=1e-10)
        for name, parameter in theirs.named_parameters():
            if "lora_" not in name and parameter.grad is not None:
                name = name.removeprefix(PREFIX).replace(".base_layer", "")
                summed[name] = summed.get(name, torch.zeros(())) + parameter.grad
    family = FAMILIES[model.encoder.config.model_type]
    trained = {family.file_name(name): p.grad for name, p in model.encoder.named_parameters() if p.grad is not None}
    assert trained.keys() <= summed.keys()
    for name, gradient in trained.items():
        torch.testing.assert_close(gradient, summed[name], rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize("tasks", ["shared", "own"])
def test_recomputation_changes_no_bit_and_dropout_drops_inputs_of_a(
    tasks: str, make_model: MakeModel, make_batch: MakeBatch
) -> None:
    """A frozen encoder is used, and SMART's noise, which gets a gradient through the LoRA."""
    lora = {"rank": 2, "targets": ["query", "value", "output"], "tasks": tasks, "dropout": 0.5}
    found = []
    for recompute in ("none", "cheap", "full"):
        model = filled(make_model(encoder={"freeze": True, "recompute": recompute}, lora=lora)).train()
        assert model.lora is not None
        batch = batch_for(model, make_batch)
        torch.manual_seed(1)
        noise = torch.zeros(batch.num_tokens, model.hidden_size, requires_grad=True)
        hidden = model.encoder(batch, noise=noise, lora=model.lora)
        hidden.square().sum().backward()
        grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert grads.keys() == {f"lora.{name}" for name, _ in model.lora.named_parameters()}
        found.append({**grads, "hidden": hidden.detach(), "noise": noise.grad})
    for name, tensor in found[0].items():
        assert tensor is not None and tensor.any()
        assert all(torch.equal(tensor, other[name]) for other in found[1:]), name
    torch.manual_seed(1)
    with torch.no_grad():
        without = model.encoder(batch, noise=noise, lora=copy.deepcopy(model).lora)  # another encoder's: no term
        again = copy.deepcopy(model)
        torch.manual_seed(1)
        torch.testing.assert_close(again.encoder(batch, noise=noise, lora=again.lora), found[0]["hidden"])
    assert (without - found[0]["hidden"]).abs().max() > 1e-3


def test_masks_of_layers_and_of_linears_differ(make_model: MakeModel, make_batch: MakeBatch) -> None:
    """A term tells how many inputs were kept, where A and B are 1."""
    model = make_model(encoder=NO_DROPOUT, lora={"rank": 1, "targets": ["query", "key"], "dropout": 0.5}).train()
    assert model.lora is not None
    for pair in model.lora.pairs.values():
        pair.lora_A.data.fill_(1.0)
        pair.lora_B.data.fill_(1.0)
    batch = batch_for(model, make_batch)
    context = ForwardContext.build(batch, 2, training=True, lora=model.lora)
    x = torch.ones(batch.num_tokens, model.hidden_size)
    terms = []
    assert isinstance(model.encoder, PackedEncoder)
    for number, layer in enumerate(model.encoder.layers):
        for name in ("attention.self.query", "attention.self.key"):
            term = context.at(number).term(layer.get_submodule(name), x)
            assert term is not None
            terms.append(term[:, 0] / model.lora.config.scale)
        assert context.at(number).term(layer.get_submodule("attention.self.value"), x) is None
    assert all((term.mean() / model.hidden_size - 1).abs() < 0.1 for term in terms)
    assert all(not torch.equal(one, other) for i, one in enumerate(terms) for other in terms[:i])


@pytest.mark.parametrize(
    ("lora", "names"),
    [
        ({}, ["0.attention.self.query", "0.attention.self.value", "1.attention.self.query", "1.attention.self.value"]),
        ({"targets": ["attention_output"], "layers": [1]}, ["1.attention.output.dense"]),
        ({"targets": ["output.dense"], "layers": [0]}, ["0.attention.output.dense", "0.output.dense"]),
        ({"targets": ["output"], "layers": [0]}, ["0.output.dense"]),
        ({"targets": ["encoder.layer.1.attention.self.key"]}, ["1.attention.self.key"]),
    ],
)
def test_targets_by_our_names_and_by_ends_of_names(lora: dict, names: list[str], make_model: MakeModel) -> None:
    found = make_model(lora={"rank": 1, **lora}).lora
    assert found is not None and list(found.pairs) == [f"encoder.layer.{name}" for name in names]


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"targets": ["quary"]}, "lora.targets: unknown linear layer 'quary'. Did you mean 'query'?"),
        ({"targets": []}, "lora.targets: name at least one"),
        ({"layers": [2]}, "lora.layers: no layer 2: the encoder's layers are 0 to 1"),
        ({"layers": [0, 0]}, "each once"),
    ],
)
def test_layers_that_are_not_there(lora: dict, message: str, make_model: MakeModel) -> None:
    with pytest.raises(UserError) as caught:
        make_model(lora={"rank": 1, **lora})
    assert message in str(caught.value)


def test_no_lora_is_the_default(make_model: MakeModel) -> None:
    model = make_model()
    assert model.lora is None and not model.recipe.lora.used
    assert not any("lora" in name for name in model.state_dict())


@pytest.mark.parametrize("case", ["albert", "deberta-v2"])
def test_gradients_per_task_of_a_frozen_encoders_lora(case: str, make_batch: MakeBatch, tmp_path: Path) -> None:
    """Surgery on the LoRA alone, also where layers share it and on relative positions."""
    base = save_encoder_of(case, tmp_path / "base")
    lora = {"rank": 2, "targets": "all-linear"}
    model = filled(build_model(base, encoder={**NO_DROPOUT, "freeze": True}, lora=lora)).double()
    assert model.lora is not None
    batch, parameters = batch_for(model, make_batch), model.shared_parameters()
    assert {id(p) for p in parameters} == {id(p) for p in model.lora.parameters()}
    sink = StackSink(parameters, batch.num_tasks)
    with sink.armed(torch.device("cpu")):
        hidden = model.encoder(batch, task_grads=sink, lora=model.lora)
        upstream = torch.randn(hidden.shape, dtype=hidden.dtype, generator=torch.Generator().manual_seed(1))
        assert all(found is None for found in torch.autograd.grad(hidden, parameters, upstream, allow_unused=True))
    sink.gramian()
    for task, part in enumerate(itertools.pairwise(batch.host.token_offsets)):
        of_task = torch.zeros_like(upstream)
        of_task[slice(*part)] = upstream[slice(*part)]
        expected = torch.autograd.grad(model.encoder(batch, lora=model.lora), parameters, of_task)
        for parameter, gradient in zip(parameters, expected, strict=True):
            found = sink.task_gradient(parameter, task)
            assert found is not None and gradient.any()
            torch.testing.assert_close(found.double(), gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()))
