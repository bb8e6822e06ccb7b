"""Crop stores in parts: resumed, shared, never read half-made, refused on a full disk."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter, namedtuple
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from models.skeleton import Skeleton
from study.cache import crop_bucket, crop_parts
from study.cache import crop_store as store_module
from study.cache.crop_bucket import INDEX, cut_locally
from study.cache.crop_parts import JPEG, RAW, CountDone, Part, choose_form
from study.cache.crop_store import CropStore, StoreSpec, make_crop_store, open_crop_store
from study.config.compose import compose
from study.config.study_paths import with_absolute_paths
from study.data.annotations import read_table
from study.data.people import People, build_people
from study.errors import InputError

SIZE = (96, 64)
EVERYONE = np.arange(13)


class Killed(BaseException):
    """Stand-in for whatever ends a process at a random moment."""


def versions(folder: Path) -> dict[str, tuple[int, int]]:
    stats = {file.name: file.stat() for file in folder.glob("part-*")}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def killed_after(people: int) -> Any:
    """Return a ``cut`` that raises once this many people are done."""

    def cut(parts: Sequence[Part], count_done: CountDone) -> None:
        done = 0

        def count(number: int) -> None:
            nonlocal done
            done += number
            if done >= people:
                raise Killed

        cut_locally(parts, count)

    return cut


@pytest.fixture
def interrupted(five_people: People, tmp_path: Path, small_parts: None) -> Path:
    """Folder of a store whose creation was killed in the second of its three parts."""
    with pytest.raises(Killed):
        make_crop_store(five_people, StoreSpec(SIZE, tmp_path), cut=killed_after(7))
    (folder,) = tmp_path.iterdir()
    return folder


def test_interrupted_store_keeps_complete_parts_and_is_not_read(interrupted: Path) -> None:
    assert [file.name for file in interrupted.iterdir()] == ["part-00000.arrow"]
    with pytest.raises(InputError, match=r"people\.arrow"):
        open_crop_store(interrupted)


def test_finished_parts_are_reused(
    interrupted: Path, five_people: People, five_store: CropStore
) -> None:
    before = versions(interrupted)
    reported: list[tuple[int, int]] = []
    path = make_crop_store(
        five_people,
        StoreSpec(SIZE, interrupted.parent),
        progress=lambda done, total: reported.append((done, total)),
    )
    assert path == interrupted
    assert versions(path)["part-00000.arrow"] == before["part-00000.arrow"]
    assert reported[0] == (7, 13) and reported[-1] == (13, 13)  # of 4, 5 and 4 people
    assert np.array_equal(open_crop_store(path).crops(EVERYONE), five_store.crops(EVERYONE))


def test_truncated_part_is_made_again(
    interrupted: Path, five_people: People, five_store: CropStore
) -> None:
    """The state of a file system after a power cut."""
    part = interrupted / "part-00000.arrow"
    part.write_bytes(part.read_bytes()[:-100])
    path = make_crop_store(five_people, StoreSpec(SIZE, interrupted.parent))
    assert np.array_equal(open_crop_store(path).crops(EVERYONE), five_store.crops(EVERYONE))


@pytest.mark.parametrize("harm", ["short", "gone"])
def test_store_with_a_damaged_part_is_not_read_and_is_repaired(
    harm: str, five_people: People, five_store: CropStore, tmp_path: Path, small_parts: None
) -> None:
    path = make_crop_store(five_people, StoreSpec(SIZE, tmp_path))
    part = path / "part-00001.arrow"
    content = part.read_bytes()
    part.write_bytes(content[: len(content) // 2])
    if harm == "gone":
        part.unlink()
    with pytest.raises(InputError, match="run the study again"):
        open_crop_store(path)
    before = versions(path)
    assert make_crop_store(five_people, StoreSpec(SIZE, tmp_path)) == path
    assert part.read_bytes() == content
    changed = {name for name, version in versions(path).items() if before.get(name) != version}
    assert changed == {"part-00001.arrow"}
    assert np.array_equal(open_crop_store(path).crops(EVERYONE), five_store.crops(EVERYONE))


def test_temporary_files_of_a_killed_process_are_not_read(
    interrupted: Path, five_people: People
) -> None:
    half = (interrupted / "part-00000.arrow").read_bytes()[:1000]
    (interrupted / ".part-00001.arrow.another-host.1").write_bytes(half)
    (interrupted / f".{INDEX}.another-host.1").write_bytes(half)
    path = make_crop_store(five_people, StoreSpec(SIZE, interrupted.parent))
    assert len(open_crop_store(path)) == len(open_crop_store(path).pixels) == 13


def test_two_drivers_make_the_same_store_at_once(
    five_people: People,
    five_store: CropStore,
    tmp_path: Path,
    small_parts: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two threads act as processes; neither finds a part when it starts."""
    both = threading.Barrier(2)

    def temp_path(file: Path) -> Path:
        return file.with_name(f".{file.name}.{threading.current_thread().name}")

    def cut(parts: Sequence[Part], count_done: CountDone) -> None:
        assert len(parts) == 3
        both.wait(timeout=20)
        for part in parts:
            crop_parts.write_part(part, 1, count_done)

    for module in ("crop_parts", "arrow_file"):
        monkeypatch.setattr(f"study.cache.{module}.temp_path", temp_path)
    paths: list[Path] = []
    drivers = [
        threading.Thread(
            target=lambda: paths.append(
                make_crop_store(five_people, StoreSpec(SIZE, tmp_path), cut=cut)
            ),
            name=f"driver-{number}",
        )
        for number in (1, 2)
    ]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join(timeout=20)
    assert len(paths) == 2 and paths[0] == paths[1]
    names = {file.name for file in paths[0].iterdir()}
    assert names == {INDEX, *(f"part-0000{number}.arrow" for number in range(3))}
    assert np.array_equal(open_crop_store(paths[0]).crops(EVERYONE), five_store.crops(EVERYONE))


