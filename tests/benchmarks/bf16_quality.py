"""Whether training in bf16 costs AP: ``python tests/benchmarks/bf16_quality.py --storage DIR``.

The default student of the built-in study is trained, stage 1 and stage 2 by plain calls, from
several seeds: once in fp32 and once in bf16 from the same weights on the same batches, taught by
the study's one teacher. What is compared is a trial's objective, its best epoch's AP on the search
slice. Every result is kept in a JSON at once; the same command goes on where it was.
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

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from scipy import stats  # noqa: E402

from study.checkpoint import Checkpoints, best_row, trial_folder  # noqa: E402
from study.config import compose, with_values  # noqa: E402
from study.loop import Row  # noqa: E402
from study.prepare import StudyData, prepare_data  # noqa: E402
from study.schema import StudyConfig  # noqa: E402
from study.teacher import TARGETS, is_ready, make_teacher, teacher_folder  # noqa: E402
from study.trial import Trial, run_trial  # noqa: E402
from study.workers import Workers  # noqa: E402

PRECISIONS = ("fp32", "bf16")
WORST = -1.0
"""Points of AP that the bound must lie above."""
Results = dict[str, dict[str, float]]
"""By ``seed/precision``: ap, and the seconds of training."""


def say(row: Row) -> bool:
    print(f"  {row['stage']} epoch {row['epoch']}: AP {100 * row['val_ap']:.1f}", flush=True)
    return False


def train(
    trials: Path,
    seed: int,
    precision: str,
    config: StudyConfig,
    data: StudyData,
    workers: Workers,
) -> dict[str, float]:
    """AP and seconds of a trial, which goes on from its last checkpoint if it has one."""
    folder = trial_folder(trials / precision, seed)
    own = with_values(config, {"trial.precision": precision})
    run_trial(Trial(seed, own, data, folder, teacher_folder(config, data) / TARGETS), workers, say)
    last = Checkpoints(folder).last()
    assert last is not None
    return {"ap": best_row(last.rows)["val_ap"], "seconds": last.rows[-1]["seconds"]}


def run(config: StudyConfig, seeds: int, out: Path) -> Results:
    """The results of these seeds, those that ``out`` has not told yet trained and added to it."""
    results: Results = json.loads(out.read_text()) if out.exists() else {}
    trials = out.with_suffix("")
    torch.set_num_threads(max(1, int(config.trial.cpus)))
    workers = Workers(torch.device("cpu"))
    data = prepare_data(config, lambda _: lambda *_: None, print)
    if not is_ready(teacher_folder(config, data)):
        make_teacher(config, data, workers, say)
    for seed in range(seeds):
        for precision in PRECISIONS:
            key = f"{seed}/{precision}"
            if key not in results:
                print(f"{time.strftime('%H:%M:%S')} seed {seed} in {precision}", flush=True)
                results[key] = train(trials, seed, precision, config, data, workers)
                aside = out.with_name(f".{out.name}")
                aside.write_text(json.dumps(results, indent=1))
                aside.replace(out)
    return results


def show(results: Results, seeds: int) -> bool:
    """Prints all pairs and their mean difference; returns whether its bound is above WORST."""
    table = Table(title="AP on the search slice (x100), the same student trained in fp32 and bf16")
    for heading in ("seed", *PRECISIONS, "difference", "wall seconds, bf16 / fp32"):
        table.add_column(heading, justify="right")
    differences = []
    for seed in range(seeds):
        plain, rounded = (results[f"{seed}/{precision}"] for precision in PRECISIONS)
        difference = 100 * (rounded["ap"] - plain["ap"])
        differences.append(difference)
        table.add_row(
            str(seed),
            *(f"{100 * one['ap']:.2f}" for one in (plain, rounded)),
            f"{difference:+.2f}",
            f"{rounded['seconds'] / plain['seconds']:.2f}",
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
    parser = argparse.ArgumentParser(description="What training in bf16 does to AP.")
    parser.add_argument("--storage", type=Path, required=True, help="of the data and the teacher")
    parser.add_argument(
        "--out", type=Path, required=True, help="JSON file of the results; trials beside it"
    )
    parser.add_argument("--seeds", type=int, default=5, help="at least 2 (default 5)")
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="KEY=VALUE",
        help="of the study; another needs another --out",
    )
    options = parser.parse_args()
    seeds = max(2, options.seeds)
    config = compose([f"storage={options.storage.absolute()}", *options.settings])
    if not show(run(config, seeds, options.out), seeds):
        sys.exit(
            f"the bound must be above {WORST:g} points; bf16 costs AP, or --seeds are too few"
        )


if __name__ == "__main__":
    main()
