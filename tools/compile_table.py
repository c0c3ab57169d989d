"""Compile the kernels for A100 and H100, without a GPU, and write docs/compile-table.md.

`make compile-table` runs this script. It compiles every Triton configuration that the launchers
choose for the calls in compile_cases.py, and every CUDA kernel in csrc/*.cu. The results for Triton
kernels are cached in .cache/compile-table by a kernel's sources and Triton's version, so only
changed kernels are compiled again. With --older, and an older Triton first on PYTHONPATH, the
script writes docs/compile-table-triton-3.6.md, which has only the Triton kernels.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.metadata
import io
import json
import multiprocessing
import re
import tempfile
import time
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs" / "compile-table.md"
OLDER = ROOT / "docs" / "compile-table-triton-3.6.md"
OLDEST = "3.6"
CAPABILITIES = (80, 90)
# Bytes of shared memory that a block may have on A100 and H100.
SHARED = {80: 163 << 10, 90: 227 << 10}
COLUMNS = ("registers", "spilled", "shared", "tensor-core instructions")
HEADER = """# Compiled kernels, Triton {version}

{kernels}, compiled ahead of time for A100 (sm_80) and H100 (sm_90) by
`make compile-table`: those that the launchers choose for the calls in
[tools/compile_cases.py](../tools/compile_cases.py){and_cuda}.
Registers and spilled bytes are per thread. Shared memory is per block, in bytes, at most {a100:,}
on A100 and {h100:,} on H100. Tensor-core instructions are those of the machine code; the number
after the slash counts the dots of the source. The tests fail after a change of a file below or of
the calls, until `make compile-table` writes this page again.

Compiled by Triton {version}{and_nvcc}.
[{other}]({other}) has the kernels of
Triton {of_other}.
"""

# Launches, their cache files and the capability: global, so that forked processes have them.
_work: tuple[list[Any], list[Path], int]


@dataclass(frozen=True)
class Line:
    """One row of the table: a configuration of a kernel.

    dots: matrix products in the source. numbers: for each capability the registers, spilled bytes,
    bytes of shared memory and tensor-core instructions.
    """

    kernel: str
    configuration: str
    types: str
    threads: int
    dots: int
    numbers: dict[int, tuple[int, int, int, int]]


def digest(path: Path) -> str:
    """Return the digest of a file; that of a Python file ignores docstrings and comments."""
    text = path.read_text()
    return hashlib.sha256((_code(text) if path.suffix == ".py" else text).encode()).hexdigest()[:16]


def _code(text: str) -> str:
    """Return the lines of Python without docstrings, comments, imports and empty lines."""
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(text)):
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, ast.stmt) and (docstring or isinstance(node, ast.Import | ast.ImportFrom)):
            first, last = node.lineno - 1, node.end_lineno or node.lineno
            lines[first:last] = [""] * (last - first)
    return "\n".join(line.rstrip() for line in lines if line.strip())


def source_files(root: Path = ROOT, *, cuda: bool = True) -> list[Path]:
    """Return the files on which the table depends: kernels, their constants, and the calls."""
    kernels = root / "kernels" / "fastmtl_kernels"
    triton = [path for path in kernels.rglob("*.py") if re.search(r"^import triton$", path.read_text(), re.MULTILINE)]
    also = [kernels / "varlen_attention" / "plan.py", root / "tools" / "compile_cases.py"]
    of_cuda = [path for kind in ("*.cu", "*.cuh", "tensor_table.h") for path in (root / "csrc").glob(kind)]
    return sorted([*triton, *also, *(of_cuda if cuda else [])])


def read(text: str) -> tuple[dict[str, str], dict[str, list[Line]]]:
    """Parse a page: return the digest of each source file, and the lines of each kernels' file."""
    digests = dict(re.findall(r"^\| `([^`]+)` \| `([0-9a-f]{16})` \|$", text, re.MULTILINE))
    sections = {}
    for section in text.split("\n## `")[1:]:
        lines = [_read_line(row) for row in re.findall(r"^\| `\w+` \|.*\d \|$", section, re.MULTILINE)]
        sections[section.partition("`")[0]] = lines
    return digests, sections


def _read_line(row: str) -> Line:
    kernel, configuration, types, threads, *cells = (cell.strip() for cell in row.strip("|").split("|"))
    numbers, dots = {}, 0
    for n, capability in enumerate(CAPABILITIES):
        registers, spilled, shared, tensor_core = cells[4 * n : 4 * n + 4]
        used, _, dots_of_source = tensor_core.partition(" / ")
        dots = int(dots_of_source or 0)
        numbers[capability] = int(registers), int(spilled), int(shared), int(used)
    return Line(kernel.strip("`"), configuration, types, int(threads), dots, numbers)


