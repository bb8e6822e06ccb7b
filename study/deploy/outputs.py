"""Files that ``predict.py`` writes, drawn images and a result list, and what went wrong.

An image that cannot be used, or not be drawn, ends nothing: it is listed.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from study.deploy.drawing import write_image
from study.deploy.inputs import RESULTS, GivenImage, Problems
from study.errors import InputError
from study.storage.files import is_full_disk, write_atomic

LISTED = 100
"""Images and folders that a message lists."""


def drawn_file(image: GivenImage, out: Path) -> Path:
    """Return the file of the image with its poses; sub-folders are kept."""
    return (out / image.name).with_name(f"{image.path.stem}.jpg")


def check_targets(images: Sequence[GivenImage], boxes: Path | None, out: Path) -> None:
    """Check that no output file would overwrite an input or another output.

    Raises:
        InputError: two images have the same name, or an output would overwrite an input.
    """
    drawn: dict[Path, GivenImage] = {}
    for image in images:
        target = drawn_file(image, out)
        other = drawn.setdefault(target, image)
        if other is not image:
            raise InputError(
                f"images must have different names, got {other.path} and {image.path}, which "
                f"would both be drawn to {target}; give one of them in another run, with another "
                "--out"
            )
    inputs = {os.path.realpath(image.path) for image in images}
    if boxes is not None:
        inputs.add(os.path.realpath(boxes))
    for target in (out / RESULTS, *drawn):
        if os.path.realpath(target) in inputs:
            raise InputError(
                f"inputs must not be overwritten, got --out {out}, where {target.name} is one of "
                "the inputs; give another folder by --out"
            )


class Outputs:
    """Writes to a folder and keeps what went wrong."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.unusable: Problems = {}
        """Images that have no poses."""
        self.undrawn: Problems = {}
        """Images whose poses are only listed."""

    def make_folder(self) -> None:
        """Make the folder if it does not exist.

        Raises:
            InputError: it cannot be made or written to.
        """
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from None
        if not os.access(self.out, os.W_OK | os.X_OK):
            raise self._unwritable(os.strerror(errno.EACCES))

    def draw(self, image: GivenImage, drawn: NDArray[np.uint8]) -> None:
        """Write the image with its poses, (H, W, 3) RGB."""
        try:
            write_image(drawn_file(image, self.out), drawn)
        except (InputError, OSError) as error:
            if is_full_disk(error):
                raise
            reason = error.strerror if isinstance(error, OSError) else error
            self.undrawn[image.path] = f"its poses are listed, but it cannot be drawn: {reason}"

    def write(self, entries: Sequence[dict[str, Any]], num_images: int) -> None:
        """Write the result list.

        Args:
            num_images: number of images, with the unusable ones.

        Raises:
            InputError: no image is usable, or the list cannot be written.
        """
        if len(self.unusable) == num_images:
            raise InputError(
                f"none of {num_images} images can be used, so {self.out / RESULTS} was not "
                f"written:{listed(self.unusable)}"
            )
        try:
            write_atomic(self.out / RESULTS, json.dumps(entries))
        except OSError as error:
            if is_full_disk(error):
                raise
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError | str) -> InputError:
        return InputError(f"--out must be a folder to write to, got {self.out} ({error})")


def listed(problems: Problems) -> str:
    """Return a line for each file or folder, of many the first."""
    lines = [f"\n  {path}: {problem}" for path, problem in problems.items()]
    if (more := len(lines) - LISTED) > 0:
        lines[LISTED:] = [f"\n  and {more} more"]
    return "".join(lines)
