"""Trials in TensorBoard and MLflow, read back by those packages' own readers."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from study.config.compose import compose
from study.driver import run_study
from study.errors import InputError
from study.storage.trackers import (
    Logged,
    MLflowLog,
    TensorBoardLog,
    TrialLog,
    require_packages,
    track_trials,
    write_missing,
)

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")
LOGS = ("tensorboard", "mlflow")
KINDS: dict[str, Any] = {"tensorboard": TensorBoardLog, "mlflow": MLflowLog}
APS = (0.125, 0.5, 0.25)


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An mlflow.db without a run: making one takes MLflow seconds."""
    pytest.importorskip("mlflow", reason="mlflow is not installed: pip install -e '.[mlflow]'")
    folder = tmp_path_factory.mktemp("mlflow")
    MLflowLog(folder, "made-up")
    return folder / "mlflow.db"


@pytest.fixture(params=LOGS)
def name(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A log by its name; skips where its package is missing."""
    if request.param == "mlflow":
        shutil.copy(request.getfixturevalue("empty_database"), tmp_path)
    missing = f"{request.param} is not installed: pip install -e '.[{request.param}]'"
    pytest.importorskip(request.param, reason=missing)
    return str(request.param)


def new_log(name: str, folder: Path) -> TrialLog:
    """The log as a driver opens it that has just started."""
    log: TrialLog = KINDS[name](folder, "made-up")
    return log


def trial(number: int, state: str, **changes: Any) -> dict[str, Any]:
    row = {
        "trial": number,
        "state": state,
        "control": None,
        "parent_trial": None,
        "error": None,
        "epochs": len(APS),
        "params.distill.heatmap.kind": "kl",
        "params.distill.heatmap.tau": None,
        "params.distill.optimizer.lr": 0.5,
        "params.refine.depth": 3,
    }
    return {**row, **changes}


def reports(count: int) -> list[dict[str, Any]]:
    """The first epochs; every figure is one that single precision holds."""
    return [
        {
            "study": "made-up",
            "trial": 4,
            "parent_trial": None,
            "stage": "distill",
            "epoch": epoch,
            "val_ap": ap,
            "loss": 2.0 / epoch,
            "loss.heatmap": None,
        }
        for epoch, ap in enumerate(APS[:count], 1)
    ]


def write(log: TrialLog, row: dict[str, Any], epochs: int, logged: dict[int, Logged]) -> None:
    def updates(ended: set[int]) -> list[Any]:
        return [] if row["trial"] in ended else [(row, reports(epochs))]

    write_missing(log, logged, updates)


@dataclass
class Read:
    """A trial as the package's own reader finds it."""

    aps: list[tuple[int, float]]
    """Epoch and AP, as often as they were written."""
    names: set[str]
    parameters: dict[str, Any]
    state: str


def read_tensorboard(folder: Path, number: int) -> Read:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.api_pb2 import Status
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    events = EventAccumulator(str(folder / "tensorboard" / str(number))).Reload()
    known = events.PluginTagToContent("hparams")
    start = HParamsPluginData.FromString(known["_hparams_/session_start_info"]).session_start_info
    parameters = {
        name: value.string_value or value.number_value for name, value in start.hparams.items()
    }
    states = [tag for tag in events.Tags()["tensors"] if tag.startswith("state")]
    words = [v.tensor_proto.string_val[0].decode() for tag in states for v in events.Tensors(tag)]
    if words:
        end = HParamsPluginData.FromString(known["_hparams_/session_end_info"]).session_end_info
        assert (end.status == Status.STATUS_FAILURE) == words[0].startswith("FAIL")
    aps = [(event.step, event.value) for event in events.Scalars("val_ap")]
    return Read(aps, set(events.Tags()["scalars"]), parameters, ",".join(words))


def read_mlflow(folder: Path, number: int) -> Read:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("made-up")
    (run,) = client.search_runs([experiment.experiment_id], f"tags.trial = '{number}'")
    history = client.get_metric_history(run.info.run_id, "val_ap")
    aps = [(metric.step, metric.value) for metric in history]
    ends = {"COMPLETE": "FINISHED", "PRUNED": "KILLED", "FAIL": "FAILED"}
    state = run.data.tags.get("state", "")
    assert run.info.status == ends.get(state, "RUNNING")
    words = f"{state}: {run.data.tags['error']}" if state == "FAIL" else state
    return Read(aps, set(run.data.metrics), run.data.params, words)


READERS = {"tensorboard": read_tensorboard, "mlflow": read_mlflow}


def test_each_epoch_is_logged_once_though_the_study_was_killed(name: str, tmp_path: Path) -> None:
    write(new_log(name, tmp_path), trial(4, "RUNNING"), 0, {})
    logged: dict[int, Logged] = {}
    killed = new_log(name, tmp_path)
    write(killed, trial(4, "RUNNING"), 1, logged)
    write(killed, trial(4, "RUNNING"), 2, logged)
    assert READERS[name](tmp_path, 4).state == ""
    write(new_log(name, tmp_path), trial(4, "COMPLETE"), 3, {})
    write(new_log(name, tmp_path), trial(4, "COMPLETE"), 3, {})
    found = READERS[name](tmp_path, 4)
    assert found.aps == list(enumerate(APS, 1))
    assert found.names == {"val_ap", "loss"}
    assert found.state == "COMPLETE"
    assert {key: str(value) for key, value in found.parameters.items()} == {
        "distill.heatmap.kind": "kl",
        "distill.optimizer.lr": "0.5",
        "refine.depth": "3.0" if name == "tensorboard" else "3",
    }


def test_end_and_parameters_of_a_trial_can_be_read(name: str, tmp_path: Path) -> None:
    log, logged = new_log(name, tmp_path), dict[int, Logged]()
    write(log, trial(0, "PRUNED", control="baseline"), 1, logged)
    write(log, trial(1, "FAIL", error="RuntimeError: boom", parent_trial=7), 2, logged)
    pruned, failed = (READERS[name](tmp_path, number) for number in (0, 1))
    assert (pruned.state, failed.state) == ("PRUNED", "FAIL: RuntimeError: boom")
    assert (pruned.aps, failed.aps) == ([(1, 0.125)], [(1, 0.125), (2, 0.5)])
    assert pruned.parameters["control"] == "baseline"
    assert int(failed.parameters["parent_trial"]) == 7


def test_an_epoch_torn_by_a_kill_is_written_again(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    write(new_log("tensorboard", tmp_path), trial(4, "RUNNING"), 2, {})
    (events,) = (tmp_path / "tensorboard/4").iterdir()
    events.write_bytes(events.read_bytes()[:-5])
    write(new_log("tensorboard", tmp_path), trial(4, "COMPLETE"), 3, {})
    assert read_tensorboard(tmp_path, 4).aps == list(enumerate(APS, 1))


def test_mlflow_follows_its_own_variable_and_sends_no_telemetry(
    empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = shutil.copy(empty_database, tmp_path / "elsewhere.db")
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{elsewhere}")
    monkeypatch.chdir(tmp_path)
    write(new_log("mlflow", tmp_path / "study"), trial(4, "COMPLETE"), 1, {})
    assert new_log("mlflow", tmp_path / "study").read(4) == Logged({1}, has_ended=True)
    assert list(tmp_path.iterdir()) == [elsewhere]
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_two_studies_of_one_name_on_one_server_stay_apart(
    empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = shutil.copy(empty_database, tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
    write(new_log("mlflow", tmp_path / "a"), trial(4, "COMPLETE"), 3, {})
    assert new_log("mlflow", tmp_path / "b").read(4) == Logged()
    assert new_log("mlflow", tmp_path / "a").read(4) == Logged({1, 2, 3}, has_ended=True)


@pytest.mark.parametrize("package", LOGS)
def test_a_missing_package_is_refused_before_anything_runs(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = compose([f"log=[{package}]", f"storage={tmp_path / 'studies'}", "display=none"])
    with pytest.raises(InputError, match=rf"needs the package {package}.*\.\[{package}\]"):
        run_study(config)
    assert list(tmp_path.iterdir()) == []
    require_packages([])


class BrokenLog:
    """A log that can't be written at first, as while a server is away."""

    tried = 0
    epochs: Sequence[int] = ()

    def __init__(self, folder: Path, study: str) -> None: ...

    def read(self, number: int) -> Logged:
        BrokenLog.tried += 1
        if BrokenLog.tried < 3:
            raise OSError("the server is away")
        return Logged()

    def begin(self, trial: Any) -> None: ...
    def add(self, number: int, report: Any) -> None:
        BrokenLog.epochs = [*BrokenLog.epochs, report["epoch"]]

    def end(self, trial: Any) -> None: ...


def test_failing_log_is_reported_once_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("study.storage.trackers.MLflowLog", BrokenLog)
    monkeypatch.setattr("study.storage.trackers.EVERY_S", 0.01)
    messages: list[str] = []
    row = trial(4, "COMPLETE")

    def updates(ended: set[int]) -> list[Any]:
        return [] if 4 in ended else [(row, reports(3))]

    with track_trials(["mlflow"], "made-up", tmp_path, updates, messages.append):
        while BrokenLog.tried < 3:
            time.sleep(0.01)
    assert BrokenLog.epochs == [1, 2, 3]
    assert messages == [
        "log=mlflow could not be written: OSError: the server is away; the study continues"
    ]
