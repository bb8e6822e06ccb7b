"""A whole trial without Ray: both stages, broken off and resumed, stopped, seeded."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from models.skeleton import SKELETONS, Skeleton
from study.cache.prepare import PreparedData, prepare_data
from study.config import checks
from study.config.compose import compose, with_values
from study.config.derived import resolve
from study.config.schema import StudyConfig
from study.errors import TrainingDiverged
from study.storage.checkpoint import Checkpoints, Row, best_rows
from study.storage.paths import TARGETS
from study.teachers.make import best_of, is_ready, make_teacher, teacher_folder
from study.training import networks
from study.training.networks import load_estimator
from study.training.training_data import TrainingData
from study.trial import Trial, run_trial, teacher_spec
from study.workers import Workers

TIMES = {"seconds", "images_per_s"}


class BrokenOff(Exception):
    """Stands for a kill after an epoch's checkpoint was saved."""


@pytest.fixture(scope="module")
def config(mini_config: StudyConfig, easy: str) -> StudyConfig:
    """With everything on that draws random numbers in training."""
    values = {"data.skeleton": easy, "refine.dropout": 0.2, "refine.perturb": True}
    return with_values(mini_config, values)


@pytest.fixture(scope="module")
def whole(
    config: StudyConfig,
    mini_data: PreparedData,
    mini_targets: Path,
    tmp_path_factory: pytest.TempPathFactory,
    workers: Workers,
) -> Trial:
    """Trial 1, finished without a break."""
    folder = tmp_path_factory.mktemp("whole")
    trial = Trial(1, config, resolve(config), mini_data, folder, mini_targets)
    run_trial(trial, workers, lambda row: False)
    return trial


def rows_of(trial: Trial) -> list[Row]:
    last = Checkpoints(trial.folder).last()
    return last.rows if last else []


def without_times(rows: list[Row]) -> list[Row]:
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def kept_weights(trial: Trial) -> dict[str, Tensor]:
    """Every weight of every checkpoint that was kept."""
    folders = sorted(trial.folder.glob("epoch-*"))
    checkpoints = Checkpoints(trial.folder)
    return {
        f"{folder.name} {name}": value
        for folder in folders
        for name, value in checkpoints.at(int(folder.name[-3:])).weights().items()
    }


