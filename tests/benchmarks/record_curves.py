"""Records learning curves for search.py: ``tests/benchmarks/record_curves.py drawn --out DIR``

Trains random configurations of a search space, each to the end of its budget without pruning, and
records AP on the search slice after every epoch. Each configuration adds a line of JSON to
DIR/<name>.jsonl when it is trained. The same command resumes after an interruption, and several
may run at once with different --first. At the end all are written to DIR/<name>.parquet: a row per
configuration, with its values by config path and its curve. Configurations that ``curves/`` has
under that name are not trained again.

``lspet_crowd`` takes its images from --data, the folder of that name, and starts from MoveNet's
weights (``teacher.init`` from Thunder's, ``student.init`` from Lightning's): in the few seconds
per configuration a student with random weights would find no one.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import optuna
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from benchmark import new_parser, prepare_quietly, print_row, trained_teacher

from search_spaces.space import load_space
from study.config.compose import compose, flatten, to_plain, with_values
from study.config.derived import resolve
from study.errors import TrainingDiverged
from study.storage.checkpoint import Row
from study.storage.paths import TARGETS
from study.trial import Trial, run_trial
from study.workers import Workers, configure_process

SETTINGS = {
    "drawn": (
        "data.max_people=500",
        "data.search_fraction=0.3",
        "distill.epochs=12",
        "refine.epochs=4",
    ),
    "lspet_crowd": (
        "data=crowdpose",
        "data.input_size=[128,128]",
        "data.max_people=240",
        "data.train.annotations=annotations/lspet_crowd_train.json",
        "data.val.annotations=annotations/lspet_crowd_val.json",
        "data.train.images=images/train",
        "data.val.images=images/val",
        "data.search_fraction=0.5",
        "distill.epochs=5",
        "refine.epochs=2",
        "distill.batch_size=8",
        "refine.batch_size=8",
        "student.size=lightning",
        "distill.augment.scale=0.2",
        "distill.augment.rotation=20",
        "distill.augment.half_body=0",
        "teacher.skeleton=coco",
        "teacher.epochs=0",
        "teacher.size=thunder",
        "teacher.codec=movenet",
        "teacher.input_size=[256,256]",
    ),
}


def record(name: str, overrides: list[str], out: Path, first: int, count: int) -> None:
    """Train the configurations from ``first`` to ``first + count - 1`` that have no line yet."""
    config = compose(overrides)
    space = load_space(config.search_space)
    defaults = flatten(to_plain(config))
    workers = Workers(torch.device("cpu"))
    resolved = resolve(config)
    data = prepare_quietly(config, resolved)
    folder = trained_teacher(config, resolved, data, workers, print_row)
    lines = out / f"{name}.jsonl"
    if not lines.exists():
        lines.write_text("".join(json.dumps(line) + "\n" for line in published_lines(name)))
    for number in range(first, first + count):
        if number in recorded_lines(lines):
            continue
        sampler = optuna.samplers.RandomSampler(seed=number)
        values = space.suggest(optuna.create_study(sampler=sampler).ask(), defaults)
        rows: list[Row] = []

        def keep(row: Row, rows: list[Row] = rows) -> bool:
            rows.append(row)
            return False

        out_folder = out / "trials" / f"{name}-{number}"
        changed = with_values(config, values)
        trial = Trial(number, changed, resolve(changed), data, out_folder, folder / TARGETS)
        try:
            run_trial(trial, workers, keep)
        except TrainingDiverged as error:
            print(error)
        curve = {int(row["epoch"]): float(row["val_ap"]) for row in rows}
        seconds = rows[-1]["seconds"] if rows else 0.0
        line = {
            "number": number,
            "values": values,
            "seconds": seconds,
            "curve": [curve[epoch] for epoch in sorted(curve)],
        }
        with lines.open("a") as file:
            file.write(json.dumps(line) + "\n")
        shutil.rmtree(out_folder, ignore_errors=True)
        best = max(curve.values(), default=0.0)
        print(f"{time.strftime('%H:%M:%S')} {name} {number}: AP {100 * best:.1f}", flush=True)


def recorded_lines(lines: Path) -> dict[int, dict[str, Any]]:
    """Read the recorded configurations by number; skip a partial line left by a kill."""
    found = {}
    for text in lines.read_text().splitlines() if lines.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        found[line["number"]] = line
    return found


def published_lines(name: str) -> list[dict[str, Any]]:
    """Read the configurations in ``curves/`` as lines of the .jsonl file."""
    file = Path(__file__).parent / "curves" / f"{name}.parquet"
    lines = []
    for row in pq.read_table(file).to_pylist() if file.exists() else ():
        line = {key: row.pop(key) for key in ("number", "seconds", "curve")}
        lines.append({**line, "values": {path: v for path, v in row.items() if v is not None}})
    return lines


def write_parquet(name: str, out: Path) -> None:
    """Write the .jsonl file as Parquet."""
    found = recorded_lines(out / f"{name}.jsonl")
    rows = [found[number] for number in sorted(found)]
    paths = sorted({path for row in rows for path in row["values"]})
    columns = {
        "number": [row["number"] for row in rows],
        "seconds": [round(row["seconds"], 1) for row in rows],
        **{path: [row["values"].get(path) for row in rows] for path in paths},
        "curve": pa.array([row["curve"] for row in rows], pa.list_(pa.float32())),
    }
    pq.write_table(pa.table(columns), out / f"{name}.parquet", compression="zstd")


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("name", choices=sorted(SETTINGS), help="the data")
    parser.add_argument("--out", type=Path, required=True, help="folder of all output")
    parser.add_argument("--data", type=Path, help="folder of the images; not for drawn")
    parser.add_argument("--first", type=int, default=0, help="number of the first configuration")
    parser.add_argument(
        "--count", type=int, default=200, help="number of configurations (default 200)"
    )
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="settings, as of tune.py")
    options = parser.parse_intermixed_args()
    configure_process(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    options.out.mkdir(parents=True, exist_ok=True)
    out = options.out.absolute()
    settings = [*SETTINGS[options.name], f"storage={out / 'storage'}", *options.settings]
    if options.data:
        settings.append(f"data.root={options.data.absolute()}")
    record(options.name, settings, out, options.first, options.count)
    write_parquet(options.name, out)


if __name__ == "__main__":
    main()
