"""Stage 2: targets of the levels, losses, gradients, and which parameters learn."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.build import build_model
from models.codecs.codec import Dark
from models.igp_gcn import IgpGcn
from models.mobile_net import MobileNet
from models.pose_features import PoseFeatures
from models.refined_pose import RefinedPose
from models.skeleton import Skeleton
from study.config.schema import AugmentConfig, OptimizerConfig, RefineConfig
from study.training.batches import Batch
from study.training.pose_errors import PoseErrors
from study.training.refine import RefineTask

CODEC = Dark(input_size=(96, 64), heatmap_size=(24, 16))
OPTIMIZER = OptimizerConfig(1e-3, 1e-4, warmup_fraction=0.05, pretrained_factor=0.1)
SETTINGS = RefineConfig(
    epochs=2,
    batch_size=4,
    optimizer=OPTIMIZER,
    student="frozen",
    student_factor=0.1,
    start="student",
    jitter=0.1,
    candidates=1,
    levels=3,
    depth=1,
    width=8,
    dropout=0.0,
    gate=True,
    loss="oks",
    progressive="final",
    teacher_weight=0.7,
    truth_weight=0.4,
    perturb=True,
    augment=AugmentConfig(0, 0, 0, 0, 0, 0, 0),
)


class Steps(nn.Module):
    """A refiner that moves every joint by (dx, 0) px times the level's number."""

    num_candidates, chooser, flip_order, mirror_pairs = 1, None, (0, 2, 1, 4, 3), None
    choose, refine = IgpGcn.choose, IgpGcn.refine

    def __init__(self, levels: int, dx: float) -> None:
        super().__init__()
        self.levels, self.dx = levels, nn.Parameter(torch.tensor(dx))

    def forward(
        self, pyramid: tuple[Tensor, ...], start: Tensor, scores: Tensor, size: tuple[int, int]
    ) -> list[Tensor]:
        assert size == (96, 64)
        step = torch.stack([self.dx, torch.zeros(())])
        return [start + level * step for level in range(1, self.levels + 1)]


def student_of(skeleton: Skeleton) -> MobileNet:
    torch.manual_seed(0)
    student = build_model("mobile_net", "tiny", skeleton)
    nn.init.normal_(student.final_layer.weight, std=1.0)
    return student


def task_of(five: Skeleton, refiner: nn.Module | None = None, **changes: object) -> RefineTask:
    settings = dataclasses.replace(SETTINGS, **changes)  # type: ignore[arg-type]
    student = student_of(five)
    if refiner is None:
        torch.manual_seed(1)
        refiner = IgpGcn(
            five,
            student.pyramid_channels,
            levels=settings.levels,
            depth=1,
            width=8,
            candidates=settings.candidates,
        )
    return RefineTask(student, CODEC, refiner, five, settings)  # type: ignore[arg-type]


def starts(task: RefineTask, crops: Tensor) -> Tensor:
    """Return the student's pose."""
    keypoints, _ = CODEC.decode(task.student.predict(crops).heatmaps)
    return keypoints


@pytest.fixture
def batch(five: Skeleton) -> Batch:
    """Two people; truth 6 px and the teacher 12 px to the right of the student's pose."""
    crops = torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(3))
    start = starts(task_of(five), crops)
    modes = torch.zeros(2, 5, 3, 4)
    modes[:, :, 0, :2] = start + torch.tensor([12.0, 0.0])
    modes[:, :, 0, 2] = 0.5
    modes[..., 3] = 1
    visibility = torch.full((2, 5), 2)
    visibility[0, 1:4] = 0
    return Batch(
        crops=crops,
        keypoints_crop=start + torch.tensor([6.0, 0.0]),
        visibility=visibility,
        areas_crop=torch.tensor([900.0, 1600.0]),
        neighbor_crop=start + 20,
        neighbor_visibility=torch.full((2, 5), 2),
        teacher_modes=modes,
        teacher_mask=torch.ones(2, 5),
        teacher_relation=None,
    )


