"""Copies of trials for TensorBoard and MLflow (setting ``log``), written by those packages.

The driver writes what the study's owner has and a log lacks. What a log has is read from the log
itself: a resumed study adds the missing epochs and repeats none.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from study.config.schema import MLFLOW, TENSORBOARD
from study.errors import InputError
from study.storage.paths import mlflow_artifacts_folder, mlflow_file, tensorboard_folder
from study.storage.tables import PARAMS, VAL, TableRow

EVERY_S = 5.0
"""Seconds between two updates of the logs."""
LAST_S = 60.0
"""Longest wait for the last update when a study ends, s."""
TRACKING_URI = "MLFLOW_TRACKING_URI"
"""MLflow's environment variable: where runs are stored instead of the study's folder."""
NO_METRICS = ("study", "trial", "parent_trial", "stage", "epoch")
"""Columns of a report that identify it."""
RUNNING = "RUNNING"
AP = f"{VAL}ap"

Updates = Callable[[set[int]], Sequence[tuple[TableRow, Sequence[TableRow]]]]
"""Returns the row and the reports of every started trial except those with these numbers."""


@dataclass
class Logged:
    """The part of a trial that a log has."""

    epochs: set[int] = field(default_factory=set)
    has_ended: bool = False


class TrialLog(Protocol):
    """A log of trials; a trial is a row of ``trials``, a report a row of ``reports``."""

    def read(self, number: int) -> Logged: ...
    def begin(self, trial: TableRow) -> None: ...
    def add(self, number: int, report: TableRow) -> None: ...
    def end(self, trial: TableRow) -> None: ...


def require_packages(logs: Sequence[str]) -> None:
    """Check that the packages of these logs are installed.

    Raises:
        InputError: a package is missing; the message has the command that installs it.
    """
    for name in logs:
        if importlib.util.find_spec(name) is None:
            raise InputError(
                f"log=[{name}] needs the package {name}, which is not installed; "
                f"pip install -e '.[{name}]', or leave {name} out of log"
            )


@contextlib.contextmanager
def track_trials(
    logs: Sequence[str],
    study: str,
    folder: Path,
    updates: Updates,
    notify: Callable[[str], None],
) -> Iterator[None]:
    """Write trials to these logs until the block ends, then the rest.

    An error of a log doesn't stop the study: it is reported once, and writing is tried again.
    """
    if not logs:
        yield
        return
    kinds: dict[str, Callable[[Path, str], TrialLog]] = {
        TENSORBOARD: TensorBoardLog,
        MLFLOW: MLflowLog,
    }
    opened = [(name, kinds[name](folder, study), dict[int, Logged]()) for name in logs]
    has_ended = threading.Event()

    def follow() -> None:
        reported: set[str] = set()
        is_last = False
        while not is_last:
            is_last = has_ended.wait(EVERY_S)
            for name, log, logged in opened:
                try:
                    write_missing(log, logged, updates)
                except Exception as error:
                    text = f"log={name} could not be written: {type(error).__name__}: {error}"
                    if text not in reported:
                        notify(f"{text}; the study continues")
                    reported.add(text)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        has_ended.set()
        thread.join(LAST_S)
        if thread.is_alive():
            notify(f"log={','.join(logs)} took more than {LAST_S:g} s; its end is missing")


def write_missing(log: TrialLog, logged: dict[int, Logged], updates: Updates) -> None:
    """Write the epochs and the ends of trials that a log lacks.

    Args:
        logged: what the log has by trial; read from it where missing, then updated.
    """
    ended = {number for number, known in logged.items() if known.has_ended}
    for trial, reports in updates(ended):
        number = trial["trial"]
        if number not in logged:
            known = log.read(number)
            if not known.epochs and not known.has_ended:
                log.begin(trial)
            logged[number] = known
        known = logged[number]
        if known.has_ended:
            continue
        for report in reports:
            if report["epoch"] not in known.epochs:
                log.add(number, report)
                known.epochs.add(report["epoch"])
        if trial["state"] != RUNNING:
            log.end(trial)
            known.has_ended = True


def metrics_of(report: TableRow) -> dict[str, float]:
    """Return the figures of a report by column, without nulls."""
    named = {name: value for name, value in report.items() if name not in NO_METRICS}
    return {name: float(value) for name, value in named.items() if value is not None}


def parameters_of(trial: TableRow) -> dict[str, Any]:
    """Return the trial's parameters by config path, and its ``control`` and ``parent_trial``."""
    values = {"control": trial["control"], "parent_trial": trial["parent_trial"]}
    for name, value in trial.items():
        if name.startswith(PARAMS):
            values[name.removeprefix(PARAMS)] = value
    return {name: value for name, value in values.items() if value is not None}


