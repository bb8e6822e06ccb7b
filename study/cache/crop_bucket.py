"""Crop stores in an object store: taken up once for all machines, brought to each node once.

An address is ``s3://bucket/prefix`` or ``gs://bucket/prefix``, with pyarrow's options behind a
``?``. The index goes up last and comes down last, so that half a store is never read.
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

from study.cache.crop_parts import Part, Tell, is_whole, write_part
from study.errors import InputError
from study.storage.files import commit_file, remove_stale_temps, temp_path

INDEX = "people.arrow"
"""The file of a store that is written last and says which parts belong to it."""


def check_bucket(url: str) -> None:
    """Returns if the bucket is there and may be looked into.

    Raises:
        InputError: it is not.
    """
    with _explained(url):
        files, path = fs.FileSystem.from_uri(url)
        bucket = path.split("/")[0]
        if not bucket:
            raise OSError("it names no bucket")
        if files.get_file_info(bucket).type == fs.FileType.NotFound:
            raise OSError(f"there is no bucket {bucket}")


def check_writable(url: str) -> None:
    """Returns if objects may be put there, which is tried.

    Raises:
        InputError: they may not.
    """
    with _explained(url):
        files, path = fs.FileSystem.from_uri(url)
        probe = temp_path(Path("probe")).name
        with files.open_output_stream(f"{path}/{probe}") as stream:
            stream.write(b"may this study write here?")
        files.delete_file(f"{path}/{probe}")


def sizes_in(url: str, name: str) -> dict[str, int]:
    """Bytes of each object of this store; none where it is not there."""
    with _explained(url):
        files, path = fs.FileSystem.from_uri(url)
        wanted = fs.FileSelector(f"{path}/{name}", allow_not_found=True)
        return {info.base_name: info.size for info in files.get_file_info(wanted) if info.is_file}


def is_uploaded(url: str, part: Part, sizes: dict[str, int]) -> bool:
    """Whether the part was taken up to its end.

    Args:
        sizes: of all objects of its store.
    """
    if part.file.name not in sizes:
        return False
    with _explained(url):
        files, path = fs.FileSystem.from_uri(url)
        with files.open_input_file(f"{path}/{part.file.parent.name}/{part.file.name}") as source:
            return is_whole(source, part)


def build_part(part: Part, threads: int, tell: Tell = lambda count: None) -> None:
    """Makes the part unless it is there, and takes it to the object store, if there is one."""
    if is_whole(part.file, part):
        tell(len(part))
    else:
        write_part(part, threads, tell)
    if part.url is not None:
        upload(part.url, part.file.parent.name, part.file)


def cut_locally(parts: Sequence[Part], tell: Tell) -> None:
    """Makes the parts in this process, by as many threads as there are cores."""
    for part in parts:
        build_part(part, os.cpu_count() or 1, tell)


def upload(url: str, name: str, file: Path) -> None:
    """Puts the file into the store of this name."""
    with _explained(url):
        files, path = fs.FileSystem.from_uri(url)
        local = fs.LocalFileSystem()
        fs.copy_files(str(file), f"{path}/{name}/{file.name}", local, files)


def fetch_files(url: str, folder: Path, file_names: Sequence[str], sizes: dict[str, int]) -> None:
    """The files of the store in this local folder, those that are missing brought aside and
    renamed, in this order.

    Args:
        sizes: bytes of each of them.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def is_here(name: str) -> bool:
        file = folder / name
        return file.is_file() and file.stat().st_size == sizes[name]

    missing = [name for name in file_names if not is_here(name)]
    needed, free = sum(sizes[name] for name in missing), shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"crops from {url} must find room: {needed / 1e9:.3g} GB, but {folder} has "
            f"{free / 1e9:.3g} GB free; make room there"
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
    """The local folder of the store of this name, brought here unless it is; once a node.

    It lies where it is told, or, on a node that has no such place, in the folder for temporary
    files.

    Args:
        sizes: bytes of all objects of the store; if given, what is here is checked by them.

    Raises:
        InputError: the object store doesn't have it, or can't be reached.
    """
    if not folder.parent.is_dir():
        folder = Path(tempfile.gettempdir()) / f"pose-study-{getpass.getuser()}" / folder.name
        folder.parent.mkdir(parents=True, exist_ok=True)
    if sizes is None and (folder / INDEX).is_file():
        return folder
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if sizes is None and (folder / INDEX).is_file():
            return folder  # brought by the one that had the lock
        sizes = sizes or sizes_in(url, folder.name)
        if INDEX not in sizes:
            raise InputError(
                f"crops must be whole in {url}, but {folder.name} is not, or not any more; "
                "start the study again, which makes them"
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
            f"{error}; mend the address, the bucket or the credentials (of S3 the environment's "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a role)"
        ) from error
