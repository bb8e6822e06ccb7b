"""A pruned trial's CPUs are free at once, even if another Ray runs on the machine."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from study_command import CPUS, LAUNCHERS, ROOT, SETTINGS

pytestmark = pytest.mark.slow

LIMIT_S = 5.0
SCRIPT = """
import sys, threading, time
from pathlib import Path

import ray
from optuna.trial import TrialState

import study.driver
from study.config.compose import compose
from study.errors import InputError
from study.search.owner import StudyOwner

folder, cpus, dashboard, *studies = sys.argv[1:]
pruned = Path(folder) / "pruned"


class PrunesAtOnce(StudyOwner):
    def report(self, number, row):
        self._stage(number).record(number, row)
        self._end(number, TrialState.PRUNED)
        pruned.write_text("")
        return True


def wait_until_free():
    while not pruned.exists():
        time.sleep(0.02)
    started = time.monotonic()
    while ray.available_resources().get("CPU", 0) < float(cpus):
        time.sleep(0.02)
    waited.append(time.monotonic() - started)


study.driver.StudyOwner = PrunesAtOnce
ray.init(
    address="local",
    num_cpus=int(cpus),
    include_dashboard=dashboard == "dashboard",
    log_to_driver=False,
)
for settings in studies:
    waited = []
    pruned.unlink(missing_ok=True)
    watch = threading.Thread(target=wait_until_free, daemon=True)
    watch.start()
    try:
        study.driver.run_study(compose(settings.split()))
    except InputError as error:
        assert "no trial completed" in str(error), error
    watch.join(60)
    print("waited", *waited)
"""
"""Runs studies of one trial, pruned after an epoch; prints how long its CPUs stayed held."""
ANOTHER = """
import ray, time
ray.init(address="local", include_dashboard=False)
print("started", flush=True)
time.sleep(3600)
"""


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in which all studies of this file share one data set and one teacher."""
    return tmp_path_factory.mktemp("freed")


@contextlib.contextmanager
def another_ray() -> Iterator[None]:
    """Run another user's Ray on this machine."""
    command = [sys.executable, "-c", ANOTHER]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "started\n"
        try:
            yield
        finally:
            other.terminate()


@pytest.mark.parametrize("other", ["alone", "beside another Ray"])
@pytest.mark.parametrize("dashboard", ["dashboard", "no dashboard"])
def test_pruned_trials_cpus_are_free_at_once(
    dashboard: str, other: str, storage: Path, tmp_path: Path
) -> None:
    """A trial takes all CPUs; the time counts from the decision to prune it."""
    common = (*SETTINGS, f"storage={storage}", "data=drawn")
    studies = [
        " ".join(
            (*common, *LAUNCHERS[launcher], "search.trials=1", f"name={tmp_path.name}-{launcher}")
        )
        for launcher in LAUNCHERS
    ]
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), str(CPUS), dashboard, *studies]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with another_ray() if other != "alone" else contextlib.nullcontext():
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=900
        )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("waited")]
    assert len(lines) == len(LAUNCHERS), done.stdout
    for launcher, (_, waited) in zip(LAUNCHERS, lines, strict=True):
        assert float(waited) < LIMIT_S, launcher
