"""An image's size and turn are read off its header, and compared with its annotation."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from study.data.crops import read_image
from study.data.image_files import (
    BROKEN_IMAGE,
    OTHER_SIZE,
    TURNED_IMAGE,
    image_problem,
    read_header,
)

HEIGHT, WIDTH = 40, 60
IMAGE = np.random.RandomState(0).randint(0, 256, (HEIGHT, WIDTH, 3), np.uint8)


def encoded(suffix: str) -> bytes:
    return cv2.imencode(suffix, IMAGE)[1].tobytes()


def turned(orientation: int, order: str = "little") -> bytes:
    """A JPEG with that EXIF orientation, after another entry of its list."""

    def number(value: int, size: int) -> bytes:
        return value.to_bytes(size, order)  # type: ignore[arg-type]

    other = number(0x0100, 2) + number(3, 2) + number(1, 4) + number(7, 2) + b"\0\0"
    entry = number(0x0112, 2) + number(3, 2) + number(1, 4) + number(orientation, 2) + b"\0\0"
    tiff = {"little": b"II*\0", "big": b"MM\0*"}[order] + number(8, 4)
    exif = b"Exif\0\0" + tiff + number(2, 2) + other + entry + number(0, 4)
    plain = encoded(".jpg")
    return plain[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + plain[2:]


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".webp"])
def test_image_must_have_the_size_of_its_annotation(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a{suffix}"
    file.write_bytes(encoded(suffix))
    assert image_problem(file) is None
    assert image_problem(file, HEIGHT, WIDTH) is None
    problem = image_problem(file, WIDTH, HEIGHT)
    assert problem is not None and problem[0] == OTHER_SIZE
    assert "annotation file says, 60 x 40, got 40 x 60" in problem[1]
    assert "EXIF" not in problem[1]


def test_header_after_a_long_segment_is_found(tmp_path: Path) -> None:
    plain = encoded(".jpg")
    filler = b"\xff\xe2" + (65_000).to_bytes(2, "big") + b"\xff\xc0" * 32_499
    file = tmp_path / "a.jpg"
    file.write_bytes(plain[:2] + filler + filler + plain[2:])
    with file.open("rb") as content:
        header = read_header(content)
    assert header is not None and header.size_as_read() == (HEIGHT, WIDTH)


@pytest.mark.parametrize("order", ["little", "big"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_image_has_the_size_that_the_study_reads(
    tmp_path: Path, orientation: int, order: str
) -> None:
    file = tmp_path / "a.jpg"
    file.write_bytes(turned(orientation, order))
    height, width = read_image(file).shape[:2]
    with file.open("rb") as content:
        header = read_header(content)
    assert header is not None and header.orientation == orientation
    assert header.size_as_read() == (height, width)
    problem = image_problem(file, height, width)
    if orientation == 1:
        assert problem is None
    else:
        assert problem is not None and problem[0] == TURNED_IMAGE


def test_annotation_of_the_image_as_stored_is_a_fault_that_names_the_tag(tmp_path: Path) -> None:
    file = tmp_path / "a.jpg"
    file.write_bytes(turned(6))
    problem = image_problem(file, HEIGHT, WIDTH)
    assert problem is not None and problem[0] == OTHER_SIZE
    assert "EXIF orientation is 6: remove the tag" in problem[1]


@pytest.mark.parametrize("share", [0.01, 0.2, 0.6, 0.95])
def test_header_alone_is_no_complete_image(tmp_path: Path, share: float) -> None:
    for suffix in (".jpg", ".png"):
        whole = encoded(suffix)
        file = tmp_path / f"a{suffix}"
        file.write_bytes(whole[: int(share * len(whole))])
        problem = image_problem(file, HEIGHT, WIDTH)
        assert problem is not None and problem[0] == BROKEN_IMAGE
