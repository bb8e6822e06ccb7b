"""What both stages minimize: pure functions of batched tensors, each a sum and a count.

Points are in units of the crop's height on both axes, unless a name says otherwise; ``beta`` is
one heatmap cell in that unit. Whatever comes from a teacher, and every weight, is detached;
weights below zero count as zero. Spatial softmaxes follow the map's own peak (see
spatial_softmax), without which they would barely see a map of peak 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LOWEST_PEAK = 0.05
AS_GOOD = 0.1
"""Part of a joint's OKS by which one way of naming a pose may lack another and be as good."""
_TINY = 1e-8


class Term(NamedTuple):
    """A mean kept as two scalars, so that workers can add both before dividing.

    With a count of 0 the sum is 0, and still hangs on the student's graph.
    """

    sum: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count


def truth_loss(student_heatmaps: Tensor, target_heatmaps: Tensor, weights: Tensor) -> Term:
    """Half the squared difference of weighted maps, a mean over B * K * H * W.

    As in the official SimpleBaseline, the weight multiplies both maps: it enters squared, and a
    joint of weight 0 counts as a perfect one.

    Args:
        student_heatmaps: (B, K, H, W).
        target_heatmaps: (B, K, H, W).
        weights: (B, K), 0 for unlabeled joints.
    """
    squared = (student_heatmaps - target_heatmaps.detach()).square()
    halves = 0.5 * weights.detach().square() * squared.sum(dim=(2, 3))
    return Term(halves.sum(), halves.new_tensor(float(squared.numel())))


def bins_kl(
    student_bins: tuple[Tensor, Tensor], labels: tuple[Tensor, Tensor], weights: Tensor
) -> Term:
    """Kullback-Leibler divergence of the student's bins from their labels, in nats.

    SimCC's loss (Li et al., ECCV 2022). The mean of both axes, weighted over the joints.

    Args:
        student_bins: logits along x and y, (B, K, 2w) and (B, K, 2h).
        labels: probabilities of the same bins; of sum 0 where the weight is.
        weights: (B, K).
    """
    along_x, along_y = (
        (torch.xlogy(label, label) - label * bins.log_softmax(dim=-1)).sum(dim=-1)
        for bins, label in zip(student_bins, labels, strict=True)
    )
    return _weighted_mean((along_x + along_y) / 2, weights)


def heatmap_mse(student_heatmaps: Tensor, teacher_heatmaps: Tensor, weights: Tensor) -> Term:
    """Squared difference of the maps (B, K, H, W), a mean over all cells, weighted by joint.

    Args:
        student_heatmaps: (B, K, H, W).
        teacher_heatmaps: (B, K, H, W).
        weights: (B, K), 0 for joints of which the teacher has nothing to say.
    """
    loss = (student_heatmaps - teacher_heatmaps.detach()).square()
    return _weighted_mean(loss.mean(dim=(2, 3)), weights)


def heatmap_kl(
    student_heatmaps: Tensor, teacher_heatmaps: Tensor, weights: Tensor, tau: float
) -> Term:
    """Kullback-Leibler divergence of the student's spatial softmax from the teacher's, in nats.

    Shu et al. (Channel-wise Knowledge Distillation, ICCV 2021) with a joint for a channel. A mean
    over B * K, weighted as in heatmap_mse. ``tau`` is a fraction of each map's peak.
    """
    student = _relative_to_peak(student_heatmaps, tau).flatten(2).log_softmax(dim=-1)
    teacher = _relative_to_peak(teacher_heatmaps.detach(), tau).flatten(2).log_softmax(dim=-1)
    return _weighted_mean((teacher.exp() * (teacher - student)).sum(dim=-1), weights)


def spatial_softmax(heatmaps: Tensor, tau: float = 0.05) -> Tensor:
    """Softmax over the cells of H / (tau * max H), (B, K, H, W).

    The maximum is each map's own, detached and at least LOWEST_PEAK.
    """
    return _relative_to_peak(heatmaps, tau).flatten(2).softmax(dim=-1).view_as(heatmaps)


