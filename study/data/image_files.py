"""Read an image, and check by its first and last bytes whether the file is complete and fits.

A truncated JPEG lacks its end-of-image marker (not every decoder rejects that), a truncated PNG
its last chunk; both store their size at the start. Only an image that fails this check, or that is
of another kind, is decoded. Which EXIF tags turn an image is left to the decoder: it reads a tiny
image with the metadata of the file.
"""

from __future__ import annotations

import functools
import io
import sys
import unicodedata
import urllib.parse
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

MISSING_IMAGE = "image missing"
BROKEN_IMAGE = "image truncated or unreadable"
OTHER_SIZE = "image of another size than its annotation"
TURNED_IMAGE = "image that its EXIF tag turns"

NO_FILE = "there is no such file"
HEADER = 4096
"""Bytes read first; in most files they contain the size."""
JPEG, JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
PNG = b"\x89PNG\r\n\x1a\n"
TIFF = (b"II*\0", b"MM\0*")
EXIF = b"Exif\0\0"
PNG_EXIF, PNG_DATA, PNG_END = b"eXIf", b"IDAT", b"IEND"
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
"""JPEG markers of a frame header, which contains the size."""
APP1, SCAN = 0xE1, 0xDA
"""JPEG markers of the segment that may hold EXIF data, and of the pixels."""
UPRIGHT = 1
SIDEWAYS = 5
"""From this orientation on, width and height are swapped."""
MOST_PIXELS, LONGEST_SIDE = 2**30, 10**6
"""OpenCV and libpng refuse larger images, unless the environment changes their limits."""
SYSTEM_FILES = {".ds_store", "thumbs.db", "ehthumbs.db", "desktop.ini"}
SYSTEM_FOLDER = "__MACOSX"


class Header(NamedTuple):
    """Size as stored in the file, and the orientation that ``read_image`` obeys."""

    height: int
    width: int
    orientation: int = UPRIGHT

    def size_as_read(self) -> tuple[int, int]:
        """Return (height, width) of the image from ``read_image``, which obeys the EXIF tag."""
        is_sideways = self.orientation >= SIDEWAYS
        return (self.width, self.height) if is_sideways else (self.height, self.width)


def is_system_file(path: Path) -> bool:
    """Check whether an operating system, not the user, put the file beside others."""
    name = path.name.lower()
    return name.startswith("._") or name in SYSTEM_FILES or path.parent.name == SYSTEM_FOLDER


def missing_detail(folder: Path, name: str) -> str:
    """Describe a missing image; name the file that it may be."""
    for reason, other in _similar_names(name):
        if other != name and is_file(folder / other):
            return f"{NO_FILE}, but {folder / other} ({reason}); correct file_name"
    return NO_FILE


def has_similar_file(folder: Path, name: str) -> bool:
    """Check whether the folder has the image, maybe under a name that is spelled otherwise."""
    return is_file(folder / name) or any(
        is_file(folder / other) for _, other in _similar_names(name)
    )


def is_file(path: Path) -> bool:
    """Check that the file exists and may be seen, whatever its name is."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, or a letter that file names lack here
        return False


def _similar_names(name: str) -> Iterator[tuple[str, str]]:
    """Yield a reason and the name that a system or a converter may have turned into this one."""
    for form in ("NFC", "NFD"):
        yield "in another Unicode form", unicodedata.normalize(form, name)
    slashed = name.replace("\\", "/")
    yield "with / for \\", slashed
    last = PurePosixPath(slashed).name
    yield "without its folder", last
    yield "without blanks around it", last.strip()
    yield "without % signs", urllib.parse.unquote(slashed)
    yield "without % signs", urllib.parse.unquote(last)
    for inside in (slashed, last):
        stem = inside.removesuffix(PurePosixPath(inside).suffix)
        for suffix in (".jpg", ".JPG", ".jpeg", ".JPEG", ".png", ".PNG"):
            yield "with another ending", stem + suffix


def decode_image(data: bytes) -> NDArray[np.uint8] | str:
    """Decode an image as (H, W, 3) BGR, turned upright by its EXIF tag.

    Returns:
        The image, or why these bytes are no complete image.
    """
    if not data:
        return "the file is empty"
    content = io.BytesIO(data)
    header = read_header(content)
    if data.startswith(JPEG) and not _ends_well(content):
        return f"the JPEG is cut off after {len(data)} bytes: it has no end-of-image marker"
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error as error:
        if "CV_IO_MAX" not in error.err:
            return f"it cannot be decoded ({error.err})"
        image = None
        header = header or Header(LONGEST_SIDE, LONGEST_SIDE)
    if image is not None:
        return np.asarray(image, np.uint8)
    if header is not None and _is_too_large(header):
        size = f"its {header.height} x {header.width}" if header.height < LONGEST_SIDE else "its"
        return f"{size} pixels are more than can be decoded, {MOST_PIXELS} in all; make it smaller"
    return f"its {len(data)} bytes are not an image that can be decoded"


def gray_thumbnail(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Return the gray levels of an image, BGR, averaged to (side, side) pixels."""
    gray = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
    return np.asarray(cv2.resize(gray, (side, side), interpolation=cv2.INTER_AREA), np.uint8)


