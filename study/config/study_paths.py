"""The paths of a study's settings, for every process and as the disk spells them."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from study.config.compose import flatten, to_plain, value_at, with_values
from study.config.schema import StudyConfig
from study.config.typed_paths import (
    FROM_HERE,
    IN_ROOT,
    LIST,
    is_path,
    spelled_as_on_disk,
    typed_path,
)
from study.errors import InputError


def with_absolute_paths(config: StudyConfig) -> StudyConfig:
    """Return a copy of the settings with absolute paths; those in ``data.root`` stay relative.

    Ray's workers have other working directories.
    """
    expanded = with_typed_paths(config)
    here = {
        setting: str(Path(value_at(expanded, setting)).absolute())
        for setting in FROM_HERE
        if is_path(setting, value_at(expanded, setting))
    }
    older = [str(Path(path).absolute()) for path in expanded.search.warm_start]
    return with_values(expanded, {**here, LIST: older})


def with_typed_paths(config: StudyConfig) -> StudyConfig:
    """Return a copy of the settings whose paths have no ``~``, and are spelled as on the disk."""
    values: dict[str, Any] = {
        setting: str(typed_path(value_at(config, setting)))
        for setting in FROM_HERE
        if is_path(setting, value_at(config, setting))
    }
    root = Path(values["data.root"])
    for setting in IN_ROOT:
        if is_path(setting, value_at(config, setting)):
            path = typed_path(value_at(config, setting))
            found = spelled_as_on_disk(root / path)
            is_found = path.is_absolute() or found == root / path
            values[setting] = str(path if is_found else os.path.relpath(found, root))
    values[LIST] = [str(typed_path(path)) for path in config.search.warm_start]
    return with_values(config, values)


def check_paths(typed: StudyConfig, absolute: StudyConfig, notify: Callable[[str], None]) -> None:
    """Check that no path is written for Windows; report those that the disk spells otherwise.

    Raises:
        InputError: a path has backslashes between its folders.
    """
    before, after = flatten(to_plain(typed)), flatten(to_plain(absolute))
    if faults := list(_windows_faults(before, Path(absolute.data.root))):
        raise InputError("\n".join(faults))
    for note in _respelled(before, after):
        notify(note)


def _windows_faults(values: Mapping[str, object], root: Path) -> Iterator[str]:
    """Describe paths that are written for Windows: their backslashes separate no folders here.

    Args:
        values: values by config path.
        root: ``data.root``.
    """
    for setting in (*FROM_HERE, *IN_ROOT):
        value = values[setting]
        if not is_path(setting, value) or "\\" not in str(value) or os.sep == "\\":
            continue
        path = typed_path(str(value))
        if not (root / path if setting in IN_ROOT else path).exists():
            yield (
                f"{setting} must be a path of this machine, with / between folders, got "
                f"{setting}={value}, which is written for Windows; change it to the path here"
            )


def _respelled(typed: Mapping[str, object], found: Mapping[str, object]) -> Iterator[str]:
    """Yield a note for each path that the disk spells otherwise than the user.

    Args:
        typed: values by config path, as the user typed them.
        found: the same with the paths that are used.
    """
    for setting in (*FROM_HERE, *IN_ROOT):
        before, after = str(typed[setting]).removeprefix("~"), str(found[setting])
        one, other = (unicodedata.normalize("NFC", text) for text in (before, after))
        if before not in after and one in other:
            yield (
                f"{setting}={typed[setting]} has accented letters that the disk spells otherwise, "
                "as macOS does; the path of that name there is used"
            )
