"""Files that are seen whole or not at all: written aside, made safe on the disk, renamed."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from study.errors import InputError

JUST_NOW_NS = 2_000_000_000
"""No file system's times are coarser."""
FULL = (errno.ENOSPC, errno.EDQUOT)
WORDS = tuple(os.strerror(number) for number in FULL)


def temp_path(file: Path) -> Path:
    """A name that no other process on any machine writes to, until the file is renamed."""
    return file.with_name(f".{file.name}.{socket.gethostname()}.{os.getpid()}")


def remove_stale_temps(file: Path) -> None:
    """Removes what processes of this machine that are no more wrote aside for this file."""
    for aside in file.parent.glob(f".{file.name}.{socket.gethostname()}.*"):
        try:
            os.kill(int(aside.name.rpartition(".")[2]), 0)
        except ProcessLookupError:
            aside.unlink(missing_ok=True)
        except PermissionError:
            pass  # it runs, by another user


def commit_file(aside: Path, file: Path) -> None:
    """Renames what was written aside, once it is safe on the disk."""
    sync(aside)
    aside.replace(file)


def sync(path: Path) -> None:
    """The file, or the names in the folder, survive a power cut from now on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(file: Path, text: str) -> None:
    """The file holds this text, in a folder that is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = temp_path(file)
    try:
        aside.write_text(text, encoding="utf-8")
        commit_file(aside, file)
    finally:
        aside.unlink(missing_ok=True)


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


def disk_full_message(folder: Path) -> str:
    """What the user is told."""
    return (
        f"the study needs room on the disk of {folder}, got a full one; free some there, and the "
        "same command goes on where this one stopped"
    )


@contextlib.contextmanager
def report_full_disk(folder: Path) -> Iterator[None]:
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
            raise InputError(disk_full_message(folder)) from error
        raise


def fingerprint(*parts: Any) -> str:
    """16 hex digits of these JSON-able parts."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def hash_file(path: Path) -> str:
    """SHA-256 of the file's content, computed once a process until the file changes.

    Times of files are coarse: two changes soon after one another may have the same, so that what
    has just been written is computed each time.
    """
    seen = path.stat()
    if time.time_ns() - seen.st_mtime_ns < JUST_NOW_NS:
        return _hash.__wrapped__(path, seen.st_size, seen.st_mtime_ns)
    return _hash(path, seen.st_size, seen.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _hash(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
