"""A study's teacher: trained once, then its targets predicted once for every training person."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from models.build import build_codec
from models.codecs.crop_frame import CropFrame
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
    view_settings,
    write_teacher_store,
)
from study.config.derived import seed_of
from study.config.schema import (
    PREDICTIONS,
    AugmentConfig,
    ModelConfig,
)
from study.data.augmentation import draw_affines, no_augmentation
from study.data.crops import invert_affine, plain_affines, stored_size, transform_modes
from study.display import PREDICTED
from study.errors import InputError
from study.storage.checkpoint import Checkpoint, Checkpoints, Row, best_row
from study.storage.files import write_atomic
from study.storage.paths import TARGETS, teacher_epochs, teacher_record_file
from study.teachers.adapters import (
    NUM_MODES,
    HeatmapTeacher,
    Teacher,
    TeacherSpec,
    for_data,
    open_network,
    open_teacher,
)
from study.teachers.identity import teacher_folder, training_folder
from study.teachers.online import OnlineTeacher
from study.teachers.target_error import record_target_error
from study.training.batches import crops_of
from study.training.distill import DistillTask
from study.training.loop import Recorder, Report, run_stage
from study.training.networks import compile_network
from study.training.training_data import TrainingData
from study.workers import Workers

TRAINING = "training"
"""Key of a finished teacher's record: name of the folder of its training."""


def is_ready(folder: Path) -> bool:
    """Return whether the teacher is trained and its targets are stored."""
    return teacher_record_file(folder).is_file()


def best_of(folder: Path) -> Checkpoint:
    """Return the best epoch, by AP on the search slice, of the teacher whose targets these are."""
    record = teacher_record_file(folder)
    known = json.loads(record.read_text()) if record.is_file() else {}
    training = folder.parent / known.get(TRAINING, folder.name)
    return Checkpoints(teacher_epochs(training)).best()


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
    """Load the teacher in eval mode: its best epoch, or ``teacher.init`` if it is not trained.

    Args:
        folder: folder of its targets, or of its training.
    """
    if not spec.teacher.epochs:
        return open_teacher(spec, device)
    task = build_task(spec)
    task.load_state_dict(best_of(folder).weights())
    teacher = HeatmapTeacher(task.student, task.codec, task.flip_order)
    return for_data(teacher, spec.resolved, device)


def prepare_teacher(
    spec: TeacherSpec, prepared: PreparedData, notify: Callable[[str], None]
) -> None:
    """Store the targets of ``teacher.name=predictions`` at once; do nothing for other teachers.

    Raises:
        InputError: ``teacher.init`` is not a file of predictions, or holds those of other people.
    """
    folder, resolved = teacher_folder(spec, prepared), spec.resolved
    if spec.teacher.name != PREDICTIONS or is_ready(folder):
        return
    predictions = Predictions(Path(spec.teacher.init), resolved.teacher_skeleton)
    store = open_crop_store(Path(prepared.train))
    matched = predictions.match(store)
    number = np.count_nonzero(matched != NOBODY)
    if not number:
        raise InputError(
            "predictions must be of the people to train on, got none that is of any of "
            f"{len(store)} in {predictions.path}; change teacher.init, or its image_id or "
            "annotation_id to those of data.train.annotations"
        )
    notify(
        f"{number} of {len(store)} people to train on have a prediction; the rest have no target"
    )
    modes = torch.from_numpy(predictions.modes(store, matched, NUM_MODES, resolved.skeleton))
    targets = TeacherTargets(modes, known=modes[:, :, 0, 2] > 0, relation=None)
    write_teacher_store(folder / TARGETS, stored_size(store.input_size), len(store), targets.part)
    _mark_ready(folder, 0, [], folder)


