"""The two control trials, and the settings of any trial by its row in ``trials``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from study.config.compose import with_values
from study.config.schema import STAGED, StudyConfig
from study.search.staged import PARENT
from study.storage.tables import PARAMS

BASELINE, DEFAULTS = "baseline", "defaults"
CONTROLS = (BASELINE, DEFAULTS)
"""Which every study contains and which are never pruned."""


def baseline_values(epochs: int) -> dict[str, Any]:
    """The student alone: no teacher, no stage 2.

    Args:
        epochs: as many as both stages have together.
    """
    return {
        "distill.heatmap.kind": "none",
        "distill.structure.kind": "none",
        "distill.weights": "fixed",
        "distill.epochs": epochs,
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
        values |= baseline_values(config.distill.epochs + config.refine.epochs)
    elif config.plan.kind == STAGED and row["parent_trial"] is None:
        values["refine.epochs"] = 0
    return values


def trial_config(config: StudyConfig, row: Mapping[str, Any]) -> StudyConfig:
    """The settings that the trial of a ``trials`` row was run with."""
    return with_values(config, trial_values(config, row))
