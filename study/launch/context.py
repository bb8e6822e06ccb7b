"""Values that all jobs of a study share."""

from __future__ import annotations

from dataclasses import dataclass

from study.cache.prepare import PreparedData
from study.config.derived import Resolved
from study.config.schema import StudyConfig


@dataclass(frozen=True)
class StudyContext:
    """Values that all jobs of a study share; travels to every worker."""

    config: StudyConfig
    resolved: Resolved
    prepared: PreparedData
    folder: str
    """Folder of the study."""
    targets: str
    """Teacher store."""
    owner: str
    """Name of the actor that owns the Optuna study."""
