"""The study's teacher: made ready once, then asked once about every training person."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.build import build_codec
from models.codecs.crop_frame import CropFrame
from models.movenet_weights import weight_files
from models.skeleton import Skeleton
from study.cache.crop_store import CropStore, open_crop_store
from study.cache.predictions import NOBODY, Predictions
from study.cache.prepare import PreparedData
from study.cache.teacher_store import (
    RowTargets,
    TargetSource,
    TeacherTargets,
    Views,
    open_teacher_store,
    place_of,
    write_teacher_store,
)
from study.config.derived import seed_of
from study.config.schema import (
    MOBILE_NET,
    PREDICTIONS,
    RANDOM,
    AugmentConfig,
    ModelConfig,
    TeacherConfig,
)
from study.data.augmentation import draw_affines, no_augmentation
from study.data.crops import invert_affine, plain_affines, stored_size, transform_modes
from study.display import PREDICTED
from study.errors import InputError
from study.storage.checkpoint import Checkpoint, Checkpoints, Row, best_row
from study.storage.files import fingerprint, hash_file, write_atomic
from study.storage.paths import TARGETS, cached_teacher, teacher_epochs, teacher_record_file
from study.teachers.adapters import (
    NUM_MODES,
    HeatmapTeacher,
    Teacher,
    TeacherSpec,
    for_data,
    open_network,
    open_teacher,
)
from study.teachers.online import OnlineTeacher
from study.teachers.target_error import note_target_error
from study.training.batches import crops_of
from study.training.distill import DistillTask
from study.training.loop import Recorder, Report, run_stage
from study.training.networks import compile_network
from study.training.training_data import TrainingData
from study.workers import Workers

VERSION = 4
"""Raise it when training a teacher, or what is kept of it, changes."""


def teacher_folder(spec: TeacherSpec, data: PreparedData) -> Path:
    """Return the folder of this teacher on these data, shared by studies of one ``storage``."""
    teacher = dataclasses.asdict(spec.teacher)
    teacher |= {"init": _content_of(spec.teacher), "mode": None}
    augment = dataclasses.asdict(spec.distill.augment)
    augment["colour"] = augment.pop("color")  # as in the names of teachers on disk
    arithmetic = [spec.trial.precision, spec.trial.channels_last, spec.trial.compile]
    parts = (VERSION, teacher, augment, spec.seed, arithmetic)
    return cached_teacher(spec.resolved.cache, fingerprint(*parts, data.fingerprint))


def _content_of(teacher: TeacherConfig) -> Any:
    """What tells the weights at ``init`` from others: the file's hash, or those of several."""
    path = Path(teacher.init)
    if teacher.name == MOBILE_NET and path.suffix == ".json":
        try:
            return [hash_file(file) for file in weight_files(path)]
        except ValueError as error:
            raise InputError(str(error)) from None
    if path.is_dir():
        files = [path / "config.json", *sorted(path.glob("*.safetensors"))]
        return [(file.name, hash_file(file)) for file in files if file.is_file()]
    return hash_file(path) if path.is_file() else RANDOM


def is_ready(folder: Path) -> bool:
    """Whether the teacher is trained and has been asked about everyone."""
    return teacher_record_file(folder).is_file()


def best_of(folder: Path) -> Checkpoint:
    """The trained teacher's best epoch by AP on held-out people."""
    last = Checkpoints(teacher_epochs(folder)).last()
    assert last is not None
    return Checkpoints(teacher_epochs(folder)).at(int(best_row(last.rows)["epoch"]))


def build_task(spec: TeacherSpec) -> DistillTask:
    """Build the task that trains the teacher on ground truth alone."""
    settings = dataclasses.replace(
        spec.distill,
        heatmap=dataclasses.replace(spec.distill.heatmap, kind="none"),
        structure=dataclasses.replace(spec.distill.structure, kind="none"),
        weights="fixed",
    )
    network, codec, trained = open_network(spec)
    return DistillTask(
        network,
        codec,
        spec.resolved.skeleton,
        settings,
        trained,
        flip_test=spec.teacher.flip_test,
    )


def load_teacher(spec: TeacherSpec, folder: Path, device: torch.device) -> Teacher:
    """The teacher that the study's targets are of, in eval mode: its best epoch, or as it came."""
    if not spec.teacher.epochs:
        return open_teacher(spec, device)
    task = build_task(spec)
    task.load_state_dict(best_of(folder).weights())
    teacher = HeatmapTeacher(task.student, task.codec, task.flip_order)
    return for_data(teacher, spec.resolved, device)


def prepare_teacher(spec: TeacherSpec, data: PreparedData, notify: Callable[[str], None]) -> None:
    """Stores predictions at once, for there is nobody to train or to ask; other teachers wait.

    Raises:
        InputError: ``teacher.init`` holds no predictions, or those of other people.
    """
    folder, resolved = teacher_folder(spec, data), spec.resolved
    if spec.teacher.name != PREDICTIONS or is_ready(folder):
        return
    predictions = Predictions(Path(spec.teacher.init), resolved.teacher_skeleton)
    store = open_crop_store(Path(data.train))
    matched = predictions.match(store)
    number = np.count_nonzero(matched != NOBODY)
    if not number:
        raise InputError(
            "predictions must be of the people to train on, got none that is of any of "
            f"{len(store)} in {predictions.path}; change teacher.init, or its image_id or "
            "annotation_id to those of data.train.annotations"
        )
    notify(f"{number} of {len(store)} people to train on have a prediction; the rest are untaught")
    modes = torch.from_numpy(predictions.modes(store, matched, NUM_MODES, resolved.skeleton))
    said = TeacherTargets(modes, modes[:, :, 0, 2] > 0, None)
    write_teacher_store(folder / TARGETS, stored_size(store.input_size), len(store), said.part)
    _finish(folder, 0, [])


