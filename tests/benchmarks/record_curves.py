"""Records learning curves of random configurations, for searches to be replayed on.

``record_curves.py drawn --out DIR`` trains configurations drawn at random from a space, each
to the end of its budget, never pruned, and keeps AP on the search slice after every epoch. One
line of JSON a configuration is added to DIR/<name>.jsonl as soon as it is trained; the same
command goes on where it was broken off, and several may run at once with other --first. At the
end everything is condensed to DIR/<name>.parquet: a row a configuration, its values by config
path, and its curve.

``lspet_crowd`` takes its pictures from --data, a folder that holds ``lspet`` and
``lspet_crowd``, its teacher (MoveNet's Thunder) from ``teacher.init=...``, and starts every
configuration from one student, trained first on the single people of ``lspet`` by labels alone:
in the seconds that a configuration has, a student that starts from nothing finds nobody there.
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

import optuna  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from search_spaces.space import load  # noqa: E402
from study.checkpoint import Checkpoints, best_row  # noqa: E402
from study.config import compose, flatten, to_plain, with_values  # noqa: E402
from study.loop import Row, TrainingDiverged  # noqa: E402
from study.prepare import prepare_data  # noqa: E402
from study.teacher import TARGETS, is_ready, make_teacher, teacher_folder  # noqa: E402
from study.training import build_distill_task  # noqa: E402
from study.trial import Trial, run_trial  # noqa: E402
from study.workers import Workers, settle_in  # noqa: E402

SINGLE = (
    *("data=crowdpose", "data.input_size=[96,96]", "student.sigma=1.0"),
    *("distill.batch_size=16", "refine.batch_size=16"),
    *("distill.augment.scale=0.2", "distill.augment.rotation=20", "distill.augment.half_body=0"),
)
SETTINGS = {
    "drawn": (
        *("data.max_people=500", "data.search_fraction=0.3"),
        *("distill.epochs=12", "refine.epochs=4"),
    ),
    "lspet_crowd": (
        *(*SINGLE, "data.max_people=700", "data.search_fraction=0.4"),
        *("distill.epochs=12", "refine.epochs=4"),
        *("teacher.size=thunder", "teacher.codec=movenet", "teacher.input_size=[256,256]"),
        *("teacher.skeleton=coco", "teacher.epochs=0"),
    ),
    "lspet": (
        *(*SINGLE, "distill.epochs=40", "distill.optimizer.lr=5e-3", "refine.epochs=0"),
        *("distill.heatmap.kind=none", "distill.structure.kind=none"),
    ),
}
FROM_FILES = ("lspet", "lspet_crowd")
STARTS_FROM = {"lspet_crowd": "lspet"}


def record(name: str, overrides: list[str], out: Path, first: int, count: int) -> None:
    """Trains those of the configurations ``first`` to ``first + count`` that have no line yet."""
    config = compose(overrides)
    space = load(config.search_space)
    defaults = flatten(to_plain(config))
    workers = Workers(torch.device("cpu"))
    data = prepare_data(config, lambda _: lambda *_: None, print)
    folder = teacher_folder(config, data)
    if not is_ready(folder):
        make_teacher(config, data, workers, say)
    lines = out / f"{name}.jsonl"
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
            run_trial(Trial(number, own, data, trial, folder / TARGETS), workers, keep)
        except TrainingDiverged as error:
            print(error)
        curve = {int(row["epoch"]): float(row["val_ap"]) for row in rows}
        seconds = rows[-1]["seconds"] if rows else 0.0
        line = {
            **{"number": number, "values": values, "seconds": seconds},
            "curve": [curve[epoch] for epoch in sorted(curve)],
        }
        with lines.open("a") as file:
            file.write(json.dumps(line) + "\n")
        shutil.rmtree(trial, ignore_errors=True)
        best = max(curve.values(), default=0.0)
        print(f"{time.strftime('%H:%M:%S')} {name} {number}: AP {100 * best:.1f}", flush=True)


def settings_of(name: str, out: Path, data: Path, overrides: list[str]) -> list[str]:
    """What a recording is set to, its student's start included, which is trained if need be."""
    files: list[str] = []
    if name in FROM_FILES:
        files.append(f"data.root={data / name}")
        for split in ("train", "val"):
            files.append(f"data.{split}.annotations=annotations/{name}_{split}.json")
            files.append(f"data.{split}.images=images/{split}")
    settings = [*SETTINGS[name], f"storage={out / 'storage'}", *files]
    if before := STARTS_FROM.get(name):
        settings.append(f"student.init={train_start(before, out, data)}")
    return [*settings, *overrides]


def train_start(name: str, out: Path, data: Path) -> Path:
    """Trains one student by labels alone, to its end; the file of its best weights."""
    weights, folder = out / f"{name}.safetensors", out / "trials" / name
    if not weights.exists():
        config = compose(settings_of(name, out, data, []))
        people = prepare_data(config, lambda _: lambda *_: None, print)
        run_trial(Trial(0, config, people, folder, None), Workers(torch.device("cpu")), say)
        history = Checkpoints(folder)
        last = history.last()
        assert last is not None
        task = build_distill_task(config, seed=0)
        task.load_state_dict(history.at(best_row(last.rows)["epoch"]).weights())
        state = {name: tensor.contiguous() for name, tensor in task.student.state_dict().items()}
        save_file(state, weights)
    return weights


def say(row: Row) -> bool:
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
    parser.add_argument("name", choices=["drawn", "lspet_crowd"])
    parser.add_argument("--out", type=Path, required=True, help="folder of everything")
    parser.add_argument("--data", type=Path, help="folder of lspet and lspet_crowd")
    parser.add_argument("--first", type=int, default=0, help="number of the first configuration")
    parser.add_argument("--count", type=int, default=200, help="how many (default 200)")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="as of tune.py")
    options = parser.parse_intermixed_args()
    settle_in(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    options.out.mkdir(parents=True, exist_ok=True)
    out = options.out.absolute()
    data = options.data and options.data.absolute()
    settings = settings_of(options.name, out, data, options.settings)
    record(options.name, settings, out, options.first, options.count)
    condense(options.name, out)


if __name__ == "__main__":
    main()
