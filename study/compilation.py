"""When a network is compiled for its training, and how."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

import torch

from models.pose_features import PoseNetwork
from study.loop import Stage

BACKEND = "inductor"
WORTH_STEPS = 20_000
"""A stage of so many steps wins back the minutes of compiling if a step gets 5 ms shorter."""


def is_compiled(setting: str, device: torch.device, steps: int) -> bool:
    """Whether a network that is trained for so many steps is compiled: trial.compile says so.

    auto: on a GPU, from WORTH_STEPS on, where there is what compiling needs.
    """
    if setting == "auto":
        return device.type == "cuda" and steps >= WORTH_STEPS and _has_compiler()
    return setting == "true"


def compile_network(
    network: PoseNetwork, setting: str, stage: Stage, device: torch.device
) -> None:
    """Compiles the network in place, if the setting wants it in this stage.

    Names and weights stay as they are. Each batch size has code of its own, so that an epoch comes
    out the same whatever sizes came before it.
    """
    if is_compiled(setting, device, stage.epochs * stage.steps_per_epoch):
        network.compile(backend=BACKEND, dynamic=False)


def _has_compiler() -> bool:
    """Whether Triton can build its launchers here: by a C compiler and Python's headers."""
    headers = Path(sysconfig.get_path("include"), "Python.h")
    return any(map(shutil.which, ("gcc", "clang"))) and headers.is_file()
