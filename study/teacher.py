"""The study's teacher: trained or fine-tuned once, then asked once about every training person."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from models.movenet import weight_files
from models.refined_pose import RefinedPose
from study.batches import plain_batch
from study.checkpoint import Checkpoint, Checkpoints, best_row
from study.config import RANDOM, InputError, StudyConfig, to_plain
from study.crops import centre_affines
from study.distill import DistillTask
from study.loop import Row, run_stage, seed_of
from study.losses import joint_relation
from study.prepare import StudyData, cache_of, skeleton_of
from study.store import fingerprint, hash_file, write_teacher_store
from study.training import Recorder, Report, TrainingData, build_network, codec_of
from study.workers import Workers

NUM_MODES = 3
VERSION = 1
"""Raise it when training a teacher, or what is kept of it, changes."""
TARGETS = "targets.arrow"
EPOCHS = "epochs"
DONE = "teacher.json"


def teacher_folder(config: StudyConfig, data: StudyData) -> Path:
    """Where the teacher of these settings and data lies, for all studies under one ``storage``."""
    settings = to_plain(config)
    teacher = {**settings["teacher"], "init": _content_of(config.teacher.init)}
    parts = (VERSION, teacher, settings["distill"]["augment"], config.seed)
    return cache_of(config) / f"teacher-{fingerprint(*parts, data.fingerprint)}"


def _content_of(init: str) -> str | list[str]:
    """What tells the weights at this path from others: the hash of the file, or of MoveNet's."""
    path = Path(init)
    if path.suffix == ".json":
        try:
            return [hash_file(file) for file in weight_files(path)]
        except ValueError as error:
            raise InputError(str(error)) from None
    return hash_file(path) if path.is_file() else RANDOM


def is_ready(folder: Path) -> bool:
    """Whether the teacher is trained and has been asked about everyone."""
    return (folder / DONE).is_file()


def best_of(folder: Path) -> Checkpoint:
    """The teacher's best epoch by AP on held-out people."""
    last = Checkpoints(folder / EPOCHS).last()
    assert last is not None
    return Checkpoints(folder / EPOCHS).at(int(best_row(last.rows)["epoch"]))


def build_task(config: StudyConfig) -> DistillTask:
    """The teacher, learning from ground truth alone."""
    settings = dataclasses.replace(
        config.distill,
        heatmap=dataclasses.replace(config.distill.heatmap, kind="none"),
        structure=dataclasses.replace(config.distill.structure, kind="none"),
    )
    network, trained = build_network(config.teacher, config, seed_of(config.seed, "teacher"))
    codec = codec_of(config.teacher, config)
    return DistillTask(network, codec, skeleton_of(config), settings, trained)


def make_teacher(config: StudyConfig, data: StudyData, workers: Workers, report: Report) -> None:
    """Trains the teacher, or goes on where it was; then stores what it says of each person.

    Args:
        report: called on the first worker with each epoch's row.
    """
    folder = teacher_folder(config, data)
    ground = TrainingData.open(config, data, workers, teacher=None)
    task = build_task(config).to(workers.device)
    recorder = Recorder(Checkpoints(folder / EPOCHS), workers, report)
    recorder.replay()
    stage = ground.stage("teacher", config.teacher, config.distill.augment, seed=config.seed)
    run_stage(task, stage, recorder.resume(stage, task), workers, recorder.finish)
    if not recorder.rows:  # no epoch: the teacher as it came
        row: Row = {"stage": "teacher", "epoch": 0, "step": 0, "seconds": 0.0, "loss": 0.0}
        scores = ground.score(task.eval().estimator())
        row |= {f"val_{name}": value for name, value in scores.items()}
        recorder.finish(row, task, torch.optim.AdamW(task.parameters()))
    if workers.rank == 0:
        best = best_of(folder)
        task.load_state_dict(best.weights())
        _ask(task.estimator().eval(), ground, folder / TARGETS)
        aside = folder / f".{DONE}"
        aside.write_text(json.dumps({"epoch": best.epoch, "rows": best.rows}))
        aside.replace(folder / DONE)
    workers.wait()


def _ask(teacher: RefinedPose, ground: TrainingData, target: Path) -> None:
    """Stores the teacher's modes and relation of every training person."""
    store = ground.train
    shift = centre_affines(1, store.input_size)[0, :, 2].to(ground.workers.device)

    def rows(start: int, stop: int) -> Mapping[str, NDArray[Any]]:
        with torch.inference_mode():
            wanted = torch.arange(start, stop)
            batch = plain_batch(store, ground.skeleton, wanted, ground.workers.device)
            out = teacher.student.look(batch.crops)
            modes = teacher.codec.read_modes(out, NUM_MODES)
            modes[..., :2] -= shift
            relation = joint_relation(out.heatmaps, out.pyramid[-1])
        return {
            "modes_stored": modes.cpu().numpy(),
            "relation": relation.cpu().numpy().astype(np.float16),
        }

    write_teacher_store(target, len(store), rows)
