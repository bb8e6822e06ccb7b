"""What the teacher says of the people of a crop store: asked once, read by all trials.

Of each person it is asked about the plain crop, and perhaps about further views. For a teacher
does not say quite the same of a plain crop and of an augmented one, and a student learns more from
a teacher that sees what it sees (Beyer et al., Knowledge distillation: A good teacher is patient
and consistent, CVPR 2022). Where people are few, all trials can afford that together.

Places are kept in steps of 1/32767 of the stored crop's length, heights and widths in half
precision, the relation above its diagonal in steps of 1/127: 561 bytes a person of 17 joints. The
file is memory-mapped, so that the trials of a node share one copy.
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
_STEPS = 2**16 - 1
_ONE = 127
_LARGEST = float(np.finfo(np.float16).max)


class TeacherTargets(NamedTuple):
    """What a teacher says of B crops."""

    modes_crop: Tensor
    """(B, K, M, 4): x, y in pixels of the crop, height, width in sigmas; the first is the pose."""
    taught: Tensor
    """(B, K), 1 where the teacher has something to say of the joint, if only that it is nowhere;
    0 where it does not know the joint or the person."""
    relation: Tensor | None
    """(B, K, K), cosines between the joints' descriptors; None without features."""

    def part(self, start: int, stop: int) -> TeacherTargets:
        """For the people from a row up to another."""
        relation = None if self.relation is None else self.relation[start:stop]
        return TeacherTargets(self.modes_crop[start:stop], self.taught[start:stop], relation)


class TargetSource(Protocol):
    """What teaches a batch: answers that are stored, or a teacher that is asked at each step."""

    def answers(
        self, rows: NDArray[np.int64], drawn: Augmentation, frame: CropFrame, crops: Tensor
    ) -> TeacherTargets:
        """Of these rows of the training store, in the frame of their augmented crops.

        Args:
            crops: those crops, (B, 3, h, w) RGB in 0..255, for a teacher that sees the same.
        """


@dataclass(frozen=True)
class Views:
    """V crops of each of N people; the first is plain, training chooses among them all.

    Each is a place in the image: a scale, an angle, perhaps half a body. Mirror, colors and
    patches are drawn anew each time: a teacher with a flip test says of a mirror what it says of
    the view, and it was itself trained to look past colors.
    """

    affine: NDArray[np.float32]
    """From stored-crop pixels to the crop's, (V * N, 2, 3)."""
    frame: CropFrame
    """Of those crops."""
    drawn_by: dict[str, float]
    """The settings that ``place_of`` an augmentation gives."""


def place_of(augment: AugmentConfig) -> dict[str, float]:
    """What of an augmentation says where crops lie."""
    return {name: getattr(augment, name) for name in ("scale", "rotation", "half_body")}


