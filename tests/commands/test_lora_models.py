"""Trained models with a LoRA: exported to PEFT and others, merged, extended, used as a start."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from saved_models import SENTENCES, TASKS, assert_same_predictions, run, scores
from transformers import AutoModel, AutoTokenizer

from fastmtl.config import Recipe, parse_recipe
from fastmtl.errors import UserError
from fastmtl.model import add_task
from fastmtl.model.encoder.families import FAMILIES
from fastmtl.model.lora.peft_files import read_settings
from fastmtl.model.lora.start import with_settings_of_path
from fastmtl.model.merge import TrainedModel
from fastmtl.model.saved_model import load_model
from fastmtl.training.phase_model import PhaseModel
from fastmtl.training.phases import phases_of

Make = Callable[..., Path]
SHARED = {"rank": 2, "targets": ["query", "value", "output"]}
OWN = {"rank": 2, "targets": "all-linear", "layers": [1], "tasks": "own"}
NO_ADAPTER = {"name": "none"}


def hidden(model: torch.nn.Module, directory: Path) -> torch.Tensor:
    """Return transformers' hidden states of SENTENCES, real tokens only."""
    tokens = AutoTokenizer.from_pretrained(str(directory))(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**tokens).last_hidden_state[tokens["attention_mask"].bool()]


def base_of(directory: Path) -> torch.nn.Module:
    return AutoModel.from_pretrained(str(directory), add_pooling_layer=False)


def start_model(model: Path, folder: Path, tasks: str) -> torch.nn.Module:
    """Return the LoRA of a new run with the tasks of a model that starts from a folder of PEFT."""
    given = json.loads((model / "fastmtl.json").read_text())["recipe"]
    recipe = parse_recipe({**given, "lora": {"path": str(folder), "tasks": tasks}}, "test")
    found = PhaseModel(phases_of(with_settings_of_path(recipe))[0]).model.lora
    assert found is not None
    return found


def test_peft_and_transformers_load_a_lora_of_all_tasks(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make("model", ["tone", "near"], lora=SHARED, adapter=NO_ADAPTER)
    assert run(monkeypatch, "export", model, tmp_path / "peft", "--format", "peft") == 0
    assert f"the LoRA's base model: {model}" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "peft").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert run(monkeypatch, "export", model, tmp_path / "merged", "--format", "transformers") == 0
    assert "the LoRA of all tasks is merged into the weights" in capsys.readouterr().out
    plain = hidden(base_of(model), model)
    expected = hidden(PeftModel.from_pretrained(base_of(model), str(tmp_path / "peft")), model)
    merged = hidden(base_of(tmp_path / "merged"), model)
    assert (plain - expected).abs().max() > 0.01
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-5)
    # Predictions of the trained model are those of its heads on the merged encoder.
    values = {**json.loads((model / "fastmtl.json").read_text()), "format": 1}
    values["recipe"] |= {"lora": {}, "encoder": {**values["recipe"]["encoder"], "path": str(tmp_path / "merged")}}
    (tmp_path / "merged" / "fastmtl.json").write_text(json.dumps(values))
    for name in ("heads", "adapters"):
        (tmp_path / "merged" / f"{name}.safetensors").write_bytes((model / f"{name}.safetensors").read_bytes())
    assert np.abs(scores(tmp_path / "merged", "tone") - scores(model, "tone")).max() < 1e-5


