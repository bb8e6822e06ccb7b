"""Training of SimCC bins: the loss, the terms of stage 1, and a whole trial."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.build import build_model
from models.codecs.simcc import SimCC
from models.pose_features import PoseFeatures, PoseNetwork
from models.skeleton import Skeleton
from study.cache.prepare import PreparedData
from study.config.compose import with_values
from study.config.derived import resolve
from study.config.schema import (
    AugmentConfig,
    DistillConfig,
    HeatmapTermConfig,
    MixConfig,
    OptimizerConfig,
    StructureTermConfig,
    StudyConfig,
)
from study.storage.checkpoint import Checkpoints, Row
from study.storage.paths import TARGETS
from study.teachers.identity import teacher_folder
from study.teachers.make import best_of, make_teacher
from study.training.batches import Batch
from study.training.distill import DistillTask
from study.training.loop import combine
from study.training.losses import bins_kl
from study.training.networks import build_distill_task, load_estimator
from study.training.training_data import TrainingData
from study.trial import Trial, run_trial, teacher_spec
from study.workers import Workers

BINS = (("codec", "simcc"), ("flip_test", True))
CODEC = SimCC((96, 64), (24, 16))
SETTINGS = DistillConfig(
    epochs=4,
    batch_size=4,
    optimizer=OptimizerConfig(1e-3, 1e-4, warmup_fraction=0.05, pretrained_factor=0.1),
    heatmap=HeatmapTermConfig("mse", 0.5, tau=0.1),
    structure=StructureTermConfig("pairwise", 0.2, MixConfig(0.1, 0.2, 0.3, 0.4)),
    weights="fixed",
    schedule="linear",
    normalize="initial",
    diagnose=False,
    augment=AugmentConfig(0, 0, 0, 0, 0, 0, 0),
)


class Painter(PoseNetwork):
    """A student whose heatmaps and bins are its parameters; at first its bins are flat."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.heatmaps = nn.Parameter(torch.rand(3, 5, 24, 16, generator=generator))
        self.x = nn.Parameter(torch.zeros(3, 5, 128))
        self.y = nn.Parameter(torch.zeros(3, 5, 192))

    def forward(self, crops: Tensor) -> PoseFeatures:
        return PoseFeatures(self.heatmaps, (torch.ones(3, 2, 24, 16),), (self.x, self.y))


def task_of(five: Skeleton, heatmap: str = "mse", structure: str = "pairwise") -> DistillTask:
    settings = dataclasses.replace(
        SETTINGS,
        heatmap=dataclasses.replace(SETTINGS.heatmap, kind=heatmap),
        structure=dataclasses.replace(SETTINGS.structure, kind=structure),
    )
    return DistillTask(Painter(), CODEC, five, settings)


@pytest.fixture
def batch() -> Batch:
    """Three people; the teacher is a few pixels off the truth and unsure of joint 2."""
    generator = torch.Generator().manual_seed(1)
    keypoints = torch.rand(3, 5, 2, generator=generator) * torch.tensor([40.0, 70.0]) + 12
    modes = torch.zeros(3, 5, 3, 4)
    modes[..., 0, :2] = keypoints + 4
    modes[..., 0, 2] = torch.tensor([1.0, 1.0, 0.25, 1.0, 1.0])
    modes[..., 3] = 1
    visibility = torch.full((3, 5), 2)
    visibility[0, 3] = 0
    return Batch(
        crops=torch.zeros(3, 3, 96, 64),
        keypoints_crop=keypoints,
        visibility=visibility,
        areas_crop=torch.full((3,), 2000.0),
        neighbor_crop=keypoints,
        neighbor_visibility=torch.zeros(3, 5),
        teacher_modes=modes,
        teacher_mask=torch.ones(3, 5),
        teacher_relation=torch.eye(5).expand(3, 5, 5),
    )


def gradient_of_bins(task: DistillTask, batch: Batch, name: str) -> Tensor:
    (gradient,) = torch.autograd.grad(task(batch)[name].sum, task.student.x)  # type: ignore[arg-type]
    return gradient


def test_kl_by_hand() -> None:
    # labels (1/2, 1/2) against (1/4, 3/4) on x, equal on y; the second joint is unlabeled
    x = torch.tensor([[[1.0, 3.0], [5.0, 1.0]]]).log()
    y = torch.zeros(1, 2, 3)
    labels = (torch.tensor([[[0.5, 0.5], [0, 0]]]), torch.tensor([[[1 / 3] * 3, [0.0] * 3]]))
    term = bins_kl((x, y), labels, torch.tensor([[1.0, 0.0]]))
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert term.sum.item() == pytest.approx(expected / 2, rel=1e-5)
    assert term.count.item() == 1


