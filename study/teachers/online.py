"""The teacher asked at every step about the very crops that the student sees.

This is the control of the stored targets (``teacher.mode=online``), and what their error is
measured against once they are made.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.codecs.crop_frame import CropFrame
from study.cache.crop_store import CropStore
from study.cache.teacher_store import TeacherTargets
from study.data.augmentation import Augmentation, cut_crops
from study.data.crops import (
    compose_affines,
    crop_to_image_affine,
    invert_affine,
    stored_to_crop_affine,
    transform_modes,
)
from study.teachers.adapters import Teacher


@dataclass(frozen=True)
class OnlineTeacher:
    """A teacher, and the people to train on in its own crops and in the student's."""

    teacher: Teacher
    own: CropStore
    student: CropStore

    def answers(
        self, rows: NDArray[np.int64], drawn: Augmentation, frame: CropFrame, crops: Tensor
    ) -> TeacherTargets:
        """As ``TargetSource``. A teacher of the same frame sees the student's crops themselves.

        Another one sees its own, augmented alike but for patches.
        """
        with torch.no_grad():
            if self.teacher.frame == frame and self.own.path == self.student.path:
                return self.teacher.ask(crops)
            to_own = self._between(rows, frame)
            affine = drawn.affine.double().numpy()
            stored_to_stored = compose_affines(
                invert_affine(self.own.image_to_stored[rows]), self.student.image_to_stored[rows]
            )
            augmented = compose_affines(compose_affines(stored_to_stored, affine), to_own)
            seen = cut_crops(
                self.own.crops(rows),
                torch.from_numpy(augmented).float(),
                self.teacher.frame,
                crops.device,
                drawn.colors,
            )
            answer = self.teacher.ask(seen)
            back = torch.from_numpy(invert_affine(to_own)).to(answer.modes_crop)
            return answer._replace(modes_crop=transform_modes(answer.modes_crop, back))

    def _between(self, rows: NDArray[np.int64], frame: CropFrame) -> NDArray[np.float64]:
        """From these people's plain crops in the student's frame to those in its own."""
        image_to_own = compose_affines(
            self.own.image_to_stored[rows], stored_to_crop_affine(self.teacher.frame)
        )
        crop_to_image = crop_to_image_affine(frame, self.student.image_to_stored[rows])
        return compose_affines(crop_to_image, image_to_own)
