"""NVIDIA Apex, an optional package, recognised by its files.

An import would not do: an unrelated package has the same name.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from fastmtl.errors import UserError

HOW = "build https://github.com/NVIDIA/apex with its C++ and CUDA extensions, as its README says"


def fused_adam_unsupported_reason() -> str:
    """Return why apex.optimizers.FusedAdam is missing and what to do, "" if it is installed."""
    return _unsupported_reason("optimizers/fused_adam.py", "amp_C")


def layer_norm_unsupported_reason() -> str:
    """Return why apex's FusedLayerNorm is missing and what to do, "" if it is installed."""
    return _unsupported_reason("normalization/fused_layer_norm.py", "fused_layer_norm_cuda")


def layer_norm() -> Any:
    """Return Apex's LayerNorm, a function of x [N, d], weight [d], bias [d], shape (d,) and eps.

    Raises UserError if Apex's LayerNorm cannot be used here.
    """
    import torch

    reason = layer_norm_unsupported_reason()
    if not reason and not torch.cuda.is_available():
        reason = "it needs an NVIDIA GPU"
    if reason:
        raise UserError(f"encoder.layer_norm: apex cannot be used here: {reason}; or use encoder.layer_norm: fastmtl")
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine

    return fused_layer_norm_affine


def _unsupported_reason(file: str, extension: str) -> str:
    """Return why a part of Apex is missing, "" if it is installed.

    file: a Python file of the part. extension: its CUDA extension. Apex is not imported, since an
    import of the unrelated package may fail.
    """
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return f"NVIDIA Apex is not installed: {HOW}"
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    if not any((folder / file).is_file() for folder in folders):
        return (
            f"the package in {folders[0] if folders else spec.origin} is not NVIDIA's Apex but an unrelated one of "
            f"that name (pip install apex gives it): pip uninstall apex, then {HOW}"
        )
    if importlib.util.find_spec(extension) is None:
        return f"NVIDIA's Apex in {folders[0]} was built without its CUDA extension {extension}: {HOW}"
    return ""
