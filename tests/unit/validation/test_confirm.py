"""Confirming runs: their trials and seeds, their results, and the winner."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from search_spaces.space import load_space
from study.cache.prepare import PreparedData
from study.config.compose import from_plain, with_values
from study.config.derived import resolve, seed_of
from study.config.schema import ConfirmConfig, StudyConfig
from study.data.coco_results import write_poses
from study.deploy.select_trial import select_trial
from study.display import Display
from study.errors import TrainingDiverged
from study.launch import jobs
from study.launch.context import StudyContext
from study.launch.jobs import run_on_worker
from study.storage.paths import run_folder, run_keypoints_file, run_result_file
from study.storage.study_file import read_settings
from study.storage.tables import read_reports, read_trials, write_trial
from study.validation import confirm as confirming
from study.validation.bootstrap import resampled_scores
from study.validation.confirm import ConfirmRun, confirm_study, write_result
from study.validation.confirm_table import (
    chosen_trials,
    confirm_table,
    confirmed_winner,
    is_confirmed,
    read_runs,
    read_verdicts,
    verdict_sentence,
    write_verdicts,
)
from study.validation.finalists import finalists
from study.workers import Workers

ROOT = Path(__file__).resolve().parents[3]
SPACE = load_space("smoke")
OBJECTIVES = {0: 0.3, 1: 0.2, 2: 0.5, 3: 0.4, 4: 0.9}
"""By trial: 0 is the baseline, 1 the defaults, 4 was pruned."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A study whose search is over."""
    for number, objective in OBJECTIVES.items():
        control = {0: "baseline", 1: "defaults"}.get(number)
        row = {
            "study": "s",
            "trial": number,
            "control": control,
            "objective": objective,
            "state": "PRUNED" if number == 4 else "COMPLETE",
        }
        report = {"trial": number, "stage": "distill", "epoch": 1, "val_ap": objective}
        write_trial(tmp_path, row, [report], SPACE)
    return tmp_path


@pytest.fixture
def context(
    folder: Path,
    mini_config: StudyConfig,
    mini_data: PreparedData,
    monkeypatch: pytest.MonkeyPatch,
) -> StudyContext:
    quick = partial(resampled_scores, resamples=100)
    monkeypatch.setattr(confirming, "resampled_scores", quick)
    values = {"confirm.trials": 2, "confirm.seeds": 2, "data.num_val_images": 2}
    changed = with_values(mini_config, values)
    return StudyContext(changed, resolve(changed), mini_data, str(folder), "", "")


def numbers(folder: Path, trials: int) -> list[int]:
    chosen = chosen_trials(folder, ConfirmConfig(trials=trials, seeds=3))
    return [trial["trial"] for trial in chosen]


def test_best_complete_trials_and_the_baseline_are_chosen(folder: Path) -> None:
    assert numbers(folder, 2) == [2, 3, 0]
    assert numbers(folder, 9) == [2, 3, 1, 0]
    assert numbers(folder, 0) == []


def test_runs_of_equal_number_have_equal_new_seeds(
    context: StudyContext,
) -> None:
    trials = chosen_trials(Path(context.folder), context.config.confirm)
    seeds = [
        [ConfirmRun(context, trial, run).trial().seed for run in range(3)] for trial in trials
    ]
    assert seeds[0] == seeds[1] == seeds[2] and len(set(seeds[0])) == 3
    assert not set(seeds[0]) & {seed_of(context.config.seed, number) for number in range(1000)}


def test_baseline_is_trained_with_its_own_settings(context: StudyContext) -> None:
    trial = chosen_trials(Path(context.folder), context.config.confirm)[-1]
    config = ConfirmRun(context, trial, 0).trial().config
    assert (config.distill.epochs, config.refine.epochs) == (4, 0)
    assert config.distill.heatmap.kind == config.distill.structure.kind == "none"


