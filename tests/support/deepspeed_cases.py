"""The ranks of test_deepspeed.py: every case in one launch. Usage: deepspeed_cases.py DIRECTORY"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import attached_cases
import choices_cases
import loads
import numpy as np
import several_cases
import torch
from encoder_families import config_of
from op_recorder import OpRecorder
from safetensors.torch import save_file
from transformers import BertConfig, BertModel
from unit_rows import unit_rows

from fastmtl.bench.waits import host_waits
from fastmtl.config import Recipe, parse_recipe
from fastmtl.cuda_graphs.install import record_encoder, record_heads
from fastmtl.cuda_graphs.merging import record_merging
from fastmtl.data.packed_batch import PackedBatch
from fastmtl.data.packing import pack
from fastmtl.data.tokenized import TokenizedDataset
from fastmtl.engine import gradient_norm
from fastmtl.errors import UserError
from fastmtl.model.encoder.base import Encoder
from fastmtl.model.encoder.bert import PackedBert
from fastmtl.model.encoder.families import FAMILIES
from fastmtl.model.encoder.transformers_encoder import TransformersEncoder
from fastmtl.model.losses.weighting import gradient_weights
from fastmtl.model.multitask import MultiTaskModel
from fastmtl.surgery.gradient_surgery import GradientSurgery
from fastmtl.surgery.info import SurgeryInfo
from fastmtl.surgery.ranks import collectives
from fastmtl.surgery.sinks.early_scatter import EarlyScatter

STEPS, ROWS = 3, 8
RECOMPUTES = {"cheap": "cheap", "full": "full", "pieces": "full"}  # by variant
# One family of each kind: BERT's layers with other embeddings, shared layers, relative positions in
# the scores, and rotations with windows.
FAMILIES_OF_KINDS = ("electra", "albert", "mpnet", "deberta-v2", "modernbert")
FLAT = [(0, 4, "sum"), (2, 1, "pcgrad")]
ONE_STEP = [("sum", "auto"), ("pcgrad", "stacked"), ("pcgrad", "replay")]


@dataclasses.dataclass(frozen=True)
class Case:
    zero: int
    accumulation: int
    method: str
    precision: str = "fp32"
    storage: Any = "auto"
    # Variants: "offload", "autocast", "one-step" (the engine sees one micro-batch a step),
    # "backward" (in place of run), "pieces" (J goes to the ranks in many pieces during backward,
    # with recompute full), "backward-pieces", "late" (in as many pieces, after backward), "flat"
    # (parameters), "flat-autocast", "graphs-pieces", "flat-graphs" (recorded layers and merging,
    # without an adapter), "left-out" (another library's model whose ranks leave out tasks without
    # rows, so that heads are reached on one rank only), "padded" (transformers' own modules, also
    # "flat-padded" and "padded-tensor"), "lora" (for all tasks, encoder frozen), "lora-own" (one
    # for each task, beside the adapter), "units" (heads that score words or several texts of a row;
    # also "units-tensor"), "excess" (weights that follow excess risks, also "excess-pieces"), or an
    # option's value: "tensor" (scope), "local", "sketch" (reduce), "cheap", "full" (recompute).
    variant: str = ""
    family: str = ""  # a case of encoder_families.py; "" for the BERT of make_model

    @property
    def name(self) -> str:
        name = f"zero{self.zero}-acc{self.accumulation}-{self.method}-{self.precision}-{self.storage}"
        return "-".join(filter(None, [name, self.variant, self.family]))


CASES = [
    *(Case(zero, acc, method) for zero in (0, 1, 2, 3) for acc in (1, 4) for method in ("sum", "pcgrad")),
    *(Case(zero, 1, "pcgrad", storage="replay") for zero in (0, 1, 2)),
    *(Case(zero, 1, "pcgrad", precision="bf16") for zero in (0, 1, 2, 3)),
    *(Case(zero, 1, "gradvac") for zero in (1, 3)),
    *(Case(zero, 1, "pcgrad", variant="offload") for zero in (2, 3)),
    *(Case(1, 4, method, storage=storage, variant="one-step") for method, storage in ONE_STEP),
    *(Case(3, 1, method, variant="autocast") for method in ("sum", "pcgrad")),
    Case(1, 1, "pcgrad", variant="autocast"),
    *(Case(zero, 1, method, variant="tensor") for zero, method in ((0, "gradvac"), (1, "pcgrad"), (3, "pcgrad"))),
    *(Case(zero, 1, "pcgrad", variant="local") for zero in (2, 3)),
    *(Case(zero, acc, "pcgrad", variant="sketch") for zero, acc in ((1, 4), (3, 1), (3, 4))),
    *(Case(zero, 1, "upgrad") for zero in (1, 3)),
    *(Case(1, 4, method, variant="backward") for method in ("sum", "pcgrad")),
    *(Case(3, 1, "pcgrad", variant=recompute) for recompute in ("cheap", "full")),
    *(Case(2, 4, "pcgrad", variant=variant) for variant in ("pieces", "backward-pieces", "late")),
    *(Case(zero, acc, method, variant="flat") for zero, acc, method in FLAT),
    Case(1, 4, "sum", precision="bf16", variant="flat"),
    Case(2, 1, "pcgrad", storage="replay", variant="flat"),
    Case(1, 4, "pcgrad", storage="kept", variant="backward"),
    Case(2, 1, "pcgrad", precision="bf16", storage="kept", variant="flat"),
    Case(1, 1, "sum", variant="flat-autocast"),
    Case(2, 4, "pcgrad", variant="graphs-pieces"),
    Case(1, 1, "pcgrad", variant="left-out"),
    *(Case(1, 4, method, variant="flat-graphs") for method in ("sum", "pcgrad")),
    Case(0, 4, "pcgrad", storage="kept", variant="padded"),
    Case(2, 1, "pcgrad", variant="padded"),
    Case(3, 4, "pcgrad", variant="padded"),
    Case(1, 1, "pcgrad", variant="flat-padded"),
    Case(3, 1, "pcgrad", variant="padded-tensor"),
    *(Case(zero, 1, "pcgrad", family=family) for zero in (0, 1, 2, 3) for family in FAMILIES_OF_KINDS),
    *(Case(zero, 1, "pcgrad", variant="lora") for zero in (0, 1, 2, 3)),
    Case(3, 1, "pcgrad", variant="lora-own"),
    *(Case(zero, 1, "pcgrad", variant="units") for zero in (0, 1, 2, 3)),
    Case(2, 4, "pcgrad", storage="kept", variant="units"),
    Case(3, 1, "pcgrad", variant="units-tensor"),
    *(Case(zero, acc, "equal", variant="excess") for zero, acc in ((0, 1), (1, 4), (3, 1))),
    Case(2, 1, "pcgrad", variant="excess-pieces"),
    Case(3, 4, "pcgrad", variant="excess"),
]
EXCESS = {"name": "excess_mtl", "step_size": 0.5, "warmup_steps": 1}
PIECE = 1000  # numbers in a collective, for cases with many collectives


# Random batches (loads.py): ZeRO stage and load.
RANDOM = [
    (zero, loads.Load(rows, loads.ADAPTERS[zero], accumulation, seed=10 * zero + accumulation))
    for zero in (0, 1, 2, 3)
    for accumulation, rows in ((1, (5, 0, 4, 1, 3, 2, 5, 1)[: 8 - 2 * zero]), (4, (3, 5, 1, 0, 2)[: 1 + zero]))
]


def make_recipe(case: Case) -> Recipe:
    task = {"data": {"train": "none"}}
    adapter = {"name": "pal", "size": 8, "heads": 2, "projections": 2}
    lora = {"lora": "shared", "lora-own": "own"}.get(case.variant)
    values: dict[str, Any] = {
        "adapter": {"name": "none"}
        if "graphs" in case.variant or "padded" in case.variant or lora == "shared"
        else adapter,
        "tasks": {
            "kind": {**task, "type": "classification", "num_labels": 3},
            "same": {**task, "type": "binary", "weight": 0.5},
            "degree": {**task, "type": "regression", "range": [0, 5], "pairs": "bi", "pooling": "mean"},
        },
        "encoder": {
            "recompute": RECOMPUTES.get(case.variant, "none"),
            "freeze": case.variant == "lora",
            "implementation": "transformers" if "padded" in case.variant else "auto",
        },
        "lora": {"rank": 2, "targets": ["query", "value", "intermediate"], "tasks": lora} if lora else {},
        "gradient": {
            "method": case.method,
            "storage": case.storage,
            "scope": "tensor" if case.variant.endswith("tensor") else "global",
            "reduce": case.variant if case.variant in ("local", "sketch") else "exact",
            "sketch_size": 256,
        },
        "optimizer": {"name": "sgd", "lr": 0.05},
        "weighting": EXCESS if case.variant.startswith("excess") else {},
        "schedule": {"name": "constant", "warmup": 0.0},
        "engine": {
            "zero": case.zero,
            "accumulation": 1 if case.variant == "one-step" else case.accumulation,
            "precision": case.precision,
            "clip": 1.0,
            "offload": case.variant == "offload",
            "flat_parameters": case.variant.startswith("flat"),
        },
    }
    if case.variant.startswith("units"):
        values["tasks"] = {
            "order": {**task, "type": "ranking", "pairs": "bi", "pooling": "mean"},
            "tags": {**task, "type": "tokens", "label_names": list("OABC"), "loss": "crf", "weight": 0.5},
            "answer": {**task, "type": "span"},
            "same": values["tasks"]["same"],
            "which": {**task, "type": "choice"},
        }
    if case.variant == "units-tensor":
        # Adding a vector to all hidden states changes no softmax over texts or tokens. Gradients of
        # the last LayerNorm's bias are then rounding errors, along which others would be projected.
        for name in ("which", "order", "answer"):
            del values["tasks"][name]
    if case.variant.endswith("autocast"):
        values["deepspeed"] = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    return parse_recipe(values, "test")


def make_model(recipe: Recipe, family: str = "") -> MultiTaskModel:
    """Return the model of a recipe. family: as in Case."""
    torch.manual_seed(0)
    if family:
        other = config_of(family, vocab_size=50, num_hidden_layers=2)
        return MultiTaskModel(recipe, FAMILIES[other.model_type].encoder(other)).eval()
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=None,  # transformers' word table takes no gradient for it
    )
    encoder: Encoder = PackedBert(config, recompute=recipe.encoder.recompute)
    if recipe.encoder.implementation == "transformers":
        with torch.random.fork_rng():  # the heads get the weights that they have with a packed encoder
            padded = BertModel(config, add_pooling_layer=False)
        padded.load_state_dict(encoder.state_dict())
        encoder = TransformersEncoder(padded, config)
    model = MultiTaskModel(recipe, encoder)
    for head in recipe.tasks.values():
        head.head.dropout = 0.0
    for parameter in () if model.lora is None else model.lora.parameters():
        if not parameter.any():  # B, which is zero in a new model
            parameter.data.normal_(std=0.3)
    return model.eval()  # no dropout: the reference draws its masks in another order


def make_data(recipe: Recipe | None = None) -> list[TokenizedDataset]:
    """Return the rows of three tasks of one label each, or of the variant "units"."""
    random, rows = np.random.default_rng(0), STEPS * ROWS
    types = [] if recipe is None else [task.type for task in recipe.tasks.values()]
    if "tokens" in types:
        made = {"binary": _one_label(random, 1, random.integers(0, 2, rows).astype(np.float32))}
        units = {kind: unit_rows(kind, rows, random, vocabulary=50, longest=12) for kind in types if kind not in made}
        return [(made | units)[kind] for kind in types]
    return [
        _one_label(random, per_example, labels)
        for per_example, labels in (
            (1, random.integers(0, 3, STEPS * ROWS)),
            (1, random.integers(0, 2, STEPS * ROWS).astype(np.float32)),
            (2, random.uniform(0, 5, STEPS * ROWS).astype(np.float32)),
        )
    ]


def _one_label(random: np.random.Generator, per_example: int, labels: np.ndarray) -> TokenizedDataset:
    lengths = random.integers(2, 16, STEPS * ROWS * per_example)
    return TokenizedDataset(
        tokens=random.integers(0, 50, lengths.sum()).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        second_text=(lengths // 2).astype(np.int32),
        sequences_per_example=per_example,
        labels=labels,
        ids=[str(row) for row in range(STEPS * ROWS)],
        truncated=0,
        skipped=[],
        path=Path("none"),
    )


def step_batches(data: list[TokenizedDataset], step: int, part: int, parts: int) -> PackedBatch:
    """Return one of `parts` pieces of a step's rows. The second task has rows in one piece only."""
    rows = np.arange(step * ROWS, (step + 1) * ROWS)
    whole = [(one, rows[:3] if number == 1 else rows) for number, one in enumerate(data)]
    counts = [len(rows) if one.loss_terms is None else int(one.loss_terms[rows].sum()) for one, rows in whole]
    pieces = [(one, rows[part::parts] if len(rows) == ROWS else rows[: 3 * (part == 0)]) for one, rows in whole]
    return pack(pieces, tuple(counts))


