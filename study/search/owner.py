"""The owner of a study: gives out trials, takes their reports, prunes and ends them.

One process, a named Ray actor, owns the Optuna studies and the tables; nobody else touches them.
It decides, in one call, what a report leads to: go on, complete or prune. Every method may be
called twice with the same arguments, so that a caller who was cut off simply asks again.
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
from study.search.forecast import StageEpochs, TrialProgress, ahead, trial_groups
from study.search.samplers import sampler_notes
from study.search.stage import (
    HANDED_OVER,
    Parent,
    StageSearch,
    open_journal,
    open_study,
    second_study_of,
)
from study.search.staged import (
    REFINE_PATHS,
    choose_parents,
    distill_space,
    num_distill_trials,
    refine_space,
)
from study.search.warm_start import enter_known_trials
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
"""Seconds between two writings of a running trial's rows."""
STATES = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
"""How a trial ends."""


class StudyOwner:
    """The only process that touches the Optuna studies and writes the study's tables.

    Args:
        session: names this run of the driver. A running trial of another session was left over
            when its driver died; one of this session is alive, though the owner may have died.
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
        self.remarks: list[str] = []
        self.stages = [self._first_stage()]
        if resolved.is_staged:
            self._open_second_stage()
        self.teacher_rows: list[Row] = []
        self.teacher: Row | None = None
        self.flushed: dict[int, float] = {}
        self.why_halted: str | None = None
        remove_leftovers(self.folder)
        self.repair_tables()
        self.orphaned = self.stages[-1].orphaned(session)

    def trials_to_run(self) -> int:
        """How many trials are to run now, all of one stage; 0 when the study has them all.

        When the students of plan staged are all there, this is the hand-over.

        Raises:
            InputError: no student came to its end.
        """
        if self.resolved.is_staged and len(self.stages) == 1:
            students = num_distill_trials(
                self.config.search.trials, self.config.plan.distill_share
            )
            if lacking := students - self.stages[0].num_finished():
                return max(lacking, 0)
            self._hand_over()
        return max(self.config.search.trials - self.num_finished(), 0)

    def ask(self, tune_id: str) -> dict[str, Any] | None:
        """A trial to run, by number, values and parent: one left over first, so that it goes on.

        The same ``tune_id`` gets the same trial; nobody gets one once the study is halted.
        """
        if self.why_halted is not None:
            return None
        stage, asker = self.stages[-1], f"{self.session}/{tune_id}"
        known = stage.asked_by(asker)
        if known is not None:
            return stage.suggestion(known)
        number = self.orphaned.pop(0) if self.orphaned else stage.new_trial()
        suggestion = stage.suggestion(number)
        failpoints.point("asked")
        stage.note(number, "asker", asker)
        return suggestion

    def report(self, number: int, row: Row) -> bool:
        """Records an epoch and ends the trial if this decides it; returns whether it is to stop.

        The first value of an epoch stands; a finished trial is told to stop.
        """
        stage = self._stage(number)
        if stage.frozen(number).state.is_finished():
            return True
        if state := stage.report(number, row):
            self._end(number, state)
            return True
        self._flush(number)
        return False

    def report_costs(self, number: int, costs: dict[str, float]) -> None:
        """Records what the trial's estimator costs, before its first epoch; the first stand."""
        self._stage(number).report_costs(number, costs)

    def knows_costs(self, number: int) -> bool:
        """Whether they were recorded, perhaps by a try of the trial that broke off."""
        known = self._stage(number).frozen(number).user_attrs
        return all(name in known for name in COSTS)

    def notes(self) -> list[str]:
        """What the user is to know of how this study searches, a line each."""
        return self.remarks

    def halt(self, reason: str) -> None:
        """From now on no trial is given out or fails: those that run go on another time."""
        self.why_halted = self.why_halted or reason

    def halted(self) -> str | None:
        """Why the study is to end before it is finished; None if it is not."""
        return self.why_halted

    def fail(self, number: int, reason: str) -> None:
        """Ends the trial as failed, unless it has ended already or the study is halted."""
        trial = self._stage(number).frozen(number)
        if not trial.state.is_finished() and self.why_halted is None:
            known = stall_reason(trial_folder(self.folder, number)) or trial.user_attrs.get(
                "error"
            )
            self.note_error(number, known or reason)
            self._end(number, TrialState.FAIL)

    def note_error(self, number: int, error: str) -> None:
        """Keeps why a try of the trial broke; another try may follow."""
        self._stage(number).note(number, "error", error)

    def report_teacher(self, row: Row) -> None:
        """Records an epoch of the teacher's training, or how far the asking is since."""
        self.teacher = row
        if row["epoch"] not in {known["epoch"] for known in self.teacher_rows}:
            self.teacher_rows.append(row)
            rows = [{"study": self.config.name, **known} for known in self.teacher_rows]
            write_teacher(self.folder, rows, self.space)

    def num_finished(self) -> int:
        return sum(stage.num_finished() for stage in self.stages)

    def status(self) -> dict[str, Any]:
        """What the display shows: trials by state, the best, the baseline, stages, the teacher."""
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

    def news(self, ended: Container[int]) -> list[tuple[Row, list[Row]]]:
        """The row and the reports of each trial that was begun, but for these."""
        found = []
        for number, trial in self._trials().items():
            if number not in ended and "started" in trial.user_attrs:
                # Of a running trial the last checkpoint may make room for the next meanwhile.
                with contextlib.suppress(FileNotFoundError):
                    rows = self._rows(number)
                    found.append((self._trial_row(number, rows), rows))
        return found

    def _progress(self) -> list[dict[str, Any]]:
        """Of each stage, one still to come too: what is done and what is left."""
        handed_over = self.stages[1].first_number if len(self.stages) > 1 else None
        config = self.config
        planned = trial_groups(
            config.plan,
            config.search.trials,
            StageEpochs(config.distill.epochs, config.refine.epochs),
            handed_over=handed_over,
        )
        begun = [[_seen(trial) for trial in stage.trials()] for stage in self.stages]
        begun += [[]] * (len(planned) - len(begun))
        return [
            ahead(groups, seen, self.config.search)
            for groups, seen in zip(planned, begun, strict=True)
        ]

    def _trials(self) -> dict[int, FrozenTrial]:
        """The study's own, by number."""
        return {stage.number(trial): trial for stage in self.stages for trial in stage.trials()}

    def _stage(self, number: int) -> StageSearch:
        return next(stage for stage in reversed(self.stages) if number >= stage.first_number)

    def _first_stage(self) -> StageSearch:
        """The only one of plan joint; the students of plan staged."""
        config, name, space = self.config, self.config.name, self.space
        fixed = {}
        if self.resolved.is_staged:
            name, space, fixed = f"{name}/distill", distill_space(space), {"refine.epochs": 0}
        study = open_study(self.folder, name, config.search.objectives, self.journal)
        self.remarks += sampler_notes(config.search.sampler, space)
        self.remarks += enter_known_trials(study, config.search, self.folder, space)
        baseline = baseline_values(config.distill.epochs + config.refine.epochs)
        controls = {BASELINE: baseline, DEFAULTS: {}}
        return StageSearch(study, config, space, controls=controls, fixed=fixed)

    def _hand_over(self) -> None:
        """Freezes the best students as parents, and how many trials came before stage 2."""
        stage = self.stages[0]
        students = [
            trial
            for trial in stage.trials()
            if trial.state == TrialState.COMPLETE and trial.user_attrs.get("control") != BASELINE
        ]
        if not students:
            reasons = "".join(f"\n  trial {n}: {e}" for n, e in self.status()["errors"].items())
            raise InputError(
                "a student must have come to its end for refiners to start from, got none but "
                f"the baseline; raise search.trials, or lower search.min_epochs{reasons}"
            )
        able = [trial for trial in students if is_feasible(trial)]
        parents = choose_parents(able or students, self.config.plan.parents)
        frozen = {
            "first_number": len(stage.trials()),
            "parents": [
                {"trial": number, "values": stage.suggestion(number)["values"]}
                for number in map(stage.number, parents)
            ],
        }
        failpoints.point("handing over")
        study = self._second_study()
        study.set_user_attr(HANDED_OVER, frozen)
        self._open_second_stage()

    def _second_study(self) -> optuna.Study:
        name, objectives = second_study_of(self.config.name), self.config.search.objectives
        return open_study(self.folder, name, objectives, self.journal)

    def _open_second_stage(self) -> None:
        """Adds the refiners' stage, if there was a hand-over."""
        study = self._second_study()
        frozen = study.user_attrs.get(HANDED_OVER)
        if not frozen:
            return
        parents = [
            Parent(parent["trial"], without_refiner(parent["values"]))
            for parent in frozen["parents"]
        ]
        self.stages.append(
            StageSearch(
                study,
                self.config,
                refine_space(self.space, len(parents)),
                controls={DEFAULTS: {}},
                fixed={},
                first_number=frozen["first_number"],
                first_epoch=self.config.distill.epochs,
                parents=parents,
            )
        )

    def _end(self, number: int, state: TrialState) -> None:
        self._stage(number).tell(number, state)
        self._write(number)

    def _write(self, number: int) -> None:
        rows = self._rows(number)
        write_trial(self.folder, self._trial_row(number, rows), rows, self.space)

    def repair_tables(self) -> None:
        """Writes the trials that Optuna knows as finished and the tables do not."""
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
        """The trial's reports; its checkpoint has them all, since it comes before each report."""
        last = Checkpoints(trial_folder(self.folder, number)).last()
        stage = self._stage(number)
        known = stage.epochs_of(number)
        parent = stage.parent_of(stage.frozen(number))
        own = {
            "study": self.config.name,
            "trial": number,
            "parent_trial": parent.trial if parent else None,
        }
        return [{**own, **row} for row in (last.rows if last else []) if row["epoch"] in known]

    def _trial_row(self, number: int, rows: list[Row]) -> Row:
        stage = self._stage(number)
        trial = stage.frozen(number)
        parent = stage.parent_of(trial)
        params = {**(parent.values if parent else {}), **trial.params}
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


def _seen(trial: FrozenTrial) -> TrialProgress:
    return TrialProgress(
        epochs=max(trial.intermediate_values, default=0),
        budget=trial.user_attrs.get("budget", 0),
        has_ended=trial.state.is_finished(),
        is_control="control" in trial.user_attrs,
    )


def may_be_best(trial: FrozenTrial) -> bool:
    """Whether the trial came to its end and keeps to the constraints."""
    return trial.state == TrialState.COMPLETE and is_feasible(trial)


def is_feasible(trial: FrozenTrial) -> bool:
    """Whether the trial keeps to all constraints that it was held against."""
    return all(excess <= 0 for excess in trial.constraints.values())


def without_refiner(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a student had of its own: a refiner that starts from it has stage 2 besides."""
    return {path: v for path, v in values.items() if not path.startswith(REFINE_PATHS)}
