"""The teacher, run at every training step on the crops that the student sees.

This is ``teacher.mode=online``, the control for stored targets. It also predicts the targets to be
stored, and the reference that their error is measured against.
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
    """A teacher, and the training people in its own crops and in the student's."""

    teacher: Teacher
    own: CropStore
    """Crops of the teacher's input size."""
    student: CropStore
    """Crops of the student's input size."""

    def targets(
        self, rows: NDArray[np.int64], drawn: Augmentation, frame: CropFrame, crops: Tensor
    ) -> TeacherTargets:
        """See ``TargetSource``.

        The teacher reads the student's crops if frame and store are its own. Otherwise its own
        crops are cut with the same augmentation, without patches.
        """
        with torch.no_grad():
            if self.teacher.frame == frame and self.own.path == self.student.path:
                return self.teacher.predict_targets(crops)
            student_to_own = self._student_to_own(rows, frame)
            affine = drawn.affine.double().numpy()
            own_to_student_stored = compose_affines(
                invert_affine(self.own.image_to_stored[rows]), self.student.image_to_stored[rows]
            )
            augmented = compose_affines(
                compose_affines(own_to_student_stored, affine), student_to_own
            )
            own_crops = cut_crops(
                self.own.crops(rows),
                torch.from_numpy(augmented).float(),
                self.teacher.frame,
                crops.device,
                drawn.colors,
            )
            targets = self.teacher.predict_targets(own_crops)
            own_to_student = torch.from_numpy(invert_affine(student_to_own))
            modes = transform_modes(targets.modes_crop, own_to_student.to(targets.modes_crop))
            return targets._replace(modes_crop=modes)

    def _student_to_own(self, rows: NDArray[np.int64], frame: CropFrame) -> NDArray[np.float64]:
        """Affines from the student's plain crops to the teacher's, (B, 2, 3)."""
        image_to_own = compose_affines(
            self.own.image_to_stored[rows], stored_to_crop_affine(self.teacher.frame)
        )
        crop_to_image = crop_to_image_affine(frame, self.student.image_to_stored[rows])
        return compose_affines(crop_to_image, image_to_own)
