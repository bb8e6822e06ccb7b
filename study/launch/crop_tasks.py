"""Parts of a crop store as Ray tasks, on all nodes; pixels go to files and never through Ray."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import cv2
import ray

from study.cache.crop_bucket import build_part, cut_locally
from study.cache.crop_parts import Part, Tell
from study.errors import InputError

PEOPLE_FOR_RAY = 20_000
"""With fewer, the threads of this process are done before Ray's processes have imported all."""


def cut_by_size(parts: Sequence[Part], tell: Tell, *, start_ray: Callable[[], Any]) -> None:
    """Makes few parts in this process, many by all nodes."""
    if sum(map(len, parts)) < PEOPLE_FOR_RAY:
        cut_locally(parts, tell)
    else:
        if not ray.is_initialized():
            start_ray()
        cut_by_ray(parts, tell)


def cut_by_ray(parts: Sequence[Part], tell: Tell) -> None:
    """Makes each part in a task of one CPU, spread over the nodes; Ray must have been started.

    Raises:
        InputError: an image can't be decoded.
        OSError: a part can't be written; those that are finished stay.
    """
    task = ray.remote(_make).options(num_cpus=1, scheduling_strategy="SPREAD")
    left = {task.remote(part): part for part in parts}
    try:
        while left:
            (done,), _ = ray.wait(list(left), num_returns=1)
            ray.get(done)
            tell(len(left.pop(done)))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, (InputError, OSError)):
            raise error.cause from None
        raise
    finally:
        for reference in left:
            ray.cancel(reference)


def _make(part: Part) -> None:
    cv2.setNumThreads(1)
    build_part(part, 1)
