"""Checkpoints of a run: saving, finding and loading.

The folder checkpoints/step-N/ contains DeepSpeed's files (engine/), a file of random state per
rank, state.json (sampler position, surgery, early stopping), manifest.json and, if there are more
tensors to save, tensors.safetensors. `save` writes to .incomplete-step-N and renames the folder
once all files are on disk, so step-N is always complete. The files are checked against the manifest
before they are opened. The two latest checkpoints and the best one are kept.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fastmtl.config import Recipe
from fastmtl.engine.distributed import Ranks
from fastmtl.engine.gradient_norm import keeps_clipping
from fastmtl.engine.manifest import NAME, Refused, read_manifest, write_manifest
from fastmtl.engine.optimizer_settings import optimizer_settings, put_settings
from fastmtl.engine.plain_path import plain_path
from fastmtl.engine.recipe_changes import Changes, changes_since
from fastmtl.engine.universal import keeps_groups, universal_copy
from fastmtl.errors import UserError

TENSORS = "tensors.safetensors"
LEFT_OVER = (".incomplete-step-*", ".removed-step-*", ".universal-*")
KEEP_LATEST = 2  # the newest, and one to fall back to if the newest is damaged


@dataclass(frozen=True)
class Found:
    """A valid checkpoint to resume from.

    manifest: the contents of manifest.json. universal: another number of ranks saved the
    checkpoint, so it is loaded in DeepSpeed's universal form. state: the argument `state` of
    `save`.
    """

    path: Path
    manifest: dict[str, Any]
    universal: bool
    state: dict[str, Any]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors that `save` got as its argument `tensors`, on the CPU; {} if none."""
        file = self.path / TENSORS
        return load_file(file) if file.is_file() else {}

    def changes(self, recipe: Recipe) -> Changes:
        """Return the settings that differ: {key: (value in the checkpoint, value in `recipe`)}."""
        return changes_since(self.manifest["recipe"], recipe, f"{self.path / NAME}: recipe")


