"""The pixels of stored crops in part files: raw or JPEG, cut on any machine, memory-mapped.

A part holds the crops of whole images, so that an image is decoded once for all its people. It
is written aside and renamed, and ends with Arrow's footer: one that was cut short is known by it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from study.data.crops import read_image, warp
from study.errors import InputError
from study.storage.files import commit_file, remove_stale_temps, temp_path

RAW, JPEG = "raw", "jpeg"
JPEG_SETTINGS = (
    *(cv2.IMWRITE_JPEG_QUALITY, 95),
    *(cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444),
)
PEOPLE_PER_PART = 1024
PEOPLE_PER_BATCH = 128
Tell = Callable[[int], None]
"""Told of each handful of people that is done."""
RAW_BYTES = 4 * 10**9
"""``auto`` stores the people of a study as JPEG when their raw crops need more than this. A fixed
number: what is free on the machine would make the same study other data on the next one."""
UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
SAMPLED = 32
"""Crops that are cut to tell the size of a JPEG store."""


@dataclass(frozen=True)
class Part:
    """What one part file is made of; travels to any worker."""

    file: Path
    url: str | None
    """Object store that it is taken to, too."""
    images: tuple[Path, ...]
    """Of each crop; those of an image lie side by side."""
    affines: NDArray[np.float64]
    """Image to stored crop, (n, 2, 3)."""
    size: tuple[int, int]
    form: str

    def __len__(self) -> int:
        return len(self.images)

    def batches(self) -> list[tuple[int, int]]:
        """Rows from and to, of whole images."""
        return whole_images(self.images, PEOPLE_PER_BATCH)


def raw_bytes(size: tuple[int, int]) -> int:
    """Bytes of a raw crop of this (height, width)."""
    return size[0] * size[1] * 3


def plan_parts(
    images: Sequence[Path],
    affines: NDArray[np.float64],
    size: tuple[int, int],
    form: str,
    folder: Path,
    url: str | None = None,
) -> tuple[list[Part], NDArray[np.int64]]:
    """The parts of a store, and at which place of all of them each person lies.

    Args:
        images: of each person, in any order.
    """
    ranks: dict[Path, int] = {}
    ranked = np.array([ranks.setdefault(image, len(ranks)) for image in images])
    order = np.argsort(ranked, kind="stable")
    places = np.empty(len(order), np.int64)
    places[order] = np.arange(len(order))
    ordered = [images[row] for row in order]
    parts = [
        Part(
            file=folder / f"part-{number:05d}.arrow",
            url=url,
            images=tuple(ordered[start:stop]),
            affines=affines[order[start:stop]],
            size=size,
            form=form,
        )
        for number, (start, stop) in enumerate(whole_images(ordered, PEOPLE_PER_PART))
    ]
    return parts, places


def whole_images(images: Sequence[Path], at_least: int) -> list[tuple[int, int]]:
    """Cuts the rows where an image begins, as soon as so many people are together."""
    bounds = [0]
    for row in range(1, len(images)):
        if row - bounds[-1] >= at_least and images[row] != images[row - 1]:
            bounds.append(row)
    return list(pairwise([*bounds, len(images)]))


def write_part(part: Part, threads: int, tell: Tell = lambda count: None) -> None:
    """Writes the part file aside, a batch at a time, then renames it.

    Raises:
        InputError: an image can't be decoded.
    """
    part.file.parent.mkdir(parents=True, exist_ok=True)
    kind = pa.binary(raw_bytes(part.size) if part.form == RAW else -1)
    schema = pa.schema([("crops", kind)])
    remove_stale_temps(part.file)
    aside = temp_path(part.file)
    try:
        with (
            ThreadPoolExecutor(threads) as pool,
            pa.OSFile(str(aside), "wb") as sink,
            pa.ipc.new_file(sink, schema) as writer,
        ):
            for start, stop in part.batches():
                column = _column(part, start, stop, pool, kind)
                writer.write_batch(pa.RecordBatch.from_arrays([column], schema=schema))
                tell(stop - start)
        commit_file(aside, part.file)
    finally:
        aside.unlink(missing_ok=True)


def _column(
    part: Part, start: int, stop: int, pool: ThreadPoolExecutor, kind: pa.DataType
) -> pa.Array:
    """The crops of these rows, whose images are shared out among the threads."""
    same = groupby(range(start, stop), key=lambda row: part.images[row])
    images = [(path, list(rows)) for path, rows in same]
    if part.form == JPEG:

        def encoded(item: tuple[Path, list[int]]) -> list[bytes]:
            image = read_image(item[0])
            return [encode(warp(image, part.affines[row], part.size)) for row in item[1]]

        crops = [crop for group in pool.map(encoded, images) for crop in group]
        return pa.array(crops, kind)
    pixels = np.empty((stop - start, *part.size, 3), np.uint8)

    def cut(item: tuple[Path, list[int]]) -> None:
        image = read_image(item[0])
        for row in item[1]:
            pixels[row - start] = warp(image, part.affines[row], part.size)

    list(pool.map(cut, images))
    return pa.Array.from_buffers(kind, stop - start, [None, pa.py_buffer(pixels)])


def encode(crop: NDArray[np.uint8]) -> bytes:
    """An RGB crop as JPEG, without loss of resolution in color."""
    _, coded = cv2.imencode(".jpg", cv2.cvtColor(crop, cv2.COLOR_RGB2BGR), JPEG_SETTINGS)
    return bytes(coded.data)


def is_whole(source: Any, part: Part) -> bool:
    """Whether this is the part written to its end.

    Args:
        source: the path of a file, or an open file of pyarrow's.
    """
    try:
        return bool(pa.ipc.open_file(source).num_record_batches == len(part.batches()))
    except (pa.ArrowInvalid, OSError):
        return False


class StoredPixels:
    """The crops of a store by their places, in files that are memory-mapped.

    Args:
        files: the parts.
        size: (height, width) of a crop.
        form: raw or jpeg.
    """

    def __init__(self, files: Sequence[Path], size: tuple[int, int], form: str) -> None:
        self.size = size
        self.batches = [batch for file in files for batch in _mapped(file, size, form)]
        self.starts = np.cumsum([0, *(len(batch) for batch in self.batches)])
        self.is_coded = form == JPEG

    def __len__(self) -> int:
        return int(self.starts[-1])

    def crops(self, places: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        """The crops at these places, (h, w, 3) RGB each.

        Raw ones are views of the files, not to be written to; JPEG is decoded by torch's threads.
        """
        found = np.searchsorted(self.starts, places, side="right") - 1
        stored = [
            self.batches[batch][place - self.starts[batch]]
            for batch, place in zip(found, places, strict=True)
        ]
        if not self.is_coded:
            return stored
        threads = min(torch.get_num_threads(), len(places))
        if threads < 2:
            return [_decoded(coded, self.size) for coded in stored]
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(partial(_decoded, size=self.size), stored))


@dataclass(frozen=True)
class _Coded:
    """JPEG files of different lengths, one behind the other."""

    offsets: NDArray[np.int32]
    """(n + 1,)"""
    data: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> NDArray[np.uint8]:
        return self.data[self.offsets[row] : self.offsets[row + 1]]


def _mapped(file: Path, size: tuple[int, int], form: str) -> Iterator[_Coded | NDArray[np.uint8]]:
    """Views of a part's batches."""
    # Closed at once, it keeps no descriptor; the buffers keep what is mapped.
    with pa.memory_map(str(file)) as source:
        reader = pa.ipc.open_file(source)
        for index in range(reader.num_record_batches):
            column = reader.get_batch(index).column(0)
            buffers = column.buffers()
            if form == JPEG:
                offsets = np.frombuffer(buffers[1], np.int32)[: len(column) + 1]
                yield _Coded(offsets, np.frombuffer(buffers[2], np.uint8))
            else:
                yield np.frombuffer(buffers[1], np.uint8).reshape(len(column), *size, 3)


def _decoded(coded: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    crop = cv2.imdecode(coded, cv2.IMREAD_COLOR)
    if crop is None or crop.shape[:2] != tuple(size):
        raise InputError(
            "a stored crop must be a JPEG of the store's size, but one is broken; delete the "
            "folder of the crops (crops-* in data.store, or in storage's cache) and run again"
        )
    return cv2.cvtColor(crop, cv2.COLOR_BGR2RGB, dst=crop)


def choose_form(setting: str, num_people: int, size: tuple[int, int]) -> str:
    """raw or jpeg: what ``data.crops`` comes to for so many crops of this (height, width)."""
    if setting != "auto":
        return setting
    return RAW if num_people * raw_bytes(size) <= RAW_BYTES else JPEG


def require_room(
    parts: Sequence[Part], folder: Path, notify: Callable[[str], None], name: str
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
    notify(f"cropping {name}: {size}, {readable(free)} free")
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
        return len(encode(warp(read_image(part.images[row]), part.affines[row], part.size)))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return float(np.mean(list(pool.map(coded, sample))))
