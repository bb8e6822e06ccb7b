"""Check by its first and last bytes whether an image file is complete and has the right size.

A truncated JPEG lacks its end-of-image marker (not every decoder rejects that), a truncated PNG
its last chunk; both store their size at the start. Only an image that fails this check, or that is
of another kind, is decoded.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO, NamedTuple

import cv2
import numpy as np

MISSING_IMAGE = "image missing"
BROKEN_IMAGE = "image truncated or unreadable"
OTHER_SIZE = "image of another size than its annotation"
TURNED_IMAGE = "image that its EXIF tag turns"

HEADER = 4096
"""Bytes read first; in most files they contain the size."""
JPEG, JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
PNG = b"\x89PNG\r\n\x1a\n"
EXIF = b"Exif\0\0"
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
"""JPEG markers of a frame header, which contains the size."""
APP1 = 0xE1
"""JPEG marker of the segment that may hold EXIF data."""
ORIENTATION = 0x0112
"""EXIF tag of how a reader must turn the image."""
UPRIGHT = 1
SIDEWAYS = 5
"""From this orientation on, width and height are swapped."""


class Header(NamedTuple):
    """Size as stored in the file, and the EXIF orientation."""

    height: int
    width: int
    orientation: int = UPRIGHT

    def size_as_read(self) -> tuple[int, int]:
        """Return (height, width) of the image from ``read_image``, which obeys the EXIF tag."""
        is_sideways = self.orientation >= SIDEWAYS
        return (self.width, self.height) if is_sideways else (self.height, self.width)


def image_problem(image: Path, height: float = 0, width: float = 0) -> tuple[str, str] | None:
    """Return kind and detail of what is wrong with an image file; None if nothing is.

    Args:
        height: height in the annotation file; 0 for any size.
        width: width in the annotation file; 0 for any size.
    """
    try:
        with image.open("rb", buffering=HEADER) as file:
            header = read_header(file)
            is_whole = header is not None and _ends_well(file)
        if header is None or not is_whole:
            decoded = _decode(image.read_bytes())
            if isinstance(decoded, str):
                return BROKEN_IMAGE, decoded
            header = header or Header(*decoded)
    except FileNotFoundError:
        return MISSING_IMAGE, "there is no such file"
    except OSError as error:
        return BROKEN_IMAGE, f"it cannot be read: {error.strerror}"
    return _size_problem(header, height, width) if height and width else None


def read_header(file: BinaryIO) -> Header | None:
    """Read the header of a JPEG or PNG; None for other files and truncated headers."""
    start = file.read(24)
    if start.startswith(PNG) and len(start) == 24:
        return Header(int.from_bytes(start[20:24], "big"), int.from_bytes(start[16:20], "big"))
    return _jpeg_header(file) if start.startswith(JPEG) else None


def _jpeg_header(file: BinaryIO) -> Header | None:
    """Skip segments up to the one that contains the size."""
    file.seek(2)
    orientation = UPRIGHT
    while len(segment := file.read(4)) == 4 and segment[0] == 0xFF:
        marker, length = segment[1], int.from_bytes(segment[2:], "big")
        if marker == 0xFF:  # a fill byte
            file.seek(-3, 1)
        elif marker in FRAMES:
            frame = file.read(5)
            height, width = (int.from_bytes(frame[i : i + 2], "big") for i in (1, 3))
            return Header(height, width, orientation) if height and width else None
        elif marker == APP1:
            orientation = _orientation(file.read(length - 2)) or orientation
        else:
            file.seek(length - 2, 1)
    return None


def _orientation(segment: bytes) -> int:
    """Return the EXIF orientation, 1 to 8; 0 if the segment has none."""
    if not segment.startswith(EXIF):
        return 0
    tiff = segment[len(EXIF) :]
    order = "little" if tiff.startswith(b"II") else "big"

    def number(start: int, size: int) -> int:
        return int.from_bytes(tiff[start : start + size], order)  # type: ignore[arg-type]

    entries = number(4, 4)
    for entry in range(entries + 2, entries + 2 + 12 * number(entries, 2), 12):
        if number(entry, 2) == ORIENTATION:
            value = number(entry + 8, 2)
            return value if value <= 8 else 0
    return 0


def _ends_well(file: BinaryIO) -> bool:
    file.seek(-12, 2)
    end = file.read(12)
    return end.endswith(JPEG_END) or end[4:8] == b"IEND"


def _decode(data: bytes) -> tuple[int, int] | str:
    """Return (height, width) of the decoded image, or why these bytes are no complete image."""
    if not data:
        return "the file is empty"
    if data.startswith(JPEG):
        # A thumbnail in the header has an end marker too; the image's own follows the scan.
        scan = data.rfind(b"\xff\xda")
        if scan < 0 or data.find(JPEG_END, scan) < 0:
            return f"the JPEG is cut off after {len(data)} bytes: it has no end-of-image marker"
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        return f"its {len(data)} bytes are not an image that can be decoded"
    return image.shape[0], image.shape[1]


def _size_problem(header: Header, height: float, width: float) -> tuple[str, str] | None:
    found = header.size_as_read()
    tag = f"its EXIF orientation is {header.orientation}"
    if found == (height, width):
        return (TURNED_IMAGE, f"{tag}; it is read upright") if header.orientation > 1 else None
    detail = (
        f"the image must be as high and wide as the annotation file says, {height:g} x "
        f"{width:g}, got {found[0]} x {found[1]}"
    )
    if header.orientation >= SIDEWAYS and found == (width, height):
        detail += f" ({tag}: remove the tag, if joints fit the image as it is stored)"
    return OTHER_SIZE, detail
