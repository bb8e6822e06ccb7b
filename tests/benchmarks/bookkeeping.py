"""Does a study's owner need more CPU per trial later? ``python tests/benchmarks/bookkeeping.py``

The owner runs 1,000 trials that do no work: each reports epochs of synthetic AP until it is
stopped. The CPU seconds of the owner's process are measured: sampling, pruning, the journal, and
the Parquet of every ended trial. The trials' own files are not included, and fsync is disabled.
The table has the CPU per trial over the first 100 trials, over all of them, and the ratio.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import numpy as np
from benchmark import new_parser, new_table
from rich.console import Console

from search_spaces.space import load_space
from study.config.compose import compose
from study.config.derived import resolve
from study.search.owner import StudyOwner
from study.storage.checkpoint import Checkpoints, Row
from study.storage.paths import trial_folder

FEW = 100
Result = TypeVar("Result")


class Clock:
    """Sums the CPU seconds of this process in the calls made through it."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, function: Callable[..., Result], *arguments: Any) -> Result:
        start = time.process_time()
        result = function(*arguments)
        self.seconds += time.process_time() - start
        return result


def cpu_by_trial(folder: Path, sampler: str, trials: int, settings: list[str]) -> list[float]:
    """Return the owner's CPU seconds up to the end of each trial."""
    config = compose(
        [
            f"storage={folder}",
            "name=study",
            f"search.sampler={sampler}",
            *settings,
            f"search.trials={trials}",
        ]
    )
    (folder / "study").mkdir()
    space = load_space(config.search_space)
    owner = StudyOwner(str(folder / "study"), config, resolve(config), space.to_json(), "session")
    generator, clock = np.random.default_rng(0), Clock()
    seconds = []
    for index in range(trials):
        suggestion = clock(owner.suggest, f"trial{index}")
        assert suggestion is not None
        number = suggestion["number"]
        checkpoints = Checkpoints(trial_folder(owner.folder, number))
        rows: list[Row] = []
        is_over, best = False, generator.uniform()
        while not is_over:
            rows.append(row_of(len(rows) + 1, best))
            last = checkpoints.path(len(rows))
            last.mkdir(parents=True)
            (last / "state.json").write_text(json.dumps({"rows": rows}))
            is_over = clock(owner.report, number, rows[-1])
        seconds.append(clock.seconds)
    return seconds


def row_of(epoch: int, best: float) -> Row:
    ap = best * (1 - 0.5**epoch)
    return {"stage": "distill", "epoch": epoch, "step": epoch, "seconds": 1.0, "val_ap": ap}


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--trials", type=int, default=1000, help="number of trials (default 1000)")
    parser.add_argument("--sampler", action="append", help="a sampler (default: random, tpe)")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="settings, as of tune.py")
    options = parser.parse_intermixed_args()
    table = new_table(
        f"the owner's CPU per trial, ms, over {FEW} and {options.trials} trials",
        "search.sampler",
        f"{FEW}",
        f"{options.trials}",
        "ratio",
    )
    for sampler in options.sampler or ("random", "tpe"):
        no_waiting = mock.patch.object(os, "fsync", lambda descriptor: None)
        with tempfile.TemporaryDirectory() as folder, no_waiting:
            seconds = cpu_by_trial(Path(folder), sampler, options.trials, options.settings)
        few, many = seconds[FEW - 1] / FEW, seconds[-1] / len(seconds)
        table.add_row(sampler, f"{1000 * few:.1f}", f"{1000 * many:.1f}", f"{many / few:.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
