"""What a study, and each of its trials, was run with: read back from the study's folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from study.config import InputError, with_values
from study.results import PARAMS
from study.schema import StudyConfig
from study.staged import PARENT, is_staged

SETTINGS = "study.yaml"
BASELINE, DEFAULTS = "baseline", "defaults"
CONTROLS = (BASELINE, DEFAULTS)
"""Which every study contains and which are never pruned."""


def read_settings(folder: Path) -> dict[str, Any]:
    """What ``study.yaml`` says.

    Raises:
        InputError: the folder is no study, or the file is not as a study wrote it.
    """
    try:
        content = OmegaConf.to_container(OmegaConf.load(folder / SETTINGS))
    except OSError:
        raise InputError(
            f"{folder} must be a study's folder, <storage>/<name>, with {SETTINGS} in it"
        ) from None
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError):
        content = None
    if not isinstance(content, dict) or not isinstance(content.get("config"), dict):
        raise InputError(
            f"{folder / SETTINGS} must hold the settings that a study wrote there, got something "
            "else; put the file back as it was, or name another folder"
        )
    return {str(key): value for key, value in content.items()}


def baseline_values(config: StudyConfig) -> dict[str, Any]:
    """The student alone: no teacher, no stage 2, and as many epochs as both stages together."""
    return {
        "distill.heatmap.kind": "none",
        "distill.structure.kind": "none",
        "distill.weights": "fixed",
        "distill.epochs": config.distill.epochs + config.refine.epochs,
        "refine.epochs": 0,
    }


def trial_values(config: StudyConfig, row: Mapping[str, Any]) -> dict[str, Any]:
    """By config path, what the trial of a ``trials`` row had of its own."""
    values = {
        key.removeprefix(PARAMS): value
        for key, value in row.items()
        if key.startswith(PARAMS) and value is not None
    }
    values.pop(PARENT, None)
    if row["control"] == BASELINE:
        values |= baseline_values(config)
    elif is_staged(config) and row["parent_trial"] is None:
        values["refine.epochs"] = 0
    return values


def trial_config(config: StudyConfig, row: Mapping[str, Any]) -> StudyConfig:
    """The settings that the trial of a ``trials`` row was run with."""
    return with_values(config, trial_values(config, row))
