"""The teacher's targets for the people of a crop store: predicted once, read by all trials.

Targets are predicted for each person's plain crop and, with ``teacher.views``, for further crops
of that person. A teacher predicts slightly different poses for a plain and an augmented crop, and
a student learns more from a teacher that sees the same crop (Beyer et al., Knowledge distillation:
A good teacher is patient and consistent, CVPR 2022). With few people, all trials together can
afford this.

Places are stored in steps of 1/32767 of the stored crop's length, heights and widths in half
precision, the upper triangle of the relation in steps of 1/127: 561 bytes per person of 17 joints.
The file is memory-mapped, so that the trials of a node share one copy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.codecs.crop_frame import CropFrame
from study.cache.arrow_file import read_columns, write_columns
from study.config.schema import AugmentConfig
from study.data.augmentation import Augmentation
from study.data.crops import transform_modes
from study.workers import Workers

BATCH_SIZE = 64
KNOWN = "taught"
"""Column of ``TeacherStore.known``; stores on disk keep this name."""
_STEPS = 2**16 - 1
_ONE = 127
_LARGEST = float(np.finfo(np.float16).max)


class TeacherTargets(NamedTuple):
    """A teacher's targets for B crops."""

    modes_crop: Tensor
    """(B, K, M, 4): x, y in pixels of the crop, height, width in sigmas; the first is the pose."""
    known: Tensor
    """(B, K), 1 for joints with a target, even if it says that the joint is absent; 0 if the
    teacher does not predict the joint, or has no prediction of the person."""
    relation: Tensor | None
    """(B, K, K), cosines between the joints' descriptors; None without features."""

    def part(self, start: int, stop: int) -> TeacherTargets:
        """Return the targets of the rows from ``start`` up to ``stop``."""
        relation = None if self.relation is None else self.relation[start:stop]
        return TeacherTargets(self.modes_crop[start:stop], self.known[start:stop], relation)


class TargetSource(Protocol):
    """A source of targets for training batches: a store, or a teacher that runs at each step."""

    def targets(
        self, rows: NDArray[np.int64], drawn: Augmentation, frame: CropFrame, crops: Tensor
    ) -> TeacherTargets:
        """Return targets in the frame of the augmented crops.

        Args:
            rows: of the training store, (B,).
            drawn: the augmentation of these people.
            crops: the augmented crops, (B, 3, h, w) RGB in 0..255, which an online teacher reads.
        """


@dataclass(frozen=True)
class Views:
    """V crops of each of N people; the first is plain, and training chooses among all V.

    A view has a scale, an angle and perhaps half a body. Mirror, colors and patches are drawn at
    each training step: a teacher with a flip test predicts the mirrored pose of a mirrored view,
    and was itself trained to ignore colors.
    """

    affine: NDArray[np.float32]
    """From stored-crop pixels to pixels of the view, (V * N, 2, 3)."""
    frame: CropFrame
    """The frame of the views."""
    drawn_by: dict[str, float]
    """The settings that the views were drawn with, as ``view_settings`` returns them."""


def view_settings(augment: AugmentConfig) -> dict[str, float]:
    """Return the settings that decide a view: scale, rotation and half body."""
    return {
        "scale": augment.scale,
        "rotation": augment.rotation,
        "half_body": augment.half_body,
    }


