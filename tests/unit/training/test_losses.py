"""Every loss: a perfect student, a value worked out by hand, nothing to learn, and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from study.training import losses
from study.training.losses import Term

EDGES = ((0, 1), (1, 2), (0, 3), (3, 4))
SIGMAS = (0.03, 0.05, 0.07, 0.09, 0.1)
BETA = 1 / 24
Loss = Callable[[Tensor, Tensor, Tensor], Term]


def oks(points: Tensor, target: Tensor, weights: Tensor) -> Term:
    return losses.oks_loss(points, target, weights, torch.full((len(points),), 0.3), SIGMAS)


def pairwise(points: Tensor, target: Tensor, weights: Tensor) -> Term:
    return losses.pairwise_loss(points, target, weights, BETA)


def bone(points: Tensor, target: Tensor, weights: Tensor) -> Term:
    return losses.bone_loss(points, target, weights, EDGES, BETA)


def angle(points: Tensor, target: Tensor, weights: Tensor) -> Term:
    return losses.angle_loss(points, target, weights, EDGES, BETA)


def smooth_l1(points: Tensor, target: Tensor, weights: Tensor) -> Term:
    return losses.smooth_l1_loss(points, target, weights, BETA)


def truth(student: Tensor, target: Tensor, weights: Tensor) -> Term:
    return losses.truth_loss(student, target, weights)


def mse(student: Tensor, teacher: Tensor, weights: Tensor) -> Term:
    return losses.heatmap_mse(student, teacher, weights)


def kl(student: Tensor, teacher: Tensor, weights: Tensor) -> Term:
    return losses.heatmap_kl(student, teacher, weights, 0.1)


def relation(student: Tensor, teacher: Tensor, weights: Tensor) -> Term:
    return losses.relation_loss(student, teacher, weights)


ON_POINTS = (oks, pairwise, bone, angle, smooth_l1)
ON_MAPS = (truth, mse, kl)
WEIGHTED = (*ON_POINTS, relation, mse, kl)


def mean(term: Term) -> float:
    return (term.sum / term.count).item()


def sample(loss: Loss, batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output of a student, that of a teacher, and joint weights for the loss."""
    generator = torch.Generator().manual_seed(7)
    if loss in ON_POINTS:
        shape: tuple[int, ...] = (5, 2)
    else:
        shape = (5, 5) if loss is relation else (5, 24, 16)
    student, teacher = torch.rand(2, batch, *shape, generator=generator)
    return student, teacher, torch.rand(batch, 5, generator=generator)


def gaussians(cells: Tensor, height: float = 1.0) -> Tensor:
    """Maps (B, K, 64, 48) with one Gaussian of sigma 2 each, at (B, K, 2) cells."""
    along_x = torch.exp(-((torch.arange(48) - cells[..., :1]) ** 2) / 8)
    along_y = torch.exp(-((torch.arange(64) - cells[..., 1:]) ** 2) / 8)
    return height * along_y[..., :, None] * along_x[..., None, :]


@pytest.mark.parametrize("loss", [truth, *WEIGHTED])
def test_a_perfect_student_has_no_loss(loss: Loss) -> None:
    _, teacher, weights = sample(loss)
    assert mean(loss(teacher.clone(), teacher, weights)) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("loss", [truth, *WEIGHTED])
def test_student_gets_a_gradient_and_the_teacher_none(loss: Loss) -> None:
    student, teacher, weights = (tensor.requires_grad_() for tensor in sample(loss))
    loss(student, teacher, weights).sum.backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None
    assert weights.grad is None


@pytest.mark.parametrize("loss", [truth, *WEIGHTED])
def test_two_workers_sums_give_the_whole_batchs_mean(loss: Loss) -> None:
    student, teacher, weights = sample(loss, batch=4)
    parts = [loss(student[i], teacher[i], weights[i]) for i in (slice(0, 1), slice(1, 4))]
    together = sum(part.sum for part in parts) / sum(part.count for part in parts)
    assert float(together) == pytest.approx(mean(loss(student, teacher, weights)), rel=1e-6)


@pytest.mark.parametrize("loss", WEIGHTED)
@pytest.mark.parametrize("weight", [0.0, -0.2])
def test_sum_and_count_are_zero_without_confidence(loss: Loss, weight: float) -> None:
    student, teacher, weights = sample(loss)
    term = loss(student.requires_grad_(), teacher, torch.full_like(weights, weight))
    assert (term.sum.item(), term.count.item()) == (0, 0)
    term.sum.backward()
    assert student.grad is not None
    assert student.grad.abs().sum() == 0


