"""The command `fastmtl serve`, which answers requests over HTTP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from fastmtl.commands.options import Debug, ModelDir


def register(app: typer.Typer, set_debug: Callable[[bool], None]) -> None:
    """Add the command of this module to the app.

    set_debug: called with the value of the option --debug.
    """

    @app.command(no_args_is_help=True)
    def serve(
        model_dir: ModelDir,
        host: Annotated[str, typer.Option(help="The address; 0.0.0.0 for all.")] = "127.0.0.1",
        port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
        device: Annotated[
            str | None, typer.Option(help="A torch device. Default: the first GPU, else the CPU.", show_default=False)
        ] = None,
        tokens: Annotated[int, typer.Option(min=1, help="Budget of a batch.")] = 8192,
        wait_ms: Annotated[float, typer.Option(min=0.0, help="A batch waits so long for more requests.")] = 2.0,
        threads: Annotated[
            int | None, typer.Option(min=1, help="Cores of the model. Default: all.", show_default=False)
        ] = None,
        debug: Debug = False,
    ) -> None:
        """Serve a model over HTTP: one call answers one or several tasks for the same texts.

        POST /predict with {"texts": [...], "tasks": [...]}, GET /tasks, /health and
        /metrics (Prometheus); /docs has the OpenAPI page. Requests of many clients
        share one packed batch. SIGTERM lets the requests that wait be answered.

        [bold]Examples[/bold]

          [cyan]fastmtl serve runs/demo/model --port 8000[/cyan]

          [cyan]curl localhost:8000/predict -H 'Content-Type: application/json' \\
            -d '{"texts": ["a lovely film"], "tasks": ["sentiment"]}'[/cyan]
        """
        set_debug(debug)
        from fastmtl.serving.command import run_server

        run_server(model_dir, host, port, device, tokens, wait_ms, threads)
