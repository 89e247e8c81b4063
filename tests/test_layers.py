"""The folders of the package stand in an order, and files import from their own folder and from those below it.

Every import counts: those inside functions, and those for types alone.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "exporter"
# From top to bottom; docs/architecture.md has the same list. Files at the root are the lowest but for `__init__`, which
# opens the package, and `__main__`, which starts the command line.
FOLDERS = (
    "cli", "compare", "pipeline", "publish", "verify", "reference", "plan", "tour", "backends", "runtimes", "tokens",
    "artifact", "merge", "adapters", "families", "inputs", "libraries",
)  # fmt: skip
ROOT = ["errors", "recipe", "units", "version"]


def module_of(file: Path) -> str:
    """The dotted name of a file of the package."""
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES: Mapping[str, Path] = {module_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def imported(file: Path) -> Iterator[tuple[str, int]]:
    """The modules of the package that a file imports, with the lines."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            for name in node.names:
                inner = f"{node.module}.{name.name}"
                yield (inner if inner in FILES else node.module), node.lineno
        elif isinstance(node, ast.Import):
            yield from ((name.name, node.lineno) for name in node.names)


IMPORTS: Mapping[str, list[tuple[str, int]]] = {
    module: [(name, line) for name, line in imported(file) if name.partition(".")[0] == "exporter"]
    for module, file in FILES.items()
}


def height(module: str) -> int:
    """The place of a module from the top; files at the root are the lowest."""
    parts = module.split(".")
    if len(parts) == 1 or parts[1] == "__main__":
        return -1
    return FOLDERS.index(parts[1]) if parts[1] not in ROOT else len(FOLDERS)


def test_the_folders_are_those_of_the_list() -> None:
    assert {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()} == set(FOLDERS)
    assert {path.stem for path in PACKAGE.glob("*.py")} == {"__init__", "__main__", *ROOT}


def test_every_import_is_of_a_file_that_is_there() -> None:
    missing = [f"{module}:{line} imports {name}" for module, names in IMPORTS.items() for name, line in names
               if name not in FILES]  # fmt: skip
    assert not missing


@pytest.mark.parametrize("module", sorted(FILES))
def test_no_file_imports_from_a_folder_above(module: str) -> None:
    upward = [f"line {line} imports {name}" for name, line in IMPORTS[module] if height(name) < height(module)]
    assert not upward


def test_no_import_runs_in_a_circle() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"a circle: {' → '.join((*path[path.index(module) :], module))}"
        if module not in done:
            for name, _ in IMPORTS[module]:
                visit(name, (*path, module))
            done.add(module)

    # The package itself opens its public names on first use, so every file depends on it and it on none of them.
    for module in FILES:
        if module != "exporter":
            visit(module, ())


def test_the_check_sees_an_import_within_a_function_and_one_for_types(tmp_path: Path) -> None:
    file = tmp_path / "file.py"
    file.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from exporter.cli.app import main\n"
        "def late():\n    import exporter.pipeline.export\n    from exporter.verify import gate\n"
    )
    assert [name for name, _ in imported(file) if name.startswith("exporter")] == [
        "exporter.cli.app", "exporter.pipeline.export", "exporter.verify.gate",
    ]  # fmt: skip


def test_the_order_is_that_of_the_docs() -> None:
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = [line.split("`")[1].removesuffix("/") for line in text.splitlines() if line.startswith("| `")]
    assert [row for row in rows if row in FOLDERS] == list(FOLDERS)
