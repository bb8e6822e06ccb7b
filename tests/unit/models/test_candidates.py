"""Candidates and the chooser: untrained the identity, trained it finds those of one body."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.candidates import LOWEST_GIVEN, read_candidates
from models.codecs.codec import CODECS, Dark
from models.igp_gcn import IgpGcn
from models.pose_features import PoseFeatures, PoseNetwork
from models.skeleton import Skeleton
from study.config.schema import AugmentConfig, OptimizerConfig, RefineConfig
from study.training.batches import Batch
from study.training.refine import RefineTask

CROP = (128, 96)
CODEC = Dark(input_size=CROP, heatmap_size=(32, 24), sigma=1.5)
LIMBS = torch.tensor([[-14.0, 18.0], [14.0, 18.0], [-6.0, 30.0], [6.0, 30.0]])
"""From the first to the second joint of each of FIVE's edges, px, before each is turned."""
TURN = 0.6
"""Radians, the spread of a limb's turn."""
CHANNELS = (3, 3, 3)


def bodies(count: int, skeleton: Skeleton) -> Tensor:
    """Draw two bodies per person, (count, 2, K, 2), close together but with their joints apart."""
    found: list[Tensor] = []
    while sum(len(part) for part in found) < count:
        heads = torch.rand(4 * count, 2, 2) * torch.tensor([60.0, 40.0]) + torch.tensor([18.0, 12])
        joints = [heads]
        for (start, _), limb in zip(skeleton.edges, LIMBS, strict=True):
            angle = torch.randn(4 * count, 2) * TURN
            cos, sin = angle.cos(), angle.sin()
            turned = torch.stack(
                (cos * limb[0] - sin * limb[1], sin * limb[0] + cos * limb[1]), dim=-1
            )
            joints.append(joints[start] + turned)
        both = torch.stack(joints, dim=2)
        inside = ((both > 4) & (both < torch.tensor([92.0, 124.0]))).flatten(1).all(dim=1)
        apart = (both[:, 0] - both[:, 1]).norm(dim=-1).amin(dim=1) > 16
        found.append(both[inside & apart])
    return torch.cat(found)[:count]


class FixedStudent(PoseNetwork):
    """A student with a given output."""

    pyramid_channels = CHANNELS
    output: PoseFeatures

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, crops: Tensor) -> PoseFeatures:
        return self.output


def crowd(count: int, skeleton: Skeleton) -> tuple[PoseFeatures, Tensor]:
    """Draw two bodies in each crop; return features and the joints of the first, the right one.

    Either body may have the higher peak of a joint, at random. The features show only the right
    body's first joint, so that the peaks of any other joint are alike on their own.
    """
    both = bodies(count, skeleton)
    heights = torch.rand(count, 2, skeleton.num_joints, 1) * 0.5 + 0.5
    modes = torch.cat((both, heights, torch.ones_like(heights)), dim=-1).transpose(1, 2)
    marked = CODEC.render(torch.cat((both[:, 0, :1], torch.ones(count, 1, 2)), -1)[:, :, None])
    fine = marked.expand(-1, 3, -1, -1)
    pyramid = (nn.functional.avg_pool2d(fine, 4), nn.functional.avg_pool2d(fine, 2), fine)
    return PoseFeatures(CODEC.render(modes), pyramid), both[:, 0]


def batch_of(truth: Tensor) -> Batch:
    count, joints = truth.shape[:2]
    sure = torch.ones(count, joints, 1, 2)
    return Batch(
        crops=torch.zeros(count, 3, *CROP),
        keypoints_crop=truth,
        visibility=torch.full((count, joints), 2),
        areas_crop=torch.full((count,), 3000.0),
        neighbor_crop=truth,
        neighbor_visibility=torch.zeros(count, joints),
        teacher_modes=torch.cat((truth[:, :, None], sure), dim=-1),
        teacher_mask=torch.ones(count, joints),
        teacher_relation=None,
    )


def task_of(skeleton: Skeleton, **changes: Any) -> RefineTask:
    settings = RefineConfig(
        epochs=1,
        batch_size=64,
        optimizer=OptimizerConfig(3e-3, 1e-4, warmup_fraction=0.05, pretrained_factor=0.1),
        student="frozen",
        student_factor=0.1,
        start="student",
        jitter=0.1,
        candidates=2,
        levels=1,
        depth=1,
        width=32,
        dropout=0.0,
        gate=True,
        loss="oks",
        progressive="final",
        teacher_weight=1.0,
        truth_weight=1.0,
        perturb=False,
        augment=AugmentConfig(0, 0, 0, 0, 0, 0, 0),
    )
    settings = dataclasses.replace(settings, **changes)
    torch.manual_seed(0)
    refiner = IgpGcn(
        skeleton,
        CHANNELS,
        levels=settings.levels,
        depth=1,
        width=settings.width,
        candidates=settings.candidates,
    )
    return RefineTask(FixedStudent(), CODEC, refiner, skeleton, settings)


