"""The Optuna study: asks for trials, takes their reports, prunes and ends them.

One process, a named Ray actor, owns the study and its tables; nobody else touches them. It
decides, in one call, what a report leads to: go on, complete or prune. Every method may be called
twice with the same arguments, so that a caller who was cut off simply asks again.
"""

from __future__ import annotations

import datetime
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
import ray
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search import Searcher

from search_spaces.space import SearchSpace
from study import faults
from study.checkpoint import Checkpoints, best_row, trial_folder
from study.config import flatten, to_plain, with_values
from study.hanging import hang_in
from study.loop import Row, seed_of
from study.objectives import AP, COSTS, violations
from study.results import tidy, write_running, write_teacher, write_trial, written_trials
from study.samplers import build_pruner, build_sampler, sampler_notes
from study.schema import StudyConfig
from study.settings import BASELINE, DEFAULTS, baseline_values
from study.several_objectives import SeveralObjectives, by_ap, tell_pruned
from study.warm_start import WARM_FROM, enter_known_trials

JOURNAL = "optuna.journal"
FLUSH_S = 30.0
"""Seconds between two writings of a running trial's rows."""
EPOCHS = ("distill.epochs", "refine.epochs")
STATES = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
"""How a trial ends."""


def open_study(folder: Path, name: str, objectives: Sequence[str] = (AP,)) -> optuna.Study:
    """The Optuna study in a study's folder; this process must be the only one that has it open."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
    study = optuna.create_study(
        study_name=name,
        storage=storage,
        load_if_exists=True,
        directions=["maximize" if name == AP else "minimize" for name in objectives],
    )
    return study if len(objectives) == 1 else SeveralObjectives(name, storage)


class StudyOwner:
    """The only process that touches the Optuna study and writes its tables.

    Known trials of older studies come first in the Optuna study and have no number here: the
    study's own are counted from 0.

    Args:
        session: names this run of the driver. A running trial of another session was left over
            when its driver died; one of this session is alive, though the owner may have died.
    """

    def __init__(
        self, folder: str, config: StudyConfig, space_json: str, session: str, launcher: str
    ) -> None:
        self.folder = Path(folder)
        self.config = config
        self.space = SearchSpace.from_json(space_json)
        self.session = session
        self.launcher = launcher
        self.study = open_study(self.folder, config.name, config.search.objectives)
        self.by_ap = by_ap(self.study, build_pruner(config))
        self.remarks = [*sampler_notes(config, self.space)]
        self.remarks += enter_known_trials(self.study, config, self.folder, self.space)
        self.num_known = sum(
            WARM_FROM in trial.user_attrs for trial in self.study.get_trials(deepcopy=False)
        )
        self.teacher_rows: list[Row] = []
        self.flushed: dict[int, float] = {}
        tidy(self.folder)
        self._enqueue_controls()
        self.mend_tables()
        self.left_over = [
            self._number(trial)
            for trial in self._trials()
            if trial.state == TrialState.RUNNING
            and not trial.user_attrs.get("asker", "").startswith(f"{session}/")
        ]

    def ask(self, tune_id: str) -> dict[str, Any]:
        """A trial to run, by number and values: one left over first, so that its work goes on.

        The same ``tune_id`` gets the same trial.
        """
        asker = f"{self.session}/{tune_id}"
        known = [self._number(t) for t in self._trials() if t.user_attrs.get("asker") == asker]
        if known:
            return self._suggestion(known[0])
        number = self.left_over.pop(0) if self.left_over else self._new_trial()
        suggestion = self._suggestion(number)
        faults.point("asked")
        self._set(number, "asker", asker)
        return suggestion

    def report(self, number: int, row: Row) -> bool:
        """Records an epoch and ends the trial if this decides it; returns whether it is to stop.

        The first value of an epoch stands; a finished trial is told to stop.
        """
        frozen = self._frozen(number)
        if frozen.state.is_finished():
            return True
        epoch, value = int(row["epoch"]), float(row["val_ap"])
        trial = optuna.trial.Trial(self.by_ap, frozen._trial_id)
        if epoch not in frozen.intermediate_values:
            trial.report(value, epoch)
        if epoch >= frozen.user_attrs["budget"]:
            self._end(number, TrialState.COMPLETE)
            return True
        # Asked of controls too, so that the others are measured against them.
        if trial.should_prune() and "control" not in frozen.user_attrs:
            self._end(number, TrialState.PRUNED)
            return True
        self._flush(number)
        return False

    def report_costs(self, number: int, costs: dict[str, float]) -> None:
        """Records what the trial's estimator costs, before its first epoch; the first stand."""
        frozen = self._frozen(number)
        limits = vars(self.config.search.constraints)
        trial = optuna.trial.Trial(self.by_ap, frozen._trial_id)
        for name, excess in violations(limits, costs).items():
            if name not in frozen.constraints:
                trial.set_constraint(name, excess)
        for name in COSTS:
            if name not in frozen.user_attrs:
                self._set(number, name, costs[name])

    def notes(self) -> list[str]:
        """What the user is to know of how this study searches, a line each."""
        return self.remarks

    def fail(self, number: int, reason: str) -> None:
        """Ends the trial as failed, unless it has ended already."""
        if not self._frozen(number).state.is_finished():
            known = hang_in(trial_folder(self.folder, number))
            known = known or self._frozen(number).user_attrs.get("error")
            self._set(number, "error", known or reason)
            self._end(number, TrialState.FAIL)

    def note_error(self, number: int, error: str) -> None:
        """Keeps why a try of the trial broke; another try may follow."""
        self._set(number, "error", error)

    def report_teacher(self, row: Row) -> None:
        """Records an epoch of the teacher's training."""
        if row["epoch"] not in {known["epoch"] for known in self.teacher_rows}:
            self.teacher_rows.append(row)
            rows = [{"study": self.config.name, **known} for known in self.teacher_rows]
            write_teacher(self.folder, rows, self.space)

    def num_finished(self) -> int:
        return sum(trial.state.is_finished() for trial in self._trials())

    def status(self) -> dict[str, Any]:
        """What the display shows: trials by state, the best, the controls, epochs, the teacher."""
        trials = self._trials()
        best = best_trial(trials)
        running = [
            {
                "trial": self._number(trial),
                "epoch": max(trial.intermediate_values, default=0),
                "budget": trial.user_attrs.get("budget", 0),
                "ap": max(trial.intermediate_values.values(), default=None),
            }
            for trial in trials
            if trial.state == TrialState.RUNNING
        ]
        return {
            "states": {state.name: sum(t.state == state for t in trials) for state in STATES},
            "running": running,
            "best": None if best is None else {"trial": self._number(best), "ap": best.values[0]},
            "baseline": next(
                (
                    t.values[0]
                    for t in trials
                    if t.values and t.user_attrs.get("control") == BASELINE
                ),
                None,
            ),
            "epochs": sum(len(trial.intermediate_values) for trial in trials),
            "errors": {
                self._number(t): t.user_attrs.get("error")
                for t in trials
                if t.state == TrialState.FAIL
            },
            "teacher": self.teacher_rows[-1] if self.teacher_rows else None,
        }

    def _trials(self) -> list[FrozenTrial]:
        """The study's own, by number."""
        return self.study.get_trials(deepcopy=False)[self.num_known :]

    def _number(self, trial: FrozenTrial | optuna.Trial) -> int:
        return trial.number - self.num_known

    def _frozen(self, number: int) -> FrozenTrial:
        return self._trials()[number]

    def _set(self, number: int, key: str, value: Any) -> None:
        self.study._storage.set_trial_user_attr(self._frozen(number)._trial_id, key, value)

    def _enqueue_controls(self) -> None:
        known = {trial.user_attrs.get("control") for trial in self._trials()}
        for control, values in (
            (BASELINE, baseline_values(self.config)),
            (DEFAULTS, {}),
        ):
            if control not in known:
                config = flatten(to_plain(with_values(self.config, values)))
                params = self.space.values_in(config)
                attrs = {"control": control, "values": values}
                self.study.enqueue_trial(params, user_attrs=attrs)

    def _new_trial(self) -> int:
        number = sum(trial.state != TrialState.WAITING for trial in self._trials())
        self.study.sampler = build_sampler(self.config, self.space, number)
        return self._number(self.study.ask())

    def _suggestion(self, number: int) -> dict[str, Any]:
        """The trial's number and values; asking again gives the same."""
        self.study.sampler = build_sampler(self.config, self.space, number)
        frozen = self._frozen(number)
        trial = optuna.trial.Trial(self.study, frozen._trial_id)
        fixed = frozen.user_attrs.get("values", {})
        defaults = {**flatten(to_plain(self.config)), **fixed}
        values = {**self.space.suggest(trial, defaults), **fixed}
        if "started" not in frozen.user_attrs:
            epochs = [values.get(path, defaults[path]) for path in EPOCHS]
            self._set(number, "budget", sum(epochs))
            self._set(number, "started", time.time())
        return {"number": number, "values": values}

    def _end(self, number: int, state: TrialState) -> None:
        trial = self._frozen(number)
        curve = trial.intermediate_values
        costs = [trial.user_attrs[name] for name in self.config.search.objectives[1:]]
        if state == TrialState.PRUNED and costs:
            tell_pruned(self.study, trial._trial_id, [curve[max(curve)], *costs])
        else:
            values = [max(curve.values()), *costs] if state == TrialState.COMPLETE else None
            self.study.tell(trial.number, values, state=state)
        self._write(number)

    def _write(self, number: int) -> None:
        rows = self._rows(number)
        write_trial(self.folder, self._trial_row(number, rows), rows, self.space)

    def mend_tables(self) -> None:
        """Writes the trials that Optuna knows as finished and the tables do not."""
        written = written_trials(self.folder)
        for trial in self._trials():
            number = self._number(trial)
            if trial.state.is_finished() and number not in written:
                self._write(number)

    def _flush(self, number: int) -> None:
        now = time.monotonic()
        if now - self.flushed.setdefault(number, now) >= FLUSH_S:
            self.flushed[number] = now
            write_running(self.folder, number, self._rows(number), self.space)

    def _rows(self, number: int) -> list[Row]:
        """The trial's reports; its checkpoint has them all, since it comes before each report."""
        last = Checkpoints(trial_folder(self.folder, number)).last()
        known = self._frozen(number).intermediate_values
        rows = [row for row in (last.rows if last else []) if row["epoch"] in known]
        return [{"study": self.config.name, "trial": number, **row} for row in rows]

    def _trial_row(self, number: int, rows: list[Row]) -> Row:
        trial = self._frozen(number)
        started = datetime.datetime.fromtimestamp(trial.user_attrs["started"], datetime.UTC)
        seconds = rows[-1]["seconds"] if rows else 0.0
        settings = self.config.trial
        row: Row = {
            "study": self.config.name,
            "trial": number,
            "control": trial.user_attrs.get("control"),
            "state": trial.state.name,
            "error": trial.user_attrs.get("error") if trial.state == TrialState.FAIL else None,
            "seed": seed_of(self.config.seed, number),
            "epochs": len(rows),
            "objectives": ",".join(self.config.search.objectives),
            **{name: trial.user_attrs.get(name) for name in COSTS},
            "feasible": is_feasible(trial),
            "launcher": self.launcher,
            "started": started,
            "duration_s": seconds,
            "gpu_s": seconds * settings.gpus * settings.num_workers,
            "node": socket.gethostname(),
            **{f"params.{path}": value for path, value in trial.params.items()},
        }
        if rows:
            best = best_row(rows)
            path = Checkpoints(trial_folder(Path(), number)).path(best["epoch"])
            row |= {
                "objective": best["val_ap"],
                "best_epoch": best["epoch"],
                "best_stage": best["stage"],
                "checkpoint": str(path),
            }
        return row


