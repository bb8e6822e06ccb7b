"""A whole study: prepare the data, train the teacher, search, confirm, score the finalists.

This module runs in the process that the user starts; training runs in Ray's processes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
import yaml

from models.skeleton import Skeleton
from models.swap_resolver import MAX_PAIRS
from search_spaces.space import SearchSpace, SpaceError, check_space, load_space
from study.analysis.tables import show_finals
from study.cache.prepare import PreparedData, prepare_data
from study.config.compose import config_paths, value_at, with_values
from study.config.derived import Resolved, resolve
from study.config.schema import MIX, STUDENT, StudyConfig
from study.config.study_paths import check_paths, with_absolute_paths
from study.config.typed_paths import is_path, typed_path
from study.data.augmentation import MIN_HALF_BODY_JOINTS
from study.data.own_skeletons import kept_settings, own_skeletons
from study.data.skeleton_file import to_plain
from study.display import Display, teacher_line, teacher_panel
from study.dry_run.report import show_plan
from study.errors import InputError
from study.launch.cluster import (
    check_trial_fits,
    get_result,
    num_concurrent_trials,
    ray_folder,
    resources_in_use,
    this_machine,
)
from study.launch.context import StudyContext
from study.launch.crop_tasks import cut_by_size
from study.launch.ray_start import check_ray_start, ray_started, will_start_ray
from study.launch.trials import train_teacher
from study.launch.tune_adapter import run_trials
from study.search.owner import StudyOwner
from study.search.staged import staged_faults, with_parent
from study.search.warm_start import check_older_studies, check_warm_start
from study.storage.files import fingerprint, is_full_disk, report_full_disk
from study.storage.locks import Held, check_file_system, hold_lock
from study.storage.paths import TARGETS, audit_folder, lock_file, table_folder
from study.storage.study_file import check_contents, check_settings, write_settings
from study.storage.tables import write_final
from study.storage.trackers import require_packages, track_trials
from study.teachers.adapters import TeacherSpec, check_files
from study.teachers.identity import (
    file_contents,
    teacher_folder,
    teacher_names,
    training_folder,
)
from study.teachers.make import is_ready, prepare_teacher
from study.teachers.target_error import describe_targets
from study.training.losses import missing_limbs
from study.training.training_data import prepare_start
from study.trial import teacher_spec
from study.validation.confirm import confirm_study
from study.validation.confirm_table import is_confirmed
from study.validation.finalists import num_finished, score_finalists


@dataclass(frozen=True)
class _Study:
    """A checked study, as the steps below share it."""

    typed: StudyConfig
    """Settings with paths as the user typed them, as ``study.yaml`` keeps them."""
    config: StudyConfig
    """The same settings with absolute paths."""
    skeletons: dict[str, Skeleton]
    """Those that are not built in, by setting."""
    resolved: Resolved
    teacher: TeacherSpec
    space: SearchSpace
    folder: Path
    display: Display


def run_study(config: StudyConfig) -> Path:
    """Run or resume a study, show its winner, and return its folder.

    Raises:
        InputError: an input is wrong, no trial completed, the disk is full, or Ctrl-C was pressed.
            What is finished by then is kept.
    """
    study = _check(config)
    display, folder = study.display, study.folder
    if config.plan_only:
        with report_full_disk(folder):
            check_file_system(_nearest_folder(folder), "storage")
        _check_files(study)
        show_plan(study.typed, study.space, folder, display.notify, study.skeletons)
        return folder
    with report_full_disk(folder), _locked(lock_file(folder), display):
        check_file_system(folder, "storage")
        if _is_finished(study):
            display.notify(f"the study in {folder} is finished; search.trials=N adds trials")
        else:
            with contextlib.ExitStack() as ray_for_crops:
                prepared = _prepare(study, ray_for_crops)
                _search_and_score(study, prepared)
        show_finals(typed_path(study.typed.storage) / config.name, display.console)
    return folder


def _check(config: StudyConfig) -> _Study:
    """Check the settings and resolve what follows from them, before any data is read."""
    require_packages(config.log)
    display = Display(config.display, resources_in_use)
    space = load_checked_space(config)
    absolute = with_absolute_paths(config)
    check_paths(config, absolute, display.notify)
    folder = Path(absolute.storage) / config.name
    _check_writable(folder)
    skeletons = own_skeletons(absolute.data, absolute.teacher, display.notify)
    check_settings(config, folder, kept_settings(skeletons, folder))
    check_older_studies(absolute.search.warm_start, folder)
    resolved = resolve(absolute, skeletons)
    _check_skeleton(absolute, space, resolved.skeleton, display.notify)
    return _Study(
        typed=config,
        config=absolute,
        skeletons=skeletons,
        resolved=resolved,
        teacher=teacher_spec(absolute, resolved),
        space=space,
        folder=folder,
        display=display,
    )


def _check_skeleton(
    config: StudyConfig, space: SearchSpace, skeleton: Skeleton, notify: Callable[[str], None]
) -> None:
    """Check that the skeleton has the limbs that losses compare; report what it turns off.

    Raises:
        InputError: a structure loss that a trial may have needs limbs that the skeleton lacks.
    """

    def possible(path: str) -> tuple[Any, ...]:
        found = [p.extremes() for p in space.parameters if p.path == path]
        return found[0] if found else (value_at(config, path),)

    kinds = set(possible("distill.structure.kind"))
    if "mix" in kinds:
        kinds |= {part for part in MIX if max(possible(f"distill.structure.mix.{part}")) > 0}
    for kind in sorted(kinds):
        if fault := missing_limbs(kind, skeleton):
            raise InputError(
                f"the structure loss {kind} compares {fault}, got none in data.skeleton="
                f"{config.data.skeleton}; add edges to the skeleton, or leave {kind} out of "
                "distill.structure.kind and mix, and choose a search space without it, such as "
                "search_space=poses"
            )
    halves = [max(possible(f"{stage}.augment.half_body")) for stage in ("distill", "refine")]
    is_small = skeleton.num_joints <= MIN_HALF_BODY_JOINTS
    if max(halves) > 0 and (is_small or not skeleton.upper_body):
        reason = f"{skeleton.num_joints} joints, at most {MIN_HALF_BODY_JOINTS}"
        notify(
            "note: half_body is off, since the skeleton has "
            f"{reason if is_small else 'no upper_body'}"
        )
    left_out = skeleton.flip_pairs[MAX_PAIRS:]
    if config.refine.epochs and config.refine.start != STUDENT and left_out:
        notify(
            f"note: left-right swaps are resolved for the first {MAX_PAIRS} flip_pairs of the "
            f"skeleton, the other {len(left_out)} stay as given"
        )


def _nearest_folder(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def _check_writable(folder: Path) -> None:
    """Check that the study's folder can be created and written to.

    Raises:
        InputError: a folder above it is missing rights, or is a file.
    """
    first = _nearest_folder(folder)
    if not first.is_dir() or not os.access(first, os.W_OK | os.X_OK):
        fault = "can't be written to" if first.is_dir() else "is no folder"
        raise InputError(
            f"storage must be a folder that can be written to, got storage={folder.parent}, where "
            f"{first} {fault}; change storage=..."
        )


def load_checked_space(config: StudyConfig) -> SearchSpace:
    """Load the search space and check every value against the schema.

    For plan=staged, add the parameter that chooses the parent.

    Raises:
        InputError: the space does not exist, or has a value that the schema refuses.
    """
    try:
        space = load_space(str(typed_path(config.search_space)))
        check_space(space, partial(value_at, config), config_paths(config))
        if faults := list(staged_faults(config.plan, config.refine.epochs, space)):
            raise InputError("impossible settings:\n  " + "\n  ".join(faults))
        for parameter in space.parameters:
            for value in parameter.probes():
                _check_value(config, space.name, parameter.path, value)
    except SpaceError as error:
        raise InputError(str(error)) from None
    return with_parent(config.plan, space)


def _check_value(config: StudyConfig, space: str, path: str, value: Any) -> None:
    try:
        with_values(config, {path: value})
    except InputError as error:
        raise InputError(
            f"search space {space}: {path} may become {value!r}, but {error}"
        ) from None


def _check_files(study: _Study) -> None:
    check_files(study.teacher, study.config.student, study.config.refine, study.display.notify)
    check_contents(study.folder, _contents(study))


def _contents(study: _Study) -> dict[str, str]:
    """Return fingerprints of all files that a setting names, by the setting."""
    contents = file_contents(study.teacher, study.config.student, study.config.refine)
    space = study.config.search_space
    if is_path("search_space", space):  # without its comments
        contents["search_space"] = fingerprint(yaml.safe_load(Path(space).read_text()))
    return contents


def _is_finished(study: _Study) -> bool:
    return (
        num_finished(study.folder) >= study.config.search.trials
        and table_folder(study.folder, "final").is_dir()
        and is_confirmed(study.folder, study.config.confirm)
    )


def _prepare(study: _Study, ray_for_crops: contextlib.ExitStack) -> PreparedData:
    """Audit and crop the data, check everything against it, and write ``study.yaml``.

    Args:
        ray_for_crops: keeps Ray running if crops are cut by its tasks.
    """
    config, folder, notify = study.config, study.folder, study.display.notify
    check_ray_start()
    _check_files(study)
    if will_start_ray():
        check_trial_fits([this_machine()], config.trial)  # before the crops, not after them
    with study.display.meters() as meter:
        start_ray = partial(ray_for_crops.enter_context, ray_started(study.display))
        cut = partial(cut_by_size, start_ray=start_ray)
        prepared = prepare_data(
            config.data, study.resolved, meter, notify, cut, audit_folder(folder)
        )
    prepare_teacher(study.teacher, prepared, notify)
    prepare_start(config.refine, prepared, study.resolved.skeleton, notify)
    names = teacher_names(study.teacher, prepared)
    check_warm_start(config.search.warm_start, folder, prepared.fingerprint, names)
    own = {setting: to_plain(skeleton) for setting, skeleton in study.skeletons.items()}
    contents = _contents(study)
    write_settings(study.typed, folder, prepared.fingerprint, names[0], contents, own)
    train, search, val = prepared.num_people
    notify(f"{train} people to train on, {search} to score trials on, {val} in val")
    return prepared


def _search_and_score(study: _Study, prepared: PreparedData) -> None:
    """Train the teacher, search, confirm and score the finalists, all on Ray."""
    config, display = study.config, study.display
    with ray_folder(study.folder), ray_started(display):
        concurrent = num_concurrent_trials(config.search, config.trial)
        owner, owner_name = _start_owner(study)
        context = StudyContext(
            config=config,
            resolved=study.resolved,
            prepared=prepared,
            folder=str(study.folder),
            targets=str(teacher_folder(study.teacher, prepared) / TARGETS),
            owner=owner_name,
        )
        training = training_folder(study.teacher, prepared)
        _prepare_targets(context, training, owner, display)
        _run_missing_trials(context, owner, concurrent, display)
        _check_any_complete(owner)
        confirm_study(context, study.space, concurrent, display)
        _score_finalists(context, study.space, display)


def _start_owner(study: _Study) -> tuple[Any, str]:
    """Start the actor that owns the Optuna study; return its handle and its name."""
    session = os.urandom(4).hex()
    name = f"owner-{session}"
    owner = (
        ray.remote(StudyOwner)
        .options(name=name, num_cpus=0, max_restarts=-1, max_task_retries=-1)
        .remote(str(study.folder), study.config, study.resolved, study.space.to_json(), session)
    )
    for line in get_result(owner.messages.remote()):
        study.display.notify(line)
    return owner, name


def _prepare_targets(context: StudyContext, training: Path, owner: Any, display: Display) -> None:
    """Train the teacher and predict its targets, unless this or another study did.

    Args:
        training: folder of its training, in which teachers of other targets may train, too.
    """
    folder = Path(context.targets).parent
    with contextlib.ExitStack() as locks:
        for shared in dict.fromkeys((folder, training)):
            if is_ready(folder):
                break
            lock = _locked(lock_file(shared), display, wait_for="training the same teacher")
            locks.enter_context(lock)
        if is_ready(folder):
            display.notify("the teacher is ready")
            return
        epochs = context.config.teacher.epochs
        with display.watching(
            lambda: ray.get(owner.status.remote()),
            lambda status, elapsed: teacher_panel(status, epochs, elapsed),
            lambda status, elapsed: teacher_line(status, epochs, elapsed),
        ):
            train_teacher(context)
        display.notify("the teacher is trained" if epochs else "the teacher's targets are stored")
        display.notify(describe_targets(folder))


def _run_missing_trials(
    context: StudyContext, owner: Any, concurrent: int, display: Display
) -> None:
    """Run trials until the study has all of them.

    Raises:
        InputError: the disk is full, or Ctrl-C was pressed.
    """
    config, folder = context.config, Path(context.folder)
    finished = ray.get(owner.num_finished.remote())
    orphaned = len(ray.get(owner.status.remote())["running"])
    if finished or orphaned:
        display.notify(
            f"resuming: of {config.search.trials} trials {finished} are finished, "
            f"{orphaned} were running"
        )

    def updates_since(ended: set[int]) -> Any:
        return ray.get(owner.updates_since.remote(ended))

    with track_trials(config.log, config.name, folder, updates_since, display.notify):
        while missing := get_result(owner.trials_to_run.remote()):
            handed_back = run_trials(context, owner, missing, min(concurrent, missing), display)
            if reason := ray.get(owner.halt_reason.remote()):
                raise InputError(reason)
            finished += missing - handed_back
            if ray.get(owner.num_finished.remote()) < finished:
                raise InputError("interrupted; run the same command again to resume")


def _check_any_complete(owner: Any) -> None:
    """Raise if no trial completed, with the errors of all; write rows that the tables lack."""
    status = ray.get(owner.status.remote())
    get_result(owner.repair_tables.remote())
    if not status["states"]["COMPLETE"]:
        reasons = "\n".join(f"  trial {n}: {error}" for n, error in status["errors"].items())
        raise InputError(f"no trial completed:\n{reasons}")


def _score_finalists(context: StudyContext, space: SearchSpace, display: Display) -> None:
    """Score the finalists on val in a Ray task, and write their tables."""
    display.notify("scoring the finalists on val")
    settings = context.config.trial
    task = ray.remote(score_finalists).options(num_cpus=settings.cpus, num_gpus=settings.gpus)
    finals = get_result(
        task.remote(context.config, context.resolved, context.prepared, context.folder)
    )
    write_final(Path(context.folder), finals.final, space, finals.joints, finals.curves)


@contextlib.contextmanager
def _locked(file: Path, display: Display, wait_for: str = "") -> Iterator[None]:
    """Hold a lock file, so that one driver at a time works in its folder.

    Args:
        wait_for: what the driver that holds the lock is doing, to wait for it. If empty, raise.

    Raises:
        InputError: another driver holds the lock, or the folder can't be created.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    except OSError as error:
        if is_full_disk(error):
            raise
        raise InputError(
            f"the study needs a folder that can be created and written to, got {file.parent} "
            f"({error.strerror}); change storage or name"
        ) from error
    waiting = f"waiting: another study is {wait_for}" if wait_for else None
    try:
        with hold_lock(file, display.notify, waiting):
            yield
    except Held as held:
        raise InputError(
            str(held)
            or f"a study is run by one driver at a time, and another one runs {file.parent}; wait "
            "for it, or give this one another name=..."
        ) from None
