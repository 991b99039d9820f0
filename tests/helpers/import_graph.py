"""Who imports whom, read from the sources: imports inside functions and for type checkers count too."""

import ast
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

FOLDERS = {"vllm_s2o": "vllm_s2o", "kernels": "vllm_s2o.kernels", "benchmarks": "benchmarks"}
"""Folders of a checkout, and the packages that they are."""


def modules(root: Path) -> dict[str, Path]:
    """All modules of a checkout by their names."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


def imported(name: str, path: Path, known: Iterable[str]) -> set[str]:
    """What a module imports: modules of `known` by their names, others by their first part, Python's own not at all.

    `from . import a` is an import of `a` alone, where that is a module: packages that only hold it do not count.
    """
    known = set(known)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    beside = {other.removeprefix("benchmarks."): other for other in known if other.startswith("benchmarks.")}
    found = set()

    def add(wanted: str, attribute: str | None = None) -> None:
        if package == "benchmarks":  # its scripts know each other by their names alone
            wanted = beside.get(wanted, wanted)
        for candidate in (f"{wanted}.{attribute}", wanted):
            if candidate in known:
                found.add(candidate)
                return
        first = wanted.partition(".")[0]
        if first in FOLDERS:
            # A folder without an __init__.py is no module: what is imported from it must be one.
            raise LookupError(f"{name} imports {attribute or wanted} from {wanted}, which is not there")
        if first not in sys.stdlib_module_names:
            found.add(first)

    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                add(alias.name)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            wanted = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                add(wanted, alias.name)
    return found - {name}


def graph(root: Path) -> dict[str, set[str]]:
    known = modules(root)
    return {name: imported(name, path, known) for name, path in known.items()}


def circle(edges: Mapping[str, Iterable[str]]) -> list[str] | None:
    """Modules that import each other in a circle, the first one twice; None where there are none."""
    done: set[str] = set()

    def walk(name: str, way: list[str]) -> list[str] | None:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return None
        for other in sorted(edges.get(name, ())):
            if found := walk(other, [*way, name]):
                return found
        done.add(name)
        return None

    return next((found for name in sorted(edges) if (found := walk(name, []))), None)
