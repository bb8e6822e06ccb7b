"""The loss terms of both stages: pure functions of batched tensors that return a sum and a count.

Points are in units of the crop's height on both axes, unless a name says otherwise; ``beta`` is
one heatmap cell in that unit. Teachers' values and all weights are detached; weights below zero
count as zero. Spatial softmaxes are scaled by the peak of each map (see ``spatial_softmax``);
without this they would be nearly uniform on a map of peak 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.skeleton import Skeleton

LOWEST_PEAK = 0.05
"""Peaks below this scale a spatial softmax as this one does."""
AS_GOOD = 0.1
"""Two labelings of a pose count as equally good if their summed OKS differs by at most this."""
_TINY = 1e-8


class Term(NamedTuple):
    """A mean as two scalars, so that workers can add up both before dividing.

    With a count of 0 the sum is 0 and still part of the student's graph.
    """

    sum: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count


def truth_loss(student_heatmaps: Tensor, target_heatmaps: Tensor, weights: Tensor) -> Term:
    """Compute half the squared difference of weighted maps, a mean over B * K * H * W.

    As in the official SimpleBaseline, the weight multiplies both maps: it enters squared, and a
    joint of weight 0 counts as predicted perfectly.

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
    """Compute the Kullback-Leibler divergence of the student's bins from the labels, in nats.

    SimCC's loss (Li et al., ECCV 2022): the mean of both axes, weighted over the joints.

    Args:
        student_bins: logits along x and y, (B, K, 2w) and (B, K, 2h).
        labels: probabilities of the same bins; all 0 where the weight is 0.
        weights: (B, K).
    """
    along_x, along_y = (
        (torch.xlogy(label, label) - label * bins.log_softmax(dim=-1)).sum(dim=-1)
        for bins, label in zip(student_bins, labels, strict=True)
    )
    return _weighted_mean((along_x + along_y) / 2, weights)


def heatmap_mse(student_heatmaps: Tensor, teacher_heatmaps: Tensor, weights: Tensor) -> Term:
    """Compute the squared difference of the maps, a mean over all cells, weighted by joint.

    Args:
        student_heatmaps: (B, K, H, W).
        teacher_heatmaps: (B, K, H, W).
        weights: (B, K), 0 for joints without a target.
    """
    loss = (student_heatmaps - teacher_heatmaps.detach()).square()
    return _weighted_mean(loss.mean(dim=(2, 3)), weights)


def heatmap_kl(
    student_heatmaps: Tensor, teacher_heatmaps: Tensor, weights: Tensor, tau: float
) -> Term:
    """Compute the Kullback-Leibler divergence of two spatial softmaxes, in nats.

    Shu et al. (Channel-wise Knowledge Distillation, ICCV 2021), with joints as channels: the
    student's from the teacher's, a mean over B * K, weighted as in ``heatmap_mse``. ``tau`` is a
    fraction of each map's peak.
    """
    student = _relative_to_peak(student_heatmaps, tau).flatten(2).log_softmax(dim=-1)
    teacher = _relative_to_peak(teacher_heatmaps.detach(), tau).flatten(2).log_softmax(dim=-1)
    return _weighted_mean((teacher.exp() * (teacher - student)).sum(dim=-1), weights)


def spatial_softmax(heatmaps: Tensor, tau: float = 0.05) -> Tensor:
    """Compute the softmax of H / (tau * max H) over the cells, (B, K, H, W).

    The maximum is that of each map, detached and at least LOWEST_PEAK.
    """
    return _relative_to_peak(heatmaps, tau).flatten(2).softmax(dim=-1).view_as(heatmaps)


def soft_argmax(heatmaps: Tensor, tau: float = 0.05) -> Tensor:
    """Compute the mean cell under the spatial softmax, x and y in heatmap cells, (B, K, 2)."""
    probability = spatial_softmax(heatmaps, tau)
    rows = torch.arange(heatmaps.shape[2], device=heatmaps.device, dtype=heatmaps.dtype)
    columns = torch.arange(heatmaps.shape[3], device=heatmaps.device, dtype=heatmaps.dtype)
    mean_x = (probability.sum(dim=2) * columns).sum(dim=-1)
    mean_y = (probability.sum(dim=3) * rows).sum(dim=-1)
    return torch.stack((mean_x, mean_y), dim=-1)


