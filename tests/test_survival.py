"""Kill -9 of anything, at any moment: the study ends with the trials of an undisturbed one."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from study import faults
from study.results import read_final, read_reports, read_trials
from study.stage_search import open_study

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow

SETTINGS = (
    *("data.train_pictures=36", "data.val_pictures=8", "data.input_size=[64,64]"),
    *("teacher.size=tiny", "teacher.epochs=1", "distill.epochs=2", "refine.epochs=2"),
    *("refine.width=16", "search.trials=5", "search.min_epochs=1", "search.startup_trials=2"),
    *("search.concurrent=1", "display=plain"),
)
TIMES = {"seconds", "images_per_s", "study"}
LIMIT_S = 300
POINTS = {
    "asked": 2,  # inside the owner's ask, of the third trial
    "saved": 4,  # an epoch is on disk and nobody knows of it
    "renaming trials": 1,  # a part of the table is written and bears no name yet
    "handed over": 2,  # stage 1 is over, stage 2 has not begun
}
"""How often each point is passed before it kills."""


def command(storage: Path, name: str, *more: str) -> list[str]:
    script = str(ROOT / "study" / "tune.py")
    return [sys.executable, script, f"storage={storage}", f"name={name}", *SETTINGS, *more]


def run(storage: Path, name: str, *more: str, faulty: Path | None = None) -> str:
    known = {**os.environ, **({faults.FOLDER: str(faulty)} if faulty else {})}
    done = subprocess.run(
        command(storage, name, *more), **{"capture_output": True, "text": True, "env": known}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def start(storage: Path, name: str, *more: str) -> subprocess.Popen[bytes]:
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command(storage, name, *more), **quiet)


def evidence(folder: Path, optuna_study: str = "") -> dict[str, Any]:
    """All that a study found out, without what a clock says of it."""
    trials = [
        (trial.number, trial.state.name, trial.params, trial.intermediate_values, trial.value)
        for trial in open_study(folder, optuna_study or folder.name).get_trials()
    ]
    rows = [row for row in read_reports(folder).to_pylist() if row["trial"] is not None]
    rows.sort(key=lambda row: (row["trial"], row["epoch"]))
    reports = [{key: value for key, value in row.items() if key not in TIMES} for row in rows]
    final = [(row["role"], row["trial"], row["ap"]) for row in read_final(folder).to_pylist()]
    told = {row["trial"]: row["objective"] for row in read_trials(folder).to_pylist()}
    return {"trials": trials, "reports": reports, "final": final, "told": told}


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all studies of this file share one data set and one teacher."""
    return tmp_path_factory.mktemp("survival")


@pytest.fixture(scope="module")
def whole(storage: Path) -> dict[str, Any]:
    """What the undisturbed study found out."""
    run(storage, "whole")
    return evidence(storage / "whole")


def test_processes_that_die_at_the_worst_points_change_nothing(
    storage: Path, whole: dict[str, Any], tmp_path: Path
) -> None:
    for name, passed in POINTS.items():
        (tmp_path / name).write_text(str(passed))
    run(storage, "faulty", faulty=tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {f"{name}.done" for name in POINTS}
    assert evidence(storage / "faulty") == whole


def test_a_staged_study_killed_at_its_hand_over_ends_as_undisturbed(
    storage: Path, tmp_path: Path
) -> None:
    """The owner dies before the parents are frozen, and a refiner before its first epoch."""
    staged = ("plan=staged", "search_space=joint", "search.trials=6", "plan.parents=2")
    run(storage, "staged", *staged)
    points = {"handing over": 0, "handed over": 1}
    for name, passed in points.items():
        (tmp_path / name).write_text(str(passed))
    run(storage, "staged-faulty", *staged, faulty=tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {f"{name}.done" for name in points}
    whole, faulty = (
        [evidence(storage / name, f"{name}/{stage}") for stage in ("distill", "refine")]
        for name in ("staged", "staged-faulty")
    )
    assert faulty == whole
    rows = read_trials(storage / "staged").to_pylist()
    assert [row["trial"] for row in rows] == list(range(6))
    assert [row["parent_trial"] is None for row in rows] == [True] * 3 + [False] * 3


def test_a_driver_killed_at_ten_moments_changes_nothing(
    storage: Path, whole: dict[str, Any]
) -> None:
    dice = random.Random(7)
    folder = storage / "killed"
    kills = 0
    while kills < 10 and not (folder / "results/final").is_dir():
        driver = start(storage, "killed")
        seen = len(list(folder.glob("trials/*/epoch-*/state.json")))
        # at a random moment of the start, or after the next epoch
        if kills % 3 == 2:
            time.sleep(dice.uniform(1, 9))
        else:
            wait_until(
                lambda seen=seen: len(list(folder.glob("trials/*/epoch-*/state.json"))) > seen,
                driver,
            )
            time.sleep(dice.uniform(0, 0.6))
        if driver.poll() is None:
            os.kill(driver.pid, signal.SIGKILL)
            kills += 1
        driver.wait()
    run(storage, "killed")
    assert kills >= 8
    assert evidence(folder) == whole


def test_an_owner_and_a_trial_killed_outright_change_nothing(
    storage: Path, whole: dict[str, Any]
) -> None:
    driver = start(storage, "actors")
    folder = storage / "actors"
    wait_until(lambda: (folder / "trials/1/epoch-001").exists(), driver)
    kill_actor(driver, "StudyOwner")
    wait_until(lambda: (folder / "trials/2/epoch-001").exists(), driver)
    kill_actor(driver, "ImplicitFunc")
    assert driver.wait(timeout=LIMIT_S) == 0
    assert evidence(folder) == whole


def wait_until(happens: Callable[[], bool], driver: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not happens():
        if driver.poll() is not None:
            return
        assert time.monotonic() < deadline
        time.sleep(0.02)


def kill_actor(driver: subprocess.Popen[bytes], kind: str) -> None:
    """Kill -9 of the processes of this driver's Ray whose title names an actor of this class."""
    found = [pid for pid in descendants(driver.pid) if kind in title_of(pid)]
    assert found, [title_of(pid) for pid in descendants(driver.pid)]
    for pid in found:
        os.kill(pid, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(parent, []).append(int(folder.name))
    found, unseen = [], [pid]
    while unseen:
        below = children.get(unseen.pop(), [])
        found += below
        unseen += below
    return found


def title_of(pid: int) -> str:
    try:
        return (Path("/proc") / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    except (FileNotFoundError, ProcessLookupError):
        return ""
