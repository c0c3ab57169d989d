"""Steps of attached trunks on two ranks, for test_deepspeed.py's launch and its reference.

The reference runs the same steps in one process on the joined batch, with one backward pass per
task and an unchanged model.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import architectures
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from trunk_examples import Example, Features, Inputs

from fastmtl.surgery import GradientSurgery, diagnose
from fastmtl.surgery.losses import Losses

STEPS, ROWS, TASKS, LABELS = 2, 12, 3, 3
LR, MOMENTUM, CLIP = 0.5, 0.9, 1.0
SEED = 6  # one layer, and a table of words that is large enough for compact rows
NAMES = [f"task{t}" for t in range(TASKS)]


@dataclasses.dataclass(frozen=True)
class Case:
    """variant: words with "+" between them.

    "checkpointing" (not re-entrant), "bf16", "autocast", "offload", "frozen" (the embeddings),
    "views" (two forwards before a backward), "backward" (in place of run), "checked" (against T
    passes in the first step), a storage, or "tensor" (scope).
    """

    zero: int
    kind: str
    accumulation: int = 1
    variant: str = ""

    @property
    def name(self) -> str:
        return f"attached-{self.kind}-zero{self.zero}-acc{self.accumulation}-{self.variant or 'plain'}"

    def has(self, word: str) -> bool:
        return word in self.variant.split("+")

    @property
    def options(self) -> dict[str, Any]:
        """Options of GradientSurgery that change the result or the way to it."""
        verify_every = None if self.has("checked") else 0
        if self.has("tensor"):
            return {"scope": "tensor", "verify_every": verify_every}
        return {"storage": next(filter(self.has, ("kept", "replay")), "auto"), "verify_every": verify_every}

    @property
    def same_result(self) -> Case:
        """The case with the same reference: all ways in all stages lead to one result."""
        words = [word for word in ("frozen", "views", "tensor") if self.has(word)]
        return Case(0, self.kind, 1, "+".join(words))


CASES = [
    Case(0, "bert", 2, "kept"),
    Case(1, "bert", 2, "checkpointing"),
    Case(2, "bert", 2, "backward"),
    Case(3, "bert", 2, "checked"),
    Case(0, "llama_lora"),
    Case(1, "llama_lora", 2),
    Case(2, "llama_lora", 2, "checked+checkpointing"),
    Case(3, "llama_lora"),
    Case(0, "vit", 2),
    Case(1, "vit", 2, "replay"),
    Case(2, "vit"),
    Case(3, "vit", 2),
    Case(2, "bert", 1, "bf16"),
    Case(3, "vit", 1, "bf16"),
    Case(3, "llama_lora", 1, "autocast"),
    Case(3, "bert", 1, "tensor"),
    Case(2, "bert", 1, "offload+views"),
    Case(3, "bert", 1, "frozen+checkpointing"),
    Case(3, "bert_tied"),
    Case(3, "albert", 1, "views"),  # layers shared over depth
    # Modules that run once per task, and read parameters of modules inside them.
    Case(3, "t5"),
    Case(3, "deberta_v2", 1, "checked"),
    Case(3, "transformer_layers"),
]


# Each row's task, by step; -1: no task. The last task has only rows 0, 4 and 8, so one rank and
# most micro-batches lack it. Pieces of the second step have their rows in order.
TASK_OF_ROW = ([2, 0, 1, -1, 2, 1, 0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 2, 0, 1, 1, 2, 1, 1, -1])


@dataclasses.dataclass(frozen=True)
class Batch:
    """inputs: of the trunk, B rows. tasks, labels: int64 [B]."""

    inputs: Inputs
    tasks: Tensor
    labels: Tensor


class Net(nn.Module):
    """A trunk with a head per task.

    rows: `surgery.rows` for the case "views", which needs a block for each forward.
    """

    def __init__(self, case: Case) -> None:
        super().__init__()
        example = make_example(case.kind)
        torch.manual_seed(1)
        self.trunk = example.trunk
        self._features: Features = example.features
        self.heads = nn.ModuleList(nn.Linear(example.width, LABELS) for _ in NAMES)
        self.views = case.has("views")
        self.rows: Callable[[Tensor], AbstractContextManager[Any]] = nullcontext
        if case.has("frozen"):
            self.trunk.embeddings.requires_grad_(False)
        if case.has("checkpointing"):
            self.trunk.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        self.train()

    def forward(self, batch: Batch) -> Losses:
        """Return the losses of all tasks, zeros for those without rows."""
        features = self._states(batch.inputs, batch.tasks)
        if self.views:
            flipped = {name: x.flip(0) for name, x in batch.inputs.items()}
            features = features * self._states(flipped, batch.tasks.flip(0)).flip(0).tanh()
        losses = {}
        for t, (name, head) in enumerate(zip(NAMES, self.heads, strict=True)):
            chosen = batch.tasks == t
            loss = F.cross_entropy(head(features[chosen]).float(), batch.labels[chosen], reduction="sum")
            losses[name] = loss, int(chosen.sum())
        return losses

    def _states(self, inputs: Inputs, tasks: Tensor) -> Tensor:
        dtype = next(self.heads.parameters()).dtype
        inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
        with self.rows(tasks):
            return self._features(self.trunk, inputs)


def make_example(kind: str) -> Example:
    return architectures.build(kind, SEED, rows=STEPS * ROWS, dropout=0.0)


def make_batch(inputs: Inputs, step: int, part: int, parts: int) -> Batch:
    """Return one of `parts` pieces of a step's rows. inputs: of all steps."""
    first = step * ROWS
    pieces = {name: x[first + part : first + ROWS : parts] for name, x in inputs.items()}
    tasks = torch.tensor(TASK_OF_ROW[step])[part::parts]
    return Batch(pieces, tasks, (torch.arange(ROWS) % LABELS)[part::parts])


