"""What every trial needs alike, computed once: crops of people, and what the teacher says of them.

Both stores are Arrow files, memory-mapped, so that all trials of a machine share one copy in the
page cache. A store's name is the fingerprint of all it depends on; it is written aside and
renamed, so a stale or half-written one is never read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from study.crops import (
    STORED_MARGIN,
    apply_affine,
    image_to_crop_affine,
    invert_affine,
    read_picture,
    stored_frame,
    warp,
)
from study.dataset import People

VERSION = 2
"""Raise it when what a store holds changes."""
ROWS_PER_BATCH = 256

Progress = Callable[[int, int], None]
Rows = Callable[[int, int], Mapping[str, NDArray[Any]]]


@dataclass(frozen=True)
class CropStore:
    """N stored crops, row by row in the order of the people they were made of."""

    path: Path
    input_size: tuple[int, int]
    mapped_crops: list[NDArray[np.uint8]]
    """Batches of crops, (b, hs, ws, 3) RGB, in the mapped file; only the last may be shorter."""
    keypoints_stored: NDArray[np.float32]
    """(N, K, 2), stored-crop pixels."""
    visibility: NDArray[np.uint8]
    """(N, K), COCO visibility."""
    areas: NDArray[np.float32]
    """(N,), squared stored-crop pixels."""
    boxes_image: NDArray[np.float64]
    """xywh in picture pixels, (N, 4)."""
    image_to_stored: NDArray[np.float64]
    """(N, 2, 3)."""
    image_ids: NDArray[np.int64]
    annotation_ids: NDArray[np.int64]
    neighbours: NDArray[np.int64]
    """(N,), the row of the person that overlaps most in the same picture, -1 where none does."""
    box_scores: NDArray[np.float64] | None = None
    """(N,), of people whom a detector found; None where they are labelled."""

    def __len__(self) -> int:
        return len(self.image_ids)

    def crops(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """A copy of these rows' crops, (B, hs, ws, 3) RGB."""
        out = np.empty((len(rows), *self.mapped_crops[0].shape[1:]), np.uint8)
        per_batch = len(self.mapped_crops[0])
        for place, row in enumerate(rows):
            out[place] = self.mapped_crops[row // per_batch][row % per_batch]
        return out

    def neighbour_keypoints(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Each row's neighbour's keypoints in the row's own stored crop, (B, K, 2).

        Where a row has no neighbour they mean nothing.
        """
        others = self.neighbours[rows]
        stored_to_image = invert_affine(self.image_to_stored[others])
        in_picture = apply_affine(self.keypoints_stored[others].astype(float), stored_to_image)
        return apply_affine(in_picture, self.image_to_stored[rows]).astype(np.float32)

    def neighbour_visibility(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """COCO visibility of each row's neighbour, (B, K); 0 throughout where there is none."""
        others = self.neighbours[rows]
        return np.where(others[:, None] >= 0, self.visibility[others], np.uint8(0))


def fingerprint(*parts: Any) -> str:
    """16 hex digits of these JSON-able parts."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def hash_file(path: Path) -> str:
    """SHA-256 of the file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_crop_store(
    people: People, input_size: tuple[int, int], cache: Path, progress: Progress | None = None
) -> Path:
    """The Arrow file of these people's crops, made unless it is there already.

    Each picture is decoded once for all its people, by as many threads as there are cores.
    """
    path = cache / f"crops-{_people_fingerprint(people, input_size)}.arrow"
    if path.exists():
        return path
    frame = stored_frame(input_size)
    affines = image_to_crop_affine(people.boxes, frame, margin=STORED_MARGIN)
    columns = {
        "keypoints_stored": apply_affine(people.keypoints_image, affines).astype(np.float32),
        "visibility": people.visibility,
        "areas": (people.areas * np.abs(np.linalg.det(affines[..., :2]))).astype(np.float32),
        "boxes_image": people.boxes,
        "image_to_stored": affines,
        "image_ids": people.image_ids,
        "annotation_ids": people.annotation_ids,
        "neighbours": people.neighbours,
    }
    if people.box_scores is not None:
        columns["box_scores"] = people.box_scores
    with ThreadPoolExecutor(os.cpu_count()) as pool:

        def rows(start: int, stop: int) -> Mapping[str, NDArray[Any]]:
            crops = _cut(people, affines, frame.size, range(start, stop), pool)
            return {
                "crops": crops,
                **{name: column[start:stop] for name, column in columns.items()},
            }

        _write(path, len(people), rows, {"input_size": list(input_size)}, progress)
    return path


def open_crop_store(path: Path) -> CropStore:
    """The store, memory-mapped."""
    columns, meta = _read(path)
    height, width = meta["input_size"]
    crops = columns.pop("crops")
    rest = {name: np.concatenate(parts) for name, parts in columns.items()}
    return CropStore(path=path, input_size=(height, width), mapped_crops=crops, **rest)


@dataclass(frozen=True)
class TeacherStore:
    """What the teacher says of the N people of one crop store, row by row."""

    modes_stored: NDArray[np.float32]
    """(N, K, M, 4): x, y in stored-crop pixels, height, width in sigmas; the first is the pose."""
    taught: NDArray[np.uint8]
    """(N, K): 1 where the teacher has something to say of the joint, if only that it is nowhere;
    0 where it does not know the joint or the person."""
    relation: NDArray[np.float16] | None = None
    """(N, K, K): cosine between the teacher's descriptors of two joints; None without features."""


def write_teacher_store(
    path: Path, count: int, rows: Rows, progress: Progress | None = None
) -> None:
    """Writes what ``rows(start, stop)`` gives of the teacher's outputs, a batch at a time."""
    _write(path, count, rows, {}, progress)


def open_teacher_store(path: Path) -> TeacherStore:
    """The store, memory-mapped."""
    columns, _ = _read(path)
    return TeacherStore(**{name: np.concatenate(parts) for name, parts in columns.items()})


def _people_fingerprint(people: People, input_size: tuple[int, int]) -> str:
    """Of the annotations' content, the pictures' names and sizes, who is taken, and the crop."""
    pictures = {path.name: path.stat().st_size for path in set(people.image_paths)}
    annotations = hash_file(people.annotations)
    who = hashlib.sha256(people.annotation_ids.tobytes() + people.neighbours.tobytes()).hexdigest()
    return fingerprint(VERSION, annotations, sorted(pictures.items()), who, list(input_size))


def _cut(
    people: People,
    affines: NDArray[np.float64],
    size: tuple[int, int],
    wanted: range,
    pool: ThreadPoolExecutor,
) -> NDArray[np.uint8]:
    crops = np.zeros((len(wanted), *size, 3), np.uint8)
    by_picture: dict[Path, list[int]] = {}
    for row in wanted:
        by_picture.setdefault(people.image_paths[row], []).append(row)

    def cut_all(path: Path) -> None:
        picture = read_picture(path)
        for row in by_picture[path]:
            crops[row - wanted.start] = warp(picture, affines[row], size)

    list(pool.map(cut_all, by_picture))
    return crops


def _write(
    path: Path,
    count: int,
    rows: Rows,
    meta: Mapping[str, Any],
    progress: Progress | None,
) -> None:
    """Writes the rows batch by batch to a file aside, then renames it."""
    if count == 0:
        raise ValueError("a store needs at least one person, got none")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with pa.OSFile(str(aside), "wb") as sink:
            _write_batches(sink, count, rows, meta, progress)
        with aside.open("rb") as written:
            os.fsync(written.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _write_batches(
    sink: Any, count: int, rows: Rows, meta: Mapping[str, Any], progress: Progress | None
) -> None:
    writer: Any = None
    for start in range(0, count, ROWS_PER_BATCH):
        stop = min(start + ROWS_PER_BATCH, count)
        columns = {
            name: np.ascontiguousarray(column) for name, column in rows(start, stop).items()
        }
        if writer is None:
            shapes = {name: (c.dtype.str, list(c.shape[1:])) for name, c in columns.items()}
            fields = [(name, pa.binary(column[0].nbytes)) for name, column in columns.items()]
            text = json.dumps({"columns": shapes, "meta": dict(meta)})
            schema = pa.schema(fields).with_metadata({"store": text})
            writer = pa.ipc.new_file(sink, schema)
        arrays = [
            pa.Array.from_buffers(field.type, stop - start, [None, pa.py_buffer(column)])
            for field, column in zip(schema, columns.values(), strict=True)
        ]
        writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
        if progress is not None:
            progress(stop, count)
    writer.close()


def _read(path: Path) -> tuple[dict[str, list[NDArray[Any]]], dict[str, Any]]:
    """Each column as views into the mapped file, one a batch, and what the writer noted."""
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    noted = json.loads(reader.schema.metadata[b"store"])
    columns: dict[str, list[NDArray[Any]]] = {name: [] for name in noted["columns"]}
    for index in range(reader.num_record_batches):
        batch = reader.get_batch(index)
        for name, (dtype, shape) in noted["columns"].items():
            buffer = batch.column(name).buffers()[1]
            flat = np.frombuffer(buffer, np.dtype(dtype))
            columns[name].append(flat.reshape(batch.num_rows, *shape))
    return columns, noted["meta"]
