"""How a student errs on people it has not seen, and poses that err like that.

On the people that a student was trained on its pose is nearly right, and a refiner trained on such
poses learns to do nothing. So the errors are measured on held-out people, and in training the pose
is disturbed by what the student makes more of there than on its training people. The kinds are
those of Ronchi and Perona, Benchmarking and Error Diagnosis, ICCV 2017.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.skeleton import Skeleton

NEAR = 0.5
"""Part of the OKS from which a joint counts as found."""
INVERSION, NEIGHBOR, MISS = range(3)
NUM_KINDS = 3
POWERS = (2.0, 12.0)
"""Of jitter: at the higher one 78 of 100 joints have less than a twentieth of the spread, at the
lower one 22."""


def jittered(
    truth: Tensor, visibility: Tensor, areas: Tensor, spread: float
) -> tuple[Tensor, Tensor]:
    """Poses (B, K, 2) that another method might have found, and their scores (B, K).

    One kind of error: Gaussian noise about the truth, drawn from torch's global generator. Its
    spread is drawn for each joint, small ones more often, and in some people much more often: a
    refiner that never saw a joint in its place would learn to move them all, and one that saw
    them as often in all people would not learn to tell a good pose from a bad one. Scores are 1,
    and 0 where there is no label to start from.

    Args:
        truth: (B, K, 2), with COCO ``visibility`` (B, K).
        areas: (B,), in the same pixels squared.
        spread: the largest of the noise along each axis, over the root of the area; a joint has
            a power of a uniform share of it, and each person a power in ``POWERS``.
    """
    size = areas.sqrt()[:, None, None]
    powers = torch.empty(len(truth), 1).uniform_(*POWERS)
    shares = torch.rand(truth.shape[:2]).pow(powers)[..., None]
    noise = (torch.randn(truth.shape) * shares).to(truth) * spread * size
    return truth + noise, (visibility > 0).to(truth)


@dataclass(frozen=True)
class PoseErrors:
    """How often and how far the joints of a skeleton are off."""

    rates: Tensor
    """(NUM_KINDS, K): share of labeled joints that lie on the person's other side, on another
    person, or nowhere; of those joints alone whose other side, or other person, is labeled."""
    jitter: Tensor
    """(K,): root mean square of found joints' distances per axis, over the root of the area."""
    miss: Tensor
    """(K,): the same of missed joints."""


def measure_errors(
    keypoints: Tensor,
    truth: Tensor,
    visibility: Tensor,
    neighbor: Tensor,
    neighbor_visibility: Tensor,
    areas: Tensor,
    skeleton: Skeleton,
) -> PoseErrors:
    """The errors of these N poses; a joint that nobody labeled has none.

    Args:
        keypoints: the student's, (N, K, 2); all in one frame.
        truth: (N, K, 2), with COCO ``visibility`` (N, K).
        neighbor: the person that overlaps most, likewise.
        areas: (N,).
    """
    labeled = visibility > 0
    sigmas = torch.tensor(skeleton.oks_sigmas)
    order = list(skeleton.flip_order)
    is_paired = torch.tensor(order) != torch.arange(skeleton.num_joints)

    def is_near(target: Tensor, counts: Tensor) -> Tensor:
        squared = (keypoints - target).square().sum(-1)
        return (torch.exp(-squared / (8 * sigmas**2 * areas[:, None])) >= NEAR) & counts

    found = is_near(truth, labeled)
    can_invert = labeled & labeled[:, order] & is_paired
    inverted = is_near(truth[:, order], can_invert) & ~found
    there = neighbor_visibility > 0
    can_jump = labeled & (there | there[:, order])
    jumped = is_near(neighbor, there) | is_near(neighbor[:, order], there[:, order])
    jumped &= labeled & ~found & ~inverted
    missed = labeled & ~found & ~inverted & ~jumped
    relative = (keypoints - truth).square().sum(-1) / 2 / areas[:, None]

    def spread(which: Tensor) -> Tensor:
        return (torch.where(which, relative, 0.0).sum(0) / which.sum(0).clamp(min=1)).sqrt()

    kinds = ((inverted, can_invert), (jumped, can_jump), (missed, labeled))
    rates = torch.stack([kind.sum(0) / possible.sum(0).clamp(min=1) for kind, possible in kinds])
    return PoseErrors(rates=rates, jitter=spread(found), miss=spread(missed))


