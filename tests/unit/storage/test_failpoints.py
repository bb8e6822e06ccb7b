"""Points of failure do nothing unless a test has armed them, and then kill the process once."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from study.storage import failpoints

ROOT = Path(__file__).resolve().parents[3]


def test_points_that_are_not_armed_do_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(failpoints.FOLDER, raising=False)
    failpoints.point("saved")
    monkeypatch.setenv(failpoints.FOLDER, str(tmp_path))
    failpoints.point("saved")
    assert list(tmp_path.iterdir()) == []


def test_armed_point_kills_once_after_its_number_of_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "saved").write_text("2")
    monkeypatch.setenv(failpoints.FOLDER, str(tmp_path))
    code = "from study.storage.failpoints import point\nfor n in range(9):\n point('saved')\n"
    code += " print(n, flush=True)"
    command = [sys.executable, "-c", code]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (killed.returncode, killed.stdout.split()) == (-signal.SIGKILL, ["0", "1"])
    assert [file.name for file in tmp_path.iterdir()] == ["saved.done"]
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (again.returncode, len(again.stdout.split())) == (0, 9)
