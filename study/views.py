"""Views: augmentations of each person that were drawn once, and what the teacher says of each.

A teacher does not say quite the same of a plain crop and of an augmented one, and a student learns
more from a teacher that sees what it sees (Beyer et al., Knowledge distillation: A good teacher is
patient and consistent, CVPR 2022). Where people are few, all trials can afford that together: each
person is stored in several views, among which training chooses instead of drawing new ones.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.skeleton import Skeleton
from study.augmentation import Augmentation, joints_of
from study.columns import read_columns
from study.schema import AugmentConfig
from study.teacher_store import TeacherStore

VIEWS = "views.arrow"


@dataclasses.dataclass(frozen=True)
class Views:
    """V views of each of N people; row v * N + p is the view v of person p."""

    said: TeacherStore
    """Of all rows."""
    augment: AugmentConfig
    """What they were drawn by."""
    affine: NDArray[np.float32]
    """From stored-crop pixels to those of the view, (V * N, 2, 3)."""
    mirrored: NDArray[np.uint8]
    """(V * N,)."""
    colours: NDArray[np.float32]
    """Factors of contrast and brightness, (V * N, 2)."""

    @property
    def num_bytes(self) -> int:
        """Of all its arrays."""
        drawn = (self.affine, self.mirrored, self.colours)
        return self.said.num_bytes + sum(part.nbytes for part in drawn)

    def choose(self, people: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """The row of one view of each of these people (B,) of ``count``, at random."""
        views = len(self.said) // count
        return torch.randint(views, people.shape, generator=generator) * count + people

    def drawn(self, rows: Tensor, skeleton: Skeleton) -> Augmentation:
        """How these rows' views are cut."""
        index = rows.numpy()
        mirrored = torch.from_numpy(self.mirrored[index].astype(bool))
        colours = torch.from_numpy(self.colours[index]) if self.augment.colour else None
        affine = torch.from_numpy(self.affine[index])
        return Augmentation(affine, joints_of(mirrored, skeleton), colours)


def without_patches(augment: AugmentConfig) -> AugmentConfig:
    """Of an augmentation what views have: patches are drawn anew each time, for students alone."""
    return dataclasses.replace(augment, erase=0.0, occlude=0.0)


def told_of_views(
    drawn: Augmentation, augment: AugmentConfig
) -> tuple[dict[str, NDArray[np.generic]], dict[str, Any]]:
    """The columns and the note from which ``open_views`` knows how views were drawn."""
    unchanged = torch.arange(drawn.joints.shape[1])
    colours = torch.ones(len(drawn.affine), 2) if drawn.colours is None else drawn.colours
    columns: dict[str, NDArray[np.generic]] = {
        "affine": drawn.affine.numpy(),
        "mirrored": (drawn.joints != unchanged).any(dim=1).numpy().astype(np.uint8),
        "colours": colours.numpy(),
    }
    return columns, {"augment": dataclasses.asdict(augment)}


def open_views(path: Path) -> Views:
    """The views, memory-mapped."""
    columns, meta = read_columns(path)
    affine, mirrored, colours = (columns.pop(name) for name in ("affine", "mirrored", "colours"))
    height, width = meta["stored_size"]
    said = TeacherStore(stored_size=(height, width), **columns)
    return Views(said, AugmentConfig(**meta["augment"]), affine, mirrored, colours)
