"""Optional libraries: the extras of this distribution, what they are for, and what is installed."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass


@dataclass(frozen=True)
class Extra:
    """Optional libraries that are installed together.

    libraries: names of distributions. use: what needs them. command: what pip installs.
    """

    name: str
    libraries: tuple[str, ...]
    use: str
    command: str

    def missing(self) -> list[str]:
        return [name for name in self.libraries if version(name) is None]


def version(distribution: str) -> str | None:
    """Return the version of an installed distribution, None if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _extra(name: str, libraries: tuple[str, ...], use: str) -> Extra:
    return Extra(name, libraries, use, f"'fastmtl-torch[{name}]'")


EXTRAS = (
    _extra("torchjd", ("torchjd",), "gradient methods of TorchJD, such as cagrad and upgrad"),
    _extra("serve", ("fastapi", "uvicorn", "prometheus-client"), "fastmtl serve"),
    _extra("optuna", ("optuna",), "fastmtl sweep --trials, and tuned in fastmtl compare"),
    _extra("onnx", ("onnx", "onnxruntime", "onnxscript"), "fastmtl export --onnx"),
    _extra("data", ("datasets",), "data sets of Hugging Face"),
    _extra("accelerate", ("accelerate",), "surgery in transformers.Trainer and Accelerate"),
    _extra("lightning", ("lightning",), "surgery in Lightning and Fabric"),
    _extra("gpu", ("nvidia-ml-py",), "the memory of a process on a GPU"),
    Extra("wandb", ("wandb",), "tracking: [wandb]", "wandb"),
    Extra("mlflow", ("mlflow-skinny",), "tracking: [mlflow]", "mlflow-skinny"),
    Extra("trackio", ("trackio",), "tracking: [trackio]", "trackio"),
)
