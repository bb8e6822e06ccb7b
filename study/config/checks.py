"""Checks of the settings: possible values, alone and in combination.

Settings are named by config path (``distill.optimizer.lr``). ``config/compose.py`` checks every
study's settings, and the driver every value of a search space.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from study.config.schema import (
    AP,
    CACHED,
    CONSTRAINTS,
    COSTS,
    FROM_DATA,
    JITTER,
    JOINT,
    LATENCY,
    MIX,
    MLFLOW,
    MOBILE_NET,
    MOVENET,
    MOVENET_SIZES,
    ONLINE,
    ONNX,
    PREDICTIONS,
    SHARED_FOLDER,
    SIZES,
    STAGED,
    STUDENT,
    TENSORBOARD,
    VITPOSE,
)
from study.config.typed_paths import FROM_HERE, IN_ROOT, LIST

SKELETONS = ("coco", "crowdpose")
"""Names of the skeletons that are built in."""
LEAST_STAGED = 4
"""Fewest trials of a staged study."""
CHOICES: dict[str, tuple[str, ...]] = {
    "plan.kind": (JOINT, STAGED),
    "display": ("auto", "live", "plain", "none"),
    "data.kind": ("drawn", "coco", "crowdpose"),
    "data.crops": ("auto", "raw", "jpeg"),
    "teacher.name": (*SIZES, VITPOSE, ONNX, PREDICTIONS),
    "student.name": tuple(SIZES),
    "teacher.codec": ("msra", "dark", "udp", "simcc", MOVENET),
    "teacher.pixels": ("imagenet", "unit"),
    "teacher.mode": (CACHED, ONLINE),
    "student.codec": ("msra", "dark", "udp", "simcc"),
    "distill.heatmap.kind": ("none", "mse", "kl"),
    "distill.structure.kind": ("none", *MIX, "mix"),
    "distill.weights": ("fixed", "learned"),
    "distill.schedule": ("constant", "linear", "ramp"),
    "distill.normalize": ("initial", "none"),
    "refine.student": ("frozen", "finetuned"),
    "refine.loss": ("oks", "smooth_l1"),
    "refine.progressive": ("final", "interpolated"),
    "search.sampler": ("tpe", "gp", "cmaes", "nsga2", "qmc", "random"),
    "search.pruner": ("successive_halving", "hyperband", "median", "percentile", "none"),
    "trial.launcher": ("auto", "inline", "train"),
    "trial.precision": ("auto", "fp32", "bf16"),
    "trial.channels_last": ("auto", "true", "false"),
    "trial.compile": ("auto", "true", "false"),
}
AT_LEAST: dict[str, float] = {
    "data.max_people": 0,
    "data.val.detection_threshold": 0,
    "data.num_train_images": 2,
    "data.num_val_images": 1,
    "teacher.views": 1,
    "teacher.epochs": 0,
    "distill.epochs": 1,
    **{f"distill.structure.mix.{part}": 0 for part in MIX},
    "refine.epochs": 0,
    "refine.teacher_weight": 0,
    "refine.jitter": 0,
    "refine.truth_weight": 0,
    "refine.width": 4,
    "plan.parents": 1,
    "search.trials": 1,
    "search.concurrent": 0,
    "search.startup_trials": 1,
    "search.population": 2,
    "search.min_epochs": 1,
    "search.reduction_factor": 2,
    "confirm.trials": 0,
    "confirm.seeds": 2,
    "trial.num_workers": 1,
    "trial.gpus": 0,
    "trial.max_failures": 0,
    "trial.timeout_s": 0,
    **{f"{stage}.batch_size": 1 for stage in ("teacher", "distill", "refine")},
    **{f"{stage}.optimizer.weight_decay": 0 for stage in ("teacher", "distill", "refine")},
    **{
        f"{stage}.augment.{name}": 0
        for stage in ("distill", "refine")
        for name in ("scale", "rotation", "color")
    },
}
POSITIVE = (
    "teacher.optimizer.lr",
    "distill.optimizer.lr",
    "refine.optimizer.lr",
    "student.sigma",
    "teacher.sigma",
    "trial.cpus",
    "distill.heatmap.weight",
    "distill.heatmap.tau",
    "distill.structure.weight",
)
WITHIN: dict[str, tuple[float, float]] = {
    "data.seed": (0, 2**32 - 1),
    "data.max_bad_fraction": (0, 1),
    "data.val.oks_nms": (0, 1),
    "plan.distill_share": (0.01, 0.99),
    "search.percentile": (0, 100),
    "refine.student_factor": (0, 1),
    "refine.candidates": (1, 3),
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
        for name in ("flip", "half_body", "erase", "occlude")
    },
}
FROM_FILES = {
    VITPOSE: "a folder of config.json and safetensors",
    ONNX: "a file",
    PREDICTIONS: "a JSON of COCO keypoint results",
}


def faults(values: Mapping[str, Any]) -> list[str]:
    """Describe every impossible value: what must hold, what came, what to change."""
    return [
        *_out_of_choice(values),
        *_impossible_sizes(values),
        *_out_of_bounds(values),
        *_impossible_data(values),
        *_impossible_skeleton(values),
        *_impossible_training(values),
        *_impossible_teacher(values),
        *_impossible_structure(values),
        *_impossible_teacher_form(values),
        *_impossible_start(values),
        *_impossible_refiner(values),
        *_impossible_movenet(values),
        *_impossible_place(values),
        *_impossible_paths(values),
        *_impossible_plan(values),
        *_impossible_logs(values),
        *search_faults(values),
    ]


def _out_of_choice(values: Mapping[str, Any]) -> Iterable[str]:
    for path, choices in CHOICES.items():
        value = values[path]
        if value not in choices:
            near = difflib.get_close_matches(str(value), choices, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            yield f"{path} must be one of {', '.join(choices)}, got {path}={value}{hint}"


def _impossible_sizes(values: Mapping[str, Any]) -> Iterable[str]:
    for role in ("teacher", "student"):
        name, size = values[f"{role}.name"], values[f"{role}.size"]
        if name in SIZES and size not in SIZES[name]:
            yield (
                f"{role}.size must be one of {', '.join(SIZES[name])} for {role}.name={name}, "
                f"got {role}.size={size}"
            )


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
            "data.search_fraction must lie between 0 and 1: it is the share of training images "
            f"held out to score trials on, got data.search_fraction={fraction}"
        )
    if not _is_input_size(size):
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
    gpus = values["trial.gpus"]
    if 1 < gpus < math.inf and gpus != int(gpus):
        yield (
            "trial.gpus must be a share of one GPU or a whole number of them, got "
            f"trial.gpus={gpus:g}; change to trial.gpus={math.ceil(gpus)}"
        )


def _impossible_teacher(values: Mapping[str, Any]) -> Iterable[str]:
    name, epochs = values["teacher.name"], values["teacher.epochs"]
    if name in FROM_FILES and values["teacher.init"] == "random":
        yield (
            f"teacher.name={name} is read from {FROM_FILES[name]}, got teacher.init=random; set "
            "teacher.init to its path"
        )
    elif epochs == 0 and values["teacher.init"] == "random":
        yield (
            "a teacher must be trained or loaded, got teacher.epochs=0 and teacher.init=random; "
            "set teacher.epochs, or teacher.init to the path of its weights"
        )
    if name == PREDICTIONS and values["teacher.mode"] == ONLINE:
        yield (
            f"teacher.name={PREDICTIONS} has no network to run online, got teacher.mode={ONLINE}; "
            f"set teacher.mode={CACHED}"
        )
    if name in (ONNX, PREDICTIONS) and epochs > 0:
        yield (
            f"teacher.name={name} can't be trained, got teacher.epochs={epochs}; set "
            "teacher.epochs=0"
        )


def _impossible_start(values: Mapping[str, Any]) -> Iterable[str]:
    start = values["refine.start"]
    if start not in (STUDENT, JITTER) and not start.endswith(".json"):
        yield (
            f"refine.start must be {STUDENT}, {JITTER} or the path of a .json of COCO keypoint "
            f"results, got refine.start={start}"
        )


def _impossible_refiner(values: Mapping[str, Any]) -> Iterable[str]:
    width = values["refine.width"]
    if width >= AT_LEAST["refine.width"] and width % 4:
        yield (
            f"refine.width must be a multiple of 4, got refine.width={width}; change to "
            f"{width - width % 4} (in a search space: low and step, too)"
        )


def _impossible_structure(values: Mapping[str, Any]) -> Iterable[str]:
    kind, name = values["distill.structure.kind"], values["teacher.name"]
    parts = {part: values[f"distill.structure.mix.{part}"] for part in MIX}
    if kind == "mix" and not any(parts.values()):
        zeros = ", ".join(f"distill.structure.mix.{part}=0" for part in MIX)
        yield f"a mix must have a part, got {zeros}; raise one, or set distill.structure.kind=none"
    has_relation = kind == "relation" or (kind == "mix" and parts["relation"] > 0)
    if name in (ONNX, PREDICTIONS) and has_relation:
        yield (
            "the structure loss relation compares features, and a teacher of "
            f"teacher.name={name} has none, got distill.structure.kind={kind}; choose another "
            "kind, distill.structure.mix.relation=0, and a search space without relation, such "
            "as search_space=poses"
        )


def _impossible_skeleton(values: Mapping[str, Any]) -> Iterable[str]:
    skeleton, kind = values["data.skeleton"], values["data.kind"]
    if skeleton != FROM_DATA and not _names_skeleton(skeleton):
        yield (
            f"data.skeleton must be {', '.join(SKELETONS)}, {FROM_DATA} or the path of a .yaml "
            f"file, got data.skeleton={skeleton}"
            f"{_near_skeleton(skeleton, (*SKELETONS, FROM_DATA))}"
        )
    elif kind == "drawn" and skeleton in (FROM_DATA, "crowdpose"):
        yield (
            "data=drawn draws people with COCO's joints, got "
            f"data.skeleton={skeleton}; set data.skeleton=coco, or data=coco for other images"
        )


def _names_skeleton(value: str) -> bool:
    return value in SKELETONS or value.endswith((".yaml", ".yml"))


def _near_skeleton(value: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(value, names, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _impossible_teacher_form(values: Mapping[str, Any]) -> Iterable[str]:
    skeleton, size = values["teacher.skeleton"], values["teacher.input_size"]
    can_train = values["teacher.name"] not in (ONNX, PREDICTIONS)
    if skeleton is not None and not _names_skeleton(skeleton):
        yield (
            f"teacher.skeleton must be null, {' or '.join(SKELETONS)}, or the path of a .yaml "
            f"file, got teacher.skeleton={skeleton}{_near_skeleton(skeleton, SKELETONS)}"
        )
    elif (
        can_train
        and skeleton not in (None, values["data.skeleton"])
        and values["teacher.epochs"] > 0
    ):
        yield (
            "a teacher can be trained on the data's joints alone, got "
            f"teacher.skeleton={skeleton}, data.skeleton={values['data.skeleton']} and "
            f"teacher.epochs={values['teacher.epochs']}; set teacher.epochs=0 to use it "
            "unchanged, or teacher.skeleton=null"
        )
    if size is not None and not _is_input_size(size):
        yield (
            "teacher.input_size must be null or two multiples of 32, (height, width), "
            f"got teacher.input_size={list(size)}; try [256,192]"
        )


def _impossible_movenet(values: Mapping[str, Any]) -> Iterable[str]:
    came = [f"teacher.{key}={values[f'teacher.{key}']}" for key in ("name", "size", "epochs")]
    is_movenet = values["teacher.name"] == MOBILE_NET and values["teacher.size"] in MOVENET_SIZES
    if values["teacher.codec"] == MOVENET and (not is_movenet or values["teacher.epochs"] > 0):
        yield (
            "teacher.codec=movenet decodes an unchanged MoveNet, got "
            f"{', '.join(came)}; set teacher.name=mobile_net, teacher.size to one of "
            f"{', '.join(MOVENET_SIZES)} and teacher.epochs=0, or change teacher.codec"
        )
    elif values["teacher.codec"] == MOVENET and values["teacher.flip_test"]:
        yield (
            "teacher.codec=movenet has no flip test, since MoveNet's maps of a person's center "
            "can't be averaged, got teacher.flip_test=true; set teacher.flip_test=false"
        )


def _is_input_size(size: Sequence[int]) -> bool:
    return len(size) == 2 and all(side >= 32 and side % 32 == 0 for side in size)


def _impossible_plan(values: Mapping[str, Any]) -> Iterable[str]:
    trials = values["search.trials"]
    if values["plan.kind"] != STAGED:
        return
    if trials < LEAST_STAGED:
        yield (
            f"plan=staged needs {LEAST_STAGED} trials at least, the baseline and the defaults of "
            f"either stage among them, got search.trials={trials}; raise it, or set plan=joint"
        )
    if values["refine.start"] != STUDENT:
        yield (
            "plan=staged starts refiners from its students' poses, got "
            f"refine.start={values['refine.start']}; set refine.start=student or plan=joint"
        )


def _impossible_logs(values: Mapping[str, Any]) -> Iterable[str]:
    logs = list(values["log"])
    if len({*logs}) < len(logs) or not {*logs} <= {TENSORBOARD, MLFLOW}:
        yield (
            f"log must name any of {TENSORBOARD}, {MLFLOW}, each once, "
            f"got log=[{','.join(logs)}]; for instance log=[{TENSORBOARD}]"
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
            f"name must not be {SHARED_FOLDER}, the folder that all studies share, "
            f"got name={name}; change name=..."
        )
    store = values["data.store"] or ""
    if "://" in store and not store.startswith(("s3://", "gs://")):
        yield (
            "data.store must be null, a folder, s3://bucket/prefix or gs://bucket/prefix, got "
            f"data.store={store}"
        )
    if "://" in storage:
        yield (
            "storage must be a folder that every node can write to, "
            f"got storage={storage}; mount the bucket and give its path"
        )


def _impossible_paths(values: Mapping[str, Any]) -> Iterable[str]:
    given = [(setting, values[setting]) for setting in (*FROM_HERE, *IN_ROOT)]
    given += [(LIST, path) for path in values[LIST]]
    for setting, value in given:
        has_own_rule = setting in ("storage", "data.store")
        is_in_storage = str(value).startswith(f"{values['storage']}/")
        if "://" in str(value) and not has_own_rule and not is_in_storage:
            yield (
                f"{setting} must be a path of this machine, got {setting}={value}; mount the "
                "bucket, or copy its files, and give the path here without ://"
            )
    splits = [values[setting] or "/" for setting in IN_ROOT]
    if not values["data.root"] and not all(Path(path).is_absolute() for path in splits):
        yield "data.root must be the folder of the data, got data.root=, which is empty; set it"


def search_faults(values: Mapping[str, Any]) -> Iterable[str]:
    """Describe impossible objectives and constraints; settings are given by config path."""
    objectives, sampler = list(values["search.objectives"]), values["search.sampler"]
    came = f"got search.objectives=[{','.join(objectives)}]"
    unknown = [name for name in objectives if name not in (AP, *COSTS)]
    if objectives[:1] != [AP] or unknown or len(set(objectives)) < len(objectives):
        yield (
            f"search.objectives must be {AP}, then any of {', '.join(COSTS)}, each once, {came}; "
            f"try [{AP},{LATENCY}]"
        )
    limited = [name for name in COSTS if values[CONSTRAINTS + name] is not None]
    for name in limited:
        if values[CONSTRAINTS + name] <= 0:
            yield (
                f"{CONSTRAINTS}{name} must be null or above 0, got "
                f"{CONSTRAINTS}{name}={values[CONSTRAINTS + name]}"
            )
    if sampler == "cmaes" and (len(objectives) > 1 or limited):
        constrained = "".join(f", {CONSTRAINTS}{name}" for name in limited)
        yield (
            "search.sampler=cmaes supports one objective and no constraints, "
            f"{came}{constrained}; choose search.sampler=tpe, gp or nsga2"
        )
