"""One Optuna study: what it asks for, what it is told, and how its trials end.

Plan ``joint`` has one, plan ``staged`` two in one journal: in one study the stages would share
rungs, and refiners start at their parents' AP. Trials are known by their number in the whole
study, reports by their epoch in it; in Optuna both count from the stage's own beginning.
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
from optuna.storages.journal import JournalFileBackend
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
"""Attribute of the Optuna study of plan staged's stage 2: its parents, frozen."""


class WholeLines(JournalFileBackend):
    """Optuna's journal without a half line, which nobody could read once another followed it.

    A full disk leaves one, or a power cut.
    """

    def __init__(self, file: Path) -> None:
        super().__init__(str(file))
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
    """The Optuna studies in a study's folder; this process must be the only one that has them."""
    return JournalStorage(WholeLines(journal_file(folder)))


def open_study(
    folder: Path,
    name: str,
    objectives: Sequence[str] = (AP,),
    journal: BaseStorage | None = None,
) -> optuna.Study:
    """An Optuna study in a study's folder, new if it is not there yet."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = journal or open_journal(folder)
    study = optuna.create_study(
        study_name=name,
        storage=storage,
        load_if_exists=True,
        directions=["maximize" if name == AP else "minimize" for name in objectives],
    )
    return study if len(objectives) == 1 else SeveralObjectives(name, storage)


def second_study_of(name: str) -> str:
    """What the Optuna study of plan staged's stage 2 is called."""
    return f"{name}/refine"


def trials_handed_over(folder: Path, name: str) -> int | None:
    """How many trials of plan staged came before its stage 2; None if there was no hand-over yet.

    It only reads, so a study that runs is not disturbed, nor a line that it is just writing.
    """
    if not journal_file(folder).is_file():
        return None
    journal = JournalStorage(JournalFileBackend(str(journal_file(folder))))
    try:
        study = optuna.load_study(study_name=second_study_of(name), storage=journal)
    except KeyError:
        return None
    frozen = study.user_attrs.get(HANDED_OVER)
    return None if frozen is None else int(frozen["first_number"])


@dataclass(frozen=True)
class Parent:
    """A student that refiners start from."""

    trial: int
    values: Mapping[str, Any]
    """What it had of its own, by config path."""


