"""Composition of the settings from the YAML in ``study/config`` and from overrides."""

from __future__ import annotations

import copy
import difflib
import functools
import importlib.resources
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass, make_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from study.config import checks
from study.config.schema import RENAMED, StudyConfig
from study.config.typed_paths import quoted_path
from study.errors import InputError

MAY_CHANGE = (
    "search.trials",
    "search.concurrent",
    "display",
    "log",
    "plan_only",
    "data.store",
    "confirm.trials",
    "confirm.seeds",
    "trial.timeout_s",
    "trial.launcher",
    "trial.num_workers",
    "trial.cpus",
    "trial.gpus",
    "trial.max_failures",
)
"""Settings that may differ when a study is resumed."""
TYPES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list[str]: "a list of words, [a,b]",
    float | None: "a number, or null",
    int | None: "a whole number, or null",
    str | None: "text, or null",
    tuple[int, int]: "two whole numbers, [height,width]",
    tuple[int, int] | None: "two whole numbers, [height,width], or null",
}


def compose(overrides: Sequence[str] = ()) -> StudyConfig:
    """Compose the settings from the YAML and these ``key=value`` overrides.

    Raises:
        InputError: a key is unknown, or a value has the wrong type or is impossible.
    """
    groups = {group: group_names(group) for group in ("data", "plan")}
    for override in overrides:
        if any("\ud800" <= letter <= "\udfff" for letter in override):
            raise InputError(
                f"a setting must be UTF-8 text, got {override!a}; rename its file or folder"
            )
    overrides = [_readable(_renamed(override)) for override in overrides]
    for override in overrides:
        if fault := fault_in(override, _schema(), groups):
            raise InputError(fault)
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    choices = [o for o in parsed if o.key_or_group in groups and isinstance(o.value(), str)]
    try:
        values = copy.deepcopy(_composed(tuple(str(o.input_line) for o in choices)))
        for override in parsed:
            if override not in choices:
                OmegaConf.update(values, override.key_or_group, override.value(), merge=True)
        return _checked(values)
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(explain(error, _schema())) from None


def _renamed(override: str) -> str:
    """The override with the setting's current path."""
    path, equals, value = override.partition("=")
    return f"{RENAMED.get(path, path)}{equals}{value}"


def _readable(override: str) -> str:
    """The override in quotes, if it is a path with signs that Hydra reads only in quotes."""
    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        return quoted_path(override)
    return override


@functools.cache
def _composed(choices: tuple[str, ...]) -> DictConfig:
    """The schema filled from the YAML of these groups, with references unresolved."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_module("study.config", version_base=None):
        composed = hydra.compose("study", overrides=list(choices))
    filled = OmegaConf.merge(OmegaConf.structured(StudyConfig), composed)
    assert isinstance(filled, DictConfig)
    return filled


def with_values(config: StudyConfig, values: Mapping[str, Any]) -> StudyConfig:
    """Return a copy of the settings with these values, given by config path.

    Raises:
        InputError: a key is unknown, or a value has the wrong type or is impossible.
    """
    changed = copy.deepcopy(config)
    for path, value in values.items():
        section, _, name = path.rpartition(".")
        owner = functools.reduce(getattr, filter(None, section.split(".")), changed)
        setattr(owner, name, _as_typed(path, value))
    return _possible(changed)


def _as_typed(path: str, value: Any) -> Any:
    """Convert the value to the setting's type, for example a whole number to a float.

    OmegaConf converts this setting alone, which is a hundred times faster than all settings.
    """
    kind = _schema().get(path)
    if kind is None or is_dataclass(kind):
        raise InputError(unknown(path, _schema()))
    try:
        alone = OmegaConf.structured(_alone(path))
        alone.value = value
        return OmegaConf.to_object(alone).value  # type: ignore[union-attr]
    except OmegaConfBaseException as error:
        raise InputError(explain(error, _schema(), path)) from None


@functools.cache
def _alone(path: str) -> type:
    """A schema with this setting alone, named ``value``."""
    return make_dataclass("Alone", [("value", _schema()[path])])


def _fill(values: DictConfig) -> StudyConfig:
    """The schema filled with these values, all checked."""
    try:
        return _checked(OmegaConf.merge(OmegaConf.structured(StudyConfig), values))
    except OmegaConfBaseException as error:
        raise InputError(explain(error, _schema())) from None


def _checked(values: Any) -> StudyConfig:
    config = OmegaConf.to_object(values)
    assert isinstance(config, StudyConfig)
    return _possible(config)


def _possible(config: StudyConfig) -> StudyConfig:
    """Complete and normalize these settings, and check them."""
    if config.name == "auto":
        space = Path(config.search_space).stem
        config.name = f"{config.data.kind}-{config.plan.kind}-{space}"
    # YAML parses true as a boolean, which a text setting stores as "True".
    config.trial.channels_last = config.trial.channels_last.lower()
    config.trial.compile = config.trial.compile.lower()
    check(config)
    return config


def value_at(config: StudyConfig, path: str) -> Any:
    """Return the value at a config path.

    Raises:
        KeyError: the path does not name a single setting.
    """
    value: Any = config
    for part in path.split("."):
        if part not in getattr(value, "__dataclass_fields__", ()):
            raise KeyError(path)
        value = getattr(value, part)
    if hasattr(value, "__dataclass_fields__"):
        raise KeyError(path)
    return value


def to_plain(config: StudyConfig) -> dict[str, Any]:
    """Return the settings as nested dicts, lists and scalars, for YAML or JSON."""
    return asdict(config)


def from_plain(plain: Mapping[str, Any]) -> StudyConfig:
    """Rebuild the settings from the result of ``to_plain``.

    Raises:
        InputError: they are not settings of this version.
    """
    return _fill(OmegaConf.create(with_current_paths(plain)))


def with_current_paths(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Rename nested settings of earlier versions to their current paths."""
    current = copy.deepcopy(dict(plain))
    for old, new in RENAMED.items():
        *sections, name = old.split(".")
        section = functools.reduce(lambda found, key: found.get(key, {}), sections, current)
        if name in section:
            section[new.rpartition(".")[2]] = section.pop(name)
    return current


