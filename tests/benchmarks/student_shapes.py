"""What shapes of the smallest student learn in how long: ``student_shapes.py --storage DIR``.

Each shape is trained by the built-in study's default stage 1, from several seeds, in turn, taught
by the study's one teacher. Time is this process's own, over that of MobileNetV2's seven groups,
which ``tiny`` once was; AP is the best epoch's on the search slice.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import torch
from rich.console import Console
from rich.table import Table

from models.mobile_net import SIZES, MobileNet, MobileNetSize
from study.cache.prepare import prepare_data
from study.config.compose import compose
from study.config.derived import resolve
from study.storage.checkpoint import Checkpoints, best_row
from study.storage.paths import TARGETS
from study.teachers.make import is_ready, make_teacher, teacher_folder
from study.trial import Trial, run_trial, teacher_spec
from study.workers import Workers, configure_process

TINY = SIZES["tiny"]


def with_fine(shape: MobileNetSize, channels: int) -> MobileNetSize:
    """The shape with so many channels at the pyramid's strides."""
    return dataclasses.replace(shape, pyramid=(channels,) * 3)


NARROW_STEM = dataclasses.replace(TINY, stem=8, channels=(8, *TINY.channels[1:]))
SEVEN_GROUPS = MobileNetSize(
    stem=8,
    channels=(8, 12, 16, 24, 24, 32, 32),
    repeats=(1, 1, 1, 1, 1, 1, 1),
    expansion=2,
    last=48,
    pyramid=(24, 16, 16),
    head=24,
)
SHAPES = {
    "seven groups, 8 in the stem, 16 at stride 4": SEVEN_GROUPS,
    "one block a stride, 8, 24": with_fine(NARROW_STEM, 24),
    "one block a stride, 16, 24": with_fine(TINY, 24),
    "tiny: one block a stride, 16, 32": TINY,
    "one block a stride, 16, 40": with_fine(TINY, 40),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="What shapes of the smallest student learn.")
    parser.add_argument("--storage", help="of data and teacher (default: a temporary folder)")
    parser.add_argument("--seeds", type=int, default=5, help="at least 2 (default 5)")
    options = parser.parse_args()
    configure_process(1)
    workers = Workers(torch.device("cpu"))
    seconds: dict[str, list[float]] = {name: [] for name in SHAPES}
    scores: dict[str, list[float]] = {name: [] for name in SHAPES}
    with tempfile.TemporaryDirectory() as scratch:
        config = compose([f"storage={options.storage or scratch}", "refine.epochs=0"])
        data = prepare_data(config.data, resolve(config), lambda _: lambda *_: None, print)
        teacher = teacher_folder(teacher_spec(config, resolve(config)), data)
        if not is_ready(teacher):
            make_teacher(
                teacher_spec(config, resolve(config)),
                config.student,
                data,
                workers,
                lambda row: False,
            )
        for seed in range(max(2, options.seeds)):
            for name, shape in SHAPES.items():
                SIZES["tiny"] = shape
                folder = Path(scratch) / name / str(seed)
                trial = Trial(seed, config, resolve(config), data, folder, teacher / TARGETS)
                started = time.process_time()
                run_trial(trial, workers, lambda row: False)
                seconds[name].append(time.process_time() - started)
                last = Checkpoints(folder).last()
                assert last is not None
                scores[name].append(100 * best_row(last.rows)["val_ap"])
                print(f"seed {seed}, {name}: AP {scores[name][-1]:.1f}", flush=True)
    first = next(iter(SHAPES))
    table = Table(title="stage 1 of the drawn people")
    for heading in ("shape", "parameters", "CPU time", "AP x 100", "standard error"):
        table.add_column(heading, justify="left" if heading == "shape" else "right")
    for name, shape in SHAPES.items():
        network = MobileNet(17, shape)
        table.add_row(
            name,
            f"{sum(parameter.numel() for parameter in network.parameters()):,}",
            f"{sum(seconds[name]) / sum(seconds[first]):.2f}",
            f"{statistics.mean(scores[name]):.1f}",
            f"{statistics.stdev(scores[name]) / len(scores[name]) ** 0.5:.1f}",
        )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
