"""Trials of older studies as known trials of a new one: what fits enters, the rest is listed.

An older trial fits if this study could have run it: the same data and teacher, the same plan,
values that its search space can give, and every other setting of student and stages as it is here.
Of a staged study the students can, its refiners can't: they start from students of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
"""User attribute of a known trial: the older study, the trial's number, when it was begun."""
DONE = "warm_started"
"""Attribute of a study whose known trials have all entered."""
SECTIONS = ("student.", "distill.", "refine.")
STUDENTS = SECTIONS[:2]
"""What a student of plan staged depends on."""


def check_older_studies(warm_start: Sequence[str], folder: Path) -> None:
    """Returns if every folder of ``search.warm_start`` is a study, of whatever data.

    A study that was begun already is not checked: its known trials have entered.

    Raises:
        InputError: one is not.
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
    warm_start: Sequence[str], folder: Path, fingerprint: str, teacher: str
) -> None:
    """Returns if every folder of ``search.warm_start`` is a study of these data and this teacher.

    A study that was begun already is not checked: its known trials have entered.

    Args:
        folder: the new study's.

    Raises:
        InputError: one is not.
    """
    if settings_file(folder).exists():
        return
    for older in warm_start:
        settings = read_settings(Path(older))
        for what, key, here in (
            ("data", "data_fingerprint", fingerprint),
            ("teacher", "teacher", teacher),
        ):
            if settings.get(key) != here:
                raise InputError(
                    f"search.warm_start must name studies of the same data and teacher, got "
                    f"{older}, whose {what} is another ({settings.get(key)}, here {here}): AP of "
                    "the two can't be compared; leave it out"
                )


def enter_known_trials(
    study: optuna.Study, search: SearchConfig, folder: Path, space: SearchSpace
) -> list[str]:
    """Adds what fits to the Optuna study, once, before any trial of its own; says what came of it.

    A kill in between loses and doubles none.
    """
    if not search.warm_start or DONE in study.user_attrs:
        return []
    own = read_settings(folder)["config"]
    known = {trial.user_attrs.get(WARM_FROM) for trial in study.get_trials(deepcopy=False)}
    lines: list[str] = []
    for older in map(Path, search.warm_start):
        fitting, left_out = _sorted(older, own, search, space)
        for trial in fitting:
            if trial.user_attrs[WARM_FROM] not in known:
                study.add_trial(trial)
        lines += _told(older, len(fitting), left_out)
    study.set_user_attr(DONE, True)
    return lines


def known_trial_lines(
    own: Mapping[str, Any], search: SearchConfig, space: SearchSpace
) -> Iterator[str]:
    """What ``enter_known_trials`` would say of a study that is still to begin.

    Args:
        own: its settings, nested, with paths as they were typed, which is how studies keep them.
    """
    for older in map(Path, search.warm_start):
        fitting, left_out = _sorted(older, own, search, space)
        yield from _told(older, len(fitting), left_out)


def _sorted(
    older: Path, own: Mapping[str, Any], search: SearchConfig, space: SearchSpace
) -> tuple[list[FrozenTrial], dict[str, list[int]]]:
    """The trials that fit, and the numbers of the others by the reason.

    Args:
        own: the new study's settings, nested.
    """
    settings, here = flatten(read_settings(older)["config"]), flatten(own)
    reports = read_reports(older).to_pylist()
    fitting: list[FrozenTrial] = []
    left_out: dict[str, list[int]] = {}
    for row in read_trials(older).to_pylist():
        curve = {r["epoch"]: r["val_ap"] for r in reports if r["trial"] == row["trial"]}
        values = {**settings, **_params(row)}
        reason = next(_misfits(row, curve, values, here, space, search), None)
        if reason:
            left_out.setdefault(reason, []).append(row["trial"])
        else:
            fitting.append(_known_trial(row, curve, space.values_in(values), space, search))
    return fitting, left_out


def _told(older: Path, known: int, left_out: Mapping[str, list[int]]) -> Iterator[str]:
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
    own: Mapping[str, Any],
    space: SearchSpace,
    search: SearchConfig,
) -> Iterator[str]:
    """Why the older trial, of these values, could be none of this study's; nothing if it could."""
    if values["plan.kind"] != own["plan.kind"]:
        yield f"it is of plan={values['plan.kind']}, this study of plan={own['plan.kind']}"
    if row["parent_trial"] is not None:
        yield "it refines a student that this study does not have"
    if row["control"] == BASELINE:
        yield "the baseline is no point of a search space"
    if row["state"] == "FAIL":
        yield "it failed"
    elif not curve or row["objective"] is None:
        yield "it ended before its first epoch did"
    for cost in _costs_asked(search):
        if row.get(cost) is None:
            yield f"its {cost} was not measured"
    sections = STUDENTS if own["plan.kind"] == STAGED else SECTIONS
    yield from _settings_apart(values, own, space, sections)


def _settings_apart(
    values: Mapping[str, Any],
    own: Mapping[str, Any],
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
            yield f"the search space can't give {parameter.path}={active[parameter.path]}"
    for path, here in own.items():
        is_fixed = path.startswith(sections) and path not in space.paths
        if is_fixed and values.get(path, here) != here:
            yield f"{path} was {values[path]} there and is {here} here"


def _costs_asked(search: SearchConfig) -> list[str]:
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