def test_kl_of_sharp_labels_has_a_finite_gradient_weighted_by_joint() -> None:
    x = torch.zeros(1, 2, 4, requires_grad=True)
    label = torch.eye(4)[None, :2]
    term = bins_kl((x, x), (label, label), torch.tensor([[1.0, 0.25]]))
    assert term.sum.item() == pytest.approx(1.25 * math.log(4))
    (gradient,) = torch.autograd.grad(term.sum, x)
    torch.testing.assert_close(gradient[0, 0], 0.25 - label[0, 0])
    torch.testing.assert_close(gradient[0, 1], 0.25 * (0.25 - label[0, 1]))


def test_kl_without_labels_is_zero() -> None:
    x = torch.zeros(1, 2, 4, requires_grad=True)
    empty = torch.zeros(1, 2, 4)
    term = bins_kl((x, x), (empty, empty), torch.zeros(1, 2))
    assert (term.sum.item(), term.count.item()) == (0, 0) and term.sum.requires_grad


@pytest.mark.parametrize(
    ("heatmap", "structure", "names"),
    [
        ("none", "none", ["truth", "truth_heatmap"]),
        ("kl", "none", ["truth", "truth_heatmap", "heatmap", "bins"]),
        ("none", "pairwise", ["truth", "truth_heatmap", "structure"]),
        ("mse", "pairwise", ["truth", "truth_heatmap", "heatmap", "bins", "structure"]),
    ],
)
def test_bins_add_separate_terms(
    heatmap: str, structure: str, names: list[str], five: Skeleton, batch: Batch
) -> None:
    task = task_of(five, heatmap, structure)
    assert list(task(batch)) == names and task.term_names == names
    expected = {"truth": 1.0, "truth_heatmap": 1.0, "heatmap": 0.125, "bins": 0.125}
    expected["structure"] = 0.05  # a quarter is left after three quarters of a linear schedule
    assert task.weights(0.75) == pytest.approx({name: expected[name] for name in names})


def test_baseline_needs_no_teacher(five: Skeleton, batch: Batch) -> None:
    alone = dataclasses.replace(batch, teacher_modes=None, teacher_relation=None)
    assert list(task_of(five, "none", "none")(alone)) == ["truth", "truth_heatmap"]


def test_truth_trains_only_the_bins_and_truth_heatmap_only_the_maps(
    five: Skeleton, batch: Batch
) -> None:
    task = task_of(five)
    terms = task(batch)
    learns = {
        name: [
            gradient is not None
            for gradient in torch.autograd.grad(
                terms[name].sum, list(task.student.parameters()), allow_unused=True
            )
        ]
        for name in terms
    }
    maps, bins = [True, False, False], [False, True, True]
    assert learns == {
        "truth": bins,
        "truth_heatmap": maps,
        "heatmap": maps,
        "bins": bins,
        "structure": maps,
    }


def test_unlabeled_joint_adds_no_truth_loss_but_a_teacher_loss(
    five: Skeleton, batch: Batch
) -> None:
    task = task_of(five)
    truth, imitation = (gradient_of_bins(task, batch, name) for name in ("truth", "bins"))
    assert (truth[0, 3] == 0).all() and (truth[0, 2] != 0).any() and (imitation[0, 3] != 0).any()
    assert task(batch)["truth"].count == 14


def test_student_with_the_bins_of_the_truth_has_no_truth_loss(
    five: Skeleton, batch: Batch
) -> None:
    task = task_of(five)
    (x, y), _ = CODEC.encode_bins(batch.keypoints_crop, torch.ones(3, 5))
    with torch.no_grad():
        task.student.x.copy_((x + 1e-30).log())  # type: ignore[operator, union-attr]
        task.student.y.copy_((y + 1e-30).log())  # type: ignore[operator, union-attr]
    terms = task(batch)
    assert terms["truth"].sum.item() == pytest.approx(0, abs=1e-4)
    assert terms["bins"].sum.item() > 1


