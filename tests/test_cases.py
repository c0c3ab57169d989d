"""Inputs that once failed, by name, with tests of their correct outcome.

Cheap ones run below. ELSEWHERE lists the tests of the others.
"""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from reader_cases import CASES, case, read, refused, task
from torch import nn
from transformers import AutoTokenizer

from fastmtl.config import EncoderConfig, Recipe, load_recipe, parse_recipe
from fastmtl.data.rows import Rows
from fastmtl.data.tokenized import check_token_types, tokenize
from fastmtl.engine.build import check_engine
from fastmtl.engine.settings import deepspeed_config
from fastmtl.files.output_folder import OutputFolder
from fastmtl.model.encoder.pretrained import load_encoder, load_tokenizer
from fastmtl.recipes import yaml_reader as recipe_yaml
from fastmtl.surgery import GradientSurgery
from fastmtl.surgery.methods.order import draw_order
from fastmtl.surgery.methods.table import find_method
from fastmtl.sweep.grid import read_grid
from fastmtl.training.phases import split

HERE = Path(__file__).parent
SILENT = """A02 A02c A02b A03 C36 A01 A07 A08 A08d A09 C06 C06b C07 C07b C33 A06 A17 D01 C37 A14 D07b E03 C21 C40 D17
C20b""".split()
LOUD = """A04 C17 C38b C38 A10 C35 C12b C01 C09 C10 C38d C04 C05 D02 D03 D08b D06 D16 C02c C02b A05 A12 C37d C26 C11 C20
C14""".split()
ELSEWHERE = {
    "C06": ["runs/test_resume.py::test_a_longer_run_is_the_uninterrupted_one"],
    "C06b": ["runs/test_resume.py::test_a_longer_run_is_the_uninterrupted_one"],
    "C07": [
        "runs/test_resume.py::test_other_settings_are_refused_all_at_once",
        "runs/test_resume.py::test_accepted_changes_count_and_are_recorded",
    ],
    "C07b": ["runs/test_resume.py::test_other_rows_are_refused_and_the_same_rows_elsewhere_are_not"],
    "C33": [
        "data/test_token_plan.py::test_every_row_once_in_an_epoch",
        "data/test_token_plan.py::test_rows_that_fill_no_step_open_the_next_epoch",
    ],
    "D01": ["surgery/test_unreached.py::test_what_no_loss_reaches_stays_as_it_is"],
    "D03": ["surgery/test_losses.py::test_reentrant_checkpointing"],
    "D08b": ["surgery/test_losses.py::test_sparse_gradients"],
    "D16": ["surgery/test_losses.py::test_what_is_given_in_place_of_parameters_and_names"],
    "D17": ["surgery/test_adamw.py::test_the_norm_of_many_numbers"],
    "E03": [
        "kernels/varlen_attention/test_varlen_attention_large_scores.py::test_gradients_are_as_accurate_as_plain_float32"
    ],
    "C20b": ["files/test_output_folder.py::test_the_second_run_is_refused_until_the_first_is_gone_even_by_kill_9"],
    "C12b": [
        "runs/test_resume.py::test_a_longer_run_is_the_uninterrupted_one",
        "runs/test_difficult_machines.py::test_a_path_with_brackets_has_a_plain_one",
    ],
    "C09": [
        "runs/test_difficult_machines.py::test_no_home",
        "runs/test_difficult_machines.py::test_weights_without_permission",
    ],
    "C10": [
        "runs/test_startup.py::test_a_full_disk_is_told_before_deepspeed_starts",
        "runs/test_difficult_machines.py::test_a_full_disk_is_one_sentence_whoever_writes",
    ],
    "C38d": ["test_cli.py::test_advice_of_a_run_that_cannot_go_on_stands_alone"],
    "C11": ["inference/test_predict.py::test_files_that_a_relative_data_dir_does_not_find_are_to_be_named_by_data"],
    "C14": ["runs/test_difficult_machines.py::test_signs_that_the_encoding_lacks_are_replaced"],
}


@pytest.mark.parametrize("name", CASES)
def test_case(name: str, tmp_path: Path, tiny_bert: Path) -> None:
    CASES[name](tmp_path, tiny_bert)


