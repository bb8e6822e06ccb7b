"""The errors of a student on unseen people, and poses disturbed by such errors.

On its own training people a student's pose is nearly right, and a refiner trained on such poses
learns to do nothing. So the student's errors are measured on held-out people, and in training its
poses are disturbed by the errors that it makes more often there than on its training people. The
kinds of error are those of Ronchi and Perona, Benchmarking and Error Diagnosis, ICCV 2017.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.skeleton import Skeleton
from study.training.batches import Labels
from study.training.losses import oks_tolerance

NEAR = 0.5
"""A joint counts as found from this part of the OKS on."""
INVERSION, NEIGHBOR, MISS = range(3)
NUM_KINDS = 3
POWERS = (2.0, 12.0)
"""Range of jitter's exponent: with the higher one 78 of 100 joints have less than a twentieth of
the spread, with the lower one 22."""


def jittered(
    truth: Tensor, visibility: Tensor, areas: Tensor, spread: float
) -> tuple[Tensor, Tensor]:
    """Return noisy poses (B, K, 2), like another method's, and their scores (B, K).

    The noise is Gaussian, drawn from torch's global generator. Its spread is drawn for each joint;
    small spreads are more frequent, in some people much more. A refiner that never saw a joint in
    its true place would learn to move all joints; one that saw them equally often in all people
    would not learn to tell a good pose from a bad one. Scores are 1 for labeled joints, else 0.

    Args:
        truth: (B, K, 2), with COCO ``visibility`` (B, K).
        areas: (B,), squared pixels of the same frame.
        spread: largest spread of the noise along each axis, as a share of the root of the area.
            A joint's spread is that times a uniform draw to a power, which is drawn for each
            person from ``POWERS``.
    """
    size = areas.sqrt()[:, None, None]
    powers = torch.empty(len(truth), 1).uniform_(*POWERS)
    shares = torch.rand(truth.shape[:2]).pow(powers)[..., None]
    noise = (torch.randn(truth.shape) * shares).to(truth) * spread * size
    return truth + noise, (visibility > 0).to(truth)


@dataclass(frozen=True)
class PoseErrors:
    """Frequency and size of each kind of error, by joint."""

    rates: Tensor
    """(NUM_KINDS, K): share of labeled joints that lie on the person's other side (INVERSION), on
    the neighbor (NEIGHBOR) or nowhere near (MISS). The first two count only joints whose other
    side, or neighbor, is labeled."""
    jitter: Tensor
    """(K,): root mean square distance per axis of found joints, over the root of the area."""
    miss: Tensor
    """(K,): the same for missed joints."""


def measure_errors(keypoints: Tensor, labels: Labels, skeleton: Skeleton) -> PoseErrors:
    """Measure the errors of N poses; unlabeled joints don't count.

    Args:
        keypoints: the student's, (N, K, 2), in the frame of the labels.
    """
    truth, neighbor = labels.keypoints, labels.neighbor_keypoints
    labeled = labels.visibility > 0
    tolerance = oks_tolerance(skeleton.oks_sigmas, labels.areas, like=keypoints)
    order = list(skeleton.flip_order)
    is_paired = torch.tensor(order) != torch.arange(skeleton.num_joints)

    def is_near(target: Tensor, counts: Tensor) -> Tensor:
        squared = (keypoints - target).square().sum(-1)
        return (torch.exp(-squared / (2 * tolerance)) >= NEAR) & counts

    found = is_near(truth, labeled)
    can_invert = labeled & labeled[:, order] & is_paired
    inverted = is_near(truth[:, order], can_invert) & ~found
    there = labels.neighbor_visibility > 0
    can_jump = labeled & (there | there[:, order])
    jumped = is_near(neighbor, there) | is_near(neighbor[:, order], there[:, order])
    jumped &= labeled & ~found & ~inverted
    missed = labeled & ~found & ~inverted & ~jumped
    relative = (keypoints - truth).square().sum(-1) / 2 / labels.areas[:, None]

    def spread(which: Tensor) -> Tensor:
        return (torch.where(which, relative, 0.0).sum(0) / which.sum(0).clamp(min=1)).sqrt()

    kinds = ((inverted, can_invert), (jumped, can_jump), (missed, labeled))
    rates = torch.stack([kind.sum(0) / possible.sum(0).clamp(min=1) for kind, possible in kinds])
    return PoseErrors(rates=rates, jitter=spread(found), miss=spread(missed))


def excess(held_out: PoseErrors, seen: PoseErrors) -> PoseErrors:
    """Return the errors to add to poses with the errors ``seen`` to get those of ``held_out``."""
    right = (1 - seen.rates.sum(0)).clamp(min=0.01)
    return PoseErrors(
        rates=((held_out.rates - seen.rates) / right).clamp(0, 1),
        jitter=(held_out.jitter**2 - seen.jitter**2).clamp(min=0).sqrt(),
        miss=held_out.miss,
    )


def disturb(
    keypoints: Tensor, labels: Labels, errors: PoseErrors, skeleton: Skeleton
) -> tuple[Tensor, Tensor]:
    """Add these errors to poses (B, K, 2), drawn from torch's global generator.

    An inversion needs a label for the joint of the other side, a jump one for the neighbor's.

    Returns:
        The disturbed poses, and a mask (B, K) of joints that moved to another joint or person.
    """
    truth, device = labels.keypoints, keypoints.device
    size = labels.areas.sqrt()[:, None, None]
    order = list(skeleton.flip_order)

    def noise(spread: Tensor) -> Tensor:
        return torch.randn(keypoints.shape).to(device) * spread.to(device)[:, None] * size

    jitter = noise(errors.jitter)
    draw = torch.rand(keypoints.shape[:2]).to(device)
    bounds = errors.rates.to(device).cumsum(0)
    inverts = (draw < bounds[INVERSION]) & (labels.visibility[:, order] > 0)
    jumps = (draw >= bounds[INVERSION]) & (draw < bounds[NEIGHBOR])
    jumps &= labels.neighbor_visibility > 0
    misses = (draw >= bounds[NEIGHBOR]) & (draw < bounds[MISS]) & (labels.visibility > 0)
    moved = keypoints + jitter
    moved = torch.where(inverts[..., None], truth[:, order] + jitter, moved)
    moved = torch.where(jumps[..., None], labels.neighbor_keypoints + jitter, moved)
    moved = torch.where(misses[..., None], truth + noise(errors.miss), moved)
    return moved, inverts | jumps


def disturb_candidates(
    candidates: Tensor, labels: Labels, errors: PoseErrors, skeleton: Skeleton
) -> Tensor:
    """Add these errors to the first candidate of each joint, (B, K, M, 3).

    The first candidate moves as in ``disturb``; heights stay with their rank. If it moves to
    another joint or person, the place that it left becomes the second candidate, at a share of its
    height drawn from 0 to 1, and the last candidate is dropped. On unseen people the true peak is
    often a lower one, and without this no candidate but the first would ever be right.
    """
    places, heights = candidates[..., :2], candidates[..., 2]
    moved, has_jumped = disturb(places[:, :, 0], labels, errors, skeleton)
    first = torch.cat((moved, heights[:, :, 0, None]), dim=-1)[:, :, None]
    if candidates.shape[2] == 1:
        return first
    share = torch.rand(heights.shape[:2]).to(heights.device)
    left = torch.cat((places[:, :, 0], (share * heights[:, :, 0])[..., None]), dim=-1)[:, :, None]
    with_left = torch.cat((first, left, candidates[:, :, 1:-1]), dim=2)
    others = torch.cat((first, candidates[:, :, 1:]), dim=2)
    return torch.where(has_jumped[..., None, None], with_left, others)
