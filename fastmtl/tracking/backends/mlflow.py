"""MLflow. MLFLOW_TRACKING_URI names the server; default: the run's folder mlflow/."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from pathlib import Path

from fastmtl.config import Recipe
from fastmtl.tracking.backends.backend import Backend, flat, keep_id, known_id

MOST = 100  # numbers or settings in one request
_NOT_IN_NAMES = re.compile(r"[^\w\-. :/]")


class MLflow(Backend):
    """A run in the experiment of MLFLOW_EXPERIMENT_NAME, by default fastmtl."""

    def __init__(self, output: Path, recipe: Recipe, resume_step: int) -> None:
        from mlflow import MlflowClient

        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            uri = (output / "mlflow").resolve().as_uri()
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # since version 3, folders are on request
        self._client = MlflowClient(tracking_uri=uri)
        self._id = known_id(output, "mlflow") if resume_step else None
        if self._id is not None:
            self._client.update_run(self._id, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "fastmtl")
        known = self._client.get_experiment_by_name(name)
        experiment = self._client.create_experiment(name) if known is None else known.experiment_id
        self._id = self._client.create_run(experiment, run_name=output.resolve().name).info.run_id
        keep_id(output, "mlflow", self._id)
        from mlflow.entities import Param

        settings = flat(recipe.model_dump(mode="json"))
        params = [Param(_NOT_IN_NAMES.sub("_", key), str(value)[:500]) for key, value in settings.items()]
        for start in range(0, len(params), MOST):
            self._client.log_batch(self._id, params=params[start : start + MOST])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(_NOT_IN_NAMES.sub("_", name), value, now, step) for name, value in values.items()]
        for start in range(0, len(metrics), MOST):
            self._client.log_batch(self._id, metrics=metrics[start : start + MOST])

    def close(self) -> None:
        self._client.set_terminated(self._id)
