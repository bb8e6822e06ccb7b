"""A study whose disk is full stops with a message, and resumes once there is space."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from study_command import LAUNCHERS, LIMIT_S, evidence, has_epoch, run, start, wait_until

from study.search.stage import (
    HANDED_OVER,
    open_study,
    refiners_study_name,
    trials_handed_over,
)
from study.storage.files import is_full_disk
from study.storage.paths import journal_file
from study.storage.tables import read_trials

SIZE_MIB = 64
BALLAST = "ballast"


def test_full_disk_is_recognized_by_number_by_text_and_as_a_cause() -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert is_full_disk(full)
    assert is_full_disk(OSError(errno.EDQUOT, "whatever"))
    assert is_full_disk(RuntimeError("I/O error: No space left on device (os error 28)"))
    later = RuntimeError("the epoch could not be kept")
    later.__cause__ = full
    assert is_full_disk(later)
    assert not is_full_disk(OSError(errno.EACCES, os.strerror(errno.EACCES)))
    assert not is_full_disk(None)


def test_partial_last_line_of_the_journal_is_truncated(tmp_path: Path) -> None:
    open_study(tmp_path, "study").set_user_attr("kept", 1)
    with journal_file(tmp_path).open("ab") as journal:
        journal.write(b'{"op_code": 2, "wor')
    open_study(tmp_path, "study").set_user_attr("next", 2)
    assert open_study(tmp_path, "study").user_attrs == {"kept": 1, "next": 2}


def test_counting_students_leaves_a_line_that_is_being_written(tmp_path: Path) -> None:
    open_study(tmp_path, refiners_study_name("study")).set_user_attr(
        HANDED_OVER, {"first_number": 3}
    )
    with journal_file(tmp_path).open("ab") as journal:
        journal.write(b'{"op_code": 2, "wor')
    before = journal_file(tmp_path).read_bytes()
    assert trials_handed_over(tmp_path, "study") == 3
    assert journal_file(tmp_path).read_bytes() == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a small file system of its own; skips the test if none can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
    options = f"size={SIZE_MIB}m,uid={os.geteuid()}"
    mount = [*sudo, "mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
    if not shutil.which(mount[0]) or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system may be mounted here: it needs root, or sudo without password")
    yield folder
    subprocess.run([*sudo, "umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> None:
    """Fill the disk of the folder."""
    with (folder / BALLAST).open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 20))


def test_journal_on_a_full_disk_keeps_whole_lines(small_disk: Path) -> None:
    study = open_study(small_disk, "study")
    fill(small_disk)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        for number in range(5000):
            study.set_user_attr(f"attribute {number}", "x" * 100)
    assert (journal_file(small_disk)).read_bytes().endswith(b"\n")
    (small_disk / BALLAST).unlink()
    study.set_user_attr("last", True)
    assert open_study(small_disk, "study").user_attrs["last"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", list(LAUNCHERS))
def test_study_whose_disk_fills_up_stops_and_resumes_once_there_is_space(
    launcher: str, tmp_path: Path, small_disk: Path
) -> None:
    settings = (*LAUNCHERS[launcher], "search.trials=3", "confirm.trials=0")
    run(tmp_path, "whole", *settings)

    driver = start(tmp_path, small_disk.name, *settings)
    assert wait_until(lambda: has_epoch(small_disk / "trials/1"), driver)
    fill(small_disk)
    output, _ = driver.communicate(timeout=LIMIT_S)
    assert driver.returncode == 1, output
    assert "Traceback" not in output
    assert f"disk full: no space left on the disk of {small_disk}; free some" in output
    assert "run the same command again to resume" in output
    ended = read_trials(small_disk).to_pylist()
    assert ended and all(trial["state"] != "FAIL" for trial in ended)

    (small_disk / BALLAST).unlink()
    run(tmp_path, small_disk.name, *settings)
    assert evidence(small_disk) == evidence(tmp_path / "whole")
