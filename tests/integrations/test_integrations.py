"""The examples of the integrations' pages on one and two processes, against a plain loop.

A resumed run must have the same bits as a run without interruption: integration_cases.py.
"""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import integration_cases as cases
import pytest
import torch
from scripts import run_script
from torch import Tensor

from fastmtl.errors import UserError
from fastmtl.integrations import loop, optional
from fastmtl.integrations.accelerate import AcceleratedSurgery
from fastmtl.integrations.fabric import check_strategy
from fastmtl.integrations.trainer import MultiTaskTrainer
from fastmtl.surgery import GradientSurgery

pytestmark = pytest.mark.slow(15)
DOCS = Path(__file__).parents[2] / "docs"
# By name: the page, and the number of its example.
EXAMPLES = {
    "trainer": ("trainer", 0),
    "accelerate": ("accelerate", 0),
    "fabric": ("lightning", 0),
    "lightning": ("lightning", 1),
    "peft": ("peft", 0),
}
DROPOUT = {
    "vocab_size=100,": "vocab_size=100, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,",
    "Dropout(0.1)": "Dropout(0.0)",
}


def example(name: str) -> str:
    page, number = EXAMPLES[name]
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)[number]


def without_dropout(name: str) -> str:
    """Return an example without dropout, whose steps a plain loop can repeat."""
    found = example(name)
    for dropout, without in DROPOUT.items():
        found = found.replace(dropout, without)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return what one process has found, then each of two ranks."""
    directory = tmp_path_factory.mktemp("integrations")
    for name in EXAMPLES:
        (directory / f"{name}_dropout.py").write_text(example(name), encoding="utf-8")
        (directory / f"{name}.py").write_text(without_dropout(name), encoding="utf-8")
    start, loss = "def losses_of(model, batch):", "mse_loss(degree,"
    skipped = example("trainer").replace(start, f"calls = []\n{start}\n    calls.append(1)")
    skipped = skipped.replace(loss, "mse_loss(degree / (len(calls) != 3),")  # division by zero in the second step
    (directory / "skipped.py").write_text(skipped, encoding="utf-8")
    passes = without_dropout("peft").replace("tasks=TASKS,", 'tasks=TASKS, passes="per_task",')
    (directory / "peft_passes.py").write_text(passes, encoding="utf-8")
    run_script(cases.__file__, directory, timeout=300)
    return [torch.load(directory / f"{name}.pt", weights_only=False) for name in ("alone", 0, 1)]


def plain_loop(name: str, ranks: list[dict[str, Any]]) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Return losses and weights of a torch loop in one process on the same rows.

    Each task has a backward pass of its own.
    """
    names: dict[str, Any] = {}
    code = without_dropout("trainer" if name == "trainer" else "accelerate")  # others have the same model
    exec(code[: re.search(r"^\(args,\) =|^folder, ", code, re.MULTILINE).start()], names)  # the definitions
    model = names["TwoTasks"]()
    model.load_state_dict(ranks[0]["start"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=cases.RATE, weight_decay=0.0)
    last = 0.0 if name == "trainer" else 1.0
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, last, total_iters=cases.STEPS)
    surgery = GradientSurgery(optimizer, "pcgrad", tasks=["kind", "degree"], shared=model.encoder.parameters())
    losses = []
    for parts in zip(*(rank["steps"] for rank in ranks), strict=True):
        batches = [batch for part in parts for batch in part]
        batch = {key: torch.cat([each[key] for each in batches]) for key in batches[0]}
        info = surgery.backward(names["losses_of"](model, batch))
        assert info is not None
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(info.losses)
    return losses, dict(model.named_parameters())


@pytest.mark.parametrize(
    ("name", "way"),
    [
        *((name, way) for name in ("trainer", "accelerate") for way in cases.WAYS),
        *((name, way) for name in ("fabric", "lightning") for way in cases.WAYS[:2]),
    ],
)
def test_equals_a_plain_loop(found: list[dict[str, Any]], name: str, way: str) -> None:
    ranks = [rank[f"{name}-{way}"] for rank in (found[:1] if way == "plain" else found[1:])]
    if way == "zero3":  # the ranks' parts of the weights are no weights
        ranks = [{**rank, "start": found[1][f"{name}-ddp"]["start"]} for rank in ranks]
    losses, weights = plain_loop(name, ranks)
    for rank in ranks:
        assert (rank["attached"] == 0) == (name in ("trainer", "lightning"))  # which detach at the end
        assert len(losses) >= cases.STEPS and all(list(step) == ["kind", "degree"] for step in losses)
        for mine, expected in zip(rank["losses"], losses, strict=True):
            assert mine == pytest.approx(expected, rel=1e-4)
        for key, weight in weights.items():
            torch.testing.assert_close(rank["weights"][key], weight, rtol=1e-3, atol=1e-4)