@dataclass(frozen=True)
class TeacherStore:
    """The targets of the N people of one crop store, in stored-crop pixels.

    Row v * N + p is view v of person p; so the row of a plain crop is the person's own.
    """

    stored_size: tuple[int, int]
    """(height, width) of the stored crops."""
    places: NDArray[np.uint16]
    """(V * N, K, M, 2): x and y; the range is the stored crop, extended by half on every side."""
    peaks: NDArray[np.float16]
    """(V * N, K, M, 2): height, and width in sigmas."""
    known: NDArray[np.uint8]
    """(V * N, K): 1 for joints with a target, else 0."""
    relation: NDArray[np.int8] | None = None
    """(V * N, K (K - 1) / 2): the upper triangle of the cosines, times 127."""
    num_views: int = 1
    """V."""
    views: Views | None = None
    """None if all crops were plain."""

    def __len__(self) -> int:
        return len(self.places) // self.num_views

    def has_views(self, augment: AugmentConfig, frame: CropFrame) -> bool:
        """Return whether training with this augmentation and frame can use the stored views."""
        if self.views is None:
            return False
        return (self.views.frame, self.views.drawn_by) == (frame, view_settings(augment))

    def choose(self, people: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Choose a view of each of these people (B,) at random; return its row and affine."""
        assert self.views is not None
        number = torch.randint(self.num_views, people.shape, generator=generator)
        rows = number * len(self) + people
        return rows, torch.from_numpy(self.views.affine[rows.numpy()])

    @property
    def num_bytes(self) -> int:
        """Bytes of all targets."""
        parts = (self.places, self.peaks, self.known, self.relation)
        return sum(part.nbytes for part in parts if part is not None)

    def modes_stored(self, rows: NDArray[np.int64] | slice = slice(None)) -> NDArray[np.float32]:
        """Return modes (B, K, M, 4): x, y in stored-crop pixels, height, width in sigmas."""
        lengths = np.array(self.stored_size[::-1], np.float32)
        places = self.places[rows] * (2 * lengths / _STEPS) - lengths / 2
        return np.concatenate((places, self.peaks[rows]), axis=-1, dtype=np.float32)

    def relations(self, rows: NDArray[np.int64] | slice = slice(None)) -> NDArray[np.float32]:
        """Return relations (B, K, K); the teacher must have features."""
        assert self.relation is not None
        upper = self.relation[rows].astype(np.float32) / _ONE
        joints = self.known.shape[1]
        full = np.tile(np.eye(joints, dtype=np.float32), (len(upper), 1, 1))
        i, j = np.triu_indices(joints, 1)
        full[:, i, j] = full[:, j, i] = upper
        return full

    def targets(
        self, rows: NDArray[np.int64], drawn: Augmentation, frame: CropFrame, crops: Tensor
    ) -> TeacherTargets:
        """See ``TargetSource``."""
        return self.augmented(rows, drawn)

    def augmented(self, rows: NDArray[np.int64], drawn: Augmentation) -> TeacherTargets:
        """Return the stored targets of these rows, transformed as their crops are."""
        modes = transform_modes(drawn.in_flip_order(self.modes_stored(rows)), drawn.affine)
        known = drawn.in_flip_order(self.known[rows]).float()
        if self.relation is None:
            return TeacherTargets(modes, known, None)
        return TeacherTargets(modes, known, _relation_in_flip_order(self.relations(rows), drawn))


RowTargets = Callable[[int, int], TeacherTargets]
"""Predicts the targets of the people from one row up to another, in stored-crop pixels."""


def _relation_in_flip_order(relation: NDArray[np.float32], drawn: Augmentation) -> Tensor:
    """Relations (B, K, K) with both axes in flip order."""
    rows = drawn.in_flip_order(relation)
    return rows.gather(2, drawn.joints[:, None, :].expand_as(rows))


def write_teacher_store(
    path: Path,
    stored_size: tuple[int, int],
    count: int,
    *predict: RowTargets,
    views: Views | None = None,
    workers: Workers | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Predict the targets of ``count`` people, BATCH_SIZE at a time, and write them.

    Every worker predicts its share; the first one writes.

    Args:
        stored_size: (height, width) of the stored crops.
        predict: one function per view.
        views: the crops that targets are predicted for; None if all are plain.
        workers: None for a single worker.
        progress: called after each batch with the approximate number of crops done, and of all.
    """
    if count == 0:
        raise ValueError(f"a store needs at least one person, got none for {path}")
    rank, world = (workers.rank, workers.world) if workers else (0, 1)
    blocks = [(view, start) for view in predict for start in range(0, count, BATCH_SIZE)]
    total = len(predict) * count
    own: dict[int, dict[str, NDArray[np.generic]]] = {}
    for number in range(rank, len(blocks), world):
        view, start = blocks[number]
        own[number] = _packed(view(start, min(start + BATCH_SIZE, count)), stored_size)
        progress(min(len(own) * world * BATCH_SIZE, total), total)
    shares = workers.gather(own) if workers else [own]
    if rank:
        return
    parts = [shares[number % world][number] for number in range(len(blocks))]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    meta: dict[str, Any] = {"stored_size": stored_size, "num_views": len(predict)}
    if views is not None:
        columns["affine"] = views.affine
        meta |= {"frame": dataclasses.asdict(views.frame), "drawn_by": views.drawn_by}
    write_columns(path, columns, meta)


def open_teacher_store(path: Path) -> TeacherStore:
    """Open the store, memory-mapped."""
    columns, meta = read_columns(path)
    columns["known"] = columns.pop(KNOWN)
    height, width = meta["stored_size"]
    affine, views = columns.pop("affine", None), None
    if affine is not None:
        size, align_corners = meta["frame"]["size"], meta["frame"]["align_corners"]
        views = Views(affine, CropFrame(tuple(size), align_corners), meta["drawn_by"])
    return TeacherStore(
        stored_size=(height, width), num_views=meta["num_views"], views=views, **columns
    )


def _packed(
    targets: TeacherTargets, stored_size: tuple[int, int]
) -> dict[str, NDArray[np.generic]]:
    modes = targets.modes_crop.double().cpu().numpy()
    lengths = np.array(stored_size[::-1], float)
    steps = (modes[..., :2] + lengths / 2) * (_STEPS / (2 * lengths))
    columns: dict[str, NDArray[np.generic]] = {
        "places": np.nan_to_num(steps, posinf=_STEPS).round().clip(0, _STEPS).astype(np.uint16),
        "peaks": modes[..., 2:].clip(-_LARGEST, _LARGEST).astype(np.float16),
        KNOWN: targets.known.cpu().numpy().astype(np.uint8),
    }
    if targets.relation is not None:
        i, j = np.triu_indices(targets.known.shape[1], 1)
        upper = targets.relation[:, i, j].double().cpu().numpy()
        columns["relation"] = (upper * _ONE).round().clip(-_ONE, _ONE).astype(np.int8)
    return columns
