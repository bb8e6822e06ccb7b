"""A whole trial without Ray: both stages, interrupted, resumed, stopped, seeded."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from models.refined_pose import RefinedPose
from models.skeleton import SKELETONS, Skeleton
from study.cache.prepare import PreparedData, prepare_data
from study.config import checks
from study.config.compose import compose, with_values
from study.config.derived import resolve
from study.config.schema import StudyConfig
from study.errors import TrainingDiverged
from study.storage.checkpoint import Checkpoint, Checkpoints, Row, best_rows
from study.storage.paths import TARGETS
from study.teachers.adapters import TeacherSpec
from study.teachers.identity import teacher_folder
from study.teachers.make import best_of, is_ready, make_teacher
from study.training import networks
from study.training.networks import load_estimator
from study.training.training_data import TrainingData
from study.trial import Trial, run_trial, teacher_spec
from study.workers import Workers

TIMES = {"seconds", "images_per_s"}


class Interrupted(Exception):
    """Stand-in for a kill after an epoch's checkpoint was saved."""


@pytest.fixture(scope="module")
def config(mini_config: StudyConfig, easy: str) -> StudyConfig:
    """The mini study with every setting that draws random numbers in training."""
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
    """Trial 1, finished without an interruption."""
    folder = tmp_path_factory.mktemp("whole")
    trial = Trial(1, config, resolve(config), mini_data, folder, mini_targets)
    run_trial(trial, workers, lambda row: False)
    return trial


def spec_of(config: StudyConfig) -> TeacherSpec:
    return teacher_spec(config, resolve(config))


def estimator_of(checkpoint: Checkpoint, config: StudyConfig) -> RefinedPose:
    return load_estimator(
        checkpoint, config.student, config.distill, config.refine, config.trial, resolve(config)
    )


def rows_of(trial: Trial) -> list[Row]:
    return Checkpoints(trial.folder).rows()


def without_times(rows: list[Row]) -> list[Row]:
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def kept_weights(trial: Trial) -> dict[str, Tensor]:
    """Return every weight of every checkpoint that was kept."""
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


