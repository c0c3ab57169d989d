"""The steps of `fastmtl reproduce`, from the report's name to the written tables."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from fastmtl.errors import UserError
from fastmtl.reproduce import report as pages
from fastmtl.reproduce.plan import Options, describe, plan
from fastmtl.reproduce.runs import check_directory, read_outcomes, run_all
from fastmtl.reproduce.tables import load_results
from fastmtl.sweep.child_process import Interrupted

OK, FAILED, INTERRUPTED = 0, 1, 130


def run_report(report: str, rows: Sequence[str], options: Options, output: Path, launcher: Sequence[str] = ()) -> int:
    """Run a report's experiments and write its tables beside our results; return an exit status.

    The status is 0, 1 if a run failed, 130 after a stop. rows: names of runs; empty for all.
    launcher: words of a command in front of `fastmtl train`. Raises UserError for unknown names,
    invalid options, and an output directory of other runs.
    """
    if not 0 < options.fraction <= 1:
        raise UserError(f"--fraction {options.fraction:g}: a share of the training rows, above 0 and at most 1")
    if "RANK" in os.environ:
        raise UserError("reproduce starts its own processes: run it without a launcher, and name it with --launcher")
    if launcher and shutil.which(launcher[0]) is None:
        raise UserError(f"--launcher: there is no command {launcher[0]}")
    paper = load_results(report)
    runs = plan(report, paper, rows, options)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to the output directory {output}: {error.strerror}") from None
    check_directory(output, runs)
    console = Console()
    notes = describe(options, paper, runs)

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    for note in notes:
        say(note)
    status = OK
    failures: dict[Path, str] = {}
    try:
        outcomes, failures = run_all(output, runs, train_scores=paper.needs_train_scores, say=say, launcher=launcher)
        status = FAILED if failures else OK
    except Interrupted:
        outcomes, status = read_outcomes(output, runs), INTERRUPTED
    tables = [(table, list(pages.lines_of(table, runs, outcomes, failures))) for table in paper.tables]
    asked = [(table, lines) for table, lines in tables if any(line.run is not None for line in lines) or not rows]
    pages.show(paper.title, asked, console)
    pages.write(output, report, paper, notes, asked)
    say(f"{output / 'results.md'}\n{output / 'results.json'}")
    if status == INTERRUPTED:
        say("stopped; run the same command to continue")
    return status
