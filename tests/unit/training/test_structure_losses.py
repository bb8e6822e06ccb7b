"""Structure losses: values by hand, invariances, and gradients on real heatmaps."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.skeleton import COCO
from study.training import losses

EDGES = ((0, 1), (1, 2), (0, 3), (3, 4))
CELL = 1 / 64
KINDS = ["pairwise", "bone", "angle", "relation"]
TEACHER_CELLS = torch.tensor(
    [[[24.0, 12.0], [12.0, 20.0], [8.0, 40.0], [36.0, 24.0], [40.0, 44.0]]], dtype=torch.float64
)


def loss_on_points(kind: str, student: Tensor, teacher: Tensor) -> float:
    weights = torch.linspace(0.3, 1.0, student.shape[1]).expand(student.shape[:2])
    if kind == "pairwise":
        term = losses.pairwise_loss(student, teacher, weights, CELL)
    elif kind == "bone":
        term = losses.bone_loss(student, teacher, weights, EDGES, CELL)
    else:
        term = losses.angle_loss(student, teacher, weights, EDGES, CELL)
    return float(term.sum / term.count)


def two_poses() -> tuple[Tensor, Tensor]:
    """A student's and a teacher's points, (4, 5, 2) each, all limbs longer than a cell."""
    student, teacher = torch.rand(2, 4, 5, 2, generator=torch.Generator().manual_seed(3))
    for points in (student, teacher):
        assert (
            min(float((points[:, a] - points[:, b]).norm(dim=-1).min()) for a, b in EDGES) > CELL
        )
    return student, teacher


def moved(points: Tensor, change: str) -> Tensor:
    """Return the points after a change of the whole image."""
    if change == "translation":
        return points + torch.tensor([0.4, -0.2])
    if change == "mirror":
        return points * torch.tensor([-1.0, 1.0])
    if change == "scale":
        return 3 * points
    angle = math.radians(70)
    cos, sin = math.cos(angle), math.sin(angle)
    return points @ torch.tensor([[cos, sin], [-sin, cos]])


@pytest.mark.parametrize(
    ("kind", "invariances"),
    [
        ("pairwise", {"translation", "rotation", "mirror"}),
        ("bone", {"translation"}),
        ("angle", {"translation", "rotation", "mirror", "scale"}),
    ],
)
def test_each_kind_is_invariant_to_its_changes_of_a_whole_person_only(
    kind: str, invariances: set[str]
) -> None:
    student, teacher = two_poses()
    before = loss_on_points(kind, student, teacher)
    for change in ("translation", "rotation", "mirror", "scale"):
        after = loss_on_points(kind, moved(student, change), teacher)
        assert (after == pytest.approx(before, rel=1e-5)) == (change in invariances), change
        perfect = loss_on_points(kind, moved(teacher, change), teacher)
        assert (perfect < 1e-9) == (change in invariances), change


def test_angle_of_a_knee_bent_by_thirty_degrees_more() -> None:
    teacher = torch.tensor([[[0.9, 0.5], [0.5, 0.5], [0.5, 0.7]]])  # a right angle, at joint 1
    student = teacher.clone()
    student[0, 2] = 0.5 + 0.3 * torch.tensor([math.cos(math.pi / 3), math.sin(math.pi / 3)])
    term = losses.angle_loss(
        student, teacher, torch.tensor([[1.0, 0.5, 0.25]]), ((0, 1), (1, 2)), CELL
    )
    assert term.count.item() == pytest.approx(0.5, rel=1e-6)  # the cube root of 1/8
    assert term.sum.item() == pytest.approx(0.5 * 0.5 * 0.5**2, rel=1e-5)


def test_angle_error_of_a_limb_folded_back_counts_linearly() -> None:
    teacher = torch.tensor([[[0.2, 0.5], [0.5, 0.5], [0.8, 0.5]]])
    student = torch.tensor([[[0.8, 0.5], [0.5, 0.5], [0.8, 0.5]]])
    term = losses.angle_loss(student, teacher, torch.ones(1, 3), ((0, 1), (1, 2)), CELL)
    assert term.sum.item() == pytest.approx(2 - 0.5, rel=1e-6)


def test_opposite_angle_errors_do_not_cancel() -> None:
    bent, straight = [[0.5, 0.8], [0.5, 0.5], [0.8, 0.5]], [[0.2, 0.5], [0.5, 0.5], [0.8, 0.5]]
    student, teacher = torch.tensor([bent, straight]), torch.tensor([straight, bent])
    term = losses.angle_loss(student, teacher, torch.ones(2, 3), ((0, 1), (1, 2)), CELL)
    assert float(term.sum / term.count) == pytest.approx(0.5, rel=1e-5)


def test_angle_agrees_with_the_law_of_cosines_on_every_two_limbs_that_meet() -> None:
    generator = torch.Generator().manual_seed(5)
    student, teacher = torch.rand(2, 3, 17, 2, generator=generator)
    weights = torch.rand(3, 17, generator=generator)

    def cosine(points: Tensor, first: int, joint: int, last: int) -> float:
        a, b, c = (
            float((points[i] - points[j]).norm())
            for i, j in ((first, joint), (last, joint), (first, last))
        )
        return (a * a + b * b - c * c) / (2 * a * b)

    total = count = 0.0
    for person in range(3):
        for one, other in itertools.combinations(COCO.edges, 2):
            shared = set(one) & set(other)
            if not shared:
                continue
            first, joint, last = (set(one) - shared).pop(), shared.pop(), 0
            last = (set(other) - {joint}).pop()
            off = abs(
                cosine(student[person], first, joint, last)
                - cosine(teacher[person], first, joint, last)
            )
            weight = math.prod(float(weights[person, k]) for k in (first, joint, last)) ** (1 / 3)
            total += weight * (0.5 * off**2 if off < 1 else off - 0.5)
            count += weight
    term = losses.angle_loss(student, teacher, weights, COCO.edges, 1e-6)
    assert term.count.item() == pytest.approx(count, rel=1e-5)
    assert term.sum.item() == pytest.approx(total, rel=1e-4)


def test_skeleton_without_two_limbs_that_meet_has_no_angle() -> None:
    student = torch.rand(2, 4, 2, requires_grad=True)
    term = losses.angle_loss(
        student, torch.rand(2, 4, 2), torch.ones(2, 4), ((0, 1), (2, 3)), CELL
    )
    assert (term.sum.item(), term.count.item()) == (0, 0)
    term.sum.backward()


@pytest.mark.parametrize("length", [0.0, 1e-6, 0.5 * CELL])
def test_angle_gradient_of_a_short_limb_is_neither_steep_nor_zero(length: float) -> None:
    teacher = torch.tensor([[[0.8, 0.5], [0.5, 0.5], [0.7, 0.8]]])
    student = torch.tensor([[[0.8, 0.5], [0.5, 0.5], [0.5, 0.5 + length]]]).requires_grad_()
    term = losses.angle_loss(student, teacher, torch.ones(1, 3), ((0, 1), (1, 2)), CELL)
    term.sum.backward()
    assert student.grad is not None
    # the error is below 1, and a cell turns a limb by as much as a cell's length does
    assert 0.1 / CELL < student.grad[0, 2].norm() <= 1 / CELL
    assert student.grad[0, 2, 0] < 0  # towards the side on which the teacher's limb lies


def test_relation_ignores_the_scale_of_features_and_heatmaps() -> None:
    heatmaps, features = real_heatmaps(TEACHER_CELLS, 0.3, noise=0.0), smooth_features()
    before = losses.joint_relation(heatmaps, features)
    after = losses.joint_relation(0.5 * heatmaps, 40 * features)
    torch.testing.assert_close(after, before)
    assert before.std() > 0.1  # otherwise there would be nothing to ignore


def real_heatmaps(cells: Tensor, peak: float, noise: float = 0.02) -> Tensor:
    """Maps (1, 5, 64, 48) like a network's: Gaussians of sigma 2 and this peak, and noise."""
    along_x = torch.exp(-((torch.arange(48) - cells[..., :1]) ** 2) / 8)
    along_y = torch.exp(-((torch.arange(64) - cells[..., 1:]) ** 2) / 8)
    clean = peak * along_y[..., :, None] * along_x[..., None, :]
    generator = torch.Generator().manual_seed(4)
    return clean + noise * torch.randn(clean.shape, generator=generator, dtype=torch.float64)


