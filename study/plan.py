"""What a study would compute, said before anything is: ``python study/tune.py plan_only=true``.

Nothing is left behind: the data are read and checked as the study would, a few people's crops are
cut into a temporary folder to time the networks on, and people that are still to be drawn are a
handful drawn there.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from study.checkpoint import Checkpoints
from study.config import InputError, with_values
from study.confirm_table import chosen_trials
from study.crop_files import plan_parts
from study.crop_sizes import choose_form, readable, sampled_bytes
from study.crops import STORED_MARGIN, image_to_crop_affine, stored_frame, stored_size
from study.dataset import People
from study.drawn_people import draw_dataset, is_drawn
from study.finals import num_finished
from study.limits import PREDICTIONS
from study.prepare import (
    StudyData,
    StudyPeople,
    cache_of,
    input_size_of,
    place_of_crops,
    read_study_people,
    teacher_input_size_of,
)
from study.room import require_trial_fits
from study.schema import SearchConfig, StudyConfig
from study.store import is_there, store_folder
from study.teacher import EPOCHS, is_ready, teacher_folder
from study.teachers import check_teacher
from study.timing import Speeds, time_study

HANDFUL = (24, 8)
"""Pictures of train and val that stand for drawn people who are not there yet."""
KEPT_EPOCHS = 3
"""Checkpoints of a trial at most: the last, and the best of each stage."""
CONTROLS = 2


@dataclass(frozen=True)
class Counts:
    """How many people there are, or about will be."""

    train: int
    search: int
    val: int
    found: int
    about: bool


def show_plan(config: StudyConfig, folder: Path, say: Callable[[str], None]) -> None:
    """Says what the study in this folder would compute.

    Raises:
        InputError: what would stop the study, too.
    """
    data, is_here = config.data, True
    with tempfile.TemporaryDirectory(prefix="plan-") as scratch:
        read = config
        if data.kind == "drawn":
            train_pictures, val_pictures = data.train_pictures, data.val_pictures
            is_here = is_drawn(
                Path(data.root),
                seed=data.seed,
                train_pictures=train_pictures,
                val_pictures=val_pictures,
            )
            if not is_here:
                read = _handful(config, Path(scratch) / "drawn")
        people = read_study_people(read, lambda name: lambda done, total: None, say)
        counts = _counts(config, read, people)
        say("data")
        _tell(say, _data_lines(config, counts, people, is_here))
        planned = planned_data(config, people) if is_here else None
        say("stores of crops")
        _tell(say, _store_lines(config, counts, people, planned))
        check_teacher(config)
        say("timing a few steps on this machine ...")
        speeds = time_study(read, people.train)
    say("teacher")
    _tell(say, _teacher_lines(config, planned))
    finished = num_finished(folder)
    room = _room_here(config, say)
    say("trials")
    _tell(say, _trial_lines(config, finished, room))
    say("confirming")
    _tell(say, _confirm_lines(config, folder, finished))
    say(f"time, by the steps of one worker on this machine ({speeds.device}); a cluster differs")
    _tell(say, _time_lines(config, planned, counts, speeds, finished, room))
    say("disk")
    _tell(say, _disk_lines(config, speeds, folder))
    say("nothing was computed and nothing is left; without plan_only=true the study runs")


def planned_data(config: StudyConfig, people: StudyPeople) -> StudyData:
    """What ``prepare_data`` makes of these people, by its paths alone."""
    url, folder = place_of_crops(config)

    def stores(size: tuple[int, int]) -> tuple[str, str, str]:
        parts = (people.train, people.search, people.found)
        form = choose_form(config.data.crops, sum(map(len, parts)), stored_size(size))
        train, search, val = (str(store_folder(part, size, folder, form)) for part in parts)
        return train, search, val

    own = stores(input_size_of(config))
    is_same = teacher_input_size_of(config) == input_size_of(config)
    return StudyData(
        *own,
        search_truth=str(people.search_truth(cache_of(config)).file),
        val_truth=str(people.val_truth(cache_of(config)).file),
        num_people=(len(people.train), len(people.search), len(people.val)),
        teacher_crops=own if is_same else stores(teacher_input_size_of(config)),
        url=url,
    )


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


def _tell(say: Callable[[str], None], lines: Iterator[str]) -> None:
    for line in lines:
        say(f"  {line}")


def _handful(config: StudyConfig, root: Path) -> StudyConfig:
    train, val = (
        min(few, all_of)
        for few, all_of in zip(
            HANDFUL, (config.data.train_pictures, config.data.val_pictures), strict=True
        )
    )
    draw_dataset(root, seed=config.data.seed, train_pictures=train, val_pictures=val)
    values = {"data.train_pictures": train, "data.val_pictures": val, "data.max_people": 0}
    return with_values(config, {"data.root": str(root), **values})


def _counts(config: StudyConfig, read: StudyConfig, people: StudyPeople) -> Counts:
    """Those read; of a handful, as many more as there will be pictures more."""
    more = config.data.train_pictures / read.data.train_pictures
    more_val = config.data.val_pictures / read.data.val_pictures
    train, search = round(more * len(people.train)), round(more * len(people.search))
    most = config.data.max_people
    if read is not config and most and train + search > most:
        train, search = (round(n * most / (train + search)) for n in (train, search))
    val, found = round(more_val * len(people.val)), round(more_val * len(people.found))
    return Counts(train, search, val, found, about=read is not config)


def _data_lines(
    config: StudyConfig, counts: Counts, people: StudyPeople, is_here: bool
) -> Iterator[str]:
    data, about = config.data, "about " if counts.about else ""
    if not is_here:
        pictures = f"{data.train_pictures:,} + {data.val_pictures:,}"
        yield f"to be drawn: {pictures} pictures in {data.root}"
    yield (
        f"{about}{counts.train:,} people to train on, {counts.search:,} to score trials on, "
        f"{counts.val:,} in val"
    )
    if people.found is not people.val:
        yield f"{counts.found:,} boxes to look in, from {data.val.detections}"
    left_out = len(people.left_out) + len(people.left_out_of_val)
    yield f"the audit found no fault that stops the study; left out for faults: {left_out}"


def _store_lines(
    config: StudyConfig, counts: Counts, people: StudyPeople, planned: StudyData | None
) -> Iterator[str]:
    numbers = (counts.train, counts.search, counts.found)
    sizes = [(input_size_of(config), "")]
    if teacher_input_size_of(config) != input_size_of(config):
        sizes.append((teacher_input_size_of(config), " for the teacher"))
    url, folder = place_of_crops(config)
    needed = 0.0
    for at, (size, whose) in enumerate(sizes):
        form = choose_form(config.data.crops, sum(numbers), stored_size(size))
        paths: tuple[str | None, ...] = (None,) * 3
        if planned is not None:
            own = (planned.train, planned.search, planned.val)
            paths = planned.teacher_crops if at else own
        parts = zip(
            ("train", "search", "val"),
            (people.train, people.search, people.found),
            numbers,
            paths,
            strict=True,
        )
        for name, part, number, path in parts:
            if url is None and path is not None and is_there(Path(path)):
                yield f"{name}{whose}: there already, is used again"
                continue
            room = number * _bytes_of_a_crop(part, size, form)
            needed += room
            yield f"{name}{whose}: to be made, {number:,} crops, about {readable(room)} as {form}"
    free = shutil.disk_usage(_existing(folder)).free
    if url is not None:
        yield f"in {url}; what is there already is not made again"
    yield f"{readable(needed)} needed, {readable(free)} free in {_existing(folder)}"
    if needed > free:
        yield "warning: there is no room for them; the study would stop"


def _bytes_of_a_crop(people: People, size: tuple[int, int], form: str) -> float:
    affines = image_to_crop_affine(people.boxes, stored_frame(size), margin=STORED_MARGIN)
    parts, _ = plan_parts(people.image_paths, affines, stored_size(size), form, Path("unused"))
    return sampled_bytes(parts)


def _teacher_lines(config: StudyConfig, planned: StudyData | None) -> Iterator[str]:
    epochs = config.teacher.epochs
    if planned is None:
        yield f"to be trained for {epochs} epochs, then to be asked about everyone"
        return
    folder = teacher_folder(config, planned)
    if is_ready(folder):
        yield f"there already, is used again: {folder}"
        return
    last = Checkpoints(folder / EPOCHS).last()
    done = last.epoch if last else 0
    if config.teacher.name == PREDICTIONS:
        yield f"the predictions of {config.teacher.init} are to be stored"
    elif epochs:
        yield f"epochs to train: {epochs - done} of {epochs}; then to be asked about everyone"
    else:
        yield f"as it comes ({config.teacher.init}); to be asked about everyone"


def _room_here(config: StudyConfig, say: Callable[[str], None]) -> int:
    """Trials at once on this machine; on a cluster those asked for."""
    if os.environ.get("RAY_ADDRESS", "local") != "local" and config.search.concurrent:
        return config.search.concurrent
    has = {"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())}
    try:
        room = require_trial_fits([has], config.trial)
    except InputError as error:
        say(f"warning: here the study would stop: {error}")
        return config.search.concurrent or 1
    return min(config.search.concurrent or room, room)


def _trial_lines(config: StudyConfig, finished: int, room: int) -> Iterator[str]:
    budget = config.distill.epochs + config.refine.epochs
    left = max(config.search.trials - finished, 0)
    yield (
        f"{finished} finished, {left} to run of {config.search.trials}, {CONTROLS} of them "
        f"controls (baseline, defaults); {min(room, max(left, 1))} at once"
    )
    yield (
        f"epochs: at most {left * budget}, about {_trial_epochs(config, finished):.0f} with "
        f"pruner={config.search.pruner}"
    )


def _left(config: StudyConfig, finished: int) -> tuple[int, int]:
    """Controls and searched trials that are still to run."""
    controls = min(max(CONTROLS - finished, 0), max(config.search.trials - finished, 0))
    return controls, max(config.search.trials - finished, 0) - controls


def _trial_epochs(config: StudyConfig, finished: int) -> float:
    budget = config.distill.epochs + config.refine.epochs
    controls, searched = _left(config, finished)
    return controls * budget + searched * sum(expected_epochs(budget, config.search))


def _confirm_runs(config: StudyConfig, folder: Path, finished: int) -> tuple[int, int]:
    """Runs in all, and those that are there already."""
    settings = config.confirm
    searched = max(config.search.trials - 1, 0)  # the baseline goes by itself
    number = (min(settings.trials, searched) + 1) * settings.seeds if settings.trials else 0
    if finished < config.search.trials:
        return number, 0
    known = [
        folder / "confirm" / f"{trial['trial']}-{run}" / "result.json"
        for trial in chosen_trials(folder, settings)
        for run in range(settings.seeds)
    ]
    return number, sum(file.is_file() for file in known)


def _confirm_lines(config: StudyConfig, folder: Path, finished: int) -> Iterator[str]:
    number, done = _confirm_runs(config, folder, finished)
    budget = config.distill.epochs + config.refine.epochs
    if not number:
        yield "off (confirm.trials=0)"
        return
    yield (
        f"{number} runs, {done} of them there already: the best {config.confirm.trials} trials "
        f"and the baseline, {config.confirm.seeds} seeds each, {(number - done) * budget} epochs"
    )


def _time_lines(
    config: StudyConfig,
    planned: StudyData | None,
    counts: Counts,
    speeds: Speeds,
    finished: int,
    room: int,
) -> Iterator[str]:
    for stage, seconds in speeds.steps.items():
        batch = getattr(config, stage).batch_size
        yield f"{stage}: {_span(seconds)} a step of {batch} people"
    for stage, seconds in speeds.people.items():
        yield f"{stage}: {_span(64 * seconds)} to evaluate a batch of 64 people"

    def epoch(stage: str) -> float:
        steps = math.ceil(counts.train / getattr(config, stage).batch_size)
        return steps * speeds.steps[stage] + counts.search * speeds.people[stage]

    teacher = 0.0
    is_made = planned is not None and is_ready(teacher_folder(config, planned))
    if not is_made and "teacher" in speeds.people:
        teacher = counts.train * speeds.people["teacher"]
        if config.teacher.epochs:
            teacher += config.teacher.epochs * epoch("teacher")
    distill, refine = config.distill.epochs, config.refine.epochs
    costs = [epoch("distill")] * distill + ([epoch("refine")] * refine if refine else [])
    shares = expected_epochs(len(costs), config.search)
    controls, searched = _left(config, finished)
    most = (controls + searched) * sum(costs)
    about = controls * sum(costs) + searched * float(np.dot(costs, shares))
    number, done = _confirm_runs(config, Path(config.storage) / config.name, finished)
    confirm = (number - done) * sum(costs)
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


def _disk_lines(config: StudyConfig, speeds: Speeds, folder: Path) -> Iterator[str]:
    # Weights, and two running means of AdamW, 4 bytes each.
    epoch = 12 * max(speeds.parameters[s] for s in ("distill", "refine") if s in speeds.parameters)
    runs = config.search.trials
    if config.confirm.trials:
        runs += (config.confirm.trials + 1) * config.confirm.seeds
    free = shutil.disk_usage(_existing(folder)).free
    needed = runs * KEPT_EPOCHS * epoch
    yield (
        f"checkpoints: at most {readable(needed)} ({runs} trials and runs, {KEPT_EPOCHS} epochs "
        f"of {readable(epoch)} each); {readable(free)} free in {_existing(folder)}"
    )
    if needed > free:
        yield "warning: there is no room for them"


def _existing(folder: Path) -> Path:
    """The folder, or the first above it that is there."""
    return next(path for path in (folder, *folder.parents) if path.is_dir())
