"""The parts of the documents that are generated from the code.

``python tests/promises/generated_text.py`` writes them: the settings and the Parquet columns in
``study/README.md``, and the questions in ``search_spaces/README.md``.
"""

from __future__ import annotations

import ast
import re
import textwrap
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from search_spaces.space import known_names, load_space
from study.config import schema
from study.storage import tables
from study.validation import confirm_table

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "study" / "config"
WIDTH = 118
TABLES = {
    "trials": tables.TRIALS,
    "reports": tables.REPORTS,
    **tables.FINALS,
    confirm_table.CONFIRM: confirm_table.RUNS,
    confirm_table.CONFIRMED: confirm_table.VERDICTS,
}
TERM_PREFIXES = (tables.LOSS, tables.WEIGHT, tables.GRADIENT_SHARE, tables.GRADIENT_COSINE)
FIGURES = {column.name: column.meaning for column in tables.AVERAGE_PRECISION}


def settings_text() -> str:
    """Return all settings with defaults and meanings, one list per class of the schema."""
    meanings = field_docstrings()
    defaults = _values(CONFIG / "study.yaml")
    blocks = []
    for owner, sections in _sections().items():
        lines = [
            _setting(name, sections, defaults, meanings.get((owner.__name__, name), ""))
            for name in _settings_of(owner)
        ]
        titles = ", ".join(f"`{section.rstrip('.')}`" for section in sections if section)
        summary = (owner.__doc__ or "").split("\n\n")[0]
        if lines:
            blocks += [f"### {titles or 'The study'}", _wrapped(_plain(summary)), "\n".join(lines)]
    blocks += ["### Values of data sets and plans", _group_values(defaults)]
    return "\n\n".join(blocks)


def columns_text() -> str:
    """Return the columns of every Parquet table with types and meanings."""
    blocks = []
    for name, columns in TABLES.items():
        rows = list(_column_rows(columns))
        note = []
        if name in (tables.JOINTS, tables.CURVES):
            rows = rows[len(tables.FINALIST) :]
            note = [f"After the first {len(tables.FINALIST)} columns of `final`:"]
        if name == "trials":
            rows.append((f"`{tables.PARAMS}<setting>`", "", "its value; null if it was not drawn"))
        blocks += [f"#### `{name}`", *note, _table(("column", "type", "meaning"), rows)]
    for title, names in (("term", tables.TERMS), ("figure", FIGURES)):
        rows = [(f"`{name}`", meaning) for name, meaning in names.items()]
        blocks += [f"#### Each `<{title}>`", _table((title, "meaning"), rows)]
    return "\n\n".join(blocks)


def spaces_text() -> str:
    """Return the name and the question of every search space."""
    rows = [(f"`{name}`", load_space(name).question) for name in known_names()]
    return _table(("name", "question"), rows)


PARTS: Mapping[str, tuple[str, Callable[[], str]]] = {
    "settings": ("study/README.md", settings_text),
    "columns": ("study/README.md", columns_text),
    "spaces": ("search_spaces/README.md", spaces_text),
}
"""By the name in the markers: the document, and the function that makes the text."""


def with_part(document: str, part: str, text: str) -> str:
    """Return the document with this text between the part's markers."""
    begin, end = f"<!-- generated: {part} -->\n", "<!-- end -->"
    before, rest = document.split(begin)
    return f"{before}{begin}\n{text}\n\n{end}{rest.split(end, 1)[1]}"


def all_settings() -> set[str]:
    """Return the path of every setting."""
    return {
        f"{section}{name}"
        for owner, sections in _sections().items()
        for section in sections
        for name in _settings_of(owner)
    }


