"""Confirm the winner: train the best trials and the baseline again, from new seeds.

Each run is a Ray job like a trial, but never pruned. Its checkpoints and its result are in
``confirm/<trial>-<run>``. The result is written last and atomically, so that a killed run resumes
and a finished one is never repeated.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray

from search_spaces.space import SearchSpace
from study.cache.crop_store import open_crop_store
from study.config.derived import seed_of
from study.data.coco_results import write_poses
from study.display import Display, confirm_line, confirm_panel
from study.launch.context import StudyContext
from study.launch.jobs import last_line, run_all
from study.launch.watchdog import stall_reason
from study.metrics import average_precision
from study.search.controls import BASELINE, trial_config
from study.storage.checkpoint import Checkpoints, Row, best_row
from study.storage.files import is_full_disk, write_atomic
from study.storage.paths import (
    epoch_folders,
    run_folder,
    run_keypoints_file,
    run_result_file,
    table_folder,
)
from study.training.evaluation import detect_people
from study.training.networks import load_estimator
from study.trial import Trial
from study.validation.bootstrap import (
    Matches,
    draws_of_mean,
    interval,
    match_people,
    probability_above_zero,
    resampled_scores,
    weighted_ap,
)
from study.validation.confirm_table import (
    CONFIRMED,
    OTHER,
    RUNNER_UP,
    WINNER,
    chosen_trials,
    read_runs,
    write_run,
    write_verdicts,
)
from study.workers import Workers


@dataclass(frozen=True)
class ConfirmRun:
    """One configuration trained from one new seed, as a job."""

    context: StudyContext
    row: Mapping[str, Any]
    """The trial's row in ``trials``."""
    run: int
    """From 0; runs of the same number have the same seed in all configurations."""

    @property
    def name(self) -> str:
        return f"confirm-{self.row['trial']}-{self.run}"

    @property
    def folder(self) -> Path:
        """Folder of the run's checkpoints, poses and result."""
        return run_folder(Path(self.context.folder), self.row["trial"], self.run)

    @property
    def seed(self) -> int:
        """Seed that no trial of the search has."""
        return seed_of(self.context.config.seed, "confirm", self.run)

    @property
    def is_done(self) -> bool:
        return run_result_file(self.folder).is_file()

    def trial(self) -> Trial:
        """Return the trial to train, with its data on this machine."""
        context = self.context
        return Trial(
            number=self.row["trial"],
            config=trial_config(context.config, self.row),
            resolved=context.resolved,
            prepared=context.prepared.here(),
            folder=self.folder,
            targets=Path(context.targets),
            own_seed=self.seed,
        )

    def open_record(self, *, is_first: bool) -> RunRecord:
        """Open the run's record on a worker."""
        return RunRecord(self, is_first=is_first)


class RunRecord:
    """The record of a confirming run: its result file, written by the first worker."""

    def __init__(self, run: ConfirmRun, *, is_first: bool) -> None:
        self.run = run
        self.is_first = is_first
        self.owner: Any = None

    def is_closed(self) -> bool:
        """Return whether the run has a result."""
        return self.run.is_done

    def start(self, trial: Trial, workers: Workers) -> None:
        """Connect to the owner of the Optuna study, which dies with the driver."""
        self.owner = ray.get_actor(self.run.context.owner)

    def report(self, row: Row) -> bool:
        """Abort the run if its driver was killed: the resumed study has a run of its own."""
        ray.get(self.owner.num_finished.remote())
        return False

    def finish(self, trial: Trial, workers: Workers) -> None:
        """Score the run on val and write its result."""
        result = _score(trial, workers)
        if self.is_first:
            write_result(self.run.folder, result)

    def fail(self, reason: str) -> None:
        """Write the reason as the run's result."""
        if self.is_first:
            write_result(self.run.folder, {"error": reason})

    def record_error(self, error: Exception) -> None:
        """Do nothing: only the last try's error is kept."""

    def give_up(self, error: Exception) -> None:
        """Write the error as the run's result; raise it if the disk is full."""
        if is_full_disk(error):
            raise error
        self.fail(stall_reason(self.run.folder) or last_line(error))


def confirm_study(
    context: StudyContext, space: SearchSpace, concurrent: int, display: Display
) -> None:
    """Train the best trials and the baseline again, and write the tables of runs and verdicts."""
    settings, folder = context.config.confirm, Path(context.folder)
    trials = chosen_trials(folder, settings)
    runs = [ConfirmRun(context, row, run) for run in range(settings.seeds) for row in trials]
    if not runs:
        if table_folder(folder, CONFIRMED).is_dir():
            write_verdicts(folder, [], space)
        return
    left = [run for run in runs if not run.is_done]
    done = f"; {len(runs) - len(left)} are done already" if len(left) < len(runs) else ""
    display.notify(
        f"confirming: {len(trials)} configurations from {settings.seeds} new seeds each{done}"
    )
    with display.watching(lambda: _status(runs), confirm_panel, confirm_line):
        for run in run_all(left, context, concurrent):
            _write_row(run, space)
    written = {(row["trial"], row["run"]) for row in read_runs(folder)}
    for run in runs:
        if (run.row["trial"], run.run) not in written:
            _write_row(run, space)
    write_verdicts(folder, _judge(context, trials), space)