def flatten(plain: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one dict from config path to value."""
    flat: dict[str, Any] = {}
    for key, value in plain.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def config_paths(config: StudyConfig) -> list[str]:
    """Return every config path, in the schema's order."""
    return list(flatten(to_plain(config)))


def check(config: StudyConfig) -> None:
    """Check that every value is possible.

    Raises:
        InputError: a value is impossible; the message lists all of them.
    """
    faults = checks.faults(flatten(to_plain(config)))
    if faults:
        raise InputError("impossible settings:\n" + "\n".join(f"  {fault}" for fault in faults))


def group_names(group: str) -> list[str]:
    """Return the names that ``data=`` or ``plan=`` may have, sorted."""
    folder = importlib.resources.files(f"study.config.{group}")
    names = [entry.name for entry in folder.iterdir()]
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


@functools.cache
def _schema(kind: type = StudyConfig, prefix: str = "") -> dict[str, Any]:
    """The type of every setting and section, by config path."""
    found: dict[str, Any] = {}
    for name, child in get_type_hints(kind).items():
        found[prefix + name] = child
        if is_dataclass(child):
            found |= _schema(child, f"{prefix}{name}.")  # type: ignore[arg-type]
    return found


def fault_in(
    text: str, schema: Mapping[str, Any], groups: Mapping[str, Sequence[str]]
) -> str | None:
    """Describe why this is not a setting with one value; return None if it is.

    Args:
        groups: the names that each group, such as ``data``, may have.
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
            f"{key} must have one value, got {text!r}; write a list as [1,2]; search_space names "
            "the settings that a study varies"
        )
    value = override.value()
    if key in groups and not isinstance(value, dict):
        return _fault_in_choice(key, value, groups[key])
    return None if key in schema else unknown(key, schema)


def explain(
    error: HydraException | OmegaConfBaseException, schema: Mapping[str, Any], key: str = ""
) -> str:
    """Describe an error of Hydra or OmegaConf, with the name of the setting if it is known.

    Args:
        key: the setting, if the error does not name it.
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
    """Return whether this is ``key=value``, without Hydra's signs for adding or deleting."""
    is_change = override.type == OverrideType.CHANGE
    return is_change and not override.package and bool(override.key_or_group)


def _fault_in_choice(key: str, value: object, names: Sequence[str]) -> str | None:
    if value in names:
        return None
    near = difflib.get_close_matches(str(value), names, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{key} must be one of {', '.join(names)}, got {key}={value}{hint}"


def unknown(key: str, schema: Mapping[str, Any]) -> str:
    """Describe an unknown setting, with the closest known one."""
    paths = [path for path, kind in schema.items() if not is_dataclass(kind)]
    near = [path for path in paths if path.endswith(f".{key}")]
    near = near or difflib.get_close_matches(key, paths, n=1)
    hint = f"did you mean {' or '.join(near)}?" if near else "--cfg lists all settings"
    return f"unknown setting {key}; {hint}"
