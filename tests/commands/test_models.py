"""Trained models as a whole: merged, extended, exported."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from saved_models import (
    MORE_ROWS,
    MORE_TASKS,
    SENTENCES,
    SINGLE,
    TASKS,
    assert_same_predictions,
    run,
    scores,
)
from transformers import AutoModel, AutoTokenizer

import fastmtl
from fastmtl.config import Recipe
from fastmtl.data.readers import read_file
from fastmtl.data.rows import Rows
from fastmtl.data.stream import evaluation_batches
from fastmtl.data.tokenized import tokenize
from fastmtl.errors import UserError
from fastmtl.model import add_task
from fastmtl.model.merge import TrainedModel, join
from fastmtl.model.saved_model import load_model
from fastmtl_kernels import pool

Make = Callable[..., Path]


@pytest.mark.slow
@pytest.mark.parametrize(
    "adapter",
    [
        {"name": "none"},
        {"name": "low_rank", "size": 3, "activation": "gelu"},
        {"name": "pal", "size": 8, "heads": 2, "projections": 2},
        {"name": "lora", "size": 2, "layers": [1], "top": "layer"},
        {"name": "none", "top": "pal", "top_size": 8, "heads": 2},
    ],
    ids=lambda adapter: adapter["name"] + adapter.get("top", ""),
)
def test_merged_tasks_predict_what_they_did(
    adapter: dict, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = make("one", ["same", "tone"], adapter=adapter)
    two = make("two", ["near"], seed=1, adapter={**adapter, "init": "xavier", "dropout": 0.5})
    three = make("three", ["tone"], seed=2, adapter={**adapter, "dropout": {"tone": 0.25}})
    out = tmp_path / "deep" / "joined"
    assert run(monkeypatch, "merge", out, one, two, three, "--rename", f"{three}:tone=mood") == 0
    assert capsys.readouterr().out == f"{out}: same, tone, near, mood\n"
    for task, source in (("same", one), ("tone", one), ("near", two)):
        assert_same_predictions(out, source, task)
    assert_same_predictions(out, three, "tone", "mood")
    assert (scores(out, "tone") != scores(out, "mood")).any()
    assert (out / "model.safetensors").read_bytes() == (one / "model.safetensors").read_bytes()
    assert {path.suffix for path in out.iterdir()} <= {".safetensors", ".json", ".txt", ".md"}


def test_tasks_of_all_types_are_merged(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Predictions, also those that no row of one label has, stay the same bit for bit."""
    names = list(MORE_TASKS)
    one = make("one", {name: MORE_TASKS[name] for name in names[:2]})
    two = make("two", {name: MORE_TASKS[name] for name in names[2:]}, seed=1)
    assert run(monkeypatch, "merge", tmp_path / "joined", two, one) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'joined'}: {', '.join([*names[2:], *names[:2]])}\n"
    joined = fastmtl.load(tmp_path / "joined", device="cpu")
    for path in (one, two):
        alone = fastmtl.load(path, device="cpu")
        for name in alone.recipe.task_names:
            found = joined.predict(name, MORE_ROWS[name])
            assert found == alone.predict(name, MORE_ROWS[name])
            assert len(found) == len(MORE_ROWS[name]) and found[0] != found[1]