def test_each_image_is_decoded_once_even_if_its_people_are_scattered(
    five_people: People,
    five_store: CropStore,
    tmp_path: Path,
    small_parts: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoded: Counter[str] = Counter()
    read = crop_parts.read_image

    def counted(path: Path) -> Any:
        decoded[path.name] += 1
        return read(path)

    monkeypatch.setattr(crop_parts, "read_image", counted)
    order = np.random.RandomState(0).permutation(13)
    mixed = open_crop_store(make_crop_store(five_people.take(order), StoreSpec(SIZE, tmp_path)))
    assert decoded == {f"{number}.png": 1 for number in range(1, 9)}
    assert np.array_equal(mixed.annotation_ids, five_people.annotation_ids[order])
    assert np.array_equal(mixed.crops(EVERYONE), five_store.crops(order))


def make_store_until_killed(people: People, cache: Path) -> None:
    crop_parts.PEOPLE_PER_PART = 4
    crop_parts.PEOPLE_PER_BATCH = 2

    def progress(done: int, total: int) -> None:
        if done >= 7:
            os.kill(os.getpid(), signal.SIGKILL)

    make_crop_store(people, StoreSpec(SIZE, cache), progress=progress)


@pytest.mark.slow
def test_killed_driver_loses_no_finished_part(
    five_people: People, five_store: CropStore, tmp_path: Path, small_parts: None
) -> None:
    context = multiprocessing.get_context("spawn")
    driver = context.Process(target=make_store_until_killed, args=(five_people, tmp_path))
    driver.start()
    driver.join()
    assert driver.exitcode == -signal.SIGKILL
    (folder,) = tmp_path.iterdir()
    (finished, before), *others = versions(folder).items()
    assert finished == "part-00000.arrow" and not others
    assert len(list(folder.glob(".part-00001*"))) == 1
    make_crop_store(five_people, StoreSpec(SIZE, tmp_path))
    assert versions(folder)[finished] == before
    assert not list(folder.glob(".*"))
    assert np.array_equal(open_crop_store(folder).crops(EVERYONE), five_store.crops(EVERYONE))


@pytest.fixture
def smooth(five_people: People, tmp_path: Path, five: Skeleton) -> People:
    """The same people in images without noise, like photographs."""
    root = tmp_path / "smooth"
    shutil.copytree(five_people.annotations.parent, root)
    for path in (root / "images").iterdir():
        image = cv2.imread(str(path))
        assert image is not None
        cv2.imwrite(str(path), cv2.GaussianBlur(image, (0, 0), 4))
    return build_people(read_table(root / "five.json", five), root / "images")


@pytest.mark.parametrize("threads", [1, 3])
def test_jpeg_crops_are_near_the_raw_ones(
    threads: int, smooth: People, tmp_path: Path, small_parts: None
) -> None:
    raw = open_crop_store(make_crop_store(smooth, StoreSpec(SIZE, tmp_path)))
    coded = open_crop_store(make_crop_store(smooth, StoreSpec(SIZE, tmp_path, form=JPEG)))
    rows = np.array([12, 0, 5, 5, 7])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    crops = np.stack(coded.crops(rows))
    torch.set_num_threads(before)
    wanted = np.stack(raw.crops(rows))
    assert crops.dtype == np.uint8 and crops.shape == wanted.shape
    error = np.abs(crops.astype(int) - wanted.astype(int))
    swapped = np.abs(crops[..., ::-1].astype(int) - wanted.astype(int))
    assert 0 < error.mean() < 1.5 < 10 < swapped.mean()
    assert np.array_equal(coded.keypoints_stored, raw.keypoints_stored)
    bytes_of = [sum(f.stat().st_size for f in s.path.glob("part-*")) for s in (raw, coded)]
    assert bytes_of[1] < bytes_of[0] / 4


def test_each_format_has_a_separate_store(five_people: People, tmp_path: Path) -> None:
    paths = {
        make_crop_store(five_people, StoreSpec(SIZE, tmp_path, form=form)) for form in (RAW, JPEG)
    }
    assert len(paths) == 2


def test_broken_jpeg_is_refused(five_people: People, tmp_path: Path) -> None:
    path = make_crop_store(five_people, StoreSpec(SIZE, tmp_path, form=JPEG))
    part = path / "part-00000.arrow"
    content = part.read_bytes()
    at = content.index(b"\xff\xd8\xff")
    part.write_bytes(content[:at] + bytes(64) + content[at + 64 :])
    with pytest.raises(InputError, match="delete the store's folder"):
        open_crop_store(path).crops(EVERYONE)


def test_auto_is_raw_up_to_a_size_and_then_jpeg() -> None:
    size = (384, 288)
    at_most = crop_parts.RAW_BYTES // (384 * 288 * 3)
    assert choose_form("auto", at_most, size) == RAW
    assert choose_form("auto", at_most + 1, size) == JPEG
    assert choose_form("raw", 10 * at_most, size) == RAW and choose_form(JPEG, 1, size) == JPEG


@pytest.mark.parametrize("form", [RAW, JPEG])
def test_size_is_printed_before_the_store_is_made(
    form: str, smooth: People, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(crop_parts.shutil, "disk_usage", lambda path: usage(210 * 10**9))
    messages: list[str] = []

    def cut(parts: Sequence[Part], count_done: CountDone) -> None:
        assert len(messages) == 1
        cut_locally(parts, count_done)

    path = make_crop_store(
        smooth, StoreSpec(SIZE, tmp_path, form=form), cut=cut, notify=messages.append, name="val"
    )
    words = messages[0].split()
    assert words[:5] == ["cropping", "val:", "13", "people,", "about"]
    assert messages[0].endswith("210 GB free")
    assert ("(raw 539 kB)" in messages[0]) == (form == JPEG)
    written = sum(file.stat().st_size for file in path.glob("part-*"))
    assert float(words[5]) * 1e3 == pytest.approx(written, rel=0.1)
    make_crop_store(smooth, StoreSpec(SIZE, tmp_path, form=form), notify=messages.append)
    assert len(messages) == 1


def test_full_disk_is_refused_before_anything_is_cut(
    five_people: People, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "free")
    needed = 13 * 144 * 96 * 3
    monkeypatch.setattr(crop_parts.shutil, "disk_usage", lambda path: usage(needed - 1))
    with pytest.raises(InputError, match=r"crops of train must fit on the disk.*data\.crops=jpeg"):
        make_crop_store(five_people, StoreSpec(SIZE, tmp_path), name="train")
    assert not list(tmp_path.rglob("*.arrow"))
    monkeypatch.setattr(crop_parts.shutil, "disk_usage", lambda path: usage(needed))
    make_crop_store(five_people, StoreSpec(SIZE, tmp_path))


@pytest.mark.parametrize(
    "number, text",
    [(41_472, "41.5 kB"), (999_600, "1 MB"), (49.7e9, "49.7 GB")],
)
def test_sizes_have_a_readable_unit(number: float, text: str) -> None:
    assert crop_parts.readable(number) == text


def test_part_that_only_another_node_sees_is_an_error(
    five_people: People, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "SEEN_WITHIN_S", 0)
    with pytest.raises(InputError, match=r"all nodes must share .*part-00000.*set data\.store"):
        make_crop_store(five_people, StoreSpec(SIZE, tmp_path), cut=lambda parts, count_done: None)
    assert not list(tmp_path.rglob(INDEX))


def test_only_temporary_files_of_dead_local_processes_are_removed(
    interrupted: Path, five_people: People
) -> None:
    host = socket.gethostname()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = [f"{host}.{dead.pid}", f"{host}.{os.getppid()}", f"another-host.{dead.pid}"]
    temporaries = [interrupted / f".part-00001.arrow.{name}" for name in names]
    for temporary in temporaries:
        temporary.write_bytes(b"half")
    make_crop_store(five_people, StoreSpec(SIZE, interrupted.parent))
    assert [temporary.exists() for temporary in temporaries] == [False, True, True]


def test_other_boxes_make_another_store(five_people: People, tmp_path: Path) -> None:
    """A detector gives other boxes for the same annotations."""
    moved = five_people.take(EVERYONE)
    moved.boxes[0, 0] += 5
    assert make_crop_store(moved, StoreSpec(SIZE, tmp_path)) != make_crop_store(
        five_people, StoreSpec(SIZE, tmp_path)
    )


def test_store_of_many_parts_keeps_no_file_open(
    five_people: People, tmp_path: Path, small_parts: None
) -> None:
    def files_open() -> list[str]:
        """List open files below the folder; others of this process may change."""
        names = (os.path.realpath(file) for file in Path("/proc/self/fd").iterdir())
        return [name for name in names if name.startswith(str(tmp_path))]

    path = make_crop_store(five_people, StoreSpec(SIZE, tmp_path))
    with (tmp_path / "open").open("w"):
        assert len(files_open()) == 1
    opened = [open_crop_store(path) for _ in range(5)]
    assert files_open() == []
    assert all(len(store.crops(EVERYONE)) == 13 for store in opened)


@pytest.mark.parametrize("store", ["ftp://host/x", "hdfs://host/x"])
def test_other_addresses_are_refused(store: str) -> None:
    with pytest.raises(InputError, match=r"data\.store must be null, a folder, s3://"):
        compose([f"data.store='{store}'"])


def test_folder_of_data_store_is_made_absolute_and_an_address_is_kept() -> None:
    assert Path(with_absolute_paths(compose(["data.store=x/y"])).data.store or "").is_absolute()
    address = compose(["data.store=s3://bucket/prefix"])
    assert with_absolute_paths(address).data.store == "s3://bucket/prefix"
    assert with_absolute_paths(compose([])).data.store is None


def test_existing_part_is_not_written_again(five_people: People, tmp_path: Path) -> None:
    affines = np.tile(np.eye(2, 3), (13, 1, 1))
    (part,), _ = crop_parts.plan_parts(five_people.image_paths, affines, (30, 20), RAW, tmp_path)
    counts: list[int] = []
    crop_bucket.build_part(part, 1, counts.append)
    before = part.file.stat().st_mtime_ns
    crop_bucket.build_part(part, 1, counts.append)
    assert counts == [13, 13] and part.file.stat().st_mtime_ns == before
