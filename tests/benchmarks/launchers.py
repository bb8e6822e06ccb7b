"""Does a launcher slow trials down? ``python tests/benchmarks/launchers.py``, a few minutes

The same trials are trained four times, one after another: by a study under each launcher, by Tune
with ``run_trial`` as trainable, and by plain calls of ``run_trial`` in this process, without Ray.
All must reach the same AP, so that the times are those of the same training. A trial's overhead is
its time beyond the plain call's.
"""

from __future__ import annotations

import datetime
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
from benchmark import new_parser, new_table, prepare_quietly
from ray import tune
from rich.console import Console

from study import driver
from study.cache.prepare import PreparedData
from study.config.compose import compose
from study.config.derived import resolve
from study.config.schema import StudyConfig
from study.display import Display
from study.launch import ray_start, tune_adapter
from study.search.controls import trial_config
from study.search.stage import open_study
from study.storage.checkpoint import Row
from study.storage.paths import TARGETS
from study.storage.tables import read_trials
from study.teachers.identity import teacher_folder
from study.trial import Trial, run_trial, teacher_spec
from study.workers import Workers

SETTINGS = (
    "data.num_train_images=120",
    "data.num_val_images=20",
    "data.input_size=[96,64]",
    "teacher.epochs=1",
    "distill.epochs=6",
    "refine.epochs=2",
    "search_space=smoke",
    "search.pruner=none",
    "search.concurrent=1",
    "display=none",
)
LAUNCHERS = ("inline", "train")


def settings_of(storage: Path, launcher: str, trials: int) -> StudyConfig:
    return compose(
        [
            *SETTINGS,
            f"storage={storage}",
            f"name={launcher}",
            f"trial.launcher={launcher}",
            f"search.trials={trials}",
        ]
    )


def run_launched(config: StudyConfig) -> tuple[list[float], list[float]]:
    """Return each trial's seconds, from the end of the one before, and its AP."""
    started = []
    run_trials = tune_adapter.run_trials

    def record_start(*arguments: object) -> None:
        started.append(datetime.datetime.now())
        run_trials(*arguments)  # type: ignore[arg-type]

    with mock.patch("study.driver.run_trials", record_start):
        folder = driver.run_study(config)
    trials = open_study(folder, config.name).get_trials()
    ends = [trial.datetime_complete for trial in trials if trial.datetime_complete]
    seconds = [(b - a).total_seconds() for a, b in itertools.pairwise([started[0], *ends])]
    return seconds, [trial.value or 0.0 for trial in trials]


def run_plain(
    config: StudyConfig, data: PreparedData, folder: Path, rows: list[Row]
) -> tuple[list[float], list[float]]:
    """Return the same for these trials as plain calls."""
    torch.set_num_threads(max(1, int(config.trial.cpus)))
    seconds, aps = [], []
    targets = teacher_folder(teacher_spec(config, resolve(config)), data) / TARGETS
    for row in rows:
        reports: list[Row] = []

        def report(epoch: Row, reports: list[Row] = reports) -> bool:
            reports.append(epoch)
            return False

        number = int(row["trial"])
        changed = trial_config(config, row)
        out = folder / str(number)
        trial = Trial(number, changed, resolve(changed), data, out, targets)
        start = time.perf_counter()
        run_trial(trial, Workers(torch.device("cpu")), report)
        seconds.append(time.perf_counter() - start)
        aps.append(max(epoch["val_ap"] for epoch in reports))
    return seconds, aps


def run_bare(
    config: StudyConfig, data: PreparedData, folder: Path, rows: list[Row]
) -> tuple[list[float], list[float]]:
    """Return the same for these trials under Tune alone: a process each, no owner, no search."""

    def trainable(values: dict[str, int]) -> None:
        (_,), (ap,) = run_plain(config, data, folder, [rows[values["row"]]])
        tune.report({"ap": ap, "ended": time.time(), "row": values["row"]})

    with ray_start.ray_started(Display(config.display)):
        tuner = tune.Tuner(
            tune.with_resources(trainable, {"cpu": config.trial.cpus}),
            param_space={"row": tune.grid_search(list(range(len(rows))))},
            tune_config=tune.TuneConfig(max_concurrent_trials=1),
            run_config=tune.RunConfig(storage_path=str(folder / "tune"), verbose=0),
        )
        started = time.time()
        results = sorted((result.metrics or {} for result in tuner.fit()), key=lambda m: m["row"])
    ends = [result["ended"] for result in results]
    seconds = [b - a for a, b in itertools.pairwise([started, *ends])]
    return seconds, [result["ap"] for result in results]


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--trials", type=int, default=4, help="at least 3 (default 4)")
    trials = max(3, parser.parse_args().trials)
    with tempfile.TemporaryDirectory() as temporary:
        storage = Path(temporary)
        configs = {name: settings_of(storage, name, trials) for name in LAUNCHERS}
        inline = configs["inline"]
        data = prepare_quietly(inline, resolve(inline), lambda _: None)
        runs = {name: run_launched(config) for name, config in configs.items()}
        rows = read_trials(storage / "inline").to_pylist()
        plain = run_plain(configs["inline"], data, storage / "plain", rows)
        runs["bare Tune"] = run_bare(configs["inline"], data, storage / "bare", rows)
    for name, (_, aps) in runs.items():
        if aps != plain[1]:
            sys.exit(
                f"all ways must reach the same AP, got {aps} with {name} and {plain[1]} by plain "
                "calls"
            )
    show(plain[0], {name: seconds for name, (seconds, _) in runs.items()})


def show(plain: list[float], launched: dict[str, list[float]]) -> None:
    """Print the first trial, which starts processes, and the mean of the others."""
    table = new_table(
        f"seconds per trial, {len(plain)} trials, one at a time, one CPU each",
        "",
        "first",
        "further",
        "overhead, first",
        "overhead, further",
        "ratio",
    )
    rest = statistics.mean(plain[1:])
    table.add_row("plain function", f"{plain[0]:.1f}", f"{rest:.1f}", "-", "-", "1.00")
    for name, seconds in launched.items():
        mean = statistics.mean(seconds[1:])
        over = [a - b for a, b in zip(seconds, plain, strict=True)]
        table.add_row(
            f"trial.launcher={name}" if name in LAUNCHERS else name,
            f"{seconds[0]:.1f}",
            f"{mean:.1f}",
            f"{over[0]:+.1f}",
            f"{statistics.mean(over[1:]):+.1f}",
            f"{sum(seconds[1:]) / sum(plain[1:]):.2f}",
        )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
