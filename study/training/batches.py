"""From the stores to what a training step sees: crops, truth and teacher in one frame."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.codecs.crop_frame import CropFrame
from models.skeleton import Skeleton
from study.cache.crop_store import CropStore
from study.cache.teacher_store import TargetSource, TeacherStore, TeacherTargets
from study.config.schema import AugmentConfig
from study.data.augmentation import (
    Augmentation,
    add_flip_and_color,
    cut_crops,
    draw_augmentation,
    no_augmentation,
    paste_patches,
)
from study.data.crops import transform_points
from study.workers import Workers

BLOCK = 16
"""Global batches whose augmentation is drawn, and whose labels are carried through it, at once."""


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
    neighbor_crop: Tensor
    """Keypoints of the person that overlaps most, (B, K, 2)."""
    neighbor_visibility: Tensor
    """(B, K); 0 throughout where nobody overlaps."""
    teacher_modes: Tensor | None = None
    """The teacher's up to M modes a joint, (B, K, M, 4): x, y, height, width in sigmas."""
    teacher_mask: Tensor | None = None
    """(B, K), 1 for joints of which the teacher has something to say, else 0."""
    teacher_relation: Tensor | None = None
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
    teacher: TargetSource | None,
    skeleton: Skeleton,
    frame: CropFrame,
    augment: AugmentConfig,
    batches: list[Tensor],
    generator: torch.Generator,
    workers: Workers,
    starts: NDArray[np.float32] | None = None,
) -> Iterator[Batch]:
    """This worker's share of each global batch, augmented.

    The crops are drawn anew, or chosen among the views that the teacher was asked about.

    All draws are made for global batches, so that they are the same for any number of workers;
    and for BLOCK of them at once, since for one they cost more in calls than in numbers.

    Args:
        starts: other poses of all the store's people, (N, K, 3), as ``given_starts`` makes them.
    """
    stored = teacher if isinstance(teacher, TeacherStore) else None
    views = stored if stored and stored.has_views(augment, frame) else None
    for first in range(0, len(batches), BLOCK):
        block = batches[first : first + BLOCK]
        rows = torch.cat(block)
        if views is None:
            seen = rows
            keypoints = torch.from_numpy(store.keypoints_stored[rows.numpy()])
            visibility = torch.from_numpy(store.visibility[rows.numpy()])
            drawn = draw_augmentation(keypoints, visibility, skeleton, frame, augment, generator)
        else:
            seen, affine = views.choose(rows, generator)
            drawn = add_flip_and_color(affine, skeleton, frame, augment, generator)
        places = torch.arange(len(rows)).split([len(batch) for batch in block])
        shares = [shard(part, workers) for part in places]
        mine = torch.cat(shares)
        own = drawn.take(mine)
        labels = _labels(store, frame, rows[mine], own, starts)
        if stored is not None:
            labels |= _taught(stored.carried(seen[mine].numpy(), own))
        sizes = [len(share) for share in shares]
        parts = {name: all_of.split(sizes) for name, all_of in labels.items()}
        for number, share in enumerate(shares):
            crops = crops_of(store, rows, drawn, share, frame, workers.device)
            known = {name: part[number] for name, part in parts.items()}
            if teacher is not None and stored is None:
                said = teacher.answers(rows[share].numpy(), drawn.take(share), frame, crops)
                known |= _taught(said)
            yield Batch(crops=crops, **known).to(workers.device)


def crops_of(
    store: CropStore,
    rows: Tensor,
    drawn: Augmentation,
    places: Tensor,
    frame: CropFrame,
    device: torch.device,
) -> Tensor:
    """The crops of those of a drawn batch's people that stand at these places, (P, 3, h, w).

    Args:
        rows: of all the people drawn, (B,), of whom others may stand before those asked for.
    """

    def cut(people: Tensor) -> Tensor:
        own = drawn.take(people)
        return cut_crops(store.crops(rows[people].numpy()), own.affine, frame, device, own.colors)

    crops = cut(places)
    own = drawn.take(places)
    if own.patches is None or own.patch_people is None or own.patch_colors is None:
        return crops
    fillings = own.patch_colors[:, :, None, None].to(device)
    occluded = torch.nonzero(own.patch_people >= 0)[:, 0]
    paste_patches(crops, own.patches, fillings)
    if len(occluded):
        hidden = cut(own.patch_people[occluded])
        for place, filling in zip(occluded.tolist(), hidden, strict=True):
            paste_patches(crops[place : place + 1], own.patches[place : place + 1], filling[None])
    return crops


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
    drawn = no_augmentation(len(rows), skeleton, frame)
    crops = crops_of(store, rows, drawn, torch.arange(len(rows)), frame, device)
    return Batch(crops=crops, **_labels(store, frame, rows, drawn, starts)).to(device)


def _labels(
    store: CropStore,
    frame: CropFrame,
    rows: Tensor,
    drawn: Augmentation,
    starts: NDArray[np.float32] | None,
) -> dict[str, Tensor]:
    """What is known of these people without a teacher, by the names of a batch's fields."""
    index, affine = rows.numpy(), drawn.affine
    labels = {
        "keypoints_crop": transform_points(
            drawn.in_flip_order(store.keypoints_stored[index]), affine
        ),
        "visibility": drawn.in_flip_order(store.visibility[index]),
        "areas_crop": torch.from_numpy(store.areas[index])
        * torch.linalg.det(affine[..., :2]).abs(),
        "neighbor_crop": transform_points(
            drawn.in_flip_order(store.neighbor_keypoints(index)), affine
        ),
        "neighbor_visibility": drawn.in_flip_order(store.neighbor_visibility(index)),
    }
    if starts is not None:
        poses = drawn.in_flip_order(starts[index])
        start = torch.cat((transform_points(poses[..., :2], affine), poses[..., 2:]), dim=-1)
        labels["start_crop"] = start
    return labels


def _taught(said: TeacherTargets) -> dict[str, Tensor]:
    """What a teacher says, by the names of a batch's fields."""
    taught = {"teacher_modes": said.modes_crop, "teacher_mask": said.taught}
    return taught if said.relation is None else {**taught, "teacher_relation": said.relation}
