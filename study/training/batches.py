"""From the stores to the batches of a training step: crops, labels and targets in one frame."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

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
"""Global batches whose augmentation is drawn, and whose labels are transformed, at once."""


class Labels(NamedTuple):
    """Ground truth of B people and of their neighbors, in one frame."""

    keypoints: Tensor
    """(B, K, 2)."""
    visibility: Tensor
    """COCO visibility, (B, K)."""
    neighbor_keypoints: Tensor
    """Keypoints of the person that overlaps most, (B, K, 2)."""
    neighbor_visibility: Tensor
    """COCO visibility of that person, (B, K); all 0 if nobody overlaps."""
    areas: Tensor
    """(B,), squared pixels of the same frame."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """B people after augmentation, all in the frame of the crop that the network sees."""

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
    """COCO visibility of that person, (B, K); all 0 if nobody overlaps."""
    teacher_modes: Tensor | None = None
    """The teacher's up to M modes per joint, (B, K, M, 4): x, y, height, width in sigmas."""
    teacher_mask: Tensor | None = None
    """(B, K), 1 for joints with a target, else 0."""
    teacher_relation: Tensor | None = None
    """(B, K, K); None without a teacher, or if the teacher has no features."""
    start_crop: Tensor | None = None
    """x, y and score of another method's pose, (B, K, 3); score 0 for a joint that it lacks."""

    @property
    def labels(self) -> Labels:
        """Ground truth in crop pixels."""
        return Labels(
            keypoints=self.keypoints_crop,
            visibility=self.visibility,
            neighbor_keypoints=self.neighbor_crop,
            neighbor_visibility=self.neighbor_visibility,
            areas=self.areas_crop,
        )

    def to(self, device: torch.device) -> Batch:
        """Move the batch to the device."""
        moved = {
            field.name: value.to(device)
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) is not None
        }
        return dataclasses.replace(self, **moved)


class TrainingPeople(NamedTuple):
    """The people to train on, with their targets and, for stage 2, poses to start from."""

    store: CropStore
    skeleton: Skeleton
    targets: TargetSource | None
    """None trains on labels alone."""
    starts: NDArray[np.float32] | None = None
    """Another method's poses in stored-crop pixels: x, y and score, (N, K, 3)."""


def shard(rows: Tensor, workers: Workers) -> Tensor:
    """Return this worker's rows of a global batch; each row belongs to one worker."""
    return rows[workers.rank :: workers.world]


def epoch_rows(
    count: int, batch_size: int, world: int, generator: torch.Generator
) -> list[Tensor]:
    """Return the rows of each global batch of an epoch, in random order.

    Every worker gets a share of every batch. The last batch is cut to a multiple of the number of
    workers; so fewer people than workers are left out, different ones each epoch.
    """
    order = torch.randperm(count, generator=generator)
    batches = list(order.split(batch_size))
    last = batches[-1]
    batches[-1] = last[: len(last) - len(last) % world]
    return [rows for rows in batches if len(rows)]


def training_batches(
    people: TrainingPeople,
    frame: CropFrame,
    augment: AugmentConfig,
    batches: list[Tensor],
    generator: torch.Generator,
    workers: Workers,
) -> Iterator[Batch]:
    """Yield this worker's share of each global batch, augmented.

    Scale, rotation and half body are drawn for each person, or chosen from the views that the
    teacher's targets were stored for.

    Draws are made for global batches, so that they do not depend on the number of workers, and for
    BLOCK batches at once, which is faster than one call per batch.

    Args:
        frame: the frame of the augmented crops.
        batches: rows of the people in each global batch.
    """
    store, skeleton, targets, starts = people
    stored = targets if isinstance(targets, TeacherStore) else None
    views = stored if stored and stored.has_views(augment, frame) else None
    for first in range(0, len(batches), BLOCK):
        block = batches[first : first + BLOCK]
        rows = torch.cat(block)
        if views is None:
            target_rows = rows
            keypoints = torch.from_numpy(store.keypoints_stored[rows.numpy()])
            visibility = torch.from_numpy(store.visibility[rows.numpy()])
            drawn = draw_augmentation(keypoints, visibility, skeleton, frame, augment, generator)
        else:
            target_rows, affine = views.choose(rows, generator)
            drawn = add_flip_and_color(affine, skeleton, frame, augment, generator)
        places = torch.arange(len(rows)).split([len(batch) for batch in block])
        shares = [shard(part, workers) for part in places]
        mine = torch.cat(shares)
        own = drawn.take(mine)
        fields = _label_fields(store, rows[mine], own, starts)
        if stored is not None:
            fields |= _target_fields(stored.augmented(target_rows[mine].numpy(), own))
        sizes = [len(share) for share in shares]
        parts = {name: values.split(sizes) for name, values in fields.items()}
        for number, share in enumerate(shares):
            crops = crops_of(store, rows, drawn, share, frame, workers.device)
            known = {name: part[number] for name, part in parts.items()}
            if targets is not None and stored is None:
                online = targets.targets(rows[share].numpy(), drawn.take(share), frame, crops)
                known |= _target_fields(online)
            yield Batch(crops=crops, **known).to(workers.device)


def crops_of(
    store: CropStore,
    rows: Tensor,
    drawn: Augmentation,
    places: Tensor,
    frame: CropFrame,
    device: torch.device,
) -> Tensor:
    """Cut the augmented crops of some people of a drawn batch, (P, 3, h, w).

    Args:
        rows: of all people in the batch, (B,); patches may show people outside ``places``.
        places: positions in the batch of the people to cut, (P,).
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
    """Yield (rows, batch) of plain crops: this worker's share of the first ``count`` people."""
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
    """Return these people's batch without augmentation and without targets."""
    drawn = no_augmentation(len(rows), skeleton, frame)
    crops = crops_of(store, rows, drawn, torch.arange(len(rows)), frame, device)
    return Batch(crops=crops, **_label_fields(store, rows, drawn, starts)).to(device)


def _label_fields(
    store: CropStore,
    rows: Tensor,
    drawn: Augmentation,
    starts: NDArray[np.float32] | None,
) -> dict[str, Tensor]:
    """Labels and starting poses of these people, by the names of Batch's fields."""
    index, affine = rows.numpy(), drawn.affine
    fields = {
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
        fields["start_crop"] = start
    return fields


def _target_fields(targets: TeacherTargets) -> dict[str, Tensor]:
    """Targets by the names of Batch's fields."""
    fields = {"teacher_modes": targets.modes_crop, "teacher_mask": targets.known}
    if targets.relation is not None:
        fields["teacher_relation"] = targets.relation
    return fields
