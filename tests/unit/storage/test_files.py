"""Files that appear whole or not at all, and hashes of files."""

from __future__ import annotations

import errno
import os
import socket
import time
from pathlib import Path

import pytest

from study.storage import files
from study.storage.files import (
    atomic_path,
    hash_file,
    remove_stale_temps,
    temp_path,
    write_atomic,
)


def test_file_appears_after_the_block_in_a_folder_that_is_made(tmp_path: Path) -> None:
    file = tmp_path / "new" / "file.txt"
    with atomic_path(file) as temporary:
        temporary.write_text("whole")
        assert not file.exists()
    assert file.read_text() == "whole"
    assert list(file.parent.iterdir()) == [file]


def test_failed_block_keeps_the_old_file_and_leaves_no_other(tmp_path: Path) -> None:
    file = tmp_path / "file.txt"
    write_atomic(file, "old")
    with pytest.raises(RuntimeError), atomic_path(file) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_content_is_flushed_before_the_file_is_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        order.append("flush")
        fsync(descriptor)

    def noted_replace(source: Path, target: Path) -> None:
        order.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    write_atomic(tmp_path / "file.txt", "text")
    assert order == ["flush", "rename"]


@pytest.mark.parametrize("is_broken", [False, True])
def test_file_is_replaced_where_renaming_over_it_is_refused(
    is_broken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, replace, refused = tmp_path / "file", os.replace, 0
    file.write_text("old")

    def never_over(source: Path, target: Path) -> None:
        nonlocal refused
        is_new = Path(source).read_text() == "new"
        if Path(target).exists() or (is_broken and is_new):
            refused += 1
            raise PermissionError(errno.EPERM, "Operation not permitted")
        replace(source, target)

    monkeypatch.setattr(os, "replace", never_over)
    if is_broken:
        with pytest.raises(PermissionError):
            write_atomic(file, "new")
    else:
        write_atomic(file, "new")
    assert refused == 1 + is_broken
    assert file.read_text() == ("old" if is_broken else "new")
    assert list(tmp_path.iterdir()) == [file]


def test_temporary_name_is_hidden_and_of_this_process(tmp_path: Path) -> None:
    name = temp_path(tmp_path / "part.parquet").name
    assert name == f".part.parquet.{socket.gethostname()}.{os.getpid()}"


def test_temporary_files_of_dead_processes_of_this_machine_are_removed(tmp_path: Path) -> None:
    file = tmp_path / "file.txt"
    host = socket.gethostname()
    dead, other_host = (
        tmp_path / f".file.txt.{name}.{number}"
        for name, number in ((host, 2**22 + 1), (f"not-{host}", 2**22 + 1))
    )
    for temporary in (dead, other_host, temp_path(file)):
        temporary.touch()
    remove_stale_temps(file)
    assert {path.name for path in tmp_path.iterdir()} == {other_host.name, temp_path(file).name}


def test_hash_follows_the_content(tmp_path: Path) -> None:
    file = tmp_path / "file.txt"
    file.write_text("one")
    first = hash_file(file)
    file.write_text("two")  # of the same size, within the resolution of the clock
    assert hash_file(file) != first


def test_hash_of_an_unchanged_file_is_computed_once(tmp_path: Path) -> None:
    file = tmp_path / "file.txt"
    file.write_text("one")
    long_ago = time.time_ns() - 2 * files.TIME_RESOLUTION_NS
    os.utime(file, ns=(long_ago, long_ago))
    before = files._hash.cache_info().misses
    assert hash_file(file) == hash_file(file)
    assert files._hash.cache_info().misses == before + 1
