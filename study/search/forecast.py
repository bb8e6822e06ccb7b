"""How many epochs the trials of a study will take: before it begins, and while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from study.config.schema import STAGED, PlanConfig, SearchConfig
from study.search.controls import CONTROLS
from study.search.staged import num_distill_trials

RULE = 2.0
"""As many trials are what the pruner's rule counts for beside those that were seen."""


def is_predictable(search: SearchConfig) -> bool:
    """Whether the pruner's rule alone says how many trials it leaves.

    The others compare with what earlier trials reached.
    """
    return search.pruner in ("successive_halving", "none")


def expected_epochs(budget: int, search: SearchConfig) -> list[float]:
    """The share of the searched trials that train each epoch, from the first on.

    Successive halving lets one in ``reduction_factor`` past each rung, once there are many
    trials; the first ones it lets all through. A pruner that is not foreseen is taken to let all
    through.
    """
    shares, share, rung = [], 1.0, search.min_epochs
    for epoch in range(1, budget + 1):
        shares.append(share)
        if search.pruner == "successive_halving" and epoch == rung:
            share, rung = share / search.reduction_factor, rung * search.reduction_factor
    return shares


class TrialGroup(NamedTuple):
    """Trials that are still to run and are alike in how long they train."""

    trials: int
    distill_epochs: int
    refine_epochs: int
    can_be_pruned: bool

    @property
    def budget(self) -> int:
        """Epochs of a trial that is not pruned."""
        return self.distill_epochs + self.refine_epochs

    @property
    def most(self) -> int:
        """Epochs, if none is pruned."""
        return self.trials * self.budget

    def shares(self, search: SearchConfig) -> list[float]:
        """The share of the trials that train each epoch."""
        return expected_epochs(self.budget, search) if self.can_be_pruned else [1.0] * self.budget


class StageEpochs(NamedTuple):
    """Epochs that a trial has in each stage."""

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
    """The trials of each stage that are still to run, those that can be pruned last.

    Plan joint has one stage, plan staged the students and then the refiners.

    Args:
        trials: of the whole study.
        finished: how many of them are over.
        handed_over: how many students there are, if no more are to come.
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
            left, known = max(number - finished, 0), max(controls - finished, 0)
            known = min(known, left)
            groups[-1].append(TrialGroup(known, first, second, can_be_pruned=False))
            groups[-1].append(TrialGroup(left - known, first, second, can_be_pruned=True))
            finished = max(finished - number, 0)
    return groups


class TrialProgress(NamedTuple):
    """A trial that was begun."""

    epochs: int
    budget: int
    has_ended: bool
    is_control: bool


def ahead(
    groups: Sequence[TrialGroup], seen: Sequence[TrialProgress], search: SearchConfig
) -> dict[str, Any]:
    """What is done of a stage and what is to come, as the display shows it.

    Args:
        groups: the stage's, of a study of which nothing is finished.

    Returns:
        ``trials`` of the stage in all, ``epochs`` done, those that are ``left`` by what the trials
        that were seen and the pruner's rule let expect, and ``is_bound``: nothing lets expect
        anything yet, so that ``left`` is the most there may be.
    """
    ended = [trial.epochs for trial in seen if trial.has_ended and not trial.is_control]
    running = [trial.epochs for trial in seen if not (trial.has_ended or trial.is_control)]
    left = sum(group.most for group in groups if not group.can_be_pruned)
    left -= sum(t.budget if t.has_ended else t.epochs for t in seen if t.is_control)
    searched = groups[-1]
    shares = _shares(searched.budget, ended, running, search)
    to_come = max(searched.trials - len(ended) - len(running), 0) * shares.sum()
    under_way = sum(shares[n:].sum() / shares[n] for n in running if n < len(shares))
    return {
        "trials": sum(group.trials for group in groups),
        "epochs": sum(trial.epochs for trial in seen),
        "left": max(left, 0) + float(to_come + under_way),
        "is_bound": not ended and not is_predictable(search),
    }


def _shares(
    budget: int, ended: Sequence[int], running: Sequence[int], search: SearchConfig
) -> NDArray[np.float64]:
    """The share of the searched trials that train each epoch, (budget,).

    Kaplan and Meier's estimate: of all that came to an epoch, running ones too, some ended there.
    A mean over those that ended would be one over the short ones, which end first.
    """
    epochs = np.arange(1, budget)
    gone = (np.array(ended)[:, None] == epochs).sum(axis=0, dtype=float)
    came = (np.array([*ended, *running])[:, None] >= epochs).sum(axis=0, dtype=float)
    if is_predictable(search):
        rule = np.array(expected_epochs(budget, search))
        gone -= RULE * np.diff(rule)
        came += RULE * rule[:-1]
    stays = 1 - np.divide(gone, came, out=np.zeros_like(gone), where=came > 0)
    return np.cumprod([1.0, *stays])[:budget]
