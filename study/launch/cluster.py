"""The Ray that a study runs on: start or join it, and count the trials that fit."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

import models
import search_spaces
import study
from study.config.schema import SearchConfig, TrialConfig
from study.display import Display
from study.errors import InputError
from study.storage.paths import ray_storage

_ROUNDING = 1e-9
"""Ten tenths of a CPU are a CPU, though 1 // 0.1 is 9."""


def num_trials_that_fit(nodes: Sequence[Mapping[str, float]], trial: TrialConfig) -> int:
    """Trials that fit at once: a worker on one node, and on one GPU if it has a share of one.

    Args:
        nodes: the resources of each node, CPU and GPU.
    """
    workers = 0
    for node in nodes:
        fits = int(node.get("CPU", 0.0) / trial.cpus + _ROUNDING)
        gpus = node.get("GPU", 0.0)
        if trial.gpus >= 1:
            fits = min(fits, int(gpus / trial.gpus))
        elif trial.gpus:
            fits = min(fits, int(gpus) * int(1 / trial.gpus + _ROUNDING))
        workers += fits
    return workers // trial.num_workers


def check_trial_fits(nodes: Sequence[Mapping[str, float]], trial: TrialConfig) -> int:
    """``num_trials_that_fit``, of which one at least must be.

    Raises:
        InputError: not even one trial finds room.
    """
    room = num_trials_that_fit(nodes, trial)
    if room < 1:
        cpus, gpus = (sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU"))
        raise InputError(
            f"a trial needs {trial.num_workers} workers of {trial.cpus:g} CPUs and "
            f"{trial.gpus:g} GPUs, each on one node, but there are {cpus:g} CPUs and {gpus:g} "
            f"GPUs on {len(nodes)} nodes; lower trial.cpus, trial.gpus or trial.num_workers"
        )
    return room


def this_machine() -> dict[str, float]:
    """Its CPUs and GPUs."""
    return {"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())}


def is_autoscaled(search: SearchConfig) -> bool:
    """Whether trials are asked of a cluster, which may grow to what is asked of it."""
    return bool(search.concurrent) and os.environ.get("RAY_ADDRESS", "local") != "local"


@contextlib.contextmanager
def ray_folder(study_folder: Path) -> Iterator[None]:
    """Create an empty folder for Ray's own files and delete it on exit."""
    folder = ray_storage(study_folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def resources_in_use() -> dict[str, tuple[float, float]]:
    """CPU and GPU: how many are in use of how many there are; without what there is none of."""
    there_are, free = ray.cluster_resources(), ray.available_resources()
    return {
        name: (there_are[name] - free.get(name, 0.0), there_are[name])
        for name in ("CPU", "GPU")
        if there_are.get(name)
    }


def get_result(reference: Any) -> Any:
    """What a task or an actor gives; its InputError as it was raised, without Ray's traceback."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, InputError):
            raise error.cause from None
        raise


def num_concurrent_trials(search: SearchConfig, trial: TrialConfig) -> int:
    """How many trials run at once.

    Raises:
        InputError: not even one finds room.
    """
    if is_autoscaled(search):
        return search.concurrent
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = check_trial_fits(nodes, trial)
    return min(search.concurrent or room, room)


def ray_address() -> str:
    """Return the cluster to join, RAY_ADDRESS, or ``local`` for a Ray of the study's own."""
    return os.environ.get("RAY_ADDRESS", "local")


@contextlib.contextmanager
def ray_started(display: Display) -> Iterator[None]:
    """A Ray of this study's own, or the cluster that RAY_ADDRESS names; what runs goes on."""
    if ray.is_initialized():
        yield
        return
    address = ray_address()
    display.notify("starting Ray" if address == "local" else f"joining the cluster at {address}")
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    # Workers must run this very code, and not an installed copy of another age, nor what lies in
    # the folder that the command is typed in: there they look first.
    home = str(Path(study.__file__).parent.parent)
    options: dict[str, Any] = {"include_dashboard": False}
    if address == "local":
        paths = (home, os.environ.get("PYTHONPATH", ""))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    else:
        options = {"runtime_env": {"py_modules": [models, search_spaces, study]}}
    with contextlib.chdir(home):
        ray.init(address=address, log_to_driver=False, configure_logging=False, **options)
    try:
        yield
    finally:
        ray.shutdown()