@pytest.mark.parametrize("loss", WEIGHTED)
def test_a_joint_without_confidence_changes_nothing(loss: Loss) -> None:
    student, teacher, weights = sample(loss)
    weights[:, 2] = 0
    moved = student.clone()
    moved[:, 2] += 0.3
    if loss is relation:
        moved[:, :, 2] += 0.3
    assert mean(loss(moved, teacher, weights)) == mean(loss(student, teacher, weights))


@pytest.mark.parametrize("loss", WEIGHTED)
def test_a_mean_does_not_depend_on_the_scale_of_confidence(loss: Loss) -> None:
    student, teacher, weights = sample(loss)
    halved = mean(loss(student, teacher, weights / 2))
    assert halved == pytest.approx(mean(loss(student, teacher, weights)), rel=1e-6)


@pytest.mark.parametrize("loss", [truth, *WEIGHTED])
def test_a_batch_of_one_has_a_finite_loss(loss: Loss) -> None:
    assert math.isfinite(mean(loss(*sample(loss, batch=1))))


@pytest.mark.parametrize("name", ["joints_mse_weighted", "joints_mse_weighted_fractional"])
def test_truth_loss_equals_the_official_one(shared: Path, name: str) -> None:
    with np.load(shared / "reference/loss/losses.npz") as arrays:
        key = "weight_fractional" if "fractional" in name else "weight"
        output, target, weight = (torch.tensor(arrays[k]) for k in ("output", "target", key))
        value, gradient = float(arrays[name]), torch.tensor(arrays["grad_joints_mse_weighted"])
    term = losses.truth_loss(output.requires_grad_(), target, weight[..., 0])
    loss = term.sum / term.count
    assert loss.item() == pytest.approx(value, abs=1e-6)
    if key == "weight":
        loss.backward()
        torch.testing.assert_close(output.grad, gradient, atol=1e-9, rtol=1e-5)


def test_unlabeled_joints_add_no_truth_loss_but_count() -> None:
    student, target = torch.ones(1, 2, 3, 4), torch.zeros(1, 2, 3, 4)
    term = losses.truth_loss(student, target, torch.tensor([[1.0, 0.0]]))
    assert (term.sum.item(), term.count.item()) == (0.5 * 12, 24)
    assert losses.truth_loss(student, target, torch.zeros(1, 2)).sum == 0


def test_heatmap_mse_of_one_wrong_cell() -> None:
    student = torch.zeros(1, 2, 3, 4)
    student[0, 1, 2, 3] = 0.6
    everywhere = losses.heatmap_mse(student, torch.zeros(1, 2, 3, 4), torch.ones(1, 2))
    assert mean(everywhere) == pytest.approx(0.36 / 24)
    one = losses.heatmap_mse(student, torch.zeros(1, 2, 3, 4), torch.tensor([[0.0, 1.0]]))
    assert mean(one) == pytest.approx(0.36 / 12)  # mean over the cells of the confident joint


def test_heatmap_kl_of_two_cells() -> None:
    teacher = torch.tensor([[[[1.0, 0.5]]], [[[0.8, 0.8]]]])  # logits 2, 1 and 2, 2 at tau 0.5
    student = torch.tensor([[[[0.3, 0.3]]], [[[0.2, 0.2]]]])  # even on both
    share = math.exp(1) / (math.exp(1) + 1)
    first = share * math.log(share / 0.5) + (1 - share) * math.log((1 - share) / 0.5)
    both = losses.heatmap_kl(student, teacher, torch.ones(2, 1), 0.5)
    assert mean(both) == pytest.approx(first / 2, rel=1e-5)
    one = losses.heatmap_kl(student, teacher, torch.tensor([[1.0], [0.0]]), 0.5)
    assert mean(one) == pytest.approx(first, rel=1e-5)


def test_heatmap_kl_does_not_depend_on_the_height_of_the_peak() -> None:
    teacher = gaussians(torch.tensor([[[20.0, 30.0]]]))
    student = gaussians(torch.tensor([[[24.0, 30.0]]]))
    low, high = (
        mean(losses.heatmap_kl(height * student, teacher, torch.ones(1, 1), 0.1))
        for height in (0.3, 1.0)
    )
    assert low == pytest.approx(high, rel=1e-5)


def test_a_map_without_peak_keeps_a_finite_softmax() -> None:
    heatmaps = torch.full((1, 2, 24, 16), -0.3)
    heatmaps[:, 1] = 0
    torch.testing.assert_close(
        losses.soft_argmax(heatmaps), torch.tensor([7.5, 11.5]).expand(1, 2, 2)
    )


