"""encoder.layer_norm: the LayerNorm of another library, and unsupported settings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmtl.data.packed_batch import PackedBatch
from fastmtl.errors import UserError
from fastmtl.model.encoder.pretrained import load_tokenizer
from fastmtl.model.multitask import MultiTaskModel
from fastmtl.model.saved_model import load_model, save_model

MakeModel = Callable[..., MultiTaskModel]
MakeBatch = Callable[..., PackedBatch]
LENGTHS = ((5, 1, 9), (3,), (4, 7))


def of_torch(x: Tensor, weight: Tensor, bias: Tensor, shape: list[int], eps: float) -> Tensor:
    """LayerNorm with the arguments of Apex's function, which needs a GPU."""
    return F.layer_norm(x, shape, weight, bias, eps)


def test_the_sum_and_the_dropout_before_it_stay_the_same(make_model: MakeModel, make_batch: MakeBatch) -> None:
    batch = make_batch(LENGTHS, pairs=(False, False, True))
    gradients = []
    for other in (None, of_torch):
        model = make_model(adapter={"name": "low_rank", "size": 4}, encoder={"hidden_dropout": 0.3})
        model.double()
        if other is not None:
            model.encoder.use_layer_norm(other)
        torch.manual_seed(5)
        losses = torch.stack([loss for loss, _ in model(batch).values()])
        losses.sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {"": losses})
    ours, others = gradients
    assert ours.keys() == others.keys() and len(ours) > 40
    for name, gradient in ours.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_every_layer_norm_is_replaced(make_model: MakeModel, make_batch: MakeBatch) -> None:
    model = make_model().eval()
    calls = []
    model.encoder.use_layer_norm(lambda x, *rest: calls.append(x.shape) or of_torch(x, *rest))
    model.predict(make_batch(LENGTHS, pairs=(False, False, True)))
    assert calls == [(29, 32)] * 5  # one of the embeddings, two in each of two layers


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "NVIDIA Apex is not installed: build https://github.com/NVIDIA/apex"),
        ([], "an unrelated one of that name"),
        (["apex/normalization/fused_layer_norm.py"], "without its CUDA extension fused_layer_norm_cuda"),
        (["apex/normalization/fused_layer_norm.py", "fused_layer_norm_cuda.py"], "it needs an NVIDIA GPU"),
    ],
)
def test_apex_is_refused_with_what_to_do(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[str] | None, message: str
) -> None:
    """Packages are found by files at the real packages' places; their code is not called."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.syspath_prepend(str(tmp_path))
    for file in () if files is None else ("apex/__init__.py", *files):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("")
    with pytest.raises(UserError, match=message) as error:
        make_model(encoder={"layer_norm": "apex"})
    assert "or use encoder.layer_norm: fastmtl" in str(error.value)


def test_not_with_surgery(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastmtl.system.nvidia_apex.layer_norm", lambda: of_torch)
    with pytest.raises(UserError, match="layer_norm: apex gives no gradient per task, which gradient.method: pcgrad"):
        make_model(encoder={"layer_norm": "apex"}, gradient={"method": "pcgrad"})
    make_model(encoder={"layer_norm": "apex", "freeze": True}, gradient={"method": "pcgrad"})
    assert make_model(encoder={"layer_norm": "apex"}).encoder.embeddings.LayerNorm.norm_override is of_torch


def test_a_model_trained_with_it_loads_anywhere(
    make_model: MakeModel, make_batch: MakeBatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("fastmtl.system.nvidia_apex.layer_norm", lambda: of_torch)
        model = make_model(encoder={"layer_norm": "apex"}).eval()
    save_model(tmp_path / "model", model, model.recipe, load_tokenizer(model.recipe.encoder))
    about = json.loads((tmp_path / "model" / "fastmtl.json").read_text())
    assert about["recipe"]["encoder"]["layer_norm"] == "apex"
    loaded, _, _ = load_model(tmp_path / "model")
    batch = make_batch(LENGTHS, pairs=(False, False, True))
    for name, values in loaded.predict(batch).items():
        torch.testing.assert_close(values, model.predict(batch)[name])
