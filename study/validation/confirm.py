"""Is the winner real? The best trials and the baseline, trained again from new seeds.

Each run is a task of Ray, its training in the task itself or under Ray Train, as the trials'. A
run's checkpoints and its result lie in ``confirm/<trial>-<run>``; the result is written last and
whole, so that a run goes on where a kill stopped it and is never run twice. Nothing is pruned.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import torch
from ray.train import TrainingFailedError

from search_spaces.space import SearchSpace
from study.cache.crop_store import open_crop_store
from study.config.derived import seed_of
from study.data.coco_results import write_poses
from study.display import Display, confirm_line, confirm_panel
from study.errors import TrainingDiverged
from study.launch.context import StudyContext, brief, last_line
from study.launch.ray_train import join_workers, release_placement_group, run_under_train
from study.launch.watchdog import exit_on_stall, stall_reason
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
from study.trial import Trial, run_trial
from study.validation.bootstrap import (
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
from study.workers import Workers, configure_process


@dataclass(frozen=True)
class ConfirmRun:
    """One configuration and one seed."""

    trial: dict[str, Any]
    """The row of ``trials``."""
    run: int
    """From 0; equal runs of all configurations have equal seeds."""

    def folder(self, study_folder: Path) -> Path:
        """The folder of its checkpoints, its poses and its result."""
        return run_folder(study_folder, self.trial["trial"], self.run)

    def as_trial(self, plan: StudyContext) -> Trial:
        """What is trained."""
        return Trial(
            number=self.trial["trial"],
            config=trial_config(plan.config, self.trial),
            resolved=plan.resolved,
            data=plan.data.here(),
            folder=self.folder(Path(plan.folder)),
            targets=Path(plan.targets),
            own_seed=self.seed(plan),
        )

    def seed(self, plan: StudyContext) -> int:
        """A seed that no trial of the search had."""
        return seed_of(plan.config.seed, "confirm", self.run)


def confirm_study(
    plan: StudyContext, space: SearchSpace, launcher: str, concurrent: int, display: Display
) -> None:
    """The best trials and the baseline are run again, told in Parquet, and judged."""
    settings, folder = plan.config.confirm, Path(plan.folder)
    trials = chosen_trials(folder, settings)
    runs = [ConfirmRun(trial, run) for run in range(settings.seeds) for trial in trials]
    left = [run for run in runs if not run_result_file(run.folder(folder)).is_file()]
    if not runs:
        if table_folder(folder, CONFIRMED).is_dir():
            write_verdicts(folder, [], space)
        return
    done = f"; {len(runs) - len(left)} are there already" if len(left) < len(runs) else ""
    display.notify(
        f"confirming: {len(trials)} configurations from {settings.seeds} new seeds each{done}"
    )
    with display.watching(lambda: _status(folder, runs), confirm_panel, confirm_line):
        for run in _run_all(left, plan, launcher, concurrent):
            _write_row(run, plan, space)
    known = {(row["trial"], row["run"]) for row in read_runs(folder)}
    for run in runs:
        if (run.trial["trial"], run.run) not in known:
            _write_row(run, plan, space)
    write_verdicts(folder, _judge(plan, trials), space)


def _run_all(
    runs: Sequence[ConfirmRun], plan: StudyContext, launcher: str, concurrent: int
) -> Iterator[ConfirmRun]:
    """Gives each run when its result is there; some are under way at once."""
    settings = plan.config.trial
    if launcher == "inline":
        needs: dict[str, Any] = {"num_cpus": settings.cpus, "num_gpus": settings.gpus}
        task = ray.remote(run_inline)
    else:
        needs = {"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}}
        task = ray.remote(run_with_workers)
    retries = {"max_retries": settings.max_failures, "retry_exceptions": True}
    left = list(runs)
    pending: dict[Any, ConfirmRun] = {}
    while left or pending:
        while left and len(pending) < concurrent:
            run = left.pop(0)
            pending[task.options(**needs, **retries).remote(run, plan)] = run
        (ended,), _ = ray.wait(list(pending), num_returns=1)
        run = pending.pop(ended)
        try:
            ray.get(ended)
        except ray.exceptions.RayError as error:
            if is_full_disk(error):
                raise
            release_placement_group(plan.folder, _job_of(run))
            folder = run.folder(Path(plan.folder))
            write_result(folder, {"error": stall_reason(folder) or last_line(error)})
        yield run


def run_inline(run: ConfirmRun, plan: StudyContext) -> None:
    """The run in this process, its result on disk."""
    settings = plan.config.trial
    configure_process(settings.cpus)
    workers = Workers(torch.device("cuda" if settings.gpus else "cpu"))
    confirm(run, plan, workers, _end_with_driver(plan))


def run_with_workers(run: ConfirmRun, plan: StudyContext) -> None:
    """The run under Ray Train, its result on disk; this process only waits."""
    try:
        run_under_train(_worker, {"plan": plan, "run": run}, plan, _job_of(run))
    except TrainingFailedError as error:
        if is_full_disk(error):
            raise
        folder = run.folder(Path(plan.folder))
        write_result(folder, {"error": stall_reason(folder) or last_line(error)})


def _job_of(run: ConfirmRun) -> str:
    return f"confirm-{run.trial['trial']}-{run.run}"


def _worker(config: dict[str, Any]) -> None:
    run, plan = config["run"], config["plan"]
    workers = join_workers(config)
    check = _end_with_driver(plan)

    def tell(row: Row) -> None:
        check(row)
        ray.train.report(brief(row))

    confirm(run, plan, workers, tell)


def _end_with_driver(plan: StudyContext) -> Callable[[Row], None]:
    """Breaks a run whose driver was killed, which else went on beside its successor's.

    The owner of the Optuna study dies with the driver.
    """
    owner = ray.get_actor(plan.owner)
    return lambda row: ray.get(owner.num_finished.remote())


def confirm(
    run: ConfirmRun,
    plan: StudyContext,
    workers: Workers,
    tell: Callable[[Row], None] = lambda row: None,
) -> None:
    """Trains the run on from where it was, scores it on val, and keeps the result."""
    trial = run.as_trial(plan)
    if run_result_file(trial.folder).is_file():
        return
    timeout_s = plan.config.trial.timeout_s
    result: dict[str, Any] = {"error": stall_reason(trial.folder)}
    if not result["error"]:
        try:
            with exit_on_stall(trial.folder, workers.rank, timeout_s) as heartbeat:

                def report(row: Row) -> bool:
                    heartbeat()
                    tell(row)
                    return False

                run_trial(trial, workers, report)
                result = _score(trial, workers)
        except TrainingDiverged as error:
            result = {"error": str(error)}
    if workers.rank == 0:
        write_result(trial.folder, result)


def _score(trial: Trial, workers: Workers) -> dict[str, Any]:
    """The figures of the run's best epoch on val; its poses are on disk then."""
    checkpoints = Checkpoints(trial.folder)
    last = checkpoints.last()
    assert last is not None
    best = best_row(last.rows)
    config, resolved, skeleton = trial.config, trial.resolved, trial.resolved.skeleton
    checkpoint = checkpoints.at(int(best["epoch"]))
    estimator = load_estimator(
        checkpoint, config.student, config.distill, config.refine, config.trial, resolved
    ).to(workers.device)
    store, nms = open_crop_store(Path(trial.data.val)), config.data.val.oks_nms
    poses = detect_people(estimator, store, skeleton, workers, nms_threshold=nms)
    if workers.rank:
        return {}
    write_poses(poses, run_keypoints_file(trial.folder))
    truth, kind = Path(trial.data.val_truth), resolved.evaluation
    figures = average_precision(truth, poses, skeleton, kind)
    return {
        **{"error": None, "stage": best["stage"], "epoch": best["epoch"]},
        **{"search_ap": best["val_ap"], "duration_s": last.rows[-1]["seconds"]},
        **{name: value for name, value in figures.items() if not math.isnan(value)},
    }


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """The result is on disk, whole."""
    write_atomic(run_result_file(folder), json.dumps(result))


