"""After the search: the finalists scored on the validation people, and the last screen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from rich.console import Console
from rich.table import Table

from study.checkpoint import Checkpoints, trial_folder
from study.display import percent
from study.evaluation import Estimator, evaluate
from study.limits import PREDICTIONS
from study.prepare import StudyData, evaluation_of, skeleton_of
from study.results import PARAMS, read_final, read_reports, read_trials, written_trials
from study.schema import StudyConfig
from study.settings import BASELINE, trial_config
from study.store import open_crop_store
from study.teacher import best_of, load_teacher, teacher_folder
from study.training import load_estimator
from study.workers import Workers

TITLES = {
    "teacher": "teacher",
    "baseline": "baseline student (no teacher)",
    "best_distilled": "best distilled student",
    "best_refined": "best refined student",
    "winner": "winner",
}


def num_finished(study_folder: Path) -> int:
    """Trials whose evidence is complete; 0 in a folder that is no study yet."""
    return len(written_trials(study_folder))


def finalists(trials: pa.Table, reports: pa.Table) -> dict[str, dict[str, Any]]:
    """The report that each role stands for: the best epoch of its stage by AP on the search slice.

    Only trials that came to their end count; the baseline is no distilled student.
    """
    complete = {t["trial"]: t for t in trials.to_pylist() if t["state"] == "COMPLETE"}
    rows = [row for row in reports.to_pylist() if row["trial"] in complete]

    def best(wanted: list[dict[str, Any]]) -> dict[str, Any] | None:
        return max(wanted, key=lambda r: (r["val_ap"], -r["trial"], -r["epoch"]), default=None)

    baselines = {n for n, trial in complete.items() if trial["control"] == BASELINE}
    taught = [row for row in rows if row["trial"] not in baselines]
    roles = {
        "baseline": best([row for row in rows if row["trial"] in baselines]),
        "best_distilled": best([row for row in taught if row["stage"] == "distill"]),
        "best_refined": best([row for row in taught if row["stage"] == "refine"]),
        "winner": best(rows),
    }
    return {role: row for role, row in roles.items() if row is not None}


def score_finalists(
    config: StudyConfig, data: StudyData, study_folder: str
) -> list[dict[str, Any]]:
    """Rows for the ``final`` table: the teacher and each finalist, scored on val.

    Predictions are of training people alone: such a teacher has no row.
    """
    folder, data = Path(study_folder), data.here()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trials = read_trials(folder)
    by_number = {trial["trial"]: trial for trial in trials.to_pylist()}
    rows = []
    if config.teacher.name != PREDICTIONS:
        rows.append(_score_teacher(config, data, device))
    scored: dict[tuple[int, int], dict[str, Any]] = {}  # the winner is one of the others too
    for role, row in finalists(trials, read_reports(folder)).items():
        number, epoch = key = row["trial"], row["epoch"]
        if key not in scored:
            checkpoint = Checkpoints(trial_folder(folder, number)).at(epoch)
            estimator = load_estimator(trial_config(config, by_number[number]), checkpoint)
            scored[key] = {
                **{"role": role, "trial": number, "stage": checkpoint.stage, "epoch": epoch},
                **_score(estimator.to(device), config, data, device),
                "checkpoint": str(checkpoint.folder.relative_to(folder)),
            }
        rows.append({**scored[key], "role": role})
    return rows


def _score_teacher(config: StudyConfig, data: StudyData, device: torch.device) -> dict[str, Any]:
    folder = teacher_folder(config, data)
    best = best_of(folder) if config.teacher.epochs else None
    teacher = load_teacher(config, folder, device)
    return {
        **{"role": "teacher", "trial": None, "stage": "teacher"},
        "epoch": best.epoch if best else 0,
        **_score(teacher, config, data.for_teacher(), device),
        "checkpoint": str(best.folder) if best else config.teacher.init,
    }


def _score(
    estimator: Estimator, config: StudyConfig, data: StudyData, device: torch.device
) -> dict[str, Any]:
    store = open_crop_store(Path(data.val))
    scores = evaluate(
        estimator,
        store,
        Path(data.val_truth),
        skeleton_of(config),
        evaluation_of(config),
        Workers(device),
    )
    return {
        "study": config.name,
        "split": "val",
        "num_people": len(store),
        **scores,
    }


def show_finals(study_folder: Path, console: Console) -> None:
    """Prints what each finalist got on val, and the commands that go on from here."""
    rows = {row["role"]: row for row in read_final(study_folder).to_pylist()}
    table = Table(title="AP on val (x100)", title_justify="left")
    for heading in ("", "AP", "AP50", "AP75", "trial", "stage", "epoch"):
        table.add_column(heading, justify="left" if heading in ("", "stage") else "right")
    for role, title in TITLES.items():
        if role in rows:
            row = rows[role]
            trial = "-" if row["trial"] is None else str(row["trial"])
            table.add_row(
                title,
                percent(row["ap"]),
                percent(row["ap50"]),
                percent(row["ap75"]),
                trial,
                row["stage"],
                str(row["epoch"]),
                style="bold" if role == "winner" else None,
            )
    console.print(table)
    winner = rows["winner"]
    number = winner["trial"]
    trial = next(t for t in read_trials(study_folder).to_pylist() if t["trial"] == number)
    console.print(f"winner: trial {number}, {study_folder / winner['checkpoint']}")
    for key, value in trial.items():
        if key.startswith(PARAMS) and value is not None:
            shown = f"{value:.3g}" if isinstance(value, float) else value
            console.print(f"  {key.removeprefix(PARAMS)}={shown}")
    console.print(f"look closer:  python study/analyze.py {study_folder}")
    console.print(f"take it away: python study/export.py {study_folder}")