def share_right(task: RefineTask, skeleton: Skeleton) -> float:
    """Return the share of new people's joints within two cells of the right body's."""
    torch.manual_seed(99)
    task.student.output, truth = crowd(500, skeleton)  # type: ignore[assignment]
    with torch.no_grad():
        keypoints, _ = task.estimator().eval()(torch.zeros(500, 3, *CROP))
    return float(((keypoints - truth).norm(dim=-1) < 8).float().mean())


def train(task: RefineTask, skeleton: Skeleton, steps: int) -> None:
    optimizer = torch.optim.AdamW(task.refiner.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    task.train()
    for _ in range(steps):
        task.student.output, truth = crowd(64, skeleton)  # type: ignore[assignment]
        terms = task(batch_of(truth))
        loss = torch.stack([term.sum / term.count for term in terms.values()]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@pytest.mark.slow
def test_candidates_of_one_body_are_found_by_their_limbs(five: Skeleton) -> None:
    task, plain = task_of(five), task_of(five, candidates=1)
    before = share_right(task, five)
    assert before == share_right(plain, five) and 0.45 < before < 0.55
    train(task, five, 120)
    train(plain, five, 120)
    assert share_right(task, five) > 0.9
    assert share_right(plain, five) < 0.6


@pytest.mark.parametrize("name", sorted(CODECS))
@pytest.mark.parametrize("count", [1, 2, 3])
def test_first_candidate_is_the_decoded_keypoint(name: str, count: int) -> None:
    torch.manual_seed(0)
    codec = CODECS[name](CROP, (32, 24), 2.0)
    heatmaps = torch.rand(2, 5, 32, 24) - 0.2
    heatmaps[0, 0] = -1
    bins = (torch.randn(2, 5, 2 * CROP[1]), torch.randn(2, 5, 2 * CROP[0]))
    features = PoseFeatures(heatmaps, (), bins)
    candidates = read_candidates(codec, features, count)
    keypoints, scores = codec.decode_features(features)
    assert candidates.shape == (2, 5, count, 3)
    assert torch.equal(candidates[:, :, 0, :2], keypoints)
    assert torch.equal(candidates[:, :, 0, 2], scores)
    others = codec.decode_feature_modes(features, count)[:, :, 1:, :3]
    assert torch.equal(candidates[:, :, 1:], others)
    if name != "simcc":
        assert (candidates[0, 0, 1:] == 0).all()


@pytest.mark.parametrize("candidates", [0, 4])
def test_impossible_number_of_candidates_is_refused(candidates: int, five: Skeleton) -> None:
    with pytest.raises(ValueError, match=r"candidates must be 1 to 3.*refine\.candidates"):
        IgpGcn(five, CHANNELS, candidates=candidates)


def test_choice_has_a_loss_of_its_own(five: Skeleton) -> None:
    """By hand: equal probabilities for a perfect place and a useless one cost a half."""
    task = task_of(five)
    task.student.output, truth = crowd(32, five)  # type: ignore[assignment]
    batch = batch_of(truth)
    plain = task_of(five, candidates=1)
    plain.student.output = task.student.output
    added = {name: task(batch)[name].sum - plain(batch)[name].sum for name in ("teacher", "truth")}
    candidates = read_candidates(CODEC, task.student.output, 2)
    share = candidates[..., 2].clamp_max(candidates[..., :1, 2])
    probability = share / share.sum(dim=2, keepdim=True)
    squared = (candidates[..., :2] - truth[:, :, None]).square().sum(dim=-1)
    sigmas = torch.tensor(five.oks_sigmas)[:, None]
    oks = torch.exp(-squared / (8 * sigmas**2 * 3000.0))
    expected = (probability * (1 - oks)).sum()
    for term in added.values():
        torch.testing.assert_close(term, expected, atol=0, rtol=1e-4)


def features_of(people: Tensor, is_right: Tensor) -> PoseFeatures:
    """Build a student's output for people of two bodies, (B, 2, K, 2), the first the right one.

    Each joint has one peak: on the first body if ``is_right`` (B, K), otherwise on the second. The
    features show the first one's joints.
    """

    def render(joints: Tensor) -> Tensor:
        ones = torch.ones(*joints.shape[:2], 2)
        return CODEC.render(torch.cat((joints, ones), dim=-1)[:, :, None])

    peaks = torch.where(is_right[..., None], people[:, 0], people[:, 1])
    fine = render(people[:, 0]).amax(dim=1, keepdim=True).expand(-1, CHANNELS[-1], -1, -1)
    pyramid = (nn.functional.avg_pool2d(fine, 4), nn.functional.avg_pool2d(fine, 2), fine)
    return PoseFeatures(render(peaks), pyramid)


def test_given_joint_is_the_first_candidate_with_the_heatmaps_height(five: Skeleton) -> None:
    torch.manual_seed(0)
    people = bodies(4, five).div(4).round().mul(4)  # joints on cells
    features = features_of(people, torch.ones(4, 5, dtype=torch.bool))
    given = people[:, 0].clone()
    given[0, 1] = torch.tensor([0.0, 0.0])
    scores = torch.full((4, 5), 0.3)
    scores[2, 3] = 0
    own = read_candidates(CODEC, features, 3)
    found = read_candidates(CODEC, features, 3, (given, scores))
    is_given = scores > 0
    assert torch.equal(found[:, :, 0, :2][is_given], given[is_given])
    assert torch.equal(found[:, :, 1:][is_given], own[:, :, :-1][is_given])
    assert torch.equal(found[2, 3], own[2, 3])
    heights = found[..., 0, 2].clone()
    assert heights[0, 1] == LOWEST_GIVEN
    heights[0, 1] = 1
    torch.testing.assert_close(heights, torch.ones(4, 5), atol=1e-3, rtol=0)


def test_place_of_the_left_right_partner_is_a_candidate(five: Skeleton) -> None:
    torch.manual_seed(0)
    people = bodies(4, five).div(4).round().mul(4)  # joints on cells
    features = features_of(people, torch.ones(4, 5, dtype=torch.bool))
    order = list(five.flip_order)
    swapped, scores = people[:, 0][:, order], torch.ones(4, 5)
    scores[2, 3] = 0
    plain = read_candidates(CODEC, features, 3, (swapped, scores))
    found = read_candidates(CODEC, features, 3, (swapped, scores), order)
    assert torch.equal(found[:, :, :3], plain)
    is_paired = torch.tensor([place != own for own, place in enumerate(order)])
    there = is_paired & (scores > 0) & (scores[:, order] > 0)
    assert there.sum() == 4 * is_paired.sum() - 2
    assert torch.equal(found[..., 3, :2][there], people[:, 0][there])
    torch.testing.assert_close(found[..., 3, 2], there.float(), atol=1e-3, rtol=0)
    assert read_candidates(CODEC, features, 1, (swapped, scores), order).shape == (4, 5, 1, 3)


@pytest.mark.parametrize("candidates", [2, 3])
def test_untrained_refiner_returns_poses_where_the_heatmaps_are_empty(
    candidates: int, five: Skeleton
) -> None:
    torch.manual_seed(0)
    people = bodies(6, five)
    task = task_of(five, candidates=candidates)
    task.student.output = features_of(people, torch.ones(6, 5, dtype=torch.bool))  # type: ignore[assignment]
    start = (people[:, 1], torch.full((6, 5), 0.2))
    keypoints, scores = task.estimator().eval()(torch.zeros(6, 3, *CROP), start)
    assert torch.equal(keypoints, start[0]) and torch.equal(scores, start[1])


def trained_on_jitter(skeleton: Skeleton) -> RefineTask:
    task = task_of(skeleton, candidates=2, start="jitter", jitter=0.6)
    optimizer = torch.optim.AdamW(task.refiner.parameters(), lr=5e-3)
    task.train()
    for _ in range(60):
        people = bodies(32, skeleton)
        is_right = torch.rand(32, 5) < 0.5
        task.student.output = features_of(people, is_right)  # type: ignore[assignment]
        term = task(batch_of(people[:, 0]))["truth"]
        optimizer.zero_grad()
        (term.sum / term.count).backward()
        optimizer.step()
    return task


@pytest.fixture(scope="module")
def on_jitter(five: Skeleton) -> RefineTask:
    return trained_on_jitter(five)


@pytest.mark.slow
def test_training_on_jitter_corrects_wrong_joints_and_keeps_right_ones(
    five: Skeleton, on_jitter: RefineTask
) -> None:
    task = on_jitter
    torch.manual_seed(99)
    people = bodies(300, five)
    truth, other = people[:, 0], people[:, 1]
    is_off = torch.rand(300, 5) < 0.2  # given on the other body, where the student is right
    task.student.output = features_of(people, is_off)  # type: ignore[assignment]
    start = torch.where(is_off[..., None], other, truth)
    with torch.no_grad():
        estimator = task.estimator().eval()
        found, _ = estimator(torch.zeros(300, 3, *CROP), (start, torch.ones(300, 5)))
    is_close = (found - truth).norm(dim=-1) < 4
    assert is_close[is_off].float().mean() > 0.9
    assert is_close[~is_off].float().mean() > 0.95