def poses_of(context: StudyContext, shift: float) -> list[dict[str, Any]]:
    """Return the truth of val with each joint shifted by these pixels."""
    people = json.loads(Path(context.prepared.val_truth).read_text())["annotations"]
    return [
        {
            "image_id": person["image_id"],
            "category_id": 1,
            "score": 1.0,
            "keypoints": [
                number + shift if index % 3 < 2 else 1.0
                for index, number in enumerate(person["keypoints"])
            ],
        }
        for person in people
    ]


def keep_results(context: StudyContext, shifts: dict[int, float], ap: dict[int, float]) -> None:
    """Write the results of all runs of these trials."""
    for trial, shift in shifts.items():
        for run in range(context.config.confirm.seeds):
            own = run_folder(Path(context.folder), trial, run)
            write_poses(poses_of(context, shift), run_keypoints_file(own))
            result = {"error": None, "stage": "distill", "epoch": 1, "ap": ap[trial]}
            write_result(own, result)


def judged(context: StudyContext) -> list[dict[str, Any]]:
    confirm_study(context, SPACE, 1, Display("none"))
    return read_verdicts(Path(context.folder))


def test_highest_mean_wins_even_if_another_trial_won_the_search(
    context: StudyContext, folder: Path
) -> None:
    keep_results(context, {2: 9.0, 3: 0.0, 0: 40.0}, {2: 0.5, 3: 1.0, 0: 0.0})
    verdicts = judged(context)
    assert [(v["role"], v["trial"], v["ap"]) for v in verdicts] == [
        ("winner", 3, 1.0),
        ("runner_up", 2, 0.5),
        ("baseline", 0, 0.0),
    ]
    assert verdicts[0]["winner_beats"] is None and verdicts[2]["winner_beats"] > 0.99
    assert (verdicts[0]["ap_low"], verdicts[0]["ap_high"]) == (1.0, 1.0)
    assert confirmed_winner(folder) == 3
    roles = finalists(read_trials(folder), read_reports(folder), confirmed_winner(folder))
    assert roles["winner"]["trial"] == 3 and roles["best_distilled"]["trial"] == 2
    assert len(read_runs(folder)) == 6
    assert is_confirmed(folder, context.config.confirm)
    assert not is_confirmed(folder, dataclasses.replace(context.config.confirm, seeds=3))
    assert not is_confirmed(folder, dataclasses.replace(context.config.confirm, trials=3))


def test_configuration_with_a_failed_run_has_no_verdict(
    context: StudyContext, folder: Path
) -> None:
    keep_results(context, {2: 0.0, 3: 9.0, 0: 40.0}, {2: 1.0, 3: 0.5, 0: 0.0})
    write_result(folder / "confirm" / "2-1", {"error": "the loss must be finite"})
    assert [verdict["trial"] for verdict in judged(context)] == [3, 0]
    assert is_confirmed(folder, context.config.confirm)


def test_turned_off_again_the_winner_is_that_of_the_search(
    context: StudyContext, folder: Path
) -> None:
    keep_results(context, {2: 9.0, 3: 0.0, 0: 40.0}, {2: 0.5, 3: 1.0, 0: 0.0})
    judged(context)
    off = dataclasses.replace(context, config=with_values(context.config, {"confirm.trials": 0}))
    assert judged(off) == [] and confirmed_winner(folder) is None
    assert is_confirmed(folder, off.config.confirm)


def train_first(context: StudyContext, number: int, workers: Workers) -> Path:
    """Train the best configuration as a run of this number; return the run's result file."""
    best = chosen_trials(Path(context.folder), context.config.confirm)[0]
    run = ConfirmRun(context, best, number)
    run_on_worker(run, lambda columns: None, workers)
    return run_result_file(run.folder)


