"""Locks between drivers, and a check of what the storage's file system can do.

The operating system holds a lock and releases it with the process. On a file system without locks
(Lustre mounted without ``flock``, NFS without its lock daemon) a file names the owner instead.
Whether an owner of this machine still lives is seen by an address that it holds; an owner on
another machine is never assumed to be dead.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from study.errors import InputError
from study.interrupts import run_if_killed
from study.storage.files import is_full_disk, temp_path

POLL_S = 1.0
"""Seconds between two looks at an owner's file."""
Notify = Callable[[str], None]


class Held(Exception):
    """Another process holds the lock.

    The text is empty if that is certain, else it says what is known and what to do.
    """


@contextlib.contextmanager
def hold_lock(
    file: Path, notify: Notify = lambda text: None, waiting: str | None = None
) -> Iterator[None]:
    """Hold a lock of this name, so that one process at a time works in its folder.

    Args:
        file: lock file; it is created and stays.
        notify: called with a note if the file system has no locks, and with ``waiting``.
        waiting: text for a process that waits for the lock; None raises instead.

    Raises:
        Held: another process holds the lock, and ``waiting`` is None.
        OSError: the file can't be created.
    """
    with file.open("w") as lock:
        refusal = _refusal(lock, notify, waiting)
        if refusal is None:
            yield
            return
        owner = file.with_name(f"{file.name}.owner")
        if waiting is None:
            notify(
                f"{file.parent} is on a file system without locks ({refusal}), so {owner.name} in "
                "it names the process that uses it"
            )
        with _own(owner, notify, waiting):
            yield


def _refusal(lock: TextIO, notify: Notify, waiting: str | None) -> str | None:
    """Lock the open file; return why the file system can't, or None."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if waiting is None:
            raise Held from None
        notify(waiting)
        fcntl.flock(lock, fcntl.LOCK_EX)
    except PermissionError as error:
        # What Windows' network disks return if a process of another machine holds the lock.
        raise Held(
            f"{lock.name} can't be locked ({error.strerror}): another machine runs this study, or "
            "the disk refuses locks; wait for it, or change storage to a folder of another disk"
        ) from None
    except OSError as error:
        return error.strerror
    return None


@contextlib.contextmanager
def _own(file: Path, notify: Notify, waiting: str | None) -> Iterator[None]:
    """Hold a lock by a file that names this process."""
    address = f"pose-study-{secrets.token_hex(16)}"
    has_notified = False
    with contextlib.closing(_bound(address)):
        while (held := _take(file, address)) is not None:
            if waiting is None:
                raise Held(held)
            if not has_notified:
                notify(f"{waiting} ({held})" if held else waiting)
                has_notified = True
            time.sleep(POLL_S)

        def release() -> None:
            if _read(file).get("address") == address:
                file.unlink()

        try:
            with run_if_killed(release):
                yield
        finally:
            release()


def _take(file: Path, address: str) -> str | None:
    """Make this process the owner, or return the text of ``Held``."""
    record = {"host": socket.gethostname(), "pid": os.getpid(), "address": address}
    text = json.dumps({**record, "machine": _machine()})
    try:
        with file.open("x") as created:
            created.write(text)
        return None
    except FileExistsError:
        known = _read(file)
    if known.get("machine") is None or known["machine"] != _machine():
        return (
            f"{file.parent} is on a file system without locks, and {file.name} in it names "
            f"{_name(known)} as the one that uses it; if that has ended, delete {file} and run "
            "the same command again"
        )
    try:
        dead = _bound(str(known["address"]))
    except OSError:
        return ""  # it lives, or another process takes over from it just now
    with contextlib.closing(dead):
        if _read(file) != known:
            return ""  # another process took over since the file was read
        file.unlink()
        return _take(file, address)


def _bound(address: str) -> socket.socket:
    """Hold an address of this machine until the socket is closed, or the process ends.

    Raises:
        OSError: another process holds it.
    """
    holder = socket.socket(socket.AF_UNIX)
    if _machine() is not None:
        try:
            holder.bind(f"\0{address}")
        except OSError:
            holder.close()
            raise
    return holder


def _machine() -> str | None:
    """Return what processes share that see each other's addresses; None if there is no such.

    It is the kernel since its last start, and the network of a container.
    """
    try:
        kernel = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{kernel} {os.readlink('/proc/self/ns/net')}"
    except OSError:
        return None


def _read(file: Path) -> dict[str, Any]:
    """Return the record of the owner; empty if there is none, or it is not whole yet."""
    try:
        known = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _name(known: Mapping[str, Any]) -> str:
    return f"process {known['pid']} on {known['host']}" if known else "an unknown process"


def check_file_system(folder: Path, setting: str) -> None:
    """Check that files in this folder can be renamed, appended to and mapped, as studies do.

    Args:
        setting: setting that names the folder, for the message.

    Raises:
        InputError: the file system refuses one of these.
    """
    probe = temp_path(folder / "probe")
    file, other = probe / "file", probe / "other"
    action = "make folders"
    try:
        probe.mkdir()
        action = "write files"
        file.write_text("a")
        other.write_text("b")
        action = "rename a file over another one"
        file.replace(other)
        action = "append to a file"
        with other.open("ab") as appended:
            appended.write(b"c")
        os.truncate(other, 1)
        action = "map a file into memory"
        with other.open("rb") as mapped:
            mmap.mmap(mapped.fileno(), 0, access=mmap.ACCESS_READ).close()
        action = "rename a folder"
        (probe / "folder").mkdir()
        (probe / "folder").replace(probe / "renamed")
    except OSError as error:
        if is_full_disk(error):
            raise
        raise InputError(
            f"{setting} must be on a file system on which a program can {action}, got {folder} "
            f"({error.strerror}); change {setting} to a folder of another disk"
        ) from error
    finally:
        shutil.rmtree(probe, ignore_errors=True)
