"""Encoders that run as transformers' own modules on padded batches."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import packed_batches
import pytest
import torch
from other_encoders import KINDS, edit_json, save_other
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForTextEncoding

from fastmtl.bench.waits import host_waits
from fastmtl.config import EncoderConfig, Recipe
from fastmtl.data.packed_batch import PackedBatch
from fastmtl.errors import UserError
from fastmtl.model.encoder.encoder import PackedEncoder
from fastmtl.model.encoder.one_pass import check_one_pass
from fastmtl.model.encoder.pretrained import load_encoder, load_tokenizer
from fastmtl.model.encoder.transformers_encoder import TransformersEncoder
from fastmtl.model.groups import parameter_groups
from fastmtl.model.multitask import MultiTaskModel
from fastmtl.surgery.gradient_surgery import GradientSurgery

MakeBatch = Callable[..., PackedBatch]
TASKS: dict[str, dict[str, Any]] = packed_batches.TASKS  # type: ignore[assignment]
LENGTHS = [[5, 1, 9], [], [3, 12, 7, 2]]
every_kind = pytest.mark.parametrize("name", [name for name in KINDS if name != "longformer"])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return saved(name): the directory of that kind, which is written once."""
    made: dict[str, Path] = {}

    def directory(name: str) -> Path:
        if name not in made:
            made[name] = save_other(name, tmp_path_factory.mktemp("others") / name)
        return made[name]

    return directory


def settings(directory: Path, **more: Any) -> EncoderConfig:
    length = 30 if directory.name == "t5" else None
    return EncoderConfig(**{"path": str(directory), "max_length": length, **more})


def loaded(directory: Path, **more: Any) -> TransformersEncoder:
    encoder = load_encoder(settings(directory, **more))
    assert isinstance(encoder, TransformersEncoder)
    return encoder


WAYS: tuple[Literal["auto", "packed", "transformers"], ...] = ("auto", "packed", "transformers")


@every_kind
def test_hidden_states_are_those_of_transformers(
    name: str, saved: Callable[[str], Path], make_batch: MakeBatch
) -> None:
    encoder, batch = loaded(saved(name)).eval(), make_batch(LENGTHS)
    auto = AutoModelForTextEncoding if name == "t5" else AutoModel
    theirs = auto.from_pretrained(saved(name)).eval()
    bounds = batch.host.cu_seqlens
    pieces = [slice(*pair) for pair in zip(bounds, bounds[1:], strict=False)]
    ids, types = (
        torch.nn.utils.rnn.pad_sequence([x[piece] for piece in pieces], batch_first=True)
        for x in (batch.input_ids, batch.token_type_ids)
    )
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(p.stop - p.start) for p in pieces], batch_first=True)
    inputs = {"input_ids": ids, "attention_mask": mask.long()} | ({} if name == "t5" else {"token_type_ids": types})
    with torch.no_grad():
        expected = theirs(**inputs).last_hidden_state[mask.bool()]
        found = encoder(batch)
    assert torch.equal(found, expected) and found.std() > 0.1
    assert ("padding changes" in encoder.note) == (name == "convbert")


@pytest.mark.parametrize("name", KINDS)
def test_biases_and_norms_have_no_weight_decay(name: str, saved: Callable[[str], Path]) -> None:
    encoder = loaded(saved(name))
    groups = parameter_groups([("encoder", encoder, 1e-3)], weight_decay=0.1)
    decays = {id(parameter): group["weight_decay"] > 0 for group in groups for parameter in group["params"]}
    for key, parameter in encoder.named_parameters():
        if parameter.requires_grad:
            assert decays[id(parameter)] == (parameter.dim() > 1 and not key.endswith(".bias")), key


