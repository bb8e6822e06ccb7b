"""The epochs, the hours and the room that a study will take, from what it is and its pace here."""

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
"""Checkpoints of a trial at most: the last, and the best of each stage."""

FIRST_AT_RANDOM = {
    **dict.fromkeys(("tpe", "gp", "cmaes"), "startup_trials"),
    "nsga2": "population",
}
"""By sampler, the setting of ``search`` that says how many trials come before it learns."""


@dataclass(frozen=True)
class Counts:
    """How many people there are, or about will be."""

    train: int
    search: int
    val: int
    found: int
    about: bool


def trial_lines(
    search: SearchConfig,
    stages: Sequence[Sequence[TrialGroup]],
    finished: int,
    room: int,
    *,
    is_staged: bool,
) -> Iterator[str]:
    """How many trials, and how many epochs they come to."""
    left = max(search.trials - finished, 0)
    known = "the baseline, the defaults of either stage" if is_staged else "baseline, defaults"
    yield (
        f"{finished} finished, {left} to run of {search.trials}, controls ({known}) among "
        f"them; {min(room, max(left, 1))} at once"
    )
    if is_staged:
        students, refiners = (sum(group.trials for group in groups) for groups in stages)
        yield f"plan=staged: {students} students to train, then {refiners} refiners"
    groups = list(itertools.chain(*stages))
    most = f"epochs: at most {sum(group.most for group in groups)}"
    if not is_predictable(search):
        yield f"{most}; what pruner={search.pruner} leaves of them can't be foreseen"
        return
    expected = sum(group.trials * sum(group.shares(search)) for group in groups)
    yield f"{most}, about {expected:.0f} with pruner={search.pruner}"


def search_warnings(
    search: SearchConfig,
    confirm: ConfirmConfig,
    plan: PlanConfig,
    stages: Sequence[Sequence[TrialGroup]],
    room: int,
) -> Iterator[str]:
    """What is asked for and can't come about, though nothing is impossible.

    Args:
        stages: those of the study as if nothing of it were finished.
    """
    if search.concurrent > room:
        yield f"warning: search.concurrent={search.concurrent}, but there is room for {room}"
    if search.trials > 1 and confirm.trials >= search.trials:
        yield (
            f"warning: confirm.trials={confirm.trials}, but there are {search.trials - 1} trials "
            "beside the baseline; lower it, or raise search.trials"
        )
    if plan.kind == STAGED:
        able = sum(group.trials for group in stages[0]) - 1
        if plan.parents > able:
            yield (
                f"warning: plan.parents={plan.parents}, but there are {able} students "
                "beside the baseline; lower it, or raise search.trials or plan.distill_share"
            )
    largest = max(sum(group.trials for group in groups) for groups in stages)
    yield from _pruner_warnings(search, stages, largest)
    is_searched = any(group.trials for group in itertools.chain(*stages) if group.can_be_pruned)
    setting = FIRST_AT_RANDOM.get(search.sampler)
    if setting and is_searched and not search.warm_start and getattr(search, setting) >= largest:
        yield (
            f"warning: search.sampler={search.sampler} will learn nothing, since the first "
            f"{getattr(search, setting)} trials of a search are drawn at random and the largest "
            f"has {largest}; raise search.trials or lower search.{setting}"
        )


def _pruner_warnings(
    search: SearchConfig, stages: Sequence[Sequence[TrialGroup]], largest: int
) -> Iterator[str]:
    """Where a pruner is named that will prune nothing; ``largest`` search has so many trials."""
    if search.pruner == "none":
        return
    budget = max((g.budget for g in itertools.chain(*stages) if g.can_be_pruned), default=0)
    if search.min_epochs >= budget:
        yield (
            f"warning: no trial will be pruned, since none has more than {budget} epochs, got "
            f"search.min_epochs={search.min_epochs}; lower it, or set search.pruner=none"
        )
        return
    if search.pruner in ("median", "percentile") and search.startup_trials >= largest:
        yield (
            f"warning: no trial will be pruned, since search.pruner={search.pruner} waits for "
            f"{search.startup_trials} finished trials and the largest search has {largest}; raise "
            "search.trials or lower search.startup_trials"
        )


class ConfirmRuns(NamedTuple):
    """How many confirming runs there are; at most, until the trials are finished."""

    total: int
    done: int
    """Those whose result is there already."""