def pairwise_loss(
    student_points: Tensor, teacher_points: Tensor, confidence: Tensor, beta: float
) -> Term:
    """Compare the student's and the teacher's distances of every two joints by smooth-L1.

    RKD's distance term (Park et al., CVPR 2019) on joints: a mean over pairs i < j of all people,
    weighted by the root of the product of both confidences.

    Args:
        student_points: (B, K, 2).
        teacher_points: (B, K, 2).
        confidence: the teacher's scores, (B, K).
        beta: where the loss turns from quadratic to linear.
    """
    student, teacher = (
        torch.linalg.vector_norm(points[:, :, None] - points[:, None], dim=-1)  # (B, K, K)
        for points in (student_points, teacher_points.detach())
    )
    loss = F.smooth_l1_loss(student, teacher, reduction="none", beta=beta)
    roots = confidence.detach().clamp_min(0).sqrt()
    # Each pair once; masking whole matrices is cheaper than gathering half of them.
    return _weighted_mean(loss, (roots[:, :, None] * roots[:, None]).triu(diagonal=1))


def bone_loss(
    student_points: Tensor,
    teacher_points: Tensor,
    confidence: Tensor,
    edges: Sequence[tuple[int, int]],
    beta: float,
) -> Term:
    """Compare the limbs' vectors by smooth-L1, plus 1 - cos of the angle between them.

    The first part is the mean of both axes. In the second the direction of a limb shorter than
    ``beta`` is scaled down in proportion. The result is a mean over the limbs of all people,
    weighted by the root of the product of both ends' confidences.

    Args:
        student_points: (B, K, 2).
        teacher_points: (B, K, 2).
        confidence: the teacher's scores, (B, K).
        edges: pairs of joint indices, E of them.
        beta: where smooth-L1 turns from quadratic to linear.
    """
    ends = torch.tensor(edges, dtype=torch.long, device=student_points.device).view(-1, 2)
    first, second = ends.unbind(dim=1)
    teacher_points = teacher_points.detach()
    student = student_points[:, second] - student_points[:, first]  # (B, E, 2)
    teacher = teacher_points[:, second] - teacher_points[:, first]
    vectors = F.smooth_l1_loss(student, teacher, reduction="none", beta=beta).mean(dim=-1)
    # Half the squared distance of two unit vectors is 1 - cos, and exactly 0 for equal limbs.
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
    """Compare the cosines of the angles between adjacent limbs by smooth-L1.

    RKD's angle term (Park et al., CVPR 2019), quadratic below 1, on the angles of the skeleton
    instead of every three joints: a mean over the angles of all people, weighted by the cube root
    of the product of the three joints' confidences.

    Args:
        student_points: (B, K, 2).
        teacher_points: (B, K, 2).
        confidence: the teacher's scores, (B, K).
        edges: pairs of joint indices; every two that share a joint make an angle.
        shortest: the direction of a shorter limb is scaled down in proportion.
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


def missing_limbs(kind: str, skeleton: Skeleton) -> str | None:
    """Describe what this structure loss compares if the skeleton has none; None if it has."""
    if kind == "bone" and not skeleton.edges:
        return "limbs"
    if kind == "angle" and not _corners(skeleton.edges):
        return "angles between limbs that share a joint"
    return None


def joint_relation(heatmaps: Tensor, features: Tensor, tau: float = 0.05) -> Tensor:
    """Compute the cosines between the joints' descriptors, (B, K, K).

    A joint's descriptor is the mean of the features under its spatial softmax.

    Args:
        heatmaps: (B, K, H, W).
        features: (B, C, H, W), the finest map of the same network's pyramid.
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
    """Compute the squared difference of the relations (B, K, K), a mean over pairs i < j.

    A pair's weight is the root of the product of the teacher's confidences (B, K) in both joints.
    """
    first, second = _pairs(student_relation)
    difference = student_relation - teacher_relation.detach()
    loss = difference[:, first, second].square()
    return _weighted_mean(loss, _both(confidence, first, second))


def oks_tolerance(sigmas: Tensor | Sequence[float], area: Tensor, like: Tensor) -> Tensor:
    """Return each joint's squared tolerance in COCO's OKS, (2 sigma)^2 area, (B, K).

    A joint's part in the OKS is exp(-e^2 / (2 tolerance)), where e is its distance.

    Args:
        sigmas: the skeleton's OKS sigmas, K of them.
        area: the people's areas, (B,); the result is in the same unit.
        like: gives dtype and device.
    """
    sigmas = torch.as_tensor(sigmas, dtype=like.dtype, device=like.device)
    return (2 * sigmas).square() * area.detach().clamp_min(_TINY)[:, None]


