"""A disk that is full ends the study, not its trials: with room made, the same command goes on."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from study.config import InputError

FULL = (errno.ENOSPC, errno.EDQUOT)
WORDS = tuple(os.strerror(number) for number in FULL)


def is_full_disk(error: BaseException | None) -> bool:
    """Whether an error, or what it came of, is that there is no room left on a disk.

    Libraries that write by themselves, and other processes, tell it in words alone.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        if any(words in str(error) for words in WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


def no_room(folder: Path) -> str:
    """What the user is told."""
    return (
        f"the study needs room on the disk of {folder}, got a full one; free some there, and the "
        "same command goes on where this one stopped"
    )


@contextlib.contextmanager
def stopped_when_full(folder: Path) -> Iterator[None]:
    """What breaks within for want of room on a disk says so.

    Raises:
        InputError: in place of such an error; others pass as they are.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if is_full_disk(error):
            raise InputError(no_room(folder)) from error
        raise
