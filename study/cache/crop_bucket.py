"""Crop stores in an object store: uploaded once, downloaded once by each node.

An address is ``s3://bucket/prefix`` or ``gs://bucket/prefix``, with pyarrow's options after a
``?``. The index is uploaded last and downloaded last, so that a partial store is never read.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

from study.cache.crop_parts import CountDone, Part, is_complete_part, write_part
from study.errors import InputError
from study.storage.files import commit_file, remove_stale_temps, temp_path
from study.storage.locks import hold_lock

INDEX = "people.arrow"
"""Index of a store; it lists the parts and is written last."""

ANSWER_S = 30.0
"""Longest wait for the first answer of a bucket, in seconds; Google's client tries for minutes."""


def check_bucket(url: str) -> None:
    """Check that the bucket exists and can be listed.

    Raises:
        InputError: the bucket is missing, access is denied, or no answer comes in ANSWER_S.
    """
    errors: list[Exception] = []

    def find() -> None:
        try:
            _find_bucket(url)
        except Exception as error:
            errors.append(error)

    finding = threading.Thread(target=find, daemon=True)
    finding.start()
    finding.join(ANSWER_S)
    if finding.is_alive():
        raise InputError(
            f"data.store must be a bucket that this machine can reach, got data.store={url}, "
            f"which does not answer in {ANSWER_S:g} s; check the network and the credentials"
        )
    if errors:
        raise errors[0]


def _find_bucket(url: str) -> None:
    with _explained(url):
        files, path = fs.FileSystem.from_uri(url)
        bucket = path.split("/")[0]
        if not bucket:
            raise OSError("the address names no bucket")
        if files.get_file_info(bucket).type == fs.FileType.NotFound:
            raise OSError(f"there is no bucket {bucket}")


def check_writable(url: str) -> None:
    """Check, by a test object, that objects can be written.

    Raises:
        InputError: writing is denied.
    """
    with _explained(url):
        files, path = fs.FileSystem.from_uri(url)
        probe = temp_path(Path("probe")).name
        with files.open_output_stream(f"{path}/{probe}") as stream:
            stream.write(b"may this study write here?")
        files.delete_file(f"{path}/{probe}")


def sizes_in(url: str, name: str) -> dict[str, int]:
    """Return the bytes of each object of this store; empty if there is no such store."""
    with _explained(url):
        files, path = fs.FileSystem.from_uri(url)
        wanted = fs.FileSelector(f"{path}/{name}", allow_not_found=True)
        return {info.base_name: info.size for info in files.get_file_info(wanted) if info.is_file}


def is_uploaded(url: str, part: Part, sizes: dict[str, int]) -> bool:
    """Return whether the complete part is in the object store.

    Args:
        sizes: bytes of all objects of its store.
    """
    if part.file.name not in sizes:
        return False
    with _explained(url):
        files, path = fs.FileSystem.from_uri(url)
        with files.open_input_file(f"{path}/{part.file.parent.name}/{part.file.name}") as source:
            return is_complete_part(source, part)


def build_part(part: Part, threads: int, count_done: CountDone = lambda count: None) -> None:
    """Write the part unless it exists, and upload it if there is an object store."""
    if is_complete_part(part.file, part):
        count_done(len(part))
    else:
        write_part(part, threads, count_done)
    if part.url is not None:
        upload(part.url, part.file.parent.name, part.file)


def cut_locally(parts: Sequence[Part], count_done: CountDone) -> None:
    """Build the parts in this process, with one thread per core."""
    for part in parts:
        build_part(part, os.cpu_count() or 1, count_done)


def upload(url: str, name: str, file: Path) -> None:
    """Upload a file to the store of this name."""
    with _explained(url):
        files, path = fs.FileSystem.from_uri(url)
        local = fs.LocalFileSystem()
        fs.copy_files(str(file), f"{path}/{name}/{file.name}", local, files)


def fetch_files(url: str, folder: Path, file_names: Sequence[str], sizes: dict[str, int]) -> None:
    """Download missing files of the store, in this order, each atomically.

    Args:
        folder: the store's local folder; its name is that of the store.
        sizes: bytes of each file.

    Raises:
        InputError: too little disk space is free, or the object store can't be used.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def is_here(name: str) -> bool:
        file = folder / name
        return file.is_file() and file.stat().st_size == sizes[name]

    missing = [name for name in file_names if not is_here(name)]
    needed, free = sum(sizes[name] for name in missing), shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"crops from {url} must fit on the disk: {needed / 1e9:.3g} GB, but {folder} has "
            f"{free / 1e9:.3g} GB free; free disk space there"
        )
    with _explained(url):
        files, path = fs.FileSystem.from_uri(url)
        for name in missing:
            target = folder / name
            remove_stale_temps(target)
            aside = temp_path(target)
            try:
                source = f"{path}/{folder.name}/{name}"
                fs.copy_files(source, str(aside), files, fs.LocalFileSystem())
                commit_file(aside, target)
            finally:
                aside.unlink(missing_ok=True)


def fetch_store(url: str, folder: Path, sizes: dict[str, int] | None = None) -> Path:
    """Download the store unless this node has it; return its local folder.

    One process of a node downloads, the others wait. On a node where the parent of ``folder`` does
    not exist, the store is kept in the folder for temporary files.

    Args:
        folder: the store's local folder; its name is that of the store.
        sizes: bytes of all objects of the store; if given, local files are checked against them.

    Raises:
        InputError: the object store lacks the store, or can't be reached.
    """
    if not folder.parent.is_dir():
        folder = Path(tempfile.gettempdir()) / f"pose-study-{getpass.getuser()}" / folder.name
        folder.parent.mkdir(parents=True, exist_ok=True)
    if sizes is None and (folder / INDEX).is_file():
        return folder
    with hold_lock(folder.parent / f".{folder.name}.lock", waiting="waiting for the crops"):
        if sizes is None and (folder / INDEX).is_file():
            return folder  # downloaded by the process that had the lock
        sizes = sizes or sizes_in(url, folder.name)
        if INDEX not in sizes:
            raise InputError(
                f"{url} must hold all crops of {folder.name}, but does not, or no longer; run the "
                "study again, which uploads them"
            )
        parts = sorted(name for name in sizes if name.startswith("part-"))
        fetch_files(url, folder, [*parts, INDEX], sizes)
    return folder


@contextlib.contextmanager
def _explained(url: str) -> Iterator[Any]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"data.store must be a bucket that this machine can use, got data.store={url}: "
            f"{error}; fix the address, the bucket or the credentials (for S3, AWS_ACCESS_KEY_ID "
            "and AWS_SECRET_ACCESS_KEY in the environment, or a role)"
        ) from error
