"""The two control trials, and any trial's settings from its row in the table ``trials``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from study.config.compose import with_values
from study.config.schema import STAGED, StudyConfig
from study.search.staged import PARENT
from study.storage.tables import PARAMS

BASELINE = "baseline"
"""The student alone, without a teacher; also its role among the finalists."""
DEFAULTS = "defaults"
"""The settings that the search starts from."""
CONTROLS = (BASELINE, DEFAULTS)
"""Trials that every study runs and never prunes."""


def baseline_values(epochs: int) -> dict[str, Any]:
    """Return the baseline's values: no teacher and no stage 2.

    Args:
        epochs: epochs of both stages together.
    """
    return {
        "distill.heatmap.kind": "none",
        "distill.structure.kind": "none",
        "distill.weights": "fixed",
        "distill.epochs": epochs,
        "refine.epochs": 0,
    }


def trial_values(config: StudyConfig, row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a trial by config path, from its row in ``trials``."""
    values = {
        key.removeprefix(PARAMS): value
        for key, value in row.items()
        if key.startswith(PARAMS) and value is not None
    }
    values.pop(PARENT, None)
    if row["control"] == BASELINE:
        values |= baseline_values(config.distill.epochs + config.refine.epochs)
    elif config.plan.kind == STAGED and row["parent_trial"] is None:
        values["refine.epochs"] = 0
    return values


def trial_config(config: StudyConfig, row: Mapping[str, Any]) -> StudyConfig:
    """Return the settings of a trial, from its row in ``trials``."""
    return with_values(config, trial_values(config, row))