def test_teacher_counts_by_its_score_and_pulls_to_its_first_mode(
    five: Skeleton, batch: Batch
) -> None:
    task = task_of(five)
    gradient = gradient_of_bins(task, batch, "bins")
    assert task(batch)["bins"].count.item() == pytest.approx(3 * 4.25)
    strength = gradient.abs().sum(-1)
    torch.testing.assert_close(strength[:, 2] / strength[:, 1], torch.full((3,), 0.25))
    assert batch.teacher_modes is not None
    places = (2 * batch.teacher_modes[:, :, 0, 0]).round()
    assert torch.equal(gradient.argmin(-1).float(), places)


def test_mode_beyond_the_crop_adds_no_loss_to_the_bins(five: Skeleton, batch: Batch) -> None:
    assert batch.teacher_modes is not None
    modes = batch.teacher_modes.clone()
    modes[:, 1, 0, 0] = 90
    far = dataclasses.replace(batch, teacher_modes=modes)
    assert (gradient_of_bins(task_of(five), far, "bins")[:, 1] == 0).all()


def test_every_weight_of_a_simcc_student_learns(
    mini_config: StudyConfig, workers: Workers
) -> None:
    """Workers that average gradients wait for those of every weight."""
    changed = with_values(mini_config, {"student.codec": "simcc"})
    task = build_distill_task(
        changed.student, changed.distill, changed.trial, resolve(changed), seed=0
    )
    generator = torch.Generator().manual_seed(2)
    keypoints = 64 * torch.rand(2, 17, 2, generator=generator)
    modes = torch.ones(2, 17, 3, 4)
    modes[..., :2] = keypoints[:, :, None]
    batch: Any = Batch(
        crops=255 * torch.rand(2, 3, 64, 64, generator=generator),
        keypoints_crop=keypoints,
        visibility=torch.full((2, 17), 2),
        areas_crop=torch.ones(2),
        neighbor_crop=keypoints,
        neighbor_visibility=torch.zeros(2, 17),
        teacher_modes=modes,
        teacher_mask=torch.ones(2, 17),
        teacher_relation=torch.eye(17).expand(2, 17, 17),
    )
    loss, _ = combine(task.train()(batch), task.weights(0.0), workers)
    loss.backward()
    assert all(parameter.grad is not None for parameter in task.student.parameters())


def test_bins_learn_joints_below_a_pixel(five: Skeleton) -> None:
    codec = SimCC((64, 32), (16, 8))
    torch.manual_seed(0)
    network = build_model("mobile_net", "tiny", five, codec).train()
    crops = 255 * torch.rand(3, 3, 64, 32)
    keypoints = 4 + torch.rand(3, 5, 2) * torch.tensor([24.0, 56.0])
    labels, weights = codec.encode_bins(keypoints, torch.ones(3, 5))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for _ in range(40):
        features = network.predict(crops)
        assert features.bins is not None
        term = bins_kl(features.bins, labels, weights)
        optimizer.zero_grad()
        term.sum.div(term.count).backward()
        optimizer.step()
    found, scores = codec.decode_features(network.predict(crops))
    assert (found - keypoints).norm(dim=-1).mean() < 1 and scores.mean() > 0.8


@pytest.mark.slow
def test_simcc_student_learns_from_a_simcc_teacher_with_flip_tests(
    mini_config: StudyConfig, mini_data: PreparedData, easy: str, tmp_path: Path, workers: Workers
) -> None:
    values = {f"{role}.{key}": value for role in ("teacher", "student") for key, value in BINS}
    config = with_values(mini_config, {**values, "data.skeleton": easy, "storage": str(tmp_path)})
    resolved = resolve(config)
    spec = teacher_spec(config, resolved)
    make_teacher(spec, config.student, mini_data, workers, lambda row: False)
    folder = teacher_folder(spec, mini_data)
    trial = Trial(1, config, resolved, mini_data, tmp_path / "trial", folder / TARGETS)
    rows: list[Row] = []

    def report(row: Row) -> bool:
        rows.append(row)
        return False

    run_trial(trial, workers, report)
    assert [row["stage"] for row in rows] == ["distill", "distill", "refine", "refine"]
    assert {"loss.truth", "loss.truth_heatmap", "loss.bins"} <= rows[0].keys()
    data = TrainingData.open(mini_data, resolved, workers, None)
    checkpoint = best_of(folder)
    assert any(name.startswith("student.simcc_head.") for name in checkpoint.weights())
    last = Checkpoints(trial.folder).require_last()
    assert last.epoch == len(rows)
    scores = data.score(
        load_estimator(last, config.student, config.distill, config.refine, config.trial, resolved)
    )
    assert scores["ap"] == rows[-1]["val_ap"] > 0
