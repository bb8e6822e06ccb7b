"""Small studies as users run them, what they found out, and how to kill their processes."""

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
"""In the folder of every epoch that is kept: what was reported, seconds included."""

SETTINGS = (
    *("data.num_train_images=36", "data.num_val_images=8", "data.input_size=[64,64]"),
    *("teacher.size=tiny", "teacher.epochs=1", "refine.width=16"),
    *("search.min_epochs=1", "search.reduction_factor=2"),
    *("search.startup_trials=2", "search.concurrent=1", "confirm.seeds=2", "display=plain"),
)
INLINE = (
    *("trial.launcher=inline", "distill.epochs=4", "refine.epochs=2", "search.trials=5"),
    "confirm.trials=1",
)
TRAIN = (
    *("trial.launcher=train", "trial.num_workers=2", f"trial.cpus={CPUS / 2}"),
    *("distill.epochs=6", "refine.epochs=4", "search.trials=3", "confirm.trials=0"),
)
"""A trial has the whole machine, so that the next would wait for ever if it kept any of it. Ten
epochs are but a second beside the start of Ray Train."""
LAUNCHERS = {"inline": INLINE, "train": TRAIN}
TIMES = {"seconds", "images_per_s", "study"}


def command(storage: Path, name: str, *more: str) -> list[str]:
    script = str(ROOT / "study" / "tune.py")
    return [sys.executable, script, f"storage={storage}", f"name={name}", *SETTINGS, *more]


def run(storage: Path, name: str, *more: str, faulty: Path | None = None) -> str:
    """What the study says, which ends well."""
    done = ended(storage, name, *more, faulty=faulty)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def ended(
    storage: Path, name: str, *more: str, faulty: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """The study after its end, whatever that is.

    Args:
        faulty: the folder that says at which points processes are killed.
    """
    known = {**os.environ, **({failpoints.FOLDER: str(faulty)} if faulty else {})}
    return subprocess.run(
        command(storage, name, *more),
        capture_output=True,
        text=True,
        env=known,
        timeout=LIMIT_S,
    )


def start(storage: Path, name: str, *more: str) -> subprocess.Popen[str]:
    """The study's driver, leader of a group as if typed at a terminal; says all to its stdout."""
    return subprocess.Popen(
        command(storage, name, *more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def arm(folder: Path, points: Mapping[str, int]) -> None:
    """Each point kills the process that comes to it after it was passed so often."""
    for name, passed in points.items():
        (folder / name).write_text(str(passed))


def has_killed(folder: Path, points: Mapping[str, int]) -> bool:
    return {file.name for file in folder.iterdir()} == {f"{name}.done" for name in points}


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


def epochs_in(folder: Path) -> set[str]:
    """The epochs of trials and of runs that confirm them, as far as they are kept."""
    # Unlike Path.glob it minds no folder that goes while it looks.
    return {str(Path(file).parent) for file in glob.glob(f"{folder}/*/*/epoch-*/{STATE}")}


def has_epoch(trial: Path) -> bool:
    """Whether any epoch of this trial is kept; the first may be gone before one looks."""
    return bool(glob.glob(f"{trial}/epoch-*"))


def wait_until(
    happens: Callable[[], bool], driver: subprocess.Popen[str], limit_s: float = LIMIT_S
) -> bool:
    """Whether it happened before the driver ended."""
    deadline = time.monotonic() + limit_s
    while not happens():
        if driver.poll() is not None:
            return False
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return True


def kill_driver(driver: subprocess.Popen[str]) -> bool:
    """Kill -9 of the driver alone; whether it was still running."""
    was_running = driver.poll() is None
    if was_running:
        os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    assert driver.stdout is not None
    driver.stdout.close()
    return was_running


def killed_at_ten_moments(storage: Path, name: str, seed: int, *settings: str) -> Path:
    """The folder of a study whose driver was killed again and again, then left alone.

    A kill comes seconds after the start, or as soon as another epoch is kept, since the study
    would else end before the last. No epoch that was kept then is trained again.
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
            with contextlib.suppress(FileNotFoundError):  # an older one than is needed
                kept[Path(epoch) / STATE] = (Path(epoch) / STATE).read_text()
    assert "resuming" in run(storage, name, *settings)
    assert kept and all(file.read_text() == text for file, text in kept.items() if file.exists())
    return folder


def kill_actor(driver: subprocess.Popen[str], kind: str) -> None:
    """Kill -9 of a process of this driver's Ray whose title names an actor of this class."""

    def found() -> list[int]:
        return [pid for pid in descendants(driver.pid) if f"ray::{kind}" in title_of(pid)]

    assert wait_until(lambda: bool(found()), driver)
    os.kill(found()[-1], signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """The processes that a process started, and those that they started, and so on."""
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
