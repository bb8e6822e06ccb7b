"""A study whose driver is killed goes on by the same command, and ends as if nothing had been."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from study.results import read_final, read_reports, read_trials
from study.stage_search import open_study

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow

SETTINGS = (
    "data.train_pictures=48",
    "data.val_pictures=12",
    "data.input_size=[96,64]",
    "teacher.epochs=1",
    "distill.epochs=3",
    "refine.epochs=2",
    "search.trials=4",
    "search.min_epochs=1",
    "search.concurrent=1",
    "display=plain",
)
TIMES = {"seconds", "images_per_s", "study"}


def command(storage: Path, name: str, *more: str) -> list[str]:
    script = str(ROOT / "study" / "tune.py")
    return [sys.executable, script, f"storage={storage}", f"name={name}", *SETTINGS, *more]


def run(storage: Path, name: str, *more: str) -> str:
    done = subprocess.run(command(storage, name, *more), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def kill_during(storage: Path, name: str, checkpoint: str, delay_s: float, *more: str) -> None:
    """Starts the study and kills its driver ``delay_s`` after a checkpoint has appeared."""
    driver = subprocess.Popen(
        command(storage, name, *more), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 150
    while not (storage / name / "trials" / checkpoint).exists():
        assert driver.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(delay_s)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()


def trials_of(folder: Path) -> list[dict[str, Any]]:
    study = open_study(folder, folder.name)
    return [
        {
            "number": trial.number,
            "state": trial.state.name,
            "params": trial.params,
            "curve": trial.intermediate_values,
            "value": trial.value,
        }
        for trial in study.get_trials()
    ]


def reports_of(folder: Path) -> list[dict[str, Any]]:
    rows = [row for row in read_reports(folder).to_pylist() if row["trial"] is not None]
    rows.sort(key=lambda row: (row["trial"], row["epoch"]))
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all studies of this file share one data set and one teacher."""
    return tmp_path_factory.mktemp("studies")


def test_killed_study_ends_as_an_undisturbed_one(storage: Path) -> None:
    run(storage, "whole")
    dice = random.Random(20)
    checkpoint = dice.choice(["1/epoch-001", "1/epoch-003", "2/epoch-001"])
    kill_during(storage, "killed", checkpoint, dice.uniform(0, 0.5))
    assert len(read_trials(storage / "whole")) == 4
    out = run(storage, "killed")
    assert "going on" in out
    assert trials_of(storage / "killed") == trials_of(storage / "whole")
    assert reports_of(storage / "killed") == reports_of(storage / "whole")
    keys = [(row["trial"], row["epoch"]) for row in reports_of(storage / "killed")]
    assert len(keys) == len(set(keys))
    scores = [
        [(row["role"], row["trial"], row["ap"]) for row in read_final(storage / name).to_pylist()]
        for name in ("whole", "killed")
    ]
    assert scores[0] == scores[1]
    assert "is finished" in run(storage, "killed")


def test_study_under_ray_train_with_two_workers_resumes_from_its_checkpoint(storage: Path) -> None:
    workers = ("trial.launcher=train", "trial.num_workers=2", "trial.cpus=0.5", "search.trials=1")
    kill_during(storage, "workers", "0/epoch-002", 0.1, *workers)
    before = (storage / "workers" / "trials" / "0" / "epoch-002" / "state.json").read_text()
    run(storage, "workers", *workers)
    rows = [row for row in read_reports(storage / "workers").to_pylist() if row["trial"] == 0]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5]
    assert f'"seconds": {rows[1]["seconds"]!r}' in before  # epoch 2 was not trained again
    trial = read_trials(storage / "workers").to_pylist()[0]
    assert (trial["state"], trial["launcher"]) == ("COMPLETE", "train")


def test_trial_whose_loss_is_no_number_fails_with_its_reason(storage: Path) -> None:
    space = storage / "wild.yaml"
    space.write_text(
        "question: Does a rate that breaks the training end its trial alone?\n"
        "parameters:\n"
        "  distill.optimizer.lr: {choices: [0.001, 1.0e+30], role: nuisance}\n"
    )
    run(storage, "wild", f"search_space={space}", "search.trials=6", "distill.optimizer.lr=0.001")
    trials = read_trials(storage / "wild").to_pylist()
    failed = [trial for trial in trials if trial["state"] == "FAIL"]
    assert len(trials) == 6
    assert failed and all(trial["params.distill.optimizer.lr"] == 1e30 for trial in failed)
    assert all("finite" in trial["error"] for trial in failed)
    others = [trial for trial in trials if trial["params.distill.optimizer.lr"] == 0.001]
    assert {trial["state"] for trial in others} <= {"COMPLETE", "PRUNED"}
    assert len(others) + len(failed) == 6
