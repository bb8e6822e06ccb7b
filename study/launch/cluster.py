"""The Ray cluster of a study: its resources, and how many trials fit."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import torch

from study.config.schema import SearchConfig, TrialConfig
from study.errors import InputError
from study.launch.ray_start import LOCAL, ray_address
from study.storage.paths import ray_storage

_ROUNDING = 1e-9
"""Lets ten workers of 0.1 CPUs fit on a CPU, although 1 // 0.1 is 9."""


def num_trials_that_fit(nodes: Sequence[Mapping[str, float]], trial: TrialConfig) -> int:
    """Count the trials that fit at once; a worker needs one node, and one GPU for a share of it.

    Args:
        nodes: the CPU and GPU of each node.
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
    """Count the trials that fit at once, and raise if none fits.

    Raises:
        InputError: no trial fits.
    """
    num_trials = num_trials_that_fit(nodes, trial)
    if num_trials < 1:
        cpus, gpus = (sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU"))
        raise InputError(
            f"a trial needs {trial.num_workers} workers of {trial.cpus:g} CPUs and "
            f"{trial.gpus:g} GPUs, each on one node, but there are {cpus:g} CPUs and {gpus:g} "
            f"GPUs on {len(nodes)} nodes; lower trial.cpus, trial.gpus or trial.num_workers"
        )
    return num_trials


def this_machine() -> dict[str, float]:
    """Return the CPU and GPU of this machine, as a node."""
    return {"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())}


def is_autoscaled(search: SearchConfig) -> bool:
    """Return whether a cluster runs the trials and may grow to ``search.concurrent``."""
    return bool(search.concurrent) and ray_address() != LOCAL


@contextlib.contextmanager
def ray_folder(study_folder: Path) -> Iterator[None]:
    """Create an empty ``ray_storage``, whatever a killed driver left there; delete it on exit."""
    folder = ray_storage(study_folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def resources_in_use() -> dict[str, tuple[float, float]]:
    """Return (in use, in all) of CPU and GPU, without those that the cluster lacks."""
    total, free = ray.cluster_resources(), ray.available_resources()
    return {
        name: (total[name] - free.get(name, 0.0), total[name])
        for name in ("CPU", "GPU")
        if total.get(name)
    }


def get_result(reference: Any, *errors: type[Exception]) -> Any:
    """Return the result of a Ray task or actor call, and re-raise its error without Ray's wrapper.

    Args:
        errors: types to re-raise, InputError by default. Others stay wrapped in RayTaskError.
    """
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, errors or InputError):
            raise error.cause from None
        raise


def num_concurrent_trials(search: SearchConfig, trial: TrialConfig) -> int:
    """Return how many trials run at once: ``search.concurrent``, or as many as fit.

    Raises:
        InputError: no trial fits.
    """
    if is_autoscaled(search):
        return search.concurrent
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    num_trials = check_trial_fits(nodes, trial)
    return min(search.concurrent or num_trials, num_trials)
