"""Masked language modelling against BertForMaskedLM: loss and gradients, tied weight too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

from fastmtl.config import EncoderConfig, OptimizerConfig, TaskConfig
from fastmtl.data.masking import MaskedBatch
from fastmtl.data.packing import pack
from fastmtl.data.rows import Rows
from fastmtl.data.tokenized import tokenize
from fastmtl.errors import UserError
from fastmtl.model.encoder.encoder import PackedEncoder
from fastmtl.model.encoder.pretrained import load_encoder
from fastmtl.model.masked_lm import MaskedLanguageModel, load_output_layer

TEXTS = ["the cat sat on the old red house", "she was happy", "a slow car drives to the city after food"]


@pytest.fixture
def directory(tmp_path: Path, tiny_bert: Path) -> Path:
    """Save a BertForMaskedLM of transformers; return its directory."""
    torch.manual_seed(1)
    model = BertForMaskedLM(BertConfig.from_pretrained(str(tiny_bert)))
    torch.nn.init.normal_(model.cls.predictions.bias, std=0.5)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(str(tiny_bert)).save_pretrained(tmp_path)
    return tmp_path


def masked_model(directory: Path) -> MaskedLanguageModel:
    encoder = load_encoder(EncoderConfig(path=str(directory)))
    assert isinstance(encoder, PackedEncoder)
    return MaskedLanguageModel(encoder)


def masked(directory: Path, tmp_path: Path) -> MaskedBatch:
    task = TaskConfig.model_validate({"type": "binary", "data": {}})
    rows = Rows(Path("made"), ["0", "1", "2"], TEXTS, None, None)
    data = tokenize(rows, AutoTokenizer.from_pretrained(str(directory)), task, 32, tmp_path / "cache")
    batch = pack([(data, torch.arange(3).numpy())])
    starts = batch.host.cu_seqlens
    positions = torch.tensor([starts[0] + 2, starts[0] + 5, starts[1] + 1, starts[2] + 3])
    targets = batch.input_ids[positions].clone()
    batch.input_ids[positions[:3]] = 4  # [MASK]
    return MaskedBatch(batch, positions, targets, (len(targets),))


def test_loss_and_gradients_are_those_of_transformers(directory: Path, tmp_path: Path) -> None:
    ours = masked_model(directory)
    assert load_output_layer(ours.head, directory)
    theirs = BertForMaskedLM.from_pretrained(str(directory))
    given = masked(directory, tmp_path)
    bounds = given.batch.host.cu_seqlens
    longest = max(stop - start for start, stop in zip(bounds, bounds[1:], strict=False))
    ids = torch.zeros(3, longest, dtype=torch.long)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        ids[row, : stop - start], mask[row, : stop - start] = given.batch.input_ids[start:stop], 1
        for position, target in zip(given.positions.tolist(), given.targets.tolist(), strict=True):
            if start <= position < stop:
                labels[row, position - start] = target
    expected = theirs.eval().double()(ids, attention_mask=mask, labels=labels).loss
    loss, number = ours.eval().double()(given)["mlm"]
    assert number == 4
    torch.testing.assert_close(loss.double() / number, expected, rtol=1e-6, atol=1e-6)
    expected.backward()
    (loss / number).backward()
    grads = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.encoder.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[f"bert.{name}"], rtol=1e-5, atol=1e-8, msg=name)
    for name, parameter in ours.head.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[f"cls.predictions.{name}"], rtol=1e-5, atol=1e-8, msg=name)


def test_a_new_output_layer_where_the_encoder_has_none(tiny_bert: Path, directory: Path) -> None:
    torch.manual_seed(0)
    model = masked_model(tiny_bert)
    before = {name: tensor.clone() for name, tensor in model.head.state_dict().items()}
    assert not load_output_layer(model.head, tiny_bert)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.head.state_dict().items())
    groups = {group["name"] for group in model.parameter_groups(OptimizerConfig(lr=1e-4, head_lr=1e-3))}
    assert groups == {"encoder", "heads"}
    tensors = load_file(directory / "model.safetensors")
    del tensors["cls.predictions.transform.dense.weight"]
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(UserError, match="lacks the tensors cls.predictions.transform.dense.weight"):
        load_output_layer(model.head, directory)
