"""Images that a user gives to ``predict.py``: found, named and read.

A folder is searched with its sub-folders. An image that cannot be read is left out and listed at
the end; the others go on.
"""

from __future__ import annotations

import collections
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from study.data.annotations import LARGEST
from study.data.crops import read_image
from study.data.image_files import TURNED_IMAGE, Header, image_problem, read_header
from study.errors import InputError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
"""Endings of the files in a folder that count as images."""
RESULTS = "keypoints.json"
"""Result list, written beside the drawn images."""
DARK = 16
"""An image is almost black below this value, as 10 or 12 bits in 16 are when they become 8."""
SHOWN_NAMES = 5
"""Names that a message lists."""


class GivenImage(NamedTuple):
    """An image that the user gives, by itself or in a folder."""

    path: Path
    name: str
    """Path in the given folder, with slashes; the file's own name if the file is given."""


Problems = dict[Path, str]
"""What is wrong with files and folders."""


def find_images(given: Iterable[Path], out: Path) -> tuple[list[GivenImage], Problems]:
    """Return the files, and the image files of the folders and their sub-folders, each once.

    Hidden files and folders, and folders of results, are passed over.

    Returns:
        The images, and the sub-folders that cannot be listed.

    Raises:
        InputError: a file is missing, or a folder holds no image.
    """
    found: dict[Path, GivenImage] = {}
    problems: Problems = {}
    for path in given:
        if os.path.isdir(path):
            images = _images_in(path, out, problems)
        elif os.path.isfile(path) or os.path.islink(path):
            images = [GivenImage(path, path.name)]
        else:
            raise InputError(f"an image must exist, got {path}; correct its path")
        for image in images:
            found.setdefault(image.path.parent.resolve() / image.path.name, image)
    return list(found.values()), problems


def _images_in(folder: Path, out: Path, problems: Problems) -> list[GivenImage]:
    inside: list[Path] = []
    others: collections.Counter[str] = collections.Counter()
    for file in _visible_files(folder, out, problems):
        if file.suffix.lower() in SUFFIXES:
            inside.append(file)
        else:
            others[file.suffix.lower() or "no ending"] += 1
    if not inside:
        raise InputError(
            f"a folder must hold images ({' '.join(SUFFIXES)}), got none in {folder} or its "
            f"sub-folders{_reason(problems)}"
        )
    if others:
        kinds = ", ".join(f"{number} {suffix}" for suffix, number in sorted(others.items()))
        warn(f"{folder}: files that are not images by their ending were passed over: {kinds}")
    return [GivenImage(file, file.relative_to(folder).as_posix()) for file in sorted(inside)]


def _reason(problems: Problems) -> str:
    return "".join(f"; {path} {problem}" for path, problem in problems.items())


def _visible_files(folder: Path, out: Path, problems: Problems) -> Iterator[Path]:
    """Yield files that are not hidden; linked folders are followed, each folder is seen once."""

    def report(error: OSError) -> None:
        problems[Path(error.filename)] = f"cannot be listed: {error.strerror}"

    seen = {os.path.realpath(out)} - {os.path.realpath(folder)}
    for parent, folders, names in os.walk(folder, onerror=report, followlinks=True):
        if (place := os.path.realpath(parent)) in seen:
            folders.clear()
            continue
        seen.add(place)
        if RESULTS in names and Path(parent) != folder:
            warn(f"{parent} holds results of predict.py ({RESULTS}); it was passed over")
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(parent, name) for name in names if not name.startswith("."))


def read_given(image: GivenImage, size: tuple[float, float] = (0, 0)) -> NDArray[np.uint8]:
    """Read an image as (H, W, 3) RGB, turned upright by its EXIF tag; warn if it is almost black.

    Args:
        size: height and width by the file of boxes or poses; 0 for any.

    Raises:
        InputError: the file cannot be read, or the image has another size.
    """
    if os.path.exists(image.path) and not os.path.isfile(image.path):
        raise InputError("it is not a regular file")
    problem = image_problem(image.path, *size)
    if problem is not None and problem[0] != TURNED_IMAGE:
        raise InputError(problem[1])
    try:
        pixels = read_image(image.path)
    except InputError as error:  # damage between the header and the end
        raise InputError(str(error).removeprefix(f"{image.path}: ")) from None
    except OSError as error:
        raise InputError(f"it cannot be read: {error.strerror}") from None
    except MemoryError:
        raise InputError("it does not fit into memory; make it smaller") from None
    if (brightest := int(pixels.max())) < DARK:
        warn(
            f"{image.name} is almost black, its brightest value is {brightest} of 255; 16-bit "
            "images must use the whole range, 0 to 65535"
        )
    return pixels


def header_of(image: GivenImage) -> Header | None:
    """Return the header of a JPEG or PNG; None for other files and unreadable ones."""
    if not os.path.isfile(image.path):
        return None
    try:
        with image.path.open("rb") as file:
            return read_header(file)
    except OSError:
        return None


def number_of(image: GivenImage) -> int | None:
    """Return the number that the image's name ends in: 785 of 000000000785.jpg.

    None if there is none, or if it is too large for an id.
    """
    digits = re.search(r"\d+$", image.path.stem)
    number = int(digits.group()) if digits else LARGEST
    return number if number < LARGEST else None


def warn(text: str) -> None:
    """Print a warning to stderr."""
    print(f"warning: {text}", file=sys.stderr)


def first_names(names: Sequence[str]) -> str:
    """Return the first five names as text, and the number of the others."""
    more = f" and {len(names) - SHOWN_NAMES} more" if names[SHOWN_NAMES:] else ""
    return f"{', '.join(names[:SHOWN_NAMES])}{more}"
