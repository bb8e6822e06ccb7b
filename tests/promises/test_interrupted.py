"""Ctrl-C and SIGTERM keep every epoch; a second driver of a study is refused."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
from study_command import (
    LAUNCHERS,
    LIMIT_S,
    descendants,
    ended,
    has_epoch,
    run,
    start,
    title_of,
    wait_until,
)

from study.storage.checkpoint import Checkpoint, Checkpoints
from study.storage.tables import read_reports, read_trials

pytestmark = pytest.mark.slow

HINT = "interrupted; run the same command again to resume"


def interrupt(driver: subprocess.Popen[str], *signals: int, status: int = 1) -> str:
    """Send signals (Ctrl-C by default) to the whole group; return the study's output.

    A terminal sends Ctrl-C so, and batch systems SIGTERM: to Ray's processes too.
    """
    for number in signals or (signal.SIGINT,):
        os.killpg(driver.pid, number)
    output, _ = driver.communicate(timeout=LIMIT_S)
    assert driver.returncode == status, output
    assert "Traceback" not in output
    return output


def assert_kept(kept: Checkpoint, folder: Path) -> None:
    """Check that a resumed study has every saved epoch of trial 0, and trained none again."""
    reports = read_reports(folder).to_pylist()
    assert (reports[0]["trial"], reports[0]["epoch"]) == (0, 1)
    by_epoch = {(row["trial"], row["epoch"]): row for row in reports}
    assert kept.rows[0]["epoch"] == 1
    for row in kept.rows:
        assert by_epoch[0, row["epoch"]]["seconds"] == row["seconds"]


def is_training(driver: subprocess.Popen[str]) -> bool:
    return any("ray::RayTrainWorker" in title_of(pid) for pid in descendants(driver.pid))


@pytest.mark.parametrize("launcher", list(LAUNCHERS))
def test_ctrl_c_keeps_every_epoch_and_a_second_driver_is_refused(
    launcher: str, tmp_path: Path
) -> None:
    settings = (*LAUNCHERS[launcher], "search.trials=2", "confirm.trials=0")
    folder = tmp_path / launcher
    driver = start(tmp_path, launcher, *settings)
    assert wait_until(lambda: is_training(driver), driver)
    assert interrupt(driver).splitlines()[-1] == HINT

    driver = start(tmp_path, launcher, *settings)
    assert wait_until(lambda: is_training(driver), driver)
    os.kill(driver.pid, signal.SIGSTOP)
    refused = ended(tmp_path, launcher, *settings)
    os.kill(driver.pid, signal.SIGCONT)
    assert refused.returncode == 1
    assert "run by one driver at a time" in refused.stderr

    assert wait_until(lambda: has_epoch(folder / "trials/0"), driver)
    assert interrupt(driver).splitlines()[-1].endswith(HINT)
    kept = Checkpoints(folder / "trials/0").require_last()
    assert kept.epoch >= 1

    assert "the teacher is ready" in run(tmp_path, launcher, *settings)
    assert_kept(kept, folder)
    assert [row["trial"] for row in read_trials(folder).to_pylist()] == [0, 1]


def test_sigterm_to_all_processes_keeps_every_epoch(tmp_path: Path) -> None:
    settings = (*LAUNCHERS["inline"], "search.trials=2", "confirm.trials=0")
    folder = tmp_path / "inline"
    driver = start(tmp_path, "inline", *settings)
    assert wait_until(lambda: is_training(driver), driver)
    output = interrupt(driver, signal.SIGTERM, status=143)
    assert output.splitlines()[-1] == HINT

    driver = start(tmp_path, "inline", *settings)
    assert wait_until(lambda: has_epoch(folder / "trials/0"), driver)
    output = interrupt(driver, signal.SIGTERM, signal.SIGTERM, status=143)
    assert output.splitlines()[-1] == HINT
    assert "SIGTERM" not in output  # of Ray's own handler, which prints its stack
    kept = Checkpoints(folder / "trials/0").require_last()
    assert kept.epoch >= 1

    assert "resuming" in run(tmp_path, "inline", *settings)
    assert_kept(kept, folder)
    rows = read_trials(folder).to_pylist()
    assert [(row["trial"], row["state"]) for row in rows] == [(0, "COMPLETE"), (1, "COMPLETE")]
