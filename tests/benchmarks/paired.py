"""Does a setting cost AP? ``paired.py trial.precision fp32 bf16 --storage DIR --out FILE``

The default student of the built-in study is trained, stage 1 and stage 2 by plain calls, from
several seeds and with both values of the setting: from the same weights, on the same batches, with
the same teacher. Compared is the AP of the trial's best epoch on all held-out people: the mean of
search slice and val, weighted by their numbers of people, since fewer people would be too noisy.
Every result is saved to a JSON file at once; the same command resumes.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

import torch
from benchmark import new_parser, new_table, prepare_quietly, print_row, trained_teacher
from rich.console import Console
from scipy import stats

from study.cache.crop_store import open_crop_store
from study.cache.prepare import PreparedData
from study.config.compose import compose, with_values
from study.config.derived import resolve
from study.config.schema import StudyConfig
from study.storage.checkpoint import Checkpoints, best_row
from study.storage.files import write_atomic
from study.storage.paths import TARGETS, trial_folder
from study.training.evaluation import evaluate
from study.training.networks import load_estimator
from study.trial import Trial, run_trial
from study.workers import Workers, configure_process

WORST = -1.0
"""Points of AP that the lower bound of the difference must exceed."""
Results = dict[str, dict[str, float]]
"""``ap``, and the ``seconds`` of training, by ``seed/value``."""


def train(
    folder: Path,
    seed: int,
    config: StudyConfig,
    targets: Path,
    data: PreparedData,
    workers: Workers,
) -> dict[str, float]:
    """Train a trial, from its last checkpoint if there is one, and return AP and seconds."""
    resolved = resolve(config)
    run_trial(Trial(seed, config, resolved, data, folder, targets), workers, print_row)
    last = Checkpoints(folder).last()
    assert last is not None
    best = best_row(last.rows)
    estimator = load_estimator(
        Checkpoints(folder).at(int(best["epoch"])),
        config.student,
        config.distill,
        config.refine,
        config.trial,
        resolved,
    )
    on_val = evaluate(
        estimator,
        open_crop_store(Path(data.val)),
        Path(data.val_truth),
        resolved.skeleton,
        resolved.evaluation,
        workers,
    )["ap"]
    _, search, val = data.num_people
    ap = (search * best["val_ap"] + val * on_val) / (search + val)
    return {"ap": ap, "seconds": last.rows[-1]["seconds"]}


def run(config: StudyConfig, setting: str, values: list[str], seeds: int, out: Path) -> Results:
    """Return the results of all seeds; train those that ``out`` lacks and add them to it."""
    results: Results = json.loads(out.read_text()) if out.exists() else {}
    trials = out.with_suffix("")
    configure_process(config.trial.cpus)
    workers = Workers(torch.device("cpu"))
    resolved = resolve(config)
    data = prepare_quietly(config, resolved)
    targets = trained_teacher(config, resolved, data, workers, print_row) / TARGETS
    for seed in range(seeds):
        for value in values:
            key = f"{seed}/{value}"
            if key not in results:
                print(f"{time.strftime('%H:%M:%S')} seed {seed}, {setting}={value}", flush=True)
                changed = with_values(config, {setting: value})
                folder = trial_folder(trials / value, seed)
                results[key] = train(folder, seed, changed, targets, data, workers)
                write_atomic(out, json.dumps(results, indent=1))
    return results


def show(results: Results, setting: str, values: list[str], seeds: int) -> bool:
    """Print all pairs and the mean difference; return whether its lower bound exceeds WORST."""
    table = new_table(
        f"AP on held-out people (x100) by {setting}",
        "seed",
        *values,
        "difference",
        f"wall seconds, {values[1]} / {values[0]}",
        num_left=0,
    )
    differences = []
    for seed in range(seeds):
        first, second = (results[f"{seed}/{value}"] for value in values)
        difference = 100 * (second["ap"] - first["ap"])
        differences.append(difference)
        table.add_row(
            str(seed),
            *(f"{100 * result['ap']:.2f}" for result in (first, second)),
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
    parser = new_parser(__doc__)
    parser.add_argument("setting", help="config path, such as trial.precision or teacher.mode")
    parser.add_argument("values", nargs=2, help="its values: the control, and the other")
    parser.add_argument(
        "--storage", type=Path, required=True, help="folder of the data and the teacher"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="JSON file of the results; trials go beside it"
    )
    parser.add_argument("--seeds", type=int, default=5, help="at least 2 (default 5)")
    parser.add_argument(
        "--with",
        dest="settings",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="further settings of the study; with others use another --out",
    )
    options = parser.parse_args()
    seeds = max(2, options.seeds)
    config = compose([f"storage={options.storage.absolute()}", *options.settings])
    setting, values = options.setting, options.values
    results = run(config, setting, values, seeds, options.out)
    if not show(results, setting, values, seeds):
        sys.exit(
            f"the lower bound must be above {WORST:g} points: either {setting}={values[1]} costs "
            "AP, or there are too few --seeds"
        )


if __name__ == "__main__":
    main()