class TensorBoardLog:
    """Event files of TensorBoard, a folder per trial."""

    def __init__(self, folder: Path, study: str) -> None:
        self.folder = tensorboard_folder(folder)
        self.files: dict[int, Any] = {}

    def read(self, number: int) -> Logged:
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

        logged = Logged()
        for file in sorted(self._of(number).glob("events.*")):
            for event in EventFileLoader(str(file)).Load():
                tags = {value.tag for value in event.summary.value}
                if AP in tags:
                    logged.epochs.add(event.step)
                logged.has_ended |= any(tag.startswith("state") for tag in tags)
        return logged

    def begin(self, trial: TableRow) -> None:
        from torch.utils.tensorboard.summary import hparams

        known = {
            name: value if isinstance(value, int | float) else str(value)
            for name, value in parameters_of(trial).items()
        }
        experiment, start, _ = hparams(known, {AP: 0.0})
        self._write(trial["trial"], experiment)
        self._write(trial["trial"], start)

    def add(self, number: int, report: TableRow) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        # One event for all figures, so that an epoch is logged as a whole or not at all.
        values = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in metrics_of(report).items()
        ]
        self._write(number, Summary(value=values), report["epoch"])

    def end(self, trial: TableRow) -> None:
        from tensorboard.plugins.hparams.api_pb2 import Status
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo
        from torch.utils.tensorboard.summary import hparams, text

        number, state = trial["trial"], str(trial["state"])
        _, _, end = hparams({}, {AP: 0.0})
        if state == "FAIL":
            failed = SessionEndInfo(status=Status.STATUS_FAILURE)
            content = HParamsPluginData(session_end_info=failed).SerializeToString()
            end.value[0].metadata.plugin_data.content = content
            state = f"{state}: {trial['error']}"
        self._write(number, end)
        self._write(number, text("state", state), trial["epochs"])
        self.files.pop(number).close()

    def _write(self, number: int, summary: Any, step: int = 0) -> None:
        from torch.utils.tensorboard import FileWriter

        if number not in self.files:
            self.files[number] = FileWriter(str(self._of(number)))
        self.files[number].add_summary(summary, step)
        self.files[number].flush()

    def _of(self, number: int) -> Path:
        return self.folder / str(number)


class MLflowLog:
    """Runs of MLflow, one per trial, in an experiment with the study's name.

    They are stored in ``<study>/mlflow.db`` unless MLFLOW_TRACKING_URI names another store.
    """

    def __init__(self, folder: Path, study: str) -> None:
        # Or MLflow reports its use to its makers over the network.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        import mlflow

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        uri = os.environ.get(TRACKING_URI)
        files = None if uri else mlflow_artifacts_folder(folder).as_uri()
        self.folder = str(folder)
        self.client = mlflow.MlflowClient(uri or f"sqlite:///{mlflow_file(folder)}")
        known = self.client.get_experiment_by_name(study)
        self.experiment = (
            known.experiment_id if known else self.client.create_experiment(study, files)
        )
        self.runs: dict[int, str] = {}

    def read(self, number: int) -> Logged:
        mine = f"tags.trial = '{number}' and tags.folder = '{self.folder}'"
        runs = self.client.search_runs([self.experiment], mine)
        if not runs:
            return Logged()
        info = runs[0].info
        self.runs[number] = info.run_id
        epochs = {metric.step for metric in self.client.get_metric_history(info.run_id, AP)}
        return Logged(epochs, has_ended=info.status != RUNNING)

    def begin(self, trial: TableRow) -> None:
        from mlflow.entities import Param

        number = trial["trial"]
        if number not in self.runs:
            tags = {"trial": str(number), "folder": self.folder}
            run = self.client.create_run(self.experiment, tags=tags, run_name=f"trial {number}")
            self.runs[number] = run.info.run_id
        known = [Param(name, str(value)) for name, value in parameters_of(trial).items()]
        self.client.log_batch(self.runs[number], params=known)

    def add(self, number: int, report: TableRow) -> None:
        from mlflow.entities import Metric

        now = round(1000 * time.time())
        figures = metrics_of(report).items()
        metrics = [Metric(name, value, now, report["epoch"]) for name, value in figures]
        self.client.log_batch(self.runs[number], metrics=metrics)

    def end(self, trial: TableRow) -> None:
        run, state = self.runs[trial["trial"]], str(trial["state"])
        self.client.set_tag(run, "state", state)
        if state == "FAIL":
            self.client.set_tag(run, "error", str(trial["error"]))
        status = {"COMPLETE": "FINISHED", "PRUNED": "KILLED"}.get(state, "FAILED")
        self.client.set_terminated(run, status)