@pytest.mark.parametrize("name", KINDS)
def test_task_gradients_of_one_pass_are_those_of_a_pass_per_task(
    name: str, saved: Callable[[str], Path], make_batch: MakeBatch
) -> None:
    batch = make_batch(LENGTHS, pairs=[False, False, True])
    tasks = {task: {**values, "pooling": "mean"} for task, values in TASKS.items()}
    encoder = settings(saved(name), hidden_dropout=0.0, recompute="none" if name == "squeezebert" else "full")
    recipe = Recipe.model_validate({"encoder": encoder.model_dump(), "tasks": tasks, "data": {"dir": "."}})
    model = MultiTaskModel(recipe, load_encoder(recipe.encoder))
    assert isinstance(model.encoder, TransformersEncoder)
    model.encoder.eval()
    model.heads.eval()
    shared = model.shared_parameters()
    losses = {task: loss / max(count, 1) for task, (loss, count) in model(batch).items()}
    rows = [torch.autograd.grad(loss, shared, retain_graph=True, allow_unused=True) for loss in losses.values()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    surgery = GradientSurgery(
        optimizer, "pcgrad", tasks=recipe.task_names, model=model.encoder.trunk, shared=shared, sparse=[]
    )
    model.encoder.rows = surgery.rows
    info = surgery.run([batch], lambda batch, task_grads: model(batch, task_grads))
    assert info.skipped is None and info.task_norms[0] > 0 and info.task_norms[1] == 0 < info.task_norms[2]
    for parameter, *of_tasks in zip(shared, *rows, strict=True):
        expected = sum(
            weight * gradient
            for weight, gradient in zip(info.weights.tolist(), of_tasks, strict=True)
            if gradient is not None
        )
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-5 * float(info.merged_norm or 0))


def test_bert_gives_the_hidden_states_of_the_packed_encoder(tiny_bert: Path, make_batch: MakeBatch) -> None:
    batch = make_batch(LENGTHS)
    found = {way: load_encoder(EncoderConfig(path=str(tiny_bert), implementation=way)).eval() for way in WAYS}
    assert isinstance(found["auto"], PackedEncoder) and isinstance(found["transformers"], TransformersEncoder)
    states = {way: encoder(batch) for way, encoder in found.items()}
    assert torch.equal(states["auto"], states["packed"])
    torch.testing.assert_close(states["transformers"], states["packed"], rtol=1e-4, atol=1e-5)


def test_the_host_waits_for_the_masks_of_transformers_only(tiny_bert: Path, make_batch: MakeBatch) -> None:
    encoder = load_encoder(EncoderConfig(path=str(tiny_bert), implementation="transformers"))
    batch = make_batch(LENGTHS)
    waits = host_waits(lambda: encoder(batch))
    assert all(wait.partition(": ")[2].startswith("transformers/") for wait in waits), waits
    assert host_waits(lambda: batch.seq_offsets.tolist())  # a wait would be found


