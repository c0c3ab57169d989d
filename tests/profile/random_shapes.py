"""Measure random small recipes and the model's predictions; print JSON for the tests.

Usage: random_shapes.py NUMBER SEED RANKS. It runs in separate processes, since DeepSpeed's engine
needs a process group. Every rank has the same rows.
"""

from __future__ import annotations

import copy
import gc
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ranks import run_ranks
from sent import Sent
from transformers import AutoConfig, DistilBertConfig, PretrainedConfig

from fastmtl.config import Recipe, parse_recipe
from fastmtl.data.packed_batch import PackedBatch
from fastmtl.data.packing import pack
from fastmtl.data.tokenized import TokenizedDataset, UnitTable
from fastmtl.engine.distributed import Ranks, start
from fastmtl.model.encoder.families import FAMILIES
from fastmtl.model.multitask import MultiTaskModel
from fastmtl.profile.load import Load
from fastmtl.profile.predict import predict
from fastmtl.profile.shape import Shape
from fastmtl.profile.steps import Steps
from fastmtl.profile.traffic import Collective, traffic

ADAPTERS: tuple[dict[str, Any] | None, ...] = (
    None,
    {"name": "pal", "size": 24, "heads": 4},
    {"name": "low_rank", "size": 32, "activation": "gelu"},
    {"name": "lora", "size": 4, "dropout": 0.1},
    {"name": "low_rank", "size": 8, "top": "layer"},
    {"name": "none", "top": "pal", "size": 24, "heads": 4},
)


# The two ranks draw the first four.
FAMILY_NAMES = (
    *("bert", "modernbert", "deberta-v2", "albert"),
    *("electra", "distilbert", "mpnet", "roberta", "xlm-roberta", "camembert"),
)
# Recipes with a LoRA: its section, freeze, recompute, storage, precision, ZeRO stage.
LORAS: tuple[tuple[dict[str, Any], bool, str, str, str, int], ...] = (
    ({"rank": 8, "targets": "all-linear", "dropout": 0.1}, True, "cheap", "replay", "bf16", 2),
    ({"rank": 8, "targets": ["query", "output"], "tasks": "own"}, True, "none", "stacked", "fp32", 0),
    ({"rank": 4, "layers": [1, 2]}, False, "full", "stacked", "bf16", 1),
    ({"rank": 16, "targets": "all-linear"}, True, "none", "kept", "fp32", 1),
)
# Recipes whose heads score tokens or several texts of a row: types, settings of a task of type
# tokens, precision, storage, ZeRO stage.
UNITS: tuple[tuple[list[str], dict[str, Any], str, str, int], ...] = (
    (["tokens", "choice", "binary"], {"loss": "crf"}, "fp32", "stacked", 2),
    (["tokens", "tokens"], {"head": {"name": "mlp", "hidden": [100]}}, "bf16", "replay", 1),
)
# Recipes with sums of squared task gradients: precision, storage, ZeRO stage.
SQUARES: tuple[tuple[str, str, int], ...] = (("fp32", "replay", 1), ("bf16", "stacked", 2))
TAGS = 50
KEPT = 2  # recipes with J that are also measured with `storage: kept`


def draw(random: np.random.Generator, family: str) -> tuple[Recipe, PretrainedConfig, list[PackedBatch]]:
    """Return a recipe, an encoder's configuration and the micro-batches of a step."""

    def one(*choices: Any) -> Any:
        return choices[random.integers(len(choices))]

    heads = one(2, 4)
    hidden = heads * one(8, 16, 24, 32)
    dropout = one(0.0, 0.1)
    sizes: dict[str, Any] = {
        "vocab_size": int(random.integers(40, 4000)),
        "hidden_size": hidden,
        "num_hidden_layers": int(random.integers(1, 5)),
        "num_attention_heads": heads,
        "intermediate_size": hidden * one(2, 3, 4),
        "max_position_embeddings": one(64, 512),
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
    }
    if family in ("electra", "albert"):
        sizes["embedding_size"] = 16
    if family == "deberta-v2":
        sizes |= {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 32}
    if family == "modernbert":
        sizes |= dict.fromkeys(("embedding_dropout", "attention_dropout", "mlp_dropout"), dropout)
        sizes |= {f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "cls", "sep")}
    if family == "distilbert":
        names = DistilBertConfig.attribute_map | {
            "intermediate_size": "hidden_dim",
            "hidden_dropout_prob": "dropout",
            "attention_probs_dropout_prob": "attention_dropout",
        }
        sizes = {names.get(name, name): size for name, size in sizes.items()}
    config = AutoConfig.for_model(family, **sizes)
    tasks = int(random.integers(1, 5))
    method, precision, zero = one("sum", "pcgrad", "pcgrad", "gradvac"), one("fp32", "fp32", "bf16"), one(0, 1, 1, 2, 3)
    storage = "replay" if zero == 3 else one("stacked", "replay")
    adapter = ADAPTERS[random.integers(len(ADAPTERS))]
    values = {
        "tasks": {f"task{k}": {"type": "binary", "data": {}, "pooling": one("cls", "mean")} for k in range(tasks)},
        **({"adapter": adapter} if adapter else {}),
        "encoder": {"recompute": one("none", "cheap", "full"), "freeze": one(False, False, False, False, True)},
        "gradient": {"method": method, "storage": storage},
        "engine": {"zero": zero, "precision": precision, "accumulation": one(1, 1, 2)},
        "optimizer": {"name": one("adamw", "adamw", "sgd")},
    }
    recipe = parse_recipe(values, "drawn")
    rows, longest = int(random.integers(1, 24)), one(12, 24, 48)
    batches = [_batch(random, config, tasks, rows, longest, recipe) for _ in range(recipe.engine.accumulation)]
    return recipe, config, batches