def test_each_case_has_a_test() -> None:
    assert not set(CASES) & set(ELSEWHERE)
    assert {*CASES, *ELSEWHERE} == {*SILENT, *LOUD}
    for node in {node for nodes in ELSEWHERE.values() for node in nodes}:
        file, _, function = node.partition("::")
        tree = ast.parse((HERE / file).read_text(encoding="utf-8"))
        assert function in {item.name for item in tree.body if isinstance(item, ast.FunctionDef)}, node


def recipe(values: str, *overrides: str, folder: Path) -> Recipe:
    file = folder / "recipe.yaml"
    file.write_text(f"tasks: {{mood: {{type: binary, data: {{train: a.csv}}}}}}\n{values}", encoding="utf-8")
    return load_recipe(str(file), overrides)


@case("A17")
def a_key_twice(folder: Path, _: Path) -> None:
    refused(lambda: recipe("train: {epochs: 1}\ntrain: {epochs: 2}\n", folder=folder), "the key 'train' occurs twice")
    refused(lambda: recipe("sampler: {batch_size: {mood: 1, mood: 2}}\n", folder=folder), "the key 'mood' occurs twice")


@case("C37", "A14")
def labels_that_cannot_be(folder: Path, _: Path) -> None:
    for values in (
        "type: binary, label_names: ['no', maybe, 'yes']",
        "type: regression, range: [3, 3]",
        "type: regression, range: [5, 0]",
        "type: classification, label_names: [a, a]",
    ):
        given = recipe_yaml.load(f"{{tasks: {{mood: {{{values}, data: {{}}}}}}}}")
        refused(lambda given=given: parse_recipe(given, "r.yaml"), "r.yaml: tasks.mood")


@case("C01")
def names_of_tasks_that_are_no_names_of_files(_: Path, __: Path) -> None:
    for name in ("a/b", "<b>x</b>", "x" * 300, "../up"):
        given = {"tasks": {name: {"type": "binary", "data": {}}}}
        refused(lambda given=given: parse_recipe(given, "r.yaml"), "r.yaml: tasks: the name")


@case("C04")
def numbers_for_deepspeed(folder: Path, _: Path) -> None:
    good = recipe("deepspeed: {zero_optimization: {reduce_bucket_size: 5e8}}\n", folder=folder)
    check_engine(good, 1)
    assert deepspeed_config(good, 1, cpu=True)["zero_optimization"]["reduce_bucket_size"] == 500_000_000
    bad = recipe("deepspeed: {zero_optimization: {reduce_bucket_size: many}}\n", folder=folder)
    refused(lambda: check_engine(bad, 1), "deepspeed.zero_optimization.reduce_bucket_size: ")


@case("C05")
def numbers_for_a_method(folder: Path, _: Path) -> None:
    gradient = recipe("gradient: {method: cagrad, options: {c: 4e-1}}\n", folder=folder).gradient
    assert gradient.options == {"c": 0.4}


@case("C36")
def small_gradients_for_a_solver(_: Path, __: Path) -> None:
    pytest.importorskip("torchjd")
    large = torch.tensor([[4.0, -1.0], [-1.0, 2.0]])
    for name, options in (("cagrad", {"c": 0.4}), ("upgrad", {})):
        method: Any = find_method(name, options=options)
        small, ordinary = (method.weights(scale * large, draw_order(2, 0, 0)) for scale in (1e-8, 1.0))
        assert torch.allclose(small, ordinary, rtol=1e-3) and ordinary.abs().min() > 0


@case("C02c", "C02b")
def early_stopping_without_a_dev_file(folder: Path, _: Path) -> None:
    for setting in ("metric=mood/accuracy", "patience=2"):
        settings = recipe("", f"early_stopping.{setting}", folder=folder)
        refused(lambda settings=settings: split(settings), "early_stopping.")


@case("C37d")
def numbers_that_no_run_can_use(folder: Path, _: Path) -> None:
    refused(lambda: recipe("", "optimizer.betas=[1.5, 2]", folder=folder), "optimizer.betas.0")
    refused(lambda: recipe("", f"seed={10**20}", folder=folder), "seed: ")


@case("C26")
def a_date_in_a_grid(folder: Path, _: Path) -> None:
    recipe("", folder=folder)
    (folder / "grid.yaml").write_text("seed: [2020-01-01]\n", encoding="utf-8")
    refused(lambda: read_grid(folder / "grid.yaml", str(folder / "recipe.yaml"), []), "grid.yaml", "is no setting")


@case("C20")
def a_disk_of_its_own_as_output(folder: Path, _: Path) -> None:
    (folder / "lost+found").mkdir()
    OutputFolder(folder, resume=False).release()