@dataclass(frozen=True)
class TeacherStore:
    """The answers for the N people of one crop store, in its pixels.

    Row v * N + p is view v of person p: of plain crops, the person's own number.
    """

    stored_size: tuple[int, int]
    """(height, width) of the stored crops."""
    places: NDArray[np.uint16]
    """(V * N, K, M, 2): x and y, from half a crop before the stored crop to half a one beyond."""
    peaks: NDArray[np.float16]
    """(V * N, K, M, 2): height, and width in sigmas."""
    taught: NDArray[np.uint8]
    """(V * N, K): 1 for joints of which the teacher has something to say, else 0."""
    relation: NDArray[np.int8] | None = None
    """(V * N, K (K - 1) / 2): the upper triangle of the cosines, times 127."""
    num_views: int = 1
    """V."""
    views: Views | None = None
    """None where all crops were plain."""

    def __len__(self) -> int:
        return len(self.places) // self.num_views

    def has_views(self, augment: AugmentConfig, frame: CropFrame) -> bool:
        """Whether a training that is augmented so, in such crops, can choose among views."""
        if self.views is None:
            return False
        return (self.views.frame, self.views.drawn_by) == (frame, place_of(augment))

    def choose(self, people: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The row of one view of each of these people (B,), at random, and its affine."""
        assert self.views is not None
        number = torch.randint(self.num_views, people.shape, generator=generator)
        rows = number * len(self) + people
        return rows, torch.from_numpy(self.views.affine[rows.numpy()])

    @property
    def num_bytes(self) -> int:
        """Of all answers."""
        parts = (self.places, self.peaks, self.taught, self.relation)
        return sum(part.nbytes for part in parts if part is not None)

    def modes_stored(self, rows: NDArray[np.int64] | slice = slice(None)) -> NDArray[np.float32]:
        """Of these rows, (B, K, M, 4): x, y in stored-crop pixels, height, width in sigmas."""
        lengths = np.array(self.stored_size[::-1], np.float32)
        places = self.places[rows] * (2 * lengths / _STEPS) - lengths / 2
        return np.concatenate((places, self.peaks[rows]), axis=-1, dtype=np.float32)

    def relations(self, rows: NDArray[np.int64] | slice = slice(None)) -> NDArray[np.float32]:
        """Of these rows, (B, K, K); only where the teacher has features."""
        assert self.relation is not None
        upper = self.relation[rows].astype(np.float32) / _ONE
        joints = self.taught.shape[1]
        full = np.tile(np.eye(joints, dtype=np.float32), (len(upper), 1, 1))
        i, j = np.triu_indices(joints, 1)
        full[:, i, j] = full[:, j, i] = upper
        return full

    def answers(
        self, rows: NDArray[np.int64], drawn: Augmentation, frame: CropFrame, crops: Tensor
    ) -> TeacherTargets:
        return self.carried(rows, drawn)

    def carried(self, rows: NDArray[np.int64], drawn: Augmentation) -> TeacherTargets:
        """As ``answers``, for which it needs no crops."""
        modes = transform_modes(drawn.in_flip_order(self.modes_stored(rows)), drawn.affine)
        taught = drawn.in_flip_order(self.taught[rows]).float()
        if self.relation is None:
            return TeacherTargets(modes, taught, None)
        return TeacherTargets(modes, taught, _reordered(self.relations(rows), drawn))


RowTargets = Callable[[int, int], TeacherTargets]


def _reordered(relation: NDArray[np.float32], drawn: Augmentation) -> Tensor:
    """Values of every two joints, (B, K, K), in the drawn order of both."""
    rows = drawn.in_flip_order(relation)
    return rows.gather(2, drawn.joints[:, None, :].expand_as(rows))


def write_teacher_store(
    path: Path,
    stored_size: tuple[int, int],
    count: int,
    *asked: RowTargets,
    views: Views | None = None,
    workers: Workers | None = None,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes the answers for ``count`` people, asked about BATCH_SIZE at a time.

    Every worker asks about its share of them; the first one writes.

    Args:
        stored_size: (height, width) of the stored crops, of which the places are pixels.
        asked: of each view, gives the answer for the people from one up to another, in
            stored-crop pixels.
        views: where the crops lay that were asked about; None where all were plain.
        workers: None where there is no other.
        tell: called after each time with about how many crops of all were asked about.
    """
    if count == 0:
        raise ValueError(f"a store needs at least one person, got none for {path}")
    rank, world = (workers.rank, workers.world) if workers else (0, 1)
    blocks = [(view, start) for view in asked for start in range(0, count, BATCH_SIZE)]
    total = len(asked) * count
    own: dict[int, dict[str, NDArray[np.generic]]] = {}
    for number in range(rank, len(blocks), world):
        view, start = blocks[number]
        own[number] = _packed(view(start, min(start + BATCH_SIZE, count)), stored_size)
        tell(min(len(own) * world * BATCH_SIZE, total), total)
    shares = workers.gather(own) if workers else [own]
    if rank:
        return
    parts = [shares[number % world][number] for number in range(len(blocks))]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    meta: dict[str, Any] = {"stored_size": stored_size, "num_views": len(asked)}
    if views is not None:
        columns["affine"] = views.affine
        meta |= {"frame": dataclasses.asdict(views.frame), "drawn_by": views.drawn_by}
    write_columns(path, columns, meta)


def open_teacher_store(path: Path) -> TeacherStore:
    """The store, memory-mapped."""
    columns, meta = read_columns(path)
    height, width = meta["stored_size"]
    affine, views = columns.pop("affine", None), None
    if affine is not None:
        size, align_corners = meta["frame"]["size"], meta["frame"]["align_corners"]
        views = Views(affine, CropFrame(tuple(size), align_corners), meta["drawn_by"])
    return TeacherStore(
        stored_size=(height, width), num_views=meta["num_views"], views=views, **columns
    )


def _packed(
    answer: TeacherTargets, stored_size: tuple[int, int]
) -> dict[str, NDArray[np.generic]]:
    modes = answer.modes_crop.double().cpu().numpy()
    lengths = np.array(stored_size[::-1], float)
    steps = (modes[..., :2] + lengths / 2) * (_STEPS / (2 * lengths))
    columns: dict[str, NDArray[np.generic]] = {
        "places": np.nan_to_num(steps, posinf=_STEPS).round().clip(0, _STEPS).astype(np.uint16),
        "peaks": modes[..., 2:].clip(-_LARGEST, _LARGEST).astype(np.float16),
        "taught": answer.taught.cpu().numpy().astype(np.uint8),
    }
    if answer.relation is not None:
        i, j = np.triu_indices(answer.taught.shape[1], 1)
        upper = answer.relation[:, i, j].double().cpu().numpy()
        columns["relation"] = (upper * _ONE).round().clip(-_ONE, _ONE).astype(np.int8)
    return columns
