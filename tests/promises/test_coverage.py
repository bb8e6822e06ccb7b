"""Each module is exercised by a test that runs by default."""

from __future__ import annotations

import ast

from source_code import SOURCES, TESTS, module_of

WHOLE_STUDY = {"study.launch.ray_train", "study.tune"}
"""Modules that run under Ray alone: in the fast suite, test_whole_study.py is their only test."""
CONFTEST = TESTS["tests/conftest.py"]


def defined(tree: ast.Module) -> dict[str, ast.stmt]:
    """Statements at the top of a file by the names that they define or import."""
    found: dict[str, ast.stmt] = {}
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name.split(".")[0]: node for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]
            found |= dict.fromkeys(names, node)
    return found


def is_slow(node: ast.AST) -> bool:
    return "mark.slow" in ast.unparse(node)


def fast_tests(tree: ast.Module) -> list[ast.FunctionDef]:
    """Return test functions with at least one case that runs by default."""
    marks = defined(tree).get("pytestmark")
    if marks and is_slow(marks):
        return []
    tests = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return [
        node
        for node in tests
        if node.name.startswith("test_")
        and not any(ast.unparse(mark) == "pytest.mark.slow" for mark in node.decorator_list)
    ]


def used_names(node: ast.AST) -> set[str]:
    names = {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
    return names | {inner.arg for inner in ast.walk(node) if isinstance(inner, ast.arg)}


def modules_named(node: ast.stmt, names: set[str] | None = None) -> set[str]:
    """Modules that an import names, and imported names, which may be modules.

    Args:
        names: those of the bound names that count; None for all.
    """
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    assert isinstance(node, ast.ImportFrom) and node.module
    counted = [a for a in node.names if names is None or (a.asname or a.name) in names]
    return {node.module, *(f"{node.module}.{alias.name}" for alias in counted)}


def modules_used(tree: ast.Module) -> set[str]:
    """Return the modules that a file's fast tests use, directly or in helpers and fixtures."""
    scope = {**defined(CONFTEST), **defined(tree)}
    to_visit: list[ast.stmt] = list(fast_tests(tree))
    seen: set[str] = set()
    found: set[str] = set()
    while to_visit:
        node = to_visit.pop()
        new = used_names(node) & scope.keys() - seen
        seen |= new
        for inner in ast.walk(node):
            if isinstance(inner, ast.Import | ast.ImportFrom):
                found |= modules_named(inner)
        for name in new:
            if isinstance(scope[name], ast.Import | ast.ImportFrom):
                found |= modules_named(scope[name], {name})
            else:
                to_visit.append(scope[name])
    return found


def test_every_module_is_used_by_a_fast_test() -> None:
    modules = {module_of(file) for file in SOURCES if not file.endswith("__init__.py")}
    used = set().union(*(modules_used(tree) for tree in TESTS.values()))
    assert modules - used - WHOLE_STUDY == set()
    assert WHOLE_STUDY <= modules - used
