"""After the search: the finalists scored on the validation people, and the last screen."""

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
from study.teachers.make import best_of, load_teacher, teacher_folder
from study.training.evaluation import Estimator, detect_people
from study.training.networks import load_estimator
from study.trial import teacher_spec
from study.validation.confirm_table import confirmed_winner
from study.workers import Workers


def num_finished(study_folder: Path) -> int:
    """Trials whose evidence is complete; 0 in a folder that is no study yet."""
    return len(written_trials(study_folder))


def finalists(
    trials: pa.Table, reports: pa.Table, confirmed: int | None = None
) -> dict[str, dict[str, Any]]:
    """The report that each role stands for: the best epoch of its stage by AP on the search slice.

    Only trials that came to their end count, and but for the baseline only those that keep to the
    constraints; the winner is on the Pareto front. The baseline is no distilled student.

    Args:
        confirmed: the trial that won when the best were trained again; None if none was.
    """
    complete = {t["trial"]: t for t in trials.to_pylist() if t["state"] == "COMPLETE"}
    rows = [row for row in reports.to_pylist() if row["trial"] in complete]

    def best(wanted: list[dict[str, Any]]) -> dict[str, Any] | None:
        return max(wanted, key=lambda r: (r["val_ap"], -r["trial"], -r["epoch"]), default=None)

    baselines = {n for n, trial in complete.items() if trial["control"] == BASELINE}
    able = {number for number, trial in complete.items() if may_win(trial)}
    taught = [row for row in rows if row["trial"] in able.difference(baselines)]
    winners = {trial["trial"] for trial in front_of(trials)} if confirmed is None else {confirmed}
    roles = {
        "baseline": best([row for row in rows if row["trial"] in baselines]),
        "best_distilled": best([row for row in taught if row["stage"] == "distill"]),
        "best_refined": best([row for row in taught if row["stage"] == "refine"]),
        "winner": best([row for row in rows if row["trial"] in winners]),
    }
    return {role: row for role, row in roles.items() if row is not None}


def front_of(trials: pa.Table) -> list[dict[str, Any]]:
    """The trials that no other one beats in what the search was to reach, the highest AP first."""
    rows = trials.to_pylist()
    return pareto_front(rows, costs_in(rows[0].get("objectives")) if rows else [])


@dataclasses.dataclass(frozen=True)
class Finals:
    """What the finalists got on val, as rows of the final tables."""

    final: list[TableRow]
    joints: list[TableRow]
    curves: list[TableRow]


@dataclasses.dataclass(frozen=True)
class _Judged:
    """What one estimator found on val, and what that is worth; NaN where it is about nobody."""

    poses: list[dict[str, Any]]
    num_people: int
    figures: dict[str, float]
    by_joint: dict[str, float]
    by_threshold: dict[float, float]


def score_finalists(
    config: StudyConfig, resolved: Resolved, data: PreparedData, study_folder: str
) -> Finals:
    """The teacher and each finalist, scored on val; their poses lie in ``results/`` then.

    Predictions are of training people alone: such a teacher has no row.
    """
    folder, data = Path(study_folder), data.here()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trials = read_trials(folder)
    by_number = {trial["trial"]: trial for trial in trials.to_pylist()}
    finals = Finals([], [], [])
    nms, detections = config.data.val.oks_nms, config.data.val.detections
    if config.teacher.name != PREDICTIONS:
        row, judged = _judge_teacher(teacher_spec(config, resolved), data, nms, device)
        _add(finals, config.name, detections, folder, row, judged)
    known: dict[tuple[int, int], _Judged] = {}  # the winner is one of the others too
    for role, report in finalists(trials, read_reports(folder), confirmed_winner(folder)).items():
        number, epoch = key = report["trial"], report["epoch"]
        checkpoint = Checkpoints(trial_folder(folder, number)).at(epoch)
        if key not in known:
            trial = trial_config(config, by_number[number])
            estimator = load_estimator(
                checkpoint, trial.student, trial.distill, trial.refine, trial.trial, resolved
            )
            known[key] = _judge(estimator.to(device), resolved, data, nms, device)
        row = {"role": role, "trial": number, "stage": checkpoint.stage, "epoch": epoch}
        row["checkpoint"] = str(checkpoint.folder.relative_to(folder))
        _add(finals, config.name, detections, folder, row, known[key])
    return finals


def _judge_teacher(
    spec: TeacherSpec, data: PreparedData, nms: float, device: torch.device
) -> tuple[TableRow, _Judged]:
    folder = teacher_folder(spec, data)
    best = best_of(folder) if spec.teacher.epochs else None
    teacher = load_teacher(spec, folder, device)
    row = {
        **{"role": "teacher", "trial": None, "stage": "teacher"},
        "epoch": best.epoch if best else 0,
        "checkpoint": str(best.folder) if best else spec.teacher.init,
    }
    return row, _judge(teacher, spec.resolved, data.for_teacher(), nms, device)


def _judge(
    estimator: Estimator,
    resolved: Resolved,
    data: PreparedData,
    nms: float,
    device: torch.device,
) -> _Judged:
    """The official figures: also of ground-truth boxes HRNet's come after OKS-NMS."""
    store, skeleton = open_crop_store(Path(data.val)), resolved.skeleton
    poses = detect_people(estimator, store, skeleton, Workers(device), nms_threshold=nms)
    truth, kind = Path(data.val_truth), resolved.evaluation
    return _Judged(
        poses,
        len(store),
        figures=average_precision(truth, poses, skeleton, kind),
        by_joint=ap_by_joint(truth, poses, skeleton, kind),
        by_threshold=ap_by_threshold(truth, poses, skeleton, kind),
    )


def _add(
    finals: Finals,
    study: str,
    detections: str | None,
    folder: Path,
    row: TableRow,
    judged: _Judged,
) -> None:
    """The finalist's rows are in the tables, and its poses on disk."""
    keypoints = finalist_keypoints_file(folder, row["role"])
    write_poses(judged.poses, keypoints)
    who = {"study": study, "split": "val", **row}
    checkpoint = who.pop("checkpoint")
    finals.final.append(
        {
            **who,
            "num_people": judged.num_people,
            "detections": detections,
            "checkpoint": checkpoint,
            "keypoints": str(keypoints.relative_to(folder)),
            **{name: _or_none(value) for name, value in judged.figures.items()},
        }
    )
    for joint, ap in judged.by_joint.items():
        finals.joints.append({**who, "joint": joint, "ap": _or_none(ap)})
    for threshold, ap in judged.by_threshold.items():
        finals.curves.append({**who, "oks": threshold, "ap": _or_none(ap)})


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value
