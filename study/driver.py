"""A whole study: prepare the data, make the teacher, run the trials, score the finalists."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import ray

from search_spaces.space import SearchSpace, SpaceError, check_space, load_space
from study.analysis.tables import show_finals
from study.cache.prepare import PreparedData, prepare_data
from study.config.compose import config_paths, value_at, with_absolute_paths, with_values
from study.config.derived import Resolved, resolve
from study.config.schema import StudyConfig
from study.display import Display, teacher_line, teacher_panel
from study.dry_run.report import show_plan
from study.errors import InputError
from study.launch.cluster import (
    check_trial_fits,
    get_result,
    num_concurrent_trials,
    ray_address,
    ray_folder,
    ray_started,
    resources_in_use,
    this_machine,
)
from study.launch.context import StudyContext
from study.launch.crop_tasks import cut_by_size
from study.launch.trials import train_teacher
from study.launch.tune_adapter import run_trials
from study.search.owner import StudyOwner
from study.search.staged import staged_faults, with_parent
from study.search.warm_start import check_older_studies, check_warm_start
from study.storage.files import is_full_disk, report_full_disk
from study.storage.paths import TARGETS, audit_folder, lock_file, table_folder
from study.storage.study_file import check_settings, write_settings
from study.storage.tables import write_final
from study.storage.trackers import require_packages, track_trials
from study.teachers.adapters import check_files
from study.teachers.make import is_ready, prepare_teacher, teacher_folder
from study.teachers.target_error import describe_targets
from study.training.training_data import prepare_start
from study.trial import teacher_spec
from study.validation.confirm import confirm_study
from study.validation.confirm_table import is_confirmed
from study.validation.finalists import num_finished, score_finalists


def run_study(config: StudyConfig) -> Path:
    """Runs the study, or goes on with it, and shows the winner; returns the study's folder.

    Raises:
        InputError: something that the user can mend; whatever was finished before is kept.
    """
    require_packages(config.log)
    display = Display(config.display, resources_in_use)
    space = load_checked_space(config)
    as_typed, config = config, with_absolute_paths(config)
    resolved = resolve(config)
    spec = teacher_spec(config, resolved)
    folder = Path(config.storage) / config.name
    as_shown = Path(as_typed.storage).expanduser() / config.name
    _require_writable(folder)
    check_settings(as_typed, folder)
    check_older_studies(config.search.warm_start, folder)
    if config.plan_only:
        check_files(spec, config.student, config.refine, display.notify)
        show_plan(as_typed, space, folder, display.notify)
        return folder
    with (
        report_full_disk(folder),
        _locked(lock_file(folder), display),
        contextlib.ExitStack() as early,
    ):
        if (
            num_finished(folder) >= config.search.trials
            and table_folder(folder, "final").is_dir()
            and is_confirmed(folder, config.confirm)
        ):
            display.notify(f"the study in {folder} is finished; search.trials=N adds trials")
            show_finals(as_shown, display.console)
            return folder
        check_files(spec, config.student, config.refine, display.notify)
        if not ray.is_initialized() and ray_address() == "local":
            check_trial_fits([this_machine()], config.trial)  # as Ray would say after the crops
        with display.meters() as meter:
            start_ray = partial(early.enter_context, ray_started(display))
            cut = partial(cut_by_size, start_ray=start_ray)
            data = prepare_data(
                config.data, resolved, meter, display.notify, cut, audit_folder(folder)
            )
        prepare_teacher(spec, data, display.notify)
        prepare_start(config.refine, data, resolved.skeleton, display.notify)
        teacher = teacher_folder(spec, data).name
        check_warm_start(config.search.warm_start, folder, data.fingerprint, teacher)
        write_settings(as_typed, folder, data.fingerprint, teacher)
        display.notify(
            "{} people to train on, {} to score trials on, {} in val".format(*data.num_people)
        )
        _search(config, resolved, space, folder, data, display)
        show_finals(as_shown, display.console)
    return folder


def _require_writable(folder: Path) -> None:
    """Returns if the folder is there, or can be made, and files in it.

    Raises:
        InputError: it can't.
    """
    first = next(path for path in (folder, *folder.parents) if path.exists())
    if not first.is_dir() or not os.access(first, os.W_OK | os.X_OK):
        fault = "can't be written to" if first.is_dir() else "is no folder"
        raise InputError(
            f"storage must be a folder that can be written to, got storage={folder.parent}, where "
            f"{first} {fault}; change storage=..."
        )


def load_checked_space(config: StudyConfig) -> SearchSpace:
    """The search space, every value of which is one that the schema takes.

    That of plan staged has the parameter that chooses the parent besides.

    Raises:
        InputError: it is not.
    """
    try:
        space = load_space(config.search_space)
        check_space(space, partial(value_at, config), config_paths(config))
        if faults := list(staged_faults(config.plan, config.refine.epochs, space)):
            raise InputError("impossible settings:\n  " + "\n  ".join(faults))
        for parameter in space.parameters:
            for value in parameter.probes():
                try:
                    with_values(config, {parameter.path: value})
                except InputError as error:
                    raise InputError(
                        f"search space {space.name}: {parameter.path} may become {value!r}, but "
                        f"{error}"
                    ) from None
    except SpaceError as error:
        raise InputError(str(error)) from None
    return with_parent(config.plan, space)


def _search(
    config: StudyConfig,
    resolved: Resolved,
    space: SearchSpace,
    folder: Path,
    data: PreparedData,
    display: Display,
) -> None:
    session = os.urandom(4).hex()
    with ray_folder(folder), ray_started(display):
        concurrent = num_concurrent_trials(config.search, config.trial)
        owner = (
            ray.remote(StudyOwner)
            .options(name=f"owner-{session}", num_cpus=0, max_restarts=-1, max_task_retries=-1)
            .remote(str(folder), config, resolved, space.to_json(), session)
        )
        for line in get_result(owner.messages.remote()):
            display.notify(line)
        teacher = teacher_folder(teacher_spec(config, resolved), data)
        plan = StudyContext(
            config=config,
            resolved=resolved,
            data=data,
            folder=str(folder),
            targets=str(teacher / TARGETS),
            owner=f"owner-{session}",
        )
        _make_teacher(plan, teacher, owner, display)
        _run_missing_trials(plan, owner, concurrent, display)
        status = ray.get(owner.status.remote())
        get_result(owner.repair_tables.remote())
        if not status["states"]["COMPLETE"]:
            reasons = "\n".join(f"  trial {n}: {error}" for n, error in status["errors"].items())
            raise InputError(f"no trial came to its end:\n{reasons}")
        confirm_study(plan, space, resolved.launcher, concurrent, display)
        display.notify("scoring the finalists on val")
        finals = get_result(
            ray.remote(score_finalists)
            .options(num_cpus=config.trial.cpus, num_gpus=config.trial.gpus)
            .remote(plan.config, plan.resolved, plan.data, plan.folder)
        )
        write_final(folder, finals.final, space, finals.joints, finals.curves)


def _run_missing_trials(plan: StudyContext, owner: Any, concurrent: int, display: Display) -> None:
    """Runs trials until the study has them all.

    Raises:
        InputError: Ctrl-C, or a full disk.
    """
    finished = ray.get(owner.num_finished.remote())
    begun = len(ray.get(owner.status.remote())["running"])
    if finished or begun:
        asked_for = plan.config.search.trials
        display.notify(f"going on: of {asked_for} trials {finished} are finished, {begun} begun")

    def news(ended: set[int]) -> Any:
        return ray.get(owner.updates_since.remote(ended))

    config, folder = plan.config, Path(plan.folder)
    with track_trials(config.log, config.name, folder, news, display.notify):
        while missing := get_result(owner.trials_to_run.remote()):
            run_trials(plan, owner, missing, min(concurrent, missing), display)
            if halted := ray.get(owner.halt_reason.remote()):
                raise InputError(halted)
            finished += missing
            if ray.get(owner.num_finished.remote()) < finished:
                raise InputError("interrupted; run the same command again to resume")


def _make_teacher(plan: StudyContext, folder: Path, owner: Any, display: Display) -> None:
    """Returns when the teacher is there, trained by this study or by another that shares it."""
    with _locked(lock_file(folder), display, wait_for="training the same teacher"):
        if is_ready(folder):
            display.notify("the teacher is there already")
        else:
            _train_teacher(plan, owner, display)
            display.notify(describe_targets(folder))


def _train_teacher(plan: StudyContext, owner: Any, display: Display) -> None:
    epochs = plan.config.teacher.epochs
    with display.watching(
        lambda: ray.get(owner.status.remote()),
        lambda status, elapsed: teacher_panel(status, epochs, elapsed),
        lambda status, elapsed: teacher_line(status, epochs, elapsed),
    ):
        train_teacher(plan)
    display.notify("the teacher is trained" if epochs else "the teacher's targets are stored")


@contextlib.contextmanager
def _locked(file: Path, display: Display, wait_for: str = "") -> Iterator[None]:
    """One driver at a time; the lock dies with the process.

    Args:
        wait_for: what another driver is said to be doing while this one waits for it; if empty,
            this one is refused.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = file.open("w")
    except OSError as error:
        if is_full_disk(error):
            raise
        raise InputError(
            f"a study must have a folder that can be made and written to, got {file.parent} "
            f"({error.strerror}); change storage or name"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if not wait_for:
                raise InputError(
                    f"a study is run by one driver at a time, and another one runs {file.parent}; "
                    "wait for it, or give this one another name=..."
                ) from None
            display.notify(f"waiting: another study is {wait_for}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
