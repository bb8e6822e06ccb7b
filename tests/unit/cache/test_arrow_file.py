"""Arrow files: columns are read back as written, without a copy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from study.cache.arrow_file import read_columns, write_columns


def test_columns_and_metadata_are_read_back_read_only(tmp_path: Path) -> None:
    path = tmp_path / "new" / "people.arrow"
    points = np.arange(30, dtype=np.float32).reshape(3, 5, 2)
    ids = np.array([7, 8, 2**40])
    write_columns(path, {"points": points.transpose(0, 2, 1), "ids": ids}, {"size": [96, 64]})
    columns, meta = read_columns(path)
    assert meta == {"size": [96, 64]}
    assert list(columns) == ["points", "ids"]
    assert columns["points"].dtype == np.float32 and columns["ids"].dtype == np.int64
    np.testing.assert_array_equal(columns["points"], points.transpose(0, 2, 1))
    np.testing.assert_array_equal(columns["ids"], ids)
    with pytest.raises(ValueError, match="read-only"):
        columns["ids"][0] = 1


def test_columns_without_people_are_refused_and_leave_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"at least one person, got none for .*people\.arrow"):
        write_columns(tmp_path / "people.arrow", {"ids": np.array([], np.int64)})
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_the_older_file_and_leaves_no_other(tmp_path: Path) -> None:
    path = tmp_path / "people.arrow"
    write_columns(path, {"ids": np.array([1, 2])})
    with pytest.raises(ValueError, match="length"):
        write_columns(path, {"ids": np.array([3, 4]), "points": np.array([1.0, 2.0, 3.0])})
    assert [file.name for file in tmp_path.iterdir()] == ["people.arrow"]
    assert read_columns(path)[0]["ids"].tolist() == [1, 2]
