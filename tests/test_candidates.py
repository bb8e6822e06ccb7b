"""The chooser: it starts as the identity, and learns which peaks belong to one body."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.codec import Dark
from models.igp_gcn import IgpGcn
from models.pose_features import PoseFeatures, PoseNetwork
from models.skeleton import Skeleton
from study.batches import Batch
from study.config import AugmentConfig, OptimizerConfig, RefineConfig
from study.refine import RefineTask

CROP = (128, 96)
CODEC = Dark(input_size=CROP, heatmap_size=(32, 24), sigma=1.5)
LIMBS = torch.tensor([[-14.0, 18.0], [14.0, 18.0], [-6.0, 30.0], [6.0, 30.0]])
"""From the first to the second joint of each of FIVE's edges, px, before each is turned."""
TURN = 0.6
"""Radians, the spread of a limb's turn."""
CHANNELS = (3, 3, 3)


def bodies(count: int, skeleton: Skeleton) -> Tensor:
    """Two bodies a person, (count, 2, K, 2), in one place alike, whose joints lie well apart."""
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


class Told(PoseNetwork):
    """A student that answers what it was told."""

    pyramid_channels = CHANNELS
    answer: PoseFeatures

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, crops: Tensor) -> PoseFeatures:
        return self.answer


def crowd(count: int, skeleton: Skeleton) -> tuple[PoseFeatures, Tensor]:
    """Two bodies in each crop, and where the joints of the first, the right one, are.

    The higher peak of each joint is either body's, by a coin. The features show the right body's
    first joint, and nothing else: to a joint by itself both of its peaks look the same.
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
        neighbour_crop=truth,
        neighbour_visibility=torch.zeros(count, joints),
        teacher_modes=torch.cat((truth[:, :, None], sure), dim=-1),
        teacher_relation=None,
    )


def task_of(skeleton: Skeleton, **changes: Any) -> RefineTask:
    settings = RefineConfig(
        epochs=1,
        batch_size=64,
        optimizer=OptimizerConfig(3e-3, 1e-4, warmup_fraction=0.05, pretrained_factor=0.1),
        student="frozen",
        student_factor=0.1,
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
        augment=AugmentConfig(0, 0, 0, 0, 0),
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
    return RefineTask(Told(), CODEC, refiner, skeleton, settings)


def share_right(task: RefineTask, skeleton: Skeleton) -> float:
    """Of the joints of fresh people that lie within two cells of the right body's."""
    torch.manual_seed(99)
    task.student.answer, truth = crowd(500, skeleton)  # type: ignore[assignment]
    with torch.no_grad():
        keypoints, _ = task.estimator().eval()(torch.zeros(500, 3, *CROP))
    return float(((keypoints - truth).norm(dim=-1) < 8).float().mean())


def train(task: RefineTask, skeleton: Skeleton, steps: int) -> None:
    optimizer = torch.optim.AdamW(task.refiner.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    task.train()
    for _ in range(steps):
        task.student.answer, truth = crowd(64, skeleton)  # type: ignore[assignment]
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
    train(task, five, 200)
    train(plain, five, 200)
    assert share_right(task, five) > 0.9
    assert share_right(plain, five) < 0.6
