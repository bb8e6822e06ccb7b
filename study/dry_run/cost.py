"""Epochs, hours and disk space that a study will take, and settings that can't take effect."""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from study.cache.crop_parts import readable
from study.config.schema import (
    STAGED,
    ConfirmConfig,
    DistillConfig,
    PlanConfig,
    RefineConfig,
    SearchConfig,
    TeacherConfig,
)
from study.dry_run.timing import Speeds
from study.search.forecast import StageEpochs, TrialGroup, is_predictable
from study.storage.paths import run_folder, run_result_file
from study.training.evaluation import BATCH_SIZE
from study.training.left_right import MAX_PEOPLE
from study.validation.confirm_table import chosen_trials

KEPT_EPOCHS = 3
"""Most checkpoints that a trial keeps: the last, and the best of each stage."""

RANDOM_TRIALS = {
    "tpe": "startup_trials",
    "gp": "startup_trials",
    "cmaes": "startup_trials",
    "nsga2": "population",
}
"""By sampler, the setting of ``search`` with the number of random trials before it learns."""


@dataclass(frozen=True)
class Counts:
    """Number of people in each split."""

    train: int
    search: int
    val: int
    boxes: int
    """Boxes of val that poses are estimated in: those of a detector, or of the people."""
    is_estimate: bool
    """Whether the images are still to be drawn, so that the numbers are estimates."""


def trial_lines(
    search: SearchConfig,
    stages: Sequence[Sequence[TrialGroup]],
    finished: int,
    concurrent: int,
    *,
    is_staged: bool,
) -> Iterator[str]:
    """Yield the number of trials and of their epochs.

    Args:
        stages: trials still to run, by stage.
        concurrent: trials that run at the same time.
    """
    left = max(search.trials - finished, 0)
    controls = "baseline, defaults of each stage" if is_staged else "baseline, defaults"
    yield (
        f"{finished} finished, {left} to run of {search.trials}, including the controls "
        f"({controls}); {min(concurrent, max(left, 1))} at the same time"
    )
    if is_staged:
        students, refiners = (sum(group.trials for group in groups) for groups in stages)
        yield f"plan=staged: {students} students to train, then {refiners} refiners"
    groups = list(itertools.chain(*stages))
    most = f"epochs: at most {sum(group.max_epochs for group in groups)}"
    if not is_predictable(search):
        yield f"{most}; how many pruner={search.pruner} saves can't be predicted"
        return
    expected = sum(group.trials * sum(group.shares(search)) for group in groups)
    yield f"{most}, about {expected:.0f} with pruner={search.pruner}"


def search_warnings(
    search: SearchConfig,
    confirm: ConfirmConfig,
    plan: PlanConfig,
    stages: Sequence[Sequence[TrialGroup]],
    concurrent: int,
) -> Iterator[str]:
    """Yield a warning for each valid setting that can't take effect in this study.

    Args:
        stages: all trials of the study by stage, finished or not.
        concurrent: trials that fit at the same time.
    """
    if search.concurrent > concurrent:
        yield f"warning: search.concurrent={search.concurrent}, but only {concurrent} trials fit"
    if search.trials > 1 and confirm.trials >= search.trials:
        yield (
            f"warning: confirm.trials={confirm.trials}, but there are {search.trials - 1} trials "
            "apart from the baseline; lower it, or raise search.trials"
        )
    if plan.kind == STAGED:
        students = sum(group.trials for group in stages[0]) - 1
        if plan.parents > students:
            yield (
                f"warning: plan.parents={plan.parents}, but there are {students} students "
                "apart from the baseline; lower it, or raise search.trials or plan.distill_share"
            )
    largest = max(sum(group.trials for group in groups) for groups in stages)
    yield from _pruner_warnings(search, stages, largest)
    is_searched = any(group.trials for group in itertools.chain(*stages) if group.can_be_pruned)
    setting = RANDOM_TRIALS.get(search.sampler)
    if setting and is_searched and not search.warm_start and getattr(search, setting) >= largest:
        yield (
            f"warning: search.sampler={search.sampler} will learn nothing: the first "
            f"{getattr(search, setting)} trials of a search are random, and the largest search "
            f"has {largest}; raise search.trials or lower search.{setting}"
        )


