"""Choose the finalists of a search, and score them on the people of val."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from study.cache.crop_store import open_crop_store
from study.cache.prepare import PreparedData
from study.config.derived import Resolved
from study.config.schema import PREDICTIONS, StudyConfig
from study.data.coco_results import write_poses
from study.metrics import ap_by_joint, ap_by_threshold, average_precision
from study.search.controls import BASELINE, trial_config
from study.search.objectives import costs_in, may_win, pareto_front
from study.storage.checkpoint import Checkpoints
from study.storage.paths import finalist_keypoints_file, trial_folder
from study.storage.tables import TableRow, read_reports, read_trials, written_trials
from study.teachers.adapters import TeacherSpec
from study.teachers.identity import teacher_folder
from study.teachers.make import best_of, load_teacher
from study.training.evaluation import Estimator, detect_people
from study.training.networks import load_estimator
from study.trial import teacher_spec
from study.validation.confirm_table import WINNER, confirmed_winner
from study.workers import Workers

TEACHER, BEST_DISTILLED, BEST_REFINED = "teacher", "best_distilled", "best_refined"
"""``role`` in ``final``, in addition to BASELINE and WINNER."""


def num_finished(study_folder: Path) -> int:
    """Count the trials in the tables; 0 before the study has begun."""
    return len(written_trials(study_folder))


def finalists(
    trials: pa.Table, reports: pa.Table, confirmed: int | None = None
) -> dict[str, dict[str, Any]]:
    """Choose the report of each role: the best epoch of its stage by AP on the search slice.

    Only complete trials count and, except for the baseline, only feasible ones. The winner is on
    the Pareto front. The baseline does not count as a distilled student.

    Args:
        confirmed: trial that won the confirming runs, or None.

    Returns:
        Rows of ``reports`` by role, without roles that no trial can have.
    """
    complete = {t["trial"]: t for t in trials.to_pylist() if t["state"] == "COMPLETE"}
    rows = [row for row in reports.to_pylist() if row["trial"] in complete]

    def best(candidates: list[dict[str, Any]]) -> dict[str, Any] | None:
        return max(candidates, key=lambda r: (r["val_ap"], -r["trial"], -r["epoch"]), default=None)

    baselines = {n for n, trial in complete.items() if trial["control"] == BASELINE}
    feasible = {number for number, trial in complete.items() if may_win(trial)}
    distilled = [row for row in rows if row["trial"] in feasible.difference(baselines)]
    winners = {trial["trial"] for trial in front_of(trials)} if confirmed is None else {confirmed}
    roles = {
        BASELINE: best([row for row in rows if row["trial"] in baselines]),
        BEST_DISTILLED: best([row for row in distilled if row["stage"] == "distill"]),
        BEST_REFINED: best([row for row in distilled if row["stage"] == "refine"]),
        WINNER: best([row for row in rows if row["trial"] in winners]),
    }
    return {role: row for role, row in roles.items() if row is not None}


def front_of(trials: pa.Table) -> list[dict[str, Any]]:
    """Return the Pareto front of the study's objectives, by descending AP."""
    rows = trials.to_pylist()
    return pareto_front(rows, costs_in(rows[0].get("objectives")) if rows else [])


@dataclasses.dataclass(frozen=True)
class FinalTables:
    """Rows of the three tables of the finalists on val."""

    final: list[TableRow]
    joints: list[TableRow]
    curves: list[TableRow]


@dataclasses.dataclass(frozen=True)
class _Score:
    """An estimator's poses on val and their AP; NaN where no person counts."""

    poses: list[dict[str, Any]]
    num_people: int
    figures: dict[str, float]
    by_joint: dict[str, float]
    by_threshold: dict[float, float]


def score_finalists(
    config: StudyConfig, resolved: Resolved, prepared: PreparedData, study_folder: str
) -> FinalTables:
    """Score the teacher and each finalist on val, and write their poses to ``results/``.

    A teacher of stored predictions has no row: they are of training people only.
    """
    folder, prepared = Path(study_folder), prepared.here()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trials = read_trials(folder)
    by_number = {trial["trial"]: trial for trial in trials.to_pylist()}
    finals = FinalTables([], [], [])
    nms, detections = config.data.val.oks_nms, config.data.val.detections
    if config.teacher.name != PREDICTIONS:
        row, score = _score_teacher(teacher_spec(config, resolved), prepared, nms, device)
        _add(finals, config.name, detections, folder, row, score)
    scores: dict[tuple[int, int], _Score] = {}  # the winner has another role, too
    for role, report in finalists(trials, read_reports(folder), confirmed_winner(folder)).items():
        number, epoch = key = report["trial"], report["epoch"]
        checkpoint = Checkpoints(trial_folder(folder, number)).at(epoch)
        if key not in scores:
            trial = trial_config(config, by_number[number])
            estimator = load_estimator(
                checkpoint, trial.student, trial.distill, trial.refine, trial.trial, resolved
            )
            scores[key] = _score(estimator.to(device), resolved, prepared, nms, device)
        row = {
            "role": role,
            "trial": number,
            "stage": checkpoint.stage,
            "epoch": epoch,
            "checkpoint": str(checkpoint.folder.relative_to(folder)),
        }
        _add(finals, config.name, detections, folder, row, scores[key])
    return finals


def _score_teacher(
    spec: TeacherSpec, prepared: PreparedData, nms: float, device: torch.device
) -> tuple[TableRow, _Score]:
    folder = teacher_folder(spec, prepared)
    best = best_of(folder) if spec.teacher.epochs else None
    teacher = load_teacher(spec, folder, device)
    row = {
        "role": TEACHER,
        "trial": None,
        "stage": "teacher",
        "epoch": best.epoch if best else 0,
        "checkpoint": str(best.folder) if best else spec.teacher.init,
    }
    return row, _score(teacher, spec.resolved, prepared.for_teacher(), nms, device)


def _score(
    estimator: Estimator,
    resolved: Resolved,
    prepared: PreparedData,
    nms: float,
    device: torch.device,
) -> _Score:
    """Predict and score the people of val, with OKS-NMS even on labeled boxes, as HRNet does."""
    store, skeleton = open_crop_store(Path(prepared.val)), resolved.skeleton
    poses = detect_people(estimator, store, skeleton, Workers(device), nms_threshold=nms)
    truth, kind = Path(prepared.val_truth), resolved.evaluation
    return _Score(
        poses=poses,
        num_people=len(store),
        figures=average_precision(truth, poses, skeleton, kind),
        by_joint=ap_by_joint(truth, poses, skeleton, kind),
        by_threshold=ap_by_threshold(truth, poses, skeleton, kind),
    )


def _add(
    finals: FinalTables,
    study: str,
    detections: str | None,
    folder: Path,
    row: TableRow,
    score: _Score,
) -> None:
    """Add the finalist's rows to the tables and write its poses."""
    keypoints = finalist_keypoints_file(folder, row["role"])
    write_poses(score.poses, keypoints)
    shared = {"study": study, "split": "val", **row}
    checkpoint = shared.pop("checkpoint")
    finals.final.append(
        {
            **shared,
            "num_people": score.num_people,
            "detections": detections,
            "checkpoint": checkpoint,
            "keypoints": str(keypoints.relative_to(folder)),
            **{name: _or_none(value) for name, value in score.figures.items()},
        }
    )
    for joint, ap in score.by_joint.items():
        finals.joints.append({**shared, "joint": joint, "ap": _or_none(ap)})
    for threshold, ap in score.by_threshold.items():
        finals.curves.append({**shared, "oks": threshold, "ap": _or_none(ap)})


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value