def assert_same(trial: Trial, other: Trial) -> None:
    assert without_times(rows_of(trial)) == without_times(rows_of(other))
    ours, theirs = kept_weights(trial), kept_weights(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def test_a_trial_reports_every_epoch_of_both_stages(whole: Trial) -> None:
    rows = rows_of(whole)
    assert [(row["stage"], row["epoch"]) for row in rows] == [
        ("distill", 1),
        ("distill", 2),
        ("refine", 3),
        ("refine", 4),
    ]
    for row in rows:
        assert 0 < row["val_ap"] < 1 and math.isfinite(row["loss"]) and row["images_per_s"] > 0
    assert {"loss.truth", "loss.heatmap", "loss.structure"} <= rows[0].keys()
    assert {"loss.teacher", "loss.truth"} <= rows[2].keys() and "loss.heatmap" not in rows[2]
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)
    steps = [row["step"] for row in rows]  # counted over both stages
    assert steps[1] == 2 * steps[0] and steps[3] - steps[2] == steps[2] - steps[1] > 0


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"trial.precision": "bf16"},
        pytest.param({"trial.compile": "true"}, marks=pytest.mark.slow),
    ],
)
def test_a_trial_broken_off_after_every_epoch_ends_as_if_it_had_not_been(
    settings: dict[str, str],
    whole: Trial,
    tmp_path: Path,
    workers: Workers,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(networks, "BACKEND", "eager")
    if settings:
        own = with_values(whole.config, settings)
        whole = dataclasses.replace(whole, config=own, folder=tmp_path / "whole")
        run_trial(whole, workers, lambda row: False)
    trial = dataclasses.replace(whole, folder=tmp_path / "broken")
    told: list[Row] = []

    def report(row: Row) -> bool:
        """Breaks off at each epoch that is new; what is replayed must be what was told."""
        known = [old for old in told if old["epoch"] == row["epoch"]]
        if not known:
            told.append(row)
            raise BrokenOff
        assert known == [row]
        return False

    for _ in range(4):
        with pytest.raises(BrokenOff):
            run_trial(trial, workers, report)
    run_trial(trial, workers, report)
    assert_same(trial, whole)


@pytest.mark.parametrize("epoch", [1, 3])
def test_a_stop_ends_the_trial_at_once_and_for_good(
    epoch: int, whole: Trial, tmp_path: Path, workers: Workers
) -> None:
    trial = dataclasses.replace(whole, folder=tmp_path)
    told: list[int] = []

    def report(row: Row) -> bool:
        told.append(row["epoch"])
        return bool(row["epoch"] == epoch)

    run_trial(trial, workers, report)
    assert told == list(range(1, epoch + 1))
    run_trial(trial, workers, report)
    assert told == [*range(1, epoch + 1)] * 2  # replayed, and nothing trained
    assert without_times(rows_of(trial)) == without_times(rows_of(whole))[:epoch]


def test_a_stopped_trial_goes_on_where_it_was_told_to_go_on_after_all(
    whole: Trial, tmp_path: Path, workers: Workers
) -> None:
    trial = dataclasses.replace(whole, folder=tmp_path)
    run_trial(trial, workers, lambda row: bool(row["epoch"] == 2))  # the hand-over
    run_trial(trial, workers, lambda row: False)
    assert_same(trial, whole)


def test_another_trial_number_starts_from_other_weights(
    whole: Trial, tmp_path: Path, workers: Workers
) -> None:
    trial = dataclasses.replace(whole, folder=tmp_path, number=2)
    run_trial(trial, workers, lambda row: True)
    other = Checkpoints(tmp_path).at(1).weights()["student.final_layer.weight"]
    again = dataclasses.replace(whole, folder=tmp_path / "again")
    run_trial(again, workers, lambda row: True)
    own = Checkpoints(again.folder).at(1).weights()["student.final_layer.weight"]
    assert not torch.equal(own, other)
    assert without_times(rows_of(again)) == without_times(rows_of(whole))[:1]


def test_checkpoints_hold_student_refiner_and_scales_but_no_teacher(whole: Trial) -> None:
    last = Checkpoints(whole.folder).last()
    assert last is not None
    assert {name.split(".")[0] for name in last.weights()} == {"student", "refiner"}
    best = best_rows(last.rows)["distill"]["epoch"]
    stage_1 = Checkpoints(whole.folder).at(best).weights()
    scales = {"scale_truth", "scale_heatmap", "scale_structure"}
    assert {name.split(".")[0] for name in stage_1} == {"student", *scales}
    assert all(stage_1[name] != 1 for name in scales)


def test_the_frozen_student_of_stage_2_is_the_best_of_stage_1(
    whole: Trial, tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    aps = iter([0.5, 0.2, 0.6, 0.1])  # the best of each stage is not its last
    monkeypatch.setattr(TrainingData, "score", lambda ground, estimator, starts: {"ap": next(aps)})
    trial = dataclasses.replace(whole, folder=tmp_path)
    run_trial(trial, workers, lambda row: False)
    checkpoints = Checkpoints(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "epoch-001",
        "epoch-003",
        "epoch-004",
    ]
    best, last = checkpoints.at(1).weights(), checkpoints.at(4).weights()
    for name, value in last.items():
        if name.startswith("student."):
            assert torch.equal(value, best[name]), name


def test_a_finetuned_student_moves_goes_on_after_a_break_and_is_kept(
    whole: Trial, config: StudyConfig, tmp_path: Path, workers: Workers
) -> None:
    values = {"refine.student": "finetuned", "refine.candidates": 2, "distill.epochs": 1}
    config = with_values(config, values)
    trial = dataclasses.replace(whole, config=config, folder=tmp_path / "whole")
    run_trial(trial, workers, lambda row: False)
    broken = dataclasses.replace(trial, folder=tmp_path / "broken")
    run_trial(broken, workers, lambda row: bool(row["epoch"] == 2))
    run_trial(broken, workers, lambda row: False)
    assert_same(trial, broken)
    best = {stage: row["epoch"] for stage, row in best_rows(rows_of(trial)).items()}
    checkpoints = Checkpoints(trial.folder)
    before = checkpoints.at(best["distill"]).weights()
    after = checkpoints.at(best["refine"]).weights()
    moved = {n for n in after if n in before and not torch.equal(before[n], after[n])}
    assert "student.stem.0.weight" in moved and not any("running" in name for name in moved)
    assert not any(name.startswith("student.final_layer") for name in moved)
    ground = TrainingData.open(trial.prepared, resolve(config), workers, targets=None)
    kept = checkpoints.at(best["refine"])
    estimator = load_estimator(
        kept, config.student, config.distill, config.refine, config.trial, resolve(config)
    )
    for name, value in estimator.state_dict().items():
        assert torch.equal(value, after[name]), name
    assert ground.score(estimator)["ap"] == kept.rows[-1]["val_ap"]


def test_a_loaded_checkpoint_scores_what_was_reported(
    whole: Trial, config: StudyConfig, workers: Workers
) -> None:
    ground = TrainingData.open(whole.prepared, resolve(config), workers, targets=None)
    for checkpoint in {row["epoch"] for row in best_rows(rows_of(whole)).values()}:
        kept = Checkpoints(whole.folder).at(checkpoint)
        scores = ground.score(
            load_estimator(
                kept, config.student, config.distill, config.refine, config.trial, resolve(config)
            )
        )
        assert scores == {
            name[4:]: value for name, value in kept.rows[-1].items() if name.startswith("val_")
        }


def test_a_trial_without_stage_2_ends_after_stage_1(
    whole: Trial, config: StudyConfig, tmp_path: Path, workers: Workers
) -> None:
    alone = with_values(config, {"refine.epochs": 0, "distill.epochs": 1})
    trial = dataclasses.replace(whole, config=alone, folder=tmp_path)
    run_trial(trial, workers, lambda row: False)
    assert [row["stage"] for row in rows_of(trial)] == ["distill"]


def test_a_loss_that_is_no_number_ends_the_trial_with_its_reason(
    whole: Trial, config: StudyConfig, tmp_path: Path, workers: Workers
) -> None:
    wild = with_values(config, {"distill.optimizer.lr": 1e20, "distill.optimizer.weight_decay": 1})
    trial = dataclasses.replace(whole, config=wild, folder=tmp_path)
    with pytest.raises(TrainingDiverged, match=r"lower.*rate|lower distill\.optimizer\.lr=1e\+20"):
        run_trial(trial, workers, lambda row: False)


def test_a_pretrained_student_starts_where_its_weights_are(
    whole: Trial, config: StudyConfig, tmp_path: Path, workers: Workers
) -> None:
    weights = Checkpoints(whole.folder).at(4).weights()
    init = tmp_path / "student.safetensors"
    save_file({k[8:]: v for k, v in weights.items() if k.startswith("student.")}, init)
    values: dict[str, Any] = {
        "student.init": str(init),
        "distill.epochs": 1,
        "refine.epochs": 0,
        "distill.optimizer.lr": 1e-12,
        "distill.optimizer.weight_decay": 0.0,
    }
    trial = dataclasses.replace(
        whole, config=with_values(config, values), folder=tmp_path / "trial"
    )
    run_trial(trial, workers, lambda row: False)
    trained = Checkpoints(trial.folder).at(1).weights()
    for name in ("student.stem.0.weight", "student.final_layer.weight"):
        torch.testing.assert_close(trained[name], weights[name], atol=1e-7, rtol=0)


def test_the_teacher_is_trained_once_and_goes_on_after_a_break(
    mini_config: StudyConfig, mini_data: PreparedData, workers: Workers
) -> None:
    config = with_values(mini_config, {"teacher.epochs": 2, "seed": 1})
    folder = teacher_folder(teacher_spec(config, resolve(config)), mini_data)

    def broken(row: Row) -> bool:
        raise BrokenOff

    with pytest.raises(BrokenOff):
        make_teacher(
            teacher_spec(config, resolve(config)), config.student, mini_data, workers, broken
        )
    assert not is_ready(folder)
    rows: list[Row] = []

    def report(row: Row) -> bool:
        rows.append(row)
        return False

    make_teacher(teacher_spec(config, resolve(config)), config.student, mini_data, workers, report)
    assert is_ready(folder) and [row["epoch"] for row in rows] == [1, 2]
    assert {row["stage"] for row in rows} == {"teacher"}
    assert best_of(folder).epoch in (1, 2)
    changed = with_values(config, {"teacher.epochs": 3})
    assert teacher_folder(teacher_spec(changed, resolve(changed)), mini_data) != folder


def test_everything_runs_on_five_joints_and_a_crop_that_is_higher_than_wide(
    five: Skeleton,
    five_data: Path,
    tmp_path: Path,
    workers: Workers,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(SKELETONS, "five", five)
    monkeypatch.setitem(checks.CHOICES, "data.skeleton", ("five",))
    config = compose(
        [
            "data=coco",
            f"data.root={five_data}",
            f"storage={tmp_path}",
            "data.skeleton=five",
            "data.input_size=[96,64]",
            "data.search_fraction=0.3",
            "data.train.annotations=five.json",
            "data.train.images=images",
            "data.val.annotations=val.json",
            "data.val.images=others",
            "teacher.size=tiny",
            "teacher.epochs=1",
            "distill.epochs=1",
            "refine.epochs=1",
            "refine.width=8",
            "distill.structure.kind=bone",
            "distill.heatmap.kind=kl",
        ]
    )
    data = prepare_data(
        config.data, resolve(config), lambda name: lambda done, total: None, lambda text: None
    )
    make_teacher(
        teacher_spec(config, resolve(config)), config.student, data, workers, lambda row: False
    )
    targets = teacher_folder(teacher_spec(config, resolve(config)), data) / TARGETS
    trial = Trial(0, config, resolve(config), data, tmp_path / "trial", targets)
    run_trial(trial, workers, lambda row: False)
    assert [row["stage"] for row in rows_of(trial)] == ["distill", "refine"]
    assert Checkpoints(trial.folder).at(2).weights()["student.final_layer.weight"].shape[0] == 5
