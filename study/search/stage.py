"""The Optuna study of one stage: suggests trials, records their epochs, prunes and ends them.

plan=joint has one stage; plan=staged has two, each with an Optuna study in the same journal: a
single one would compare students with refiners, which start at their parents' AP. Numbers of
trials and epochs count over the whole study here, and from the stage's beginning in Optuna.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.pruners import BasePruner, NopPruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from search_spaces.space import SearchSpace
from study.config.compose import flatten, to_plain, value_at, with_values
from study.config.schema import AP, COSTS, StudyConfig
from study.search.objectives import violations
from study.search.samplers import build_pruner, build_sampler
from study.search.staged import PARENT
from study.search.warm_start import WARM_FROM
from study.storage.checkpoint import Row
from study.storage.paths import journal_file

EPOCHS = ("distill.epochs", "refine.epochs")
HANDED_OVER = "handed_over"
"""Attribute of the refiners' Optuna study: the students that were chosen as parents."""
REQUESTER = "asker"
"""User attribute of a trial: the session and Tune trial that requested it."""


class TruncatingJournal(JournalFileBackend):
    """Journal backend that truncates a partial last line before appending.

    A full disk or a power cut leaves such a line; Optuna could not read what is appended to it.
    """

    def __init__(self, file: Path) -> None:
        # Optuna's default lock is a symbolic link, which exFAT and many network disks lack.
        super().__init__(str(file), JournalFileOpenLock(str(file)))
        self.file = file
        text = file.read_bytes()
        os.truncate(file, text.rfind(b"\n") + 1)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        length = self.file.stat().st_size
        try:
            super().append_logs(logs)
        except OSError:
            os.truncate(self.file, length)
            raise


def open_journal(folder: Path) -> BaseStorage:
    """Open the storage of a study's Optuna studies; only one process may have it open."""
    return JournalStorage(TruncatingJournal(journal_file(folder)))


