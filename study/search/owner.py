"""The owner of a study: suggests trials, records their reports, prunes and ends them.

One process, a named Ray actor, is the only one that opens the Optuna studies and writes the
tables. A report is recorded and decided on (continue, complete or prune) in one call. All methods
are idempotent, so that a caller who lost an answer repeats the call.
"""

from __future__ import annotations

import contextlib
import datetime
import socket
import time
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from search_spaces.space import SearchSpace
from study.config.derived import Resolved, seed_of
from study.config.schema import COSTS, StudyConfig
from study.errors import InputError
from study.launch.watchdog import stall_reason
from study.search.controls import BASELINE, DEFAULTS, baseline_values
from study.search.forecast import StageEpochs, TrialProgress, forecast_stage, trial_groups
from study.search.samplers import sampler_messages
from study.search.stage import (
    HANDED_OVER,
    REQUESTER,
    Parent,
    StageSearch,
    open_journal,
    open_study,
    refiners_study_name,
)
from study.search.staged import (
    REFINE_PATHS,
    choose_parents,
    distill_space,
    num_distill_trials,
    refine_space,
)
from study.search.warm_start import add_known_trials
from study.storage import failpoints
from study.storage.checkpoint import Checkpoints, Row, best_row
from study.storage.paths import trial_folder
from study.storage.tables import (
    remove_leftovers,
    write_running,
    write_teacher,
    write_trial,
    written_trials,
)

FLUSH_S = 30.0
"""Seconds between two writes of a running trial's rows."""
STATES = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
"""States in which a trial ends."""