def value(task: RefineTask, batch: Batch, name: str) -> float:
    term = task(batch)[name]
    return (term.sum / term.count).item()


def one_minus_oks(distance: float, batch: Batch, five: Skeleton, labeled: Tensor) -> float:
    """Return the mean over labeled joints that are all ``distance`` px off."""
    losses = [
        1 - math.exp(-(distance**2) / (2 * (2 * five.oks_sigmas[joint]) ** 2 * float(area)))
        for person, area in enumerate(batch.areas_crop)
        for joint in range(5)
        if labeled[person, joint]
    ]
    return sum(losses) / len(losses)


def test_final_targets_by_hand_with_opec_nets_level_weights(five: Skeleton, batch: Batch) -> None:
    task = task_of(five, Steps(3, 2.0))  # 2, 4 and 6 px of the way
    labeled = batch.visibility > 0
    expected = sum(
        factor * one_minus_oks(6 - moved, batch, five, labeled)
        for factor, moved in ((0.3, 2), (0.5, 4), (1.0, 6))
    )
    assert value(task, batch, "truth") == pytest.approx(expected, rel=1e-4)
    everyone = torch.ones(2, 5)
    expected_teacher = sum(
        factor * one_minus_oks(12 - moved, batch, five, everyone)
        for factor, moved in ((0.3, 2), (0.5, 4), (1.0, 6))
    )
    assert value(task, batch, "teacher") == pytest.approx(expected_teacher, rel=1e-4)


def test_interpolated_targets_are_at_fractions_of_the_way(five: Skeleton, batch: Batch) -> None:
    task = task_of(five, Steps(3, 2.0), progressive="interpolated")
    # the truth lies 6 px away: levels aim at 2, 4 and 6 px, just where they are
    assert value(task, batch, "truth") == pytest.approx(0, abs=1e-6)
    everyone = torch.ones(2, 5)
    # the teacher lies 12 px away: levels at 2, 4, 6 px aim at 4, 8, 12 px, all with weight 1
    expected_teacher = sum(one_minus_oks(away, batch, five, everyone) for away in (2, 4, 6))
    assert value(task, batch, "teacher") == pytest.approx(expected_teacher, rel=1e-4)


@pytest.mark.parametrize(("levels", "factors"), [(1, [1.0]), (2, [0.5, 1.0])])
def test_fewer_levels_take_the_last_weights(
    levels: int, factors: list[float], five: Skeleton, batch: Batch
) -> None:
    task = task_of(five, Steps(levels, 0.0), levels=levels)
    everyone = torch.ones(2, 5)
    expected = sum(factors) * one_minus_oks(12, batch, five, everyone)
    assert value(task, batch, "teacher") == pytest.approx(expected, rel=1e-4)


def test_smooth_l1_is_in_crop_heights_and_bends_at_a_cell(five: Skeleton, batch: Batch) -> None:
    task = task_of(five, Steps(1, 0.0), levels=1, loss="smooth_l1")
    # 6 of 96 px on x, none on y; beta is a cell, 1 / 24: 0.0625 - 0.5 / 24 on x, half as a mean
    assert value(task, batch, "truth") == pytest.approx((6 / 96 - 0.5 / 24) / 2, rel=1e-4)


def test_oks_is_bounded_where_smooth_l1_is_not(five: Skeleton, batch: Batch) -> None:
    far = dataclasses.replace(batch, keypoints_crop=batch.keypoints_crop + 1e4)
    assert value(task_of(five, Steps(1, 0.0), levels=1), far, "truth") == pytest.approx(1)
    bent = task_of(five, Steps(1, 0.0), levels=1, loss="smooth_l1")
    assert value(bent, far, "truth") > 100


