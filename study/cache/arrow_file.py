"""Arrays with one row per person in one memory-mapped Arrow file, shared by all processes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from study.storage.files import commit_file, temp_path


def write_columns(
    path: Path, columns: Mapping[str, NDArray[Any]], meta: Mapping[str, Any] | None = None
) -> None:
    """Write arrays (N, ...) and metadata that JSON can hold, atomically."""
    if not all(map(len, columns.values())):
        raise ValueError(f"a store needs at least one person, got none for {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {name: np.ascontiguousarray(column) for name, column in columns.items()}
    shapes = {name: (c.dtype.str, list(c.shape[1:])) for name, c in columns.items()}
    noted = json.dumps({"columns": shapes, "meta": dict(meta or {})})
    fields = [(name, pa.binary(column[0].nbytes)) for name, column in columns.items()]
    schema = pa.schema(fields).with_metadata({"store": noted})
    arrays = [
        pa.Array.from_buffers(field.type, len(column), [None, pa.py_buffer(column)])
        for field, column in zip(schema, columns.values(), strict=True)
    ]
    aside = temp_path(path)
    try:
        with pa.OSFile(str(aside), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
        commit_file(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def read_columns(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Return the arrays, as read-only views of the mapped file, and the metadata."""
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    noted = json.loads(reader.schema.metadata[b"store"])
    batch = reader.get_batch(0)
    columns = {
        name: np.frombuffer(batch.column(name).buffers()[1], np.dtype(dtype)).reshape(
            batch.num_rows, *shape
        )
        for name, (dtype, shape) in noted["columns"].items()
    }
    return columns, noted["meta"]