def smooth_features() -> Tensor:
    coarse = torch.randn(1, 7, 8, 6, generator=torch.Generator().manual_seed(2)).double()
    return F.interpolate(coarse, (64, 48), mode="bilinear", align_corners=False)


def loss_on_heatmaps(kind: str, heatmaps: Tensor) -> Tensor:
    """Return the loss against a teacher with joints at TEACHER_CELLS and the same features."""
    confidence = torch.ones(1, 5, dtype=torch.float64)
    if kind == "relation":
        features = smooth_features()
        target = losses.joint_relation(real_heatmaps(TEACHER_CELLS, 1.0, noise=0.0), features)
        term = losses.relation_loss(losses.joint_relation(heatmaps, features), target, confidence)
        return term.sum / term.count
    student, teacher = losses.soft_argmax(heatmaps) / 64, TEACHER_CELLS / 64
    if kind == "pairwise":
        term = losses.pairwise_loss(student, teacher, confidence, CELL)
    elif kind == "bone":
        term = losses.bone_loss(student, teacher, confidence, EDGES, CELL)
    else:
        term = losses.angle_loss(student, teacher, confidence, EDGES, CELL)
    return term.sum / term.count


def with_gradient(kind: str, peak: float) -> tuple[Tensor, float, Tensor]:
    """A student's maps with one joint three cells off, their loss and its gradient."""
    cells = TEACHER_CELLS.clone()
    cells[0, 3, 0] += 3
    heatmaps = real_heatmaps(cells, peak).requires_grad_()
    loss = loss_on_heatmaps(kind, heatmaps)
    (gradient,) = torch.autograd.grad(loss, heatmaps)
    return heatmaps.detach(), loss.item(), gradient


@pytest.mark.parametrize("kind", KINDS)
def test_low_peaks_have_as_strong_a_gradient_as_high_ones(kind: str) -> None:
    low, full = (with_gradient(kind, peak)[2].norm().item() for peak in (0.3, 1.0))
    assert 0.1 < low / full < 10
    assert low > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_most_of_the_gradient_is_on_the_wrong_joint_and_its_neighbors(kind: str) -> None:
    _, _, gradient = with_gradient(kind, 0.3)
    by_joint = gradient.flatten(2).norm(dim=-1)[0]
    near = {"bone": [0, 3, 4], "angle": [0, 1, 3, 4]}.get(kind, [0, 1, 2, 3, 4])
    assert by_joint[3] == by_joint.max()
    assert by_joint[near].square().sum() > 0.9 * by_joint.square().sum()


@pytest.mark.parametrize("kind", KINDS)
def test_step_down_the_gradient_lowers_the_loss_by_the_predicted_amount(kind: str) -> None:
    heatmaps, loss, gradient = with_gradient(kind, 0.3)
    length = 1e-3
    after = loss_on_heatmaps(kind, heatmaps - length * gradient / gradient.norm()).item()
    assert loss - after == pytest.approx(length * gradient.norm().item(), rel=0.1)
