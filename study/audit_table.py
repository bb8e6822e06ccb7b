"""The audit as a Parquet table, one row a fault or note."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from study.audit import Fault
from study.whole_files import aside_of, put_in_place

AUDIT = "audit"
"""Folder under a study's ``results``."""
SCHEMA = pa.schema(
    [
        ("kind", pa.dictionary(pa.int32(), pa.string())),
        ("is_fault", pa.bool_()),  # else it is a note, which stops nothing
        ("file", pa.dictionary(pa.int32(), pa.string())),  # the picture's, or the annotation file
        ("image_id", pa.int64()),  # null where a file as a whole is meant
        ("annotation_id", pa.int64()),
        ("detail", pa.string()),
    ]
)


def write_audit(file: Path, faults: Iterable[Fault]) -> Path:
    """The Parquet file of these faults and notes, which may be none.

    It is written aside and renamed, so that it is never seen unfinished.
    """
    rows = list(faults)
    columns = [
        pa.array([fault.kind for fault in rows]),
        pa.array([not fault.is_warning for fault in rows], pa.bool_()),
        pa.array([str(fault.file) for fault in rows]),
        pa.array([fault.image_id for fault in rows], pa.int64()),
        pa.array([fault.annotation_id for fault in rows], pa.int64()),
        pa.array([fault.detail for fault in rows], pa.string()),
    ]
    arrays = [
        column if field.type == column.type else column.cast(pa.string()).cast(field.type)
        for column, field in zip(columns, SCHEMA, strict=True)
    ]
    write_table(file, pa.Table.from_arrays(arrays, schema=SCHEMA))
    return file


def write_table(file: Path, table: pa.Table) -> None:
    """The Parquet file of this table, in a folder that is made; written aside and renamed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    # Programs that read a folder skip names with a dot in front.
    aside = aside_of(file)
    try:
        pq.write_table(table, aside)
        put_in_place(aside, file)
    finally:
        aside.unlink(missing_ok=True)


def read_audit(path: Path) -> pa.Table:
    """The rows of one Parquet file, or of all in the folder of a study's audit."""
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    return pa.concat_tables([pq.read_table(file, schema=SCHEMA) for file in files])