def test_what_weighed_the_losses_in_training_is_left_behind(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = {"tone": {**TASKS["tone"], "pooling": "cls", "head": {"name": "lstm", "size": 4, "adjustment": True}}}
    smart = {"strength": {"tone": 1.0}, "proximal": 0.5}
    first = make("first", heads, weighting={"name": "uncertainty"}, smart=smart)
    second = make("second", ["same", "near"], seed=1, weighting={"name": "dwa"})
    joined = tmp_path / "joined"
    assert run(monkeypatch, "merge", joined, first, second) == 0
    assert_same_predictions(joined, first, "tone")
    assert_same_predictions(joined, second, "same")
    recipe = load_model(joined)[1]
    assert recipe.weighting.name == "fixed" and not recipe.smart.used


def test_a_merged_model_says_where_its_tasks_come_from(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = make("one", ["tone"], seed=0, adapter={"name": "lora", "size": 2, "dropout": 0.1}, optimizer={"lr": 3e-4})
    two = make("two", ["tone"], seed=1, adapter={"name": "lora", "size": 2}, gradient={"method": "pcgrad"})
    three = make("three", ["near"], seed=1, adapter={"name": "lora", "size": 2})
    assert run(monkeypatch, "merge", tmp_path / "pair", one, two, "--rename", f"{two}:tone=mood") == 0
    out = tmp_path / "all"
    assert (
        run(monkeypatch, "merge", out, tmp_path / "pair", three, "--rename", f"{tmp_path / 'pair'}:mood=feeling") == 0
    )
    origins = json.loads((out / "fastmtl.json").read_text())["merged_from"]
    assert [item["model"] for item in origins] == [str(one), str(two), str(three)]
    assert [item["tasks"] for item in origins] == [{"tone": "tone"}, {"feeling": "tone"}, {"near": "near"}]
    for item, source in zip(origins, (one, two, three), strict=True):
        assert item["recipe"] == json.loads((source / "fastmtl.json").read_text())["recipe"]
    recipe = fastmtl.load(out, device="cpu").recipe
    assert recipe.adapter.dropout == {"tone": 0.1, "feeling": 0.0, "near": 0.0}
    assert recipe.gradient.method == Recipe.model_fields["gradient"].default_factory().method  # type: ignore[call-arg]


def test_files_of_the_other_models_are_still_found(make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    one = make("one", ["near"])
    two = make("two", ["tone"], seed=1)
    write_rows(two / "tone.csv", 6)
    out = tmp_path / "joined"
    assert run(monkeypatch, "merge", out, one, two) == 0
    predictor = fastmtl.load(out, device="cpu")
    file = predictor.recipe.tasks["tone"].data.dev
    assert Path(str(file)) == two / "tone.csv"
    assert run(monkeypatch, "evaluate", out, "--task", "tone", "--json") == 0
    rows = read_file(two / "tone.csv", predictor.task("tone"), require_labels=True)
    ours, theirs = predictor.evaluate("tone", rows), fastmtl.load(two, device="cpu").evaluate("tone", rows)
    assert ours == theirs


@pytest.mark.slow
def test_models_that_do_not_fit_are_refused_by_name(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one, out = make("one", ["tone"]), tmp_path / "out"
    other_encoder = make("other_encoder", ["near"])
    weights = load_file(other_encoder / "model.safetensors")
    weights["encoder.layer.1.output.dense.bias"] = -weights["encoder.layer.1.output.dense.bias"]  # 0 becomes -0
    save_file(weights, other_encoder / "model.safetensors")
    activation = make("activation", ["near"])
    config = json.loads((activation / "config.json").read_text())
    (activation / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    cased = make("cased", ["near"])
    tokenizer = json.loads((cased / "tokenizer_config.json").read_text())
    (cased / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "do_lower_case": False}))
    damaged = make("damaged", ["near"])
    about = json.loads((damaged / "fastmtl.json").read_text())
    (damaged / "fastmtl.json").write_text(json.dumps({**about, "merged_from": [{"model": "x"}]}))
    cases: list[tuple[list[object], str]] = [
        ([one, make("two", ["tone"], seed=1)], f"--rename {tmp_path / 'two'}:tone=tone-2"),
        ([one, other_encoder], "1 of 37 tensors differ, as encoder.encoder.layer.1.output.dense.bias"),
        ([one, activation], f"{one} and {activation} have different encoders: hidden_act is gelu and relu"),
        ([one, cased], "different tokenizers"),
        ([one, make("short", ["near"], encoder={"max_length": 32})], "encoder.max_length is 64 and 32"),
        ([one, make("large", ["near"], adapter={"name": "low_rank", "size": 5})], "adapter.size is 4 and 5"),
        ([one, make("lora", ["near"], adapter={"name": "lora", "size": 4})], "adapter.name is low_rank and lora"),
        ([one, make("none", ["near"], adapter={"name": "none"})], "adapter.name is low_rank and none"),
        ([one, damaged], f"{damaged / 'fastmtl.json'}: merged_from: Field required"),
        ([one], "at least two models"),
        ([one, tmp_path / "absent"], "no model directory"),
        ([one, make("near", ["near"]), "--rename", "tone=x"], "write MODEL_DIR:old=new"),
        ([one, tmp_path / "near", "--rename", f"{out}:tone=x"], "is none of the models"),
        ([one, tmp_path / "near", "--rename", f"{one}:tome=x"], "Did you mean 'tone'?"),
        ([one, tmp_path / "near", "--rename", f"{one}:tone="], "names are unique and not empty"),
    ]
    for arguments, message in cases:
        assert run(monkeypatch, "merge", out, *arguments) == 2, message
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error
        assert not out.exists()
    (tmp_path / "file").write_text("")
    for place in (one, tmp_path / "file", tmp_path / "file" / "x"):
        assert run(monkeypatch, "merge", place, one, tmp_path / "near") == 2
        assert str(place) in capsys.readouterr().err


def test_all_layers_by_name_are_all_layers(make: Make) -> None:
    one = TrainedModel.read(make("one", ["tone"]))
    two = TrainedModel.read(make("two", ["near"], adapter={"name": "low_rank", "size": 4, "layers": [1, 0]}))
    assert join(one, two).recipe.task_names == ["tone", "near"]


def write_rows(path: Path, count: int) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "a", "y"])
        writer.writerows([str(row), SENTENCES[row % len(SENTENCES)], row % 3] for row in range(count))


@pytest.mark.slow(15)
def test_a_task_is_added_without_touching_the_others(make: Make, tmp_path: Path) -> None:
    """Train in bf16, so that the run's encoder differs from the trained one in the last bits."""
    base = make("base", ["same", "tone"], lora={"rank": 2, "alpha": 1.0, "tasks": "own"})
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    for split, count in (("train", 24), ("dev", 6)):
        write_rows(tmp_path / f"{split}.csv", count)
        tagged = "the O\nfilm B-X\nwas O\ngood O\n\n" * count
        (tmp_path / f"{split}.conll").write_text(tagged)
    task = {**TASKS["tone"], "data": {"train": "train.csv", "dev": "dev.csv", "columns": SINGLE}}
    words = {**MORE_TASKS["words"], "data": {"train": "train.conll", "dev": "dev.conll"}}
    recipe = {
        "add_to": str(base),
        "tasks": {"mood": task, "words": words},
        "data": {"dir": str(tmp_path), "cache_dir": str(tmp_path / "cache")},
        "adapter": {"dropout": 0.1},
        "optimizer": {"lr": 0.01, "weight_decay": 0.1},
        "engine": {"precision": "bf16"},
        "sampler": {"batch_size": 4},
    }
    (tmp_path / "mood.yaml").write_text(yaml.safe_dump(recipe))
    command = ["fastmtl", "train", str(tmp_path / "mood.yaml"), "--output", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    model = tmp_path / "run" / "model"
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before
    assert (model / "model.safetensors").read_bytes() == before["model.safetensors"]
    for name in ("same", "tone"):
        assert_same_predictions(model, base, name)
    for file in ("adapters.safetensors", "lora.safetensors"):
        old, new = load_file(base / file), load_file(model / file)
        for name, tensor in old.items():
            assert torch.equal(new[name][:2], tensor)
            assert len(new[name]) == 4 and new[name][2].any() and new[name][3].any()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for name in ("mood", "words"):
        losses = [line["loss"][name] for line in lines if "loss" in line]
        assert len(losses) == 6
        assert losses[-1] < losses[0]
    predictor = fastmtl.load(tmp_path / "run", device="cpu")
    assert predictor.recipe.task_names == ["same", "tone", "mood", "words"]
    (words_found,) = predictor.predict("words", [["the", "film", "was"]])
    assert len(words_found.tags) == 3 and set(words_found.tags) <= {"O", "B-X", "I-X"}
    assert {answer.label for answer in predictor.predict("mood", SENTENCES)} <= {0, 1, 2}
    resolved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert add_task.complete(Recipe.model_validate(resolved)).model_dump(mode="json") == resolved


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"tasks": {"tone": TASKS["tone"]}}, "tasks.tone: add_to: "),
        ({"encoder": {"freeze": False}}, "encoder.freeze: False, but add_to: "),
        ({"encoder": {"path": "minilm"}}, "encoder.path: minilm, but add_to: "),
        ({"encoder": {"max_length": 16}}, "encoder.max_length: 16, but add_to: "),
        ({"adapter": {"name": "pal"}}, "adapter.name: pal, but add_to: "),
        ({"adapter": {"size": 8}}, "leave adapter.size out"),
    ],
)
def test_what_a_trained_model_has_already_decided(sections: dict, message: str, make: Make) -> None:
    recipe = {"add_to": str(make("base", ["tone"])), "tasks": {"near": TASKS["near"]}, **sections}
    with pytest.raises(UserError) as caught:
        add_task.complete(Recipe.model_validate(recipe))
    assert message in str(caught.value)


