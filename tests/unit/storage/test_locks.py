"""Locks hold on every file system, and what a file system refuses is said before a study."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from study.display import Display
from study.driver import _locked
from study.errors import InputError
from study.search.stage import open_study
from study.storage import locks
from study.storage.files import sync
from study.storage.locks import Held, check_file_system, hold_lock

ROOT = Path(__file__).resolve().parents[3]
NO_LOCKS = """
import errno, fcntl, os, sys, time
from pathlib import Path
from study.storage import locks
def flock(file, operation):
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
fcntl.flock = flock
locks.POLL_S = 0.01
"""
HOLD = f"""{NO_LOCKS}
from study.interrupts import ends_in_one_line
with ends_in_one_line(), locks.hold_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
ADD_ONE = f"""{NO_LOCKS}
for _ in range(5):
    with locks.hold_lock(Path(sys.argv[1]), waiting="waiting"):
        number = int(Path(sys.argv[2]).read_text())
        time.sleep(0.002)
        Path(sys.argv[2]).write_text(str(number + 1))
"""


def refuse(number: int) -> Callable[..., Any]:
    """Return a function that fails with this error."""

    def refused(*arguments: Any, **named: Any) -> None:
        raise OSError(number, os.strerror(number))

    return refused


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks."""
    monkeypatch.setattr(fcntl, "flock", refuse(errno.ENOSYS))
    monkeypatch.setattr(locks, "POLL_S", 0.01)


def run(code: str, *arguments: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock of ``tmp_path`` on a file system without locks."""
    process = run(HOLD, tmp_path / ".lock")
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def notes_of_two_owners(lock: Path) -> list[str]:
    """Check that a second owner is refused until the first ends; return what both report."""
    notes: list[str] = []
    with hold_lock(lock, notes.append):
        with pytest.raises(Held, match=r"^$"), hold_lock(lock):
            pass
    with hold_lock(lock, notes.append):
        pass
    return notes


def test_second_owner_is_refused(tmp_path: Path) -> None:
    assert notes_of_two_owners(tmp_path / ".lock") == []


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_second_owner_is_refused_without_locks(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", refuse(number))
    notes = notes_of_two_owners(tmp_path / ".lock")
    assert len(notes) == 2 and f"{tmp_path} is on a file system without locks (" in notes[0]
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_refused_permission_may_be_the_lock_of_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", refuse(errno.EACCES))
    with pytest.raises(Held, match=r"another machine runs this study, or the disk refuses locks"):
        with hold_lock(tmp_path / ".lock"):
            pass


def test_driver_says_who_holds_the_lock(no_locks: None, tmp_path: Path) -> None:
    def start() -> None:
        with _locked(tmp_path / ".lock", Display("none")):
            pass

    with hold_lock(tmp_path / ".lock"):
        with pytest.raises(
            InputError, match=f"one driver at a time, and another one runs {tmp_path}"
        ):
            start()
    (tmp_path / ".lock.owner").write_text("{}")
    with pytest.raises(
        InputError, match=f"without locks, .* delete {tmp_path}/.lock.owner and run"
    ):
        start()
    (tmp_path / ".lock.owner").unlink()
    start()


def test_journal_needs_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "symlink", refuse(errno.EPERM))
    monkeypatch.setattr(os, "link", refuse(errno.EPERM))
    (tmp_path / "optuna.journal").touch()
    study = open_study(tmp_path, "linkless")
    study.tell(study.ask(), 0.5)
    assert [trial.value for trial in open_study(tmp_path, "linkless").trials] == [0.5]


def test_process_of_this_machine_that_lives_keeps_the_lock(
    no_locks: None, holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    with pytest.raises(Held, match=r"^$"), hold_lock(tmp_path / ".lock"):
        pass


def test_lock_of_a_killed_process_of_this_machine_is_free(
    no_locks: None, holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    holder.kill()
    holder.wait()
    assert (tmp_path / ".lock.owner").exists()
    with hold_lock(tmp_path / ".lock"), pytest.raises(Held), hold_lock(tmp_path / ".lock"):
        pass


def test_process_that_sigterm_ends_releases_its_lock_for_other_machines(
    holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    assert (tmp_path / ".lock.owner").exists()
    holder.terminate()
    assert holder.wait() == 143
    assert not (tmp_path / ".lock.owner").exists()


@pytest.mark.parametrize(
    ("known", "name"),
    [
        ({"host": "node7", "pid": 12, "machine": "x", "address": "y"}, "process 12 on node7"),
        ({"host": "node7", "pid": 12, "machine": None, "address": "y"}, "process 12 on node7"),
        ({}, "an unknown process"),
    ],
)
def test_owner_on_another_machine_is_never_taken_for_dead(
    known: dict[str, Any], name: str, no_locks: None, tmp_path: Path
) -> None:
    owner = tmp_path / ".lock.owner"
    owner.write_text(json.dumps(known) if known else "")
    with pytest.raises(Held, match=f"names {name} .* if that has ended, delete {owner} and run"):
        with hold_lock(tmp_path / ".lock"):
            pass
    owner.unlink()
    with hold_lock(tmp_path / ".lock"):
        pass


def test_waiting_process_gets_the_lock_when_it_is_free(
    no_locks: None, holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    notes: list[str] = []

    def end_holder(text: str) -> None:
        notes.append(text)
        holder.kill()
        holder.wait()

    with hold_lock(tmp_path / ".lock", end_holder, waiting="waiting: it trains"):
        assert notes == ["waiting: it trains"]


def test_many_processes_take_over_one_by_one(
    holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    count = tmp_path / "count"
    count.write_text("0")
    adding = [run(ADD_ONE, tmp_path / ".lock", count) for _ in range(4)]
    time.sleep(0.2)
    holder.kill()
    assert [process.communicate(timeout=30)[0] for process in adding] == [""] * 4
    assert count.read_text() == "20"


def test_usual_file_system_passes(tmp_path: Path) -> None:
    check_file_system(tmp_path, "storage")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("function", "number", "action"),
    [
        ("os.replace", errno.EPERM, "rename a file over another one"),
        ("os.mkdir", errno.EROFS, "make folders"),
        ("os.truncate", errno.EOPNOTSUPP, "append to a file"),
        ("mmap.mmap", errno.ENODEV, "map a file into memory"),
    ],
)
def test_file_system_that_refuses_is_named(
    function: str, number: int, action: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(function, refuse(number))
    with pytest.raises(InputError) as refused:
        check_file_system(tmp_path, "storage")
    assert str(refused.value) == (
        f"storage must be on a file system on which a program can {action}, got {tmp_path} "
        f"({os.strerror(number)}); change storage to a folder of another disk"
    )


def test_file_system_that_renames_no_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def files_only(source: Path, target: Path) -> None:
        (refuse(errno.ENOSYS) if Path(source).is_dir() else replace)(source, target)

    monkeypatch.setattr(os, "replace", files_only)
    with pytest.raises(InputError, match=r"can rename a folder, got"):
        check_file_system(tmp_path, "storage")


def test_full_disk_stays_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "mkdir", refuse(errno.ENOSPC))
    with pytest.raises(OSError, match="No space"):
        check_file_system(tmp_path, "storage")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF])
def test_folder_that_can_not_be_flushed_is_left_to_the_file_system(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", refuse(number))
    sync(tmp_path)
    monkeypatch.setattr(os, "fsync", refuse(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        sync(tmp_path)