def _write_row(run: ConfirmRun, plan: StudyContext, space: SearchSpace) -> None:
    folder = Path(plan.folder)
    own = run.folder(folder)
    result = json.loads(run_result_file(own).read_text())
    keypoints = str(run_keypoints_file(own).relative_to(folder))
    row = {
        **{"study": plan.config.name, "trial": run.trial["trial"]},
        **{"control": run.trial["control"], "run": run.run, "seed": run.seed(plan)},
        **{"keypoints": None if result["error"] else keypoints},
        **result,
    }
    write_run(folder, row, space)


def _judge(plan: StudyContext, trials: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per configuration, the highest mean first; those with a failed run are left out."""
    config, folder = plan.config, Path(plan.folder)
    runs = [row for row in read_runs(folder) if row["run"] < config.confirm.seeds]
    by_trial = {
        trial["trial"]: sorted(
            (row for row in runs if row["trial"] == trial["trial"]), key=lambda row: row["run"]
        )
        for trial in trials
    }
    sound = [t for t in trials if not any(row["error"] for row in by_trial[t["trial"]])]
    if not sound:
        return []
    sound.sort(key=lambda t: -np.mean([row["ap"] for row in by_trial[t["trial"]]]))
    truth = Path(plan.data.val_truth)
    matched = [
        [
            match_people(
                truth,
                json.loads((folder / row["keypoints"]).read_text()),
                plan.resolved.skeleton,
                plan.resolved.evaluation,
            )
            for row in by_trial[t["trial"]]
        ]
        for t in sound
    ]
    rng = np.random.RandomState(config.seed % 2**32)
    scores = [[lambda w, m=m: weighted_ap(m, w) for m in seeds] for seeds in matched]
    drawn = resampled_scores(scores, len(matched[0][0].people), rng)
    roles = _roles(sound)
    verdicts = []
    for place, trial in enumerate(sound):
        low, high = interval(draws_of_mean(drawn[:, place], rng))
        ahead = draws_of_mean(drawn[:, 0] - drawn[:, place], rng)
        verdicts.append(
            {
                **{"study": config.name, "role": roles[place], "trial": trial["trial"]},
                **{"control": trial["control"], "num_seeds": config.confirm.seeds},
                "ap": float(np.mean([row["ap"] for row in by_trial[trial["trial"]]])),
                **{"ap_low": low, "ap_high": high},
                "winner_beats": probability_above_zero(ahead) if place else None,
            }
        )
    return verdicts


def _roles(ranked: Sequence[Row]) -> list[str]:
    roles = [WINNER]
    for trial in ranked[1:]:
        is_baseline = trial["control"] == BASELINE
        roles.append(BASELINE if is_baseline else OTHER if RUNNER_UP in roles else RUNNER_UP)
    return roles


def _status(folder: Path, runs: Sequence[ConfirmRun]) -> dict[str, Any]:
    """What the display shows, seen from the runs' folders."""
    running = []
    done = 0
    for run in runs:
        own = run.folder(folder)
        if run_result_file(own).is_file():
            done += 1
        elif own.is_dir():
            epoch = max((epoch for epoch, _ in epoch_folders(own)), default=0)
            running.append({"trial": run.trial["trial"], "run": run.run, "epoch": epoch})
    return {"states": {"COMPLETE": done}, "runs": len(runs), "running": running}
