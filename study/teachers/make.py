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
from models.movenet import weight_files
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
from study.config.compose import to_plain
from study.config.derived import input_size_of, seed_of, skeleton_of, teacher_skeleton_of
from study.config.schema import (
    MOBILE_NET,
    PREDICTIONS,
    RANDOM,
    AugmentConfig,
    StudyConfig,
    TeacherConfig,
)
from study.data.augmentation import draw_affines, no_augmentation
from study.data.crops import invert_affine, plain_affines, stored_size, transform_modes
from study.display import PREDICTED
from study.errors import InputError
from study.storage.checkpoint import Checkpoint, Checkpoints, Row, best_row
from study.storage.files import fingerprint, hash_file, write_atomic
from study.storage.paths import (
    TARGETS,
    cache_of,
    cached_teacher,
    teacher_epochs,
    teacher_record_file,
)
from study.teachers.adapters import (
    NUM_MODES,
    HeatmapTeacher,
    Teacher,
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


def teacher_folder(config: StudyConfig, data: PreparedData) -> Path:
    """Where the teacher of these settings and data lies, for all studies under one ``storage``."""
    settings = to_plain(config)
    teacher = {**settings["teacher"], "init": _content_of(config.teacher), "mode": None}
    augment = settings["distill"]["augment"]
    augment["colour"] = augment.pop("color")  # as in the names of teachers on disk
    arithmetic = [settings["trial"][key] for key in ("precision", "channels_last", "compile")]
    parts = (VERSION, teacher, augment, config.seed, arithmetic)
    return cached_teacher(cache_of(config), fingerprint(*parts, data.fingerprint))


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


def build_task(config: StudyConfig) -> DistillTask:
    """The teacher, learning from ground truth alone."""
    settings = dataclasses.replace(
        config.distill,
        heatmap=dataclasses.replace(config.distill.heatmap, kind="none"),
        structure=dataclasses.replace(config.distill.structure, kind="none"),
        weights="fixed",
    )
    network, codec, trained = open_network(config)
    return DistillTask(
        network,
        codec,
        skeleton_of(config),
        settings,
        trained,
        flip_test=config.teacher.flip_test,
    )


def load_teacher(config: StudyConfig, folder: Path, device: torch.device) -> Teacher:
    """The teacher that the study's targets are of, in eval mode: its best epoch, or as it came."""
    if not config.teacher.epochs:
        return open_teacher(config, device)
    task = build_task(config)
    task.load_state_dict(best_of(folder).weights())
    return for_data(HeatmapTeacher(task.student, task.codec, task.flip_order), config, device)


def prepare_teacher(
    config: StudyConfig, data: PreparedData, notify: Callable[[str], None]
) -> None:
    """Stores predictions at once, for there is nobody to train or to ask; other teachers wait.

    Raises:
        InputError: ``teacher.init`` holds no predictions, or those of other people.
    """
    folder = teacher_folder(config, data)
    if config.teacher.name != PREDICTIONS or is_ready(folder):
        return
    predictions = Predictions(Path(config.teacher.init), teacher_skeleton_of(config))
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
    modes = torch.from_numpy(predictions.modes(store, matched, NUM_MODES, skeleton_of(config)))
    said = TeacherTargets(modes, modes[:, :, 0, 2] > 0, None)
    write_teacher_store(folder / TARGETS, stored_size(store.input_size), len(store), said.part)
    _finish(folder, 0, [])


def make_teacher(
    config: StudyConfig,
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
    folder = teacher_folder(config, data)
    ground = TrainingData.open(config, data.for_teacher(), workers, teacher=None)
    rows = _train(config, ground, folder, report) if config.teacher.epochs else []
    teacher = load_teacher(config, folder, workers.device)
    if not rows:
        scores = {f"val_{name}": value for name, value in ground.score(teacher).items()}
        rows = [{"stage": "teacher", "epoch": 0, "step": 0, "seconds": 0.0, "loss": 0.0, **scores}]
        report(rows[0])
    student = open_crop_store(Path(data.train))
    live = OnlineTeacher(teacher, ground.train, student)
    codec = build_codec(config.student.codec, input_size_of(config), config.student.sigma)
    views = draw_views(
        *(student, ground.skeleton, codec.frame, config.distill.augment),
        number=config.teacher.views,
        seed=seed_of(config.seed, "views"),
    )

    def asked(done: int, total: int) -> None:
        tell({**rows[-1], PREDICTED: (done, total)})

    ask(live, views, ground.skeleton, workers, folder / TARGETS, asked)
    if workers.rank == 0:
        cached = open_teacher_store(folder / TARGETS)
        note_target_error(folder, cached, live, config, workers.device)
        _finish(folder, int(best_row(rows)["epoch"]), rows)
    workers.wait()


def _train(config: StudyConfig, ground: TrainingData, folder: Path, report: Report) -> list[Row]:
    """Trains it to the end; returns the report of every epoch."""
    workers = ground.workers
    task = build_task(config).to(workers.device)
    recorder = Recorder(Checkpoints(teacher_epochs(folder)), workers, report)
    recorder.replay()
    augment, frame = config.distill.augment, task.codec.frame
    stage = ground.stage("teacher", config.teacher, augment, frame, seed=config.seed)
    progress = recorder.resume(stage, task)
    compile_network(task.student, config.trial.compile, stage, workers.device)
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
    config: StudyConfig, data: PreparedData, folder: Path, workers: Workers
) -> TargetSource:
    """The teacher of this folder, to be asked at every step about what the student sees."""
    teacher = load_teacher(config, folder, workers.device)
    stores = (open_crop_store(Path(part.train)) for part in (data.for_teacher(), data))
    return OnlineTeacher(teacher, *stores)


def _finish(folder: Path, epoch: int, rows: list[Row]) -> None:
    """From here on the teacher is ready."""
    write_atomic(teacher_record_file(folder), json.dumps({"epoch": epoch, "rows": rows}))
