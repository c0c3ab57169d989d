"""Imports go downwards: an order of the folders, no circles between modules.

Imports for type checkers and imports in functions count like all others. Modules that are named in
strings (`importlib.import_module`) do not count.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the bottom to the top. A folder imports from itself and from the lines above its own.
LAYERS = (
    ("fastmtl_kernels",),
    ("fastmtl.errors", "fastmtl.version"),
    ("fastmtl.files", "fastmtl.pages", "fastmtl.system", "fastmtl.recipes"),
    ("fastmtl.config", "fastmtl.measure"),
    ("fastmtl.data", "fastmtl.surgery", "fastmtl.tracking"),
    ("fastmtl.model", "fastmtl.integrations"),
    ("fastmtl.cuda_graphs",),
    ("fastmtl.engine", "fastmtl.inference"),
    ("fastmtl.training",),
    ("fastmtl.report",),
    ("fastmtl.loop", "fastmtl.bench", "fastmtl.profile", "fastmtl.serving", "fastmtl.sweep"),
    ("fastmtl.reproduce",),
    ("fastmtl.commands", "fastmtl.from_python"),
    ("fastmtl", "fastmtl.cli"),
)
# The order may change; these may not.
FORBIDDEN = {
    "fastmtl_kernels": ("fastmtl",),
    "fastmtl.model": ("fastmtl.cuda_graphs", "fastmtl.engine", "fastmtl.cli", "fastmtl.commands"),
    "fastmtl.surgery": ("fastmtl.cuda_graphs", "fastmtl.engine", "fastmtl.cli", "fastmtl.commands"),
}

Graph = dict[str, dict[str, str]]  # module -> imported module -> kind: "normal", "type-only" or "late"


def read_graph(*bases: Path) -> Graph:
    """Return the imports between the modules in the packages of `bases`."""
    files = {module_name(path, base): path for base in bases for path in sorted(base.glob("fastmtl*/**/*.py"))}
    return {name: dict(imports(ast.parse(path.read_bytes()), name, files)) for name, path in files.items()}


def module_name(path: Path, base: Path) -> str:
    parts = path.relative_to(base).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(node: ast.AST, module: str, known: Iterable[str], kind: str = "normal") -> Iterator[tuple[str, str]]:
    """Yield the modules of `known` that `node` imports, with the kind of the import."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            targets = [alias.name for alias in child.names]
        elif isinstance(child, ast.ImportFrom):
            assert not child.level, f"{module}, line {child.lineno}: use an absolute import"
            names = [f"{child.module}.{alias.name}" for alias in child.names]
            targets = [name if name in known else str(child.module) for name in names]
        else:
            inner = kind
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                inner = "late"
            elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
                inner = "type-only"
            yield from imports(child, module, known, inner)
            continue
        yield from ((target, kind) for target in targets if target in known and target != module)


def circles(graph: Graph) -> set[frozenset[str]]:
    """Return the strongly connected components of two modules or more (Tarjan 1972)."""
    found: set[frozenset[str]] = set()
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []

    def visit(module: str) -> None:
        order[module] = lowest[module] = len(order)
        stack.append(module)
        for target in graph[module]:
            if target not in order:
                visit(target)
            if target in stack:
                lowest[module] = min(lowest[module], lowest[target])
        if lowest[module] == order[module]:
            first = stack.index(module)
            component = frozenset(stack[first:])
            del stack[first:]
            if len(component) > 1:
                found.add(component)

    for module in graph:
        if module not in order:
            visit(module)
    return found


def folder(module: str) -> str:
    """Return the kernels' package, or the folder or module of `fastmtl` that holds `module`."""
    parts = module.split(".")
    return parts[0] if parts[0] == "fastmtl_kernels" else ".".join(parts[:2])


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def listed(graph: Graph, wrong: Callable[[str, str], bool]) -> list[str]:
    """Return a line for each import that is wrong."""
    return [
        f"{module} -> {target} ({kind})"
        for module, targets in graph.items()
        for target, kind in targets.items()
        if wrong(module, target)
    ]


@cache
def graph() -> Graph:
    return read_graph(ROOT, ROOT / "kernels")


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert [", ".join(sorted(members)) for members in circles(graph())] == []


def test_every_module_can_be_imported_first() -> None:
    """An import runs the packages above a module too; these may not lead back to the importer."""
    whole: Graph = {module: {} for module in graph()}
    for module, targets in graph().items():
        for target in (name for name, kind in targets.items() if kind == "normal"):
            parts = target.split(".")
            names = [".".join(parts[:number]) for number in range(1, len(parts) + 1)]
            outside = [name for name in names if name in whole and not within(module, name)]
            whole[module] |= dict.fromkeys(outside, "normal")
    assert [", ".join(sorted(members)) for members in circles(whole)] == []


def test_every_import_goes_to_a_lower_layer() -> None:
    height = {name: index for index, layer in enumerate(LAYERS) for name in layer}
    assert {folder(module) for module in graph()} == set(height)
    upward = listed(graph(), lambda a, b: folder(a) != folder(b) and height[folder(a)] <= height[folder(b)])
    assert upward == []


@pytest.mark.parametrize("package", FORBIDDEN)
def test_forbidden_imports(package: str) -> None:
    def forbidden(module: str, target: str) -> bool:
        return within(module, package) and any(within(target, other) for other in FORBIDDEN[package])

    assert listed(graph(), forbidden) == []


def test_each_kind_of_import_counts(tmp_path: Path) -> None:
    package = tmp_path / "fastmtl"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "normal.py").write_text("from fastmtl import typed\n")
    (package / "typed.py").write_text("if TYPE_CHECKING:\n    import fastmtl.late\n")
    (package / "late.py").write_text("def f():\n    from fastmtl.normal import g\n")
    (package / "apart.py").write_text("import fastmtl.late\n")
    found = read_graph(tmp_path)
    assert listed(found, lambda *_: True) == [
        "fastmtl.apart -> fastmtl.late (normal)",
        "fastmtl.late -> fastmtl.normal (late)",
        "fastmtl.normal -> fastmtl.typed (normal)",
        "fastmtl.typed -> fastmtl.late (type-only)",
    ]
    assert circles(found) == {frozenset({"fastmtl.late", "fastmtl.normal", "fastmtl.typed"})}
