"""What every trial of a study shares, and a trial's link to the owner of the search."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch

from study.cache.prepare import PreparedData
from study.config.compose import with_values
from study.config.derived import Resolved
from study.config.schema import StudyConfig
from study.errors import TrainingDiverged
from study.storage.checkpoint import Row
from study.storage.files import disk_full_message, is_full_disk
from study.storage.paths import error_log, trial_folder
from study.training.networks import measure_costs
from study.trial import Trial
from study.workers import Workers


@dataclass(frozen=True)
class StudyContext:
    """What all trials of a study share; travels to every worker."""

    config: StudyConfig
    resolved: Resolved
    data: PreparedData
    folder: str
    """The study's folder."""
    targets: str
    """The teacher store."""
    owner: str
    """Name of the actor that owns the Optuna study."""


class OwnerLink:
    """One trial's line to the owner of the Optuna study; only the first worker speaks."""

    def __init__(self, plan: StudyContext, number: int, *, is_first: bool = True) -> None:
        self.number = number
        self.folder = trial_folder(Path(plan.folder), number)
        self.is_first = is_first
        self.owner = ray.get_actor(plan.owner)

    def report(self, row: Row) -> bool:
        """Tells an epoch's row; returns whether the trial is to stop."""
        return self.is_first and bool(ray.get(self.owner.report.remote(self.number, row)))

    def report_costs(self, trial: Trial, workers: Workers) -> None:
        """Measures what the trial's estimator costs, where the trial runs, and tells it.

        A trial that goes on was measured before it was broken off.
        """
        if self.is_first and not ray.get(self.owner.has_costs.remote(self.number)):
            config = trial.config
            costs = measure_costs(
                config.student, config.refine, config.trial, trial.resolved, workers.device
            )
            ray.get(self.owner.report_costs.remote(self.number, costs))

    def is_halted(self) -> bool:
        """Whether the study is to end, and this trial to wait until it goes on."""
        return ray.get(self.owner.halt_reason.remote()) is not None

    def fail(self, error: BaseException | str) -> None:
        """Ends the trial as failed, for this reason; a full disk ends the study instead."""
        if isinstance(error, BaseException):
            if self.halts(error):
                return
            error = last_line(error)
        if self.is_first:
            ray.get(self.owner.fail.remote(self.number, error))

    def halts(self, error: BaseException) -> bool:
        """Whether the error is that of a full disk; the study ends then."""
        if is_full := is_full_disk(error):
            ray.get(self.owner.halt.remote(disk_full_message(self.folder.parent.parent)))
        return is_full

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """A loss that is no number ends the trial; any other error is noted, and raised on.

        The traceback goes to ``error_log`` of the trial's folder, unless its disk is full.
        """
        try:
            yield
        except TrainingDiverged as error:
            self.fail(str(error))
        except Exception as error:
            if self.halts(error):
                raise
            self.folder.mkdir(parents=True, exist_ok=True)
            with error_log(self.folder).open("a") as log:
                traceback.print_exc(file=log)
            if self.is_first:
                ray.get(
                    self.owner.record_error.remote(self.number, f"{type(error).__name__}: {error}")
                )
            raise


def trial_of(plan: StudyContext, suggestion: dict[str, Any]) -> Trial:
    """The trial that a suggestion stands for: number, values by config path, parent's number."""
    folder, parent = Path(plan.folder), suggestion["parent"]
    return Trial(
        number=suggestion["number"],
        config=with_values(plan.config, suggestion["values"]),
        resolved=plan.resolved,
        data=plan.data.here(),
        folder=trial_folder(folder, suggestion["number"]),
        targets=Path(plan.targets),
        parent=None if parent is None else trial_folder(folder, parent),
    )


def brief(row: Row) -> dict[str, Any]:
    """What Tune and Train need to know of an epoch; the rest goes to the owner."""
    return {"val_ap": row["val_ap"], "epoch": row["epoch"], "stage": row["stage"]}


def last_line(error: BaseException) -> str:
    """The end of an error's text, where a traceback says what was wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