def test_unlabeled_joints_and_joints_without_a_mode_add_no_loss(
    five: Skeleton, batch: Batch
) -> None:
    assert batch.teacher_modes is not None
    keypoints, modes = batch.keypoints_crop.clone(), batch.teacher_modes.clone()
    keypoints[0, 1:4] = 1e3
    modes[:, 4, 0] = torch.tensor([1e3, 1e3, 0.0, 1.0])
    changed = dataclasses.replace(batch, keypoints_crop=keypoints, teacher_modes=modes)
    task = task_of(five, Steps(3, 1.0))
    assert value(task, changed, "truth") == pytest.approx(value(task, batch, "truth"))
    assert float(task(changed)["teacher"].count) == pytest.approx(0.5 * 8)


def test_masked_joint_is_not_pulled_to_the_teacher(five: Skeleton, batch: Batch) -> None:
    assert batch.teacher_modes is not None
    mask, modes = torch.ones(2, 5), batch.teacher_modes.clone()
    mask[:, 4] = 0
    masked = dataclasses.replace(batch, teacher_mask=mask)
    modes[:, 4, 0, :2] += 1e3
    elsewhere = dataclasses.replace(masked, teacher_modes=modes)
    task = task_of(five, Steps(1, 0.0), levels=1)
    assert value(task, elsewhere, "teacher") == value(task, masked, "teacher") > 0
    assert float(task(masked)["teacher"].count) == pytest.approx(0.5 * 8)


def test_batch_without_labels_has_zero_truth_loss_and_no_gradient(
    five: Skeleton, batch: Batch
) -> None:
    unlabeled = dataclasses.replace(batch, visibility=torch.zeros(2, 5))
    task = task_of(five)
    term = task(unlabeled)["truth"]
    assert term.sum.item() == 0 and term.count.item() == 0
    term.sum.backward()
    for parameter in task.refiner.parameters():
        assert parameter.grad is None or not parameter.grad.any()


@pytest.mark.parametrize("loss", ["oks", "smooth_l1"])
@pytest.mark.parametrize("progressive", ["final", "interpolated"])
def test_refiner_learns_and_a_frozen_student_does_not(
    loss: str, progressive: str, five: Skeleton, batch: Batch
) -> None:
    task = task_of(five, loss=loss, progressive=progressive)
    before = {name: tensor.clone() for name, tensor in task.student.state_dict().items()}
    task.train()
    for module in task.trainable():
        module.train()
    terms = task(batch)
    torch.stack([term.sum / term.count for term in terms.values()]).sum().backward()
    assert all(parameter.grad is None for parameter in task.student.parameters())
    learns = {name: p.grad is not None for name, p in task.refiner.named_parameters()}
    assert all(learns[f"levels.{level}.head.weight"] for level in range(3))
    for name, tensor in task.student.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("student", ["frozen", "finetuned"])
def test_student_stays_in_eval_mode(student: str, five: Skeleton) -> None:
    task = task_of(five, student=student)
    for module in task.trainable():
        module.train()
    assert not any(module.training for module in task.student.modules())
    assert all(module.training for module in task.refiner.modules())


class RecordingStudent(nn.Module):
    """A student that records its predictions."""

    def __init__(self, student: MobileNet) -> None:
        super().__init__()
        self.student = student
        self.predictions: list[PoseFeatures] = []

    def predict(self, crops: Tensor) -> PoseFeatures:
        self.predictions.append(self.student.predict(crops))
        return self.predictions[-1]


@pytest.mark.parametrize("student", ["frozen", "finetuned"])
def test_graph_is_built_only_through_a_finetuned_student(
    student: str, five: Skeleton, batch: Batch
) -> None:
    task = task_of(five, student=student)
    recorded = RecordingStudent(task.student)  # type: ignore[arg-type]
    task.student = recorded  # type: ignore[assignment]
    task.train()
    task(batch)
    (prediction,) = recorded.predictions
    is_finetuned = student == "finetuned"
    assert all((f.grad_fn is not None) == is_finetuned for f in prediction.pyramid)
    with torch.no_grad():
        task(batch)
    assert all(f.grad_fn is None for f in recorded.predictions[1].pyramid)


