"""The dry run: report what a study would compute (``python study/tune.py plan_only=true``).

Data are read and checked as in the study. To time the networks, crops of a few people are cut
into a temporary folder; of a synthetic data set that doesn't exist yet, a few images are drawn
there. No file is left behind.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from models.skeleton import Skeleton
from search_spaces.space import SearchSpace
from study.cache.crop_bucket import check_bucket
from study.cache.crop_parts import choose_form, plan_parts, readable, sampled_bytes
from study.cache.crop_store import is_complete
from study.cache.prepare import PreparedData, planned_data
from study.cache.study_people import StudyPeople, read_study_people
from study.config.compose import to_plain
from study.config.derived import Resolved, resolve
from study.config.schema import (
    PREDICTIONS,
    DataConfig,
    SearchConfig,
    StudyConfig,
    TeacherConfig,
    TrialConfig,
)
from study.config.study_paths import with_absolute_paths
from study.data.crops import STORED_MARGIN, image_to_crop_affine, stored_frame, stored_size
from study.data.people import People
from study.data.synthetic.dataset import draw_dataset, is_drawn
from study.dry_run.cost import (
    Counts,
    Pace,
    confirm_lines,
    count_confirm_runs,
    disk_lines,
    nearest_folder,
    pace_lines,
    search_warnings,
    time_lines,
    trial_lines,
)
from study.dry_run.timing import time_study
from study.errors import InputError
from study.launch.cluster import check_trial_fits, is_autoscaled, this_machine
from study.search.forecast import StageEpochs, TrialGroup, trial_groups
from study.search.samplers import sampler_messages
from study.search.stage import trials_handed_over
from study.search.staged import distill_space
from study.search.warm_start import check_warm_start, known_trial_lines
from study.storage.checkpoint import Checkpoints
from study.storage.paths import settings_file, teacher_epochs
from study.teachers.identity import teacher_folder, teacher_names, training_folder
from study.teachers.make import is_ready
from study.trial import teacher_spec
from study.validation.finalists import num_finished

DRAWN_IMAGES = (24, 8)
"""Images of train and val that are drawn in place of a synthetic data set."""
Notify = Callable[[str], None]


def show_plan(
    as_typed: StudyConfig,
    space: SearchSpace,
    folder: Path,
    notify: Notify,
    own: Mapping[str, Skeleton] | None = None,
) -> None:
    """Report what the study in this folder would compute, and how long it would take here.

    Args:
        own: skeletons that are not built in, by setting.

    Raises:
        InputError: an input that the study would refuse, too.
    """
    config = with_absolute_paths(as_typed)
    resolved = resolve(config, own)
    spec = teacher_spec(config, resolved)
    data, search = config.data, config.search
    if resolved.crops_url is not None:
        notify("checking the bucket of data.store ...")
        check_bucket(resolved.crops_url)
    with tempfile.TemporaryDirectory(prefix="plan-") as scratch:
        exists = data.kind != "drawn" or _is_drawn(data)
        data_read = data if exists else _draw_few(data, Path(scratch) / "drawn")
        people = read_study_people(data_read, resolved.skeleton, _no_progress, notify)
        counts = _count_people(data, data_read, people)
        _notify_section(notify, "data", _data_lines(data, counts, people))
        planned = planned_data(people, data.crops, resolved) if exists else None
        crops = _crop_lines(data.crops, resolved, counts, people, planned)
        _notify_section(notify, "crops", crops)
        notify("timing a few steps on this machine ...")
        speeds = time_study(spec, config.student, config.refine, people.train)
    teacher = None if planned is None else teacher_folder(spec, planned)
    training = None if planned is None else training_folder(spec, planned)
    _notify_section(notify, "teacher", _teacher_lines(spec.teacher, teacher, training))
    finished = num_finished(folder)
    concurrent = _concurrent_here(search, config.trial, notify)
    handed_over = trials_handed_over(folder, config.name)
    epochs = StageEpochs(config.distill.epochs, config.refine.epochs)

    def groups(finished: int) -> list[list[TrialGroup]]:
        return trial_groups(
            config.plan, search.trials, epochs, finished=finished, handed_over=handed_over
        )

    stages = groups(finished)
    first_space = distill_space(space) if resolved.is_staged else space
    _notify_section(
        notify,
        "trials",
        trial_lines(search, stages, finished, concurrent, is_staged=resolved.is_staged),
        search_warnings(search, config.confirm, config.plan, groups(0), concurrent),
        sampler_messages(search.sampler, first_space),
    )
    if search.warm_start and not settings_file(folder).exists():
        if planned is not None and teacher is not None:
            names = teacher_names(spec, planned)
            check_warm_start(search.warm_start, folder, planned.fingerprint, names)
        _notify_lines(notify, _warm_start_lines(to_plain(as_typed), search, first_space, exists))
    runs = count_confirm_runs(config.confirm, search.trials, folder, finished)
    _notify_section(notify, "confirming", confirm_lines(config.confirm, runs, sum(epochs)))
    is_made = teacher is not None and is_ready(teacher)
    pace = Pace.of(speeds, counts, spec.teacher, config.distill, config.refine, is_made=is_made)
    batch_sizes = {
        "teacher": spec.teacher.batch_size,
        "distill": config.distill.batch_size,
        "refine": config.refine.batch_size,
    }
    _notify_section(
        notify,
        f"time, measured with one worker on this machine ({speeds.device}); a cluster differs",
        pace_lines(speeds, batch_sizes, pace),
        time_lines(pace, search, stages, epochs, runs, concurrent),
    )
    _notify_section(notify, "disk", disk_lines(config.confirm, search.trials, speeds, folder))
    notify("nothing was computed, no file is left; run the study without plan_only=true")


def _notify_section(notify: Notify, title: str, *parts: Iterable[str]) -> None:
    notify(title)
    for lines in parts:
        _notify_lines(notify, lines)


def _notify_lines(notify: Notify, lines: Iterable[str]) -> None:
    for line in lines:
        notify(f"  {line}")


def _no_progress(name: str) -> Callable[[int, int], None]:
    return lambda done, total: None


def _is_drawn(data: DataConfig) -> bool:
    """Return whether the synthetic data set of these settings exists."""
    return is_drawn(
        Path(data.root),
        seed=data.seed,
        num_train_images=data.num_train_images,
        num_val_images=data.num_val_images,
    )


def _draw_few(data: DataConfig, root: Path) -> DataConfig:
    """Draw a few images of a synthetic data set, and return the settings that read them."""
    num_train = min(DRAWN_IMAGES[0], data.num_train_images)
    num_val = min(DRAWN_IMAGES[1], data.num_val_images)
    draw_dataset(root, seed=data.seed, num_train_images=num_train, num_val_images=num_val)
    return dataclasses.replace(
        data, root=str(root), num_train_images=num_train, num_val_images=num_val, max_people=0
    )


def _count_people(data: DataConfig, data_read: DataConfig, people: StudyPeople) -> Counts:
    """Count the people that were read, scaled up if only a few images were drawn."""
    train_scale = data.num_train_images / data_read.num_train_images
    val_scale = data.num_val_images / data_read.num_val_images
    is_estimate = data_read is not data
    train, search = round(train_scale * len(people.train)), round(train_scale * len(people.search))
    if is_estimate and data.max_people and train + search > data.max_people:
        share = data.max_people / (train + search)
        train, search = round(train * share), round(search * share)
    return Counts(
        train=train,
        search=search,
        val=round(val_scale * len(people.val)),
        boxes=round(val_scale * len(people.found)),
        is_estimate=is_estimate,
    )


def _data_lines(data: DataConfig, counts: Counts, people: StudyPeople) -> Iterator[str]:
    if counts.is_estimate:
        images = f"{data.num_train_images:,} + {data.num_val_images:,}"
        yield f"to be drawn: {images} images in {data.root}"
    about = "about " if counts.is_estimate else ""
    yield (
        f"{about}{counts.train:,} people to train on, {counts.search:,} to score trials on, "
        f"{counts.val:,} in val"
    )
    if people.found is not people.val:
        yield f"{counts.boxes:,} boxes to estimate poses in, from {data.val.detections}"
    left_out = len(people.left_out) + len(people.left_out_of_val)
    yield f"the audit found no fault that stops the study; people left out for faults: {left_out}"


def _crop_lines(
    crops: str,
    resolved: Resolved,
    counts: Counts,
    people: StudyPeople,
    planned: PreparedData | None,
) -> Iterator[str]:
    """Yield each crop store, whether it exists, and the disk space of those that don't."""
    numbers = (counts.train, counts.search, counts.boxes)
    url, folder = resolved.crops_url, resolved.crops_folder
    unknown: tuple[str | None, ...] = (None, None, None)
    stores = [("", resolved.input_size, planned.crops if planned else unknown)]
    if resolved.teacher_input_size != resolved.input_size:
        paths = planned.teacher_crops if planned else unknown
        stores.append((" for the teacher", resolved.teacher_input_size, paths))
    needed = 0.0
    for purpose, size, paths in stores:
        form = choose_form(crops, sum(numbers), stored_size(size))
        splits = zip(("train", "search", "val"), people.cropped, numbers, paths, strict=True)
        for name, split, number, path in splits:
            if url is None and path is not None and is_complete(Path(path)):
                yield f"{name}{purpose}: exists, will be reused"
                continue
            num_bytes = number * _bytes_of_a_crop(split, size, form)
            needed += num_bytes
            amount = f"{number:,} crops, about {readable(num_bytes)} as {form}"
            yield f"{name}{purpose}: to be cut, {amount}"
    free = shutil.disk_usage(nearest_folder(folder)).free
    if url is not None:
        yield f"in {url}; what exists there is reused"
    yield f"{readable(needed)} needed, {readable(free)} free in {nearest_folder(folder)}"
    if needed > free:
        yield "warning: the disk has too little free space for them; the study would stop"


