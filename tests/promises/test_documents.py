"""The documents: links lead somewhere, commands can be typed, generated parts are up to date."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from generated_text import PARTS, all_settings, settings_text, with_part

from study.config.compose import compose

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("models", "search_spaces", "study", "cluster", "tests")
DOCUMENTS = {
    file.relative_to(ROOT).as_posix(): file.read_text("utf-8")
    for file in (ROOT / "README.md", *(f for name in FOLDERS for f in (ROOT / name).rglob("*.md")))
}
CHANGES = "study/CHANGES.md"
"""It names what no longer exists."""
LONGEST_LINE, LONGEST_CELL, LONGEST_README = 120, 115, 200
CODE_BLOCK = re.compile(r"^( *)```.*?^\1```$", re.M | re.S)
SECTIONS = "data|teacher|student|distill|refine|plan|search|confirm|trial"
SETTING = re.compile(rf"(?:{SECTIONS})\.(?!py\b)[a-z_.0-9]+")
FILE = re.compile(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./-]*")
BANNED = re.compile(
    r"""\b(
    besides | anew | whence | mend(s|ed|ing)? | so\ many | as\ (it|they)\ comes? | rooms?
    | at\ a\ look | hangs?\ together | worth\ (its|their)\ while | (of|by|in)\ (which|whom)
    | says? | said | saying | tells? | told | telling | asks? | asked | asking | taught | heard
    | teacher's\ word | goes?\ on | went\ on | broken\ off | looks?\ at | looked\ at | pictures?
    | (or|,)\ else
    )\b""",
    re.I | re.X,
)


def prose(text: str) -> str:
    """Return the text without code and the targets of links."""
    text = CODE_BLOCK.sub("", text)
    return re.sub(r"`[^`]*`|\]\([^)]*\)|<!--.*?-->", " ", text, flags=re.S)


def in_backticks() -> Iterator[tuple[str, str]]:
    for name, text in DOCUMENTS.items():
        for code in re.findall(r"`([^`]+)`", CODE_BLOCK.sub("", text)):
            yield name, " ".join(code.split())


def commands() -> Iterator[list[str]]:
    """Yield the words of every command line in a shell block."""
    for text in DOCUMENTS.values():
        for block in re.findall(r"^ *```sh\n(.*?)^ *```$", text, re.M | re.S):
            for line in block.replace("\\\n", " ").splitlines():
                yield shlex.split(line, comments=True)


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives to the headings."""
    headings = re.findall(r"^#+ (.*)$", CODE_BLOCK.sub("", text), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings}


def test_generated_parts_are_up_to_date() -> None:
    old = [
        part
        for part, (name, make) in PARTS.items()
        if with_part(DOCUMENTS[name], part, make()) != DOCUMENTS[name]
    ]
    assert old == [], "run python tests/promises/generated_text.py"


def test_relative_links_lead_somewhere() -> None:
    dead = []
    for name, text in DOCUMENTS.items():
        for link in re.findall(r"\]\(([^)]+)\)", CODE_BLOCK.sub("", text)):
            target, _, anchor = link.partition("#")
            if target.startswith(("http:", "https:")):
                continue
            file = (ROOT / name).parent / target if target else ROOT / name
            if not file.exists() or (anchor and anchor not in anchors(file.read_text("utf-8"))):
                dead.append(f"{name}: {link}")
    assert dead == []


def test_named_files_exist() -> None:
    missing = [
        f"{name}: {path}"
        for name, text in DOCUMENTS.items()
        for path in FILE.findall(text)
        if name != CHANGES and not (ROOT / path.rstrip(".")).exists()
    ]
    assert missing == []


def test_named_settings_exist() -> None:
    known = all_settings()
    sections = {path[:end] for path in known for end in range(len(path)) if path[end] == "."}
    wrong = [
        f"{name}: {code}"
        for name, code in in_backticks()
        if name != CHANGES and (found := SETTING.match(code))
        if found[0].rstrip(".") not in known | sections
    ]
    assert wrong == []


def test_every_setting_has_a_meaning() -> None:
    silent = re.findall(r"^\* `([\w.]+)` \([^:]*\)$", settings_text(), re.M)
    assert silent == []


def test_commands_have_possible_settings() -> None:
    found = [words for words in commands() if "study/tune.py" in words]
    assert len(found) > 8
    for words in found:
        settings = words[words.index("study/tune.py") + 1 :]
        spaces = [s for s in settings if s.startswith("search_space=") and s.endswith(".yaml")]
        compose([setting for setting in settings if setting not in spaces])


def test_readme_is_short() -> None:
    assert len(DOCUMENTS["README.md"].splitlines()) <= LONGEST_README


@pytest.mark.parametrize("name", sorted(DOCUMENTS))
def test_lines_and_cells_are_short(name: str) -> None:
    lines = CODE_BLOCK.sub("", DOCUMENTS[name]).splitlines()
    cells = [
        cell.strip()
        for line in lines
        if line.startswith("|")
        for cell in re.split(r"(?<!\\)\|", line)
    ]
    assert [line for line in lines if len(line) > LONGEST_LINE and line[0] != "|"] == []
    assert [cell for cell in cells if len(cell) > LONGEST_CELL] == []


@pytest.mark.parametrize("name", sorted(DOCUMENTS))
def test_words_are_plain(name: str) -> None:
    assert [found[0] for found in BANNED.finditer(prose(DOCUMENTS[name]))] == []


def test_every_benchmark_has_a_row() -> None:
    folder = ROOT / "tests" / "benchmarks"
    rows = re.findall(r"^\| `(\w+\.py)`", DOCUMENTS["tests/benchmarks/README.md"], re.M)
    scripts = {file.name for file in folder.glob("*.py")} - {"benchmark.py"}
    assert rows == sorted(scripts)