def image_problem(image: Path, height: float = 0, width: float = 0) -> tuple[str, str] | None:
    """Return kind and detail of what is wrong with an image file; None if nothing is.

    Of the kinds, TURNED_IMAGE is only a warning.

    Args:
        height: height in the annotation file; 0 for any size.
        width: width in the annotation file; 0 for any size.
    """
    try:
        with image.open("rb", buffering=HEADER) as file:
            header = read_header(file)
            is_sure = header is not None and not _is_too_large(header) and _ends_well(file)
        if header is None or not is_sure:
            data = image.read_bytes()
            decoded = decode_image(data)
            if isinstance(decoded, str):
                return BROKEN_IMAGE, decoded
            header = header or _decoded_header(data, decoded)
    except FileNotFoundError:
        return MISSING_IMAGE, NO_FILE
    except UnicodeEncodeError:
        encoding = sys.getfilesystemencoding()
        return MISSING_IMAGE, (
            f"file names are in {encoding} here, which lacks a letter of it; set LC_ALL=C.UTF-8"
        )
    except OSError as error:
        return BROKEN_IMAGE, f"it cannot be read: {error.strerror}"
    return _size_problem(header, height, width) if height and width else None


def read_header(file: BinaryIO) -> Header | None:
    """Read the header of a JPEG or PNG; None for other files and truncated headers."""
    start = file.read(len(PNG))
    if start == PNG:
        return _png_header(file)
    return _jpeg_header(file) if start.startswith(JPEG) else None


def _png_header(file: BinaryIO) -> Header | None:
    """Skip chunks up to the last one or the EXIF data, which may follow the pixels."""
    size = (0, 0)
    orientation = UPRIGHT
    while len(start := file.read(8)) == 8:
        length, kind = int.from_bytes(start[:4], "big"), start[4:]
        if kind == b"IHDR":
            first = file.read(length)
            size = int.from_bytes(first[4:8], "big"), int.from_bytes(first[:4], "big")
        elif kind == PNG_EXIF:
            orientation = _png_orientation(start + file.read(length + 4))
            break
        elif kind == PNG_END:
            break
        else:
            file.seek(length, 1)
        file.seek(4, 1)
    return Header(*size, orientation) if all(size) else None


def _jpeg_header(file: BinaryIO) -> Header | None:
    """Skip segments up to the pixels; the size and the EXIF data come before them."""
    file.seek(2)
    size = (0, 0)
    segments: list[bytes] = []
    while len(start := file.read(4)) == 4 and start[0] == 0xFF:
        marker, length = start[1], int.from_bytes(start[2:], "big")
        if marker == 0xFF:  # a fill byte
            file.seek(-3, 1)
        elif marker == SCAN:
            orientation = _jpeg_orientation(segments) if segments else UPRIGHT
            return Header(*size, orientation) if all(size) else None
        elif length < 2:  # a segment contains its length
            return None
        elif marker in FRAMES or marker == APP1:
            segment = file.read(length - 2)
            if marker != APP1:
                size = int.from_bytes(segment[1:3], "big"), int.from_bytes(segment[3:5], "big")
            elif segment.startswith(EXIF):
                segments.append(start + segment)
        else:
            file.seek(length - 2, 1)
    return None


