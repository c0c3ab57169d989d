"""Steps of attached trunks on two ranks, for test_deepspeed.py's launch and its reference.

The reference runs the same steps in one process on the joined batch, with one backward pass per
task and an unchanged model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import architectures
import torch
import torch.nn.functional as F
from examples import Example, Features, Inputs
from torch import Tensor, nn

from fastmtl.surgery import GradientSurgery
from fastmtl.surgery.losses import Losses

STEPS, ROWS, TASKS, LABELS = 2, 12, 3, 3
LR, MOMENTUM, CLIP = 0.05, 0.9, 1.0
NAMES = [f"task{t}" for t in range(TASKS)]


@dataclasses.dataclass(frozen=True)
class Case:
    """variant: "checkpointing" (not re-entrant), "bf16", "autocast", "offload", "frozen" (the
    embeddings), "views" (two forwards before a backward), "backward" (in place of run), a storage,
    or "tensor" (scope).
    """

    zero: int
    kind: str
    accumulation: int = 1
    variant: str = ""

    @property
    def name(self) -> str:
        return f"attached-{self.kind}-zero{self.zero}-acc{self.accumulation}-{self.variant or 'plain'}"

    @property
    def options(self) -> dict[str, Any]:
        """Options of GradientSurgery that change the result or the way to it."""
        if self.variant == "tensor":
            return {"scope": "tensor"}
        return {"storage": self.variant if self.variant in ("kept", "replay") else "auto"}


CASES = [
    *(
        Case(zero, kind, 1 + (zero + number) % 2)
        for zero in (0, 1, 2, 3)
        for number, kind in enumerate(("bert", "llama_lora", "vit"))
    ),
    *(Case(zero, "bert", 2, "checkpointing") for zero in (1, 3)),
    Case(2, "llama_lora", 1, "checkpointing"),
    *(Case(zero, kind, 1, "bf16") for zero, kind in ((2, "bert"), (3, "vit"))),
    *(Case(zero, kind, 1, "autocast") for zero, kind in ((1, "vit"), (3, "llama_lora"))),
    Case(3, "bert", 1, "tensor"),
    Case(0, "bert", 2, "kept"),
    Case(1, "vit", 2, "replay"),
    Case(2, "bert", 2, "backward"),
    Case(2, "bert", 1, "offload"),
    *(Case(zero, "bert", 1, "frozen") for zero in (1, 3)),
    *(Case(zero, "bert_tied", 1) for zero in (2, 3)),
    *(Case(zero, "albert", 1) for zero in (1, 3)),
    *(Case(zero, "bert", 1, "views") for zero in (2, 3)),
    # Modules that run once per task, and read parameters of modules inside them.
    *(Case(3, kind, 1) for kind in ("t5", "deberta_v2", "transformer_layers")),
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
        self.views = case.variant == "views"
        self.rows: Callable[[Tensor], AbstractContextManager[Any]] = nullcontext
        if case.variant == "frozen":
            self.trunk.embeddings.requires_grad_(False)
        if case.variant == "checkpointing":
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
    return architectures.build(kind, 7, rows=STEPS * ROWS, dropout=0.0)


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
    attached = not isinstance(target, torch.optim.Optimizer) or case.variant == "tensor"
    shared = [p for p in net.trunk.parameters() if p.requires_grad]
    options = {**case.options, "model": net.trunk} if attached else {"shared": shared}
    surgery = GradientSurgery(target, "pcgrad", tasks=NAMES, seed=3, **options)
    rows: Callable[[Tensor], AbstractContextManager[Any]] = surgery.rows if attached else nullcontext
    if net.views:
        net.rows, rows = rows, nullcontext

    def loss_fn(batch: Batch, model: Any) -> Losses:
        with rows(batch.tasks):
            return (model or net)(batch)  # an optimizer has no model

    inputs = make_example(case.kind).inputs
    for step in range(STEPS):
        batches = [make_batch(inputs, step, part, of) for part in parts]
        counts = {name: TASK_OF_ROW[step].count(t) for t, name in enumerate(NAMES)}
        if case.variant == "backward" and attached:
            for number, batch in enumerate(batches, start=1):
                info = surgery.backward(loss_fn(batch, net), counts, last=number == len(batches))
        else:
            info = surgery.run(batches, loss_fn, counts)
        assert info is not None and info.skipped is None
        step_fn()


def engine_config(case: Case) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": case.accumulation,
        "zero_optimization": {"stage": case.zero},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": CLIP,
    }
    if case.variant == "bf16":
        config["bf16"] = {"enabled": True}
    if case.variant == "autocast":
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    if case.variant == "offload":
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


def reference(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights before and after the steps in one process."""
    net = Net(case)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], LR, MOMENTUM)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    run_steps(optimizer, net, case, [0], 1, step)
    return before, net.state_dict()