@case("C38b")
def a_tokenizer_that_names_no_token_types(folder: Path, bert: Path) -> None:
    shutil.copytree(bert, folder / "bert")
    file = folder / "bert" / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**settings, "model_input_names": ["input_ids", "attention_mask"]}), encoding="utf-8")
    tokenizer = load_tokenizer(EncoderConfig(path=str(folder / "bert")))
    data = tokenize(pairs(folder), tokenizer, task(), 32, folder / "cache")
    assert data.second_text.tolist() == [4]  # [CLS] good film [SEP] | bad film [SEP]


@case("C38")
def pairs_for_an_encoder_with_one_token_type(folder: Path, bert: Path) -> None:
    data = tokenize(pairs(folder), AutoTokenizer.from_pretrained(bert), task(), 32, folder / "cache")
    refused(lambda: check_token_types([data], 1), "need two token types", "type_vocab_size")


@case("C40")
def a_tokenizer_is_saved_as_it_was(folder: Path, bert: Path) -> None:
    tokenizer = load_tokenizer(EncoderConfig(path=str(bert)))
    tokenize(pairs(folder), tokenizer, task(), 8, folder / "cache")
    tokenizer.save_pretrained(folder / "saved")
    saved, own = (json.loads((place / "tokenizer.json").read_text("utf-8")) for place in (folder / "saved", bert))
    assert saved["truncation"] == own["truncation"] and saved["padding"] == own["padding"]


def pairs(folder: Path) -> Rows:
    config = task(data={"columns": {"text": "a", "text_pair": "b", "label": "label"}})
    return read(folder / "pairs.csv", "a,b,label\ngood film,bad film,0\n", config)


@case("C21")
def biases_of_a_recurrent_head(folder: Path, bert: Path) -> None:
    from fastmtl.model.multitask import MultiTaskModel

    given = recipe("", f"encoder.path={bert}", "tasks.mood.head={name: lstm, size: 4}", folder=folder)
    model = MultiTaskModel(given, load_encoder(given.encoder))
    decaying = {id(p) for g in model.parameter_groups(given.optimizer) if g["weight_decay"] for p in g["params"]}
    biases = [name for name, _ in model.named_parameters() if "bias_" in name]
    assert len(biases) >= 2
    assert not [name for name, p in model.named_parameters() if "bias" in name and id(p) in decaying]


class Net(nn.Module):
    """A shared layer and a head for each of two tasks."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.shared = nn.Embedding(5, 3), nn.Linear(3, 3)
        self.heads = nn.ModuleList([nn.Linear(3, 1), nn.Linear(3, 1)])

    def losses(self) -> dict[str, tuple[torch.Tensor, int]]:
        x = self.shared(self.words(torch.tensor([1, 2])))
        return {name: (head(x).square().sum(), 2) for name, head in zip("ab", self.heads, strict=True)}

    def surgery(self, method: str = "pcgrad", shared: Any = None) -> GradientSurgery:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        given = [*self.words.parameters(), *self.shared.parameters()] if shared is None else shared
        return GradientSurgery(optimizer, method, tasks=["a", "b"], shared=given)


@case("D02")
def a_tied_parameter_given_twice(_: Path, __: Path) -> None:
    gradients = []
    for twice in (0, 1):
        torch.manual_seed(0)
        net = Net()
        shared = [*net.words.parameters(), *net.shared.parameters(), *[net.words.weight] * twice]
        net.surgery(shared=shared).backward(net.losses())
        gradients.append([parameter.grad for parameter in net.parameters()])
    assert all(
        torch.equal(one, two) for one, two in zip(*gradients, strict=True) if one is not None and two is not None
    )


@case("D06")
def losses_that_are_none(_: Path, __: Path) -> None:
    net = Net()
    for losses in ({"a": (0.0, 0)}, {"a": (torch.ones(1, requires_grad=True), 1)}, {"a": torch.ones(())}):
        refused(lambda losses=losses: net.surgery().backward(losses), "the loss of task a")
    refused(lambda: net.surgery("PCGrad"), "Did you mean 'pcgrad'?")


@case("D07b")
def unfreezing_after_surgery_was_made(_: Path, __: Path) -> None:
    net = Net()
    net.words.requires_grad_(False)
    surgery = net.surgery()
    net.words.requires_grad_(True)
    refused(lambda: surgery.backward(net.losses()), "make GradientSurgery anew")
