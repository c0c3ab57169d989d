"""The ranks of tests/integrations: the examples of the pages, every way to run them in one launch.

Usage: integration_cases.py DIRECTORY, which has an example NAME.py for each page.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import deepspeed
import torch
import torch.distributed as dist
import transformers
from accelerate.state import AcceleratorState, GradientState, PartialState
from ranks import run_ranks
from torch import Tensor

from fastmtl.errors import UserError
from fastmtl.integrations.loop import LoopSurgery, unwrapped
from fastmtl.integrations.trainer import MultiTaskTrainer
from fastmtl.surgery import SurgeryAdamW
from fastmtl.surgery.attach.forward import RuledForward

WORLD, STEPS, RATE = 2, 4, 0.01
# Lightning is the last, since it removes the variables of a launcher at its end.
PAGES = ("trainer", "accelerate", "fabric", "peft", "lightning")
WAYS = ("plain", "ddp", "zero2", "zero3")
WITH_DROPOUT = ("trainer", "accelerate", "lightning")


class Record:
    """Micro-batches that a run gives to surgery in each step, and the losses that it gets."""

    def __init__(self) -> None:
        self.steps: list[list[dict[str, Tensor]]] = []
        self.losses: list[dict[str, float]] = []
        self.skipped: list[str | None] = []
        self.weights: dict[str, Tensor] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        run, make = LoopSurgery.run, LoopSurgery.__init__

        def recorded_run(loop: LoopSurgery) -> Any:
            self.steps.append([dict(waiting.inputs) for waiting in loop._waiting])
            info = run(loop)
            self.losses.append(info.losses)
            self.skipped.append(info.skipped)
            return info

        def recorded_init(loop: LoopSurgery, target: Any, model: Any, *args: Any, **keywords: Any) -> None:
            self.weights = {name: x.detach().clone() for name, x in unwrapped(model).state_dict().items()}
            make(loop, target, model, *args, **keywords)

        with mock.patch.object(LoopSurgery, "run", recorded_run):
            with mock.patch.object(LoopSurgery, "__init__", recorded_init):
                yield


def forget_accelerate() -> None:
    """Let the next example make a new state of Accelerate; the process group stays."""
    AcceleratorState._reset_state()
    PartialState._reset_state()
    GradientState._reset_state()
    transformers.integrations.deepspeed.unset_hf_deepspeed_config()


def run_example(script: Path, *arguments: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run an example with the arguments; return its names, and what it gave to surgery and got."""
    record = Record()
    with record.recording(), mock.patch.object(sys, "argv", [str(script), *arguments]):
        names = runpy.run_path(str(script))
    trainer = names.get("trainer")
    model = trainer.model_wrapped if isinstance(trainer, MultiTaskTrainer) else names["model"]
    found = {
        "steps": record.steps,
        "losses": record.losses or names["history"],
        "skipped": record.skipped,
        "start": record.weights,
        "weights": weights_of(model),
        "attached": sum(isinstance(vars(x).get("forward"), RuledForward) for x in unwrapped(model).modules()),
    }
    return names, found


def trainer_arguments(folder: Path, way: str) -> list[str]:
    """Return arguments of docs/trainer.md."""
    options = {
        "output_dir": str(folder),
        "use_cpu": "true",
        "report_to": "none",
        "disable_tqdm": "true",
        "logging_steps": "1",
        "learning_rate": str(RATE),
        "max_steps": str(STEPS),
        "save_steps": str(STEPS - 1),
        "per_device_train_batch_size": "4",
        "gradient_accumulation_steps": "2",
    }
    if way == "ddp":
        options["ddp_backend"] = "gloo"
    if way.startswith("zero"):
        options["deepspeed"] = str(zero_settings(folder.parent, way))
    return [text for key, value in options.items() for text in (f"--{key}", value)]


def zero_settings(folder: Path, way: str) -> Path:
    """Write DeepSpeed's settings for Accelerate, where the stage is the last letter of `way`."""
    settings = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": int(way[-1])},
    }
    file = folder / f"{way}.json"
    file.write_text(json.dumps(settings))
    return file