def excess(held_out: PoseErrors, seen: PoseErrors) -> PoseErrors:
    """What turns poses that err like ``seen`` into poses that err like ``held_out``."""
    right = (1 - seen.rates.sum(0)).clamp(min=0.01)
    return PoseErrors(
        rates=((held_out.rates - seen.rates) / right).clamp(0, 1),
        jitter=(held_out.jitter**2 - seen.jitter**2).clamp(min=0).sqrt(),
        miss=held_out.miss,
    )


def disturb(
    keypoints: Tensor,
    truth: Tensor,
    visibility: Tensor,
    neighbor: Tensor,
    neighbor_visibility: Tensor,
    areas: Tensor,
    errors: PoseErrors,
    skeleton: Skeleton,
) -> tuple[Tensor, Tensor]:
    """The poses (B, K, 2) with these errors added, drawn from torch's global generator.

    An inversion needs the joint of the other side labeled, a jump the neighbor's.

    Returns:
        The disturbed poses, and which joints (B, K) were put on another joint or person.
    """
    device = keypoints.device
    size = areas.sqrt()[:, None, None]
    order = list(skeleton.flip_order)

    def noise(spread: Tensor) -> Tensor:
        return torch.randn(keypoints.shape).to(device) * spread.to(device)[:, None] * size

    jitter = noise(errors.jitter)
    draw = torch.rand(keypoints.shape[:2]).to(device)
    bounds = errors.rates.to(device).cumsum(0)
    inverts = (draw < bounds[INVERSION]) & (visibility[:, order] > 0)
    jumps = (draw >= bounds[INVERSION]) & (draw < bounds[NEIGHBOR]) & (neighbor_visibility > 0)
    misses = (draw >= bounds[NEIGHBOR]) & (draw < bounds[MISS]) & (visibility > 0)
    moved = keypoints + jitter
    moved = torch.where(inverts[..., None], truth[:, order] + jitter, moved)
    moved = torch.where(jumps[..., None], neighbor + jitter, moved)
    moved = torch.where(misses[..., None], truth + noise(errors.miss), moved)
    return moved, inverts | jumps


def disturb_candidates(
    candidates: Tensor,
    truth: Tensor,
    visibility: Tensor,
    neighbor: Tensor,
    neighbor_visibility: Tensor,
    areas: Tensor,
    errors: PoseErrors,
    skeleton: Skeleton,
) -> Tensor:
    """The candidates (B, K, M, 3) of each joint with these errors added to the first one's place.

    The first is moved as ``disturb`` moves a pose; heights stay with their rank. Where it is put
    on another joint or person, the place that it left becomes the second candidate, at a share of
    its height drawn from 0 to 1, and the last one drops out: on people that a student has not
    seen, its right peak is often there, and lower than the wrong one. Without that nothing would
    ever be won by another candidate than the first.
    """
    places, heights = candidates[..., :2], candidates[..., 2]
    moved, is_carried_off = disturb(
        *(places[:, :, 0], truth, visibility, neighbor, neighbor_visibility),
        *(areas, errors, skeleton),
    )
    first = torch.cat((moved, heights[:, :, 0, None]), dim=-1)[:, :, None]
    if candidates.shape[2] == 1:
        return first
    share = torch.rand(heights.shape[:2]).to(heights.device)
    left = torch.cat((places[:, :, 0], (share * heights[:, :, 0])[..., None]), dim=-1)[:, :, None]
    with_left = torch.cat((first, left, candidates[:, :, 1:-1]), dim=2)
    others = torch.cat((first, candidates[:, :, 1:]), dim=2)
    return torch.where(is_carried_off[..., None, None], with_left, others)
