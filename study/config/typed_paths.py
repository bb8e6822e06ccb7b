"""Paths as people type them: ``~``, characters that need quotes, and the spelling on the disk."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

from study.config.schema import JITTER, RANDOM, STUDENT, DataConfig

LIST = "search.warm_start"
"""The setting that holds a list of paths."""
IN_ROOT = (
    "data.train.annotations",
    "data.train.images",
    "data.val.annotations",
    "data.val.images",
    "data.val.detections",
)
"""Settings that hold a path relative to ``data.root``."""
FROM_HERE = (
    "storage",
    "data.root",
    "data.store",
    "data.skeleton",
    "teacher.skeleton",
    "teacher.init",
    "student.init",
    "refine.start",
    "search_space",
)
"""Settings that hold a path relative to the working directory, or another word."""
YAML_OR_NAME = ("search_space", "data.skeleton", "teacher.skeleton")
"""Settings of a name, or of the path of a YAML file."""
WORDS = {
    "teacher.init": (RANDOM,),
    "student.init": (RANDOM,),
    "refine.start": (STUDENT, JITTER),
}
"""Values of these settings that are no path."""


def typed_path(text: str) -> Path:
    """Return the path that a user typed, with ``~`` replaced, in the spelling of the disk."""
    path = Path(text)
    try:
        path = path.expanduser()
    except RuntimeError:  # ~name of an unknown user, or no home: it may be a file's own name
        pass
    return spelled_as_on_disk(path)


def spelled_as_on_disk(path: Path) -> Path:
    """Return an existing path in the spelling of the disk, any other unchanged.

    Unicode has two spellings of an accented letter. macOS writes one, most keyboards the other,
    and Linux takes them for two names.
    """
    if str(path).isascii() or path.exists():
        return path
    found = Path(path.anchor)
    for part in path.parts[1:] if path.anchor else path.parts:
        if not part.isascii() and not (found / part).exists():
            part = _same_name(found, part)
        found /= part
    return found


def _same_name(folder: Path, name: str) -> str:
    """Return the only entry of the folder that is spelled otherwise, or the name itself."""
    try:
        names = os.listdir(folder)
    except OSError:
        return name
    wanted = unicodedata.normalize("NFC", name)
    same = [other for other in names if unicodedata.normalize("NFC", other) == wanted]
    return same[0] if len(same) == 1 else name


def is_path(setting: str, value: object) -> bool:
    """Return whether this value of a setting is a path, not a word or an address."""
    if setting not in (*FROM_HERE, *IN_ROOT) or not isinstance(value, str):
        return False
    if setting in YAML_OR_NAME:
        return value.endswith((".yaml", ".yml"))
    return "://" not in value and value not in WORDS.get(setting, ())


def quoted_path(override: str) -> str:
    """Return ``key=value`` with the value in quotes, if the key is that of a path.

    A value in quotes already, or an interpolation, is left as it is.
    """
    setting, equals, text = override.partition("=")
    if setting == LIST and text.startswith("[") and text.endswith("]"):
        parts = [part.strip() for part in text[1:-1].split(",")]
        return f"{setting}=[{','.join(map(_quoted, parts))}]"
    return f"{setting}={_quoted(text)}" if equals and is_path(setting, text) else override


def _quoted(text: str) -> str:
    if text[:1] in ("'", '"') or "${" in text or "\n" in text:
        return text
    escaped = text.replace("'", "\\'")
    return f"'{escaped}'"


def needs_root(data: DataConfig) -> bool:
    """Return whether a file or folder of the data is given relative to ``data.root``."""
    splits = (data.train, data.val)
    paths = [path for split in splits for path in (split.annotations, split.images)]
    return not all(Path(path).is_absolute() for path in (*paths, data.val.detections or "/"))
