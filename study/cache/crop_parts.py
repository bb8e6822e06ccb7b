"""The pixels of stored crops in part files: raw or JPEG, cut on any machine, memory-mapped.

A part holds all crops of its images, so that an image is decoded once for all its people. A part
is written to a temporary name and renamed; it ends with Arrow's footer, which a truncated one
lacks.
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
    cv2.IMWRITE_JPEG_QUALITY,
    95,
    cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
    cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
)
PEOPLE_PER_PART = 1024
PEOPLE_PER_BATCH = 128
CountDone = Callable[[int], None]
"""Called with the number of people of each finished batch."""
RAW_BYTES = 4 * 10**9
"""``data.crops=auto`` stores a study's crops as JPEG if raw ones need more than this. The number
is fixed: one that followed free disk space would give the same study other data elsewhere."""
UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
SAMPLED = 32
"""Crops that are cut to estimate the size of a JPEG store."""


@dataclass(frozen=True)
class Part:
    """The recipe of one part file; sent to any worker."""

    file: Path
    url: str | None
    """Object store to upload the part to; None without one."""
    images: tuple[Path, ...]
    """Image of each crop; the crops of an image are adjacent."""
    affines: NDArray[np.float64]
    """Image to stored crop, (n, 2, 3)."""
    size: tuple[int, int]
    """(height, width) of a stored crop."""
    form: str
    """raw | jpeg."""

    def __len__(self) -> int:
        return len(self.images)

    def batches(self) -> list[tuple[int, int]]:
        """Return start and stop row of each batch; an image is never split."""
        return whole_images(self.images, PEOPLE_PER_BATCH)


def raw_bytes(size: tuple[int, int]) -> int:
    """Return the bytes of a raw crop of this (height, width)."""
    return size[0] * size[1] * 3


def plan_parts(
    images: Sequence[Path],
    affines: NDArray[np.float64],
    size: tuple[int, int],
    form: str,
    folder: Path,
    url: str | None = None,
) -> tuple[list[Part], NDArray[np.int64]]:
    """Divide people into parts; return the parts, and each person's position in all of them.

    Args:
        images: image of each person, in any order.
        affines: image to stored crop, (N, 2, 3).
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
    """Return start and stop of groups of at least ``at_least`` rows that split no image.

    Args:
        images: image of each row; the rows of an image are adjacent.
    """
    bounds = [0]
    for row in range(1, len(images)):
        if row - bounds[-1] >= at_least and images[row] != images[row - 1]:
            bounds.append(row)
    return list(pairwise([*bounds, len(images)]))


def write_part(part: Part, threads: int, count_done: CountDone = lambda count: None) -> None:
    """Cut the part's crops and write its file atomically, a batch at a time.

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
                count_done(stop - start)
        commit_file(aside, part.file)
    finally:
        aside.unlink(missing_ok=True)


def _column(
    part: Part, start: int, stop: int, pool: ThreadPoolExecutor, kind: pa.DataType
) -> pa.Array:
    """Crops of these rows; each thread decodes and cuts whole images."""
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
    """Encode an RGB crop as JPEG, with colors in full resolution."""
    _, coded = cv2.imencode(".jpg", cv2.cvtColor(crop, cv2.COLOR_RGB2BGR), JPEG_SETTINGS)
    return bytes(coded.data)


def is_complete_part(source: Any, part: Part) -> bool:
    """Return whether this file holds all batches of the part.

    Args:
        source: a path, or an open file of pyarrow.
    """
    try:
        return bool(pa.ipc.open_file(source).num_record_batches == len(part.batches()))
    except (pa.ArrowInvalid, OSError):
        return False


class StoredPixels:
    """The crops of a store by position, in memory-mapped part files."""

    def __init__(self, files: Sequence[Path], size: tuple[int, int], form: str) -> None:
        """Map the files.

        Args:
            files: the parts, in order.
            size: (height, width) of a stored crop.
            form: raw or jpeg.
        """
        self.size = size
        self.batches = [batch for file in files for batch in _mapped(file, size, form)]
        self.starts = np.cumsum([0, *(len(batch) for batch in self.batches)])
        self.is_coded = form == JPEG

    def __len__(self) -> int:
        return int(self.starts[-1])

    def crops(self, places: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        """Return the crops at these positions, (h, w, 3) RGB each.

        Raw crops are read-only views of the files. JPEGs are decoded by as many threads as torch
        has.
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
    """JPEGs of different lengths in one array."""

    offsets: NDArray[np.int32]
    """(n + 1,)"""
    data: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> NDArray[np.uint8]:
        return self.data[self.offsets[row] : self.offsets[row + 1]]


def _mapped(file: Path, size: tuple[int, int], form: str) -> Iterator[_Coded | NDArray[np.uint8]]:
    """Views of a part's batches."""
    # Closing it frees the descriptor; the buffers keep the file mapped.
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
            "store's folder (crops-* in data.store, or in storage's cache) and run again"
        )
    return cv2.cvtColor(crop, cv2.COLOR_BGR2RGB, dst=crop)


def choose_form(setting: str, num_people: int, size: tuple[int, int]) -> str:
    """Resolve ``data.crops`` to raw or jpeg.

    Args:
        setting: as ``data.crops``.
        num_people: all people of the study.
        size: (height, width) of a stored crop.
    """
    if setting != "auto":
        return setting
    return RAW if num_people * raw_bytes(size) <= RAW_BYTES else JPEG


def require_disk_space(
    parts: Sequence[Part], folder: Path, notify: Callable[[str], None], name: str
) -> None:
    """Report the estimated size of these parts, and check that the disk has it free.

    Raises:
        InputError: too little disk space is free.
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
            f"the crops of {name} must fit on the disk: {size}, but {folder.parent} has "
            f"{readable(free)} free; free disk space, set data.store to another disk, "
            "data.crops=jpeg, or data.max_people to use fewer people"
        )


def readable(number: float) -> str:
    """Format bytes with three digits and a unit: 41.5 kB, 7.2 GB."""
    unit = next((unit for unit, size in UNITS.items() if number < 999.5 * size), "TB")
    return f"{number / UNITS[unit]:.3g} {unit}"


def sampled_bytes(parts: Sequence[Part]) -> float:
    """Return the mean bytes of a crop, estimated from SAMPLED evenly spaced people."""
    if parts[0].form == RAW:
        return float(raw_bytes(parts[0].size))
    rows = [(part, row) for part in parts for row in range(len(part))]
    sample = [rows[i] for i in np.linspace(0, len(rows) - 1, SAMPLED).astype(int)]

    def coded(item: tuple[Part, int]) -> int:
        part, row = item
        return len(encode(warp(read_image(part.images[row]), part.affines[row], part.size)))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return float(np.mean(list(pool.map(coded, sample))))