def run_steps(target: Any, net: Net, case: Case, parts: list[int], of: int, step_fn: Callable[[], Any]) -> None:
    """Run the micro-batches `parts` of `of` in each step.

    A reference has an optimizer as target. `scope: tensor` needs all T gradients of a tensor at
    once, so there the reference is attached, too.
    """
    attached = not isinstance(target, torch.optim.Optimizer) or case.has("tensor")
    shared = [p for p in net.trunk.parameters() if p.requires_grad]
    options = {**case.options, "model": net.trunk} if attached else {"shared": shared}
    surgery = GradientSurgery(target, "pcgrad", tasks=NAMES, seed=3, **options)
    rows: Callable[[Tensor], AbstractContextManager[Any]] = surgery.rows if attached else nullcontext
    if net.views:
        net.rows, rows = rows, nullcontext

    def loss_fn(batch: Batch, model: Any) -> Losses:
        with rows(batch.tasks):
            return (model or net)(batch)  # an optimizer has no model

    measures = attached and not case.has("tensor")
    diagnosis = diagnose(surgery, every=1) if measures else None
    inputs = make_example(case.kind).inputs
    for step in range(STEPS):
        batches = [make_batch(inputs, step, part, of) for part in parts]
        counts = {name: TASK_OF_ROW[step].count(t) for t, name in enumerate(NAMES)}
        if case.has("backward") and attached:
            for number, batch in enumerate(batches, start=1):
                info = surgery.backward(loss_fn(batch, net), counts, last=number == len(batches))
        else:
            info = surgery.run(batches, loss_fn, counts)
        assert info is not None and info.skipped is None
        if diagnosis is not None:
            assert all(name.startswith("trunk.") for name in diagnosis.layers)
            assert info.cosines is not None and info.task_norms is not None
            gram = info.cosines * info.task_norms * info.task_norms[:, None]
            layers = torch.from_numpy(diagnosis.gramians()[1][-1]).sum(0).float()
            torch.testing.assert_close(layers, gram.nan_to_num(), rtol=1e-4, atol=1e-5 * float(gram.nan_to_num().max()))
        step_fn()


def engine_config(case: Case) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": case.accumulation,
        "zero_optimization": {"stage": case.zero},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": CLIP,
    }
    if case.has("bf16"):
        config["bf16"] = {"enabled": True}
    if case.has("autocast"):
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    if case.has("offload"):
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        config["zero_force_ds_cpu_optimizer"] = False
    return config


def run_all(ranks: Any, keep: Callable[[Any, str], None]) -> None:
    """Run every case on this rank; keep(engine, name) saves the weights and ends the engine."""
    import deepspeed

    for case in CASES:
        net = Net(case)
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], LR, MOMENTUM)
        engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=engine_config(case))
        parts = [ranks.rank * case.accumulation + a for a in range(case.accumulation)]
        run_steps(engine, net, case, parts, ranks.world * case.accumulation, engine.step)
        keep(engine, case.name)
        if case is CASES[0]:  # as in deepspeed_cases.py
            gc.freeze()


@cache
def reference(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights before and after the steps in one process. case: a `same_result`."""
    net = Net(case)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], LR, MOMENTUM)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    run_steps(optimizer, net, case, [0], 1, step)
    return before, net.state_dict()