def make_teacher(
    spec: TeacherSpec,
    student: ModelConfig,
    data: PreparedData,
    workers: Workers,
    report: Report,
    tell: Callable[[Row], None] = lambda row: None,
) -> None:
    """Trains the teacher, or goes on where it was; then stores what it says of each person.

    Args:
        report: called with each epoch's row.
        tell: called with the last row, and as PREDICTED the number of crops whose targets are
            predicted and of all crops.
    """
    folder, resolved = teacher_folder(spec, data), spec.resolved
    ground = TrainingData.open(data.for_teacher(), resolved, workers, teacher=None)
    rows = _train(spec, ground, folder, report) if spec.teacher.epochs else []
    teacher = load_teacher(spec, folder, workers.device)
    if not rows:
        scores = {f"val_{name}": value for name, value in ground.score(teacher).items()}
        rows = [{"stage": "teacher", "epoch": 0, "step": 0, "seconds": 0.0, "loss": 0.0, **scores}]
        report(rows[0])
    students_crops = open_crop_store(Path(data.train))
    live = OnlineTeacher(teacher, ground.train, students_crops)
    codec = build_codec(student.codec, resolved.input_size, student.sigma)
    views = draw_views(
        students_crops,
        resolved.skeleton,
        codec.frame,
        spec.distill.augment,
        number=spec.teacher.views,
        seed=seed_of(spec.seed, "views"),
    )

    def asked(done: int, total: int) -> None:
        tell({**rows[-1], PREDICTED: (done, total)})

    ask(live, views, ground.skeleton, workers, folder / TARGETS, asked)
    if workers.rank == 0:
        cached = open_teacher_store(folder / TARGETS)
        note_target_error(
            folder, cached, live, resolved.skeleton, codec, workers.device, spec.seed
        )
        _finish(folder, int(best_row(rows)["epoch"]), rows)
    workers.wait()


def _train(spec: TeacherSpec, ground: TrainingData, folder: Path, report: Report) -> list[Row]:
    """Trains it to the end; returns the report of every epoch."""
    workers = ground.workers
    task = build_task(spec).to(workers.device)
    recorder = Recorder(Checkpoints(teacher_epochs(folder)), workers, report)
    recorder.replay()
    augment, frame = spec.distill.augment, task.codec.frame
    stage = ground.stage("teacher", spec.teacher, augment, frame, seed=spec.seed)
    progress = recorder.resume(stage, task)
    compile_network(task.student, spec.trial.compile, stage, workers.device)
    run_stage(task, stage, progress, workers, recorder.finish)
    return recorder.rows


def draw_views(
    store: CropStore,
    skeleton: Skeleton,
    frame: CropFrame,
    augment: AugmentConfig,
    *,
    number: int,
    seed: int,
) -> Views:
    """So many crops of each person: the plain one, and others by this augmentation's place."""
    people = torch.arange(len(store)).repeat(number)
    affine = draw_affines(
        torch.from_numpy(store.keypoints_stored[people.numpy()]),
        torch.from_numpy(store.visibility[people.numpy()]),
        *(skeleton, frame, augment),
        torch.Generator().manual_seed(seed),
    )
    affine[: len(store)] = plain_affines(len(store), frame)
    return Views(affine.numpy(), frame, place_of(augment))


def ask(
    live: OnlineTeacher,
    views: Views,
    skeleton: Skeleton,
    workers: Workers,
    target: Path,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Stores the teacher's answer for every training person, of each of these views.

    Args:
        tell: called with about how many crops of all it was asked about.
    """
    store = live.student
    plain = no_augmentation(len(views.affine), skeleton, views.frame)
    drawn = dataclasses.replace(plain, affine=torch.from_numpy(views.affine))
    back = torch.from_numpy(invert_affine(views.affine.astype(float)))

    def of_view(number: int) -> RowTargets:
        def asked(start: int, stop: int) -> TeacherTargets:
            people = torch.arange(start, stop)
            rows = number * len(store) + people
            own, places = drawn.take(rows), torch.arange(len(people))
            with torch.inference_mode():
                crops = crops_of(store, people, own, places, views.frame, workers.device)
                said = live.answers(people.numpy(), own, views.frame, crops)
                modes = transform_modes(said.modes_crop.double().cpu(), back[rows])
            return said._replace(modes_crop=modes)

        return asked

    asked = [of_view(number) for number in range(len(views.affine) // len(store))]
    size, kept = stored_size(store.input_size), views if len(asked) > 1 else None
    write_teacher_store(target, size, len(store), *asked, views=kept, workers=workers, tell=tell)


def open_online_teacher(
    spec: TeacherSpec, data: PreparedData, folder: Path, workers: Workers
) -> TargetSource:
    """The teacher of this folder, to be asked at every step about what the student sees."""
    teacher = load_teacher(spec, folder, workers.device)
    stores = (open_crop_store(Path(part.train)) for part in (data.for_teacher(), data))
    return OnlineTeacher(teacher, *stores)


def _finish(folder: Path, epoch: int, rows: list[Row]) -> None:
    """From here on the teacher is ready."""
    write_atomic(teacher_record_file(folder), json.dumps({"epoch": epoch, "rows": rows}))
