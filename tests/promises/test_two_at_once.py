"""Two trials at once, their driver killed ten times: none is lost, none is repeated."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from study_command import CPUS, LAUNCHERS, evidence, killed_at_ten_moments, run

from study.search.stage import open_study
from study.storage.tables import read_reports, read_trials

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in which all studies of this file share one data set and one teacher."""
    return tmp_path_factory.mktemp("two")


@pytest.mark.parametrize("launcher", list(LAUNCHERS))
@pytest.mark.parametrize("pruner", ["successive_halving", "none"])
def test_two_trials_at_once_survive_ten_kills_of_their_driver(
    storage: Path, launcher: str, pruner: str
) -> None:
    name = f"{launcher}-{pruner}"
    settings = (
        *LAUNCHERS[launcher],
        f"trial.cpus={CPUS / 4 if launcher == 'train' else CPUS / 2}",
        "search.concurrent=2",
        "search.sampler=random",
        f"search.pruner={pruner}",
    )
    folder = killed_at_ten_moments(storage, name, 11, *settings)
    trials = open_study(folder, name).get_trials()
    rows = read_trials(folder).to_pylist()
    assert [trial.number for trial in trials] == [row["trial"] for row in rows]
    assert [trial.state.name for trial in trials] == [row["state"] for row in rows]
    reported = Counter((row["trial"], row["epoch"]) for row in read_reports(folder).to_pylist())
    recorded = {(trial.number, epoch) for trial in trials for epoch in trial.intermediate_values}
    assert {key for key in reported if key[0] is not None} == recorded
    assert set(reported.values()) == {1}
    if pruner == "none":
        run(storage, f"{name}-whole", *settings)
        assert evidence(folder) == evidence(storage / f"{name}-whole")
    else:
        assert [rungs_of(trial) for trial in trials] == [rungs_due(trial) for trial in trials]


def rungs_of(trial: Any) -> list[float]:
    """Return the values that successive halving stored for the trial, by rung."""
    rungs = [key for key in trial.system_attrs if key.startswith("completed_rung_")]
    return [trial.system_attrs[f"completed_rung_{rung}"] for rung in range(len(rungs))]


def rungs_due(trial: Any) -> list[float]:
    """Return the trial's values at epochs 1, 2, 4 and 8, except its last epoch."""
    curve, budget = trial.intermediate_values, trial.user_attrs["budget"]
    return [curve[epoch] for epoch in (1, 2, 4, 8) if epoch in curve and epoch < budget]