def soft_argmax(heatmaps: Tensor, tau: float = 0.05) -> Tensor:
    """Mean cell under the spatial softmax, x and y in heatmap cells, (B, K, 2)."""
    probability = spatial_softmax(heatmaps, tau)
    rows = torch.arange(heatmaps.shape[2], device=heatmaps.device, dtype=heatmaps.dtype)
    columns = torch.arange(heatmaps.shape[3], device=heatmaps.device, dtype=heatmaps.dtype)
    mean_x = (probability.sum(dim=2) * columns).sum(dim=-1)
    mean_y = (probability.sum(dim=3) * rows).sum(dim=-1)
    return torch.stack((mean_x, mean_y), dim=-1)


def pairwise_loss(
    student_points: Tensor, teacher_points: Tensor, confidence: Tensor, beta: float
) -> Term:
    """Smooth-L1 between the student's and the teacher's distances of every two joints.

    RKD's distance term (Park et al., CVPR 2019) on joints. A mean over pairs i < j of all people,
    weighted by the root of the product of both confidences.

    Args:
        student_points: (B, K, 2).
        teacher_points: (B, K, 2).
        confidence: the teacher's scores, (B, K).
        beta: where the loss turns from square to straight.
    """
    student, teacher = (
        torch.linalg.vector_norm(points[:, :, None] - points[:, None], dim=-1)  # (B, K, K)
        for points in (student_points, teacher_points.detach())
    )
    loss = F.smooth_l1_loss(student, teacher, reduction="none", beta=beta)
    roots = confidence.detach().clamp_min(0).sqrt()
    # every pair once: whole matrices are cheaper than gathering halves of them
    return _weighted_mean(loss, (roots[:, :, None] * roots[:, None]).triu(diagonal=1))


def bone_loss(
    student_points: Tensor,
    teacher_points: Tensor,
    confidence: Tensor,
    edges: Sequence[tuple[int, int]],
    beta: float,
) -> Term:
    """Smooth-L1 between the limbs' vectors plus 1 - cos of the angle between them.

    The first part is the mean of both axes. For the second a limb shorter than ``beta`` counts as
    the less of a direction the shorter it is. A mean over the limbs of all people, taken after the
    absolute value and weighted by the root of the product of both ends' confidences.

    Args:
        student_points: (B, K, 2).
        teacher_points: (B, K, 2).
        confidence: the teacher's scores, (B, K).
        edges: pairs of joint indices, E of them.
        beta: where smooth-L1 turns from square to straight.
    """
    ends = torch.tensor(edges, dtype=torch.long, device=student_points.device).view(-1, 2)
    first, second = ends.unbind(dim=1)
    teacher_points = teacher_points.detach()
    student = student_points[:, second] - student_points[:, first]  # (B, E, 2)
    teacher = teacher_points[:, second] - teacher_points[:, first]
    vectors = F.smooth_l1_loss(student, teacher, reduction="none", beta=beta).mean(dim=-1)
    # half the squared distance of two unit vectors is 1 - cos, and exactly 0 for equal limbs
    turn = _direction(student, beta) - _direction(teacher, beta)
    angles = 0.5 * turn.square().sum(dim=-1)
    return _weighted_mean(vectors + angles, _both(confidence, first, second))


