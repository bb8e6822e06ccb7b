"""optuna-dashboard, by the command in study/README.md, on a running study."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest

from study.search.stage import open_study

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture
def running(tmp_path: Path) -> optuna.Study:
    """A study with one complete and one running trial."""
    study = open_study(tmp_path, "drawn")
    study.tell(study.ask({"weight": optuna.distributions.FloatDistribution(0, 1)}), 0.25)
    study.ask().report(0.125, step=1)
    return study


@pytest.fixture
def port(tmp_path: Path, running: optuna.Study) -> Iterator[int]:
    """Port of a running dashboard."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    typed = re.search(
        r"^\.venv/bin/(optuna-dashboard .*) \S+$", (ROOT / "study" / "README.md").read_text(), re.M
    )
    assert typed
    program, *options = typed[1].split()
    command = [Path(sys.executable).parent / program, *options, f"--port={port}"]
    dashboard = subprocess.Popen(
        [*command, tmp_path / "optuna.journal"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    yield port
    dashboard.kill()
    dashboard.wait()


def get_json(port: int, path: str) -> Any:
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/{path}") as answer:
                return json.load(answer)
        except urllib.error.URLError:
            assert time.monotonic() < deadline
            time.sleep(0.2)


def test_dashboard_shows_new_trials(port: int, running: optuna.Study) -> None:
    (study,) = get_json(port, "studies")["study_summaries"]
    assert study["study_name"] == "drawn"

    def trials() -> list[tuple[str, list[float] | None]]:
        found = get_json(port, f"studies/{study['study_id']}?after=0")["trials"]
        return [(trial["state"], trial.get("values")) for trial in found]

    assert trials() == [("Complete", [0.25]), ("Running", None)]
    running.tell(running.ask(), 0.5)
    now = [("Complete", [0.25]), ("Running", None), ("Complete", [0.5])]
    deadline = time.monotonic() + 60
    while trials() != now:  # it reads the journal every ten seconds
        assert time.monotonic() < deadline
        time.sleep(1)


def test_dashboard_listens_on_this_machine_only(port: int) -> None:
    get_json(port, "studies")
    sockets = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    listening = {line[1] for line in sockets if line[3] == "0A"}
    assert {place for place in listening if place.endswith(f":{port:04X}")} == {
        f"0100007F:{port:04X}"
    }
