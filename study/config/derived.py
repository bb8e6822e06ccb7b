"""Values that follow from the settings: skeletons, sizes, paths, the launcher, seeds.

``resolve`` computes them once, in the driver. Below ``trial.py`` functions take these values and
single sections of the settings, never the whole ``StudyConfig``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from models.skeleton import SKELETONS, Skeleton
from study.config.schema import SHARED_FOLDER, STAGED, Kind, StudyConfig, TrialConfig


@dataclass(frozen=True)
class Resolved:
    """The values that follow from a study's settings; sent to every worker."""

    skeleton: Skeleton
    """Skeleton of the annotations."""
    input_size: tuple[int, int]
    """(height, width) of the crop that networks see."""
    teacher_skeleton: Skeleton
    """Skeleton that the teacher predicts."""
    teacher_input_size: tuple[int, int]
    """(height, width) of the crop that the teacher sees."""
    evaluation: Kind
    """Rules of AP: coco or crowdpose."""
    cache: Path
    """Folder that all studies under one ``storage`` share."""
    crops_url: str | None
    """Object store of the crops; None if they are kept in ``crops_folder`` alone."""
    crops_folder: Path
    """Folder from which crops are read."""
    is_staged: bool
    """Whether students are searched first, then refiners."""
    launcher: str
    """inline or train; see ``trial.launcher``."""


def resolve(config: StudyConfig, own: Mapping[str, Skeleton] | None = None) -> Resolved:
    """Compute the values that follow from these settings.

    Args:
        own: skeletons that are not built in, by setting: data.skeleton, teacher.skeleton.
    """
    data, teacher = config.data, config.teacher
    height, width = data.input_size
    teacher_height, teacher_width = teacher.input_size or data.input_size
    cache = Path(config.storage) / SHARED_FOLDER
    skeletons = own or {}
    skeleton = skeletons.get("data.skeleton") or SKELETONS[data.skeleton]
    teacher_skeleton = skeletons.get("teacher.skeleton")
    if teacher_skeleton is None:
        teacher_skeleton = SKELETONS[teacher.skeleton] if teacher.skeleton else skeleton
    is_url = data.store is not None and "://" in data.store
    return Resolved(
        skeleton=skeleton,
        input_size=(height, width),
        teacher_skeleton=teacher_skeleton,
        teacher_input_size=(teacher_height, teacher_width),
        evaluation="crowdpose" if data.kind == "crowdpose" else "coco",
        cache=cache,
        crops_url=data.store if is_url else None,
        crops_folder=Path(data.store) if data.store is not None and not is_url else cache,
        is_staged=config.plan.kind == STAGED,
        launcher=_launcher_of(config.trial),
    )


def _launcher_of(trial: TrialConfig) -> str:
    """Resolve ``trial.launcher``: auto runs one CPU worker inline, all else under Ray Train."""
    if trial.launcher != "auto":
        return trial.launcher
    is_small = trial.num_workers == 1 and not trial.gpus
    return "inline" if is_small else "train"


def seed_of(*parts: object) -> int:
    """Return a seed of 63 bits that depends only on these parts."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