def test_trial_reports_every_epoch_of_both_stages(whole: Trial) -> None:
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
def test_trial_interrupted_after_every_epoch_equals_an_undisturbed_one(
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
    trial = dataclasses.replace(whole, folder=tmp_path / "interrupted")
    reported: list[Row] = []

    def report(row: Row) -> bool:
        """Interrupt after each new epoch; check that replayed rows equal those reported."""
        known = [old for old in reported if old["epoch"] == row["epoch"]]
        if not known:
            reported.append(row)
            raise Interrupted
        assert known == [row]
        return False

    for _ in range(4):
        with pytest.raises(Interrupted):
            run_trial(trial, workers, report)
    run_trial(trial, workers, report)
    assert_same(trial, whole)


@pytest.mark.parametrize("epoch", [1, 3])
def test_stop_ends_the_trial_at_once_and_for_good(
    epoch: int, whole: Trial, tmp_path: Path, workers: Workers
) -> None:
    trial = dataclasses.replace(whole, folder=tmp_path)
    reported: list[int] = []

    def report(row: Row) -> bool:
        reported.append(row["epoch"])
        return bool(row["epoch"] == epoch)

    run_trial(trial, workers, report)
    assert reported == list(range(1, epoch + 1))
    run_trial(trial, workers, report)
    assert reported == [*range(1, epoch + 1)] * 2  # replayed without training
    assert without_times(rows_of(trial)) == without_times(rows_of(whole))[:epoch]


def test_stopped_trial_resumes_if_it_is_run_without_a_stop(
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
    last = Checkpoints(whole.folder).require_last()
    assert last.stage == "refine"
    assert {name.split(".")[0] for name in last.weights()} == {"student", "refiner"}
    best = best_rows(last.rows)["distill"]["epoch"]
    stage_1 = Checkpoints(whole.folder).at(best).weights()
    scales = {"scale_truth", "scale_heatmap", "scale_structure"}
    assert {name.split(".")[0] for name in stage_1} == {"student", *scales}
    assert all(stage_1[name] != 1 for name in scales)


def test_frozen_student_of_stage_2_is_the_best_of_stage_1(
    whole: Trial, tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    aps = iter([0.5, 0.2, 0.6, 0.1])  # the best of each stage is not its last
    monkeypatch.setattr(TrainingData, "score", lambda data, estimator, starts: {"ap": next(aps)})
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


def test_finetuned_student_changes_resumes_and_is_saved(
    whole: Trial, config: StudyConfig, tmp_path: Path, workers: Workers
) -> None:
    values = {"refine.student": "finetuned", "refine.candidates": 2, "distill.epochs": 1}
    config = with_values(config, values)
    trial = dataclasses.replace(whole, config=config, folder=tmp_path / "whole")
    run_trial(trial, workers, lambda row: False)
    interrupted = dataclasses.replace(trial, folder=tmp_path / "interrupted")
    run_trial(interrupted, workers, lambda row: bool(row["epoch"] == 2))
    run_trial(interrupted, workers, lambda row: False)
    assert_same(trial, interrupted)
    best = {stage: row["epoch"] for stage, row in best_rows(rows_of(trial)).items()}
    checkpoints = Checkpoints(trial.folder)
    before = checkpoints.at(best["distill"]).weights()
    after = checkpoints.at(best["refine"]).weights()
    moved = {n for n in after if n in before and not torch.equal(before[n], after[n])}
    assert "student.stem.0.weight" in moved and not any("running" in name for name in moved)
    assert not any(name.startswith("student.final_layer") for name in moved)
    data = TrainingData.open(trial.prepared, resolve(config), workers, targets=None)
    kept = checkpoints.at(best["refine"])
    estimator = estimator_of(kept, config)
    for name, value in estimator.state_dict().items():
        assert torch.equal(value, after[name]), name
    assert data.score(estimator)["ap"] == kept.rows[-1]["val_ap"]


def test_loaded_checkpoint_has_the_reported_scores(
    whole: Trial, config: StudyConfig, workers: Workers
) -> None:
    data = TrainingData.open(whole.prepared, resolve(config), workers, targets=None)
    for epoch in {row["epoch"] for row in best_rows(rows_of(whole)).values()}:
        kept = Checkpoints(whole.folder).at(epoch)
        scores = data.score(estimator_of(kept, config))
        assert scores == {
            name[4:]: value for name, value in kept.rows[-1].items() if name.startswith("val_")
        }


def test_trial_without_stage_2_ends_after_stage_1(
    whole: Trial, config: StudyConfig, tmp_path: Path, workers: Workers
) -> None:
    alone = with_values(config, {"refine.epochs": 0, "distill.epochs": 1})
    trial = dataclasses.replace(whole, config=alone, folder=tmp_path)
    run_trial(trial, workers, lambda row: False)
    assert [row["stage"] for row in rows_of(trial)] == ["distill"]


def test_loss_that_is_not_finite_ends_the_trial_with_a_reason(
    whole: Trial, config: StudyConfig, tmp_path: Path, workers: Workers
) -> None:
    diverging = with_values(
        config, {"distill.optimizer.lr": 1e20, "distill.optimizer.weight_decay": 1}
    )
    trial = dataclasses.replace(whole, config=diverging, folder=tmp_path)
    with pytest.raises(TrainingDiverged, match=r"lower.*rate|lower distill\.optimizer\.lr=1e\+20"):
        run_trial(trial, workers, lambda row: False)


def test_pretrained_student_starts_from_its_weights(
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


def test_teacher_is_trained_once_and_resumes_after_an_interruption(
    mini_config: StudyConfig, mini_data: PreparedData, workers: Workers
) -> None:
    config = with_values(mini_config, {"teacher.epochs": 2, "seed": 1})
    folder = teacher_folder(spec_of(config), mini_data)

    def interrupted(row: Row) -> bool:
        raise Interrupted

    with pytest.raises(Interrupted):
        make_teacher(spec_of(config), config.student, mini_data, workers, interrupted)
    assert not is_ready(folder)
    rows: list[Row] = []

    def report(row: Row) -> bool:
        rows.append(row)
        return False

    make_teacher(spec_of(config), config.student, mini_data, workers, report)
    assert is_ready(folder) and [row["epoch"] for row in rows] == [1, 2]
    assert {row["stage"] for row in rows} == {"teacher"}
    assert best_of(folder).epoch in (1, 2)
    changed = with_values(config, {"teacher.epochs": 3})
    assert teacher_folder(spec_of(changed), mini_data) != folder


def test_study_runs_on_five_joints_and_crops_higher_than_wide(
    five: Skeleton,
    five_data: Path,
    tmp_path: Path,
    workers: Workers,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(SKELETONS, "five", five)
    monkeypatch.setattr(checks, "SKELETONS", ("five",))
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
    make_teacher(spec_of(config), config.student, data, workers, lambda row: False)
    targets = teacher_folder(spec_of(config), data) / TARGETS
    trial = Trial(0, config, resolve(config), data, tmp_path / "trial", targets)
    run_trial(trial, workers, lambda row: False)
    assert [row["stage"] for row in rows_of(trial)] == ["distill", "refine"]
    assert Checkpoints(trial.folder).at(2).weights()["student.final_layer.weight"].shape[0] == 5
