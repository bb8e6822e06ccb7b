"""Which parameters decide whether a trial is a good one, and whether that may be chance."""

from __future__ import annotations

import collections
import math
import random
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace

import optuna
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.trial import FrozenTrial

from search_spaces.space import SearchSpace
from study.search.staged import is_of_refiner
from study.storage.tables import PARAMS, TableRow

MIN_TRIALS = 8
NUM_GOOD = 5
"""PED-ANOVA wants at least so many trials among the good ones."""
NUM_SHUFFLES = 99


def importance(trials: Sequence[TableRow], space: SearchSpace) -> dict[str, float]:
    """How much each parameter decided whether a trial is among the good ones; they sum to 1.

    PED-ANOVA (Watanabe et al., IJCAI 2023) compares where the good trials lie with where all do.
    It takes low values for good ones, so what it is given is the negative AP. Pruned trials
    count as worse than all that ran to their end: without them, what the search has learnt to
    avoid would not show.

    Returns:
        Shares by config path, the largest first, of parameters that enough trials were asked
        for: of a rare one, chance alone makes much. Empty where there are too few trials, or
        too many equal ones, to say.
    """
    found: dict[str, float] = {}
    for stage in _stages(trials, space):
        found |= _divergences(*stage)
    total = sum(found.values())
    if not total:
        return {}
    ranked = sorted(found.items(), key=lambda item: -item[1])
    return {path: value / total for path, value in ranked}


def beyond_chance(trials: Sequence[TableRow], space: SearchSpace, seed: int = 0) -> set[str]:
    """The parameters that matter more than ever when the APs are dealt out to trials at random.

    In a study of few trials nearly every share is chance; one in a hundred passes this by luck.
    """
    certain: set[str] = set()
    for frozen, losses, paths in _stages(trials, space):
        found = _divergences(frozen, losses, paths)
        draw = random.Random(seed)
        for _ in range(NUM_SHUFFLES):
            draw.shuffle(losses)
            dealt = _divergences(frozen, losses, list(found))
            found = {path: value for path, value in found.items() if value > dealt[path]}
            if not found:
                break
        certain |= set(found)
    return certain


def _stages(
    trials: Sequence[TableRow], space: SearchSpace
) -> Iterator[tuple[list[FrozenTrial], list[float], list[str]]]:
    """What trials say of their own parameters, in plan staged each stage's for itself.

    The row of a refiner has its parent's values too, which are no evidence of their own.
    """
    students = [row for row in trials if row.get("parent_trial") is None]
    refiners = [row for row in trials if row.get("parent_trial") is not None]
    varied = tuple(filter(is_of_refiner, space.parameters))
    for rows, own in ((students, space), (refiners, replace(space, parameters=varied))):
        frozen, losses, paths = _prepare(rows, own)
        if paths:
            yield frozen, losses, paths


def _prepare(
    trials: Sequence[TableRow], space: SearchSpace
) -> tuple[list[FrozenTrial], list[float], list[str]]:
    """Trials for Optuna, a loss for each, and the paths to judge: none where that is in vain."""
    scored = [
        row
        for row in trials
        if row["state"] in ("COMPLETE", "PRUNED") and row["objective"] is not None
    ]
    losses = [-row["objective"] + (row["state"] == "PRUNED") for row in scored]
    if len(losses) < MIN_TRIALS or sorted(losses)[_num_good(losses) - 1] == max(losses):
        return [], [], []
    frozen = []
    for row in scored:
        asked = [p for p in space.parameters if row.get(PARAMS + p.path) is not None]
        trial = optuna.trial.create_trial(
            params={p.path: row[PARAMS + p.path] for p in asked},
            distributions={p.path: p.distribution for p in asked},
            value=0.0,
        )
        frozen.append(trial)
    counts = collections.Counter(path for trial in frozen for path in trial.params)
    return frozen, losses, [path for path in space.paths if counts[path] >= MIN_TRIALS]


def _num_good(losses: Sequence[float]) -> int:
    return min(max(NUM_GOOD, math.ceil(len(losses) / 10)), len(losses) // 2)


def _divergences(
    frozen: Sequence[FrozenTrial], losses: Sequence[float], paths: list[str]
) -> dict[str, float]:
    """How far the good trials' values lie from all trials' by path, the farthest first."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="minimize")
    optuna.logging.set_verbosity(verbosity)
    for trial, loss in zip(frozen, losses, strict=True):
        trial.value = loss
        study.add_trial(trial)
    evaluator = PedAnovaImportanceEvaluator(target_quantile=_num_good(losses) / len(losses))
    with warnings.catch_warnings():
        # A condition that hardly any trial fails to meet; normalize, which is experimental.
        warnings.simplefilter("ignore")
        return optuna.importance.get_param_importances(
            study, evaluator=evaluator, params=paths, normalize=False
        )