def test_parameters_without_an_effect_are_not_trained(saved: Callable[[str], Path]) -> None:
    encoder = loaded(saved("squeezebert"))
    assert [name for name, p in encoder.named_parameters() if not p.requires_grad] == [
        "model.pooler.dense.weight",
        "model.pooler.dense.bias",
    ]
    assert all(parameter.requires_grad for parameter in loaded(saved("t5")).parameters())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "gpt2"}, "'gpt2' is no text encoder of transformers"),
        ({"model_type": "bart"}, "'bart' is a sequence-to-sequence model, whose encoder has no class of its own"),
        (
            {"model_type": "mine", "auto_map": {"AutoModel": "code.Mine"}},
            "'mine', which transformers does not have, and its own code .auto_map. is not executed",
        ),
        ({"model_type": None}, "has no model_type"),
        ({"is_decoder": True}, "a decoder"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config: quantized weights cannot be trained"),
        ({"num_hidden_layers": 1}, "holds tensors that MegatronBertModel of its config.json does not have: .*layer.1"),
        ({"num_hidden_layers": 3}, "lacks the tensors .*layer.2.* of MegatronBertModel"),
        ({"intermediate_size": 20}, "MegatronBertModel of transformers does not load its weights"),
    ],
)
def test_other_models_and_damaged_directories_are_refused(
    values: dict[str, Any], message: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = shutil.copytree(saved("megatron"), tmp_path / "model")
    edit_json(directory / "config.json", **values)
    with pytest.raises(UserError, match=message):
        load_encoder(settings(directory))


def test_code_of_a_directory_or_a_hub_is_never_run(saved: Callable[[str], Path], tmp_path: Path) -> None:
    directory = shutil.copytree(saved("megatron"), tmp_path / "model")
    ran = tmp_path / "ran"
    (directory / "code.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Mine: pass\n")
    edit_json(directory / "config.json", auto_map={"AutoModel": "code.Mine"}, attn_implementation="someone/kernel")
    edit_json(
        directory / "tokenizer_config.json", tokenizer_class="Mine", auto_map={"AutoTokenizer": ["code.Mine", None]}
    )
    encoder = loaded(directory)
    load_tokenizer(settings(directory))
    assert not ran.exists()
    assert not hasattr(encoder.config, "auto_map") and encoder.model.config._attn_implementation in ("eager", "sdpa")


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("t5", {"max_length": None}, "encoder.max_length: T5EncoderModel has no largest length of its own: set one"),
        ("t5", {"attention_dropout": 0.1}, "encoder.attention_dropout: T5Config of transformers has no such rate"),
        ("megatron", {"max_length": 41}, "encoder.max_length: 41, but MegatronBertModel has 40 positions"),
        ("longformer", {"max_length": 39}, "encoder.max_length: 39, but LongformerModel has 38 positions"),
        ("megatron", {"recompute": "cheap"}, "encoder.recompute: cheap needs .*supports none and full"),
        ("squeezebert", {"recompute": "full"}, "encoder.recompute: full: SqueezeBertModel .* cannot recompute"),
        ("megatron", {"implementation": "packed"}, "packed encoders of model_type 'bert'"),
    ],
)
def test_settings_of_the_encoder_that_do_not_fit(
    name: str, values: dict[str, Any], message: str, saved: Callable[[str], Path]
) -> None:
    with pytest.raises(UserError, match=message):
        load_encoder(settings(saved(name), **values))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"adapter": {"name": "pal"}}, "adapter.name: pal needs a packed encoder"),
        ({"adapter": {"top": "layer"}}, "adapter.top: layer needs a packed encoder"),
        ({"smart": {"strength": 1.0}}, "smart needs a packed encoder"),
        ({"lora": {"rank": 2}}, "lora needs a packed encoder"),
        ({"engine": {"cuda_graphs": True}}, "engine.cuda_graphs: true needs a packed encoder"),
        ({"encoder": {"layer_norm": "apex"}}, "encoder.layer_norm: apex needs a packed encoder"),
        ({"tasks": {"sst": {**TASKS["sst"], "pooling": "pooler"}}}, "tasks.sst: pooling: pooler needs "),
    ],
)
def test_settings_that_need_a_packed_encoder(
    sections: dict[str, Any], message: str, saved: Callable[[str], Path]
) -> None:
    encoder = {"path": str(saved("megatron")), **sections.get("encoder", {})}
    recipe = Recipe.model_validate({"tasks": TASKS, **sections, "encoder": encoder})
    with pytest.raises(UserError, match=message):
        MultiTaskModel(recipe, loaded(saved("megatron")))


def test_a_model_that_gives_no_task_gradients_is_refused_before_a_run(
    saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = loaded(saved("t5"))
    check_one_pass(encoder, "pcgrad")
    assert not any("forward" in module.__dict__ for module in encoder.modules()) and encoder.training
    monkeypatch.setattr("fastmtl.surgery.attach.sites.PER_TASK", ())  # as for a class that is not known
    with pytest.raises(UserError, match=r"gradient.method: pcgrad needs task gradients of T5EncoderModel, and module"):
        check_one_pass(encoder, "pcgrad")


def test_weights_of_a_pickle_are_read_without_running_it(saved: Callable[[str], Path], tmp_path: Path) -> None:
    directory = shutil.copytree(saved("megatron"), tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    torch.save({"weights": Path}, directory / "pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin: damaged, or no file of weights"):
        load_encoder(settings(directory))
    (directory / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\n")
    with pytest.raises(UserError, match="pytorch_model.bin: a pointer of Git LFS in place of the weights: run git lfs"):
        load_encoder(settings(directory))
    torch.save({f"bert.{name}": tensor.half() for name, tensor in tensors.items()}, directory / "pytorch_model.bin")
    found = loaded(directory).file_tensors(loaded(directory).state_dict())
    assert all(
        torch.equal(found[name], tensor.half().float()) for name, tensor in tensors.items() if "pooler" not in name
    )


def test_a_tied_table_is_saved_once(saved: Callable[[str], Path], tmp_path: Path) -> None:
    encoder = loaded(saved("t5"))
    tensors = encoder.file_tensors({name: tensor.clone() for name, tensor in encoder.state_dict().items()})
    assert "shared.weight" in tensors and "encoder.embed_tokens.weight" not in tensors
    save_file(tensors, tmp_path / "model.safetensors")


def test_a_tokenizer_needs_no_first_token(saved: Callable[[str], Path]) -> None:
    assert load_tokenizer(settings(saved("t5"))).cls_token_id is None