class StageSearch:
    """One Optuna study and the trials that are its own.

    Known trials of older studies come first in the Optuna study and have no number here.

    Args:
        controls: the values of known configs, by name, that are tried first.
        fixed: what every trial has by config path, whatever it is asked to try.
        first_number: how many trials of the whole study came before this stage.
        first_epoch: epochs that a trial of this stage had been trained for before it began.
        parents: where the trials of this stage start from, the best one first; empty if from
            nothing.
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
        self.by_ap = by_ap(study, build_pruner(config.search, self._budget(fixed)))
        self.num_known = sum(
            WARM_FROM in trial.user_attrs for trial in study.get_trials(deepcopy=False)
        )
        self._enqueue_controls()

    def trials(self) -> list[FrozenTrial]:
        """The stage's own, by number."""
        return self.study.get_trials(deepcopy=False)[self.num_known :]

    def number(self, trial: FrozenTrial | optuna.Trial) -> int:
        return self.first_number + trial.number - self.num_known

    def frozen(self, number: int) -> FrozenTrial:
        # Looked up alone: a list of all trials for each report is what long searches would pay.
        storage, place = self.study._storage, number - self.first_number + self.num_known
        id_ = storage.get_trial_id_from_study_id_trial_number(self.study._study_id, place)
        return storage.get_trial(id_)

    def note(self, number: int, key: str, value: Any) -> None:
        """Keeps an attribute of the trial."""
        self.study._storage.set_trial_user_attr(self.frozen(number)._trial_id, key, value)

    def num_finished(self) -> int:
        return sum(trial.state.is_finished() for trial in self.trials())

    def parent_of(self, trial: FrozenTrial) -> Parent | None:
        """Where the trial starts from; None if from nothing."""
        return self.parents[trial.params[PARENT]] if PARENT in trial.params else None

    def asked_by(self, asker: str) -> int | None:
        """The trial that this one asked for; None if it has not asked yet."""
        known = (t for t in self.trials() if t.user_attrs.get("asker") == asker)
        return next(map(self.number, known), None)

    def orphaned(self, session: str) -> list[int]:
        """The trials that were running when the driver of an earlier session died."""
        return [
            self.number(trial)
            for trial in self.trials()
            if trial.state == TrialState.RUNNING
            and not trial.user_attrs.get("asker", "").startswith(f"{session}/")
        ]

    def new_trial(self) -> int:
        """The next trial, known configs first."""
        self.study.sampler = self._sampler(
            self.first_number + sum(t.state != TrialState.WAITING for t in self.trials())
        )
        return self.number(self.study.ask())

    def suggestion(self, number: int) -> dict[str, Any]:
        """The trial's number, values and parent (null if it has none); the same when asked again.

        Values are by config path.
        """
        self.study.sampler = self._sampler(number)
        trial = optuna.trial.Trial(self.study, self.frozen(number)._trial_id)
        own = {**self.fixed, **trial.user_attrs.get("values", {})}
        parent = None
        if self.parents:
            parent = self.parents[trial.suggest_int(PARENT, 0, len(self.parents) - 1)]
            own = {**parent.values, **own}
        defaults = {**flatten(to_plain(self.config)), **own}
        values = {**self.space.suggest(trial, defaults), **own}
        values.pop(PARENT, None)
        if "started" not in trial.user_attrs:
            self.note(number, "budget", self._budget(values))
            self.note(number, "started", time.time())
        return {"number": number, "values": values, "parent": parent and parent.trial}

    def report(self, number: int, row: Row) -> TrialState | None:
        """Records an epoch; returns how the trial is to end now, None if it is to go on.

        The first value of an epoch stands.
        """
        frozen = self.frozen(number)
        epoch, value = int(row["epoch"]) - self.first_epoch, float(row["val_ap"])
        trial = optuna.trial.Trial(self.by_ap, frozen._trial_id)
        if epoch not in frozen.intermediate_values:
            trial.report(value, epoch)
        if epoch >= frozen.user_attrs["budget"]:
            return TrialState.COMPLETE
        # Asked of controls too, so that the others are measured against them.
        if trial.should_prune() and "control" not in frozen.user_attrs:
            return TrialState.PRUNED
        return None

    def report_costs(self, number: int, costs: Mapping[str, float]) -> None:
        """Records what the trial's estimator costs, before its first epoch; the first stand."""
        frozen = self.frozen(number)
        limits = vars(self.config.search.constraints)
        trial = optuna.trial.Trial(self.by_ap, frozen._trial_id)
        for name, excess in violations(limits, dict(costs)).items():
            if name not in frozen.constraints:
                trial.set_constraint(name, excess)
        for name in COSTS:
            if name not in frozen.user_attrs:
                self.note(number, name, costs[name])

    def tell(self, number: int, state: TrialState) -> None:
        """Ends the trial: its objective is the best epoch's AP, or of a pruned one the last's."""
        trial = self.frozen(number)
        curve = trial.intermediate_values
        costs = [trial.user_attrs[name] for name in self.config.search.objectives[1:]]
        if state == TrialState.PRUNED and costs:
            tell_pruned(self.study, trial._trial_id, [curve[max(curve)], *costs])
        else:
            values = [max(curve.values()), *costs] if state == TrialState.COMPLETE else None
            self.study.tell(trial.number, values, state=state)

    def epochs_of(self, number: int) -> set[int]:
        """The epochs, counted in the whole study, that were reported."""
        return {self.first_epoch + epoch for epoch in self.frozen(number).intermediate_values}

    def _enqueue_controls(self) -> None:
        known = {trial.user_attrs.get("control") for trial in self.trials()}
        for control, values in self.controls.items():
            if control not in known:
                start = self.parents[0].values if self.parents else {}
                config = with_values(self.config, {**start, **self.fixed, **values})
                params = self.space.values_in({PARENT: 0, **flatten(to_plain(config))})
                attrs = {"control": control, "values": dict(values)}
                self.study.enqueue_trial(params, user_attrs=attrs)

    def _sampler(self, number: int) -> BaseSampler:
        point = number - self.first_number - len(self.controls)
        return build_sampler(
            self.config.search, self.config.seed, self.space, number, max(point, 0)
        )

    def _budget(self, values: Mapping[str, Any]) -> int:
        """The epochs that a trial of these values has in this stage."""
        epochs = (values.get(path, value_at(self.config, path)) for path in EPOCHS)
        return sum(epochs) - self.first_epoch


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