def test_peft_and_transformers_load_the_lora_of_each_task(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make("model", ["tone", "near"], lora=OWN, adapter=NO_ADAPTER)
    assert run(monkeypatch, "export", model, tmp_path / "peft", "--format", "peft") == 0
    assert run(monkeypatch, "export", model, tmp_path / "one", "--format", "peft", "--task", "near") == 0
    assert load_file(tmp_path / "one" / "adapter_model.safetensors").keys() == {
        f"base_model.model.encoder.layer.1.{name}.lora_{matrix}.weight"
        for name in (
            *(f"attention.self.{name}" for name in ("query", "key", "value")),
            *(f"{name}.dense" for name in ("attention.output", "intermediate", "output")),
        )
        for matrix in "AB"
    }
    started = start_model(model, tmp_path / "peft", "own")
    saved = load_file(model / "lora.safetensors")
    assert all(torch.equal(started.get_parameter(name), tensor) for name, tensor in saved.items())
    capsys.readouterr()
    vectors = []
    for task in ("tone", "near"):
        out = tmp_path / f"merged-{task}"
        assert run(monkeypatch, "export", model, out, "--format", "transformers", "--task", task) == 0
        assert f"the LoRA of {task} is merged into the weights" in capsys.readouterr().out
        expected = hidden(PeftModel.from_pretrained(base_of(model), str(tmp_path / "peft" / task)), model)
        torch.testing.assert_close(hidden(base_of(out), model), expected, rtol=0, atol=1e-5)
        vectors.append(expected)
    assert (vectors[0] - vectors[1]).abs().max() > 0.01
    assert run(monkeypatch, "export", model, tmp_path / "plain", "--pooling", "mean") == 0
    assert "without the LoRAs of tone, near; --task merges" in capsys.readouterr().out
    torch.testing.assert_close(hidden(base_of(tmp_path / "plain"), model), hidden(base_of(model), model))


def test_a_lora_of_peft_is_the_start(make: Make, tiny_bert: Path, tmp_path: Path) -> None:
    """The folder is PEFT's own; its settings become the recipe's."""
    torch.manual_seed(2)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["query", "output.dense"], use_rslora=True)
    theirs = get_peft_model(base_of(tiny_bert), config)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(str(tmp_path / "peft"))
    values = {"tasks": {"tone": {**TASKS["tone"], "data": {"train": "x"}}}, "encoder": {"path": str(tiny_bert)}}
    recipe = with_settings_of_path(parse_recipe({**values, "lora": {"path": str(tmp_path / "peft")}}, "test"))
    lora = recipe.lora
    assert (lora.rank, lora.alpha, lora.rslora, lora.targets) == (3, 6.0, True, ["output.dense", "query"])
    assert with_settings_of_path(parse_recipe(recipe.model_dump(mode="json"), "again")) == recipe
    (phase,) = phases_of(recipe)
    model = PhaseModel(phase).model
    assert model.lora is not None
    before = list(model.lora.parameters())
    model.lora.merge_into(model.encoder, None)
    expected = theirs.merge_and_unload().state_dict()
    for name, tensor in model.encoder.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)
    assert len(model.lora.pairs) == 6  # output.dense ends the name of attention's output, too

    def refused(path: Path, **given: object) -> str:
        with pytest.raises(UserError) as caught:
            found = with_settings_of_path(parse_recipe({**values, "lora": {"path": str(path), **given}}, "test"))
            PhaseModel(phases_of(found)[0])
        return str(caught.value)

    assert "lora.rank: 4, but lora.path: " in refused(tmp_path / "peft", rank=4)
    assert "has no adapter_config.json" in refused(tiny_bert)
    file = tmp_path / "peft" / "adapter_config.json"
    plain = json.loads(file.read_text())
    for change, message in (
        ({"use_dora": True}, "use_dora: True is no plain LoRA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: 'pissa'"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"r": 4}, "wrong shape"),
        ({"target_modules": ["query"]}, "holds tensors that the model does not have"),
        ({"layers_to_transform": ["1"]}, "adapter_config.json: layers: Input should be a valid integer"),
    ):
        file.write_text(json.dumps({**plain, **change}))
        assert message in refused(tmp_path / "peft")
    file.write_text(json.dumps({**plain, "target_modules": ".*query|.*output.dense"}))
    assert len(read_settings(tmp_path / "peft", FAMILIES["bert"])["targets"]) == 6
    file.write_text(json.dumps(plain))
    weights = tmp_path / "peft" / "adapter_model.safetensors"
    tensors = load_file(weights)
    of_classifier = {name.replace("base_model.model.", "base_model.model.bert."): tensors[name] for name in tensors}
    save_file({**of_classifier, "base_model.model.classifier.weight": torch.zeros(2)}, weights)
    again = PhaseModel(phases_of(with_settings_of_path(recipe))[0]).model.lora
    assert again is not None and all(torch.equal(p, q) for p, q in zip(again.parameters(), before, strict=True))
    for name in ("encoder.layer.0.output.dense.lora_C.weight", "pooler.dense.lora_A.weight"):
        save_file({**tensors, f"base_model.model.{name}": torch.zeros(2)}, weights)
        assert f"'base_model.model.{name}' is no matrix" in refused(tmp_path / "peft")