@pytest.mark.parametrize("levels", [1, 3])
@pytest.mark.parametrize("candidates", [1, 2])
def test_every_trainable_parameter_gets_a_gradient(
    levels: int, candidates: int, five: Skeleton, batch: Batch
) -> None:
    """Another worker would wait forever for a missing gradient."""
    task = task_of(five, student="finetuned", levels=levels, candidates=candidates).train()
    terms = task(batch)
    torch.stack([term.sum / term.count for term in terms.values()]).sum().backward()
    for name, parameter in task.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    frozen = {name for name, p in task.student.named_parameters() if not p.requires_grad}
    assert {"final_layer.weight", "final_layer.bias"} <= frozen
    assert {name.split(".")[0] for name in frozen} == {"final_layer", "head", "smooth"}


@pytest.mark.parametrize("candidates", [1, 2])
def test_finetuned_student_changes_and_its_statistics_do_not(
    candidates: int, five: Skeleton, batch: Batch
) -> None:
    task = task_of(five, student="finetuned", candidates=candidates).train()
    for name, parameter in task.refiner.named_parameters():
        if name.endswith("head.weight"):  # otherwise the student's first gradient is zero
            nn.init.normal_(parameter, std=0.1)
    before = {name: tensor.clone() for name, tensor in task.student.state_dict().items()}
    learns = {name for name, p in task.student.named_parameters() if p.requires_grad}
    groups: list[dict[str, Any]] = task.parameter_groups(OPTIMIZER)
    optimizer = torch.optim.SGD(groups)
    terms = task(batch)
    torch.stack([term.sum / term.count for term in terms.values()]).sum().backward()
    optimizer.step()
    moved = {n for n, t in task.student.state_dict().items() if not torch.equal(t, before[n])}
    assert moved <= learns and len(moved) > len(learns) / 2
    assert any(".running_mean" in name for name in before)


def test_finetuned_student_has_its_fraction_of_the_rate(five: Skeleton) -> None:
    task = task_of(five, student="finetuned", student_factor=0.25)
    refiner, student = task.parameter_groups(OPTIMIZER)
    assert (refiner["lr"], student["lr"]) == (1e-3, 0.25e-3)
    learns = [p for p in task.parameters() if p.requires_grad]
    assert len(refiner["params"]) + len(student["params"]) == len(learns)  # type: ignore[arg-type]


def test_optimizer_has_only_the_refiner(five: Skeleton) -> None:
    task = task_of(five)
    groups: list[dict[str, Any]] = task.parameter_groups(OPTIMIZER)
    assert [group["lr"] for group in groups] == [1e-3]
    own = {id(parameter) for parameter in task.refiner.parameters()}
    assert {id(parameter) for parameter in groups[0]["params"]} == own


def test_weights_equal_the_settings(five: Skeleton) -> None:
    assert task_of(five).weights(0.3) == {"teacher": 0.7, "truth": 0.4}


def test_errors_change_the_start_only_in_training(five: Skeleton, batch: Batch) -> None:
    task = task_of(five, Steps(1, 0.0), levels=1)
    plain = value(task, batch, "truth")
    task.errors = PoseErrors(
        rates=torch.zeros(3, 5), jitter=torch.full((5,), 0.3), miss=torch.zeros(5)
    )
    torch.manual_seed(0)
    assert value(task, batch, "truth") != pytest.approx(plain, rel=1e-3)
    keypoints, _ = task.estimator()(batch.crops)
    torch.testing.assert_close(keypoints, starts(task, batch.crops))


def test_untrained_refiner_changes_no_bit_of_a_pose(five: Skeleton, batch: Batch) -> None:
    task = task_of(five).eval()
    with torch.no_grad():
        refined, scores = task.estimator()(batch.crops)
        plain, plain_scores = RefinedPose(task.student, CODEC, None)(batch.crops)
    assert torch.equal(refined, plain) and torch.equal(scores, plain_scores)
