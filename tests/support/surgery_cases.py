"""Batches, a model and its surgery for the tests of surgery's options and inputs."""

from __future__ import annotations

from typing import Any

import deepspeed_cases as cases
import torch

from fastmtl.data.packed_batch import PackedBatch
from fastmtl.model.multitask import MultiTaskModel
from fastmtl.surgery import GradientSurgery

TASKS = ["kind", "same", "degree"]
COUNTS = {"kind": 8, "same": 3, "degree": 8}


def make() -> MultiTaskModel:
    return cases.make_model(cases.make_recipe(cases.Case(1, 1, "pcgrad")))


def batch(part: int = 0, parts: int = 1) -> PackedBatch:
    return cases.step_batches(cases.make_data(), 0, part, parts)


def surgery_on(model: MultiTaskModel, method: str = "pcgrad", **more: Any) -> GradientSurgery:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    shared, sparse = model.shared_parameters(), model.sparse_parameters()
    return GradientSurgery(optimizer, method, tasks=TASKS, shared=shared, sparse=sparse, **{"seed": 3, **more})