def angle_loss(
    student_points: Tensor,
    teacher_points: Tensor,
    confidence: Tensor,
    edges: Sequence[tuple[int, int]],
    shortest: float,
) -> Term:
    """Smooth-L1 between the cosines of the angles that two limbs make where they meet.

    RKD's angle term (Park et al., CVPR 2019), with its turn from square to straight at 1, on the
    skeleton's own angles instead of every three joints. A mean over the angles of all people,
    weighted by the cube root of the product of the three joints' confidences.

    Args:
        student_points: (B, K, 2).
        teacher_points: (B, K, 2).
        confidence: the teacher's scores, (B, K).
        edges: pairs of joint indices; every two that share a joint make an angle.
        shortest: a limb shorter than this counts as the less of a direction the shorter it is.
    """
    corners = torch.tensor(_corners(edges), dtype=torch.long, device=student_points.device)
    first, middle, last = corners.view(-1, 3).unbind(dim=1)

    def cosines(points: Tensor) -> Tensor:
        one = _direction(points[:, first] - points[:, middle], shortest)
        other = _direction(points[:, last] - points[:, middle], shortest)
        return (one * other).sum(dim=-1)  # (B, number of angles)

    student, teacher = cosines(student_points), cosines(teacher_points.detach())
    loss = F.smooth_l1_loss(student, teacher, reduction="none")
    return _weighted_mean(loss, _all_three(confidence, first, middle, last))


def joint_relation(heatmaps: Tensor, features: Tensor, tau: float = 0.05) -> Tensor:
    """Cosines between the joints' descriptors, (B, K, K).

    A joint's descriptor is the mean of the features under its spatial softmax.

    Args:
        heatmaps: (B, K, H, W).
        features: (B, C, H, W), the finest of the same network.
        tau: the softmax's temperature, a fraction of each map's peak.
    """
    if heatmaps.shape[-2:] != features.shape[-2:]:
        raise ValueError(
            "joint_relation needs features of the heatmaps' size, got "
            f"{tuple(features.shape[-2:])} and {tuple(heatmaps.shape[-2:])}; "
            "take the finest map of the pyramid"
        )
    probability = spatial_softmax(heatmaps, tau).flatten(2)
    descriptors = probability @ features.flatten(2).transpose(1, 2)  # (B, K, C)
    directions = F.normalize(descriptors, dim=-1)
    return directions @ directions.transpose(1, 2)


def relation_loss(student_relation: Tensor, teacher_relation: Tensor, confidence: Tensor) -> Term:
    """Squared difference of the relations (B, K, K), a weighted mean over pairs i < j.

    The weight is the root of the product of both joints' confidences (B, K), the teacher's.
    """
    first, second = _pairs(student_relation)
    difference = student_relation - teacher_relation.detach()
    loss = difference[:, first, second].square()
    return _weighted_mean(loss, _both(confidence, first, second))


def oks_loss(
    points: Tensor,
    target: Tensor,
    weights: Tensor,
    area: Tensor,
    sigmas: Tensor | Sequence[float],
) -> Term:
    """One minus each joint's part in COCO's OKS, 1 - exp(-e^2 / (2 (2 sigma)^2 area)).

    Args:
        points: (B, K, 2).
        target: (B, K, 2).
        weights: (B, K).
        area: the people's areas, (B,), in units of the squared crop height.
        sigmas: the skeleton's OKS sigmas, K of them.
    """
    sigmas = torch.as_tensor(sigmas, dtype=points.dtype, device=points.device)
    squared = (points - target.detach()).square().sum(dim=-1)
    tolerance = (2 * sigmas).square() * area.detach().clamp_min(_TINY)[:, None]
    return _weighted_mean(-torch.expm1(-squared / (2 * tolerance)), weights)


def choice_loss(
    logits: Tensor,
    candidates: Tensor,
    target: Tensor,
    weights: Tensor,
    area: Tensor,
    sigmas: Tensor | Sequence[float],
) -> Term:
    """One minus the part in COCO's OKS that is expected under the softmax of the logits.

    Bounded, and no more than what AP counts: where all candidates are as good, or none is any,
    it asks for nothing, while a cross-entropy would call for a guess there.

    Args:
        logits: (B, K, M); -inf where there is no candidate.
        candidates: (B, K, M, 2), in any unit; no gradient flows into them.
        target: (B, K, 2), in the same.
        weights: (B, K).
        area: the people's areas, (B,), in that unit squared.
        sigmas: the skeleton's OKS sigmas, K of them.
    """
    sigmas = torch.as_tensor(sigmas, dtype=logits.dtype, device=logits.device)
    squared = (candidates - target[:, :, None]).detach().square().sum(dim=-1)  # (B, K, M)
    tolerance = (2 * sigmas).square() * area.detach().clamp_min(_TINY)[:, None]
    wrong = -torch.expm1(-squared / (2 * tolerance[..., None]))
    return _weighted_mean((logits.softmax(dim=-1) * wrong).sum(dim=-1), weights)


