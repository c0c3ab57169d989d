"""The commands `fastmtl bench ...`. They import what they need when they run, like cli.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fastmtl.commands.options import Debug
from fastmtl.errors import UserError

EXIT_SLOWER = 1

ShapeName = Annotated[
    Literal["minilm", "bert-base", "tiny"],
    typer.Option("--shape", help="The encoder's size; tiny is for trying a command."),
]
StepShapeName = Annotated[
    Literal["minilm", "bert-base", "roberta-base", "modernbert-base", "tiny"],
    typer.Option("--shape", help="The encoder and its size; tiny is for trying a command."),
]
Tokens = Annotated[
    int | None,
    typer.Option(min=1024, metavar="N", help="Tokens of a step. Default: the shape's texts.", show_default=False),
]
Rounds = Annotated[int, typer.Option(min=1, metavar="N", help="Number of turns of each implementation.")]
Device = Annotated[Literal["cpu", "cuda"], typer.Option(help="Device to measure; cuda is the first GPU.")]
Precision = Annotated[Literal["fp32", "bf16"], typer.Option(help="Precision of weights and activations.")]
Threads = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Threads of torch. Default: torch's choice.", show_default=False),
]
JsonFile = Annotated[
    Path | None,
    typer.Option(
        "--json", metavar="FILE", help="Save the result with all samples, also while it grows.", show_default=False
    ),
]
PlotDir = Annotated[
    Path | None,
    typer.Option("--plot", metavar="DIR", help="Draw the result into this folder, as SVG.", show_default=False),
]
Compare = Annotated[
    Path | None,
    typer.Option("--compare", metavar="OLD.json", help="Show changes against a saved result.", show_default=False),
]
FailSlower = Annotated[
    bool, typer.Option("--fail-slower", help="With --compare: exit status 1 if anything is slower than noise.")
]
Commit = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="`git describe --always --dirty` of a copy without .git.", show_default=False),
]


def register(app: typer.Typer, set_debug: Callable[[bool], None]) -> None:
    """Add the commands of this module to the app.

    set_debug: called with the value of the option --debug.
    """
    bench = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")
    app.add_typer(bench, name="bench")

    @bench.callback()
    def about() -> None:
        """Measure fastmtl on this machine against its alternatives.

        Results are compared with the oracle's before anything is timed.

        [bold]Examples[/bold]

          [cyan]fastmtl bench kernels --op varlen_attention[/cyan]
          [cyan]fastmtl bench step[/cyan]
          [cyan]fastmtl bench surgery --json new.json --plot plots --compare old.json[/cyan]
          [cyan]fastmtl bench kernels --help[/cyan]
        """

    @bench.command("kernels")
    def kernels(
        op: Annotated[
            list[str] | None, typer.Option(metavar="NAME", help="An operation; may be repeated.", show_default=False)
        ] = None,
        impl: Annotated[
            list[str] | None,
            typer.Option(
                metavar="NAME",
                help="fastmtl, cpp, triton, eager, compiled, peft, ...; may be repeated.",
                show_default=False,
            ),
        ] = None,
        without: Annotated[
            list[str] | None,
            typer.Option(metavar="NAME", help="An implementation to leave out; may be repeated.", show_default=False),
        ] = None,
        shape: ShapeName = "minilm",
        tasks: Annotated[int, typer.Option(min=1, metavar="N", help="Tasks of a step.")] = 3,
        tokens: Tokens = None,
        dropout: Annotated[float, typer.Option(min=0, max=0.9, help="Dropout, if the operation has one.")] = 0.1,
        rounds: Rounds = 7,
        device: Device = "cpu",
        precision: Precision = "fp32",
        threads: Threads = None,
        json_file: JsonFile = None,
        plot_dir: PlotDir = None,
        compare: Compare = None,
        fail_slower: FailSlower = False,
        commit: Commit = None,
        debug: Debug = False,
    ) -> None:
        """Time the operations of fastmtl_kernels beside eager torch, torch.compile and libraries.

        The table has forward and backward, with bytes and operations per second as
        shares of a copy and of a matrix product measured in the same run. An
        implementation with another output or gradient than the oracle is not timed.
        docs/benchmarks.md explains the table.

        [bold]Examples[/bold]

          [cyan]fastmtl bench kernels[/cyan]
          [cyan]fastmtl bench kernels --op pool --impl fastmtl --impl eager[/cyan]
          [cyan]fastmtl bench kernels --device cuda --precision bf16 \\
            --shape bert-base --tokens 8192[/cyan]
          [cyan]fastmtl bench kernels --json new.json --plot plots \\
            --compare old.json[/cyan]
        """
        set_debug(debug)
        old = _prepare(device, threads, json_file, compare)
        from fastmtl.bench import ops
        from fastmtl.bench.kernels import bench_kernels, check_impls
        from fastmtl.bench.report import keeper, progress
        from fastmtl.bench.sizes import SHAPES, Size

        size = Size(SHAPES[shape], tasks, tokens, device, precision, dropout)
        operations = op or list(ops.OPERATIONS)
        check_impls([*(impl or []), *(without or [])], size, operations)
        with progress() as say:
            result = bench_kernels(size, rounds, say, operations, impl or [], commit, without or [], keeper(json_file))
        _show(result, json_file, plot_dir, old, fail_slower)

    @bench.command("surgery")
    def surgery(
        model: Annotated[
            Literal["hf-bert", "hf-modernbert", "llama-lora", "vit"] | None,
            typer.Option(help="Instead of fastmtl's encoder: a model of transformers, unmodified.", show_default=False),
        ] = None,
        shape: Annotated[
            Literal["minilm", "bert-base", "llama-1024", "vit-s16", "tiny"] | None,
            typer.Option(help="The model's size. Default: minilm, llama-1024 or vit-s16.", show_default=False),
        ] = None,
        tasks: Annotated[
            int | None, typer.Option(min=2, metavar="N", help="Tasks of a step. Default: 3.", show_default=False)
        ] = None,
        tokens: Annotated[
            int | None,
            typer.Option(
                min=1024,
                metavar="N",
                help="Tokens of a step, the same number for each task. Default: the shape's texts; with --sweep 8192.",
                show_default=False,
            ),
        ] = None,
        rows: Annotated[
            int | None,
            typer.Option(min=1, metavar="N", help="Rows of each task. Default: the shape's.", show_default=False),
        ] = None,
        way: Annotated[
            list[str] | None,
            typer.Option(metavar="NAME", help="With --model: a way in the table; may be repeated.", show_default=False),
        ] = None,
        same_rows: Annotated[
            bool, typer.Option("--same-rows", help="With --model: every row has the losses of all tasks.")
        ] = False,
        sweep: Annotated[bool, typer.Option("--sweep", help="Instead: 2 to 32 tasks in equally many tokens.")] = False,
        rounds: Rounds = 7,
        device: Device = "cpu",
        precision: Precision = "fp32",
        threads: Threads = None,
        json_file: JsonFile = None,
        plot_dir: PlotDir = None,
        compare: Compare = None,
        fail_slower: FailSlower = False,
        commit: Commit = None,
        debug: Debug = False,
    ) -> None:
        """Measure the cost of gradient surgery over joint training, in time and memory.

        A step has no optimiser update and random weights. The table compares fastmtl's
        variants, the textbook PCGrad loop on a padded BertModel, and TorchJD if it is
        installed. Every variant's gradient is compared with the textbook's first; a
        wrong one is an error. docs/benchmarks.md explains the table.

        With --model, an unmodified model of transformers takes the place of fastmtl's
        encoder. All ways run the same padded rows.

        [bold]Examples[/bold]

        A few minutes on two cores:
          [cyan]fastmtl bench surgery[/cyan]

        A larger encoder, with output for a program:
          [cyan]fastmtl bench surgery --shape bert-base --threads 2 --json bert-base.json[/cyan]

        An unmodified model of transformers:
          [cyan]fastmtl bench surgery --model hf-bert[/cyan]
          [cyan]fastmtl bench surgery --model llama-lora --way "one pass"[/cyan]

        On a GPU:
          [cyan]fastmtl bench surgery --device cuda --precision bf16 \\
            --shape bert-base --tasks 8 --tokens 8192[/cyan]

        The cost of more tasks, quickly:
          [cyan]fastmtl bench surgery --sweep --tokens 2048 --rounds 3[/cyan]
        """
        set_debug(debug)
        if sweep and tasks is not None:
            raise UserError("--sweep and --tasks exclude each other: 2 to 32 tasks, or one number of them")
        if rows is not None and tokens is not None:
            raise UserError("--rows and --tokens exclude each other: so many texts, or as many as have so many tokens")
        if model is not None and (sweep or tokens is not None):
            raise UserError("--model excludes --sweep and --tokens: choose --tasks and --rows")
        if model is None and way:
            raise UserError("--way needs --model: without it, every variant is measured")
        if model is None and same_rows:
            raise UserError("--same-rows needs --model: fastmtl's encoder has rows of one task each")
        old = _prepare(device, threads, json_file, compare)
        from fastmtl.bench.models.run import bench_model, check_ways
        from fastmtl.bench.models.workload import shape_of
        from fastmtl.bench.report import keeper, progress
        from fastmtl.bench.sizes import Size
        from fastmtl.bench.surgery import bench_tasks, bench_variants

        chosen, ways = shape_of(model, shape), check_ways(way or [])
        chosen = chosen if rows is None else dataclasses.replace(chosen, rows=rows)
        size = Size(chosen, tasks or 3, tokens, device, precision)
        with progress() as say:
            if model is not None:
                keep = keeper(json_file)
                result = bench_model(model, size, rounds, say, ways, commit, keep, same_rows=same_rows)
            elif sweep:
                result = bench_tasks(size, rounds, say, commit=commit)
            else:
                result = bench_variants(size, rounds, say, commit=commit, keep=keeper(json_file))
        _show(result, json_file, plot_dir, old, fail_slower)

    @bench.command("step")
    def step(
        shape: StepShapeName = "minilm",
        tasks: Annotated[int, typer.Option(min=1, metavar="N", help="Tasks of a step.")] = 3,
        rows: Annotated[
            int | None,
            typer.Option(min=1, metavar="N", help="Texts of each task. Default: the shape's.", show_default=False),
        ] = None,
        tokens: Tokens = None,
        sweep: Annotated[
            Literal["tokens", "tasks", "adapters", "methods", "precisions", "recompute", "graphs"] | None,
            typer.Option(help="Compare several steps that differ in this.", show_default=False),
        ] = None,
        compiled: Annotated[
            bool, typer.Option("--compiled", help="Also transformers with torch.compile, which compiles for minutes.")
        ] = False,
        rounds: Rounds = 7,
        device: Device = "cpu",
        precision: Precision = "fp32",
        threads: Threads = None,
        json_file: JsonFile = None,
        plot_dir: PlotDir = None,
        compare: Compare = None,
        fail_slower: FailSlower = False,
        commit: Commit = None,
        debug: Debug = False,
    ) -> None:
        """Time a whole training step beside that of transformers and the matrix products alone.

        The step includes dropout and AdamW.

        [bold]Examples[/bold]

          [cyan]fastmtl bench step[/cyan]
          [cyan]fastmtl bench step --shape bert-base --rows 32 --rounds 3[/cyan]
          [cyan]fastmtl bench step --shape modernbert-base --rounds 3[/cyan]
          [cyan]fastmtl bench step --sweep adapters --plot plots[/cyan]
          [cyan]fastmtl bench step --sweep recompute --rows 8 --threads 1[/cyan]
        """
        set_debug(debug)
        if rows is not None and tokens is not None:
            raise UserError("--rows and --tokens exclude each other: so many texts, or as many as have so many tokens")
        if sweep is not None and compiled:
            raise UserError("--sweep and --compiled exclude each other: compiling takes minutes at each point")
        old = _prepare(device, threads, json_file, compare)
        from fastmtl.bench.report import keeper, progress
        from fastmtl.bench.sizes import STEP_SHAPES, Size
        from fastmtl.bench.step import bench_step, bench_sweep
        from fastmtl.bench.step_ways import COMPILED, DEFAULT

        chosen, family = STEP_SHAPES[shape]
        chosen = chosen if rows is None else dataclasses.replace(chosen, rows=rows)
        size = Size(chosen, tasks, tokens, device, precision, family=family)
        with progress() as say:
            if sweep is not None:
                result = bench_sweep(sweep, size, rounds, say, commit, keeper(json_file))
            else:
                ways = (*DEFAULT, *COMPILED) if compiled else DEFAULT
                result = bench_step(size, rounds, say, commit, ways, keeper(json_file))
        _show(result, json_file, plot_dir, old, fail_slower)

    @bench.command("peers")
    def peers(
        shape: ShapeName = "minilm",
        tasks: Annotated[int, typer.Option(min=2, metavar="N", help="Tasks of a step.")] = 3,
        rows: Annotated[
            int | None,
            typer.Option(min=1, metavar="N", help="Texts of each task. Default: the shape's.", show_default=False),
        ] = None,
        memory_limit: Annotated[
            float, typer.Option(min=0.1, metavar="GIB", help="GPU memory for the largest batch.")
        ] = 24,
        rounds: Rounds = 5,
        device: Device = "cpu",
        precision: Precision = "fp32",
        threads: Threads = None,
        json_file: JsonFile = None,
        plot_dir: PlotDir = None,
        compare: Compare = None,
        fail_slower: FailSlower = False,
        commit: Commit = None,
        debug: Debug = False,
    ) -> None:
        """Compare PCGrad in fastmtl, the textbook loop and TorchJD with a joint step.

        The table has time, memory and the largest batch. All compute the same gradients,
        which is checked first. Without a GPU the largest batch is predicted from peaks at
        two batch sizes.

        [bold]Examples[/bold]

          [cyan]fastmtl bench peers[/cyan]
          [cyan]fastmtl bench peers --shape bert-base --device cuda \\
            --precision bf16 --rows 32[/cyan]
        """
        set_debug(debug)
        old = _prepare(device, threads, json_file, compare)
        from fastmtl.bench.peers import bench_peers
        from fastmtl.bench.report import keeper, progress
        from fastmtl.bench.sizes import SHAPES, Size

        chosen = SHAPES[shape] if rows is None else dataclasses.replace(SHAPES[shape], rows=rows)
        size = Size(chosen, tasks, None, device, precision)
        with progress() as say:
            result = bench_peers(size, rounds, say, memory_limit, commit, keeper(json_file))
        _show(result, json_file, plot_dir, old, fail_slower)

    @bench.command("engine")
    def engine(
        shape: ShapeName = "minilm",
        tasks: Annotated[int, typer.Option(min=2, metavar="N", help="Tasks of a step.")] = 3,
        tokens: Annotated[
            int | None,
            typer.Option(min=64, metavar="N", help="Tokens of a step. Default: the shape's texts.", show_default=False),
        ] = None,
        way: Annotated[
            list[str] | None,
            typer.Option(metavar="NAME", help="A way in the table; may be repeated.", show_default=False),
        ] = None,
        steps: Annotated[int, typer.Option(min=1, metavar="N", help="Steps per round.")] = 10,
        rounds: Rounds = 5,
        device: Device = "cpu",
        precision: Precision = "fp32",
        threads: Threads = None,
        json_file: JsonFile = None,
        plot_dir: PlotDir = None,
        compare: Compare = None,
        fail_slower: FailSlower = False,
        commit: Commit = None,
        debug: Debug = False,
    ) -> None:
        """Time whole steps of the DeepSpeed engine (ZeRO 1, one process) in several ways.

        The ways are plain, with flat parameters and as CUDA graphs, each with `sum` and
        `pcgrad`; PCGrad with J in bfloat16; and without DeepSpeed's overflow check and
        overlap. Each way has a separate engine and trains alone, one after the other.

        [bold]Examples[/bold]

          [cyan]fastmtl bench engine[/cyan]
          [cyan]fastmtl bench engine --shape bert-base --device cuda \\
            --precision bf16 --tokens 8192[/cyan]
          [cyan]fastmtl bench engine --way sum --way "sum, flat"[/cyan]
        """
        set_debug(debug)
        old = _prepare(device, threads, json_file, compare)
        from fastmtl.bench.engine import bench_engine, check_ways
        from fastmtl.bench.report import keeper, progress
        from fastmtl.bench.sizes import SHAPES, Size

        ways = check_ways(way or [])
        size = Size(SHAPES[shape], tasks, tokens, device, precision, 0.1)
        with progress() as say:
            result = bench_engine(size, rounds, say, ways, steps, commit, keeper(json_file))
        _show(result, json_file, plot_dir, old, fail_slower)

    @bench.command("plot", no_args_is_help=True)
    def plot(
        file: Annotated[Path, typer.Argument(metavar="RESULT.json", help="A file of --json.")],
        directory: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of the pictures.")],
        debug: Debug = False,
    ) -> None:
        """Draw a saved result: a roofline for kernels, bars for a step and surgery.

        A result without its device, driver, versions and commit is rejected.

        [bold]Example[/bold]

          [cyan]fastmtl bench plot kernels.json plots[/cyan]
        """
        set_debug(debug)
        from fastmtl.bench import compare
        from fastmtl.bench.plot import plot as draw

        for path in draw(compare.read(file), directory):
            print(f"drawn in {path}")


def _prepare(device: str, threads: int | None, json_file: Path | None, old: Path | None) -> dict[str, Any] | None:
    """Check the options before a measurement that takes minutes, and set torch's threads.

    Returns the result in the file `old` of --compare, None without the option.
    """
    import torch

    from fastmtl.bench import compare
    from fastmtl.bench.report import check_file

    check_file(json_file)
    found = None if old is None else compare.read(old)
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here; `fastmtl doctor` says why")
    if threads is not None:
        torch.set_num_threads(threads)
    return found


def _show(
    result: dict[str, Any], json_file: Path | None, plot_dir: Path | None, old: dict[str, Any] | None, fail: bool
) -> None:
    from fastmtl.bench import compare
    from fastmtl.bench.plot import plot
    from fastmtl.bench.report import save, show, show_changes, wide

    console = wide()
    show(result, console)
    if json_file is not None:
        save(result, json_file)
        print(f"saved in {json_file}")
    if plot_dir is not None:
        for path in plot(result, plot_dir):
            print(f"drawn in {path}")
    if old is not None:
        changes = compare.changes(old, result)
        show_changes(changes, old, result, console)
        if fail and any(change.verdict == "slower" for change in changes):
            raise typer.Exit(EXIT_SLOWER)