def with_lora(
    lora: dict[str, Any], freeze: bool, recompute: str, storage: str, precision: str, zero: int
) -> tuple[Recipe, PretrainedConfig, list[PackedBatch]]:
    """Return a recipe with a LoRA, an encoder's configuration and a step's micro-batch."""
    config = AutoConfig.for_model(
        "bert",
        vocab_size=500,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=192,
        max_position_embeddings=64,
    )
    values = {
        "tasks": {f"task{k}": {"type": "binary", "data": {}, "pooling": "mean"} for k in range(3)},
        "lora": lora,
        "encoder": {"recompute": recompute, "freeze": freeze},
        "gradient": {"method": "pcgrad", "storage": "replay" if zero == 3 else storage},
        "engine": {"zero": zero, "precision": precision},
    }
    recipe = parse_recipe(values, "drawn")
    return recipe, config, [_batch(np.random.default_rng(3), config, 3, 8, 30, recipe)]


def with_units(
    types: list[str], tokens: dict[str, Any], precision: str, storage: str, zero: int
) -> tuple[Recipe, PretrainedConfig, list[PackedBatch]]:
    """Return a recipe whose heads score units, an encoder's configuration and a micro-batch."""
    sizes = {"vocab_size": 500, "hidden_size": 64, "intermediate_size": 192, "max_position_embeddings": 128}
    config = AutoConfig.for_model("bert", num_hidden_layers=1, num_attention_heads=4, **sizes)
    random, rows = np.random.default_rng(3), 24
    tasks: dict[str, dict[str, Any]] = {f"task{k}": {"type": name, "data": {}} for k, name in enumerate(types)}
    for task in tasks.values():
        if task["type"] == "tokens":
            task |= {"label_names": [f"tag {k}" for k in range(TAGS)], **tokens}
    values = {
        "tasks": tasks,
        "gradient": {"method": "pcgrad", "storage": storage},
        "engine": {"zero": zero, "precision": precision},
    }
    recipe = parse_recipe(values, "drawn")
    parts = [(_units_of(random, config, name, rows), np.arange(rows)) for name in types]
    counts = [rows if data.loss_terms is None else int(data.loss_terms.sum()) for data, _ in parts]
    return recipe, config, [pack(parts, counts)]


def with_squares(precision: str, storage: str, zero: int) -> tuple[Recipe, PretrainedConfig, list[PackedBatch]]:
    """Return a recipe whose weighting keeps sums of squares, a configuration and a micro-batch."""
    sizes = {"vocab_size": 500, "hidden_size": 64, "intermediate_size": 192, "max_position_embeddings": 64}
    config = AutoConfig.for_model("bert", num_hidden_layers=2, num_attention_heads=4, **sizes)
    values = {
        "tasks": {f"task{k}": {"type": "binary", "data": {}} for k in range(3)},
        "gradient": {"method": "equal", "storage": storage},
        "weighting": {"name": "excess_mtl"},
        "engine": {"zero": zero, "precision": precision},
    }
    recipe = parse_recipe(values, "drawn")
    return recipe, config, [_batch(np.random.default_rng(3), config, 3, 8, 30, recipe)]


def _units_of(random: np.random.Generator, config: PretrainedConfig, kind: str, rows: int) -> TokenizedDataset:
    """Return rows of one type: words are four of five tokens, and a row has 1 to 4 texts."""
    counts = random.integers(1, 5, rows) if kind == "choice" else np.ones(rows, dtype=np.int64)
    lengths = random.integers(3, 90, counts.sum())
    words = (4 * lengths + 4) // 5 - 2
    offsets = np.concatenate([[0], np.cumsum(words if kind == "tokens" else counts)])
    places = np.concatenate([1 + np.arange(number) for number in words]).astype(np.int32)
    tagged, zeros = kind == "tokens", np.zeros(rows, np.int64 if kind == "choice" else np.float32)
    return TokenizedDataset(
        tokens=random.integers(0, config.vocab_size, lengths.sum()).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        second_text=lengths.astype(np.int32),
        sequences_per_example=1,
        labels=random.integers(0, TAGS, offsets[-1]) if tagged else zeros,
        ids=[str(row) for row in range(rows)],
        truncated=0,
        skipped=[],
        path=Path("random"),
        example_offsets=offsets if kind == "choice" else None,
        units=None if kind == "binary" else UnitTable(offsets, places if tagged else None, labelled=tagged),
        loss_terms=words.astype(np.int64) if tagged else None,
    )