def test_a_lora_per_task_equals_a_pass_per_task(found: list[dict[str, Any]]) -> None:
    expected = found[0]["peft-passes"]
    for run in (found[0]["peft-plain"], found[1]["peft-ddp"], found[2]["peft-ddp"]):
        for mine, losses in zip(run["losses"], expected["losses"], strict=True):
            assert mine == pytest.approx(losses, rel=1e-4)
        for key, weight in expected["weights"].items():
            torch.testing.assert_close(run["weights"][key], weight, rtol=1e-3, atol=1e-4)


def test_a_skipped_step_changes_nothing(found: list[dict[str, Any]]) -> None:
    run = found[0]["skipped"]
    assert run["skipped"] == [None, "degree", *[None] * (cases.STEPS - 2)]
    assert all(bool(weight.isfinite().all()) for weight in run["weights"].values())


def test_trainer_logs_the_losses_of_tasks(found: list[dict[str, Any]]) -> None:
    for way in cases.WAYS:
        run = found[0 if way == "plain" else 1][f"trainer-{way}"]
        for entry, losses in zip(run["history"], run["losses"], strict=True):
            assert entry["loss"] == pytest.approx(sum(losses.values()), rel=1e-5)
            assert entry["loss_degree"] == losses["degree"]
            assert entry["conflict_rate"] in (0, 1)


def test_evaluation_gives_the_mean_over_rows(found: list[dict[str, Any]]) -> None:
    loss, expected = found[0]["trainer-plain"]["evaluated"]
    assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("compute_loss_func", "compute_loss_func: unsupported by MultiTaskTrainer: compute the losses in losses_of"),
        ("label_smoothing_factor", "smooth the labels in losses_of"),
        ("compute_metrics", "override prediction_step"),
        ("optimizers", "another optimizer than SurgeryAdamW"),
        ("predictions", "losses_of returns losses only: override prediction_step"),
        ("trunk", "the model has no module 'encode'"),
        ("task_column", "a batch has no 'job'"),
    ],
)
def test_what_trainer_refuses(found: list[dict[str, Any]], name: str, text: str) -> None:
    assert text in found[0]["errors"][name]


def test_lightning_steps_schedulers_by_their_frequency(found: list[dict[str, Any]]) -> None:
    assert found[0]["schedulers"] == [("step", 1)] * 3 + [("step", 3), ("step", 1), ("epoch", 2)]


def test_unsupported_strategies_are_named() -> None:
    def accelerator(kind: str, scaler: object) -> Any:
        return SimpleNamespace(distributed_type=SimpleNamespace(value=kind), scaler=scaler)

    def strategy(name: str, scaler: object) -> Any:
        return type(name, (), {"precision": SimpleNamespace(scaler=scaler)})()

    with pytest.raises(UserError, match=r"accelerator is of type Linear: give the accelerate\.Accelerator"):
        AcceleratedSurgery(torch.nn.Linear(1, 1), None, None)
    for kind, scaler, text in (
        ("FSDP", None, "accelerator: FSDP is unsupported"),
        ("NO", object(), "use bf16, or fp16"),
    ):
        with pytest.raises(UserError, match=text):
            AcceleratedSurgery(accelerator(kind, scaler), torch.nn.Linear(1, 1), None)
    check_strategy(strategy("DDPStrategy", None))
    with pytest.raises(UserError, match="strategy: DeepSpeedStrategy is unsupported: use a single device or DDP"):
        check_strategy(strategy("DeepSpeedStrategy", None))
    with pytest.raises(UserError, match="16-mixed"):
        check_strategy(strategy("DDPStrategy", object()))