def test_settings_for_training_are_the_new_recipes(make: Make) -> None:
    base = make("base", ["tone"], adapter={"name": "low_rank", "size": 4, "dropout": {"tone": 0.5}})
    own = {
        "encoder": {"path": str(base), "hidden_dropout": 0.3, "layer_norm": "apex"},
        "adapter": {"size": 4, "dropout": 0.2},
    }
    recipe = add_task.complete(Recipe.model_validate({"add_to": str(base), "tasks": {"near": TASKS["near"]}, **own}))
    assert (recipe.encoder.freeze, recipe.encoder.hidden_dropout, recipe.encoder.layer_norm) == (True, 0.3, "apex")
    assert (recipe.adapter.name, recipe.adapter.size, recipe.adapter.dropout) == ("low_rank", 4, 0.2)


def test_a_model_that_changed_during_the_run_is_not_added_to(make: Make, tmp_path: Path) -> None:
    base = make("base", ["tone"])
    added = add_task.Addition(Recipe.model_validate({"add_to": str(base), "tasks": {"near": TASKS["near"]}}))
    new = TrainedModel.read(make("new", ["near"], seed=1))
    tensors = dict(new.tensors)
    added.save(tmp_path / "out", new.model, new.recipe, new.tokenizer, tensors)
    assert fastmtl.load(tmp_path / "out", device="cpu").recipe.task_names == ["tone", "near"]
    name = "encoder.embeddings.LayerNorm.weight"
    tensors[name] = tensors[name] + 1e-6
    with pytest.raises(UserError, match="different encoders"):
        added.save(tmp_path / "out", new.model, new.recipe, new.tokenizer, tensors)


