"""What a study would compute, said before anything is: ``python study/tune.py plan_only=true``.

Nothing is left behind: the data are read and checked as the study would, a few people's crops are
cut into a temporary folder to time the networks on, and people that are still to be drawn are a
handful drawn there.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from search_spaces.space import SearchSpace
from study.cache.crop_bucket import check_bucket
from study.cache.crop_parts import choose_form, plan_parts, readable, sampled_bytes
from study.cache.crop_store import is_there
from study.cache.prepare import PreparedData, StudyPeople, planned_data, read_study_people
from study.config.compose import to_plain, with_absolute_paths
from study.config.derived import Resolved, resolve
from study.config.schema import (
    PREDICTIONS,
    DataConfig,
    SearchConfig,
    StudyConfig,
    TeacherConfig,
    TrialConfig,
)
from study.data.crops import STORED_MARGIN, image_to_crop_affine, stored_frame, stored_size
from study.data.people import People
from study.data.synthetic.dataset import draw_dataset, is_drawn
from study.dry_run.cost import (
    Counts,
    Pace,
    confirm_lines,
    count_confirm_runs,
    disk_lines,
    existing,
    pace_lines,
    search_warnings,
    time_lines,
    trial_lines,
)
from study.dry_run.timing import time_study
from study.errors import InputError
from study.launch.cluster import check_trial_fits, is_autoscaled, this_machine
from study.search.forecast import StageEpochs, TrialGroup, trial_groups
from study.search.samplers import sampler_notes
from study.search.stage import trials_handed_over
from study.search.staged import distill_space
from study.search.warm_start import check_warm_start, known_trial_lines
from study.storage.checkpoint import Checkpoints
from study.storage.paths import settings_file, teacher_epochs
from study.teachers.make import is_ready, teacher_folder
from study.trial import teacher_spec
from study.validation.finalists import num_finished

HANDFUL = (24, 8)
"""Images of train and val that stand for drawn people who are not there yet."""


def show_plan(
    as_typed: StudyConfig, space: SearchSpace, folder: Path, notify: Callable[[str], None]
) -> None:
    """Says what the study in this folder would compute.

    Raises:
        InputError: what would stop the study, too.
    """
    config = with_absolute_paths(as_typed)
    resolved = resolve(config)
    spec = teacher_spec(config, resolved)
    data, search, is_here = config.data, config.search, True
    if resolved.crops_url is not None:
        check_bucket(resolved.crops_url)
    with tempfile.TemporaryDirectory(prefix="plan-") as scratch:
        read = data
        if data.kind == "drawn":
            num_train_images, num_val_images = data.num_train_images, data.num_val_images
            is_here = is_drawn(
                Path(data.root),
                seed=data.seed,
                num_train_images=num_train_images,
                num_val_images=num_val_images,
            )
            if not is_here:
                read = _handful(data, Path(scratch) / "drawn")
        people = read_study_people(
            read, resolved.skeleton, lambda name: lambda done, total: None, notify
        )
        counts = _counts(data, read, people)
        notify("data")
        _tell(notify, _data_lines(data, counts, people, is_here))
        planned = planned_data(people, data.crops, resolved) if is_here else None
        notify("stores of crops")
        _tell(notify, _store_lines(data.crops, resolved, counts, people, planned))
        notify("timing a few steps on this machine ...")
        speeds = time_study(spec, config.student, config.refine, people.train)
    notify("teacher")
    teacher = None if planned is None else teacher_folder(spec, planned)
    _tell(notify, _teacher_lines(spec.teacher, teacher))
    finished = num_finished(folder)
    room = _room_here(search, config.trial, notify)
    handed_over = trials_handed_over(folder, config.name)
    epochs = StageEpochs(config.distill.epochs, config.refine.epochs)

    def groups(finished: int) -> list[list[TrialGroup]]:
        return trial_groups(
            config.plan, search.trials, epochs, finished=finished, handed_over=handed_over
        )

    stages = groups(finished)
    notify("trials")
    _tell(notify, trial_lines(search, stages, finished, room, is_staged=resolved.is_staged))
    _tell(notify, search_warnings(search, config.confirm, config.plan, groups(0), room))
    own = distill_space(space) if resolved.is_staged else space
    _tell(notify, sampler_notes(search.sampler, own))
    if search.warm_start and not settings_file(folder).exists():
        if planned is not None and teacher is not None:
            check_warm_start(search.warm_start, folder, planned.fingerprint, teacher.name)
        _tell(notify, _warm_start_lines(to_plain(as_typed), search, own, is_here))
    runs = count_confirm_runs(config.confirm, search.trials, folder, finished)
    notify("confirming")
    _tell(notify, confirm_lines(config.confirm, runs, sum(epochs)))
    notify(
        f"time, by the steps of one worker on this machine ({speeds.device}); a cluster differs"
    )
    is_made = teacher is not None and is_ready(teacher)
    pace = Pace.of(speeds, counts, spec.teacher, config.distill, config.refine, is_made=is_made)
    batch_sizes = {
        "teacher": spec.teacher.batch_size,
        "distill": config.distill.batch_size,
        "refine": config.refine.batch_size,
    }
    _tell(notify, pace_lines(speeds, batch_sizes, pace))
    _tell(notify, time_lines(pace, search, stages, epochs, runs, room))
    notify("disk")
    _tell(notify, disk_lines(config.confirm, search.trials, speeds, folder))
    notify("nothing was computed and nothing is left; without plan_only=true the study runs")


def _tell(notify: Callable[[str], None], lines: Iterator[str]) -> None:
    for line in lines:
        notify(f"  {line}")


def _handful(data: DataConfig, root: Path) -> DataConfig:
    train, val = (
        min(few, all_of)
        for few, all_of in zip(HANDFUL, (data.num_train_images, data.num_val_images), strict=True)
    )
    draw_dataset(root, seed=data.seed, num_train_images=train, num_val_images=val)
    return dataclasses.replace(
        data, root=str(root), num_train_images=train, num_val_images=val, max_people=0
    )


def _counts(data: DataConfig, read: DataConfig, people: StudyPeople) -> Counts:
    """Those read; of a handful, as many more as there will be images more."""
    more = data.num_train_images / read.num_train_images
    more_val = data.num_val_images / read.num_val_images
    train, search = round(more * len(people.train)), round(more * len(people.search))
    most = data.max_people
    if read is not data and most and train + search > most:
        train, search = (round(n * most / (train + search)) for n in (train, search))
    val, found = round(more_val * len(people.val)), round(more_val * len(people.found))
    return Counts(train, search, val, found, about=read is not data)


def _data_lines(
    data: DataConfig, counts: Counts, people: StudyPeople, is_here: bool
) -> Iterator[str]:
    about = "about " if counts.about else ""
    if not is_here:
        images = f"{data.num_train_images:,} + {data.num_val_images:,}"
        yield f"to be drawn: {images} images in {data.root}"
    yield (
        f"{about}{counts.train:,} people to train on, {counts.search:,} to score trials on, "
        f"{counts.val:,} in val"
    )
    if people.found is not people.val:
        yield f"{counts.found:,} boxes to look in, from {data.val.detections}"
    left_out = len(people.left_out) + len(people.left_out_of_val)
    yield f"the audit found no fault that stops the study; left out for faults: {left_out}"


def _store_lines(
    crops: str,
    resolved: Resolved,
    counts: Counts,
    people: StudyPeople,
    planned: PreparedData | None,
) -> Iterator[str]:
    numbers = (counts.train, counts.search, counts.found)
    sizes = [(resolved.input_size, "")]
    if resolved.teacher_input_size != resolved.input_size:
        sizes.append((resolved.teacher_input_size, " for the teacher"))
    url, folder = resolved.crops_url, resolved.crops_folder
    needed = 0.0
    for at, (size, whose) in enumerate(sizes):
        form = choose_form(crops, sum(numbers), stored_size(size))
        paths: tuple[str | None, ...] = (None,) * 3
        if planned is not None:
            paths = planned.teacher_crops if at else planned.crops
        parts = zip(
            ("train", "search", "val"),
            people.cropped,
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
    free = shutil.disk_usage(existing(folder)).free
    if url is not None:
        yield f"in {url}; what is there already is not made again"
    yield f"{readable(needed)} needed, {readable(free)} free in {existing(folder)}"
    if needed > free:
        yield "warning: there is no room for them; the study would stop"


def _bytes_of_a_crop(people: People, size: tuple[int, int], form: str) -> float:
    affines = image_to_crop_affine(people.boxes, stored_frame(size), margin=STORED_MARGIN)
    parts, _ = plan_parts(people.image_paths, affines, stored_size(size), form, Path("unused"))
    return sampled_bytes(parts)


def _teacher_lines(teacher: TeacherConfig, folder: Path | None) -> Iterator[str]:
    epochs, views = teacher.epochs, teacher.views
    asked = "to be asked about everyone" + (f", in {views} views" if views > 1 else "")
    if folder is None:
        yield f"to be trained for {epochs} epochs, then {asked}"
        return
    if is_ready(folder):
        yield f"there already, is used again: {folder}"
        return
    last = Checkpoints(teacher_epochs(folder)).last()
    done = last.epoch if last else 0
    if teacher.name == PREDICTIONS:
        yield f"the predictions of {teacher.init} are to be stored"
    elif epochs:
        yield f"epochs to train: {epochs - done} of {epochs}; then {asked}"
    else:
        yield f"as it comes ({teacher.init}); {asked}"


def _warm_start_lines(
    own: Mapping[str, Any], search: SearchConfig, space: SearchSpace, is_here: bool
) -> Iterator[str]:
    """Which trials of older studies would be known, and which not."""
    if not is_here:
        yield "warm start: whether the older studies are of these data is seen once they are drawn"
    yield from known_trial_lines(own, search, space)


def _room_here(search: SearchConfig, trial: TrialConfig, notify: Callable[[str], None]) -> int:
    """Trials at once on this machine; on a cluster those asked for."""
    if is_autoscaled(search):
        return search.concurrent
    try:
        room = check_trial_fits([this_machine()], trial)
    except InputError as error:
        notify(f"warning: here the study would stop: {error}")
        return search.concurrent or 1
    return min(search.concurrent or room, room)
