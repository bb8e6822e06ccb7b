"""What values the settings may have, each alone and together.

All is given by config path (``distill.optimizer.lr``); ``config.py`` checks every study's settings
with it, and every value that a search space may give one of them.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

SHARED_FOLDER = "cache"
"""Folder under ``storage`` that no study may have for its own."""

MOVENET = "movenet"
MOVENET_SIZES = ("lightning", "thunder")

CHOICES: dict[str, tuple[str, ...]] = {
    "plan": ("joint",),
    "display": ("auto", "live", "plain", "none"),
    "data.kind": ("drawn", "coco", "crowdpose"),
    "data.skeleton": ("coco", "crowdpose"),
    "teacher.name": ("mobile_net",),
    "student.name": ("mobile_net",),
    "teacher.size": ("tiny", "small", "medium", "large", "teacher", *MOVENET_SIZES),
    "student.size": ("tiny", "small", "medium", "large", "teacher", *MOVENET_SIZES),
    "teacher.codec": ("msra", "dark", MOVENET),
    "student.codec": ("msra", "dark"),
    "distill.heatmap.kind": ("none", "mse", "kl"),
    "distill.structure.kind": ("none", "pairwise", "bone", "relation"),
    "distill.schedule": ("constant", "linear", "ramp"),
    "distill.normalize": ("initial", "none"),
    "refine.loss": ("oks", "smooth_l1"),
    "refine.progressive": ("final", "interpolated"),
    "search.pruner": ("successive_halving", "none"),
    "trial.launcher": ("auto", "inline", "train"),
}

AT_LEAST: dict[str, float] = {
    "data.max_people": 0,
    "data.train_pictures": 2,
    "data.val_pictures": 1,
    "teacher.epochs": 0,
    "distill.epochs": 1,
    "refine.epochs": 0,
    "refine.teacher_weight": 0,
    "refine.truth_weight": 0,
    "refine.width": 4,
    "search.trials": 1,
    "search.concurrent": 0,
    "search.startup_trials": 1,
    "search.min_epochs": 1,
    "search.reduction_factor": 2,
    "trial.num_workers": 1,
    "trial.gpus": 0,
    "trial.max_failures": 0,
    **{f"{stage}.batch_size": 1 for stage in ("teacher", "distill", "refine")},
    **{f"{stage}.optimizer.weight_decay": 0 for stage in ("teacher", "distill", "refine")},
    **{
        f"{stage}.augment.{name}": 0
        for stage in ("distill", "refine")
        for name in ("scale", "rotation", "colour")
    },
}

POSITIVE = (
    *(f"{stage}.optimizer.lr" for stage in ("teacher", "distill", "refine")),
    *("student.sigma", "teacher.sigma", "trial.cpus"),
    *("distill.heatmap.weight", "distill.heatmap.tau", "distill.structure.weight"),
)

WITHIN: dict[str, tuple[float, float]] = {
    "data.seed": (0, 2**32 - 1),
    "data.max_bad_fraction": (0, 1),
    "refine.levels": (1, 3),
    "refine.depth": (1, 6),
    "refine.dropout": (0, 0.9),
    **{
        f"{stage}.optimizer.warmup_fraction": (0, 0.9)
        for stage in ("teacher", "distill", "refine")
    },
    **{
        f"{stage}.optimizer.pretrained_factor": (0, 1)
        for stage in ("teacher", "distill", "refine")
    },
    **{
        f"{stage}.augment.{name}": (0, 1)
        for stage in ("distill", "refine")
        for name in ("flip", "half_body")
    },
}


def faults(values: Mapping[str, Any]) -> list[str]:
    """All that is impossible in these settings: what must hold, what came, what to change."""
    return [
        *_out_of_choice(values),
        *_out_of_bounds(values),
        *_impossible_data(values),
        *_impossible_training(values),
        *_impossible_movenet(values),
        *_impossible_place(values),
    ]


def _out_of_choice(values: Mapping[str, Any]) -> Iterable[str]:
    for path, choices in CHOICES.items():
        value = values[path]
        if value not in choices:
            near = difflib.get_close_matches(str(value), choices, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            yield f"{path} must be one of {', '.join(choices)}, got {path}={value}{hint}"


def _out_of_bounds(values: Mapping[str, Any]) -> Iterable[str]:
    for path, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{path} must be a finite number, got {path}={value}"
    for path, low in AT_LEAST.items():
        if values[path] < low:
            yield f"{path} must be at least {low:g}, got {path}={values[path]}"
    for path in POSITIVE:
        if values[path] <= 0:
            yield f"{path} must be above 0, got {path}={values[path]}"
    for path, (low, high) in WITHIN.items():
        if values[path] < low or values[path] > high:
            yield f"{path} must lie within {low:.10g} and {high:.10g}, got {path}={values[path]}"


def _impossible_data(values: Mapping[str, Any]) -> Iterable[str]:
    fraction, size = values["data.search_fraction"], values["data.input_size"]
    if fraction <= 0 or fraction >= 1:
        yield (
            "data.search_fraction must lie between 0 and 1: it is the share of training pictures "
            f"held out to score trials on, got data.search_fraction={fraction}"
        )
    if len(size) != 2 or any(side < 32 or side % 32 for side in size):
        yield (
            "data.input_size must be two multiples of 32, (height, width), "
            f"got data.input_size={list(size)}; try [256,192]"
        )


def _impossible_training(values: Mapping[str, Any]) -> Iterable[str]:
    if values["trial.launcher"] == "inline" and values["trial.num_workers"] > 1:
        yield (
            "trial.launcher=inline runs one worker in the trial's own process, got "
            f"trial.num_workers={values['trial.num_workers']}; change to trial.launcher=train"
        )
    if values["teacher.epochs"] == 0 and values["teacher.init"] == "random":
        yield (
            "a teacher must be trained or loaded, got teacher.epochs=0 and teacher.init=random; "
            "set teacher.epochs, or teacher.init to the path of its weights"
        )


def _impossible_movenet(values: Mapping[str, Any]) -> Iterable[str]:
    came = [f"teacher.{key}={values[f'teacher.{key}']}" for key in ("name", "size", "epochs")]
    is_movenet = came[0] == "teacher.name=mobile_net" and values["teacher.size"] in MOVENET_SIZES
    if values["teacher.codec"] == MOVENET and (not is_movenet or values["teacher.epochs"] > 0):
        yield (
            "teacher.codec=movenet reads a MoveNet as it comes, got "
            f"{', '.join(came)}; set teacher.name=mobile_net, teacher.size to one of "
            f"{', '.join(MOVENET_SIZES)} and teacher.epochs=0, or change teacher.codec"
        )


def _impossible_place(values: Mapping[str, Any]) -> Iterable[str]:
    name, storage = values["name"], values["storage"]
    if not re.fullmatch(r"\w[\w.+-]*", name):
        yield (
            "name must be a folder's name: a letter or digit, then letters, digits, '.', '_', '+' "
            f"and '-', got name={name!r}; change name=..."
        )
    if name == SHARED_FOLDER:
        yield (
            f"name must not be {SHARED_FOLDER}, the folder of what all studies share, "
            f"got name={name}; change name=..."
        )
    if "://" in storage:
        yield (
            "storage must be a folder that every node can write to, "
            f"got storage={storage}; mount the bucket and give its path"
        )
