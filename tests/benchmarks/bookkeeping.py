"""What a search's bookkeeping costs: ``python tests/benchmarks/bookkeeping.py``.

A study's owner gives out 1,000 trials that do no work: each reports epochs of made-up AP until it
is told to stop. What the owner computes for them is timed, in CPU seconds of its process: asking
the sampler, pruning, the journal, and the Parquet of every trial that ended. What a trial itself
would write, its checkpoint's reports, lies outside, and nobody waits for the disk. Shown is the
CPU per trial over the first 100 trials, over all of them, and the ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

import numpy as np
from rich.console import Console
from rich.table import Table

from search_spaces.space import load_space
from study.config.compose import compose
from study.config.derived import resolve
from study.search.owner import StudyOwner
from study.storage.checkpoint import Checkpoints, Row
from study.storage.paths import trial_folder

FEW = 100
Answer = TypeVar("Answer")


class Clock:
    """CPU seconds of this process in the calls that went through it."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, function: Callable[..., Answer], *arguments: Any) -> Answer:
        start = time.process_time()
        answer = function(*arguments)
        self.seconds += time.process_time() - start
        return answer


def cpu_by_trial(folder: Path, sampler: str, trials: int, settings: list[str]) -> list[float]:
    """CPU seconds of the owner up to the end of each trial."""
    own = [f"storage={folder}", "name=study", f"search.sampler={sampler}", *settings]
    config = compose([*own, f"search.trials={trials}"])
    (folder / "study").mkdir()
    space = load_space(config.search_space)
    owner = StudyOwner(str(folder / "study"), config, resolve(config), space.to_json(), "session")
    generator, clock = np.random.default_rng(0), Clock()
    found = []
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
        found.append(clock.seconds)
    return found


def row_of(epoch: int, best: float) -> Row:
    ap = best * (1 - 0.5**epoch)
    return {"stage": "distill", "epoch": epoch, "step": epoch, "seconds": 1.0, "val_ap": ap}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--trials", type=int, default=1000, help="how many (default 1000)")
    parser.add_argument("--sampler", action="append", help="a name (default: random, tpe)")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="as of tune.py")
    options = parser.parse_intermixed_args()
    table = Table(title=f"the owner's CPU per trial, ms, over {FEW} and {options.trials} trials")
    for heading in ("search.sampler", f"{FEW}", f"{options.trials}", "ratio"):
        table.add_column(heading, justify="right" if heading[0].isdigit() else "left")
    for sampler in options.sampler or ("random", "tpe"):
        no_waiting = mock.patch.object(os, "fsync", lambda descriptor: None)
        with tempfile.TemporaryDirectory() as folder, no_waiting:
            seconds = cpu_by_trial(Path(folder), sampler, options.trials, options.settings)
        few, many = seconds[FEW - 1] / FEW, seconds[-1] / len(seconds)
        table.add_row(sampler, f"{1000 * few:.1f}", f"{1000 * many:.1f}", f"{many / few:.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