def test_models_with_a_lora_are_merged_or_refused(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = make("one", ["tone"], lora=OWN), make("two", ["near"], seed=1, lora={**OWN, "dropout": 0.1})
    assert run(monkeypatch, "merge", tmp_path / "both", one, two) == 0
    assert_same_predictions(tmp_path / "both", one, "tone")
    assert_same_predictions(tmp_path / "both", two, "near")
    shared = make("shared", ["tone"], lora=SHARED)
    same = make("same", ["near"], seed=1, lora=SHARED)
    capsys.readouterr()
    for models, message in (
        ((shared, same), "each have a LoRA for all their tasks, and the two differ"),
        ((one, same), "lora.tasks is own and shared"),
        ((one, make("none", ["near"])), "lora.rank is 2 and None"),
        ((one, make("large", ["near"], lora={**OWN, "rank": 3})), "lora.rank is 2 and 3"),
    ):
        assert run(monkeypatch, "merge", tmp_path / "out", *models) == 2, message
        assert message in capsys.readouterr().err
    (same / "lora.safetensors").write_bytes((shared / "lora.safetensors").read_bytes())
    assert run(monkeypatch, "merge", tmp_path / "equal", shared, same) == 0
    assert_same_predictions(tmp_path / "equal", shared, "tone")
    assert_same_predictions(tmp_path / "equal", same, "near")


def test_a_task_added_to_a_model_uses_the_lora_of_all_tasks(make: Make, tmp_path: Path) -> None:
    base = make("base", ["tone"], lora=SHARED)
    near = {**TASKS["near"], "data": {"train": "x"}}
    values = {"add_to": str(base), "tasks": {"near": near}, "gradient": {"method": "pcgrad"}}
    recipe = add_task.complete(Recipe.model_validate({**values, "lora": {"dropout": 0.1}}))
    assert recipe.lora.rank == 2 and recipe.lora.dropout == 0.1 and not recipe.shares
    model = PhaseModel(phases_of(recipe)[0]).model
    assert model.lora is not None and not any(p.requires_grad for p in model.lora.parameters())
    assert model.shared_parameters() == [] and "lora" not in {
        group["name"] for group in model.parameter_groups(recipe.optimizer)
    }
    addition = add_task.Addition(recipe)
    tokenizer = load_model(base)[2]
    addition.save(tmp_path / "out", model, recipe, tokenizer, model.state_dict())
    assert_same_predictions(tmp_path / "out", base, "tone")
    assert TrainedModel.read(tmp_path / "out").recipe.task_names == ["tone", "near"]
    with pytest.raises(UserError, match="lora.rank: 3, but add_to: "):
        add_task.complete(Recipe.model_validate({**values, "lora": {"rank": 3}}))


def test_exports_that_have_no_place(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, shared, out = make("plain", ["tone"]), make("shared", ["tone"], lora=SHARED), tmp_path / "out"
    for arguments, message in (
        ((plain, out, "--format", "peft"), "has no LoRA; train one with the recipe's section lora"),
        ((shared, out, "--format", "peft", "--task", "tone"), "no LoRA of tone alone: leave --task out"),
        ((shared, out, "--format", "peft", "--pooling", "mean"), "leave --pooling out"),
    ):
        assert run(monkeypatch, "export", *arguments) == 2
        assert message in capsys.readouterr().err
        assert not out.exists()
    assert run(monkeypatch, "export", shared, out, "--format", "peft") == 0
    assert "the adapters of tone are not in it" in capsys.readouterr().out
