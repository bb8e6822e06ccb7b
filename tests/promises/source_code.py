"""The project's own files, parsed, for the tests that hold them to rules."""

from __future__ import annotations

import ast
import functools
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("models", "search_spaces", "study")
SOURCES = {
    file.relative_to(ROOT).as_posix(): ast.parse(file.read_text())
    for package in PACKAGES
    for file in sorted((ROOT / package).rglob("*.py"))
}
TESTS = {
    file.relative_to(ROOT).as_posix(): ast.parse(file.read_text())
    for file in sorted((ROOT / "tests").rglob("*.py"))
}
SETTINGS = [
    file.relative_to(ROOT).as_posix()
    for package in PACKAGES
    for file in sorted((ROOT / package).rglob("*.yaml"))
]


def module_of(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(tree: ast.AST) -> set[str]:
    """Imported modules, and imported names, which may be modules; those in functions included."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@functools.cache
def imported_files(file: str) -> set[str]:
    """Files of the three packages that a file of them imports."""
    named = (f"{module.replace('.', '/')}.py" for module in imports(SOURCES[file]))
    return {name for name in named if name in SOURCES}


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Calls with the last part of the called name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func
            if isinstance(name, ast.Attribute | ast.Name):
                yield (name.attr if isinstance(name, ast.Attribute) else name.id), node


@functools.cache
def tokens(file: str) -> list[tokenize.TokenInfo]:
    text = (ROOT / file).read_text()
    return list(tokenize.generate_tokens(io.StringIO(text).readline))


def docstrings(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Name and docstring of the module, its classes and its functions, where they have one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            name = "module" if isinstance(node, ast.Module) else node.name
            if text := ast.get_docstring(node):
                yield name, text
