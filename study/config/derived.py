"""Values that follow from the settings: skeletons, sizes, seeds, the launcher."""

from __future__ import annotations

import hashlib

from models.skeleton import SKELETONS, Skeleton
from study.config.schema import STAGED, Kind, StudyConfig


def seed_of(*parts: object) -> int:
    """A seed of 63 bits that these parts, and nothing else, determine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def skeleton_of(config: StudyConfig) -> Skeleton:
    """Whose joints the data are annotated with."""
    return SKELETONS[config.data.skeleton]


def input_size_of(config: StudyConfig) -> tuple[int, int]:
    """(height, width) of the crop that networks see."""
    height, width = config.data.input_size
    return height, width


def teacher_skeleton_of(config: StudyConfig) -> Skeleton:
    """Whose joints the teacher knows."""
    return SKELETONS[config.teacher.skeleton or config.data.skeleton]


def teacher_input_size_of(config: StudyConfig) -> tuple[int, int]:
    """(height, width) of the crop that the teacher sees."""
    height, width = config.teacher.input_size or config.data.input_size
    return height, width


def evaluation_of(config: StudyConfig) -> Kind:
    """Whose rules AP follows: coco or crowdpose."""
    return "crowdpose" if config.data.kind == "crowdpose" else "coco"


def is_staged(config: StudyConfig) -> bool:
    """Whether students are searched first, refiners second."""
    return config.plan.kind == STAGED


def launcher_of(config: StudyConfig) -> str:
    """inline or train: what ``auto`` comes to."""
    if config.trial.launcher != "auto":
        return config.trial.launcher
    is_small = config.trial.num_workers == 1 and not config.trial.gpus
    return "inline" if is_small else "train"