@pytest.mark.parametrize("height", [1.0, 0.3, 0.06])
def test_soft_argmax_reaches_the_joint(height: float) -> None:
    cells = torch.tensor([[[10.0, 50.0], [40.0, 12.0], [23.5, 31.5]]])
    found = losses.soft_argmax(gaussians(cells, height))
    torch.testing.assert_close(found, cells, atol=0.01, rtol=0)


def test_pairwise_of_a_stretched_limb() -> None:
    teacher = torch.tensor([[[0.0, 0.0], [0.3, 0.4], [0.0, 1.0]]])
    student = torch.tensor([[[0.0, 0.0], [0.3, 0.4], [0.0, 1.5]]])
    confidence = torch.tensor([[1.0, 0.25, 1.0]])
    # distances 0-1: 0.5, 0.5; 0-2: 1, 1.5; 1-2: sqrt(.09 + .36), sqrt(.09 + 1.21)
    stretch = math.sqrt(1.3) - math.sqrt(0.45)
    expected = 1.0 * (0.5 - 0.05) + 0.5 * (stretch - 0.05)
    term = losses.pairwise_loss(student, teacher, confidence, 0.1)
    assert term.sum.item() == pytest.approx(expected, rel=1e-5)
    assert term.count.item() == pytest.approx(0.5 + 1.0 + 0.5)


def test_bone_of_a_limb_bent_by_sixty_degrees() -> None:
    teacher = torch.tensor([[[0.5, 0.5], [0.9, 0.5], [0.5, 0.5]]])
    student = torch.tensor([[[0.5, 0.5], [0.7, 0.5 + 0.4 * math.sin(math.pi / 3)], [0.5, 0.5]]])
    vector = ((0.2 - 0.05) + (0.4 * math.sin(math.pi / 3) - 0.05)) / 2
    term = losses.bone_loss(student, teacher, torch.tensor([[0.25, 1.0, 0.0]]), ((0, 1),), 0.1)
    assert mean(term) == pytest.approx(vector + 0.5, rel=1e-5)
    assert term.count.item() == pytest.approx(0.5)


def test_opposite_bone_errors_do_not_cancel() -> None:
    teacher = torch.tensor([[[0.0, 0.0], [0.5, 0.0]], [[0.0, 0.0], [0.5, 0.0]]])
    student = torch.tensor([[[0.0, 0.0], [0.7, 0.0]], [[0.0, 0.0], [0.3, 0.0]]])
    term = losses.bone_loss(student, teacher, torch.ones(2, 2), ((0, 1),), 0.1)
    assert mean(term) == pytest.approx((0.2 - 0.05) / 2, rel=1e-5)


@pytest.mark.parametrize("loss", [pairwise, bone, angle])
def test_joints_on_one_spot_give_a_finite_gradient(loss: Loss) -> None:
    _, teacher, weights = sample(loss)
    student = torch.full_like(teacher, 0.5).requires_grad_()
    loss(student, teacher, weights).sum.backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_a_short_limb_has_no_steep_direction() -> None:
    teacher = torch.tensor([[[0.5, 0.5], [0.8, 0.5]]])
    student = torch.tensor([[[0.5, 0.5], [0.5, 0.5 + 1e-6]]]).requires_grad_()
    losses.bone_loss(student, teacher, torch.ones(1, 2), ((0, 1),), BETA).sum.backward()
    assert student.grad is not None
    assert student.grad.norm(dim=-1).max() < 2 / BETA


def test_joint_relation_is_the_cosine_of_the_features_at_the_joints() -> None:
    cells = torch.tensor([[[10.0, 50.0], [40.0, 12.0], [40.0, 50.0]]])
    features = torch.zeros(1, 2, 64, 48)
    features[0, 0, 30:] = 1.0  # the first channel sees the lower half, the second the right
    features[0, 1, :, 24:] = 3.0
    relation = losses.joint_relation(gaussians(cells, 0.3), features)
    third = [1 / math.sqrt(10), 3 / math.sqrt(10), 1.0]
    expected = torch.tensor([[[1.0, 0.0, third[0]], [0.0, 1.0, third[1]], third]])
    torch.testing.assert_close(relation, expected, atol=1e-4, rtol=0)


def test_joint_relation_passes_gradients_to_maps_and_features() -> None:
    heatmaps = gaussians(10 + 30 * torch.rand(2, 5, 2), 0.3).requires_grad_()
    features = torch.rand(2, 3, 64, 48, requires_grad=True)
    losses.relation_loss(
        losses.joint_relation(heatmaps, features), torch.zeros(2, 5, 5), torch.ones(2, 5)
    ).sum.backward()
    for tensor in (heatmaps, features):
        assert tensor.grad is not None
        assert tensor.grad.norm() > 1e-3


