"""An image's size and turn are read off its header, and compared with its annotation."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest

from study.data.crops import read_image
from study.data.image_files import (
    BROKEN_IMAGE,
    OTHER_SIZE,
    TURNED_IMAGE,
    decode_image,
    image_problem,
    is_system_file,
    read_header,
)
from study.errors import InputError

HEIGHT, WIDTH = 40, 60
IMAGE = np.random.RandomState(0).randint(0, 256, (HEIGHT, WIDTH, 3), np.uint8)


def encoded(suffix: str) -> bytes:
    return cv2.imencode(suffix, IMAGE)[1].tobytes()


def exif(orientation: int, order: str = "<") -> bytes:
    """TIFF structure with that orientation after another entry, as EXIF data hold it."""
    start = {"<": b"II*\0", ">": b"MM\0*"}[order]
    other = struct.pack(order + "HHIHH", 0x0100, 3, 1, 7, 0)
    entry = struct.pack(order + "HHIHH", 0x0112, 3, 1, orientation, 0)
    return start + struct.pack(order + "IH", 8, 2) + other + entry + bytes(4)


def segment(content: bytes, marker: int = 0xE1) -> bytes:
    return bytes((0xFF, marker)) + (len(content) + 2).to_bytes(2, "big") + content


def turned(orientation: int, order: str = "<", before: bytes = b"\xff\xdb") -> bytes:
    """A JPEG with that EXIF orientation ahead of the marker ``before``."""
    plain = encoded(".jpg")
    place = plain.index(before)
    return plain[:place] + segment(b"Exif\0\0" + exif(orientation, order)) + plain[place:]


def chunk(kind: bytes, content: bytes) -> bytes:
    check = zlib.crc32(kind + content).to_bytes(4, "big")
    return len(content).to_bytes(4, "big") + kind + content + check


def turned_png(orientation: int, before: bytes = b"IDAT") -> bytes:
    plain = encoded(".png")
    place = plain.index(before) - 4
    return plain[:place] + chunk(b"eXIf", exif(orientation)) + plain[place:]


def turned_webp(orientation: int) -> bytes:
    def part(kind: bytes, content: bytes) -> bytes:
        even = content + b"\0" * (len(content) % 2)
        return kind + len(content).to_bytes(4, "little") + even

    size = (WIDTH - 1).to_bytes(3, "little") + (HEIGHT - 1).to_bytes(3, "little")
    first = part(b"VP8X", b"\x08\0\0\0" + size)
    body = b"WEBP" + first + encoded(".webp")[12:] + part(b"EXIF", exif(orientation))
    return part(b"RIFF", body)


def turned_tiff(orientation: int) -> bytes:
    """A TIFF as OpenCV writes it; its list of tags, with an orientation, is moved to the end."""
    data = encoded(".tiff")
    (start,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, start)
    tags = [data[place : place + 12] for place in range(start + 2, start + 2 + 12 * count, 12)]
    tags = sorted([*tags, struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0)], key=tag_number)
    moved = struct.pack("<H", len(tags)) + b"".join(tags) + bytes(4)
    return data[:4] + struct.pack("<I", len(data)) + data[8:] + moved


def tag_number(entry: bytes) -> int:
    return int.from_bytes(entry[:2], "little")


def turned_bmp(orientation: int) -> bytes:
    return encoded(".bmp") + exif(orientation)


TURNED = {
    "jpg": turned,
    "png": turned_png,
    "webp": turned_webp,
    "tiff": turned_tiff,
    "bmp": turned_bmp,
}


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


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", TURNED)
def test_image_is_turned_as_the_study_reads_it(
    tmp_path: Path, kind: str, orientation: int
) -> None:
    file = tmp_path / f"a.{kind}"
    file.write_bytes(TURNED[kind](orientation))
    height, width = read_image(file).shape[:2]
    is_obeyed = kind != "bmp"  # the format has no such tag
    stored = (HEIGHT, WIDTH)
    assert (height, width) == (stored[::-1] if is_obeyed and orientation > 4 else stored)
    problem = image_problem(file, height, width)
    if orientation == 1 or not is_obeyed:
        assert problem is None
        return
    assert problem is not None and problem[0] == TURNED_IMAGE
    assert problem[1].startswith(f"its EXIF orientation is {orientation}; it is read upright")
    assert ("check that joints fit" in problem[1]) == (orientation <= 4)
    if orientation > 4:
        kind_found, detail = image_problem(file, HEIGHT, WIDTH) or ("", "")
        assert kind_found == OTHER_SIZE
        assert "says, 40 x 60, got 60 x 40" in detail
        assert f"EXIF orientation is {orientation}: remove the tag" in detail


XMP = segment(b"http://ns.adobe.com/xap/1.0/\0<x/>")
VARIANTS = {
    "big endian": turned(6, ">"),
    "after the frame's header": turned(6, before=b"\xff\xda"),
    "after XMP": encoded(".jpg")[:2] + XMP + turned(6, before=b"\xff\xe0")[2:],
    "twice": turned(6)[:2] + segment(b"Exif\0\0" + exif(1)) + turned(6)[2:],
    "unknown value": turned(9),
    "wrong start": turned(6).replace(b"Exif\0\0", b"Exif\0\1"),
    "cut off": turned(6).replace(exif(6), exif(6)[:14].ljust(len(exif(6)), b"\xff")),
    "PNG, after the pixels": turned_png(6, b"IEND"),
    "PNG, unknown value": turned_png(0),
    "PNG, wrong check sum": turned_png(6).replace(chunk(b"eXIf", exif(6))[-4:], b"\0\1\2\3"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_header_of_unusual_metadata_has_the_decoder_s_size(tmp_path: Path, variant: str) -> None:
    file = tmp_path / "a"
    file.write_bytes(VARIANTS[variant])
    with file.open("rb") as content:
        header = read_header(content)
    assert header is not None
    assert header.size_as_read() == read_image(file).shape[:2]


@pytest.mark.parametrize("length", [0, 1])
def test_segment_shorter_than_its_length_is_a_broken_header(tmp_path: Path, length: int) -> None:
    file = tmp_path / "a.jpg"
    plain = encoded(".jpg")
    file.write_bytes(plain[:2] + b"\xff\xe1" + length.to_bytes(2, "big") + plain[2:])
    with file.open("rb") as content:
        assert read_header(content) is None
    problem = image_problem(file, HEIGHT, WIDTH)
    assert problem is None or problem[0] == BROKEN_IMAGE
    assert (problem is None) == (not isinstance(decode_image(file.read_bytes()), str))


def test_size_of_a_turned_square_says_nothing(tmp_path: Path) -> None:
    square = cv2.imencode(".png", IMAGE[:, :HEIGHT])[1].tobytes()
    place = square.index(b"IDAT") - 4
    file = tmp_path / "a.png"
    file.write_bytes(square[:place] + chunk(b"eXIf", exif(6)) + square[place:])
    problem = image_problem(file, HEIGHT, HEIGHT)
    assert problem is not None and problem[0] == TURNED_IMAGE
    assert "EXIF orientation is 6" in problem[1] and "check that joints fit" in problem[1]


def large(suffix: str) -> bytes:
    """The header of an image with 60,000 x 60,000 pixels, and the end of a small one."""
    plain = encoded(suffix)
    if suffix == ".jpg":
        place = plain.index(b"\xff\xc0") + 5
        return plain[:place] + struct.pack(">HH", 60_000, 60_000) + plain[place + 4 :]
    size = struct.pack(">II", 60_000, 60_000) + plain[24:29]
    return plain[:8] + chunk(b"IHDR", size) + plain[33:]


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_image_beyond_the_decoder_s_limit_is_refused_by_its_size(
    tmp_path: Path, suffix: str
) -> None:
    file = tmp_path / f"a{suffix}"
    file.write_bytes(large(suffix))
    reason = "its 60000 x 60000 pixels are more than can be decoded, 1073741824 in all"
    problem = image_problem(file, 60_000, 60_000)
    assert problem is not None and problem[0] == BROKEN_IMAGE and reason in problem[1]
    with pytest.raises(InputError, match=rf"a\{suffix}: must be a complete image, {reason}"):
        read_image(file)


def test_bytes_that_a_camera_appends_do_not_hide_the_end_marker(tmp_path: Path) -> None:
    film = b"ftypmp42\xff\xda" + bytes(300)
    assert not isinstance(decode_image(encoded(".jpg") + film), str)
    file = tmp_path / "a.jpg"
    file.write_bytes(encoded(".jpg") + film)
    assert image_problem(file, HEIGHT, WIDTH) is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("._1.jpg", True),
        (".DS_Store", True),
        ("Thumbs.db", True),
        ("desktop.ini", True),
        ("__MACOSX/1.jpg", True),
        ("1.jpg", False),
        (".hidden.jpg", False),
        ("_1.jpg", False),
    ],
)
def test_file_of_the_system_is_told_from_the_user_s(name: str, expected: bool) -> None:
    assert is_system_file(Path("data") / name) is expected


@pytest.mark.parametrize("share", [0.01, 0.2, 0.6, 0.95])
def test_header_alone_is_no_complete_image(tmp_path: Path, share: float) -> None:
    for suffix in (".jpg", ".png"):
        whole = encoded(suffix)
        file = tmp_path / f"a{suffix}"
        file.write_bytes(whole[: int(share * len(whole))])
        problem = image_problem(file, HEIGHT, WIDTH)
        assert problem is not None and problem[0] == BROKEN_IMAGE
