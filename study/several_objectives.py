"""Pruning by AP in a study of several objectives, which Optuna refuses.

Curves and rungs stay in the study's own trials, so that they survive a restart: ``by_ap`` is the
same study as it would look with AP for its only objective, and a ``SeveralObjectives`` lets
samplers read what was left there.
"""

from __future__ import annotations

from typing import Any

import optuna
from optuna.pruners import BasePruner, NopPruner
from optuna.study import StudyDirection
from optuna.trial import TrialState


class SeveralObjectives(optuna.Study):
    """A study of several objectives whose trials have curves, of AP."""

    @property
    def direction(self) -> StudyDirection:
        """That of the curves; TPE asks for it to rank the pruned trials."""
        return StudyDirection.MAXIMIZE


class _ApAlone:
    """A storage that names AP as the only objective; everything else is the true one's."""

    def __init__(self, storage: Any) -> None:
        self._storage = storage

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        return [StudyDirection.MAXIMIZE]


def by_ap(study: optuna.Study, pruner: BasePruner) -> optuna.Study:
    """The study that trials report to and are pruned in: the same, of one objective."""
    if len(study.directions) == 1:
        study.pruner = pruner
        return study
    study.pruner = NopPruner()
    storage: Any = _ApAlone(study._storage)
    return optuna.Study(study_name=study.study_name, storage=storage, pruner=pruner)


def tell_pruned(study: optuna.Study, trial_id: int, values: list[float]) -> None:
    """Ends the trial as pruned, with its last AP and its costs for values.

    Of one objective Optuna does the same; of several it would leave none, and TPE can't do
    without.
    """
    study._storage.set_trial_state_values(trial_id, TrialState.PRUNED, values)
    study._thread_local.cached_all_trials = None