def test_losses_must_fit_the_rows_of_their_micro_batch() -> None:
    loss = torch.zeros(())
    loop.check_rows({"a": (loss, 2), "b": (loss, 0)}, {"a": 2})
    with pytest.raises(UserError, match="no loss of task b, which has 3 rows"):
        loop.check_rows({"a": (loss, 2)}, {"a": 2, "b": 3})
    with pytest.raises(UserError, match="the loss of task a has 7 rows, but its micro-batch has 2: give count_rows"):
        loop.check_rows({"a": (loss, 7)}, {"a": 2})


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"model": "net"}, "model is of type str: give the model to call"),
        ({"losses_of": 3}, "losses_of is of type int: give a function"),
        ({"count_rows": 3}, "count_rows is of type int: give a function"),
        ({"count_rows": lambda batch: None}, "count_rows: got an object of type NoneType"),
        ({"count_rows": lambda batch: {"b": 1}}, "count_rows: of b, tasks are a"),
        ({"task_column": "job"}, r"task_column: a batch has no 'job' \(its columns are task\): give the name"),
        ({"losses_of": lambda model, batch: None}, "the losses are of type NoneType: give {task: "),
        ({"losses_of": lambda model, batch: {"a": torch.ones(())}}, "the loss of task a is of type Tensor, not a pair"),
    ],
)
def test_wrong_arguments_of_a_loop(arguments: dict[str, Any], text: str) -> None:
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    given = {"model": model, "losses_of": lambda model, batch: {}, "tasks": ["a"], "trunk": None, **arguments}
    with pytest.raises(UserError, match=text):
        surgery = loop.LoopSurgery(optimizer, **given)
        surgery.add({"task": [0]})
        surgery.run()


def test_counts_of_something_else_than_rows() -> None:
    """A loss per token is the mean over the tokens of all micro-batches."""
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lengths = [torch.tensor([1, 2, 3]), torch.tensor([2, 0, 1])]
    batches = [{"x": torch.randn(3, 3), "tokens": tokens, "task": ["a", "b", "a"]} for tokens in lengths]

    def count_rows(batch: dict[str, Any]) -> dict[str, int]:
        return {"a": int(batch["tokens"][0::2].sum()), "b": int(batch["tokens"][1])}

    def losses_of(model: Any, batch: dict[str, Any]) -> dict[str, tuple[Tensor, int]]:
        sums = model(batch["x"]).squeeze(1).square() * batch["tokens"]
        counts = count_rows(batch)
        return {"a": (sums[0::2].sum(), counts["a"]), "b": (sums[1], counts["b"])}

    surgery = loop.LoopSurgery(
        optimizer, model, "sum", tasks=["a", "b"], trunk="", losses_of=losses_of, count_rows=count_rows
    )
    for batch in batches:
        surgery.add(batch)
    info = surgery.run()
    found = model.weight.grad
    model.zero_grad()
    losses = [losses_of(model, batch) for batch in batches]
    means = {task: sum(each[task][0] for each in losses) / rows for task, rows in {"a": 7, "b": 2}.items()}
    sum(means.values(), torch.zeros(())).backward()
    torch.testing.assert_close(found, model.weight.grad)
    assert info.losses == pytest.approx({task: float(mean.detach()) for task, mean in means.items()}, rel=1e-5)
    surgery.detach()


def test_a_missing_library_is_named_with_its_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optional, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "fastmtl.integrations.lightning", raising=False)
    with pytest.raises(UserError, match=re.escape("MultiTaskTrainer needs accelerate: pip install 'fastmtl-torch[acc")):
        MultiTaskTrainer(tasks=["a"], trunk="", losses_of=lambda model, batch: {})
    with pytest.raises(UserError, match=re.escape("MultiTaskModule needs lightning: pip install 'fastmtl-torch[light")):
        importlib.import_module("fastmtl.integrations.lightning")


def test_only_one_module_imports_an_optional_library_at_its_start() -> None:
    found = {}
    for file in sorted((DOCS.parent / "fastmtl").rglob("*.py")):
        names = re.findall(r"^(?:from|import) (accelerate|lightning|peft)\b", file.read_text(), flags=re.MULTILINE)
        if names:
            found[file.name] = names
    assert found == {"lightning.py": ["lightning"]}