def run_steps(
    surgery: GradientSurgery,
    recipe: Recipe,
    parts: list[int],
    of: int,
    step_fn: Callable[[], object],
    backward_on: MultiTaskModel | None = None,
    left_out: bool = False,
) -> None:
    """Run the steps. backward_on: the model for `backward` in place of `run`.

    left_out: of the variant.
    """
    data = make_data(recipe)

    def loss_fn(batch: PackedBatch, model: Any, task_grads: Any) -> Any:
        return model(batch, task_grads)

    def with_rows(batch: PackedBatch, model: Any) -> Any:
        return {name: entry for name, entry in model(batch).items() if entry[1]}

    for step in range(STEPS):
        batches = [step_batches(data, step, part, of) for part in parts]
        counts = dict(zip(recipe.task_names, batches[0].group_counts, strict=True))  # type: ignore[arg-type]
        if backward_on is None:
            info: SurgeryInfo | None = surgery.run(batches, with_rows if left_out else loss_fn, counts)
        else:
            for number, batch in enumerate(batches, start=1):
                losses = backward_on(batch, surgery.task_grads)
                info = surgery.backward(losses, counts, last=number == len(batches))
        assert info is not None and info.skipped is None
        step_fn()


def make_surgery(target: Any, model: MultiTaskModel, recipe: Recipe) -> GradientSurgery:
    """Return the surgery. It clips an engine's gradients if `build_engine` leaves this to it."""
    surgery = GradientSurgery(
        target,
        recipe.gradient.method,
        tasks=recipe.task_names,
        shared=model.shared_parameters(),
        sparse=model.sparse_parameters(),
        storage=recipe.gradient.storage,
        scope=recipe.gradient.scope,
        reduce=recipe.gradient.reduce,
        sketch_size=recipe.gradient.sketch_size,
        task_weights=model.task_weights,
        seed=3,
        max_norm=gradient_norm.max_norm(recipe, model, collectives.world_size()) if hasattr(target, "module") else None,
        model=model.encoder.trunk,
        balance=gradient_weights(recipe),
    )
    if isinstance(model.encoder, TransformersEncoder):
        model.encoder.rows = surgery.rows
    return surgery