def test_finished_run_is_not_run_again(
    context: StudyContext, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("it was trained again")

    monkeypatch.setattr(jobs, "run_trial", refuse)
    keep_results(context, {2: 0.0}, {2: 1.0})
    result = run_result_file(run_folder(Path(context.folder), trial=2, run=1))
    before = result.read_text()
    assert train_first(context, 1, workers) == result
    assert result.read_text() == before


def test_diverged_run_keeps_its_reason(
    context: StudyContext, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(*_: object) -> None:
        raise TrainingDiverged("the loss must be finite")

    monkeypatch.setattr(jobs, "run_trial", diverge)
    monkeypatch.setattr(confirming.ray, "get_actor", lambda name: None)
    result = json.loads(train_first(context, 0, workers).read_text())
    assert result == {"error": "the loss must be finite"}


def row(role: str, trial: int, ap: float, beats: float | None) -> dict[str, Any]:
    bounds = {"ap_low": ap - 0.02, "ap_high": ap + 0.02, "num_seeds": 3}
    control = "baseline" if trial == 0 else None
    return {"role": role, "trial": trial, "control": control, "ap": ap, **bounds} | {
        "winner_beats": beats
    }


def test_verdict_sentence_has_both_probabilities(tmp_path: Path) -> None:
    rows = [row("winner", 7, 0.5, None), row("runner_up", 3, 0.48, 0.61)]
    rows.append(row("baseline", 0, 0.4, 0.9991))
    write_verdicts(tmp_path, rows, SPACE)
    screen = io.StringIO()
    Console(file=screen, width=80).print(confirm_table(read_verdicts(tmp_path)))
    assert "48.0 to 52.0" in screen.getvalue() and "from 3 new seeds" in screen.getvalue()
    assert verdict_sentence(rows) == (
        "Trial 7 beats the baseline with probability above 0.99 and the runner-up with "
        "probability 0.61."
    )


def test_baseline_can_win() -> None:
    rows = [row("winner", 0, 0.5, None), row("runner_up", 3, 0.48, 0.7)]
    assert verdict_sentence(rows) == (
        "Trial 0 (the baseline itself) beats the runner-up with probability 0.70."
    )


SETTINGS = (
    "data.num_train_images=48",
    "data.num_val_images=12",
    "data.input_size=[96,64]",
    "teacher.epochs=1",
    "distill.epochs=2",
    "refine.epochs=1",
    "search.trials=3",
    "search_space=smoke",
    "search.min_epochs=1",
    "display=plain",
    "name=s",
    "confirm.trials=1",
    "confirm.seeds=2",
)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["inline", "train"])
def test_study_killed_while_confirming_repeats_no_finished_run(
    launcher: str, tmp_path: Path
) -> None:
    script = str(ROOT / "study" / "tune.py")
    command = [sys.executable, script, f"storage={tmp_path}", *SETTINGS]
    command.append(f"trial.launcher={launcher}")
    folder = tmp_path / "s"
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 500
    while not list(folder.glob("confirm/*/result.json")):
        assert driver.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    time.sleep(3)  # runs of its Ray may still end
    before = {file: file.stat().st_mtime_ns for file in folder.glob("confirm/*/result.json")}
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "beats" in done.stdout
    if len(before) < 4:
        assert f"; {len(before)} are done already" in done.stdout
    assert {file: file.stat().st_mtime_ns for file in before} == before
    runs = read_runs(folder)
    assert len(runs) == 4 and {run["run"] for run in runs} == {0, 1}
    assert not any(run["error"] for run in runs)
    verdicts = read_verdicts(folder)
    for verdict in verdicts:
        own = [run["ap"] for run in runs if run["trial"] == verdict["trial"]]
        assert verdict["ap"] == pytest.approx(math.fsum(own) / 2)
    config = from_plain(read_settings(folder)["config"])
    assert select_trial(folder, config, None).trial["trial"] == verdicts[0]["trial"]
    again = subprocess.run(command, capture_output=True, text=True)
    assert "is finished" in again.stdout and "beats" in again.stdout
