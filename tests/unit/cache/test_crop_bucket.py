"""Crop stores in an object store, a local S3 server: one upload, one download per node."""

from __future__ import annotations

import dataclasses
import multiprocessing
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import fs

from study.cache import crop_bucket
from study.cache.crop_bucket import INDEX, check_bucket, check_writable, fetch_store, sizes_in
from study.cache.crop_parts import JPEG
from study.cache.crop_store import CropStore, StoreSpec, make_crop_store, open_crop_store
from study.cache.prepare import PreparedData
from study.data.people import People
from study.errors import InputError

moto = pytest.importorskip("moto.server", reason="moto[server] is missing: pip install '.[dev]'")
core = pytest.importorskip("moto.core")
SIZE = (96, 64)
EVERYONE = np.arange(13)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"{host}:{port}"
    server.stop()


@pytest.fixture
def url(endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """An empty prefix of a bucket."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    address = address_of(endpoint, "crops")
    files, _ = fs.FileSystem.from_uri(address + "&allow_bucket_creation=true")
    files.create_dir("crops")
    return address.replace("s3://crops", f"s3://crops/{tmp_path.name}")


def address_of(endpoint: str, bucket: str) -> str:
    options = {"endpoint_override": f"http://{endpoint}", "scheme": "http", "region": "us-east-1"}
    return f"s3://{bucket}?{urllib.parse.urlencode(options)}"


def remove(url: str, name: str) -> None:
    files, path = fs.FileSystem.from_uri(url)
    files.delete_file(f"{path}/{name}")


def test_store_is_uploaded_and_opened_on_another_node(
    url: str, five_people: People, five_store: CropStore, tmp_path: Path, small_parts: None
) -> None:
    path = make_crop_store(five_people, StoreSpec(SIZE, tmp_path / "here", url=url))
    sizes = sizes_in(url, path.name)
    assert sizes == {file.name: file.stat().st_size for file in path.iterdir()}
    assert set(sizes) == {INDEX, *(f"part-0000{number}.arrow" for number in range(3))}
    (tmp_path / "there").mkdir()
    there = fetch_store(url, tmp_path / "there" / path.name)
    assert there.parent == tmp_path / "there"
    for node in (path, there):
        opened = open_crop_store(node)
        assert np.array_equal(opened.crops(EVERYONE), five_store.crops(EVERYONE))
        assert np.array_equal(opened.keypoints_stored, five_store.keypoints_stored)


def test_second_study_on_another_machine_cuts_nothing(
    url: str, five_people: People, tmp_path: Path
) -> None:
    first = make_crop_store(five_people, StoreSpec(SIZE, tmp_path / "here", form=JPEG, url=url))

    def cut(parts: Any, count_done: Any) -> None:
        raise AssertionError("no part may be cut")

    messages: list[str] = []
    second = make_crop_store(
        five_people,
        StoreSpec(SIZE, tmp_path / "there", form=JPEG, url=url),
        cut=cut,
        notify=messages.append,
    )
    assert len(messages) == 1 and messages[0].startswith("fetching the crops of people: ")
    assert second == tmp_path / "there" / first.name
    everyone = open_crop_store(second).crops(EVERYONE)
    assert np.array_equal(everyone, open_crop_store(first).crops(EVERYONE))


def test_existing_store_is_uploaded_and_not_cut_again(
    url: str, five_people: People, tmp_path: Path, small_parts: None
) -> None:
    path = make_crop_store(five_people, StoreSpec(SIZE, tmp_path))
    before = {file.name: file.stat().st_mtime_ns for file in path.glob("part-*")}
    assert make_crop_store(five_people, StoreSpec(SIZE, tmp_path, url=url)) == path
    assert {file.name: file.stat().st_mtime_ns for file in path.glob("part-*")} == before
    assert set(sizes_in(url, path.name)) == {INDEX, *before}


def test_incomplete_store_is_not_read_and_only_missing_parts_are_made(
    url: str, five_people: People, five_store: CropStore, tmp_path: Path, small_parts: None
) -> None:
    """The state after a driver was killed between two parts, one of them truncated."""
    name = make_crop_store(five_people, StoreSpec(SIZE, tmp_path / "here", url=url)).name
    remove(url, f"{name}/{INDEX}")
    remove(url, f"{name}/part-00002.arrow")
    files, path = fs.FileSystem.from_uri(url)
    with files.open_output_stream(f"{path}/{name}/part-00001.arrow") as stream:
        stream.write((tmp_path / "here" / name / "part-00001.arrow").read_bytes()[:-50])
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match=r"s3://.* must hold all crops of .*run the study again"):
        fetch_store(url, tmp_path / "there" / name)
    made: list[str] = []

    def cut(parts: Any, count_done: Any) -> None:
        made.extend(part.file.name for part in parts)
        crop_bucket.cut_locally(parts, count_done)

    again = make_crop_store(five_people, StoreSpec(SIZE, tmp_path / "there", url=url), cut=cut)
    assert made == ["part-00001.arrow", "part-00002.arrow"]
    assert np.array_equal(open_crop_store(again).crops(EVERYONE), five_store.crops(EVERYONE))


def test_damaged_copy_is_repaired_when_the_study_is_run_again(
    url: str, five_people: People, five_store: CropStore, tmp_path: Path, small_parts: None
) -> None:
    path = make_crop_store(five_people, StoreSpec(SIZE, tmp_path, url=url))
    (path / "part-00001.arrow").write_bytes(b"half")
    make_crop_store(five_people, StoreSpec(SIZE, tmp_path, url=url))
    assert np.array_equal(open_crop_store(path).crops(EVERYONE), five_store.crops(EVERYONE))


def test_node_without_the_storage_uses_its_temporary_folder(
    url: str,
    five_people: People,
    five_store: CropStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = str(make_crop_store(five_people, StoreSpec(SIZE, tmp_path / "here", url=url)))
    elsewhere = path.replace("/here/", "/not-mounted/")
    monkeypatch.setattr(crop_bucket.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    data = PreparedData(
        elsewhere,
        elsewhere,
        elsewhere,
        "truth.json",
        "truth.json",
        (13, 13, 13),
        teacher_crops=(elsewhere, elsewhere, elsewhere),
        url=url,
    )
    found = data.here()
    assert found.train.startswith(str(tmp_path / "tmp")) and not Path(elsewhere).exists()
    assert found.teacher_crops == (found.train, found.search, found.val)
    assert found.fingerprint == data.fingerprint
    crops = open_crop_store(Path(found.train)).crops(EVERYONE)
    assert np.array_equal(crops, five_store.crops(EVERYONE))
    assert dataclasses.replace(data, url=None).here().train == elsewhere


def download(url: str, folder: Path, ready: Any, done: Any) -> None:
    downloaded: list[str] = []
    commit_file = crop_bucket.commit_file

    def commit_and_record(temporary: Path, file: Path) -> None:
        downloaded.append(file.name)
        commit_file(temporary, file)

    crop_bucket.commit_file = commit_and_record  # type: ignore[attr-defined]
    ready.wait(timeout=60)
    fetch_store(url, folder)
    done.put(downloaded)


@pytest.mark.slow
def test_trials_of_a_node_download_the_store_once(
    url: str, five_people: People, tmp_path: Path, small_parts: None
) -> None:
    name = make_crop_store(five_people, StoreSpec(SIZE, tmp_path / "here", url=url)).name
    (tmp_path / "there").mkdir()
    context = multiprocessing.get_context("spawn")
    ready, done = context.Barrier(3), context.Queue()
    folder = tmp_path / "there" / name
    trials = [context.Process(target=download, args=(url, folder, ready, done)) for _ in range(3)]
    for trial in trials:
        trial.start()
    downloaded = sorted((done.get(timeout=90) for _ in trials), key=len)
    for trial in trials:
        trial.join()
    assert downloaded == [[], [], [*(f"part-0000{number}.arrow" for number in range(3)), INDEX]]
    assert len(open_crop_store(folder)) == 13


def test_missing_bucket_is_refused(url: str, endpoint: str) -> None:
    check_bucket(url)
    check_writable(url)
    assert sizes_in(url, "") == {}  # the probe object was removed
    with pytest.raises(InputError, match=r"there is no bucket nowhere.*fix the address"):
        check_bucket(address_of(endpoint, "nowhere"))


def test_incomplete_address_is_refused() -> None:
    with pytest.raises(InputError, match=r"data\.store=s3://"):
        check_bucket("s3://")


def test_bucket_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()
    monkeypatch.setattr(crop_bucket, "ANSWER_S", 0.05)
    monkeypatch.setattr(crop_bucket, "_find_bucket", lambda url: answered.wait(60))
    with pytest.raises(InputError, match=r"data\.store=gs://far, which does not answer"):
        check_bucket("gs://far")
    answered.set()


def test_refused_credentials_are_reported_before_any_file_is_made(
    url: str, five_people: People, tmp_path: Path
) -> None:
    @core.set_initial_no_auth_action_count(0)  # from now on the server refuses everybody
    def refused() -> None:
        with pytest.raises(InputError, match=r"ACCESS_DENIED.*credentials"):
            check_bucket(url)
        with pytest.raises(InputError, match=r"INVALID_ACCESS_KEY_ID.*credentials"):
            make_crop_store(five_people, StoreSpec(SIZE, tmp_path / "here", url=url))

    refused()
    assert not (tmp_path / "here").exists()
