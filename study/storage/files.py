"""Atomic writes, content hashes, and what a full disk is reported as."""

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

TIME_RESOLUTION_NS = 2_000_000_000
"""The coarsest modification times that a file system keeps (FAT's)."""
NO_FLUSH_ERRORS = (
    errno.EINVAL,
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.EBADF,
    errno.EISDIR,
    errno.EACCES,
    errno.EPERM,
)
"""Errors of a file system that can't flush a file or a folder."""
NO_REPLACE_ERRORS = (errno.EEXIST, errno.EPERM, errno.EACCES, errno.ENOSYS, errno.ENOTSUP)
"""Errors of a file system that can't rename a file over another one."""
FULL_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT)
FULL_DISK_MESSAGES = tuple(os.strerror(number) for number in FULL_DISK_ERRORS)


@contextlib.contextmanager
def atomic_path(file: Path) -> Iterator[Path]:
    """Yield a temporary path; rename it to ``file`` if the block succeeds, else remove it.

    Readers see the old file or the whole new one, also after a power cut. The folder is created.
    The temporary name starts with a dot: programs that read a folder of Parquet files skip it.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = temp_path(file)
    try:
        yield temporary
        commit_file(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(file: Path, text: str) -> None:
    """Write a text file (UTF-8) as ``atomic_path`` does."""
    with atomic_path(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def temp_path(file: Path) -> Path:
    """Return a path beside ``file`` that no other process on any machine writes to."""
    return file.with_name(f".{file.name}.{socket.gethostname()}.{os.getpid()}")


def commit_file(temporary: Path, file: Path) -> None:
    """Flush a temporary file to the disk, then rename it to ``file``.

    On a disk that refuses to rename over an existing file, that one is renamed first.
    """
    sync(temporary)
    try:
        temporary.replace(file)
    except OSError as error:
        if error.errno not in NO_REPLACE_ERRORS or not file.is_file():
            raise
        old = temporary.with_name(f"{temporary.name}.old")
        file.replace(old)
        try:
            temporary.replace(file)
        except OSError:
            old.replace(file)
            raise
        old.unlink()


def remove_stale_temps(file: Path) -> None:
    """Remove the temporary files of ``file`` that killed processes of this machine left."""
    for temporary in file.parent.glob(f".{file.name}.{socket.gethostname()}.*"):
        try:
            os.kill(int(temporary.name.rpartition(".")[2]), 0)
        except ProcessLookupError:
            temporary.unlink(missing_ok=True)
        except PermissionError:
            pass  # its process runs, under another user


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk, so that a power cut keeps them.

    A file system that can't flush, as some can't for folders, keeps them when it does.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        if path.is_dir() and error.errno in NO_FLUSH_ERRORS:
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FLUSH_ERRORS:
            raise
    finally:
        os.close(descriptor)


def is_full_disk(error: BaseException | None) -> bool:
    """Return whether an error, or one of its causes, is that a disk is full.

    Some libraries, and errors that come from other processes, carry only the message.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL_DISK_ERRORS:
            return True
        if any(message in str(error) for message in FULL_DISK_MESSAGES):
            return True
        error = error.__cause__ or error.__context__
    return False


def disk_full_message(folder: Path) -> str:
    """Return the message for the user: which disk is full, and what to do."""
    return (
        f"disk full: no space left on the disk of {folder}; free some and run the same command "
        "again to resume"
    )


@contextlib.contextmanager
def report_full_disk(folder: Path) -> Iterator[None]:
    """Turn an error of the block that comes from a full disk into one that says so.

    Raises:
        InputError: the disk is full. All other errors pass unchanged.
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
    """Return 16 hex digits that depend on these JSON-able parts alone."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's content, cached until its size or modification time changes.

    A file that was written just now is never cached: a second change within the resolution of
    the file system's clock would leave size and time as they are.
    """
    stat = path.stat()
    if time.time_ns() - stat.st_mtime_ns < TIME_RESOLUTION_NS:
        return _hash.__wrapped__(path, stat.st_size, stat.st_mtime_ns)
    return _hash(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _hash(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
