"""Is another shape of the smallest student better? ``student_shapes.py --storage DIR``

Each shape is trained by stage 1 of the built-in study, from several seeds, in turn and with the
same teacher. Time is CPU time of this process, relative to the shape with MobileNetV2's seven
groups, which ``tiny`` had before; AP is the best epoch's on the search slice.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

import torch
from benchmark import ignore_row, new_parser, new_table, prepare_quietly, trained_teacher
from rich.console import Console

from models.mobile_net import SIZES, MobileNet, MobileNetSize
from study.config.compose import compose
from study.config.derived import resolve
from study.storage.checkpoint import Checkpoints, best_row
from study.storage.paths import TARGETS
from study.trial import Trial, run_trial
from study.workers import Workers, configure_process

TINY = SIZES["tiny"]


def with_fine(shape: MobileNetSize, channels: int) -> MobileNetSize:
    """Return the shape with ``channels`` at all strides of the pyramid."""
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
    parser = new_parser(__doc__)
    parser.add_argument(
        "--storage", help="folder of data and teacher (default: a temporary folder)"
    )
    parser.add_argument("--seeds", type=int, default=5, help="at least 2 (default 5)")
    options = parser.parse_args()
    configure_process(1)
    workers = Workers(torch.device("cpu"))
    seconds: dict[str, list[float]] = {name: [] for name in SHAPES}
    scores: dict[str, list[float]] = {name: [] for name in SHAPES}
    with tempfile.TemporaryDirectory() as scratch:
        config = compose([f"storage={options.storage or scratch}", "refine.epochs=0"])
        resolved = resolve(config)
        data = prepare_quietly(config, resolved)
        targets = trained_teacher(config, resolved, data, workers, ignore_row) / TARGETS
        for seed in range(max(2, options.seeds)):
            for name, shape in SHAPES.items():
                SIZES["tiny"] = shape
                folder = Path(scratch) / name / str(seed)
                trial = Trial(seed, config, resolved, data, folder, targets)
                started = time.process_time()
                run_trial(trial, workers, ignore_row)
                seconds[name].append(time.process_time() - started)
                last = Checkpoints(folder).last()
                assert last is not None
                scores[name].append(100 * best_row(last.rows)["val_ap"])
                print(f"seed {seed}, {name}: AP {scores[name][-1]:.1f}", flush=True)
    first = next(iter(SHAPES))
    table = new_table(
        "stage 1 on the synthetic people",
        "shape",
        "parameters",
        "CPU time",
        "AP x 100",
        "standard error",
    )
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
