"""A stalled trial ends with a reason and releases its resources."""

from __future__ import annotations

import faulthandler
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from study.launch.watchdog import exit_on_stall, stall_reason
from study.storage.tables import read_final, read_trials

ROOT = Path(__file__).resolve().parents[3]
HANGS = """
import re, sys
from pathlib import Path
from study.launch.watchdog import exit_on_stall
with exit_on_stall(Path(sys.argv[1]), 0, 0.3) as heartbeat:
    heartbeat()
    re.match("(a+)+$", "a" * 60 + "b")  # takes ages and never releases the GIL
"""


def test_process_that_stalls_in_c_exits_and_dumps_its_stack(tmp_path: Path) -> None:
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", HANGS, str(tmp_path)], cwd=ROOT)
    assert done.returncode == 1 and time.monotonic() - started < 20
    assert "line 7 in <module>" in (tmp_path / "hang-0.log").read_text()
    assert stall_reason(tmp_path) == (
        "it stalled: no epoch ended within trial.timeout_s (0:00:00.300000); hang-0.log in its "
        "folder has the stack"
    )


def test_trial_with_heartbeats_leaves_no_file(tmp_path: Path) -> None:
    with exit_on_stall(tmp_path, 0, 0.4) as heartbeat:
        assert stall_reason(tmp_path) is None
        for _ in range(6):
            time.sleep(0.1)
            heartbeat()
    time.sleep(0.5)  # longer than the limit: no watchdog is left
    assert list(tmp_path.iterdir()) == []


def test_limit_of_zero_starts_no_watchdog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(faulthandler, "dump_traceback_later")
    with exit_on_stall(tmp_path / "trial", 0, 0.0) as heartbeat:
        heartbeat()
    assert not (tmp_path / "trial").exists()


def checkout_that_stalls(folder: Path) -> Path:
    """Copy the packages so that a trial with color >= 0.3 stalls at its third batch."""
    for package in ("models", "search_spaces", "study"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, folder / package, ignore=ignored)
    file = folder / "study" / "training/batches.py"
    text = file.read_text()
    loop = "        for number, share in enumerate(shares):\n"
    assert text.count(loop) == 1
    stall = "            if number == 2 and augment.color >= 0.3:\n"
    stall += "                __import__('time').sleep(3600)\n"
    file.write_text(text.replace(loop, loop + stall))
    return folder


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("studies")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["inline", "train"])
def test_study_finishes_without_the_trials_that_stall(launcher: str, storage: Path) -> None:
    """A trial takes all CPUs, so that no other can run while it holds them."""
    checkout = checkout_that_stalls(storage / f"checkout-{launcher}")
    space = storage / "stalls.yaml"
    space.write_text(
        "question: Does a trial that stalls end alone?\n"
        "parameters:\n"
        "  distill.augment.color: {low: 0.2, high: 1.0, role: nuisance}\n"
    )
    settings = (
        f"storage={storage}",
        f"name={launcher}",
        f"search_space={space}",
        "display=plain",
        "data.num_train_images=48",
        "data.num_val_images=12",
        "teacher.epochs=1",
        "distill.epochs=1",
        "refine.epochs=1",
        "search.trials=3",
        "confirm.trials=0",
        f"trial.cpus={os.cpu_count()}",
        "trial.timeout_s=30",
        "trial.max_failures=1",
        f"trial.launcher={launcher}",
    )
    command = [sys.executable, str(checkout / "study" / "tune.py"), *settings]
    # Ray's workers search the folder where the driver was started first.
    done = subprocess.run(command, cwd=storage, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    trials = read_trials(storage / launcher).to_pylist()
    stalled = [trial for trial in trials if trial["params.distill.augment.color"] >= 0.3]
    assert len(trials) == 3 and len(stalled) == 1  # the controls have 0.2
    for trial in trials:
        assert trial["state"] == "FAIL" if trial in stalled else trial["state"] != "FAIL"
    assert all("it stalled: no epoch ended within" in trial["error"] for trial in stalled)
    log = storage / launcher / "trials" / str(stalled[0]["trial"]) / "hang-0.log"
    assert "training_batches" in log.read_text()
    assert read_final(storage / launcher).num_rows
