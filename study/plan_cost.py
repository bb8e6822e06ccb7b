"""The epochs, the hours and the room that a study will take, from what it is and its pace here."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from study.confirm_table import RESULT, chosen_trials, place_of
from study.crop_sizes import readable
from study.evaluation import BATCH_SIZE
from study.prepare import StudyData
from study.schema import SearchConfig, StudyConfig
from study.settings import CONTROLS
from study.staged import is_staged, num_distill_trials
from study.teacher import is_ready, teacher_folder
from study.timing import Speeds

KEPT_EPOCHS = 3
"""Checkpoints of a trial at most: the last, and the best of each stage."""


@dataclass(frozen=True)
class Counts:
    """How many people there are, or about will be."""

    train: int
    search: int
    val: int
    found: int
    about: bool


def expected_epochs(budget: int, search: SearchConfig) -> list[float]:
    """The share of the searched trials that train each epoch, from the first on.

    Successive halving lets one in ``reduction_factor`` past each rung, once there are many
    trials; the first ones it lets all through.
    """
    shares, share, rung = [], 1.0, search.min_epochs
    for epoch in range(1, budget + 1):
        shares.append(share)
        if search.pruner == "successive_halving" and epoch == rung:
            share, rung = share / search.reduction_factor, rung * search.reduction_factor
    return shares


class TrialGroup(NamedTuple):
    """Trials that are still to run and are alike in how long they train."""

    trials: int
    distill_epochs: int
    refine_epochs: int
    can_be_pruned: bool

    @property
    def most(self) -> int:
        """Epochs, if none is pruned."""
        return self.trials * (self.distill_epochs + self.refine_epochs)

    def shares(self, search: SearchConfig) -> list[float]:
        """The share of the trials that train each epoch."""
        budget = self.distill_epochs + self.refine_epochs
        return expected_epochs(budget, search) if self.can_be_pruned else [1.0] * budget


def trial_groups(
    config: StudyConfig, finished: int, handed_over: int | None = None
) -> list[TrialGroup]:
    """The trials that are still to run; of plan staged the students and then the refiners.

    Args:
        handed_over: how many students there are, if no more are to come.
    """
    distill, refine = config.distill.epochs, config.refine.epochs
    if not is_staged(config):
        parts = [(config.search.trials, len(CONTROLS), distill, refine)]
    else:
        students = num_distill_trials(config) if handed_over is None else handed_over
        parts = [
            (1, 1, distill + refine, 0),  # the baseline
            (students - 1, 1, distill, 0),
            (config.search.trials - students, 1, 0, refine),
        ]
    groups = []
    for trials, controls, first, second in parts:
        left, known = max(trials - finished, 0), max(controls - finished, 0)
        known = min(known, left)
        groups.append(TrialGroup(known, first, second, can_be_pruned=False))
        groups.append(TrialGroup(left - known, first, second, can_be_pruned=True))
        finished = max(finished - trials, 0)
    return groups


def trial_lines(
    config: StudyConfig, groups: Sequence[TrialGroup], finished: int, room: int
) -> Iterator[str]:
    """How many trials, and how many epochs they come to."""
    left = max(config.search.trials - finished, 0)
    known = (
        "the baseline, the defaults of either stage" if is_staged(config) else "baseline, defaults"
    )
    yield (
        f"{finished} finished, {left} to run of {config.search.trials}, controls ({known}) among "
        f"them; {min(room, max(left, 1))} at once"
    )
    if is_staged(config):
        students, refiners = sum(g.trials for g in groups[:4]), sum(g.trials for g in groups[4:])
        yield f"plan=staged: {students} students to train, then {refiners} refiners"
    expected = sum(group.trials * sum(group.shares(config.search)) for group in groups)
    yield (
        f"epochs: at most {sum(group.most for group in groups)}, about {expected:.0f} with "
        f"pruner={config.search.pruner}"
    )


def _confirm_runs(config: StudyConfig, folder: Path, finished: int) -> tuple[int, int]:
    """Runs in all, and those that are there already."""
    settings = config.confirm
    searched = max(config.search.trials - 1, 0)  # the baseline goes by itself
    number = (min(settings.trials, searched) + 1) * settings.seeds if settings.trials else 0
    if finished < config.search.trials:
        return number, 0
    known = [
        folder / place_of(trial["trial"], run) / RESULT
        for trial in chosen_trials(folder, settings)
        for run in range(settings.seeds)
    ]
    return number, sum(file.is_file() for file in known)


def confirm_lines(config: StudyConfig, folder: Path, finished: int) -> Iterator[str]:
    """How many confirming runs, and how many are there already."""
    number, done = _confirm_runs(config, folder, finished)
    budget = config.distill.epochs + config.refine.epochs
    if not number:
        yield "off (confirm.trials=0)"
        return
    yield (
        f"{number} runs, {done} of them there already: the best {config.confirm.trials} trials "
        f"and the baseline, {config.confirm.seeds} seeds each, {(number - done) * budget} epochs"
    )


def time_lines(
    config: StudyConfig,
    planned: StudyData | None,
    counts: Counts,
    speeds: Speeds,
    groups: Sequence[TrialGroup],
    finished: int,
    room: int,
) -> Iterator[str]:
    """The pace of each network here, and the hours that it makes."""
    for stage, seconds in speeds.steps.items():
        batch = getattr(config, stage).batch_size
        yield f"{stage}: {_span(seconds)} a step of {batch} people"
    for stage, seconds in speeds.people.items():
        yield f"{stage}: {_span(BATCH_SIZE * seconds)} to evaluate a batch of {BATCH_SIZE} people"

    def epoch(stage: str) -> float:
        steps = math.ceil(counts.train / getattr(config, stage).batch_size)
        return steps * speeds.steps[stage] + counts.search * speeds.people[stage]

    teacher = 0.0
    is_made = planned is not None and is_ready(teacher_folder(config, planned))
    if not is_made and "teacher" in speeds.people:
        teacher = counts.train * speeds.people["teacher"]
        if config.teacher.epochs:
            teacher += config.teacher.epochs * epoch("teacher")
    pace = {s: epoch(s) for s in ("distill", "refine") if s in speeds.steps}
    pace.setdefault("refine", 0.0)
    both = config.distill.epochs * pace["distill"] + config.refine.epochs * pace["refine"]
    most = about = 0.0
    for group in groups:
        own = [pace["distill"]] * group.distill_epochs + [pace["refine"]] * group.refine_epochs
        most += group.trials * sum(own)
        about += group.trials * float(np.dot(own, group.shares(config.search)))
    number, done = _confirm_runs(config, Path(config.storage) / config.name, finished)
    confirm = (number - done) * both
    parts = [("teacher", teacher, teacher)]
    parts += [
        ("trials", about / room, most / room),
        ("confirming", confirm / room, confirm / room),
    ]
    for name, expected, bound in parts:
        if not bound:
            continue
        upto = f", at most {_span(bound)}" if bound > expected else ""
        yield f"{name}: about {_span(expected)}{upto}"
    total, bound = sum(part[1] for part in parts), sum(part[2] for part in parts)
    yield (
        f"in all: about {total / 3600:.2g} hours, at most {bound / 3600:.2g}; not counted: making "
        "crops, starting processes, AP's own arithmetic, scoring val"
    )


def _span(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 90:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def disk_lines(config: StudyConfig, speeds: Speeds, folder: Path) -> Iterator[str]:
    """The room that checkpoints take."""
    # Weights, and two running means of AdamW, 4 bytes each.
    epoch = 12 * max(speeds.parameters[s] for s in ("distill", "refine") if s in speeds.parameters)
    runs = config.search.trials
    if config.confirm.trials:
        runs += (config.confirm.trials + 1) * config.confirm.seeds
    free = shutil.disk_usage(existing(folder)).free
    needed = runs * KEPT_EPOCHS * epoch
    yield (
        f"checkpoints: at most {readable(needed)} ({runs} trials and runs, {KEPT_EPOCHS} epochs "
        f"of {readable(epoch)} each); {readable(free)} free in {existing(folder)}"
    )
    if needed > free:
        yield "warning: there is no room for them"


def existing(folder: Path) -> Path:
    """The folder, or the first above it that is there."""
    return next(path for path in (folder, *folder.parents) if path.is_dir())