def count_confirm_runs(
    settings: ConfirmConfig, trials: int, folder: Path, finished: int
) -> ConfirmRuns:
    """Count the confirming runs of a study.

    Args:
        trials: as ``search.trials``.
        finished: how many of them are over.
    """
    searched = max(trials - 1, 0)  # the baseline goes by itself
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
    """How many confirming runs, and how many are there already.

    Args:
        budget: epochs of a run.
    """
    if not settings.trials:
        yield "off (confirm.trials=0)"
        return
    chosen = max(runs.total // settings.seeds - 1, 0)
    best = "trial" if chosen == 1 else f"{chosen} trials"
    yield (
        f"{runs.total} runs, {runs.done} of them there already: the best {best} and the baseline, "
        f"{settings.seeds} seeds each, {(runs.total - runs.done) * budget} epochs"
    )


@dataclass(frozen=True)
class Pace:
    """Seconds that one worker takes here."""

    teacher: float
    """Until the teacher and its targets are made; 0 if they are."""
    distill: float
    """An epoch of stage 1, its evaluation included."""
    refine: float
    """An epoch of stage 2, its evaluation included; 0 without a stage 2."""
    before_refine: float
    """What a trial learns before the first epoch of stage 2."""

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
        """Work out the pace from the speeds on a few people.

        Args:
            is_made: whether the teacher and its targets are.
        """

        def epoch(stage: str, batch_size: int) -> float:
            steps = math.ceil(counts.train / batch_size)
            return steps * speeds.steps[stage] + counts.search * speeds.people[stage]

        until_taught = 0.0
        if not is_made and "teacher" in speeds.people:
            until_taught = teacher.views * counts.train * speeds.people["teacher"]
            if teacher.epochs:
                until_taught += teacher.epochs * epoch("teacher", teacher.batch_size)
        has_refine = "refine" in speeds.steps
        return cls(
            teacher=until_taught,
            distill=epoch("distill", distill.batch_size),
            refine=epoch("refine", refine.batch_size) if has_refine else 0.0,
            before_refine=speeds.before.get("refine", 0.0) * min(counts.train, MAX_PEOPLE),
        )


def pace_lines(speeds: Speeds, batch_sizes: Mapping[str, int], pace: Pace) -> Iterator[str]:
    """The pace of each network here.

    Args:
        batch_sizes: people of a training step, by stage.
    """
    for stage, seconds in speeds.steps.items():
        yield f"{stage}: {_span(seconds)} a step of {batch_sizes[stage]} people"
    for stage, seconds in speeds.people.items():
        yield f"{stage}: {_span(BATCH_SIZE * seconds)} to evaluate a batch of {BATCH_SIZE} people"
    if before := pace.before_refine:
        yield f"refine: {_span(before)} to learn left from right before a trial's first epoch"


def time_lines(
    pace: Pace,
    search: SearchConfig,
    stages: Sequence[Sequence[TrialGroup]],
    epochs: StageEpochs,
    confirm: ConfirmRuns,
    room: int,
) -> Iterator[str]:
    """The hours that this pace makes.

    Args:
        epochs: of a confirming run.
    """
    run_seconds = epochs.distill * pace.distill + epochs.refine * pace.refine
    run_seconds += pace.before_refine
    about, most = _trials_seconds(search, stages, pace)
    confirming = (confirm.total - confirm.done) * run_seconds
    parts = [("teacher", pace.teacher, pace.teacher)]
    parts += [
        ("trials", about / room, most / room),
        ("confirming", confirming / room, confirming / room),
    ]
    for name, expected, bound in parts:
        if not bound:
            continue
        if name == "trials" and not is_predictable(search):
            yield f"{name}: at most {_span(bound)}"
            continue
        upto = f", at most {_span(bound)}" if bound > expected else ""
        yield f"{name}: about {_span(expected)}{upto}"
    total, bound = sum(part[1] for part in parts), sum(part[2] for part in parts)
    foreseen = f"about {total / 3600:.2g} hours, " if is_predictable(search) else ""
    yield (
        f"in all: {foreseen}at most {bound / 3600:.2g} hours; not counted: making crops, starting "
        "processes, AP's own arithmetic, scoring val"
    )


def _trials_seconds(
    search: SearchConfig, stages: Sequence[Sequence[TrialGroup]], pace: Pace
) -> tuple[float, float]:
    """What the trials take, one after another, as expected and at most."""
    about = most = 0.0
    for group in itertools.chain(*stages):
        own = [pace.distill] * group.distill_epochs + [pace.refine] * group.refine_epochs
        if group.refine_epochs:
            own[group.distill_epochs] += pace.before_refine
        most += group.trials * sum(own)
        about += group.trials * float(np.dot(own, group.shares(search)))
    return about, most


def _span(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 90:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def disk_lines(confirm: ConfirmConfig, trials: int, speeds: Speeds, folder: Path) -> Iterator[str]:
    """The room that checkpoints take."""
    # Weights, and two running means of AdamW, 4 bytes each.
    epoch = 12 * max(speeds.parameters[s] for s in ("distill", "refine") if s in speeds.parameters)
    runs = trials
    if confirm.trials:
        runs += (confirm.trials + 1) * confirm.seeds
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
