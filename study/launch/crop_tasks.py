"""Cut a crop store's parts as Ray tasks on all nodes; pixels go to files, never through Ray."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import cv2
import ray

from study.cache.crop_bucket import build_part, cut_locally
from study.cache.crop_parts import CountDone, Part
from study.errors import InputError
from study.launch.cluster import get_result

PEOPLE_FOR_RAY = 20_000
"""Below this number, threads of this process finish before Ray's processes have started."""


def cut_by_size(
    parts: Sequence[Part], progress: CountDone, *, start_ray: Callable[[], Any]
) -> None:
    """Cut few people in this process, many as Ray tasks.

    Args:
        progress: called with the number of people of each finished part.
        start_ray: called before tasks start, unless Ray runs already.
    """
    if sum(map(len, parts)) < PEOPLE_FOR_RAY:
        cut_locally(parts, progress)
        return
    if not ray.is_initialized():
        start_ray()
    cut_by_ray(parts, progress)


def cut_by_ray(parts: Sequence[Part], progress: CountDone) -> None:
    """Cut each part in a task of one CPU, spread over the nodes of a running Ray.

    Raises:
        InputError: an image can't be decoded.
        OSError: a part can't be written; finished parts stay.
    """
    task = ray.remote(_build).options(num_cpus=1, scheduling_strategy="SPREAD")
    left = {task.remote(part): part for part in parts}
    # After an error the other tasks end with this driver's Ray. ray.cancel would race with their
    # replies, which can crash the driver ("Tried to complete task that was not pending").
    while left:
        (done,), _ = ray.wait(list(left), num_returns=1)
        get_result(done, InputError, OSError)
        progress(len(left.pop(done)))


def _build(part: Part) -> None:
    cv2.setNumThreads(1)
    build_part(part, 1)
