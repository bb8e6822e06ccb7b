"""From the stores to what a training step sees: crops, truth and teacher in one frame."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.crop_frame import CropFrame
from models.skeleton import Skeleton
from study.crops import (
    carry,
    carry_modes,
    cut_crops,
    draw_affines,
    jitter_colour,
    plain_affines,
)
from study.schema import AugmentConfig
from study.store import CropStore, TeacherStore
from study.workers import Workers


@dataclasses.dataclass(frozen=True)
class Batch:
    """B people after augmentation; everything in the frame of the crop that the network sees."""

    crops: Tensor
    """(B, 3, h, w), RGB in 0..255."""
    keypoints_crop: Tensor
    """Ground truth, (B, K, 2)."""
    visibility: Tensor
    """COCO visibility, (B, K)."""
    areas_crop: Tensor
    """(B,), squared crop pixels."""
    neighbour_crop: Tensor
    """Keypoints of the person that overlaps most, (B, K, 2)."""
    neighbour_visibility: Tensor
    """(B, K); 0 throughout where nobody overlaps."""
    teacher_modes: Tensor | None
    """The teacher's up to M modes a joint, (B, K, M, 4): x, y, height, width in sigmas."""
    teacher_taught: Tensor | None
    """(B, K), 1 for joints of which the teacher has something to say, else 0."""
    teacher_relation: Tensor | None
    """(B, K, K); None also where the teacher has no features."""
    start_crop: Tensor | None = None
    """x, y and score of another method's pose, (B, K, 3); score 0 where it has no such joint."""

    def to(self, device: torch.device) -> Batch:
        """The batch on the device."""
        moved = {
            field.name: value.to(device)
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) is not None
        }
        return dataclasses.replace(self, **moved)


def shard(rows: Tensor, workers: Workers) -> Tensor:
    """The rows that are this worker's of a global batch; each row is one worker's alone."""
    return rows[workers.rank :: workers.world]


def epoch_rows(
    count: int, batch_size: int, world: int, generator: torch.Generator
) -> list[Tensor]:
    """The global batches of an epoch, in random order.

    Every worker gets a share of every batch: the last one is cut to a multiple of the workers,
    which leaves out fewer people than there are workers, other ones each epoch.
    """
    order = torch.randperm(count, generator=generator)
    batches = list(order.split(batch_size))
    last = batches[-1]
    batches[-1] = last[: len(last) - len(last) % world]
    return [rows for rows in batches if len(rows)]


def training_batches(
    store: CropStore,
    teacher: TeacherStore | None,
    skeleton: Skeleton,
    frame: CropFrame,
    augment: AugmentConfig,
    batches: list[Tensor],
    generator: torch.Generator,
    workers: Workers,
    starts: NDArray[np.float32] | None = None,
) -> Iterator[Batch]:
    """This worker's share of each global batch, augmented.

    All draws are made for the global batch, so that they are the same for any number of workers.

    Args:
        starts: other poses of all the store's people, (N, K, 3), as ``given_starts`` makes them.
    """
    for rows in batches:
        keypoints = torch.from_numpy(store.keypoints_stored[rows.numpy()])
        visibility = torch.from_numpy(store.visibility[rows.numpy()])
        affine, mirrored = draw_affines(keypoints, visibility, skeleton, frame, augment, generator)
        colours = torch.rand(2, len(rows), generator=generator)
        mine = shard(torch.arange(len(rows)), workers)
        batch = _assemble(
            store,
            teacher,
            skeleton,
            frame,
            rows[mine],
            affine[mine],
            mirrored[mine],
            workers.device,
            starts,
        )
        crops = jitter_colour(batch.crops, augment.colour, colours[:, mine])
        yield dataclasses.replace(batch, crops=crops)


def evaluation_batches(
    store: CropStore,
    skeleton: Skeleton,
    frame: CropFrame,
    count: int,
    batch_size: int,
    workers: Workers,
    starts: NDArray[np.float32] | None = None,
) -> Iterator[tuple[Tensor, Batch]]:
    """(rows, batch) of this worker's share of the first ``count`` people, plain crops."""
    mine = shard(torch.arange(count), workers)
    for rows in mine.split(batch_size) if len(mine) else ():
        yield rows, plain_batch(store, skeleton, frame, rows, workers.device, starts)


def plain_batch(
    store: CropStore,
    skeleton: Skeleton,
    frame: CropFrame,
    rows: Tensor,
    device: torch.device,
    starts: NDArray[np.float32] | None = None,
) -> Batch:
    """These people's crops without augmentation, and without the teacher."""
    affine = plain_affines(len(rows), frame)
    mirrored = torch.zeros(len(rows), dtype=torch.bool)
    return _assemble(store, None, skeleton, frame, rows, affine, mirrored, device, starts)


def _assemble(
    store: CropStore,
    teacher: TeacherStore | None,
    skeleton: Skeleton,
    frame: CropFrame,
    rows: Tensor,
    affine: Tensor,
    mirrored: Tensor,
    device: torch.device,
    starts: NDArray[np.float32] | None,
) -> Batch:
    index = rows.numpy()
    stored = torch.from_numpy(store.crops(index)).to(device)
    order = torch.tensor(skeleton.flip_order)
    joints = torch.where(mirrored[:, None], order, torch.arange(skeleton.num_joints))  # (B, K)

    def of_joints(values: np.ndarray) -> Tensor:
        """Per-joint values, put in the mirrored order where a person is mirrored."""
        tensor = torch.from_numpy(np.asarray(values))
        return tensor[torch.arange(len(rows))[:, None], joints]

    modes = taught = relation = None
    if teacher is not None:
        modes = carry_modes(of_joints(teacher.modes_stored[index]), affine)
        taught = of_joints(teacher.taught[index]).float()
    if teacher is not None and teacher.relation is not None:
        relation = torch.from_numpy(teacher.relation[index]).float()
        relation = relation.gather(1, joints[:, :, None].expand_as(relation))
        relation = relation.gather(2, joints[:, None, :].expand_as(relation))
    start = None
    if starts is not None:
        poses = of_joints(starts[index])
        start = torch.cat((carry(poses[..., :2], affine), poses[..., 2:]), dim=-1)
    return Batch(
        crops=cut_crops(stored, affine.to(device), frame),
        keypoints_crop=carry(of_joints(store.keypoints_stored[index]), affine),
        visibility=of_joints(store.visibility[index]),
        areas_crop=torch.from_numpy(store.areas[index]) * torch.linalg.det(affine[..., :2]).abs(),
        neighbour_crop=carry(of_joints(store.neighbour_keypoints(index)), affine),
        neighbour_visibility=of_joints(store.neighbour_visibility(index)),
        teacher_modes=modes,
        teacher_taught=taught,
        teacher_relation=relation,
        start_crop=start,
    ).to(device)
