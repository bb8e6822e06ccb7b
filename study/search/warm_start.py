"""Warm start: trials of older studies as known trials of a new one.

A trial fits if the new study could have run it: the same data, teacher and plan, values inside its
search space, and equal other settings of the student and the stages. Refiners of plan=staged never
fit, since they start from students of their own study.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from search_spaces.space import SearchSpace
from study.config.compose import flatten
from study.config.schema import STAGED, SearchConfig
from study.errors import InputError
from study.search.controls import BASELINE
from study.search.objectives import violations
from study.storage.paths import settings_file
from study.storage.study_file import read_settings
from study.storage.tables import PARAMS, TableRow, read_reports, read_trials

WARM_FROM = "warm_from"
"""User attribute of a known trial: the older study, the trial's number and start time."""
DONE = "warm_started"
"""Attribute of an Optuna study whose known trials are all added."""
SECTIONS = ("student.", "distill.", "refine.")
"""Settings that a trial of plan=joint depends on."""
STUDENT_SECTIONS = SECTIONS[:2]
"""Settings that a student of plan=staged depends on."""


def check_older_studies(warm_start: Sequence[str], folder: Path) -> None:
    """Check that every folder of ``search.warm_start`` holds a study.

    Nothing is checked once this study has begun: its known trials are added then.

    Raises:
        InputError: a folder holds no study.
    """
    if settings_file(folder).exists():
        return
    for older in map(Path, warm_start):
        try:
            read_settings(older)
            read_trials(older)
        except InputError as error:
            raise InputError(
                f"search.warm_start must name folders of older studies, got {older}: {error}; "
                "correct it or leave it out"
            ) from None


def check_warm_start(
    warm_start: Sequence[str], folder: Path, fingerprint: str, teachers: Collection[str]
) -> None:
    """Check that every folder of ``search.warm_start`` is a study of this data and teacher.

    Nothing is checked once this study has begun: its known trials are added then.

    Args:
        folder: folder of the new study.
        teachers: names that the teacher's folder may have, today's first.

    Raises:
        InputError: a folder holds no study, or one of other data or another teacher.
    """
    if settings_file(folder).exists():
        return
    for older in warm_start:
        settings = read_settings(Path(older))
        for name, key, known in (
            ("data", "data_fingerprint", [fingerprint]),
            ("teacher", "teacher", list(teachers)),
        ):
            if settings.get(key) not in known:
                raise InputError(
                    "search.warm_start must name studies of the same data and teacher, got "
                    f"{older} with another {name} ({settings.get(key)}, here {known[0]}): their "
                    "APs can't be compared; leave it out"
                )


def add_known_trials(
    study: optuna.Study, search: SearchConfig, folder: Path, space: SearchSpace
) -> list[str]:
    """Add the trials that fit to the Optuna study, before its first own trial.

    They are added once: a kill in between neither loses nor repeats a trial.

    Returns:
        Lines for the user: how many trials were added, and why the others were not.
    """
    if not search.warm_start or DONE in study.user_attrs:
        return []
    settings = read_settings(folder)["config"]
    known = {trial.user_attrs.get(WARM_FROM) for trial in study.get_trials(deepcopy=False)}
    lines: list[str] = []
    for older in map(Path, search.warm_start):
        fitting, left_out = _trials_that_fit(older, settings, search, space)
        for trial in fitting:
            if trial.user_attrs[WARM_FROM] not in known:
                study.add_trial(trial)
        lines += _describe(older, len(fitting), left_out)
    study.set_user_attr(DONE, True)
    return lines


def known_trial_lines(
    settings: Mapping[str, Any], search: SearchConfig, space: SearchSpace
) -> Iterator[str]:
    """Yield the lines that ``add_known_trials`` would return for a study that has not begun.

    Args:
        settings: its settings, nested, with paths as the user typed them, as studies store them.
    """
    for older in map(Path, search.warm_start):
        fitting, left_out = _trials_that_fit(older, settings, search, space)
        yield from _describe(older, len(fitting), left_out)