class OwnerSearcher(Searcher):
    """What Tune sees of the study: suggestions, and an ear for trials that Tune gave up on."""

    def __init__(self, owner: Any) -> None:
        super().__init__(metric="val_ap", mode="max")
        self.owner = owner
        self.numbers: dict[str, int] = {}

    def suggest(self, trial_id: str) -> dict[str, Any]:
        suggestion = ray.get(self.owner.ask.remote(trial_id))
        self.numbers[trial_id] = suggestion["number"]
        assert isinstance(suggestion, dict)
        return suggestion

    def on_trial_complete(
        self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False
    ) -> None:
        if error:
            reason = "its process died again and again, without a word"
            ray.get(self.owner.fail.remote(self.numbers[trial_id], reason))

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study itself is durable."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the study itself is durable."""


def best_trial(trials: list[FrozenTrial]) -> FrozenTrial | None:
    """The complete trial of the highest AP that keeps to the constraints, the first of equals."""
    complete = [
        trial for trial in trials if trial.state == TrialState.COMPLETE and is_feasible(trial)
    ]
    return max(complete, key=lambda t: (t.values[0], -t.number), default=None)


def is_feasible(trial: FrozenTrial) -> bool:
    """Whether the trial keeps to all constraints that it was held against."""
    return all(excess <= 0 for excess in trial.constraints.values())