def _pruner_warnings(
    search: SearchConfig, stages: Sequence[Sequence[TrialGroup]], largest: int
) -> Iterator[str]:
    """Yield a warning if the pruner will prune nothing.

    Args:
        largest: trials of the largest search.
    """
    if search.pruner == "none":
        return
    budget = max((g.budget for g in itertools.chain(*stages) if g.can_be_pruned), default=0)
    if search.min_epochs >= budget:
        yield (
            f"warning: no trial will be pruned: none has more than {budget} epochs, and "
            f"search.min_epochs={search.min_epochs}; lower it, or set search.pruner=none"
        )
        return
    if search.pruner in ("median", "percentile") and search.startup_trials >= largest:
        yield (
            f"warning: no trial will be pruned: search.pruner={search.pruner} waits for "
            f"{search.startup_trials} finished trials, and the largest search has {largest}; "
            "raise search.trials or lower search.startup_trials"
        )


class ConfirmRuns(NamedTuple):
    """Numbers of confirming runs; upper bounds until all trials are finished."""

    total: int
    done: int
    """Runs that have a result."""


def count_confirm_runs(
    settings: ConfirmConfig, trials: int, folder: Path, finished: int
) -> ConfirmRuns:
    """Count the confirming runs of a study.

    Args:
        trials: ``search.trials``.
        finished: number of finished trials.
    """
    searched = max(trials - 1, 0)  # without the baseline, which is always confirmed
    number = (min(settings.trials, searched) + 1) * settings.seeds if settings.trials else 0
    if finished < trials:
        return ConfirmRuns(number, 0)
    known = [
        run_result_file(run_folder(folder, trial["trial"], run))
        for trial in chosen_trials(folder, settings)
        for run in range(settings.seeds)
    ]
    return ConfirmRuns(len(known), sum(file.is_file() for file in known))