def _trials_that_fit(
    older: Path, settings: Mapping[str, Any], search: SearchConfig, space: SearchSpace
) -> tuple[list[FrozenTrial], dict[str, list[int]]]:
    """Return the trials that fit, and the numbers of the others by the reason.

    Args:
        settings: settings of the new study, nested.
    """
    older_settings, here = flatten(read_settings(older)["config"]), flatten(settings)
    reports = read_reports(older).to_pylist()
    fitting: list[FrozenTrial] = []
    left_out: dict[str, list[int]] = {}
    for row in read_trials(older).to_pylist():
        curve = {r["epoch"]: r["val_ap"] for r in reports if r["trial"] == row["trial"]}
        values = older_settings | _params(row)
        reason = next(_misfits(row, curve, values, here, space, search), None)
        if reason:
            left_out.setdefault(reason, []).append(row["trial"])
        else:
            fitting.append(_known_trial(row, curve, space.values_in(values), space, search))
    return fitting, left_out


def _describe(older: Path, known: int, left_out: Mapping[str, list[int]]) -> Iterator[str]:
    yield f"warm start: {known} trials of {older} are known"
    for reason, numbers in left_out.items():
        yield f"warm start: trial {', '.join(map(str, numbers))} of {older} left out: {reason}"


def _params(row: TableRow) -> dict[str, Any]:
    return {
        column.removeprefix(PARAMS): value
        for column, value in row.items()
        if column.startswith(PARAMS) and value is not None
    }


def _misfits(
    row: TableRow,
    curve: Mapping[int, float],
    values: Mapping[str, Any],
    here: Mapping[str, Any],
    space: SearchSpace,
    search: SearchConfig,
) -> Iterator[str]:
    """Yield why the older trial with these values does not fit."""
    if values["plan.kind"] != here["plan.kind"]:
        yield f"it has plan={values['plan.kind']}, this study plan={here['plan.kind']}"
    if row["parent_trial"] is not None:
        yield "it refines a student of its own study"
    if row["control"] == BASELINE:
        yield "the baseline is outside every search space"
    if row["state"] == "FAIL":
        yield "it failed"
    elif not curve or row["objective"] is None:
        yield "it ended before its first epoch"
    for cost in _required_costs(search):
        if row.get(cost) is None:
            yield f"its {cost} was not measured"
    sections = STUDENT_SECTIONS if here["plan.kind"] == STAGED else SECTIONS
    yield from _differences(values, here, space, sections)


def _differences(
    values: Mapping[str, Any],
    here: Mapping[str, Any],
    space: SearchSpace,
    sections: tuple[str, ...],
) -> Iterator[str]:
    conditions = (path for parameter in space.parameters for path in parameter.when)
    missing = sorted({*space.paths, *conditions}.difference(values))
    if missing:
        yield f"it has no {missing[0]}"
        return
    active = space.values_in(values)
    for parameter in space.parameters:
        if parameter.path in active and not parameter.accepts(active[parameter.path]):
            yield f"{parameter.path}={active[parameter.path]} is outside the search space"
    for path, value in here.items():
        is_fixed = path.startswith(sections) and path not in space.paths
        if is_fixed and values.get(path, value) != value:
            yield f"{path} is {values[path]} there and {value} here"


def _required_costs(search: SearchConfig) -> list[str]:
    limits = vars(search.constraints)
    limited = [name for name, limit in limits.items() if limit is not None]
    return [*search.objectives[1:], *limited]


def _known_trial(
    row: TableRow,
    curve: dict[int, float],
    params: dict[str, Any],
    space: SearchSpace,
    search: SearchConfig,
) -> FrozenTrial:
    is_complete = row["state"] == "COMPLETE"
    ap = row["objective"] if is_complete else curve[max(curve)]
    limits = vars(search.constraints)
    distributions: dict[str, BaseDistribution] = {
        parameter.path: parameter.distribution
        for parameter in space.parameters
        if parameter.path in params
    }
    return optuna.trial.create_trial(
        state=TrialState.COMPLETE if is_complete else TrialState.PRUNED,
        values=[ap, *(float(row[cost]) for cost in search.objectives[1:])],
        params=params,
        distributions=distributions,
        intermediate_values=curve,
        constraints=violations(limits, row),
        user_attrs={WARM_FROM: f"{row['study']}/{row['trial']} begun {row['started']}"},
    )
