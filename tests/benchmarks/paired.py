"""Whether a setting costs AP: ``paired.py trial.precision fp32 bf16 --storage DIR --out FILE``.

The default student of the built-in study is trained, stage 1 and stage 2 by plain calls, from
several seeds, each time with either value of the setting, from the same weights on the same
batches, taught by the study's one teacher. What is compared is the AP of a trial's best epoch by
its objective, on all people held out: the mean of that on the search slice and that on val, by
their numbers of people, for fewer people would be noise. Every result is kept in a JSON at once;
the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import torch
from rich.console import Console
from rich.table import Table
from scipy import stats

from study.cache.crop_store import open_crop_store
from study.cache.prepare import PreparedData, prepare_data
from study.config.compose import compose, with_values
from study.config.derived import resolve
from study.config.schema import StudyConfig
from study.storage.checkpoint import Checkpoints, Row, best_row
from study.storage.paths import TARGETS, trial_folder
from study.teachers.make import is_ready, make_teacher, teacher_folder
from study.training.evaluation import evaluate
from study.training.networks import load_estimator
from study.trial import Trial, run_trial, teacher_spec
from study.workers import Workers, configure_process

WORST = -1.0
"""Points of AP that the bound must lie above."""
Results = dict[str, dict[str, float]]
"""By ``seed/value``: ap, and the seconds of training."""


def notify(row: Row) -> bool:
    print(f"  {row['stage']} epoch {row['epoch']}: AP {100 * row['val_ap']:.1f}", flush=True)
    return False


def train(
    folder: Path,
    seed: int,
    own: StudyConfig,
    targets: Path,
    data: PreparedData,
    workers: Workers,
) -> dict[str, float]:
    """AP and seconds of a trial, which goes on from its last checkpoint if it has one."""
    run_trial(Trial(seed, own, resolve(own), data, folder, targets), workers, notify)
    last = Checkpoints(folder).last()
    assert last is not None
    best = best_row(last.rows)
    estimator = load_estimator(
        Checkpoints(folder).at(int(best["epoch"])),
        own.student,
        own.distill,
        own.refine,
        own.trial,
        resolve(own),
    )
    on_val = evaluate(
        estimator,
        open_crop_store(Path(data.val)),
        Path(data.val_truth),
        resolve(own).skeleton,
        resolve(own).evaluation,
        workers,
    )["ap"]
    _, search, val = data.num_people
    ap = (search * best["val_ap"] + val * on_val) / (search + val)
    return {"ap": ap, "seconds": last.rows[-1]["seconds"]}


def run(config: StudyConfig, setting: str, values: list[str], seeds: int, out: Path) -> Results:
    """The results of these seeds, those that ``out`` has not told yet trained and added to it."""
    results: Results = json.loads(out.read_text()) if out.exists() else {}
    trials = out.with_suffix("")
    configure_process(config.trial.cpus)
    workers = Workers(torch.device("cpu"))
    resolved = resolve(config)
    spec = teacher_spec(config, resolved)
    data = prepare_data(config.data, resolved, lambda _: lambda *_: None, print)
    if not is_ready(teacher_folder(spec, data)):
        make_teacher(spec, config.student, data, workers, notify)
    targets = teacher_folder(spec, data) / TARGETS
    for seed in range(seeds):
        for value in values:
            key = f"{seed}/{value}"
            if key not in results:
                print(f"{time.strftime('%H:%M:%S')} seed {seed}, {setting}={value}", flush=True)
                own = with_values(config, {setting: value})
                folder = trial_folder(trials / value, seed)
                results[key] = train(folder, seed, own, targets, data, workers)
                aside = out.with_name(f".{out.name}")
                aside.write_text(json.dumps(results, indent=1))
                aside.replace(out)
    return results


def show(results: Results, setting: str, values: list[str], seeds: int) -> bool:
    """Prints all pairs and their mean difference; returns whether its bound is above WORST."""
    table = Table(title=f"AP on held-out people (x100) by {setting}")
    for heading in ("seed", *values, "difference", f"wall seconds, {values[1]} / {values[0]}"):
        table.add_column(heading, justify="right")
    differences = []
    for seed in range(seeds):
        first, second = (results[f"{seed}/{value}"] for value in values)
        difference = 100 * (second["ap"] - first["ap"])
        differences.append(difference)
        table.add_row(
            str(seed),
            *(f"{100 * one['ap']:.2f}" for one in (first, second)),
            f"{difference:+.2f}",
            f"{second['seconds'] / first['seconds']:.2f}",
        )
    console = Console(width=100)
    console.print(table)
    mean = statistics.mean(differences)
    error = statistics.stdev(differences) / seeds**0.5
    bound = mean - float(stats.t.ppf(0.95, seeds - 1)) * error
    console.print(
        f"mean difference {mean:+.2f} points, standard error {error:.2f}; with 95 % confidence "
        f"above {bound:+.2f} (Student's t, one-sided, {seeds} pairs)"
    )
    return bound > WORST


def main() -> None:
    parser = argparse.ArgumentParser(description="What a setting does to AP, over paired seeds.")
    parser.add_argument("setting", help="config path, such as trial.precision or teacher.mode")
    parser.add_argument("values", nargs=2, help="what is compared: the control, and the other")
    parser.add_argument("--storage", type=Path, required=True, help="of the data and the teacher")
    parser.add_argument(
        "--out", type=Path, required=True, help="JSON file of the results; trials beside it"
    )
    parser.add_argument("--seeds", type=int, default=5, help="at least 2 (default 5)")
    parser.add_argument(
        "--with",
        dest="settings",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="further settings of the study; others need another --out",
    )
    options = parser.parse_args()
    seeds = max(2, options.seeds)
    config = compose([f"storage={options.storage.absolute()}", *options.settings])
    setting, values = options.setting, options.values
    results = run(config, setting, values, seeds, options.out)
    if not show(results, setting, values, seeds):
        sys.exit(
            f"the bound must be above {WORST:g} points: {setting}={values[1]} costs AP, or "
            "--seeds are too few"
        )


if __name__ == "__main__":
    main()