def _bytes_of_a_crop(people: People, size: tuple[int, int], form: str) -> float:
    """Mean size of a stored crop, measured on a sample."""
    affines = image_to_crop_affine(people.boxes, stored_frame(size), margin=STORED_MARGIN)
    parts, _ = plan_parts(people.image_paths, affines, stored_size(size), form, Path("unused"))
    return sampled_bytes(parts)


def _teacher_lines(
    teacher: TeacherConfig, folder: Path | None, training: Path | None
) -> Iterator[str]:
    """Yield what remains to be done for the teacher.

    Args:
        folder: folder of its targets; None if the data are not drawn yet.
        training: folder of its training, likewise.
    """
    views = f", {teacher.views} views of each" if teacher.views > 1 else ""
    targets = f"it predicts targets for everyone{views}"
    if folder is None or training is None:
        yield f"epochs to train: {teacher.epochs}; then {targets}"
        return
    if is_ready(folder):
        yield f"exists, will be reused: {folder}"
        return
    last = Checkpoints(teacher_epochs(training)).last()
    done = last.epoch if last else 0
    if teacher.name == PREDICTIONS:
        yield f"the predictions of {teacher.init} will be stored"
    elif teacher.epochs:
        yield f"epochs to train: {teacher.epochs - done} of {teacher.epochs}; then {targets}"
    else:
        yield f"not trained further ({teacher.init}); {targets}"


def _warm_start_lines(
    own: Mapping[str, Any], search: SearchConfig, space: SearchSpace, exists: bool
) -> Iterator[str]:
    """Yield the trials of older studies that would be reused, and those that would not.

    Args:
        own: settings of this study, as nested dicts.
        exists: whether the data exist, so that older studies can be compared with them.
    """
    if not exists:
        yield "warm start: older studies are compared with the data once these are drawn"
    yield from known_trial_lines(own, search, space)


def _concurrent_here(search: SearchConfig, trial: TrialConfig, notify: Notify) -> int:
    """Trials that run at the same time: as fit on this machine, or as set for a cluster."""
    if is_autoscaled(search):
        return search.concurrent
    try:
        fitting = check_trial_fits([this_machine()], trial)
    except InputError as error:
        notify(f"warning: the study would stop on this machine: {error}")
        return search.concurrent or 1
    return min(search.concurrent or fitting, fitting)
