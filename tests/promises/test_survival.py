"""A study that is killed anywhere, at any time, resumes and ends as an undisturbed one."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from study_command import (
    LAUNCHERS,
    LIMIT_S,
    arm,
    evidence,
    has_epoch,
    has_killed,
    kill_actor,
    killed_at_ten_moments,
    run,
    start,
    wait_until,
)

from study.storage import failpoints
from study.storage.paths import ray_storage
from study.storage.tables import read_trials

pytestmark = pytest.mark.slow

POINTS = {
    "suggested": 2,  # while the owner suggests the third trial
    "saved": 4,  # an epoch is saved but not reported
    "renaming trials": 1,  # a file of the table is written but not renamed
    "handed over": 2,  # stage 1 is over, stage 2 has not begun
}
"""Passes of each point before it kills."""
STAGED = {
    "inline": ("search.trials=6", {"handing over": 0, "handed over": 1}),
    "train": (
        "search.trials=4",
        {"suggested": 0, "saved": 1, "renaming trials": 0, "handing over": 0, "handed over": 0},
    ),
}
"""The owner dies before it stores the parents, a refiner before it starts."""


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in which all studies of this file share one data set and one teacher."""
    return tmp_path_factory.mktemp("survival")


@pytest.fixture(scope="module", params=list(LAUNCHERS))
def launcher(request: pytest.FixtureRequest) -> str:
    """Launcher; all tests of one, which share ``whole``, run before those of the next."""
    return str(request.param)


@pytest.fixture(scope="module")
def whole(storage: Path, launcher: str) -> dict[str, Any]:
    """Results of the undisturbed study."""
    name = f"{launcher}-whole"
    run(storage, name, *LAUNCHERS[launcher])
    return evidence(storage / name)


def test_driver_killed_ten_times_changes_nothing(
    storage: Path, whole: dict[str, Any], launcher: str
) -> None:
    folder = killed_at_ten_moments(storage, f"{launcher}-killed", 7, *LAUNCHERS[launcher])
    assert evidence(folder) == whole
    assert not ray_storage(folder).exists()
    assert "is finished" in run(storage, folder.name, *LAUNCHERS[launcher])


def test_killed_actors_change_nothing(storage: Path, whole: dict[str, Any], launcher: str) -> None:
    name = f"{launcher}-actors"
    folder = storage / name
    driver = start(storage, name, *LAUNCHERS[launcher])
    killed = {
        "inline": ["StudyOwner", "ImplicitFunc"],
        "train": ["RayTrainWorker", "TrainController", "ImplicitFunc"],
    }[launcher]
    for trial, kind in enumerate(killed):
        assert wait_until(partial(has_epoch, folder / f"trials/{trial}"), driver)
        kill_actor(driver, kind)
    if launcher == "train":
        kill_actor(driver, "StudyOwner")
    output, _ = driver.communicate(timeout=LIMIT_S)
    assert driver.returncode == 0, output
    assert evidence(folder) == whole


def test_process_killed_between_two_trials_fails_neither(storage: Path, tmp_path: Path) -> None:
    arm(tmp_path, {"suggested": 1})  # the next trial comes late, once the owner has restarted
    settings = (*LAUNCHERS["inline"], "search.trials=3", "confirm.trials=0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(failpoints.FOLDER, str(tmp_path))
        driver = start(storage, "between", *settings)
    assert wait_until(lambda: has_killed(tmp_path, {"suggested": 1}), driver)
    kill_actor(driver, "ImplicitFunc")
    output, _ = driver.communicate(timeout=LIMIT_S)
    assert driver.returncode == 0, output
    states = [row["state"] for row in read_trials(storage / "between").to_pylist()]
    assert "FAIL" not in states and len(states) == 3


def test_processes_killed_at_the_worst_points_change_nothing(
    storage: Path, tmp_path: Path
) -> None:
    arm(tmp_path, POINTS)
    run(storage, "inline-faulty", *LAUNCHERS["inline"], faulty=tmp_path)
    assert has_killed(tmp_path, POINTS)
    if not (storage / "inline-whole").exists():
        run(storage, "inline-whole", *LAUNCHERS["inline"])
    assert evidence(storage / "inline-faulty") == evidence(storage / "inline-whole")


def test_staged_study_killed_at_its_hand_over_ends_as_an_undisturbed_one(
    storage: Path, launcher: str, tmp_path: Path
) -> None:
    trials, points = STAGED[launcher]
    name = f"{launcher}-staged"
    settings = (
        *LAUNCHERS[launcher],
        "distill.epochs=1",
        "refine.epochs=1",
        trials,
        "plan=staged",
        "search_space=joint",
        "plan.parents=2",
    )
    run(storage, name, *settings)
    arm(tmp_path, points)
    run(storage, f"{name}-faulty", *settings, faulty=tmp_path)
    assert has_killed(tmp_path, points)
    smooth, faulty = (
        [evidence(storage / each, f"{each}/{stage}") for stage in ("distill", "refine")]
        for each in (name, f"{name}-faulty")
    )
    assert faulty == smooth
    rows = read_trials(storage / name).to_pylist()
    assert [row["trial"] for row in rows] == list(range(len(rows)))
    half = len(rows) // 2
    assert [row["parent_trial"] is None for row in rows] == [True] * half + [False] * half