def swap_loss(
    logits: Tensor,
    poses: Tensor,
    target: Tensor,
    weights: Tensor,
    area: Tensor,
    sigmas: Tensor | Sequence[float],
) -> Term:
    """Cross-entropy, in nats, against those ways of naming a pose that are as good as the best.

    A way is as good if its OKS, summed over the joints, lacks no more than ``AS_GOOD`` of the
    best one's. People for whom every possible way is as good don't count.

    Args:
        logits: (B, W); -inf for ways that are not possible.
        poses: the pose under each way's names, (B, W, K, 2), in any unit.
        target: (B, K, 2), in the same.
        weights: (B, K).
        area: the people's areas, (B,), in that unit squared.
        sigmas: the skeleton's OKS sigmas, K of them.
    """
    sigmas = torch.as_tensor(sigmas, dtype=logits.dtype, device=logits.device)
    squared = (poses - target[:, None]).detach().square().sum(dim=-1)  # (B, W, K)
    tolerance = (2 * sigmas).square() * area.detach().clamp_min(_TINY)[:, None]
    similar = torch.exp(-squared / (2 * tolerance[:, None])) * weights.detach()[:, None]
    can_be = logits > -torch.inf
    total = similar.sum(dim=-1).masked_fill(~can_be, -torch.inf)
    is_good = total >= total.amax(dim=1, keepdim=True) - AS_GOOD
    likely = logits.logsumexp(dim=1) - logits.masked_fill(~is_good, -torch.inf).logsumexp(dim=1)
    return _weighted_mean(likely, (can_be & ~is_good).any(dim=1))


def smooth_l1_loss(points: Tensor, target: Tensor, weights: Tensor, beta: float) -> Term:
    """Smooth-L1 of points (B, K, 2), the mean of both axes; weighted by (B, K) over the joints."""
    loss = F.smooth_l1_loss(points, target.detach(), reduction="none", beta=beta)
    return _weighted_mean(loss.mean(dim=-1), weights)


def _relative_to_peak(heatmaps: Tensor, tau: float) -> Tensor:
    peak = heatmaps.detach().amax(dim=(2, 3), keepdim=True).clamp_min(LOWEST_PEAK)
    return heatmaps / (tau * peak)


def _direction(limbs: Tensor, shortest: float) -> Tensor:
    length = torch.linalg.vector_norm(limbs, dim=-1, keepdim=True)
    return limbs / length.clamp_min(max(shortest, _TINY))


def _pairs(joints: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of every two of the K joints in (B, K, ...), the lower one first."""
    count = joints.shape[1]
    first, second = torch.triu_indices(count, count, offset=1, device=joints.device).unbind()
    return first, second


def _both(confidence: Tensor, first: Tensor, second: Tensor) -> Tensor:
    confidence = confidence.detach().clamp_min(0)
    return (confidence[:, first] * confidence[:, second]).sqrt()


def _all_three(confidence: Tensor, first: Tensor, middle: Tensor, last: Tensor) -> Tensor:
    confidence = confidence.detach().clamp_min(0)
    return (confidence[:, first] * confidence[:, middle] * confidence[:, last]) ** (1 / 3)


def _corners(edges: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """(end, joint, end) of every two edges that meet at a joint."""
    corners = []
    for joint in sorted({joint for edge in edges for joint in edge}):
        ends = [end if start == joint else start for start, end in edges if joint in (start, end)]
        corners += [(first, joint, last) for first, last in itertools.combinations(ends, 2)]
    return corners


def _weighted_mean(values: Tensor, weights: Tensor) -> Term:
    weights = weights.detach().to(values.dtype).clamp_min(0)
    return Term((values * weights).sum(), weights.sum())
