"""What a study would compute, said before anything is: ``python study/tune.py plan_only=true``.

Nothing is left behind: the data are read and checked as the study would, a few people's crops are
cut into a temporary folder to time the networks on, and people that are still to be drawn are a
handful drawn there.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from search_spaces.space import SearchSpace
from study.cache.crop_bucket import check_bucket
from study.cache.crop_parts import choose_form, plan_parts, readable, sampled_bytes
from study.cache.crop_store import is_there
from study.cache.prepare import PreparedData, StudyPeople, planned_data, read_study_people
from study.config.compose import with_absolute_paths, with_values
from study.config.derived import input_size_of, is_staged, teacher_input_size_of
from study.config.schema import PREDICTIONS, StudyConfig
from study.data.crops import STORED_MARGIN, image_to_crop_affine, stored_frame, stored_size
from study.data.people import People
from study.data.synthetic.dataset import draw_dataset, is_drawn
from study.dry_run.cost import (
    Counts,
    confirm_lines,
    disk_lines,
    existing,
    search_warnings,
    time_lines,
    trial_lines,
)
from study.dry_run.timing import time_study
from study.errors import InputError
from study.launch.cluster import check_trial_fits, is_autoscaled, this_machine
from study.search.forecast import trial_groups
from study.search.samplers import sampler_notes
from study.search.stage import trials_handed_over
from study.search.staged import distill_space
from study.search.warm_start import check_warm_start, known_trial_lines
from study.storage.checkpoint import Checkpoints
from study.storage.paths import place_of_crops, settings_file, teacher_epochs
from study.teachers.make import is_ready, teacher_folder
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
    data, is_here = config.data, True
    url, _ = place_of_crops(config)
    if url is not None:
        check_bucket(url)
    with tempfile.TemporaryDirectory(prefix="plan-") as scratch:
        read = config
        if data.kind == "drawn":
            num_train_images, num_val_images = data.num_train_images, data.num_val_images
            is_here = is_drawn(
                Path(data.root),
                seed=data.seed,
                num_train_images=num_train_images,
                num_val_images=num_val_images,
            )
            if not is_here:
                read = _handful(config, Path(scratch) / "drawn")
        people = read_study_people(read, lambda name: lambda done, total: None, notify)
        counts = _counts(config, read, people)
        notify("data")
        _tell(notify, _data_lines(config, counts, people, is_here))
        planned = planned_data(config, people) if is_here else None
        notify("stores of crops")
        _tell(notify, _store_lines(config, counts, people, planned))
        notify("timing a few steps on this machine ...")
        speeds = time_study(read, people.train)
    notify("teacher")
    _tell(notify, _teacher_lines(config, planned))
    finished = num_finished(folder)
    room = _room_here(config, notify)
    handed_over = trials_handed_over(folder, config.name)
    stages = trial_groups(config, finished, handed_over)
    notify("trials")
    _tell(notify, trial_lines(config, stages, finished, room))
    _tell(notify, search_warnings(config, trial_groups(config, 0, handed_over), room))
    own = distill_space(space) if is_staged(config) else space
    _tell(notify, sampler_notes(config, own))
    _tell(notify, _warm_start_lines(as_typed, config, own, folder, planned))
    notify("confirming")
    _tell(notify, confirm_lines(config, folder, finished))
    notify(
        f"time, by the steps of one worker on this machine ({speeds.device}); a cluster differs"
    )
    _tell(notify, time_lines(config, planned, counts, speeds, stages, finished, room))
    notify("disk")
    _tell(notify, disk_lines(config, speeds, folder))
    notify("nothing was computed and nothing is left; without plan_only=true the study runs")


def _tell(notify: Callable[[str], None], lines: Iterator[str]) -> None:
    for line in lines:
        notify(f"  {line}")


def _handful(config: StudyConfig, root: Path) -> StudyConfig:
    train, val = (
        min(few, all_of)
        for few, all_of in zip(
            HANDFUL, (config.data.num_train_images, config.data.num_val_images), strict=True
        )
    )
    draw_dataset(root, seed=config.data.seed, num_train_images=train, num_val_images=val)
    values = {"data.num_train_images": train, "data.num_val_images": val, "data.max_people": 0}
    return with_values(config, {"data.root": str(root), **values})


def _counts(config: StudyConfig, read: StudyConfig, people: StudyPeople) -> Counts:
    """Those read; of a handful, as many more as there will be images more."""
    more = config.data.num_train_images / read.data.num_train_images
    more_val = config.data.num_val_images / read.data.num_val_images
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
    config: StudyConfig, counts: Counts, people: StudyPeople, planned: PreparedData | None
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


def _teacher_lines(config: StudyConfig, planned: PreparedData | None) -> Iterator[str]:
    epochs, views = config.teacher.epochs, config.teacher.views
    asked = "to be asked about everyone" + (f", in {views} views" if views > 1 else "")
    if planned is None:
        yield f"to be trained for {epochs} epochs, then {asked}"
        return
    folder = teacher_folder(config, planned)
    if is_ready(folder):
        yield f"there already, is used again: {folder}"
        return
    last = Checkpoints(teacher_epochs(folder)).last()
    done = last.epoch if last else 0
    if config.teacher.name == PREDICTIONS:
        yield f"the predictions of {config.teacher.init} are to be stored"
    elif epochs:
        yield f"epochs to train: {epochs - done} of {epochs}; then {asked}"
    else:
        yield f"as it comes ({config.teacher.init}); {asked}"


def _warm_start_lines(
    as_typed: StudyConfig,
    config: StudyConfig,
    space: SearchSpace,
    folder: Path,
    planned: PreparedData | None,
) -> Iterator[str]:
    """Which trials of older studies would be known, and which not; nothing once they are."""
    if not config.search.warm_start or settings_file(folder).exists():
        return
    if planned is None:
        yield "warm start: whether the older studies are of these data is seen once they are drawn"
    else:
        teacher = teacher_folder(config, planned).name
        check_warm_start(config, folder, planned.fingerprint, teacher)
    yield from known_trial_lines(as_typed, config, space)


def _room_here(config: StudyConfig, notify: Callable[[str], None]) -> int:
    """Trials at once on this machine; on a cluster those asked for."""
    if is_autoscaled(config):
        return config.search.concurrent
    try:
        room = check_trial_fits([this_machine()], config.trial)
    except InputError as error:
        notify(f"warning: here the study would stop: {error}")
        return config.search.concurrent or 1
    return min(config.search.concurrent or room, room)