def open_study(
    folder: Path,
    name: str,
    objectives: Sequence[str] = (AP,),
    journal: BaseStorage | None = None,
) -> optuna.Study:
    """Load an Optuna study from a study's folder, or create it."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = journal or open_journal(folder)
    study = optuna.create_study(
        study_name=name,
        storage=storage,
        load_if_exists=True,
        directions=["maximize" if name == AP else "minimize" for name in objectives],
    )
    return study if len(objectives) == 1 else MultiObjectiveStudy(name, storage)


def refiners_study_name(name: str) -> str:
    """Return the name of the Optuna study of the refiners of plan=staged."""
    return f"{name}/refine"


def trials_handed_over(folder: Path, name: str) -> int | None:
    """Count the students of plan=staged if they were handed over to stage 2, or return None.

    Only reads: a running study, or a line that it is writing, is not disturbed.
    """
    if not journal_file(folder).is_file():
        return None
    journal = JournalStorage(JournalFileBackend(str(journal_file(folder))))
    try:
        study = optuna.load_study(study_name=refiners_study_name(name), storage=journal)
    except KeyError:
        return None
    frozen = study.user_attrs.get(HANDED_OVER)
    return None if frozen is None else int(frozen["first_number"])


@dataclass(frozen=True)
class Parent:
    """A student that refiners start from."""

    trial: int
    values: Mapping[str, Any]
    """Its values by config path."""


class StageSearch:
    """The search of one stage, on an Optuna study.

    Known trials of older studies come first in the Optuna study and have no number here.

    Args:
        controls: values of the control trials by name; they are tried first.
        fixed: values of all trials by config path.
        first_number: number of the stage's first trial in the whole study.
        first_epoch: epochs that were trained before a trial of this stage begins.
        parents: students that the trials start from, by descending AP; empty in stage 1.
    """

    def __init__(
        self,
        study: optuna.Study,
        config: StudyConfig,
        space: SearchSpace,
        *,
        controls: Mapping[str, Mapping[str, Any]],
        fixed: Mapping[str, Any],
        first_number: int = 0,
        first_epoch: int = 0,
        parents: Sequence[Parent] = (),
    ) -> None:
        self.study = study
        self.config = config
        self.space = space
        self.controls = controls
        self.fixed = fixed
        self.first_number = first_number
        self.first_epoch = first_epoch
        self.parents = parents
        self.ap_study = ap_only(study, build_pruner(config.search, self._budget(fixed)))
        self.num_known = sum(
            WARM_FROM in trial.user_attrs for trial in study.get_trials(deepcopy=False)
        )
        self._enqueue_controls()

    def trials(self) -> list[FrozenTrial]:
        """Return the stage's trials by number, without the known ones."""
        return self.study.get_trials(deepcopy=False)[self.num_known :]

    def number(self, trial: FrozenTrial | optuna.Trial) -> int:
        """Return the trial's number in the whole study."""
        return self.first_number + trial.number - self.num_known

    def frozen(self, number: int) -> FrozenTrial:
        """Return Optuna's record of a trial."""
        # One look-up: listing all trials at each report would slow down long searches.
        storage, optuna_number = self.study._storage, number - self.first_number + self.num_known
        id_ = storage.get_trial_id_from_study_id_trial_number(self.study._study_id, optuna_number)
        return storage.get_trial(id_)

    def set_attribute(self, number: int, key: str, value: Any) -> None:
        """Set a user attribute of the trial."""
        self.study._storage.set_trial_user_attr(self.frozen(number)._trial_id, key, value)

    def num_finished(self) -> int:
        """Count the trials that ended, in whatever state."""
        return sum(trial.state.is_finished() for trial in self.trials())

    def parent_of(self, trial: FrozenTrial) -> Parent | None:
        """Return the student that the trial starts from, or None."""
        return self.parents[trial.params[PARENT]] if PARENT in trial.params else None

    def requested_by(self, requester: str) -> int | None:
        """Return the number of the trial that was given to a requester, or None."""
        known = (t for t in self.trials() if t.user_attrs.get(REQUESTER) == requester)
        return next(map(self.number, known), None)

    def orphaned(self, session: str) -> list[int]:
        """Return the trials that were running when the driver of an earlier session died."""
        return [
            self.number(trial)
            for trial in self.trials()
            if trial.state == TrialState.RUNNING
            and not trial.user_attrs.get(REQUESTER, "").startswith(f"{session}/")
        ]

    def new_trial(self) -> int:
        """Create the next trial, controls first, and return its number."""
        self.study.sampler = self._sampler(
            self.first_number + sum(t.state != TrialState.WAITING for t in self.trials())
        )
        return self.number(self.study.ask())

    def suggestion(self, number: int) -> dict[str, Any]:
        """Return a trial's ``number``, ``values`` by config path, and ``parent`` (number or None).

        Every call for the same trial returns the same.
        """
        self.study.sampler = self._sampler(number)
        trial = optuna.trial.Trial(self.study, self.frozen(number)._trial_id)
        own = dict(self.fixed) | trial.user_attrs.get("values", {})
        parent = None
        if self.parents:
            parent = self.parents[trial.suggest_int(PARENT, 0, len(self.parents) - 1)]
            own = dict(parent.values) | own
        defaults = flatten(to_plain(self.config)) | own
        values = self.space.suggest(trial, defaults) | own
        values.pop(PARENT, None)
        if "started" not in trial.user_attrs:
            self.set_attribute(number, "budget", self._budget(values))
            self.set_attribute(number, "started", time.time())
        return {"number": number, "values": values, "parent": parent.trial if parent else None}

    def record(self, number: int, row: Row) -> TrialState | None:
        """Record an epoch's AP; return the state to end the trial in, or None to continue.

        A second value of the same epoch is ignored.
        """
        frozen = self.frozen(number)
        epoch, value = int(row["epoch"]) - self.first_epoch, float(row["val_ap"])
        trial = optuna.trial.Trial(self.ap_study, frozen._trial_id)
        if epoch not in frozen.intermediate_values:
            trial.report(value, epoch)
        if epoch >= frozen.user_attrs["budget"]:
            return TrialState.COMPLETE
        # Called for controls too, so that the pruner compares other trials with them.
        if trial.should_prune() and "control" not in frozen.user_attrs:
            return TrialState.PRUNED
        return None

    def record_costs(self, number: int, costs: Mapping[str, float]) -> None:
        """Record the costs of the trial's estimator; costs recorded earlier stay."""
        frozen = self.frozen(number)
        limits = vars(self.config.search.constraints)
        trial = optuna.trial.Trial(self.ap_study, frozen._trial_id)
        for name, excess in violations(limits, dict(costs)).items():
            if name not in frozen.constraints:
                trial.set_constraint(name, excess)
        for name in COSTS:
            if name not in frozen.user_attrs:
                self.set_attribute(number, name, costs[name])

    def end_trial(self, number: int, state: TrialState) -> None:
        """End the trial; its objective is the best epoch's AP, of a pruned trial the last's."""
        trial = self.frozen(number)
        curve = trial.intermediate_values
        costs = [trial.user_attrs[name] for name in self.config.search.objectives[1:]]
        if state == TrialState.PRUNED and costs:
            end_pruned(self.study, trial._trial_id, [curve[max(curve)], *costs])
        else:
            values = [max(curve.values()), *costs] if state == TrialState.COMPLETE else None
            self.study.tell(trial.number, values, state=state)

    def epochs_of(self, number: int) -> set[int]:
        """Return the recorded epochs of a trial, counted over both stages."""
        return {self.first_epoch + epoch for epoch in self.frozen(number).intermediate_values}

    def _enqueue_controls(self) -> None:
        known = {trial.user_attrs.get("control") for trial in self.trials()}
        for control, values in self.controls.items():
            if control not in known:
                start = self.parents[0].values if self.parents else {}
                config = with_values(self.config, {**start, **self.fixed, **values})
                params = self.space.values_in({PARENT: 0, **flatten(to_plain(config))})
                attributes = {"control": control, "values": dict(values)}
                self.study.enqueue_trial(params, user_attrs=attributes)

    def _sampler(self, number: int) -> BaseSampler:
        point = number - self.first_number - len(self.controls)
        return build_sampler(
            self.config.search, self.config.seed, self.space, number, max(point, 0)
        )

    def _budget(self, values: Mapping[str, Any]) -> int:
        """Return the epochs of a trial with these values in this stage."""
        epochs = (values.get(path, value_at(self.config, path)) for path in EPOCHS)
        return sum(epochs) - self.first_epoch