def field_docstrings() -> dict[tuple[str, str], str]:
    """Return the docstring under each field of the schema, by class and field."""
    found = {}
    for node in ast.parse((CONFIG / "schema.py").read_text()).body:
        below = node.body[1:] if isinstance(node, ast.ClassDef) else []
        for field, text in zip(node.body if below else [], below, strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                found[node.name, ast.unparse(field.target)] = ast.literal_eval(text.value)
    return found


def _sections() -> dict[type, list[str]]:
    """Return the prefixes of the paths of each class's fields, with a dot at the end."""
    found: dict[type, list[str]] = {}

    def visit(config: type, prefix: str) -> None:
        for owner in reversed(config.__mro__[:-1]):
            found.setdefault(owner, []).append(prefix)
        for name, kind in typing.get_type_hints(config).items():
            if _is_section(kind):
                visit(kind, f"{prefix}{name}.")

    visit(schema.StudyConfig, "")
    return found


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and kind.__module__ == schema.__name__


def _settings_of(owner: type) -> list[str]:
    """Return the fields that the class itself declares, without its sections."""
    kinds = typing.get_type_hints(owner)
    return [name for name in owner.__annotations__ if not _is_section(kinds[name])]


def _setting(name: str, sections: Sequence[str], defaults: Mapping[str, str], meaning: str) -> str:
    shown = [_default(defaults.get(f"{section}{name}")) for section in sections]
    if len(set(shown)) > 1:
        shown = [
            f"{section.split('.')[0]}: {value}"
            for section, value in zip(sections, shown, strict=True)
        ]
    title = f"{sections[0]}{name}" if len(sections) == 1 else f".{name}"
    return _item(f"`{title}` ({', '.join(dict.fromkeys(shown))})", _plain(meaning))


def _default(value: str | None) -> str:
    if value in (None, "???"):
        return "set by `data`"
    if reference := re.fullmatch(r"\$\{(.*)\}", str(value)):
        return f"as `{reference[1]}`"
    return f"`{value}`"


def _group_values(defaults: Mapping[str, str]) -> str:
    """Return what each file of data/ and plan/ sets that study.yaml has otherwise."""
    lines = []
    for file in sorted((*CONFIG.glob("data/*.yaml"), *CONFIG.glob("plan/*.yaml"))):
        changed = [
            f"`{path}={value}`"
            for path, value in _values(file).items()
            if defaults.get(path, value) not in (value, "???")
        ]
        if changed:
            lines.append(_item(f"`{file.parent.name}={file.stem}`", ", ".join(changed)))
    return "\n".join(lines)


def _values(file: Path) -> dict[str, str]:
    """Return the values in a YAML file by path, as they are written."""

    def flat(node: Any, path: str) -> Iterator[tuple[str, str]]:
        if isinstance(node, dict):
            for name, value in node.items():
                yield from flat(value, f"{path}.{name}".lstrip("."))
        else:
            yield path, f"[{','.join(node)}]" if isinstance(node, list) else node

    content = yaml.load(file.read_text(), yaml.BaseLoader)
    content.pop("defaults", None)
    return dict(flat(content, ""))


def _column_rows(columns: Sequence[tables.Column]) -> Iterator[tuple[str, str, str]]:
    """Yield a row per column; all loss terms share a row, and all figures of AP."""
    names = {column.name for column in columns}
    term, figure = next(iter(tables.TERMS)), next(iter(FIGURES))
    for name, type_, meaning in columns:
        prefix = next((p for p in (*TERM_PREFIXES, tables.VAL) if name.startswith(p)), "")
        rest = name.removeprefix(prefix)
        if prefix in TERM_PREFIXES:
            if rest == term:
                one = meaning.replace(tables.TERMS[term], "term")
                yield f"`{prefix}<term>`", str(type_), one
        elif rest in FIGURES and {f"{prefix}{each}" for each in FIGURES} <= names:
            if rest == figure:
                one = meaning.replace(FIGURES[figure], "figure of AP")
                yield f"`{prefix}<figure>`", str(type_), one
        else:
            yield f"`{name}`", str(type_), meaning


def _item(title: str, text: str) -> str:
    return _wrapped(f"* {title}: {text}".removesuffix(": "), indent="  ")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    cells = ([_plain(cell).replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _plain(text: str) -> str:
    """Return a docstring as one line of Markdown, with nothing that is read as markup."""
    parts = " ".join(text.replace("``", "`").split()).split("`")
    for place in range(0, len(parts), 2):
        parts[place] = re.sub(r"([<*])", r"\\\1", parts[place])
    return "`".join(parts)


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(
        text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def main() -> None:
    for part, (name, make) in PARTS.items():
        document = ROOT / name
        document.write_text(with_part(document.read_text(), part, make()))


if __name__ == "__main__":
    main()
