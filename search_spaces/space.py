"""Search spaces: the parameters that a study varies, read from YAML, checked and sampled.

Each YAML file beside this module is for one question. Its keys are config paths; the same string
names the parameter in overrides, in Optuna and in the Parquet column. A parameter is
``scientific`` (the question is about it) or ``nuisance`` (tuned only to make the comparison fair).
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.resources
import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from optuna.distributions import (
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
    json_to_distribution,
)
from optuna.trial import BaseTrial

Distribution = FloatDistribution | IntDistribution | CategoricalDistribution
Role = Literal["scientific", "nuisance"]
ROLES: tuple[Role, ...] = ("scientific", "nuisance")
NUMBER_FIELDS = ("low", "high", "log", "step")
FIELDS = (*NUMBER_FIELDS, "choices", "role", "when")


class SpaceError(ValueError):
    """An error in a search space for its author to fix; the message names the file and the key."""


def place_in(distribution: FloatDistribution | IntDistribution, value: float) -> float:
    """Return the value's place between the bounds, 0 to 1, on the distribution's scale."""
    low, high = float(distribution.low), float(distribution.high)
    if distribution.log:
        low, high, value = math.log(low), math.log(high), math.log(value)
    return (value - low) / (high - low) if high > low else 0.5


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A config path that a study varies, with its values."""

    path: str
    distribution: Distribution
    role: Role
    when: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    """Conditions on other config paths: the values under which this parameter has an effect."""

    def is_active(self, values: Mapping[str, Any]) -> bool:
        """Return whether every condition holds; one on a path without a value does not."""
        return all(
            path in values and values[path] in allowed for path, allowed in self.when.items()
        )

    def accepts(self, value: Any) -> bool:
        """Return whether a trial can have this value: within the bounds, or among the choices."""
        if isinstance(self.distribution, CategoricalDistribution):
            return any(_same(value, choice) for choice in self.distribution.choices)
        low, high, step = self.distribution.low, self.distribution.high, self.distribution.step
        return _is_number(value) and low <= value <= high and _on_grid(value - low, step)

    def extremes(self) -> tuple[Any, ...]:
        """Return both bounds, or every choice."""
        if isinstance(self.distribution, CategoricalDistribution):
            return tuple(self.distribution.choices)
        return (self.distribution.low, self.distribution.high)

    def probes(self) -> tuple[Any, ...]:
        """Return the values to test a schema with: the extremes, and the first step if any."""
        if isinstance(self.distribution, CategoricalDistribution) or not self.distribution.step:
            return self.extremes()
        low, high = self.extremes()
        return (low, min(low + self.distribution.step, high), high)

    def value_type(self) -> type:
        """Return the type that all values have: float, int, str or bool."""
        if isinstance(self.distribution, FloatDistribution):
            return float
        if isinstance(self.distribution, IntDistribution):
            return int
        return type(self.distribution.choices[0])