def oks_loss(
    points: Tensor,
    target: Tensor,
    weights: Tensor,
    area: Tensor,
    sigmas: Tensor | Sequence[float],
) -> Term:
    """Compute one minus each joint's part in COCO's OKS, a weighted mean over the joints.

    Args:
        points: (B, K, 2).
        target: (B, K, 2).
        weights: (B, K).
        area: the people's areas, (B,), in units of the squared crop height.
        sigmas: the skeleton's OKS sigmas, K of them.
    """
    squared = (points - target.detach()).square().sum(dim=-1)
    tolerance = oks_tolerance(sigmas, area, like=points)
    return _weighted_mean(-torch.expm1(-squared / (2 * tolerance)), weights)


def choice_loss(
    logits: Tensor,
    candidates: Tensor,
    target: Tensor,
    weights: Tensor,
    area: Tensor,
    sigmas: Tensor | Sequence[float],
) -> Term:
    """Compute one minus the expected part in COCO's OKS under the softmax of the logits.

    The loss is bounded and has no gradient where all candidates are equally good, or all are
    useless; a cross-entropy would push for a guess there.

    Args:
        logits: (B, K, M); -inf where there is no candidate.
        candidates: (B, K, M, 2), in any unit; no gradient flows into them.
        target: (B, K, 2), in the same unit.
        weights: (B, K).
        area: the people's areas, (B,), in that unit squared.
        sigmas: the skeleton's OKS sigmas, K of them.
    """
    squared = (candidates - target[:, :, None]).detach().square().sum(dim=-1)  # (B, K, M)
    tolerance = oks_tolerance(sigmas, area, like=logits)
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
    """Compute the cross-entropy, in nats, against the left-right labelings as good as the best.

    A labeling is as good if its OKS, summed over the joints, is at most ``AS_GOOD`` below the
    best one's. People whose possible labelings are all as good don't count.

    Args:
        logits: (B, L); -inf for labelings that are not possible.
        poses: the pose under each labeling, (B, L, K, 2), in any unit.
        target: (B, K, 2), in the same unit.
        weights: (B, K).
        area: the people's areas, (B,), in that unit squared.
        sigmas: the skeleton's OKS sigmas, K of them.
    """
    squared = (poses - target[:, None]).detach().square().sum(dim=-1)  # (B, L, K)
    tolerance = oks_tolerance(sigmas, area, like=logits)
    similar = torch.exp(-squared / (2 * tolerance[:, None])) * weights.detach()[:, None]
    is_possible = logits > -torch.inf
    total = similar.sum(dim=-1).masked_fill(~is_possible, -torch.inf)
    is_good = total >= total.amax(dim=1, keepdim=True) - AS_GOOD
    entropy = logits.logsumexp(dim=1) - logits.masked_fill(~is_good, -torch.inf).logsumexp(dim=1)
    return _weighted_mean(entropy, (is_possible & ~is_good).any(dim=1))


def smooth_l1_loss(points: Tensor, target: Tensor, weights: Tensor, beta: float) -> Term:
    """Compute smooth-L1 of points (B, K, 2), the mean of both axes, weighted by joint (B, K)."""
    loss = F.smooth_l1_loss(points, target.detach(), reduction="none", beta=beta)
    return _weighted_mean(loss.mean(dim=-1), weights)


def _relative_to_peak(heatmaps: Tensor, tau: float) -> Tensor:
    peak = heatmaps.detach().amax(dim=(2, 3), keepdim=True).clamp_min(LOWEST_PEAK)
    return heatmaps / (tau * peak)


def _direction(limbs: Tensor, shortest: float) -> Tensor:
    length = torch.linalg.vector_norm(limbs, dim=-1, keepdim=True)
    return limbs / length.clamp_min(max(shortest, _TINY))


def _pairs(joints: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of every two of the K joints of (B, K, ...), the lower one first."""
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
    """(end, joint, end) of every two edges that share a joint."""
    corners = []
    for joint in sorted({joint for edge in edges for joint in edge}):
        ends = [end if start == joint else start for start, end in edges if joint in (start, end)]
        corners += [(first, joint, last) for first, last in itertools.combinations(ends, 2)]
    return corners


def _weighted_mean(values: Tensor, weights: Tensor) -> Term:
    weights = weights.detach().to(values.dtype).clamp_min(0)
    return Term((values * weights).sum(), weights.sum())
