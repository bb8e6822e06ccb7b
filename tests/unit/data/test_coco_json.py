"""An annotation file read through a window gives the same as the whole file, at any window."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from study.data import coco_json as module
from study.data.coco_json import LISTS, load_document, read_records
from study.errors import InputError

DOCUMENT: dict[str, Any] = {
    "info": {"year": 2017, "text": 'quotes " and \\ and \u00e9 and ]}'},
    "images": [{"id": 1, "file_name": "a, b.jpg"}, {"id": 22, "height": 1.5e3}],
    "licenses": [],
    "annotations": [{"id": 333, "keypoints": [1, -2.25, 2], "nested": {"a": [[], {}]}}, {}, 7],
    "number": 1234,
}
EXPECTED = [
    (key, value) for key, part in DOCUMENT.items() for value in (part if key in LISTS else [part])
]


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 1 << 20])
@pytest.mark.parametrize("indent", [None, 1])
def test_records_equal_those_of_the_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, indent: int | None
) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    file = tmp_path / "a.json"
    file.write_text(f" {json.dumps(DOCUMENT, indent=indent)} \n")
    assert list(read_records(file)) == EXPECTED


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_other_encodings_are_read(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps(DOCUMENT, ensure_ascii=False), encoding=encoding)
    assert list(read_records(file)) == EXPECTED


def test_first_records_come_before_the_rest_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    many = ", ".join(f'{{"id": {number}}}' for number in range(90_000))
    file.write_text(f'{{"annotations": [{many}], "images": [broken')
    assert len(list(itertools.islice(read_records(file), 1000))) == 1000
    with pytest.raises(InputError, match="'Expecting value' at line 1, column"):
        list(read_records(file))


BROKEN = [
    '{"images": [],\n "annotations": [',
    '{"images": [{"id": 1},\n\n  {"id": 2 "x"}], "annotations": []}',
    '{"images": []\n"annotations": []}',
    '{"images" []}',
    '{"images": [1 2]}',
    "{images: []}",
    '{"images": [], "annotations": []}\n extra',
    "version https://git-lfs.github.com/spec/v1",
    '{"images": ["never ended',
    "",
]


@pytest.mark.parametrize("chunk", [1, 5, 1 << 20])
@pytest.mark.parametrize("text", BROKEN)
def test_broken_json_is_reported_at_the_position_in_the_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, chunk: int
) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    file = tmp_path / "a.json"
    file.write_text(text)
    with pytest.raises(json.JSONDecodeError) as whole:
        json.loads(text)
    place = rf"at line {whole.value.lineno}, column {whole.value.colno} of .*a\.json"
    with pytest.raises(InputError, match=place):
        list(read_records(file))


def test_outlines_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    outlined = {"images": [], "annotations": [{"id": 1, "segmentation": [[1, 2]]}], "x": 3}
    file.write_text(json.dumps(outlined))
    assert load_document(file) == {"images": [], "annotations": [{"id": 1}], "x": 3}


def test_real_files_are_read_as_the_standard_library_does(shared: Path) -> None:
    file = shared / "data/coco_tiny/annotations/person_keypoints_val2017.json"
    whole = json.loads(file.read_text())
    found = list(read_records(file))
    for key in LISTS:
        assert [value for name, value in found if name == key] == whole[key]


def test_file_that_may_not_be_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.json"
    file.write_text("{}")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match=r"can be read, got 'Permission denied' for .*a\.json"):
        list(read_records(file))