class MultiObjectiveStudy(optuna.Study):
    """A study of several objectives whose trials report a curve of AP."""

    @property
    def direction(self) -> StudyDirection:
        """Direction of the AP curves, by which TPE ranks pruned trials."""
        return StudyDirection.MAXIMIZE


class _ApOnlyStorage:
    """A storage that declares AP as the only objective, and otherwise delegates."""

    def __init__(self, storage: Any) -> None:
        self._storage = storage

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        return [StudyDirection.MAXIMIZE]


def ap_only(study: optuna.Study, pruner: BasePruner) -> optuna.Study:
    """Return the study with AP as its only objective: Optuna prunes no multi-objective study."""
    if len(study.directions) == 1:
        study.pruner = pruner
        return study
    study.pruner = NopPruner()
    storage: Any = _ApOnlyStorage(study._storage)
    return optuna.Study(study_name=study.study_name, storage=storage, pruner=pruner)


def end_pruned(study: optuna.Study, trial_id: int, values: list[float]) -> None:
    """End a trial of several objectives as pruned, with its last AP and its costs as values.

    Optuna does so for one objective. For several it would store no values, which TPE needs.
    """
    study._storage.set_trial_state_values(trial_id, TrialState.PRUNED, values)
    study._thread_local.cached_all_trials = None