def engine_forward(zero: int, world: int) -> str:
    """Return the error for losses for `backward` that come from engine(...)."""
    from fastmtl.engine.build import build_engine

    recipe = make_recipe(Case(zero, 1, "pcgrad"))
    model = make_model(recipe)
    engine = build_engine(recipe, model, world, STEPS)
    surgery = make_surgery(engine, model, recipe)
    losses = engine(step_batches(make_data(recipe), 0, 0, 1), surgery.task_grads)
    try:
        surgery.backward(losses)
    except UserError as error:
        return str(error)
    finally:
        engine.destroy()
    return ""


def waits_of_a_step(zero: int, world: int, rank: int) -> list[str]:
    """Return the host's waits in the third step."""
    from fastmtl.engine.build import build_engine

    recipe = make_recipe(Case(zero, 1, "pcgrad", variant="graphs"))  # without an adapter
    model = make_model(recipe)
    engine = build_engine(recipe, model, world, STEPS)
    surgery = make_surgery(engine, model, recipe)
    data = make_data(recipe)

    def step(number: int) -> None:
        batch = step_batches(data, number, rank, world)
        counts = dict(zip(recipe.task_names, batch.group_counts, strict=True))  # type: ignore[arg-type]
        surgery.run([batch], lambda batch, model, task_grads: model(batch, task_grads), counts)
        engine.step()

    for number in range(STEPS - 1):
        step(number)
    found = host_waits(lambda: step(STEPS - 1))
    engine.destroy()
    return found