def _batch(
    random: np.random.Generator, config: PretrainedConfig, tasks: int, rows: int, longest: int, recipe: Recipe
) -> PackedBatch:
    parts = []
    for _ in range(tasks):
        lengths = random.integers(3, longest, rows)
        dataset = TokenizedDataset(
            tokens=random.integers(0, config.vocab_size, lengths.sum()).astype(np.int32),
            offsets=np.concatenate([[0], np.cumsum(lengths)]),
            second_text=lengths.astype(np.int32),
            sequences_per_example=1,
            labels=(random.random(rows) < 0.5).astype(np.float32),
            ids=[str(row) for row in range(rows)],
            truncated=0,
            skipped=[],
            path=Path("random"),
        )
        parts.append((dataset, np.arange(rows)))
    return pack(parts, [rows * recipe.engine.accumulation] * tasks)


def compare(recipe: Recipe, config: PretrainedConfig, batches: list[PackedBatch], ranks: Ranks) -> dict[str, Any]:
    batches = [replace(b, group_counts=tuple(n * ranks.world for n in b.group_counts or ())) for b in batches]
    torch.manual_seed(0)
    model = MultiTaskModel(recipe, FAMILIES[config.model_type].encoder(config, recompute=recipe.encoder.recompute))
    on_meta = copy.deepcopy(model).to("meta")
    steps = Steps(recipe, model, ranks.world, ranks.device)
    steps.counted(batches)
    # The least of several steps on several ranks: gloo's thread sometimes holds a sent tensor a
    # little longer.
    peak = min((steps.counted(batches).peak() for _ in range(1 if ranks.world == 1 else 3)), key=lambda one: one.nbytes)
    with Sent() as sent:
        steps.step(batches)
    shape = Shape.of(recipe, on_meta, list(map(Load.of, batches)), steps.storage, ranks.world, on_gpu=False)
    predicted = predict(shape)
    return {
        "recipe": recipe.model_dump(mode="json", exclude_defaults=True),
        "family": config.model_type,
        "encoder": f"{config.num_hidden_layers} x {config.hidden_size}, vocabulary {config.vocab_size}",
        "tokens": shape.load.tokens,
        "units": sum(shape.load.units),
        "storage": steps.storage,
        "measured": peak.parts,
        "phase": peak.range,
        "predicted": predicted.parts,
        "predicted_phase": predicted.phase,
        "sent": sent.total(),
        "predicted_sent": _by_kind(traffic(shape)),
    }


def _by_kind(collectives: list[Collective]) -> dict[str, int]:
    found: dict[str, int] = {}
    for one in collectives:
        found[one.kind] = found.get(one.kind, 0) + one.times * one.nbytes
    return found


def _kept(recipe: Recipe) -> Recipe:
    """Return the same recipe with `storage: kept`."""
    recipe = recipe.model_copy(deep=True)
    recipe.gradient.storage = "kept"
    return recipe


def main(number: int, seed: int) -> None:
    ranks = start()
    gc.freeze()  # all is imported: DeepSpeed collects garbage for each engine in ZeRO 3
    torch.set_num_threads(1)
    random = np.random.default_rng(seed)
    drawn = [draw(random, FAMILY_NAMES[index % len(FAMILY_NAMES)]) for index in range(number)]
    stacked = [one for one in drawn if one[0].gradient.storage == "stacked" and one[0].gradient.method != "sum"]
    drawn += [(_kept(recipe), *rest) for recipe, *rest in stacked if not recipe.encoder.freeze][:KEPT]  # type: ignore[arg-type]
    if ranks.world == 1:
        drawn += [with_lora(*settings) for settings in LORAS]
        drawn += [with_units(*settings) for settings in UNITS]
        drawn += [with_squares(*settings) for settings in SQUARES]
    # ZeRO 3 last: DeepSpeed replaces torch's linear layer for the rest of the process.
    for recipe, config, batches in sorted(drawn, key=lambda one: one[0].engine.zero == 3):
        found = compare(recipe, config, batches, ranks)
        if ranks.is_main:
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    *drawn_by, world = map(int, sys.argv[1:])
    if world == 1:
        main(*drawn_by)
    else:
        run_ranks(world, main, *drawn_by)
