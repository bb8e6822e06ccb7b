"""Kill -9 of anything, at any moment: the study ends with the trials of an undisturbed one."""

from __future__ import annotations

import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from study_command import (
    CPUS,
    LAUNCHERS,
    LIMIT_S,
    arm,
    epochs_in,
    evidence,
    has_killed,
    kill_actor,
    kill_driver,
    run,
    start,
    wait_until,
)

from study.launch import RAY_FOLDER
from study.results import read_reports, read_trials
from study.stage_search import open_study

pytestmark = pytest.mark.slow

KILLS = 10
POINTS = {
    "asked": 2,  # inside the owner's ask, of the third trial
    "saved": 4,  # an epoch is on disk and nobody knows of it
    "renaming trials": 1,  # a part of the table is written and bears no name yet
    "handed over": 2,  # stage 1 is over, stage 2 has not begun
}
"""How often each point is passed before it kills."""
STAGED = {
    "inline": ("search.trials=6", {"handing over": 0, "handed over": 1}),
    "train": (
        "search.trials=4",
        {"asked": 0, "saved": 1, "renaming trials": 0, "handing over": 0, "handed over": 0},
    ),
}
"""At the hand-over the owner dies before the parents are frozen, a refiner before its start."""


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all studies of this file share one data set and one teacher."""
    return tmp_path_factory.mktemp("survival")


@pytest.fixture(scope="module", params=list(LAUNCHERS))
def launcher(request: pytest.FixtureRequest) -> str:
    """All tests of one launcher, which share ``whole``, run before those of the next."""
    return str(request.param)


@pytest.fixture(scope="module")
def whole(storage: Path, launcher: str) -> dict[str, Any]:
    """What the undisturbed study found out."""
    name = f"{launcher}-whole"
    run(storage, name, *LAUNCHERS[launcher])
    return evidence(storage / name)


def killed_at_ten_moments(storage: Path, name: str, seed: int, *settings: str) -> Path:
    """The folder of a study whose driver was killed soon after its start, or after an epoch."""
    dice, folder = random.Random(seed), storage / name
    for kill in range(KILLS):
        seen = epochs_in(folder)
        driver = start(storage, name, *settings)
        if kill % 3:
            time.sleep(dice.uniform(1, 12))
        else:
            wait_until(lambda seen=seen: bool(epochs_in(folder) - seen), driver)
            time.sleep(dice.uniform(0, 0.1))
        assert kill_driver(driver), f"the study ended after {kill} kills"
    run(storage, name, *settings)
    return folder


def test_a_driver_killed_at_ten_moments_changes_nothing(
    storage: Path, whole: dict[str, Any], launcher: str
) -> None:
    folder = killed_at_ten_moments(storage, f"{launcher}-killed", 7, *LAUNCHERS[launcher])
    assert evidence(folder) == whole
    assert not (folder / RAY_FOLDER).exists()


def test_actors_killed_outright_change_nothing(
    storage: Path, whole: dict[str, Any], launcher: str
) -> None:
    name = f"{launcher}-actors"
    folder = storage / name
    driver = start(storage, name, *LAUNCHERS[launcher])
    killed = {
        "inline": ["StudyOwner", "ImplicitFunc"],
        "train": ["RayTrainWorker", "TrainController", "ImplicitFunc"],
    }[launcher]
    for trial, kind in enumerate(killed):
        assert wait_until((folder / f"trials/{trial}/epoch-001").exists, driver)
        kill_actor(driver, kind)
    if launcher == "train":
        kill_actor(driver, "StudyOwner")
    said, _ = driver.communicate(timeout=LIMIT_S)
    assert driver.returncode == 0, said
    assert evidence(folder) == whole


@pytest.mark.parametrize("pruner", ["successive_halving", "none"])
def test_two_at_once_lose_and_double_nothing_when_their_driver_is_killed_ten_times(
    storage: Path, launcher: str, pruner: str
) -> None:
    name = f"{launcher}-{pruner}"
    settings = (
        *LAUNCHERS[launcher],
        *(f"trial.cpus={CPUS / 4 if launcher == 'train' else CPUS / 2}", "search.concurrent=2"),
        *("search.sampler=random", f"search.pruner={pruner}"),
    )
    folder = killed_at_ten_moments(storage, name, 11, *settings)
    trials = open_study(folder, name).get_trials()
    rows = read_trials(folder).to_pylist()
    assert [trial.number for trial in trials] == [row["trial"] for row in rows]
    assert [trial.state.name for trial in trials] == [row["state"] for row in rows]
    told = Counter((row["trial"], row["epoch"]) for row in read_reports(folder).to_pylist())
    known = {(trial.number, epoch) for trial in trials for epoch in trial.intermediate_values}
    assert {key for key in told if key[0] is not None} == known
    assert set(told.values()) == {1}
    if pruner == "none":
        run(storage, f"{name}-whole", *settings)
        assert evidence(folder) == evidence(storage / f"{name}-whole")
    else:
        assert [rungs_of(trial) for trial in trials] == [rungs_due(trial) for trial in trials]


def rungs_of(trial: Any) -> list[float]:
    """What successive halving keeps of the trial, rung by rung."""
    rungs = [key for key in trial.system_attrs if key.startswith("completed_rung_")]
    return [trial.system_attrs[f"completed_rung_{rung}"] for rung in range(len(rungs))]


def rungs_due(trial: Any) -> list[float]:
    """Its values after epochs 1, 2, 4 and 8, but for the last of all, which ends it anyhow."""
    curve, budget = trial.intermediate_values, trial.user_attrs["budget"]
    return [curve[epoch] for epoch in (1, 2, 4, 8) if epoch in curve and epoch < budget]


def test_processes_that_die_at_the_worst_points_change_nothing(
    storage: Path, tmp_path: Path
) -> None:
    arm(tmp_path, POINTS)
    run(storage, "inline-faulty", *LAUNCHERS["inline"], faulty=tmp_path)
    assert has_killed(tmp_path, POINTS)
    if not (storage / "inline-whole").exists():
        run(storage, "inline-whole", *LAUNCHERS["inline"])
    assert evidence(storage / "inline-faulty") == evidence(storage / "inline-whole")


def test_a_staged_study_killed_at_its_hand_over_ends_as_undisturbed(
    storage: Path, launcher: str, tmp_path: Path
) -> None:
    trials, points = STAGED[launcher]
    name = f"{launcher}-staged"
    settings = (
        *(*LAUNCHERS[launcher], "distill.epochs=1", "refine.epochs=1", trials),
        *("plan=staged", "search_space=joint", "plan.parents=2"),
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