def stale(digests: dict[str, str], root: Path = ROOT, *, cuda: bool = True) -> list[str]:
    """Return the source files that were changed, added or removed after the table was made."""
    now = {path.relative_to(root).as_posix(): digest(path) for path in source_files(root, cuda=cuda)}
    return sorted(name for name in now.keys() | digests.keys() if now.get(name) != digests.get(name))


def page(digests: dict[str, str], sections: dict[str, list[Line]], version: str, *, older: bool) -> str:
    """Return the text of the page. version: Triton's. older: the page for the older Triton."""
    names = {"a100": SHARED[80], "h100": SHARED[90], "version": version}
    if older:
        names |= {"kernels": "Triton's kernels", "and_cuda": "", "and_nvcc": ""}
        names |= {"other": TABLE.name, "of_other": "as pip installs it, and those of CUDA"}
    else:
        names |= {"kernels": "Every kernel", "and_cuda": ", and for CUDA all of `csrc/`", "and_nvcc": " and nvcc"}
        names |= {"other": OLDER.name, "of_other": f"{OLDEST}, which torch 2.11 brings"}
    text = [HEADER.format(**names)]
    for capability in CAPABILITIES:
        spilling = [
            f"- `{line.kernel}` {line.configuration}, {line.types}: {line.numbers[capability][1]} bytes\n"
            for lines in sections.values()
            for line in lines
            if line.numbers[capability][1]
        ]
        text.append(f"On sm_{capability} {len(spilling) or 'no'} configurations spill.\n")
        if spilling:
            text.append("".join(spilling))
    cells = ["kernel", "configuration", "types", "threads"]
    cells += [f"sm_{capability}: {name}" for capability in CAPABILITIES for name in COLUMNS]
    for section, lines in sections.items():
        rows = [_row(cells), _row(["---"] * 3 + ["---:"] * (len(cells) - 3)), *map(_row_of, lines)]
        text.append(f"## `{section}`\n\n" + "".join(rows))
    rows = [_row(["file", "digest"]), _row(["---"] * 2)]
    rows += [_row([f"`{name}`", f"`{value}`"]) for name, value in digests.items()]
    text.append("## What it was made from\n\n" + "".join(rows))
    return "\n".join(text)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def _row_of(line: Line) -> str:
    cells = [f"`{line.kernel}`", line.configuration, line.types, str(line.threads)]
    for registers, spilled, shared, tensor_core in line.numbers.values():
        cells += [str(registers), str(spilled), str(shared)]
        cells.append(f"{tensor_core} / {line.dots}" if line.dots else str(tensor_core))
    return _row(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile (2)")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "compile-table")
    parser.add_argument("--older", action="store_true", help=f"write {OLDER.relative_to(ROOT)}, without CUDA's kernels")
    arguments = parser.parse_args()
    begun, older = time.monotonic(), arguments.older
    version = importlib.metadata.version("triton")
    if older != version.startswith(f"{OLDEST}."):
        raise SystemExit(f"compile-table: Triton {version} is installed; --older is for {OLDEST}, and for it alone")
    digests = {path.relative_to(ROOT).as_posix(): digest(path) for path in source_files(cuda=not older)}
    old = read(TABLE.read_text()) if TABLE.exists() else ({}, {})
    of_triton = triton_sections(arguments.cache, arguments.jobs)
    sections = of_triton if older else cuda_sections(digests, *old) | of_triton
    written = OLDER if older else TABLE
    written.write_text(page(digests, sections, version, older=older))
    count = sum(map(len, sections.values()))
    print(f"{count} configurations in {written.relative_to(ROOT)}, {time.monotonic() - begun:.0f} s")


def triton_sections(cache: Path, jobs: int) -> dict[str, list[Line]]:
    """Compile the Triton kernels and return the table's lines for each file of kernels."""
    import compile_cases
    import triton_aot

    launches = {
        capability: triton_aot.launches(lambda: [case() for case in compile_cases.CASES], capability)
        for capability in CAPABILITIES
    }
    cache.mkdir(parents=True, exist_ok=True)
    reports = {capability: list(_reports(of, capability, cache, jobs)) for capability, of in launches.items()}
    files = [f"{launch.kernel.__module__.replace('.', '/')}.py" for launch in launches[CAPABILITIES[0]]]
    sections: dict[str, list[Line]] = {}
    for file, *of_capabilities in zip(files, *reports.values(), strict=True):
        lines = sections.setdefault(f"kernels/{file}", [])
        lines.append(_line(dict(zip(CAPABILITIES, of_capabilities, strict=True))))
    return {file: _shortened(lines) for file, lines in sorted(sections.items())}


def _reports(launches: list[Any], capability: int, cache: Path, jobs: int) -> Iterator[dict[str, Any]]:
    """Yield the result of triton_aot.describe for each launch, in order; compile missing ones."""
    import triton

    paths = [
        cache / (hashlib.sha256(f"{triton.__version__} {capability} {launch.digest}".encode()).hexdigest() + ".json")
        for launch in launches
    ]
    missing = [n for n, path in enumerate(paths) if not path.exists()]
    # Forked children share the launches and their tensors.
    context = multiprocessing.get_context("fork")
    global _work
    _work = launches, paths, capability
    with tempfile.TemporaryDirectory() as folder, context.Pool(jobs, _begin, (folder,)) as pool:
        for n, _ in enumerate(pool.imap_unordered(_compile, missing), 1):
            if n % 50 == 0 or n == len(missing):
                print(f"sm_{capability}: {n} of {len(missing)} compiled", flush=True)
    for path in paths:
        yield json.loads(path.read_text())


def _begin(folder: str) -> None:
    import triton

    triton.knobs.cache.dir = folder


def _compile(n: int) -> None:
    import triton_aot

    launches, paths, capability = _work
    report = triton_aot.describe(launches[n].compile(capability))
    report["instructions"] = {
        name: count for name, count in report["instructions"].items() if name.startswith(("HMMA", "HGMMA"))
    }
    partial = paths[n].with_suffix(".partial")
    partial.write_text(json.dumps(report, default=str))
    partial.replace(paths[n])


def _line(reports: dict[int, dict[str, Any]]) -> Line:
    report = reports[CAPABILITIES[0]]
    parts = []
    for name, value in report["constants"].items():
        if value is True:
            parts.append(name)
        elif value not in (None, False):
            parts.append(f"{name}={value}")
    if report["dots"]:
        parts.append(f"stages={report['stages']}")
    pointers = json.dumps(list(report["signature"].values()))
    types = dict.fromkeys(re.findall(r"\*(fp32|bf16|fp16)\b", pointers))
    numbers = {
        capability: (of["registers"], of["spilled"], of["shared"], sum(of["instructions"].values()))
        for capability, of in reports.items()
    }
    signature = " ".join(f"{name}:{kind}" for name, kind in report["signature"].items())
    configuration = f"{' '.join(parts)} [{signature}]"
    return Line(report["name"], configuration, " ".join(types), 32 * report["warps"], report["dots"], numbers)


def _shortened(lines: list[Line]) -> list[Line]:
    """Keep only those types of arguments, in brackets, that distinguish a line from another."""
    split = [re.fullmatch(r"(.*) \[(.*)\]", line.configuration) for line in lines]
    short = [(line.kernel, line.types, match[1]) for line, match in zip(lines, split, strict=True) if match]
    kinds = [set(match[2].split()) for match in split if match]
    short_lines = []
    for n, line in enumerate(lines):
        others = [kinds[m] for m, name in enumerate(short) if name == short[n] and m != n]
        differing = sorted(kind for kind in kinds[n] if any(kind not in other for other in others))
        configuration = " ".join([short[n][2], *differing])
        short_lines.append(Line(line.kernel, configuration, line.types, line.threads, line.dots, line.numbers))
    return sorted(short_lines, key=lambda line: (line.kernel, line.types, _natural(line.configuration)))


def _natural(text: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", text)]


def cuda_sections(
    digests: dict[str, str], old_digests: dict[str, str], old_sections: dict[str, list[Line]]
) -> dict[str, list[Line]]:
    """Compile the CUDA kernels; without nvcc, return the old page's lines if csrc is unchanged."""
    import nvcc_aot

    reason = nvcc_aot.why_no_nvcc()
    if reason:
        if any(value != old_digests.get(name) for name, value in digests.items() if name.startswith("csrc/")):
            raise SystemExit(f"compile-table: the CUDA files of csrc changed, and here is {reason} to compile them")
        return {name: lines for name, lines in old_sections.items() if name.startswith("csrc/")}
    sections = {}
    for source in nvcc_aot.sources():
        of = {capability: nvcc_aot.compile_source(source, capability) for capability in CAPABILITIES}
        lines = [
            _cuda_line(name, {capability: found[name] for capability, found in of.items()})
            for name in of[CAPABILITIES[0]]
        ]
        sections[source.relative_to(ROOT).as_posix()] = sorted(
            lines, key=lambda line: (line.kernel, line.configuration)
        )
    return sections


def _cuda_line(mangled: str, of_capabilities: dict[int, dict[str, int]]) -> Line:
    """Return the line of a CUDA kernel. mangled: a name whose template arguments are numbers."""
    (kernel, arguments) = re.findall(r"\d([a-z_]+_kernel)((?:I(?:Li\d+E)+)?)", mangled)[0]
    configuration = " ".join(re.findall(r"Li(\d+)E", arguments))
    (threads,) = re.findall(r"kThreads = (\d+);", (ROOT / "csrc" / "gradients_kernels.cuh").read_text())
    numbers = {
        capability: (used["registers"], used["spilled"], used["shared"], 0)
        for capability, used in of_capabilities.items()
    }
    return Line(kernel, configuration, "all", int(threads), 0, numbers)


if __name__ == "__main__":
    main()
