"""What is wrong with a ``key=value`` of the command line, said by the names its user typed.

Hydra and OmegaConf tell it in words of their own, of structs, nodes and lexers. Here a schema is
the type of every setting, and of every section of settings, by config path.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException, ValidationError

TYPES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list[str]: "a list of words, [a,b]",
    float | None: "a number, or null",
    str | None: "text, or null",
    tuple[int, int]: "two whole numbers, [height,width]",
    tuple[int, int] | None: "two whole numbers, [height,width], or null",
}


def fault_in(
    text: str, schema: Mapping[str, Any], groups: Mapping[str, Sequence[str]]
) -> str | None:
    """What keeps this from being one setting with one value; None where nothing does.

    Args:
        groups: the names that a group, such as ``data``, may be given.
    """
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException:
        override = None
    if override is None or not _is_plain(override):
        return (
            f"a setting must be written key=value, got {text!r}; a value that holds spaces, "
            "commas, brackets or signs needs quotes in quotes: \"data.root='/my data'\""
        )
    key = override.key_or_group
    if override.is_sweep_override():
        return (
            f"{key} must have one value, got {text!r}; a list is written [1,2], and what a study "
            "varies is named by search_space"
        )
    value = override.value()
    if key in groups and not isinstance(value, dict):
        return _fault_in_choice(key, value, groups[key])
    return None if key in schema else unknown(key, schema)


def explain(
    error: HydraException | OmegaConfBaseException, schema: Mapping[str, Any], key: str = ""
) -> str:
    """What Hydra or OmegaConf found wrong, with the name of the setting where it is known.

    Args:
        key: the setting, where the error does not know it.
    """
    cause = error.__cause__ if isinstance(error, HydraException) and error.__cause__ else error
    found = next((line.strip() for line in str(cause).splitlines() if line.strip()), repr(cause))
    key = key or str(getattr(cause, "full_key", None) or "").partition("[")[0]
    if not key:
        return found
    if key not in schema:
        return unknown(key, schema)
    if "missing mandatory value" in found.lower():
        return f"{key} must have a value, got none; add {key}=..."
    wanted = TYPES.get(schema[key]) if isinstance(cause, ValidationError) else None
    if found.endswith("is not Optional"):
        found = "got null"
    return f"{key} must be {wanted}: {found}" if wanted else f"{key}: {found}"


def _is_plain(override: Override) -> bool:
    """Whether this is ``key=value``, without Hydra's signs for adding, deleting and packages."""
    is_change = override.type == OverrideType.CHANGE
    return is_change and not override.package and bool(override.key_or_group)


def _fault_in_choice(key: str, value: object, names: Sequence[str]) -> str | None:
    if value in names:
        return None
    near = difflib.get_close_matches(str(value), names, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{key} must be one of {', '.join(names)}, got {key}={value}{hint}"


def unknown(key: str, schema: Mapping[str, Any]) -> str:
    """That no setting has this name, and which one may have been meant."""
    paths = [path for path, kind in schema.items() if not is_dataclass(kind)]
    near = [path for path in paths if path.endswith(f".{key}")]
    near = near or difflib.get_close_matches(key, paths, n=1)
    hint = f"did you mean {' or '.join(near)}?" if near else "--cfg lists all settings"
    return f"unknown setting {key}; {hint}"