def pieces(case: Case, directory: Path, rank: int) -> contextlib.ExitStack:
    """Send a step's columns of J in many pieces; record the number sent early per step."""
    stack = contextlib.ExitStack()
    if case.variant.endswith(("pieces", "late")):
        stack.enter_context(mock.patch.object(collectives, "BUCKET", PIECE))
        file = stack.enter_context((directory / f"{case.name}-{rank}.txt").open("w"))
        shares = EarlyScatter.shares

        def counted(self: EarlyScatter) -> torch.Tensor:
            found = shares(self)
            print(self.sent_early, len(self._pieces), file=file)
            return found

        stack.enter_context(mock.patch.object(EarlyScatter, "shares", counted))
    if case.variant == "late":
        stack.enter_context(mock.patch.object(EarlyScatter, "begin", lambda *_: None))
    return stack


def main(directory: Path) -> None:
    from fastmtl.engine.build import build_engine
    from fastmtl.engine.distributed import start
    from fastmtl.engine.gather import gathered_state_dict

    ranks = start()
    # Surgery then clips over ranks, too: adapters and heads are a large part of these models.
    gradient_norm._SMALL = 1.0

    def keep(engine: Any, path: Path) -> None:
        state = gathered_state_dict(engine)
        if ranks.is_main:
            assert state is not None
            save_file({name: tensor.clone() for name, tensor in state.items()}, path)
        engine.destroy()
        gc.freeze()  # DeepSpeed collects garbage for each engine in ZeRO 3, and imports grow by the case

    for case in CASES:
        recipe = make_recipe(case)
        model = make_model(recipe, case.family)
        recorder, heads, merging = OpRecorder(), OpRecorder(), OpRecorder()
        if "graphs" in case.variant:
            assert isinstance(model.encoder, PackedBert)
            record_encoder(model.encoder.train(), recorder)
            record_heads(model, heads)
        engine = build_engine(recipe, model, ranks.world, STEPS)
        surgery = make_surgery(engine, model, recipe)
        if "graphs" in case.variant:
            surgery.record_with(partial(record_merging, recorder=merging))
        acc = case.accumulation
        parts = [ranks.rank * acc + a for a in range(acc)]
        backward_on = model if case.variant.startswith("backward") else None
        with pieces(case, directory, ranks.rank):
            run_steps(surgery, recipe, parts, ranks.world * acc, engine.step, backward_on, case.variant == "left-out")
        assert bool(recorder.replayed) == bool(heads.replayed) == ("graphs" in case.variant)
        assert bool(merging.replayed) == ("graphs" in case.variant and case.method != "sum")
        keep(engine, directory / f"{case.name}.safetensors")
    for each in (choices_cases, attached_cases):
        each.run_all(ranks, lambda engine, name: keep(engine, directory / f"{name}.safetensors"))
    several_cases.run_all(
        ranks.rank,
        lambda engine, name: keep(engine, directory / f"{name}.safetensors"),
        lambda state, name: save_file(state, directory / f"{name}-{ranks.rank}.safetensors"),
    )
    for zero in (1, 2):
        waits = waits_of_a_step(zero, ranks.world, ranks.rank)
        (directory / f"waits-zero{zero}-{ranks.rank}.txt").write_text("\n".join(waits))
    for zero in (0, 2):
        (directory / f"engine-forward-zero{zero}-{ranks.rank}.txt").write_text(engine_forward(zero, ranks.world))
    for number, (zero, load) in enumerate(RANDOM):
        recipe = loads.make_recipe(load, zero)
        model = loads.make_model(load, zero)
        engine = build_engine(recipe, model, ranks.world, 1)
        acc = load.accumulation
        micro_batches = loads.make_batches(load, ranks.world * acc)[ranks.rank * acc : (ranks.rank + 1) * acc]
        surgery = make_surgery(engine, model, recipe)
        surgery.run(micro_batches, lambda batch, model, task_grads: model(batch, task_grads), load.counts())
        engine.step()
        keep(engine, directory / f"random{number}.safetensors")


if __name__ == "__main__":
    main(Path([argument for argument in sys.argv[1:] if not argument.startswith("--")][0]))