def test_joint_relation_refuses_features_of_another_size() -> None:
    with pytest.raises(ValueError, match=r"heatmaps' size.*\(32, 24\).*finest"):
        losses.joint_relation(torch.zeros(1, 5, 64, 48), torch.zeros(1, 3, 32, 24))


def test_relation_counts_each_pair_once() -> None:
    student, teacher = torch.eye(3)[None].clone(), torch.eye(3)[None]
    student[0, 0, 1] = student[0, 1, 0] = 0.5
    term = losses.relation_loss(student, teacher, torch.tensor([[1.0, 0.25, 1.0]]))
    assert term.sum.item() == pytest.approx(0.25 * 0.5)
    assert term.count.item() == pytest.approx(0.5 + 1.0 + 0.5)


def test_oks_loss_of_one_joint_off() -> None:
    target = torch.full((1, 2, 2), 0.5)
    points = target.clone()
    points[0, 1, 0] += 0.03
    points[0, 1, 1] -= 0.04
    term = losses.oks_loss(points, target, torch.ones(1, 2), torch.tensor([0.25]), (0.1, 0.05))
    wrong = 1 - math.exp(-(0.05**2) / (2 * 0.1**2 * 0.25))
    assert mean(term) == pytest.approx(wrong / 2, rel=1e-5)


def test_oks_loss_is_bounded_and_survives_an_empty_area() -> None:
    target = torch.zeros(1, 5, 2)
    term = losses.oks_loss(target + 9.0, target, torch.ones(1, 5), torch.zeros(1), SIGMAS)
    assert mean(term) == 1
    assert mean(losses.oks_loss(target, target, torch.ones(1, 5), torch.zeros(1), SIGMAS)) == 0


def test_oks_loss_agrees_with_coco_on_a_person() -> None:
    torch.manual_seed(0)
    target = torch.rand(1, 5, 2)
    points = target + 0.03 * torch.randn(1, 5, 2)
    expected = 0.0
    for joint, sigma in enumerate(SIGMAS):
        squared = float(((points - target)[0, joint] ** 2).sum())
        expected += math.exp(-squared / (2 * sigma) ** 2 / 0.3 / 2) / 5  # cocoeval.computeOks
    assert mean(oks(points, target, torch.ones(1, 5))) == pytest.approx(1 - expected, abs=1e-6)


def test_smooth_l1_of_one_joint_off() -> None:
    target = torch.zeros(2, 2, 2)
    points = target.clone()
    points[1, 0] = torch.tensor([0.05, -0.4])  # one below beta, one above
    expected = (0.5 * 0.05**2 / 0.1 + (0.4 - 0.05)) / 2
    weights = torch.tensor([[1.0, 1.0], [0.5, 0.0]])
    term = losses.smooth_l1_loss(points, target, weights, 0.1)
    assert term.sum.item() == pytest.approx(0.5 * expected, rel=1e-5)
    assert term.count.item() == 2.5


def test_choice_loss_is_the_expected_loss_under_the_softmax() -> None:
    target = torch.zeros(1, 1, 2)
    candidates = torch.tensor([[[[0.0, 0.0], [0.1, 0.0], [0.0, 0.0]]]])
    # (2 * 0.1)^2 * 0.25 = 0.01: a tenth away is worth exp(-0.5); the third is none
    logits = torch.tensor([[[0.0, math.log(3.0), -math.inf]]], requires_grad=True)
    term = losses.choice_loss(
        logits, candidates, target, torch.full((1, 1), 0.5), torch.tensor([0.25]), (0.1,)
    )
    assert term.sum.item() == pytest.approx(0.5 * 0.75 * (1 - math.exp(-0.5)))
    assert term.count.item() == 0.5
    term.sum.backward()
    assert logits.grad is not None and logits.grad.isfinite().all()
    assert logits.grad[0, 0, 0] < 0 < logits.grad[0, 0, 1] and logits.grad[0, 0, 2] == 0


def test_choice_loss_of_worthless_candidates_has_no_gradient() -> None:
    candidates = torch.tensor([[[[5.0, 0.0], [9.0, 0.0]]]])
    logits = torch.zeros(1, 1, 2, requires_grad=True)
    weights, area = torch.ones(1, 1), torch.tensor([0.25])
    term = losses.choice_loss(logits, candidates, torch.zeros(1, 1, 2), weights, area, (0.1,))
    assert mean(term) == 1
    term.sum.backward()
    assert logits.grad is not None and not logits.grad.any()
