"""Folders of a teacher: named by what its training, and what its targets, depend on.

Studies of one ``storage`` share a teacher if their names agree. A setting on which neither the
weights nor the targets depend must not change a name, and every one on which they do must.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from models.movenet_weights import weight_files
from models.skeleton import Skeleton
from study.cache.prepare import PreparedData
from study.cache.teacher_store import open_teacher_store, view_settings
from study.config.schema import (
    JITTER,
    ONNX,
    PREDICTIONS,
    RANDOM,
    SIZES,
    STUDENT,
    ModelConfig,
    RefineConfig,
)
from study.errors import InputError
from study.storage.files import fingerprint, hash_file
from study.storage.paths import TARGETS, cached_teacher, cached_training, teacher_record_file
from study.teachers.adapters import TeacherSpec
from study.teachers.onnx_files import onnx_files

VERSION = 5
"""Raise it when the teacher's training, or what is stored of it, changes."""
EARLIER_VERSION = 4
"""The version whose names held all settings of the teacher; its teachers are used again."""
OF_FOLDER = ("config.json", "adapter_config.json", "*.index.json", "*.safetensors")
"""Files that decide the weights of a folder; others, such as a README, do not."""
SHARDS = ".safetensors.index.json"
"""End of the name of a file that lists the shards of weights."""


def teacher_folder(spec: TeacherSpec, prepared: PreparedData) -> Path:
    """Return the folder of the targets of this teacher for these data."""
    cache = spec.resolved.cache
    weights = _training(spec, prepared) if spec.teacher.epochs else _content(spec)
    parts = (VERSION, weights, _prediction(spec), _crops(spec, prepared))
    folder = cached_teacher(cache, fingerprint(*parts))
    earlier = cached_teacher(cache, _earlier_name(spec, prepared))
    return earlier if not folder.is_dir() and _is_usable(earlier, spec) else folder


def training_folder(spec: TeacherSpec, prepared: PreparedData) -> Path:
    """Return the folder of this teacher's training, which teachers of other targets share.

    That of a teacher that is not trained, or of EARLIER_VERSION, is the folder of its targets.
    """
    folder = teacher_folder(spec, prepared)
    if (
        not spec.teacher.epochs
        or folder.name == cached_teacher(folder.parent, _earlier_name(spec, prepared)).name
    ):
        return folder
    parts = (VERSION, _training(spec, prepared))
    return cached_training(folder.parent, fingerprint(*parts))


def teacher_names(spec: TeacherSpec, prepared: PreparedData) -> list[str]:
    """Return the names by which studies may know this teacher, that of its folder first."""
    earlier = cached_teacher(spec.resolved.cache, _earlier_name(spec, prepared))
    return [teacher_folder(spec, prepared).name, earlier.name]


def _training(spec: TeacherSpec, prepared: PreparedData) -> list[Any]:
    """List what the weights of a trained teacher depend on, its best epoch included."""
    settings, data = spec.teacher, prepared.for_teacher()
    augment = dataclasses.asdict(spec.distill.augment)
    optimizer = dataclasses.asdict(settings.optimizer)
    return [
        _content(spec),
        _network(spec),
        [settings.flip_test, settings.epochs, settings.batch_size, optimizer, augment, spec.seed],
        [spec.trial.compile, spec.resolved.evaluation, _joints(spec.resolved.skeleton)],
        [Path(path).name for path in (data.train, data.search, data.search_truth)],
    ]


def _network(spec: TeacherSpec) -> list[Any]:
    """List what the output of the network depends on, its weights and its crops apart."""
    settings, is_ours = spec.teacher, spec.teacher.name in SIZES
    parts: list[Any] = [settings.name, _joints(spec.resolved.teacher_skeleton)]
    if settings.name == PREDICTIONS:
        return parts
    if is_ours:
        parts += [settings.size]
    if settings.name == ONNX:
        parts += [settings.pixels]
    else:
        parts += [spec.trial.precision, spec.trial.channels_last == "false"]
    codec = settings.codec if is_ours or settings.name == ONNX else None
    return [*parts, codec, settings.sigma, list(spec.resolved.teacher_input_size)]


def _prediction(spec: TeacherSpec) -> list[Any]:
    """List what targets depend on, the weights and the data apart."""
    settings = spec.teacher
    parts: list[Any] = [_network(spec), _joints(spec.resolved.skeleton)]
    if settings.name == PREDICTIONS:
        return parts
    parts.append(settings.flip_test)
    if settings.views > 1:
        drawn = view_settings(spec.distill.augment)
        frame = dataclasses.asdict(spec.student_frame)
        parts.append([settings.views, drawn, frame, spec.seed])
    return parts


