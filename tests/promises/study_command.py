"""Small studies as users run them, their results, and how to kill their processes."""

from __future__ import annotations

import contextlib
import glob
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from study.search.stage import open_study
from study.storage import failpoints
from study.storage.tables import read_final, read_reports, read_trials

ROOT = Path(__file__).resolve().parents[2]
CPUS = os.cpu_count() or 1
LIMIT_S = 900
KILLS = 10
STATE = "state.json"
"""File of every saved epoch: its report, seconds included."""

SETTINGS = (
    "data.num_train_images=36",
    "data.num_val_images=8",
    "data.input_size=[64,64]",
    "teacher.size=tiny",
    "teacher.epochs=1",
    "refine.width=16",
    "search.min_epochs=1",
    "search.reduction_factor=2",
    "search.startup_trials=2",
    "search.concurrent=1",
    "confirm.seeds=2",
    "display=plain",
)
INLINE = (
    "trial.launcher=inline",
    "distill.epochs=4",
    "refine.epochs=2",
    "search.trials=5",
    "confirm.trials=1",
)
TRAIN = (
    "trial.launcher=train",
    "trial.num_workers=2",
    f"trial.cpus={CPUS / 2}",
    "distill.epochs=6",
    "refine.epochs=4",
    "search.trials=3",
    "confirm.trials=0",
)
"""A trial takes the whole machine: the next would wait forever if any of it stayed held.

Ten epochs take a second, less than the start of Ray Train.
"""
LAUNCHERS = {"inline": INLINE, "train": TRAIN}
TIMES = {"seconds", "images_per_s", "study"}


def command(storage: Path, name: str, *more: str) -> list[str]:
    script = str(ROOT / "study" / "tune.py")
    return [sys.executable, script, f"storage={storage}", f"name={name}", *SETTINGS, *more]


def run(storage: Path, name: str, *more: str, faulty: Path | None = None) -> str:
    """Run a study to its successful end, and return its output."""
    done = ended(storage, name, *more, faulty=faulty)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def ended(
    storage: Path, name: str, *more: str, faulty: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a study to its end, and return its process.

    Args:
        faulty: folder that lists the points at which processes are killed.
    """
    environment = dict(os.environ)
    if faulty:
        environment[failpoints.FOLDER] = str(faulty)
    return subprocess.run(
        command(storage, name, *more),
        capture_output=True,
        text=True,
        env=environment,
        timeout=LIMIT_S,
    )


def start(storage: Path, name: str, *more: str) -> subprocess.Popen[str]:
    """Start a study's driver as the leader of a process group, with all output on stdout."""
    return subprocess.Popen(
        command(storage, name, *more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def arm(folder: Path, points: Mapping[str, int]) -> None:
    """Make each point kill the process that reaches it after this many passes."""
    for name, passed in points.items():
        (folder / name).write_text(str(passed))


def has_killed(folder: Path, points: Mapping[str, int]) -> bool:
    return {file.name for file in folder.iterdir()} == {f"{name}.done" for name in points}


def evidence(folder: Path, optuna_study: str = "") -> dict[str, Any]:
    """Return all results of a study, without times."""
    trials = [
        (trial.number, trial.state.name, trial.params, trial.intermediate_values, trial.value)
        for trial in open_study(folder, optuna_study or folder.name).get_trials()
    ]
    rows = [row for row in read_reports(folder).to_pylist() if row["trial"] is not None]
    rows.sort(key=lambda row: (row["trial"], row["epoch"]))
    reports = [{key: value for key, value in row.items() if key not in TIMES} for row in rows]
    final = [(row["role"], row["trial"], row["ap"]) for row in read_final(folder).to_pylist()]
    objectives = {row["trial"]: row["objective"] for row in read_trials(folder).to_pylist()}
    return {"trials": trials, "reports": reports, "final": final, "objectives": objectives}


def epochs_in(folder: Path) -> set[str]:
    """Return the saved epochs of all trials and confirming runs."""
    # Unlike Path.glob, glob.glob ignores folders that are deleted meanwhile.
    return {str(Path(file).parent) for file in glob.glob(f"{folder}/*/*/epoch-*/{STATE}")}


def has_epoch(trial: Path) -> bool:
    """Return whether any epoch of this trial is saved; the first may be deleted already."""
    return bool(glob.glob(f"{trial}/epoch-*"))


def wait_until(
    happens: Callable[[], bool], driver: subprocess.Popen[str], limit_s: float = LIMIT_S
) -> bool:
    """Wait for an event; return whether it happened before the driver ended."""
    deadline = time.monotonic() + limit_s
    while not happens():
        if driver.poll() is not None:
            return False
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return True


def kill_driver(driver: subprocess.Popen[str]) -> bool:
    """Kill -9 the driver alone; return whether it was still running."""
    was_running = driver.poll() is None
    if was_running:
        os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    assert driver.stdout is not None
    driver.stdout.close()
    return was_running


def killed_at_ten_moments(storage: Path, name: str, seed: int, *settings: str) -> Path:
    """Run a study whose driver is killed KILLS times, then to its end; return its folder.

    Every third kill comes as soon as another epoch is saved, the others seconds after the start:
    otherwise the study would end before the last. No epoch saved by then is trained again.
    """
    rng, folder = random.Random(seed), storage / name
    kept: dict[Path, str] = {}
    for kill in range(KILLS):
        seen = epochs_in(folder)
        driver = start(storage, name, *settings)
        moment = time.monotonic() + (rng.uniform(1, 12) if kill % 3 else LIMIT_S)

        def has_come(seen: set[str] = seen, moment: float = moment) -> bool:
            return bool(epochs_in(folder) - seen) or time.monotonic() > moment

        wait_until(has_come, driver)
        time.sleep(rng.uniform(0, 0.1))
        assert kill_driver(driver), f"the study ended after {kill} kills"
        for epoch in epochs_in(folder):
            with contextlib.suppress(FileNotFoundError):  # deleted: no longer needed
                kept[Path(epoch) / STATE] = (Path(epoch) / STATE).read_text()
    assert "resuming" in run(storage, name, *settings)
    assert kept and all(file.read_text() == text for file, text in kept.items() if file.exists())
    return folder


def kill_actor(driver: subprocess.Popen[str], kind: str) -> None:
    """Kill -9 an actor of this class in the driver's Ray, found by its process title."""

    def found() -> list[int]:
        return [pid for pid in descendants(driver.pid) if f"ray::{kind}" in title_of(pid)]

    assert wait_until(lambda: bool(found()), driver)
    os.kill(found()[-1], signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """Return the ids of all descendants of a process."""
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
