"""Trials in TensorBoard and MLflow, where ``log`` asks for it, by those packages' own writers.

The driver writes what the study's owner knows and a log lacks. What a log has is read back from
it: a study that was killed and goes on writes the epochs that are missing, and none twice.
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
"""Seconds between two looks at what is new."""
LAST_S = 60.0
"""Seconds that a log is waited for at the end."""
TRACKING_URI = "MLFLOW_TRACKING_URI"
"""MLflow's own variable: where runs go, in place of a file in the study's folder."""
NO_METRICS = ("study", "trial", "parent_trial", "stage", "epoch")
"""Columns of a report that say whose it is."""
RUNNING = "RUNNING"
AP = f"{VAL}ap"

News = Callable[[set[int]], Sequence[tuple[TableRow, Sequence[TableRow]]]]
"""Gives the row and the reports of each trial that was begun, but for those of given numbers."""


@dataclass
class Logged:
    """What a log has of a trial."""

    epochs: set[int] = field(default_factory=set)
    has_ended: bool = False


class TrialLog(Protocol):
    """Where trials are written, each by its row of ``trials`` and its reports."""

    def read(self, number: int) -> Logged: ...
    def begin(self, trial: TableRow) -> None: ...
    def tell(self, number: int, report: TableRow) -> None: ...
    def end(self, trial: TableRow) -> None: ...


def require_packages(log: Sequence[str]) -> None:
    """Returns if every log that is asked for can be written.

    Raises:
        InputError: a package is not installed; says how to install it.
    """
    for name in log:
        if importlib.util.find_spec(name) is None:
            raise InputError(
                f"log=[{name}] needs the package {name}, which is not installed; "
                f"pip install -e '.[{name}]', or leave {name} out of log"
            )


@contextlib.contextmanager
def trials_logged(
    names: Sequence[str],
    study: str,
    folder: Path,
    news: News,
    notify: Callable[[str], None],
) -> Iterator[None]:
    """Trials are written to every log of ``log`` until the block ends, and what is left then.

    A log that fails stops no study: it is said, once, and tried again.
    """
    if not names:
        yield
        return
    kinds: dict[str, Callable[[Path, str], TrialLog]] = {
        TENSORBOARD: TensorBoardLog,
        MLFLOW: MLflowLog,
    }
    logs = [(name, kinds[name](folder, study), dict[int, Logged]()) for name in names]
    over = threading.Event()

    def follow() -> None:
        said: set[str] = set()
        is_over = False
        while not is_over:
            is_over = over.wait(EVERY_S)
            for name, log, told in logs:
                try:
                    catch_up(log, told, news)
                except Exception as error:
                    text = f"log={name} could not be written: {type(error).__name__}: {error}"
                    if text not in said:
                        notify(f"{text}; the study goes on")
                    said.add(text)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(LAST_S)
        if thread.is_alive():
            notify(f"log={','.join(names)} took more than {LAST_S:g} s; its end is missing")


def catch_up(log: TrialLog, told: dict[int, Logged], news: News) -> None:
    """The log has every epoch and every end that there is news of."""
    ended = {number for number, known in told.items() if known.has_ended}
    for trial, reports in news(ended):
        number = trial["trial"]
        if number not in told:
            known = log.read(number)
            if not known.epochs and not known.has_ended:
                log.begin(trial)
            told[number] = known
        known = told[number]
        if known.has_ended:
            continue
        for report in reports:
            if report["epoch"] not in known.epochs:
                log.tell(number, report)
                known.epochs.add(report["epoch"])
        if trial["state"] != RUNNING:
            log.end(trial)
            known.has_ended = True


def metrics_of(report: TableRow) -> dict[str, float]:
    """The figures of a report, by column."""
    named = {name: value for name, value in report.items() if name not in NO_METRICS}
    return {name: float(value) for name, value in named.items() if value is not None}


def parameters_of(trial: TableRow) -> dict[str, Any]:
    """What the trial has of its own by config path, and which control it is or parent it has."""
    asked = {name.removeprefix(PARAMS): v for name, v in trial.items() if name.startswith(PARAMS)}
    known = {"control": trial["control"], "parent_trial": trial["parent_trial"], **asked}
    return {name: value for name, value in known.items() if value is not None}


class TensorBoardLog:
    """A folder of events for each trial, ``<study>/tensorboard/<number>``."""

    def __init__(self, folder: Path, study: str) -> None:
        self.folder = tensorboard_folder(folder)
        self.files: dict[int, Any] = {}

    def read(self, number: int) -> Logged:
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

        told = Logged()
        for file in sorted(self._of(number).glob("events.*")):
            for event in EventFileLoader(str(file)).Load():
                tags = {value.tag for value in event.summary.value}
                told.epochs |= {event.step} if AP in tags else set()
                told.has_ended |= any(tag.startswith("state") for tag in tags)
        return told

    def begin(self, trial: TableRow) -> None:
        from torch.utils.tensorboard.summary import hparams

        known = {
            name: value if isinstance(value, int | float) else str(value)
            for name, value in parameters_of(trial).items()
        }
        experiment, start, _ = hparams(known, {AP: 0.0})
        self._write(trial["trial"], experiment)
        self._write(trial["trial"], start)

    def tell(self, number: int, report: TableRow) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        # One event for all figures, so that an epoch is there as a whole or not at all.
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
    """A run for each trial, in an experiment that has the study's name.

    It is ``<study>/mlflow.db`` unless MLFLOW_TRACKING_URI names another place.
    """

    def __init__(self, folder: Path, study: str) -> None:
        # MLflow else tells its makers over the network that it is used.
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

    def tell(self, number: int, report: TableRow) -> None:
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
