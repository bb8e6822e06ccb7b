"""Ctrl-C keeps every epoch and prints how to resume; a second driver of a study is refused."""

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

from study.storage.checkpoint import Checkpoints
from study.storage.tables import read_reports, read_trials

pytestmark = pytest.mark.slow

HINT = "interrupted; run the same command again to resume"


def interrupt(driver: subprocess.Popen[str]) -> str:
    """Press Ctrl-C, which the terminal sends to the whole group; return the study's output."""
    os.killpg(driver.pid, signal.SIGINT)
    output, _ = driver.communicate(timeout=LIMIT_S)
    assert driver.returncode == 1, output
    assert "Traceback" not in output
    return output


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
    reports = read_reports(folder).to_pylist()
    assert (reports[0]["trial"], reports[0]["epoch"]) == (0, 1)
    by_epoch = {(row["trial"], row["epoch"]): row for row in reports}
    assert kept.rows[0]["epoch"] == 1
    for row in kept.rows:  # none was trained again
        assert by_epoch[0, row["epoch"]]["seconds"] == row["seconds"]
    assert [row["trial"] for row in read_trials(folder).to_pylist()] == [0, 1]
