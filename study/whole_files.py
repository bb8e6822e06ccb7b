"""Files that are seen whole or not at all: written aside, made safe on the disk, renamed."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def aside_of(file: Path) -> Path:
    """A name that no other process on any machine writes to, until the file is renamed."""
    return file.with_name(f".{file.name}.{socket.gethostname()}.{os.getpid()}")


def clear_leftovers(file: Path) -> None:
    """Removes what processes of this machine that are no more wrote aside for this file."""
    for aside in file.parent.glob(f".{file.name}.{socket.gethostname()}.*"):
        try:
            os.kill(int(aside.name.rpartition(".")[2]), 0)
        except ProcessLookupError:
            aside.unlink(missing_ok=True)
        except PermissionError:
            pass  # it runs, by another user


def put_in_place(aside: Path, file: Path) -> None:
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


def write_whole(file: Path, text: str) -> None:
    """The file holds this text, in a folder that is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = aside_of(file)
    try:
        aside.write_text(text, encoding="utf-8")
        put_in_place(aside, file)
    finally:
        aside.unlink(missing_ok=True)
