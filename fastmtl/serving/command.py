"""The steps of `fastmtl serve`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from fastmtl.errors import UserError


def check_libraries() -> None:
    """Raise UserError unless the libraries of the extra `serve` are installed."""
    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if find_spec(name) is None]
    if missing:
        raise UserError(f"serve needs {', '.join(missing)}: pip install 'fastmtl-torch[serve]'")


def run_server(
    model_dir: Path, host: str, port: int, device: str | None, tokens: int, wait_ms: float, threads: int | None
) -> None:
    """Load a model and serve it until SIGTERM or Ctrl-C; then answer what waits, and return.

    tokens, wait_ms: budget and deadline of a batch. threads: those of the model; default: all
    cores.
    """
    check_libraries()
    import torch
    import uvicorn

    from fastmtl.inference.predict import load
    from fastmtl.serving.app import Limits, build_app
    from fastmtl.serving.packed import PackedPredictor, warm_up

    if threads is not None:
        torch.set_num_threads(threads)
    predictor = PackedPredictor(load(model_dir, device))
    warm_up(predictor)
    print(f"{', '.join(predictor.recipe.task_names)} on http://{host}:{port}/docs", flush=True)
    app = build_app(predictor, Limits(tokens=tokens, wait=wait_ms / 1000))
    uvicorn.run(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=30, access_log=False)
