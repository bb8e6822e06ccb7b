"""How large a crop store becomes: announced, and refused where there is no room."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from study.config import InputError
from study.crop_files import JPEG, RAW, Part, encode, raw_bytes
from study.crops import read_picture, warp

RAW_BYTES = 4 * 10**9
"""``auto`` stores the people of a study as JPEG when their raw crops need more than this. A fixed
number: what is free on the machine would make the same study other data on the next one."""
UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
SAMPLED = 32
"""Crops that are cut to tell the size of a JPEG store."""


def choose_form(setting: str, num_people: int, size: tuple[int, int]) -> str:
    """raw or jpeg: what ``data.crops`` comes to for so many crops of this (height, width)."""
    if setting != "auto":
        return setting
    return RAW if num_people * raw_bytes(size) <= RAW_BYTES else JPEG


def require_room(
    parts: Sequence[Part], folder: Path, say: Callable[[str], None], name: str
) -> None:
    """Says how large these parts become.

    Raises:
        InputError: larger than the disk has room for.
    """
    if not parts:
        return
    count, free = sum(map(len, parts)), shutil.disk_usage(folder).free
    needed = count * sampled_bytes(parts)
    raw = count * raw_bytes(parts[0].size)
    form = RAW if parts[0].form == RAW else f"{parts[0].form} (raw {readable(raw)})"
    size = f"{count:,} people, about {readable(needed)} as {form}"
    say(f"cropping {name}: {size}, {readable(free)} free")
    if needed > free:
        raise InputError(
            f"the crops of {name} must find room: {size}, but {folder.parent} has "
            f"{readable(free)} free; make room, set data.store to a place that has it, "
            "data.crops=jpeg, or data.max_people to take fewer people"
        )


def readable(number: float) -> str:
    """Bytes in the unit that suits them: 41.5 kB, 7.2 GB."""
    unit = next((unit for unit, size in UNITS.items() if number < 999.5 * size), "TB")
    return f"{number / UNITS[unit]:.3g} {unit}"


def sampled_bytes(parts: Sequence[Part]) -> float:
    """The mean bytes of a crop, from a few people spread over all of them."""
    if parts[0].form == RAW:
        return float(raw_bytes(parts[0].size))
    rows = [(part, row) for part in parts for row in range(len(part))]
    sample = [rows[i] for i in np.linspace(0, len(rows) - 1, SAMPLED).astype(int)]

    def coded(item: tuple[Part, int]) -> int:
        part, row = item
        return len(encode(warp(read_picture(part.pictures[row]), part.affines[row], part.size)))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return float(np.mean(list(pool.map(coded, sample))))
