"""The choice of a run's Adam: refusals, DeepSpeed's compared with torch's, and a resumed run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import cpu_environment
from safetensors.torch import load_file

from fastmtl.config import Recipe, parse_recipe
from fastmtl.engine import fused_optimizers
from fastmtl.engine.fused_optimizers import build_adam, check_fused_optimizer, deepspeed_unsupported_reason
from fastmtl.errors import UserError

WORKER = Path(__file__).with_name("fused_optimizer_cases.py")


def recipe(fused: str, optimizer: str = "adamw", **engine: Any) -> Recipe:
    sections = {"optimizer": {"name": optimizer}, "engine": {"fused_optimizer": fused, **engine}}
    return parse_recipe({"tasks": {"a": {"type": "binary", "data": {}}}, **sections}, "test")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder that is searched for packages first."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def pretend_apex(site: Path, *files: str) -> None:
    """Create files with the names of the real packages' files; nothing in them is called."""
    for file in ("apex/__init__.py", *files):
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        (site / file).write_text("")


@pytest.mark.parametrize("name", ["adamw", "adam"])
def test_torch_is_the_default_and_never_refused(name: str) -> None:
    check_fused_optimizer(recipe("torch", name))
    check_fused_optimizer(recipe("torch", "sgd"))
    built = build_adam(recipe("torch", name), [{"params": [torch.nn.Parameter(torch.zeros(2))]}])
    assert type(built) is (torch.optim.AdamW if name == "adamw" else torch.optim.Adam)
    assert parse_recipe({"tasks": {"a": {"type": "binary", "data": {}}}}, "test").engine.fused_optimizer == "torch"


@pytest.mark.parametrize("fused", ["deepspeed", "apex"])
def test_sgd_is_torchs(fused: str) -> None:
    with pytest.raises(UserError, match="optimizer.name: sgd needs engine.fused_optimizer: torch"):
        check_fused_optimizer(recipe(fused, "sgd"))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "NVIDIA Apex is not installed: build https://github.com/NVIDIA/apex"),
        ([], "an unrelated one of that name .* pip uninstall apex, then build"),
        (["apex/optimizers/fused_adam.py"], "without its CUDA extension amp_C"),
        (["apex/optimizers/fused_adam.py", "amp_C.py"], "it needs an NVIDIA GPU"),
    ],
)
def test_apex_is_refused_with_what_to_do(
    site: Path, monkeypatch: pytest.MonkeyPatch, files: list[str] | None, message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if files is not None:
        pretend_apex(site, *files)
    with pytest.raises(UserError, match=message) as error:
        check_fused_optimizer(recipe("apex"))
    assert "engine.fused_optimizer: apex" in str(error.value) and "or use engine.fused_optimizer: torch" in str(
        error.value
    )


def test_apex_is_not_for_offload(site: Path) -> None:
    pretend_apex(site, "apex/optimizers/fused_adam.py", "amp_C.py")
    with pytest.raises(UserError, match="engine.offload on the host"):
        check_fused_optimizer(recipe("apex", zero=2, offload=True))


def test_deepspeed_without_its_tools_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("CXX", "no-such-compiler -O2")
        with pytest.raises(UserError, match="no-such-compiler is not on PATH"):
            check_fused_optimizer(recipe("deepspeed"))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="ninja, which is not on PATH"):
        check_fused_optimizer(recipe("deepspeed"))


def test_what_the_compiler_said_is_the_reason() -> None:
    error = RuntimeError("the op failed to build")
    error.__cause__ = RuntimeError("Error building extension:\n a.cpp:1:1: error: no such header\nninja: stopped.")
    assert fused_optimizers._reason(error) == "a.cpp:1:1: error: no such header"
    assert fused_optimizers._reason(RuntimeError("one\nthe last line.")) == "the last line"


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("BUILD_DEEPSPEED"), reason="builds for minutes: BUILD_DEEPSPEED=1 make test")
@pytest.mark.skipif(bool(deepspeed_unsupported_reason()), reason=deepspeed_unsupported_reason())
def test_deepspeeds_adam_is_torchs_and_resumes(tmp_path: Path) -> None:
    """Its extension is built in torch's folder of extensions, once for all runs."""
    environment = cpu_environment()
    command = [sys.executable, str(WORKER), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    begun, straight, resumed, of_torch = (
        load_file(tmp_path / f"{name}.safetensors") for name in ("begun", "straight", "resumed", "torch")
    )
    # Adam's m / sqrt(v) gives the sign of a rounding-only gradient (a key's bias) the effect of any
    # other.
    names = [name for name in straight if not name.endswith("key.bias")]
    assert max((begun[name] - straight[name]).abs().max() for name in names) > 1e-3
    for name in names:
        for other in (resumed, of_torch):
            torch.testing.assert_close(other[name], straight[name], atol=2e-6, rtol=1e-5, msg=name)