@dataclasses.dataclass(frozen=True)
class SearchSpace:
    """Parameters in the order in which they are sampled, and the question they answer."""

    name: str
    question: str
    parameters: tuple[Parameter, ...]

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(parameter.path for parameter in self.parameters)

    def suggest(self, trial: BaseTrial, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """Sample the trial's values by path, for active parameters only.

        Args:
            trial: an Optuna trial, which records each sampled parameter and no inactive one.
            defaults: the config's values, used for conditions on paths outside the space.
        """
        return self._active_values(lambda parameter: _sample(trial, parameter), defaults)

    def values_in(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return a config's values by path, for active parameters only."""
        return self._active_values(lambda parameter: config[parameter.path], config)

    def to_json(self) -> str:
        entries = [
            {
                "path": parameter.path,
                "distribution": json.loads(distribution_to_json(parameter.distribution)),
                "role": parameter.role,
                "when": {path: list(allowed) for path, allowed in parameter.when.items()},
            }
            for parameter in self.parameters
        ]
        return json.dumps({"name": self.name, "question": self.question, "parameters": entries})

    @classmethod
    def from_json(cls, text: str) -> SearchSpace:
        """Read the space that ``to_json`` wrote; the result equals the original."""
        content = json.loads(text)
        parameters = []
        for entry in content["parameters"]:
            distribution = json_to_distribution(json.dumps(entry["distribution"]))
            assert isinstance(distribution, Distribution)
            when = {path: tuple(allowed) for path, allowed in entry["when"].items()}
            parameters.append(Parameter(entry["path"], distribution, entry["role"], when))
        return cls(content["name"], content["question"], tuple(parameters))

    def _active_values(
        self, value_of: Callable[[Parameter], Any], config: Mapping[str, Any]
    ) -> dict[str, Any]:
        conditions = {path for parameter in self.parameters for path in parameter.when}
        outside = {path: config[path] for path in conditions.difference(self.paths)}
        values: dict[str, Any] = {}
        for parameter in self.parameters:
            if parameter.is_active({**outside, **values}):
                values[parameter.path] = value_of(parameter)
        return values


def known_names() -> list[str]:
    """List the spaces in this package, sorted."""
    folder = importlib.resources.files("search_spaces")
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in folder.iterdir()
        if entry.name.endswith(".yaml")
    )


def load_space(name: str) -> SearchSpace:
    """Load the search space of that name, or from the YAML file at that path.

    Raises:
        SpaceError: there is no such space, or it has an error.
    """
    if name in known_names():
        text = importlib.resources.files("search_spaces").joinpath(f"{name}.yaml").read_text()
        return _parse(text, name, f"search_spaces/{name}.yaml")
    file = Path(name)
    if file.suffix not in (".yaml", ".yml") or not file.is_file():
        raise SpaceError(
            f"search_space must be one of {', '.join(known_names())} or the path of an existing "
            f"YAML file, got {name!r}{_suggestion(name, known_names())}"
        )
    return _parse(file.read_text(), file.stem, str(file))


def check_space(
    space: SearchSpace, value_of: Callable[[str], Any], known_paths: Collection[str] = ()
) -> None:
    """Check that the config has every path of the space, and the space the config's values.

    The latter because the config is enqueued as a trial. A parameter that is inactive in the
    config may have any value of the right type.

    Args:
        space: the space to check.
        value_of: returns the config's value at a path; raises KeyError if there is none.
        known_paths: all config paths, used to suggest a correction for a misspelled one.

    Raises:
        SpaceError: a path is not in the config, or a value has the wrong type or is not in the
            space.
    """
    values: dict[str, Any] = {}
    for parameter in space.parameters:
        for path in (parameter.path, *parameter.when):
            try:
                values[path] = value_of(path)
            except KeyError:
                raise SpaceError(
                    f"{space.name}: {parameter.path}: every path must be one of the config's, got "
                    f"{path!r}{_suggestion(path, known_paths)}"
                ) from None
        _check_type(space, parameter, values[parameter.path])
    active = space.values_in(values)
    for parameter in space.parameters:
        if parameter.path in active and not parameter.accepts(active[parameter.path]):
            raise SpaceError(
                f"{space.name}: {parameter.path}: the config's value must be one that a trial can "
                f"have, since the config is enqueued as a trial, got "
                f"{active[parameter.path]!r}, which is not in {_range(parameter)}; widen the "
                f"space, or change the value ({parameter.path}=...)"
            )


def _check_type(space: SearchSpace, parameter: Parameter, value: Any) -> None:
    wanted = parameter.value_type()
    if type(value) is wanted:
        return
    if wanted is int and isinstance(value, float):
        advice = "write the bounds with a decimal point to sample fractions too"
    elif wanted is float and isinstance(value, int):
        advice = "write bounds and step as whole numbers"
    else:
        advice = "name another path, or give values of that type"
    raise SpaceError(
        f"{space.name}: {parameter.path}: its values must have the config's type, got "
        f"{_range(parameter)} for a config value of {value!r} ({type(value).__name__}); {advice}"
    )


def _sample(trial: BaseTrial, parameter: Parameter) -> Any:
    distribution = parameter.distribution
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(parameter.path, distribution.choices)
    low, high, step, log = distribution.low, distribution.high, distribution.step, distribution.log
    if isinstance(distribution, IntDistribution):
        return trial.suggest_int(parameter.path, int(low), int(high), step=int(step or 1), log=log)
    return trial.suggest_float(parameter.path, low, high, step=step, log=log)


def _parse(text: str, name: str, file: str) -> SearchSpace:
    try:
        # OmegaConf, because plain PyYAML reads 1e-5 as a string.
        content = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise SpaceError(f"{file}: a search space must be YAML, got: {error}") from error
    if not isinstance(content, dict):
        raise SpaceError(f"{file}: must be a mapping of question and parameters, got {content!r}")
    unknown = [key for key in content if key not in ("question", "parameters")]
    if unknown:
        raise SpaceError(f"{file}: may have only question and parameters, got {unknown[0]!r} too")
    question, entries = content.get("question"), content.get("parameters")
    if not isinstance(question, str) or not question.strip():
        raise SpaceError(f"{file}: question must be the question to answer, got {question!r}")
    if not isinstance(entries, dict) or not entries:
        raise SpaceError(f"{file}: parameters must map config paths to bounds, got {entries!r}")
    parameters: list[Parameter] = []
    for path, entry in entries.items():
        parameters.append(_parameter(f"{file}: {path}", str(path), entry))
    _check_order(file, parameters)
    return SearchSpace(name, question.strip(), tuple(parameters))


def _parameter(where: str, path: str, entry: Any) -> Parameter:
    if not isinstance(entry, dict):
        raise SpaceError(f"{where}: must map {', '.join(FIELDS)} to values, got {entry!r}")
    for field in entry:
        if field not in FIELDS:
            raise SpaceError(
                f"{where}: fields must be among {', '.join(FIELDS)}, got {field!r}"
                f"{_suggestion(str(field), FIELDS)}"
            )
    if entry.get("role") not in ROLES:
        raise SpaceError(f"{where}: role must be {' or '.join(ROLES)}, got {entry.get('role')!r}")
    numbers = [field for field in NUMBER_FIELDS if field in entry]
    if ("choices" in entry) == bool(numbers):
        raise SpaceError(
            f"{where}: must have either choices or low and high, got "
            f"{'both' if numbers else 'neither'}"
        )
    distribution = _numbers(where, entry) if numbers else _choices(where, entry["choices"])
    return Parameter(path, distribution, entry["role"], _conditions(where, entry.get("when", {})))


def _choices(where: str, choices: Any) -> CategoricalDistribution:
    if not isinstance(choices, list) or not choices:
        raise SpaceError(f"{where}: choices must be a list of values, got {choices!r}")
    if len({type(choice) for choice in choices}) > 1 or not isinstance(
        choices[0], str | bool | int | float
    ):
        raise SpaceError(
            f"{where}: choices must be all words, all whole numbers, all numbers with a decimal "
            f"point or all true and false, got {choices!r}"
        )
    if len(set(choices)) < len(choices):
        raise SpaceError(f"{where}: choices must differ from one another, got {choices!r}")
    return CategoricalDistribution(choices)


def _numbers(where: str, entry: Mapping[str, Any]) -> FloatDistribution | IntDistribution:
    for field in ("low", "high"):
        if not _is_number(entry.get(field)) or not math.isfinite(entry[field]):
            raise SpaceError(f"{where}: {field} must be a finite number, got {entry.get(field)!r}")
    low, high, log, step = entry["low"], entry["high"], entry.get("log"), entry.get("step")
    if not low <= high:
        raise SpaceError(f"{where}: low <= high must hold, got {low=}, {high=}; swap them")
    if not isinstance(log, bool | None):
        raise SpaceError(f"{where}: log must be true or false, got {log!r}")
    if log and low <= 0:
        raise SpaceError(f"{where}: low > 0 must hold on a log scale, got {low=}; raise it")
    is_int = isinstance(low, int) and isinstance(high, int)
    if step is not None:
        _check_step(where, entry, is_int)
    if is_int:
        return IntDistribution(low, high, log=bool(log), step=step or 1)
    return FloatDistribution(float(low), float(high), log=bool(log), step=step)


def _check_step(where: str, entry: Mapping[str, Any], is_int: bool) -> None:
    low, high, step = entry["low"], entry["high"], entry["step"]
    if entry.get("log"):
        raise SpaceError(f"{where}: a log scale has no step, got {step=}; drop log or step")
    if not _is_number(step) or not step > 0:
        raise SpaceError(f"{where}: step must be a number above 0, got {step=}")
    if is_int and not isinstance(step, int):
        raise SpaceError(
            f"{where}: step must be a whole number between whole bounds, got {low=}, {high=}, "
            f"{step=}; write the bounds with a decimal point, or change the step"
        )
    if not _on_grid(high - low, step):
        raise SpaceError(
            f"{where}: whole steps must lead from low to high, got {low=}, {high=}, {step=}"
        )


def _conditions(where: str, when: Any) -> dict[str, tuple[Any, ...]]:
    if not isinstance(when, dict):
        raise SpaceError(f"{where}: when must map config paths to lists of values, got {when!r}")
    for path, allowed in when.items():
        if not isinstance(allowed, list) or not allowed:
            raise SpaceError(f"{where}: when: {path} must list the values, got {allowed!r}")
    return {str(path): tuple(allowed) for path, allowed in when.items()}


def _check_order(file: str, parameters: list[Parameter]) -> None:
    places = {parameter.path: place for place, parameter in enumerate(parameters)}
    for place, parameter in enumerate(parameters):
        for path, allowed in parameter.when.items():
            if path not in places:
                continue  # a config path outside the space, or an error that check_space finds
            if places[path] >= place:
                raise SpaceError(
                    f"{file}: {parameter.path}: a condition must be on a parameter that comes "
                    f"earlier, got {path!r}; move it up"
                )
            wrong = [value for value in allowed if not parameters[places[path]].accepts(value)]
            if wrong:
                raise SpaceError(
                    f"{file}: {parameter.path}: when: {path} must list values that it can have, "
                    f"got {wrong[0]!r}; choose from {_range(parameters[places[path]])}"
                )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _on_grid(distance: float, step: float | None) -> bool:
    """Return whether the distance is a whole number of steps, within rounding."""
    return step is None or abs(distance / step - round(distance / step)) < 1e-8


def _same(first: Any, second: Any) -> bool:
    return type(first) is type(second) and bool(first == second)


def _range(parameter: Parameter) -> str:
    if isinstance(parameter.distribution, CategoricalDistribution):
        return f"[{', '.join(map(str, parameter.distribution.choices))}]"
    low, high = parameter.distribution.low, parameter.distribution.high
    step = parameter.distribution.step
    return f"{low} to {high}" + (f" in steps of {step}" if step not in (None, 1) else "")


def _suggestion(word: str, known: Iterable[str]) -> str:
    """End a message with the closest known word, or with nothing if none is close."""
    matches = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""