class Checkpoints:
    """The checkpoints in one run's folder `directory`.

    Every rank makes such an object, and all ranks call its methods together.
    """

    def __init__(self, directory: Path, recipe: Recipe, ranks: Ranks) -> None:
        self._directory, self._recipe, self._ranks = directory, recipe, ranks

    def save(
        self,
        engine: Any,
        step: int,
        state: dict[str, Any],
        value: float | None = None,
        phase: str | None = None,
        tensors: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Save everything that is needed to resume after optimiser step `step`.

        state: JSON values, returned by `restore`. value: the metric that selects the best
        checkpoint, None if there is no such value. phase: the name of the current phase, None in a
        run without phases. tensors: tensors to save beside the engine's, those of rank 0.
        """
        incomplete = self._directory / f".incomplete-step-{step}"
        final = self._directory / f"step-{step}"
        if self._ranks.is_main:
            for left in LEFT_OVER:  # from a killed process
                for path in self._directory.glob(left):
                    shutil.rmtree(path, ignore_errors=True)
            incomplete.mkdir(parents=True)
        self._ranks.barrier()
        engine.save_checkpoint(str(incomplete), tag="engine", save_latest=False)
        save_file(_random_state(self._ranks.device), incomplete / f"random-{self._ranks.rank}.safetensors")
        self._ranks.barrier()
        if self._ranks.is_main:
            if tensors:
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, incomplete / TENSORS)
            (incomplete / "state.json").write_text(json.dumps(state), encoding="utf-8")
            write_manifest(incomplete, {**self._about(), "step": step, "value": value, "phase": phase})
            _sync(incomplete)
            self._remove(step)  # the same step, saved again after a resume
            incomplete.rename(final)
            self._prune()
        self._ranks.barrier()

    def find(self) -> Found | None:
        """Return the newest checkpoint, None if there is none.

        Raises UserError if its files are damaged or are not a checkpoint of fastmtl; the message
        then names the newest valid one. Also raises UserError if this run cannot continue it,
        because the tasks, the adapter or a setting of the engine differ, or a number of ranks to
        which DeepSpeed cannot change.
        """
        steps = self._steps()
        if not steps:
            return None
        path = self.path(steps[-1])
        try:
            manifest = read_manifest(path)
        except Refused as reason:
            others = [step for step in reversed(steps[:-1]) if self._is_good(step)]
            advice = (
                f"Move it away and run again with --resume: {self.path(others[0])} is good."
                if others
                else "There is no other good checkpoint here: start again in another --output."
            )
            raise UserError(f"{path} cannot be used: {reason}. {advice}") from None
        other = [
            f"{key}: {manifest.get(key)}, this run has {key}: {ours}"
            for key, ours in self._about().items()
            if manifest.get(key) != ours and key not in ("world", "recipe")
        ]
        if other:
            raise UserError(f"{path} was saved with {'; '.join(other)}; a resumed run keeps it")
        universal = manifest["world"] != self._ranks.world
        kind = self._universal_unsupported_reason() if universal else ""
        if kind:
            raise UserError(
                f"{path} was saved by {manifest['world']} processes, this run has {self._ranks.world}: with {kind} "
                "DeepSpeed cannot change their number; run with as many as before"
            )
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        return Found(path, manifest, universal, state)

    def _universal_unsupported_reason(self) -> str:
        """Return the setting that prevents a change of the number of ranks, "" if none does."""
        engine = self._recipe.engine
        if engine.offload:
            return "engine.offload"
        if engine.zero == 0:
            return "engine.zero: 0"
        # These optimisers count steps in their groups, which the universal form does not save.
        if engine.fused_optimizer != "torch" and self._ranks.device.type == "cuda":
            return f"engine.fused_optimizer: {engine.fused_optimizer}"
        return ""

    def restore(self, engine: Any, found: Found) -> dict[str, Any]:
        """Load a checkpoint into the engine; return the `state` that was saved with it.

        Torch's random state is loaded too, unless the number of ranks has changed. Learning rates,
        clipping and the optimiser's other settings stay those of the engine, which follow the
        current recipe and number of steps.
        """
        settings = optimizer_settings(engine)
        if found.universal:
            with universal_copy(found.path, self._ranks) as directory, keeps_groups(engine):
                self._load(engine, directory)
        else:
            self._load(engine, found.path)
            file = found.path / f"random-{self._ranks.rank}.safetensors"
            state = load_file(file)
            torch.set_rng_state(state["cpu"])
            if "cuda" in state and self._ranks.device.type == "cuda":
                torch.cuda.set_rng_state(state["cuda"], self._ranks.device)
        put_settings(engine, settings)
        return found.state

    def _load(self, engine: Any, directory: Path) -> None:
        with plain_path(directory) as path, keeps_clipping(engine):
            loaded, _ = engine.load_checkpoint(str(path), tag="engine")
        if loaded is None:
            raise RuntimeError(f"DeepSpeed found no checkpoint in {directory}, whose manifest names its files")

    def _about(self) -> dict[str, Any]:
        engine = self._recipe.engine
        return {
            "world": self._ranks.world,
            "zero": engine.zero,
            "precision": engine.precision,
            "offload": engine.offload,
            "fused_optimizer": engine.fused_optimizer,
            "flat_parameters": engine.flat_parameters,
            "tasks": self._recipe.task_names,
            "adapter": self._recipe.adapter.summary,
            **({"lora": self._recipe.lora.summary} if self._recipe.lora.used else {}),
            "recipe": self._recipe.model_dump(mode="json"),
        }

    def path(self, step: int) -> Path:
        """Return the folder of a step's checkpoint."""
        return self._directory / f"step-{step}"

    def _steps(self) -> list[int]:
        names = [path.name.removeprefix("step-") for path in self._directory.glob("step-*")]
        return sorted(int(name) for name in names if name.isdecimal())

    def _is_good(self, step: int) -> bool:
        try:
            read_manifest(self.path(step))
        except Refused:
            return False
        return True

    def _prune(self) -> None:
        steps = self._steps()
        values, phases = {}, {}
        for step in steps:
            try:
                manifest = json.loads((self.path(step) / "manifest.json").read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue  # damaged: left to the user
            values[step], phases[step] = manifest.get("value"), manifest.get("phase")
        now = phases.get(steps[-1])  # values of different phases are not comparable
        scored = {step: value for step, value in values.items() if value is not None and phases[step] == now}
        best = max(scored, key=lambda step: (scored[step], -step)) if scored else None
        for step in steps[:-KEEP_LATEST]:
            if step != best and step in values:
                self._remove(step)

    def _remove(self, step: int) -> None:
        """Delete the checkpoint of a step, if there is one.

        The folder is renamed first, so that a killed process leaves no incomplete step-N.
        """
        removed = self._directory / f".removed-step-{step}"
        if self.path(step).is_dir():
            self.path(step).rename(removed)
            shutil.rmtree(removed)


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _sync(directory: Path) -> None:
    """Wait until a folder and all files below it are on the disk (fsync)."""
    for path in [*directory.rglob("*"), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