def _ends_well(file: BinaryIO) -> bool:
    """Check that the file, of which the header is read, has its last marker or chunk."""
    pixels = file.seek(0, 1)
    size = file.seek(0, 2)
    file.seek(max(size - 12, 0))
    end = file.read(12)
    if end.endswith(JPEG_END) or end[4:8] == PNG_END:
        return True
    # Cameras append other data. In the pixels, the marker's first byte has another second byte.
    file.seek(0)
    if file.read(len(JPEG)) != JPEG:
        return False
    file.seek(pixels)
    return JPEG_END in file.read()


def _is_too_large(header: Header) -> bool:
    height, width = header.height, header.width
    return height * width > MOST_PIXELS or max(height, width) > LONGEST_SIDE


@functools.cache
def _sample(suffix: str) -> bytes:
    """Return a small wide image, white at the top left and black elsewhere."""
    image = np.zeros((8, 16), np.uint8)
    image[:4, :8] = 255
    return cv2.imencode(suffix, image)[1].tobytes()


def _sample_orientation(data: bytes) -> int:
    """Return how the decoder turns the sample with these metadata: an EXIF orientation."""
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        return UPRIGHT
    is_sideways = image.shape[0] > image.shape[1]
    corners = [image[0, 0, 0], image[0, -1, 0], image[-1, -1, 0], image[-1, 0, 0]]
    return (SIDEWAYS if is_sideways else UPRIGHT) + int(np.argmax(corners))


def _jpeg_orientation(segments: Sequence[bytes]) -> int:
    plain = _sample(".jpg")
    return _sample_orientation(plain[:2] + b"".join(segments) + plain[2:])


def _png_orientation(chunk: bytes) -> int:
    plain = _sample(".png")
    place = plain.index(PNG_DATA) - 4
    return _sample_orientation(plain[:place] + chunk + plain[place:])


def _tiff_orientation(data: bytes) -> int:
    """Return the orientation of TIFF tags, which are those of EXIF data too."""
    check = zlib.crc32(PNG_EXIF + data).to_bytes(4, "big")
    return _png_orientation(len(data).to_bytes(4, "big") + PNG_EXIF + data + check)


def _decoded_header(data: bytes, image: NDArray[np.uint8]) -> Header:
    """Return the header of an image that is neither JPEG nor PNG from its decoded pixels."""
    height, width = image.shape[:2]
    orientation = UPRIGHT
    if data[:4] in TIFF:
        orientation = _tiff_orientation(data)
    elif data[8:12] == b"WEBP" and b"EXIF" in data:
        orientation = _orientation_from(data, image)
    return Header(*((width, height) if orientation >= SIDEWAYS else (height, width)), orientation)


def _orientation_from(data: bytes, image: NDArray[np.uint8]) -> int:
    """Return the orientation that turns the stored image into this one."""
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    stored = np.asarray(cv2.imdecode(np.frombuffer(data, np.uint8), flags))
    plain = [stored, stored[:, ::-1], stored[::-1, ::-1], stored[::-1]]
    # Transposed, an image's left edge becomes its top.
    turned = [np.swapaxes(plain[i], 0, 1) for i in (0, 3, 2, 1)]
    matches = (np.array_equal(image, candidate) for candidate in (*plain, *turned))
    return UPRIGHT + next((place for place, is_same in enumerate(matches) if is_same), 0)


def _size_problem(header: Header, height: float, width: float) -> tuple[str, str] | None:
    found = header.size_as_read()
    tag = f"its EXIF orientation is {header.orientation}"
    if found == (height, width):
        if header.orientation == UPRIGHT:
            return None
        is_same = header.orientation < SIDEWAYS or header.height == header.width
        advice = "; check that joints fit the upright image, since its size is the stored one's"
        return TURNED_IMAGE, f"{tag}; it is read upright{advice if is_same else ''}"
    detail = (
        f"the image must be as high and wide as the annotation file says, {height:g} x "
        f"{width:g}, got {found[0]} x {found[1]}"
    )
    if header.orientation >= SIDEWAYS and found == (width, height):
        detail += f" ({tag}: remove the tag, if joints fit the image as it is stored)"
    return OTHER_SIZE, detail