def _score(trial: Trial, workers: Workers) -> dict[str, Any]:
    """Score the run's best epoch on val and write its poses; other workers return nothing."""
    checkpoints = Checkpoints(trial.folder)
    last = checkpoints.require_last()
    best = best_row(last.rows)
    config, resolved, skeleton = trial.config, trial.resolved, trial.resolved.skeleton
    checkpoint = checkpoints.at(int(best["epoch"]))
    estimator = load_estimator(
        checkpoint, config.student, config.distill, config.refine, config.trial, resolved
    ).to(workers.device)
    store, nms = open_crop_store(Path(trial.prepared.val)), config.data.val.oks_nms
    poses = detect_people(estimator, store, skeleton, workers, nms_threshold=nms)
    if workers.rank:
        return {}
    write_poses(poses, run_keypoints_file(trial.folder))
    truth = Path(trial.prepared.val_truth)
    figures = average_precision(truth, poses, skeleton, resolved.evaluation)
    return {
        "error": None,
        "stage": best["stage"],
        "epoch": best["epoch"],
        "search_ap": best["val_ap"],
        "duration_s": last.rows[-1]["seconds"],
        **{name: value for name, value in figures.items() if not math.isnan(value)},
    }


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Write a run's result atomically."""
    write_atomic(run_result_file(folder), json.dumps(result))


def _write_row(run: ConfirmRun, space: SearchSpace) -> None:
    study_folder = Path(run.context.folder)
    result = json.loads(run_result_file(run.folder).read_text())
    keypoints = str(run_keypoints_file(run.folder).relative_to(study_folder))
    row = {
        "study": run.context.config.name,
        "trial": run.row["trial"],
        "control": run.row["control"],
        "run": run.run,
        "seed": run.seed,
        "keypoints": None if result["error"] else keypoints,
        **result,
    }
    write_run(study_folder, row, space)


def _judge(context: StudyContext, trials: Sequence[Row]) -> list[Row]:
    """Return a verdict per configuration, by descending mean AP, without those that failed."""
    config, folder = context.config, Path(context.folder)
    runs = _runs_by_trial(folder, trials, config.confirm.seeds)
    sound = [t for t in trials if not any(row["error"] for row in runs[t["trial"]])]
    if not sound:
        return []
    mean_ap = {t["trial"]: np.mean([row["ap"] for row in runs[t["trial"]]]) for t in sound}
    sound.sort(key=lambda t: -mean_ap[t["trial"]])
    matches = [[_matches_of(row, context) for row in runs[t["trial"]]] for t in sound]
    rng = np.random.RandomState(config.seed % 2**32)
    scores = [[lambda w, m=m: weighted_ap(m, w) for m in seeds] for seeds in matches]
    drawn = resampled_scores(scores, len(matches[0][0].people), rng)
    roles = _roles(sound)
    verdicts = []
    for rank, trial in enumerate(sound):
        low, high = interval(draws_of_mean(drawn[:, rank], rng))
        lead = draws_of_mean(drawn[:, 0] - drawn[:, rank], rng)
        verdicts.append(
            {
                "study": config.name,
                "role": roles[rank],
                "trial": trial["trial"],
                "control": trial["control"],
                "num_seeds": config.confirm.seeds,
                "ap": float(mean_ap[trial["trial"]]),
                "ap_low": low,
                "ap_high": high,
                "winner_beats": probability_above_zero(lead) if rank else None,
            }
        )
    return verdicts


def _runs_by_trial(folder: Path, trials: Sequence[Row], seeds: int) -> dict[int, list[Row]]:
    """Return the rows of each trial's first ``seeds`` runs, by run."""
    runs = sorted(read_runs(folder), key=lambda row: row["run"])
    return {
        trial["trial"]: [
            row for row in runs if row["trial"] == trial["trial"] and row["run"] < seeds
        ]
        for trial in trials
    }


def _matches_of(row: Row, context: StudyContext) -> Matches:
    poses = json.loads((Path(context.folder) / row["keypoints"]).read_text())
    truth, resolved = Path(context.prepared.val_truth), context.resolved
    return match_people(truth, poses, resolved.skeleton, resolved.evaluation)


def _roles(ranked: Sequence[Row]) -> list[str]:
    """Return the role of each configuration, the winner first."""
    roles = [WINNER]
    for trial in ranked[1:]:
        if trial["control"] == BASELINE:
            roles.append(BASELINE)
        else:
            roles.append(OTHER if RUNNER_UP in roles else RUNNER_UP)
    return roles


def _status(runs: Sequence[ConfirmRun]) -> dict[str, Any]:
    """Return what the display shows, from the runs' folders."""
    running = []
    done = 0
    for run in runs:
        if run.is_done:
            done += 1
        elif run.folder.is_dir():
            epoch = max((epoch for epoch, _ in epoch_folders(run.folder)), default=0)
            running.append({"trial": run.row["trial"], "run": run.run, "epoch": epoch})
    return {"states": {"COMPLETE": done}, "runs": len(runs), "running": running}