def weights_of(model: Any) -> dict[str, Tensor]:
    """Return a model's weights, gathered from the ranks under ZeRO 3."""
    parameters = dict(unwrapped(model).named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def check(directory: Path, page: str, way: str) -> dict[str, Any]:
    """Return what a run without dropout has found; check that a resumed run continues it exactly.

    One way also resumes a run with dropout, which needs the random state.
    """
    found: dict[str, Any] = {}
    for name in (page, f"{page}_dropout") if way == "ddp" and page in WITH_DROPOUT else (page,):
        script, folder = directory / f"{name}.py", directory / f"{way}-{name}"
        arguments, resume = [str(folder)], ["resume"]
        if page in ("fabric", "lightning"):
            arguments.append("1" if way == "plain" else str(WORLD))
        if page == "trainer":
            arguments = trainer_arguments(folder, way)
            resume = ["--resume_from_checkpoint", str(folder / f"checkpoint-{STEPS - 1}")]
        names, whole = run_example(script, *arguments)
        if page == "trainer":
            whole["history"] = [entry for entry in names["trainer"].state.log_history if "loss" in entry]
            if way == "plain":
                whole["evaluated"] = evaluated(names["trainer"])
        forget_accelerate()
        resumed = run_example(script, *arguments, *resume)[1]
        forget_accelerate()
        assert resumed["losses"] == whole["losses"][-len(resumed["losses"]) :], "a resumed run has other losses"
        assert 0 < len(resumed["losses"]) < len(whole["losses"])
        assert all(torch.equal(x, whole["weights"][name]) for name, x in resumed["weights"].items())
        found = found or whole
    return found


def evaluated(trainer: MultiTaskTrainer) -> tuple[float, float]:
    """Return the loss of an evaluation, and the mean over all rows."""
    dataset: Any = trainer.train_dataset
    model: Any = trainer.model
    batch = transformers.default_data_collator(dataset)
    losses = trainer._losses_of(model.eval(), batch).values()
    mean = float(sum(loss for loss, _ in losses)) / len(dataset)
    return trainer.evaluate(dataset)["eval_loss"], mean


def errors(directory: Path) -> dict[str, str]:
    """Return the errors for arguments that MultiTaskTrainer refuses, by argument."""
    arguments = {"tasks": ["kind", "degree"], "trunk": "encoder", "losses_of": lambda model, batch: {}}
    size = transformers.BertConfig(vocab_size=5, hidden_size=4, num_hidden_layers=1, num_attention_heads=1)
    model = transformers.BertModel(size)

    def message(training: dict[str, Any], **keywords: Any) -> str:
        dataset: Any = [{"task": 0}]
        args = transformers.TrainingArguments(str(directory), use_cpu=True, report_to="none", **training)
        try:
            trainer = MultiTaskTrainer(model, args, train_dataset=dataset, **{**arguments, **keywords})
            trainer.train() if "trunk" in keywords else trainer.predict(dataset)
        except UserError as error:
            return str(error)
        return ""

    found = {
        "compute_loss_func": message({}, compute_loss_func=print),
        "label_smoothing_factor": message({"label_smoothing_factor": 0.1}),
        "compute_metrics": message({}, compute_metrics=print),
        "optimizers": message({}, optimizers=(SurgeryAdamW(model.parameters()), None)),
        "predictions": message({}),
        "trunk": message({}, trunk="encode"),
        "task_column": message({"remove_unused_columns": False}, trunk="", task_column="job"),
    }
    forget_accelerate()
    return found


def stepped_schedulers() -> list[tuple[str, int]]:
    """Return interval and number of each call of a scheduler in four steps and two epochs."""
    lightning, calls = importlib.import_module("fastmtl.integrations.lightning"), []
    configs = [
        SimpleNamespace(interval=interval, frequency=frequency, scheduler=SimpleNamespace())
        for interval, frequency in (("step", 1), ("step", 3), ("epoch", 2))
    ]
    for config in configs:
        config.scheduler.step = partial(lambda each: calls.append((each.interval, each.frequency)), config)
    module = SimpleNamespace(trainer=SimpleNamespace(lr_scheduler_configs=configs))
    for interval, count in (("step", 4), ("epoch", 2)):
        for number in range(1, count + 1):
            lightning.MultiTaskModule._step_schedulers(module, interval, number)
    return calls


def alone(directory: Path) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        del os.environ[name]
    found: dict[str, Any] = {"errors": errors(directory)}
    for page in PAGES:
        found[f"{page}-plain"] = check(directory, page, "plain")
    found["skipped"] = run_example(
        directory / "skipped.py", *trainer_arguments(directory / "skipped", "plain"), "--save_strategy", "no"
    )[1]
    forget_accelerate()
    found["schedulers"] = stepped_schedulers()
    found["peft-passes"] = run_example(directory / "peft_passes.py", str(directory / "passes"))[1]
    torch.save(found, directory / "alone.pt")


def together(directory: Path) -> None:
    dist.init_process_group("gloo")
    warnings.simplefilter("ignore")
    found = {f"trainer-{way}": check(directory, "trainer", way) for way in WAYS[1:]}
    for way in WAYS[1:]:
        zero = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(directory / f"{way}.json")}
        with mock.patch.dict(os.environ, {} if way == "ddp" else zero):
            found[f"accelerate-{way}"] = check(directory, "accelerate", way)
    for page in PAGES[2:]:
        found[f"{page}-ddp"] = check(directory, page, "ddp")
    torch.save(found, directory / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    for library in ("lightning", "peft"):  # else each rank would import it
        importlib.import_module(library)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    where = Path(sys.argv[1])
    run_ranks(1, alone, where)
    run_ranks(WORLD, together, where)
