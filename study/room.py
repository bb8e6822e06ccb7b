"""How many trials a machine or a cluster has room for."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch

from study.config import InputError
from study.schema import StudyConfig, TrialConfig

_ROUNDING = 1e-9
"""Ten tenths of a CPU are a CPU, though 1 // 0.1 is 9."""


def room_for(nodes: Sequence[Mapping[str, float]], trial: TrialConfig) -> int:
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


def require_trial_fits(nodes: Sequence[Mapping[str, float]], trial: TrialConfig) -> int:
    """``room_for``, of which one at least must be.

    Raises:
        InputError: not even one trial finds room.
    """
    room = room_for(nodes, trial)
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


def waits_for_room(config: StudyConfig) -> bool:
    """Whether trials are asked of a cluster, which may grow to what is asked of it."""
    return bool(config.search.concurrent) and os.environ.get("RAY_ADDRESS", "local") != "local"