def pooled(directory: Path, texts: list[str], mode: Any, cache: Path) -> torch.Tensor:
    """Return the vectors of fastmtl's own encoder without adapters."""
    model, recipe, tokenizer = load_model(directory)
    rows = Rows(path=Path("texts"), ids=texts, texts=texts, pair_texts=None, labels=None)
    data = tokenize(rows, tokenizer, recipe.tasks["tone"], model.encoder.max_length, cache)
    (batch,) = evaluation_batches(data, 0, 1, 8192)
    with torch.no_grad():
        vectors = pool(model.encoder(batch), batch.cu_seqlens, mode=mode)
    return vectors[batch.example_ids[0].argsort()]


@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
def test_sentence_transformers_layout(
    pooling: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Check the files by sentence-transformers' documentation, with transformers alone."""
    model = make("model", ["tone"], encoder={"max_length": 12})
    out = tmp_path / "embeddings"
    assert run(monkeypatch, "export", model, out, "--format", "sentence-transformers", "--pooling", pooling) == 0
    said = capsys.readouterr().out
    assert "the adapters of tone are not in it" in said
    assert "12 tokens" in said
    modules = json.loads((out / "modules.json").read_text())
    assert [(module["path"], module["type"].split(".")[-1]) for module in modules] == [
        ("", "Transformer"),
        ("1_Pooling", "Pooling"),
    ]
    assert json.loads((out / "sentence_bert_config.json").read_text())["max_seq_length"] == 12
    found = json.loads((out / "1_Pooling" / "config.json").read_text())
    keys = {"mean": "mean_tokens", "cls": "cls_token", "max": "max_tokens"}
    assert found == {"word_embedding_dimension": 32} | {f"pooling_mode_{k}": m == pooling for m, k in keys.items()}
    assert not list(out.glob("*head*")) and not list(out.glob("*adapter*")) and not (out / "fastmtl.json").exists()

    texts = [*SENTENCES, " ".join(SENTENCES)]
    tokens = AutoTokenizer.from_pretrained(str(out))(
        texts, padding=True, truncation=True, max_length=12, return_tensors="pt"
    )
    encoder = AutoModel.from_pretrained(str(out), add_pooling_layer=False).eval()
    with torch.no_grad():
        hidden = encoder(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None].bool()
    expected = {
        "mean": (hidden * mask).sum(1) / mask.sum(1),
        "cls": hidden[:, 0],
        "max": hidden.masked_fill(~mask, -torch.inf).amax(1),
    }[pooling]
    torch.testing.assert_close(pooled(model, texts, pooling, tmp_path), expected, atol=2e-6, rtol=0)
    library = pytest.importorskip("sentence_transformers")
    theirs = library.SentenceTransformer(str(out), device="cpu").encode(texts, convert_to_tensor=True)
    torch.testing.assert_close(theirs, expected, atol=2e-6, rtol=0)


def test_berts_pooler_is_a_dense_layer_on_cls(
    make: Make, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bert, out = tmp_path / "bert", tmp_path / "out"
    shutil.copytree(tiny_bert, bert)
    torch.manual_seed(1)
    AutoModel.from_pretrained(str(bert)).save_pretrained(bert)  # with a random pooler
    task = {**TASKS["tone"], "pooling": "pooler"}
    model = make("model", {"tone": task}, encoder={"path": str(bert)}, adapter={"name": "none"})
    assert run(monkeypatch, "export", model, out) == 0
    assert "pooling: pooler" in capsys.readouterr().out
    assert [module["path"] for module in json.loads((out / "modules.json").read_text())] == ["", "1_Pooling", "2_Dense"]
    assert json.loads((out / "1_Pooling" / "config.json").read_text())["pooling_mode_cls_token"] is True
    dense, weights = load_file(out / "2_Dense" / "model.safetensors"), load_file(model / "model.safetensors")
    assert torch.equal(dense["linear.weight"], weights["pooler.dense.weight"])
    assert torch.equal(dense["linear.bias"], weights["pooler.dense.bias"])

    assert run(monkeypatch, "export", make("plain", ["tone"]), tmp_path / "none", "--pooling", "pooler") == 2
    assert "its directory has none" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()

    library = pytest.importorskip("sentence_transformers")
    tokens = AutoTokenizer.from_pretrained(str(out))(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = AutoModel.from_pretrained(str(out)).eval()(**tokens).pooler_output
    theirs = library.SentenceTransformer(str(out), device="cpu").encode(SENTENCES, convert_to_tensor=True)
    torch.testing.assert_close(theirs, expected, atol=2e-6, rtol=0)


def test_tasks_that_score_tokens_have_no_pooling(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {"words": MORE_TASKS["words"]}
    model = make("model", {"tone": TASKS["tone"], **words}, adapter={"name": "none"})
    assert run(monkeypatch, "export", model, tmp_path / "st") == 0
    assert "pooling: mean" in capsys.readouterr().out
    assert run(monkeypatch, "export", model, tmp_path / "none", "--task", "words") == 2
    assert "--task words: it reads the states of tokens, no pooling: choose" in capsys.readouterr().err
    assert run(monkeypatch, "export", make("alone", words), tmp_path / "none") == 2
    assert "no pooling: choose with --pooling mean|cls|max|pooler" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_tasks_projection_is_exported_with_its_pooling(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = {
        "near": {**TASKS["near"], "pooling": "mean", "head": {"name": "cosine", "projection": 5}},
        "tone": {**TASKS["tone"], "pooling": "cls", "head": {"name": "rnn"}},
    }
    model, out = make("model", tasks, adapter={"name": "none"}), tmp_path / "st"
    assert run(monkeypatch, "export", model, out, "--task", "near") == 0
    assert [module["path"] for module in json.loads((out / "modules.json").read_text())] == ["", "1_Pooling", "2_Dense"]
    settings = json.loads((out / "2_Dense" / "config.json").read_text())
    assert settings["out_features"] == 5 and settings["activation_function"].endswith("Identity")
    dense, heads = load_file(out / "2_Dense" / "model.safetensors"), load_file(model / "heads.safetensors")
    for name in ("weight", "bias"):
        assert torch.equal(dense[f"linear.{name}"], heads[f"near.embed.dense.{name}"])
    assert run(monkeypatch, "export", model, tmp_path / "none", "--task", "tone") == 2
    assert "its vectors are states of its rnn head" in capsys.readouterr().err


def test_transformers_layout_is_the_encoder_alone(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = make("model", ["tone"]), tmp_path / "encoder"
    out.mkdir()  # an empty directory is accepted
    assert run(monkeypatch, "export", model, out, "--format", "transformers") == 0
    assert (out / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    assert {path.name for path in out.iterdir()} <= {path.name for path in model.iterdir()} - {"fastmtl.json"}
    loaded = AutoModel.from_pretrained(str(out), add_pooling_layer=False).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in load_file(model / "model.safetensors").items())


def test_the_pooling_is_the_tasks_own(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = make("model", ["same", "tone"], adapter={"name": "none"}), tmp_path / "out"
    assert run(monkeypatch, "export", model, out) == 2
    assert "the tasks pool differently (same: cls, tone: mean)" in capsys.readouterr().err
    assert run(monkeypatch, "export", model, out, "--task", "tune") == 2
    assert "Did you mean 'tone'?" in capsys.readouterr().err
    assert run(monkeypatch, "export", model, out, "--format", "transformers", "--task", "tone") == 2
    assert "has no pooling" in capsys.readouterr().err
    assert not out.exists()
    assert run(monkeypatch, "export", model, out, "--task", "tone") == 0
    assert "pooling: mean" in capsys.readouterr().out
    assert run(monkeypatch, "export", model, out, "--task", "tone") == 2
    assert "not empty" in capsys.readouterr().err
    single = make("single", ["near"], adapter={"name": "none"})
    assert run(monkeypatch, "export", single, tmp_path / "own") == 0
    assert json.loads((tmp_path / "own" / "1_Pooling" / "config.json").read_text())["pooling_mode_cls_token"] is True


@pytest.mark.parametrize("name", ["lora", "low_rank", "pal"])
def test_adapters_are_no_weights_of_bert(
    name: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = make("model", ["tone"], adapter={"name": name, "size": 12}), tmp_path / "out"
    assert run(monkeypatch, "export", model, out, "--task", "tone") == 2
    error = capsys.readouterr().err
    assert "--task tone: its vectors need its adapter" in error
    assert "Leave --task out" in error
    assert not out.exists()