class StudyOwner:
    """The process that owns the Optuna studies and the study's tables.

    Args:
        session: id of this run of the driver. A running trial of another session is orphaned: its
            driver died. A running trial of this session is alive, even if the owner restarted.
    """

    def __init__(
        self, folder: str, config: StudyConfig, resolved: Resolved, space_json: str, session: str
    ) -> None:
        self.folder = Path(folder)
        self.config = config
        self.resolved = resolved
        self.space = SearchSpace.from_json(space_json)
        self.session = session
        self.journal = open_journal(self.folder)
        self._messages: list[str] = []
        self.stages = [self._first_stage()]
        if resolved.is_staged:
            self._open_second_stage()
        self.teacher_rows: list[Row] = []
        self.teacher: Row | None = None
        self.flushed: dict[int, float] = {}
        self._halt_reason: str | None = None
        remove_leftovers(self.folder)
        self.repair_tables()
        self.orphaned = self.stages[-1].orphaned(session)

    def trials_to_run(self) -> int:
        """Return how many trials to run next, all of one stage; 0 if the study has them all.

        With plan=staged, this chooses the parents once all students have ended.

        Raises:
            InputError: all students failed or were pruned.
        """
        if self.resolved.is_staged and len(self.stages) == 1:
            students = num_distill_trials(
                self.config.search.trials, self.config.plan.distill_share
            )
            if missing := students - self.stages[0].num_finished():
                return max(missing, 0)
            self._hand_over()
        return max(self.config.search.trials - self.num_finished(), 0)

    def suggest(self, tune_id: str) -> dict[str, Any] | None:
        """Return a trial to run (see ``StageSearch.suggestion``), or None if the study is halted.

        Orphaned trials are resumed first. The same ``tune_id`` gets the same trial.
        """
        if self._halt_reason is not None:
            return None
        stage, requester = self.stages[-1], f"{self.session}/{tune_id}"
        known = stage.requested_by(requester)
        if known is not None:
            return stage.suggestion(known)
        number = self.orphaned.pop(0) if self.orphaned else stage.new_trial()
        suggestion = stage.suggestion(number)
        failpoints.point("suggested")
        stage.set_attribute(number, REQUESTER, requester)
        return suggestion

    def hand_back(self, number: int) -> None:
        """Suggest a running trial again: its process died before it could start the trial."""
        stage = self._stage(number)
        if number not in self.orphaned and not stage.frozen(number).state.is_finished():
            stage.set_attribute(number, REQUESTER, "")
            self.orphaned.append(number)

    def report(self, number: int, row: Row) -> bool:
        """Record an epoch, end the trial if it is complete or pruned, and return whether to stop.

        A second report of the same epoch is ignored; a finished trial always stops.
        """
        stage = self._stage(number)
        if stage.frozen(number).state.is_finished():
            return True
        if state := stage.record(number, row):
            self._end(number, state)
            return True
        self._flush(number)
        return False

    def report_costs(self, number: int, costs: dict[str, float]) -> None:
        """Record the costs of the trial's estimator; costs recorded earlier stay."""
        self._stage(number).record_costs(number, costs)

    def has_costs(self, number: int) -> bool:
        """Return whether the costs are recorded, possibly by an earlier try of the trial."""
        recorded = self._stage(number).frozen(number).user_attrs
        return all(name in recorded for name in COSTS)

    def messages(self) -> list[str]:
        """Return lines for the user about the sampler's limits and the warm start."""
        return self._messages

    def halt(self, reason: str) -> None:
        """Suggest and fail no more trials; running ones are resumed with the study."""
        self._halt_reason = self._halt_reason or reason

    def halt_reason(self) -> str | None:
        """Return why the study was halted, or None."""
        return self._halt_reason

    def fail(self, number: int, reason: str) -> None:
        """End the trial as failed, unless it has ended or the study is halted.

        Args:
            reason: used if the trial neither stalled nor recorded an error.
        """
        trial = self._stage(number).frozen(number)
        if trial.state.is_finished() or self._halt_reason is not None:
            return
        stalled = stall_reason(trial_folder(self.folder, number))
        self.record_error(number, stalled or trial.user_attrs.get("error") or reason)
        self._end(number, TrialState.FAIL)

    def record_error(self, number: int, error: str) -> None:
        """Keep the error of one try of the trial; another try may follow."""
        self._stage(number).set_attribute(number, "error", error)

    def report_teacher(self, row: Row) -> None:
        """Record an epoch of the teacher's training, or the progress of its predictions."""
        self.teacher = row
        if row["epoch"] not in {earlier["epoch"] for earlier in self.teacher_rows}:
            self.teacher_rows.append(row)
            rows = [{"study": self.config.name, **earlier} for earlier in self.teacher_rows]
            write_teacher(self.folder, rows, self.space)

    def num_finished(self) -> int:
        """Count the trials that ended, in whatever state."""
        return sum(stage.num_finished() for stage in self.stages)

    def status(self) -> dict[str, Any]:
        """Return what the display shows."""
        trials = self._trials()
        best = max(
            (number for number, trial in trials.items() if may_be_best(trial)),
            key=lambda number: (trials[number].values[0], -number),
            default=None,
        )
        running = [
            {
                "trial": number,
                "epoch": max(trial.intermediate_values, default=0),
                "budget": trial.user_attrs.get("budget", 0),
                "ap": max(trial.intermediate_values.values(), default=None),
            }
            for number, trial in trials.items()
            if trial.state == TrialState.RUNNING
        ]
        ended = [t for t in trials.values() if t.values]
        baseline = [t.values[0] for t in ended if t.user_attrs.get("control") == BASELINE]
        return {
            "states": {s.name: sum(t.state == s for t in trials.values()) for s in STATES},
            "running": running,
            "best": None if best is None else {"trial": best, "ap": trials[best].values[0]},
            "baseline": baseline[0] if baseline else None,
            "stages": self._progress(),
            "errors": {
                number: trial.user_attrs.get("error")
                for number, trial in trials.items()
                if trial.state == TrialState.FAIL
            },
            "teacher": self.teacher,
        }

    def updates_since(self, ended: Container[int]) -> list[tuple[Row, list[Row]]]:
        """Return the row and the reports of every started trial except those in ``ended``."""
        updates = []
        for number, trial in self._trials().items():
            if number not in ended and "started" in trial.user_attrs:
                # A running trial may delete this checkpoint while we read it.
                with contextlib.suppress(FileNotFoundError):
                    rows = self._rows(number)
                    updates.append((self._trial_row(number, rows), rows))
        return updates

    def _progress(self) -> list[dict[str, Any]]:
        """Return the forecast of each stage, including one that has not begun."""
        handed_over = self.stages[1].first_number if len(self.stages) > 1 else None
        config = self.config
        planned = trial_groups(
            config.plan,
            config.search.trials,
            StageEpochs(config.distill.epochs, config.refine.epochs),
            handed_over=handed_over,
        )
        started = [[_progress_of(trial) for trial in stage.trials()] for stage in self.stages]
        started += [[]] * (len(planned) - len(started))
        return [
            forecast_stage(groups, trials, self.config.search)
            for groups, trials in zip(planned, started, strict=True)
        ]

    def _trials(self) -> dict[int, FrozenTrial]:
        """Return the study's trials by number, without those of older studies."""
        return {stage.number(trial): trial for stage in self.stages for trial in stage.trials()}

    def _stage(self, number: int) -> StageSearch:
        return next(stage for stage in reversed(self.stages) if number >= stage.first_number)

    def _first_stage(self) -> StageSearch:
        """Open the only stage of plan=joint, or the students' stage of plan=staged."""
        config, name, space = self.config, self.config.name, self.space
        fixed = {}
        if self.resolved.is_staged:
            name, space, fixed = f"{name}/distill", distill_space(space), {"refine.epochs": 0}
        study = open_study(self.folder, name, config.search.objectives, self.journal)
        self._messages += sampler_messages(config.search.sampler, space)
        self._messages += add_known_trials(study, config.search, self.folder, space)
        baseline = baseline_values(config.distill.epochs + config.refine.epochs)
        controls = {BASELINE: baseline, DEFAULTS: {}}
        return StageSearch(study, config, space, controls=controls, fixed=fixed)

    def _hand_over(self) -> None:
        """Choose the refiners' parents among the students, and store them in Optuna."""
        stage = self.stages[0]
        students = [
            trial
            for trial in stage.trials()
            if trial.state == TrialState.COMPLETE and trial.user_attrs.get("control") != BASELINE
        ]
        if not students:
            reasons = "".join(f"\n  trial {n}: {e}" for n, e in self.status()["errors"].items())
            raise InputError(
                "refiners need at least one complete student to start from, got none but the "
                f"baseline; raise search.trials or lower search.min_epochs{reasons}"
            )
        feasible = [trial for trial in students if is_feasible(trial)]
        parents = choose_parents(feasible or students, self.config.plan.parents)
        handed_over = {
            "first_number": len(stage.trials()),
            "parents": [
                {"trial": number, "values": stage.suggestion(number)["values"]}
                for number in map(stage.number, parents)
            ],
        }
        failpoints.point("handing over")
        study = self._refiners_study()
        study.set_user_attr(HANDED_OVER, handed_over)
        self._open_second_stage()

    def _refiners_study(self) -> optuna.Study:
        name, objectives = refiners_study_name(self.config.name), self.config.search.objectives
        return open_study(self.folder, name, objectives, self.journal)

    def _open_second_stage(self) -> None:
        """Open the refiners' stage, if its parents are chosen."""
        study = self._refiners_study()
        handed_over = study.user_attrs.get(HANDED_OVER)
        if not handed_over:
            return
        parents = [
            Parent(parent["trial"], without_refiner(parent["values"]))
            for parent in handed_over["parents"]
        ]
        self.stages.append(
            StageSearch(
                study,
                self.config,
                refine_space(self.space, len(parents)),
                controls={DEFAULTS: {}},
                fixed={},
                first_number=handed_over["first_number"],
                first_epoch=self.config.distill.epochs,
                parents=parents,
            )
        )

    def _end(self, number: int, state: TrialState) -> None:
        self._stage(number).end_trial(number, state)
        self._write(number)

    def _write(self, number: int) -> None:
        rows = self._rows(number)
        write_trial(self.folder, self._trial_row(number, rows), rows, self.space)

    def repair_tables(self) -> None:
        """Write finished trials that the tables lack: the owner died before it wrote them."""
        written = written_trials(self.folder)
        for number, trial in self._trials().items():
            if trial.state.is_finished() and number not in written:
                self._write(number)

    def _flush(self, number: int) -> None:
        now = time.monotonic()
        if now - self.flushed.setdefault(number, now) >= FLUSH_S:
            self.flushed[number] = now
            write_running(self.folder, number, self._rows(number), self.space)

    def _rows(self, number: int) -> list[Row]:
        """Return the trial's reports: the recorded rows of its last checkpoint.

        A trial saves each epoch before it reports it, so that none is missing.
        """
        last = Checkpoints(trial_folder(self.folder, number)).last()
        stage = self._stage(number)
        recorded = stage.epochs_of(number)
        parent = stage.parent_of(stage.frozen(number))
        columns = {
            "study": self.config.name,
            "trial": number,
            "parent_trial": parent.trial if parent else None,
        }
        rows = last.rows if last else []
        return [columns | row for row in rows if row["epoch"] in recorded]

    def _trial_row(self, number: int, rows: list[Row]) -> Row:
        stage = self._stage(number)
        trial = stage.frozen(number)
        parent = stage.parent_of(trial)
        params = dict(parent.values if parent else {}) | trial.params
        started = datetime.datetime.fromtimestamp(trial.user_attrs["started"], datetime.UTC)
        seconds = rows[-1]["seconds"] if rows else 0.0
        settings = self.config.trial
        row: Row = {
            "study": self.config.name,
            "trial": number,
            "parent_trial": parent.trial if parent else None,
            "control": trial.user_attrs.get("control"),
            "state": trial.state.name,
            "error": trial.user_attrs.get("error") if trial.state == TrialState.FAIL else None,
            "seed": seed_of(self.config.seed, number),
            "epochs": len(rows),
            "objectives": ",".join(self.config.search.objectives),
            **{name: trial.user_attrs.get(name) for name in COSTS},
            "feasible": is_feasible(trial),
            "launcher": self.resolved.launcher,
            "started": started,
            "duration_s": seconds,
            "gpu_s": seconds * settings.gpus * settings.num_workers,
            "node": socket.gethostname(),
            **{f"params.{p}": value for p, value in params.items() if p in self.space.paths},
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


def _progress_of(trial: FrozenTrial) -> TrialProgress:
    return TrialProgress(
        epochs=max(trial.intermediate_values, default=0),
        budget=trial.user_attrs.get("budget", 0),
        has_ended=trial.state.is_finished(),
        is_control="control" in trial.user_attrs,
    )


def may_be_best(trial: FrozenTrial) -> bool:
    """Return whether the trial is complete and feasible."""
    return trial.state == TrialState.COMPLETE and is_feasible(trial)


def is_feasible(trial: FrozenTrial) -> bool:
    """Return whether the trial satisfies all its constraints."""
    return all(excess <= 0 for excess in trial.constraints.values())


def without_refiner(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a student's values without those of stage 2, for a refiner that starts from it."""
    return {path: v for path, v in values.items() if not path.startswith(REFINE_PATHS)}