def _crops(spec: TeacherSpec, prepared: PreparedData) -> list[str]:
    """List the crops that targets are predicted for, and those that the teacher sees."""
    own = [] if spec.teacher.name == PREDICTIONS else [prepared.for_teacher().train]
    return [Path(path).name for path in (prepared.train, *own)]


def _joints(skeleton: Skeleton) -> dict[str, Any]:
    """Return all of a skeleton but its name, and its edges, which no teacher uses."""
    parts = dataclasses.asdict(skeleton)
    return {key: value for key, value in parts.items() if key not in ("name", "edges")}


def file_contents(spec: TeacherSpec, student: ModelConfig, refine: RefineConfig) -> dict[str, str]:
    """Return fingerprints of all files that a setting names, by the setting.

    Raises:
        InputError: a file is missing.
    """
    named: dict[str, Any] = {}
    if spec.teacher.init != RANDOM:
        named["teacher.init"] = weights_of(spec.teacher)
    if student.init != RANDOM:
        named["student.init"] = weights_of(student)
    if refine.epochs and refine.start not in (STUDENT, JITTER):
        named["refine.start"] = [hash_file(Path(refine.start))]
    return {setting: fingerprint(hashes) for setting, hashes in named.items()}


def _content(spec: TeacherSpec) -> Any:
    return RANDOM if spec.teacher.init == RANDOM else weights_of(spec.teacher)


def weights_of(model: ModelConfig) -> list[str]:
    """Return the hashes of all files that ``init`` names, in an order that is always the same.

    Raises:
        InputError: one of them is missing.
    """
    files = list(_files_of(model))
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None:
        raise InputError(
            f"the weights of {model.init} must be complete, got no file {missing}; put it there, "
            "or change init"
        )
    return [hash_file(file) for file in files]


def _files_of(model: ModelConfig) -> Iterator[Path]:
    """Yield the files that decide the weights: a single one, or all parts of several."""
    path = Path(model.init)
    if path.is_dir():
        listed = [file for pattern in OF_FOLDER for file in sorted(path.glob(pattern))]
        shards = {path / name for file in listed for name in _shards(file)}
        yield from (*listed, *sorted(shards - {*listed}))
    elif model.name == ONNX:
        yield from onnx_files(path)
    elif model.name in SIZES and path.suffix == ".json":
        try:
            yield from weight_files(path)
        except ValueError as error:
            raise InputError(str(error)) from None
    else:
        yield path


def _shards(file: Path) -> set[str]:
    """Return the names of the shards that an index lists; none if the file is no index."""
    if not file.name.endswith(SHARDS):
        return set()
    try:
        listed = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        return {str(name) for name in listed.values()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return set()  # the library that loads the weights reports it


def _earlier_name(spec: TeacherSpec, prepared: PreparedData) -> str:
    """Return the fingerprint that names this teacher in folders of EARLIER_VERSION."""
    teacher = dataclasses.asdict(spec.teacher)
    del teacher["seed"]
    teacher |= {"init": _earlier_content(spec.teacher), "mode": None}
    augment = dataclasses.asdict(spec.distill.augment)
    augment["colour"] = augment.pop("color")
    arithmetic = [spec.trial.precision, spec.trial.channels_last, spec.trial.compile]
    parts = (EARLIER_VERSION, teacher, augment, spec.seed, arithmetic)
    return fingerprint(*parts, prepared.fingerprint)


def _earlier_content(teacher: ModelConfig) -> Any:
    path = Path(teacher.init)
    if path.is_dir():
        files = [path / "config.json", *sorted(path.glob("*.safetensors"))]
        return [(file.name, hash_file(file)) for file in files if file.is_file()]
    if not path.is_file():
        return RANDOM
    is_movenet = teacher.name == "mobile_net" and path.suffix == ".json"
    return weights_of(teacher) if is_movenet else hash_file(path)


def _is_usable(folder: Path, spec: TeacherSpec) -> bool:
    """Return whether the folder is a teacher of EARLIER_VERSION with all that its name lacks.

    The name lacks the weights beside an ONNX file, and the frame of views.
    """
    if not folder.is_dir():
        return False
    if spec.teacher.name == ONNX and len(onnx_files(Path(spec.teacher.init))) > 1:
        return False
    if spec.teacher.name == PREDICTIONS or spec.teacher.views == 1:
        return True
    if not teacher_record_file(folder).is_file():
        return True  # its views are not drawn yet
    store = open_teacher_store(folder / TARGETS)
    return store.has_views(spec.distill.augment, spec.student_frame)