def confirm_lines(settings: ConfirmConfig, runs: ConfirmRuns, budget: int) -> Iterator[str]:
    """Yield the number of confirming runs, and how many are finished.

    Args:
        budget: epochs of a run.
    """
    if not settings.trials:
        yield "off (confirm.trials=0)"
        return
    chosen = max(runs.total // settings.seeds - 1, 0)
    best = "trial" if chosen == 1 else f"{chosen} trials"
    yield (
        f"{runs.total} runs, {runs.done} of them finished: the best {best} and the baseline, "
        f"{settings.seeds} seeds each, {(runs.total - runs.done) * budget} epochs"
    )


@dataclass(frozen=True)
class Pace:
    """Seconds that one worker needs on this machine."""

    teacher: float
    """To train the teacher and to compute its targets; 0 if both exist."""
    distill: float
    """For an epoch of stage 1 with its evaluation."""
    refine: float
    """For an epoch of stage 2 with its evaluation; 0 without a stage 2."""
    before_refine: float
    """To train the swap resolver before the first epoch of stage 2; 0 without one."""

    @classmethod
    def of(
        cls,
        speeds: Speeds,
        counts: Counts,
        teacher: TeacherConfig,
        distill: DistillConfig,
        refine: RefineConfig,
        *,
        is_made: bool,
    ) -> Pace:
        """Compute the pace from the speeds on a few people.

        Args:
            is_made: whether the teacher and its targets exist.
        """

        def epoch(stage: str, batch_size: int) -> float:
            steps = math.ceil(counts.train / batch_size)
            return steps * speeds.steps[stage] + counts.search * speeds.people[stage]

        for_teacher = 0.0
        if not is_made and "teacher" in speeds.people:
            for_teacher = teacher.views * counts.train * speeds.people["teacher"]
            if teacher.epochs:
                for_teacher += teacher.epochs * epoch("teacher", teacher.batch_size)
        has_refine = "refine" in speeds.steps
        return cls(
            teacher=for_teacher,
            distill=epoch("distill", distill.batch_size),
            refine=epoch("refine", refine.batch_size) if has_refine else 0.0,
            before_refine=speeds.before.get("refine", 0.0) * min(counts.train, MAX_PEOPLE),
        )


def pace_lines(speeds: Speeds, batch_sizes: Mapping[str, int], pace: Pace) -> Iterator[str]:
    """Yield the pace of each network.

    Args:
        batch_sizes: people in a training step, by stage.
    """
    for stage, seconds in speeds.steps.items():
        yield f"{stage}: {_span(seconds)} for a step of {batch_sizes[stage]} people"
    for stage, seconds in speeds.people.items():
        yield f"{stage}: {_span(BATCH_SIZE * seconds)} to evaluate {BATCH_SIZE} people"
    if before := pace.before_refine:
        yield f"refine: {_span(before)} to train the swap resolver before the first epoch"


def time_lines(
    pace: Pace,
    search: SearchConfig,
    stages: Sequence[Sequence[TrialGroup]],
    epochs: StageEpochs,
    confirm: ConfirmRuns,
    concurrent: int,
) -> Iterator[str]:
    """Yield the time of each part of the study, and of all parts.

    Args:
        stages: trials still to run, by stage.
        epochs: epochs of a confirming run.
        concurrent: trials that run at the same time.
    """
    run_seconds = epochs.distill * pace.distill + epochs.refine * pace.refine
    run_seconds += pace.before_refine
    expected, most = _trials_seconds(search, stages, pace)
    confirming = (confirm.total - confirm.done) * run_seconds / concurrent
    parts = [
        ("teacher", pace.teacher, pace.teacher),
        ("trials", expected / concurrent, most / concurrent),
        ("confirming", confirming, confirming),
    ]
    for name, expected, bound in parts:
        if not bound:
            continue
        if name == "trials" and not is_predictable(search):
            yield f"{name}: at most {_span(bound)}"
            continue
        at_most = f", at most {_span(bound)}" if bound > expected else ""
        yield f"{name}: about {_span(expected)}{at_most}"
    total, bound = sum(part[1] for part in parts), sum(part[2] for part in parts)
    about = f"about {total / 3600:.2g} hours, " if is_predictable(search) else ""
    yield (
        f"in all: {about}at most {bound / 3600:.2g} hours; not counted: cutting crops, starting "
        "processes, computing AP, scoring val"
    )


def _trials_seconds(
    search: SearchConfig, stages: Sequence[Sequence[TrialGroup]], pace: Pace
) -> tuple[float, float]:
    """Seconds of all trials, one after another: expected, and at most."""
    expected = most = 0.0
    for group in itertools.chain(*stages):
        epochs = [pace.distill] * group.distill_epochs + [pace.refine] * group.refine_epochs
        if group.refine_epochs:
            epochs[group.distill_epochs] += pace.before_refine
        most += group.trials * sum(epochs)
        expected += group.trials * float(np.dot(epochs, group.shares(search)))
    return expected, most


def _span(seconds: float) -> str:
    """The time in ms, s, min or h, whichever reads best."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 90:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def disk_lines(confirm: ConfirmConfig, trials: int, speeds: Speeds, folder: Path) -> Iterator[str]:
    """Yield the disk space of checkpoints, and what is free.

    Args:
        trials: ``search.trials``.
    """
    # A parameter takes 12 bytes: itself and AdamW's two running means, 4 bytes each.
    epoch = 12 * max(speeds.parameters[s] for s in ("distill", "refine") if s in speeds.parameters)
    runs = trials
    if confirm.trials:
        runs += (confirm.trials + 1) * confirm.seeds
    free = shutil.disk_usage(nearest_folder(folder)).free
    needed = runs * KEPT_EPOCHS * epoch
    yield (
        f"checkpoints: at most {readable(needed)} ({runs} trials and runs, {KEPT_EPOCHS} epochs "
        f"of {readable(epoch)} each); {readable(free)} free in {nearest_folder(folder)}"
    )
    if needed > free:
        yield "warning: the disk has too little free space for them"


def nearest_folder(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.parents) if path.is_dir())
