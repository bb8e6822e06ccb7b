"""Forecast of the epochs that a study's trials will train, before it begins and while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from study.config.schema import STAGED, PlanConfig, SearchConfig
from study.search.controls import CONTROLS
from study.search.staged import num_distill_trials

RULE_WEIGHT = 2.0
"""Weight of the pruner's rule in the forecast, in trials."""


def is_predictable(search: SearchConfig) -> bool:
    """Return whether the pruner's rule fixes the share of trials that it leaves.

    Other pruners compare with the APs of earlier trials.
    """
    return search.pruner in ("successive_halving", "none")


def expected_epochs(budget: int, search: SearchConfig) -> list[float]:
    """Return the share of the searched trials that train each epoch, from the first on.

    Successive halving lets one in ``reduction_factor`` of many trials pass each rung. Other
    pruners count as if they let all trials pass.
    """
    shares, share, rung = [], 1.0, search.min_epochs
    for epoch in range(1, budget + 1):
        shares.append(share)
        if search.pruner == "successive_halving" and epoch == rung:
            share, rung = share / search.reduction_factor, rung * search.reduction_factor
    return shares


class TrialGroup(NamedTuple):
    """Trials still to run that have the same epochs and pruning."""

    trials: int
    distill_epochs: int
    refine_epochs: int
    can_be_pruned: bool

    @property
    def budget(self) -> int:
        """Epochs of a trial that is not pruned."""
        return self.distill_epochs + self.refine_epochs

    @property
    def max_epochs(self) -> int:
        """Epochs of the group if no trial is pruned."""
        return self.trials * self.budget

    def shares(self, search: SearchConfig) -> list[float]:
        """Return the share of the trials that train each epoch."""
        return expected_epochs(self.budget, search) if self.can_be_pruned else [1.0] * self.budget


class StageEpochs(NamedTuple):
    """Epochs of each stage of a trial."""

    distill: int
    refine: int


def trial_groups(
    plan: PlanConfig,
    trials: int,
    epochs: StageEpochs,
    *,
    finished: int = 0,
    handed_over: int | None = None,
) -> list[list[TrialGroup]]:
    """Group the trials of each stage that are still to run; the last group can be pruned.

    plan=joint has one stage; plan=staged has the students', then the refiners'.

    Args:
        trials: number of trials of the whole study.
        finished: number of trials that ended.
        handed_over: number of students, if they were handed over to stage 2.
    """
    distill, refine = epochs
    if plan.kind != STAGED:
        stages = [[(trials, len(CONTROLS), distill, refine)]]
    else:
        students = handed_over
        if students is None:
            students = num_distill_trials(trials, plan.distill_share)
        baseline = (1, 1, distill + refine, 0)
        stages = [
            [baseline, (students - 1, 1, distill, 0)],
            [(trials - students, 1, 0, refine)],
        ]
    groups: list[list[TrialGroup]] = []
    for parts in stages:
        groups.append([])
        for number, controls, first, second in parts:
            left = max(number - finished, 0)
            unpruned = min(max(controls - finished, 0), left)
            groups[-1].append(TrialGroup(unpruned, first, second, can_be_pruned=False))
            groups[-1].append(TrialGroup(left - unpruned, first, second, can_be_pruned=True))
            finished = max(finished - number, 0)
    return groups


class TrialProgress(NamedTuple):
    """Progress of a started trial."""

    epochs: int
    budget: int
    has_ended: bool
    is_control: bool


def forecast_stage(
    groups: Sequence[TrialGroup], started: Sequence[TrialProgress], search: SearchConfig
) -> dict[str, Any]:
    """Forecast the epochs that a stage has left.

    Args:
        groups: all groups of the stage, as if no trial had ended.

    Returns:
        ``trials`` of the stage in all, ``epochs`` trained, ``left``: expected epochs to train, and
        ``is_bound``: no trial has ended and the pruner has no rule, so ``left`` is the maximum.
    """
    ended = [trial.epochs for trial in started if trial.has_ended and not trial.is_control]
    running = [trial.epochs for trial in started if not (trial.has_ended or trial.is_control)]
    left = sum(group.max_epochs for group in groups if not group.can_be_pruned)
    left -= sum(t.budget if t.has_ended else t.epochs for t in started if t.is_control)
    searched = groups[-1]
    shares = _shares(searched.budget, ended, running, search)
    not_started = max(searched.trials - len(ended) - len(running), 0)
    left_of_running = sum(shares[n:].sum() / shares[n] for n in running if n < len(shares))
    return {
        "trials": sum(group.trials for group in groups),
        "epochs": sum(trial.epochs for trial in started),
        "left": max(left, 0) + float(not_started * shares.sum() + left_of_running),
        "is_bound": not ended and not is_predictable(search),
    }


def _shares(
    budget: int, ended: Sequence[int], running: Sequence[int], search: SearchConfig
) -> NDArray[np.float64]:
    """Estimate the share of the searched trials that train each epoch, (budget,).

    The Kaplan-Meier estimate: of the trials that reach an epoch, running ones included, some end
    there. A mean over ended trials would be biased, since short trials end first.
    """
    epochs = np.arange(1, budget)
    ended_at = (np.array(ended)[:, None] == epochs).sum(axis=0, dtype=float)
    reached = (np.array([*ended, *running])[:, None] >= epochs).sum(axis=0, dtype=float)
    if is_predictable(search):
        rule = np.array(expected_epochs(budget, search))
        ended_at -= RULE_WEIGHT * np.diff(rule)
        reached += RULE_WEIGHT * rule[:-1]
    stay = 1 - np.divide(ended_at, reached, out=np.zeros_like(ended_at), where=reached > 0)
    return np.cumprod([1.0, *stay])[:budget]
