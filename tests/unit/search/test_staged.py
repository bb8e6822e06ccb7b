"""plan=staged: students first, then refiners that start from the best students."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial

from search_spaces.space import load_space
from study.config.compose import compose
from study.config.derived import resolve
from study.config.schema import StudyConfig
from study.errors import InputError
from study.search.controls import trial_config
from study.search.owner import StudyOwner
from study.search.stage import trials_handed_over
from study.search.staged import (
    PARENT,
    choose_parents,
    distill_space,
    num_distill_trials,
    refine_space,
    staged_faults,
    with_parent,
)
from study.storage.checkpoint import Checkpoints
from study.storage.paths import trial_folder
from study.storage.tables import read_reports, read_trials

DISTILL, REFINE, TRIALS = 3, 2, 8


@pytest.fixture
def config(tmp_path: Path) -> StudyConfig:
    return compose(
        [
            "plan=staged",
            "name=study",
            f"storage={tmp_path}",
            "plan.parents=2",
            f"distill.epochs={DISTILL}",
            f"refine.epochs={REFINE}",
            f"search.trials={TRIALS}",
            "search.pruner=none",
            "search.startup_trials=2",
        ]
    )


def start(config: StudyConfig, session: str = "a") -> StudyOwner:
    folder = Path(config.storage) / "study"
    folder.mkdir(exist_ok=True)
    space = with_parent(config.plan, load_space(config.search_space))
    return StudyOwner(str(folder), config, resolve(config), space.to_json(), session)


def run_trial(owner: StudyOwner, name: str, ap: float) -> dict[str, Any]:
    """Run a trial that reaches this AP in its last epoch; return its suggestion."""
    suggestion = owner.suggest(name)
    number, first = suggestion["number"], 0 if suggestion["parent"] is None else DISTILL
    epochs = DISTILL + REFINE if first else suggestion["values"].get("distill.epochs", DISTILL)
    checkpoints = Checkpoints(trial_folder(owner.folder, number))
    rows: list[dict[str, Any]] = []
    for epoch in range(first + 1, epochs + 1):
        stage = "refine" if first else "distill"
        row = {"stage": stage, "epoch": epoch, "step": epoch, "seconds": 1.0 * epoch}
        rows.append({**row, "val_ap": ap * epoch / epochs})
        checkpoints.save({"w": torch.zeros(1)}, {}, rows)
        assert owner.report(number, rows[-1]) == (epoch == epochs)
    return suggestion


def run_students(owner: StudyOwner) -> None:
    for index, ap in enumerate((0.9, 0.2, 0.5, 0.4)):
        assert owner.trials_to_run() == 4 - index
        assert run_trial(owner, f"s{index}", ap)["parent"] is None


def test_students_come_first_and_have_no_stage_2(config: StudyConfig) -> None:
    owner = start(config)
    suggestion = run_trial(owner, "baseline", 0.9)
    assert suggestion["values"]["distill.epochs"] == DISTILL + REFINE
    suggestion = run_trial(owner, "defaults", 0.2)
    assert suggestion["values"]["refine.epochs"] == 0
    paths = {path for path in suggestion["values"] if path != "refine.epochs"}
    assert paths
    assert not any(path.startswith("refine.") for path in paths)


def test_refiners_start_from_the_best_students_except_the_baseline(config: StudyConfig) -> None:
    owner = start(config)
    run_students(owner)
    assert owner.trials_to_run() == 4
    suggestion = owner.suggest("r0")
    assert (suggestion["number"], suggestion["parent"]) == (4, 2)
    student = owner.stages[0].frozen(2).params
    values = suggestion["values"]
    assert {path: values[path] for path in student} == student
    assert "refine.epochs" not in values
    assert PARENT not in values


def test_refiners_continue_the_numbering_of_epochs_and_trials(config: StudyConfig) -> None:
    owner = start(config)
    run_students(owner)
    owner.trials_to_run()
    parents = {4 + i: run_trial(owner, f"r{i}", 0.6 + i / 100)["parent"] for i in range(4)}
    assert set(parents.values()) <= {parent.trial for parent in owner.stages[1].parents}
    assert owner.trials_to_run() == 0
    assert owner.status()["best"]["trial"] == 0
    baseline, students = DISTILL + REFINE, 3 * DISTILL
    over = {"trials": 4, "left": 0, "is_bound": False}
    assert owner.status()["stages"] == [
        {**over, "epochs": baseline + students},
        {**over, "epochs": 4 * REFINE},
    ]
    assert owner.stages[1].frozen(5).intermediate_values == pytest.approx(
        {1: 0.61 * 4 / 5, 2: 0.61}
    )
    rows = {row["trial"]: row for row in read_trials(owner.folder).to_pylist()}
    assert sorted(rows) == list(range(TRIALS))
    assert {n: row["parent_trial"] for n, row in rows.items() if n >= 4} == parents
    reports = [row for row in read_reports(owner.folder).to_pylist() if row["trial"] == 5]
    assert [(row["epoch"], row["parent_trial"]) for row in reports] == [
        (4, parents[5]),
        (5, parents[5]),
    ]


def test_row_of_a_refiner_has_its_complete_settings(config: StudyConfig) -> None:
    owner = start(config)
    run_students(owner)
    owner.trials_to_run()
    run_trial(owner, "r0", 0.6)
    rows = {row["trial"]: row for row in read_trials(owner.folder).to_pylist()}
    whole, student = trial_config(config, rows[4]), trial_config(config, rows[2])
    assert whole.distill == student.distill
    assert (whole.refine.epochs, student.refine.epochs) == (REFINE, 0)
    assert trial_config(config, rows[0]).refine.epochs == 0


def test_parents_stay_frozen_over_restarts_and_more_trials(config: StudyConfig) -> None:
    owner = start(config)
    run_students(owner)
    owner.trials_to_run()
    first = owner.suggest("r0")
    config.search.trials = 20
    again = start(config, "b")
    assert again.trials_to_run() == 16
    assert again.stages[1].parents == owner.stages[1].parents
    assert again.suggest("other") == first


def test_students_are_counted_once_they_are_handed_over(config: StudyConfig) -> None:
    folder = Path(config.storage) / "study"
    assert trials_handed_over(folder, "study") is None
    assert not folder.exists()
    owner = start(config)
    run_students(owner)
    assert [stage["left"] for stage in owner.status()["stages"]] == [0, 4 * REFINE]
    assert trials_handed_over(folder, "study") is None
    owner.trials_to_run()
    owner.config.search.trials = 20
    journal = (folder / "optuna.journal").read_bytes()
    assert trials_handed_over(folder, "study") == 4
    assert (folder / "optuna.journal").read_bytes() == journal
    assert [stage["trials"] for stage in owner.status()["stages"]] == [4, 16]


def test_kill_before_the_hand_over_does_not_change_the_parents(config: StudyConfig) -> None:
    owner = start(config)
    run_students(owner)
    owner._refiners_study()  # a kill came after it was created and before its parents were stored
    again = start(config, "b")
    assert len(again.stages) == 1
    assert again.trials_to_run() == 4
    owner._hand_over()
    assert again.stages[1].parents[0].trial == 2
    assert again.stages[1].parents == owner.stages[1].parents


def test_hand_over_without_a_complete_student_is_refused(config: StudyConfig) -> None:
    owner = start(config)
    run_trial(owner, "baseline", 0.9)
    for index in range(3):
        owner.fail(owner.suggest(f"s{index}")["number"], "it was made to fail")
    with pytest.raises(InputError, match=r"none but the baseline[\s\S]*trial 1: it was made"):
        owner.trials_to_run()


@pytest.mark.parametrize(("trials", "share", "students"), [(8, 0.5, 4), (4, 0.1, 2), (5, 0.99, 4)])
def test_share_of_students(trials: int, share: float, students: int) -> None:
    assert num_distill_trials(trials, share) == students


def student(number: int, ap: float, lr: float, kind: str) -> FrozenTrial:
    frozen = optuna.trial.create_trial(
        value=ap,
        params={"lr": lr, "kind": kind},
        distributions={
            "lr": FloatDistribution(1e-4, 1e-2, log=True),
            "kind": CategoricalDistribution(["mse", "kl"]),
        },
    )
    frozen.number = number
    return frozen


def test_parents_are_good_and_diverse() -> None:
    best = student(0, 0.5, 1e-3, "mse")
    twin = student(1, 0.49, 1.1e-3, "mse")
    other = student(2, 0.4, 1e-4, "kl")
    middling = student(3, 0.3, 1e-3, "mse")
    poor = student(4, 0.1, 1e-2, "kl")
    chosen = choose_parents([poor, twin, other, best, middling], 2)
    assert [trial.number for trial in chosen] == [0, 2]
    assert choose_parents([twin, best], 3) == [best, twin]


def test_stages_share_no_parameter() -> None:
    config = compose(["plan=staged"])
    space = with_parent(config.plan, load_space("staged"))
    first, second = distill_space(space).paths, refine_space(space, 2).paths
    assert not set(first) & set(second)
    assert set(first) | set(second) == set(space.paths)


def test_space_without_parameters_of_both_stages_is_refused() -> None:
    config = compose(["plan=staged", "search_space=distill", "refine.epochs=0"])
    faults = list(staged_faults(config.plan, config.refine.epochs, load_space("distill")))
    assert len(faults) == 2
    assert "refine.epochs=0" in faults[0]
    assert "none of stage 2" in faults[1]
    changed = compose(["search_space=distill"])
    assert not list(staged_faults(changed.plan, changed.refine.epochs, load_space("distill")))