def make_teacher(
    spec: TeacherSpec,
    student: ModelConfig,
    prepared: PreparedData,
    workers: Workers,
    report: Report,
    progress: Callable[[Row], None] = lambda row: None,
) -> None:
    """Train the teacher, from its last checkpoint on, then store its targets for every person.

    Args:
        student: supplies the codec, in whose frame targets are predicted.
        report: called with each epoch's row.
        progress: called while targets are predicted, with the last row and, as PREDICTED, the
            number of crops done and of all.
    """
    folder, resolved = teacher_folder(spec, prepared), spec.resolved
    data = TrainingData.open(prepared.for_teacher(), resolved, workers, targets=None)
    training = training_folder(spec, prepared)
    rows = _train(spec, data, training, report) if spec.teacher.epochs else []
    teacher = load_teacher(spec, training, workers.device)
    if not rows:
        scores = {f"val_{name}": value for name, value in data.score(teacher).items()}
        rows = [{"stage": "teacher", "epoch": 0, "step": 0, "seconds": 0.0, "loss": 0.0, **scores}]
        report(rows[0])
    student_crops = open_crop_store(Path(prepared.train))
    online = OnlineTeacher(teacher, data.train, student_crops)
    codec = build_codec(student.codec, resolved.input_size, student.sigma)
    views = draw_views(
        student_crops,
        resolved.skeleton,
        codec.frame,
        spec.distill.augment,
        number=spec.teacher.views,
        seed=seed_of(spec.seed, "views"),
    )

    def count_predicted(done: int, total: int) -> None:
        progress({**rows[-1], PREDICTED: (done, total)})

    store_targets(online, views, resolved.skeleton, workers, folder / TARGETS, count_predicted)
    if workers.rank == 0:
        cached = open_teacher_store(folder / TARGETS)
        record_target_error(
            folder, cached, online, resolved.skeleton, codec, workers.device, spec.seed
        )
        _mark_ready(folder, int(best_row(rows)["epoch"]), rows, training)
    workers.wait()


def _train(spec: TeacherSpec, data: TrainingData, folder: Path, report: Report) -> list[Row]:
    """Train the teacher to the end; return the reports of all epochs."""
    workers = data.workers
    task = build_task(spec).to(workers.device)
    recorder = Recorder(Checkpoints(teacher_epochs(folder)), workers, report)
    recorder.replay()
    augment, frame = spec.distill.augment, task.codec.frame
    stage = data.stage("teacher", spec.teacher, augment, frame, seed=spec.seed)
    progress = recorder.resume(stage, task)
    compile_network(task.student, spec.trial.compile, stage, workers.device)
    run_stage(task, stage, progress, workers, recorder.finish_epoch)
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
    """Draw this number of views of each person: the plain crop first, then augmented ones."""
    people = torch.arange(len(store)).repeat(number)
    affine = draw_affines(
        torch.from_numpy(store.keypoints_stored[people.numpy()]),
        torch.from_numpy(store.visibility[people.numpy()]),
        skeleton,
        frame,
        augment,
        torch.Generator().manual_seed(seed),
    )
    affine[: len(store)] = plain_affines(len(store), frame)
    return Views(affine.numpy(), frame, view_settings(augment))


def store_targets(
    online: OnlineTeacher,
    views: Views,
    skeleton: Skeleton,
    workers: Workers,
    file: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Predict and store the targets of every training person and view.

    Args:
        file: the teacher store to write.
        progress: called with the approximate number of crops done, and of all.
    """
    store = online.student
    plain = no_augmentation(len(views.affine), skeleton, views.frame)
    drawn = dataclasses.replace(plain, affine=torch.from_numpy(views.affine))
    crop_to_stored = torch.from_numpy(invert_affine(views.affine.astype(float)))

    def targets_of_view(number: int) -> RowTargets:
        def predict(start: int, stop: int) -> TeacherTargets:
            people = torch.arange(start, stop)
            rows = number * len(store) + people
            own, places = drawn.take(rows), torch.arange(len(people))
            with torch.inference_mode():
                crops = crops_of(store, people, own, places, views.frame, workers.device)
                targets = online.targets(people.numpy(), own, views.frame, crops)
                modes = transform_modes(targets.modes_crop.double().cpu(), crop_to_stored[rows])
            return targets._replace(modes_crop=modes)

        return predict

    number = len(views.affine) // len(store)
    write_teacher_store(
        file,
        stored_size(store.input_size),
        len(store),
        *(targets_of_view(view) for view in range(number)),
        views=views if number > 1 else None,
        workers=workers,
        progress=progress,
    )


def open_online_teacher(
    spec: TeacherSpec, prepared: PreparedData, folder: Path, workers: Workers
) -> TargetSource:
    """Open the teacher of this folder, to predict targets at every training step."""
    return OnlineTeacher(
        load_teacher(spec, folder, workers.device),
        own=open_crop_store(Path(prepared.for_teacher().train)),
        student=open_crop_store(Path(prepared.train)),
    )


def _mark_ready(folder: Path, epoch: int, rows: list[Row], training: Path) -> None:
    """Write the record that makes the teacher ready."""
    record = {"epoch": epoch, "rows": rows, TRAINING: training.name}
    write_atomic(teacher_record_file(folder), json.dumps(record))
