"""The rules of style that a program can check: words, names, docstrings, packing, sizes."""

from __future__ import annotations

import ast
import re
import statistics
import tokenize
from collections.abc import Callable, Iterator

import pytest
from source_code import ROOT, SETTINGS, SOURCES, TESTS, docstrings, imported_files, tokens

FIRST_WORDS = set(
    "What Which Of That Nothing Within With Without Who Whose How Where When As So Those These "
    "Also It If".split()
)
"""Words that open no docstring: a verb or a noun comes first."""

WORDS = re.compile(
    r"""\b(
    besides | anew | whence | mend(s|ed|ing)? | as\ it\ comes | so\ many | worth\ its\ while
    | hangs?\ together | at\ a\ look | broken\ off
    | \w*(colour|neighbour|favour|behaviour)\w* | \w*labell\w+ | grey\w* | \w*centre[ds]?
    | \w*(normal|optim|initial|organ|summar|recogn|penal|visual|general|special)is(e|ation)\w*
    | \w*analys(e|ed|es|ing) | modell(ed|ing) | cancell\w+ | licence\w* | artefact\w*
    | pictures?
    )\b""",
    re.VERBOSE | re.IGNORECASE,
)
"""Words that have a plainer one, and British spelling."""
ON_DISK = {
    "--pictures",
    "asker",
    "box_centre",
    "colour",
    "data.train_pictures",
    "data.val_pictures",
    "distill.augment.colour",
    "neighbours",
    "refine.augment.colour",
    "taught",
}
"""Strings that stay as they are: older studies, exports and command lines have them."""
PATHS = re.compile(r"\S*/pictures\S*|PICTURES\.\.\.|\{\w+\[[^]]*\]\}")
"""Parts of texts that are no words: paths, and an argument that exported model cards name."""

VERBS = set("say says said tell tells told ask asks asked taught heard mend mends mended".split())
"""Parts of names that are no field's word."""
WHOLE_NAMES = {"ground"}
FOREIGN_NAMES = {("study/search/stage.py", "ask"), ("study/search/stage.py", "tell")}
"""Methods of Optuna."""

NEGATION = re.compile(
    r"(it|they|one|this|that|none)\s+((is|are|was|were|can|could|may|must|do|does|has|have)"
    r"(\s+not|not|n't)|(is|are|has|have)\s+(none|no such))(\s+be)?"
)
"""A condition that only negates the docstring's first line."""

SHORT_MODULES = {
    "models/simple_baseline.py": "a published network, like those beside it",
    "study/launch/crop_tasks.py": "the only place outside of trials where crops meet Ray",
}
"""Modules of under 80 lines with a single importer, and the reason that each has."""


def first_words() -> Iterator[str]:
    for file, tree in SOURCES.items():
        for name, text in docstrings(tree):
            first = text.split()[0].strip(".,;:`'\"")
            if first in FIRST_WORDS and not name.startswith("_"):
                yield f"{file}: {name}: {text.splitlines()[0]}"


def words() -> Iterator[str]:
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1)}
    texts = [
        (file, token.start[0], token.string)
        for file in SOURCES
        for token in tokens(file)
        if token.type in kinds and token.string.strip("\"'") not in ON_DISK
    ]
    texts += [(file, 1, (ROOT / file).read_text()) for file in SETTINGS]
    for file, line, text in texts:
        for match in WORDS.finditer(PATHS.sub("", text)):
            at = line + PATHS.sub("", text)[: match.start()].count("\n")
            yield f"{file}:{at}: {match[0]}"


def identifiers() -> Iterator[str]:
    for file in SOURCES:
        names = {token.string for token in tokens(file) if token.type == tokenize.NAME}
        for name in sorted(names):
            parts = set(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower().split("_"))
            if (parts & VERBS or name in WHOLE_NAMES) and (file, name) not in FOREIGN_NAMES:
                yield f"{file}: {name}"


def negations() -> Iterator[str]:
    for file, tree in SOURCES.items():
        for name, text in docstrings(tree):
            raises = text.partition("Raises:\n")[2].partition("\n\n")[0]
            for condition in re.findall(r"^ *\w+: (.*)$", raises, re.MULTILINE):
                clause = re.split(r"[.,;]", condition)[0].strip()
                if NEGATION.fullmatch(clause.lower()):
                    yield f"{file}: {name}: {condition}"


def packing() -> Iterator[str]:
    """Literals that are unpacked where they could have been written out."""
    for file, tree in {**SOURCES, **TESTS}.items():
        for node in ast.walk(tree):
            inner: list[ast.expr] = []
            if isinstance(node, ast.Starred):
                inner = [node.value]
            elif isinstance(node, ast.Dict):
                inner = [
                    value for key, value in zip(node.keys, node.values, strict=True) if not key
                ]
            elif isinstance(node, ast.Call):
                inner = [k.value for k in node.keywords if not k.arg and _has_names(k.value)]
            if any(isinstance(value, ast.Tuple | ast.List | ast.Dict) for value in inner):
                yield f"{file}:{node.lineno}"


def _has_names(value: ast.expr) -> bool:
    """Check that a literal dict could be written as keyword arguments."""
    return isinstance(value, ast.Dict) and all(
        isinstance(key, ast.Constant) and str(key.value).isidentifier() for key in value.keys
    )


def late_imports() -> Iterator[str]:
    for file in (*SOURCES, *TESTS):
        for token in tokens(file):
            if token.type == tokenize.COMMENT and "noqa: E402" in token.string:
                yield f"{file}:{token.start[0]}"


def scraps() -> Iterator[str]:
    for file in SOURCES:
        users = [other for other in SOURCES if file in imported_files(other) - {other}]
        is_short = len((ROOT / file).read_text().splitlines()) < 80
        if is_short and len(users) == 1 and file not in SHORT_MODULES:
            yield f"{file}, imported by {users[0]}"


RULES: list[tuple[str, Callable[[], Iterator[str]]]] = [
    ("docstrings begin with a verb or a noun", first_words),
    ("words are plain and American", words),
    ("names are the field's", identifiers),
    ("Raises: names a condition", negations),
    ("literals are not unpacked", packing),
    ("imports need no exception", late_imports),
    ("short modules have several importers", scraps),
]


@pytest.mark.parametrize(
    "violations", [pytest.param(function, id=rule) for rule, function in RULES]
)
def test_rule_of_style_holds(violations: Callable[[], Iterator[str]]) -> None:
    assert "\n".join(violations()) == ""


def test_modules_have_the_size_of_a_sitting() -> None:
    modules = [file for file in SOURCES if not file.endswith("__init__.py")]
    lines = sorted(len((ROOT / file).read_text().splitlines()) for file in modules)
    assert statistics.median(lines) <= 220
    assert lines[round(0.9 * (len(lines) - 1))] <= 350
    assert lines[-1] <= 500
