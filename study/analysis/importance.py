"""Importance of each parameter: its share in making a trial good, and whether it is chance."""

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
"""Fewest trials, of the study and of a parameter, that importance is computed from."""
NUM_GOOD = 5
"""PED-ANOVA needs at least this many good trials."""
NUM_SHUFFLES = 99
"""Random orders of the APs that a share is compared with."""


def importance(trials: Sequence[TableRow], space: SearchSpace) -> dict[str, float]:
    """Return the share of each parameter in whether a trial is good; the shares sum to 1.

    PED-ANOVA (Watanabe et al., IJCAI 2023) compares the values of the good trials with those of
    all trials. It takes low objectives as good, so it gets the negative AP. Pruned trials rank
    below all complete ones: without them, values that the search learned to avoid would not show.

    Returns:
        Shares by config path, the largest first. Parameters that few trials have are left out,
        since chance alone gives them a large share. Empty if there are too few trials, or too
        many of equal AP.
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
    """Return the parameters whose share exceeds that of every random assignment of the APs.

    In a study of few trials nearly every share is chance; one in a hundred passes this test.
    """
    certain: set[str] = set()
    for frozen, losses, paths in _stages(trials, space):
        found = _divergences(frozen, losses, paths)
        draw = random.Random(seed)
        for _ in range(NUM_SHUFFLES):
            draw.shuffle(losses)
            by_chance = _divergences(frozen, losses, list(found))
            found = {path: value for path, value in found.items() if value > by_chance[path]}
            if not found:
                break
        certain |= set(found)
    return certain


def _stages(
    trials: Sequence[TableRow], space: SearchSpace
) -> Iterator[tuple[list[FrozenTrial], list[float], list[str]]]:
    """Yield trials, losses and parameters to judge; with plan=staged once for each stage.

    Of a trial that refines another's student only the refiner's parameters are judged: the rest
    are its parent's, which would count again.
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
    """Trials for Optuna, a loss for each, and the paths to judge; none if there are too few."""
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
        own = [p for p in space.parameters if row.get(PARAMS + p.path) is not None]
        trial = optuna.trial.create_trial(
            params={p.path: row[PARAMS + p.path] for p in own},
            distributions={p.path: p.distribution for p in own},
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
    """Divergence of the good trials' values from all trials' by path, the largest first."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="minimize")
    optuna.logging.set_verbosity(verbosity)
    for trial, loss in zip(frozen, losses, strict=True):
        trial.value = loss
        study.add_trial(trial)
    evaluator = PedAnovaImportanceEvaluator(target_quantile=_num_good(losses) / len(losses))
    with warnings.catch_warnings():
        # Of a threshold that nearly all trials pass, and of normalize, which is experimental.
        warnings.simplefilter("ignore")
        return optuna.importance.get_param_importances(
            study, evaluator=evaluator, params=paths, normalize=False
        )
