"""Records learning curves of random configurations, for searches to be replayed on.

``record_curves.py drawn --out DIR`` trains configurations drawn at random from a space, each
to the end of its budget, never pruned, and keeps AP on the search slice after every epoch. One
line of JSON a configuration is added to DIR/<name>.jsonl as soon as it is trained; the same
command goes on where it was broken off, and several may run at once with other --first. At the
end everything is condensed to DIR/<name>.parquet: a row a configuration, its values by config
path, and its curve. What ``curves/`` has of that name is not trained again.

``lspet_crowd`` takes its images from --data, the folder of that name, and starts from MoveNet's
weights (``teacher.init`` Thunder's, ``student.init`` Lightning's): in the seconds that a
configuration has, a student that starts from nothing finds nobody there.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import optuna
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from search_spaces.space import load_space
from study.cache.prepare import prepare_data
from study.config.compose import compose, flatten, to_plain, with_values
from study.config.derived import resolve
from study.errors import TrainingDiverged
from study.storage.checkpoint import Row
from study.storage.paths import TARGETS
from study.teachers.make import is_ready, make_teacher, teacher_folder
from study.trial import Trial, run_trial, teacher_spec
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
        *(f"data.{s}.annotations=annotations/lspet_crowd_{s}.json" for s in ("train", "val")),
        *(f"data.{s}.images=images/{s}" for s in ("train", "val")),
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
    """Trains those of the configurations ``first`` to ``first + count`` that have no line yet."""
    config = compose(overrides)
    space = load_space(config.search_space)
    defaults = flatten(to_plain(config))
    workers = Workers(torch.device("cpu"))
    resolved = resolve(config)
    spec = teacher_spec(config, resolved)
    data = prepare_data(config.data, resolved, lambda _: lambda *_: None, print)
    folder = teacher_folder(spec, data)
    if not is_ready(folder):
        make_teacher(spec, config.student, data, workers, notify)
    lines = out / f"{name}.jsonl"
    if not lines.exists():
        lines.write_text("".join(json.dumps(line) + "\n" for line in kept(name)))
    for number in range(first, first + count):
        if number in known(lines):
            continue
        sampler = optuna.samplers.RandomSampler(seed=number)
        values = space.suggest(optuna.create_study(sampler=sampler).ask(), defaults)
        rows: list[Row] = []

        def keep(row: Row, rows: list[Row] = rows) -> bool:
            rows.append(row)
            return False

        trial = out / "trials" / f"{name}-{number}"
        own = with_values(config, values)
        try:
            run_trial(
                Trial(number, own, resolve(own), data, trial, folder / TARGETS), workers, keep
            )
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
        shutil.rmtree(trial, ignore_errors=True)
        best = max(curve.values(), default=0.0)
        print(f"{time.strftime('%H:%M:%S')} {name} {number}: AP {100 * best:.1f}", flush=True)


def notify(row: Row) -> bool:
    print(f"{row['stage']} epoch {row['epoch']}: AP {100 * row['val_ap']:.1f}", flush=True)
    return False


def known(lines: Path) -> dict[int, dict[str, Any]]:
    """What was recorded, by number; a line that a kill cut short is no record."""
    found = {}
    for text in lines.read_text().splitlines() if lines.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        found[line["number"]] = line
    return found


def kept(name: str) -> list[dict[str, Any]]:
    """What ``condense`` once made of such lines."""
    file = Path(__file__).parent / "curves" / f"{name}.parquet"
    found = []
    for row in pq.read_table(file).to_pylist() if file.exists() else ():
        line = {key: row.pop(key) for key in ("number", "seconds", "curve")}
        found.append({**line, "values": {path: v for path, v in row.items() if v is not None}})
    return found


def condense(name: str, out: Path) -> None:
    found = known(out / f"{name}.jsonl")
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
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("name", choices=sorted(SETTINGS))
    parser.add_argument("--out", type=Path, required=True, help="folder of everything")
    parser.add_argument("--data", type=Path, help="folder of the images; none where drawn")
    parser.add_argument("--first", type=int, default=0, help="number of the first configuration")
    parser.add_argument("--count", type=int, default=200, help="how many (default 200)")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="as of tune.py")
    options = parser.parse_intermixed_args()
    configure_process(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    options.out.mkdir(parents=True, exist_ok=True)
    out = options.out.absolute()
    settings = [*SETTINGS[options.name], f"storage={out / 'storage'}", *options.settings]
    if options.data:
        settings.append(f"data.root={options.data.absolute()}")
    record(options.name, settings, out, options.first, options.count)
    condense(options.name, out)


if __name__ == "__main__":
    main()
