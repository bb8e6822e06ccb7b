"""python study/dataset.py --compare A B: people of A are found in B whatever their images are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from models.skeleton import COCO
from study.data import shared_people as module
from study.data.annotations import read_table
from study.data.people import People, build_people
from study.data.shared_people import (
    SAME_BYTES,
    SAME_CONTENT,
    SAME_FILE,
    SharedPerson,
    shared_people,
)
from study.dataset import main, shared_table

HEIGHT, WIDTH = 240, 320


def scene(seed: int) -> NDArray[np.uint8]:
    """A picture of smooth random colors."""
    coarse = np.random.RandomState(seed).randint(0, 256, (7, 9, 3)).astype(np.uint8)
    return np.asarray(cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC))


def person(number: int, image: int, left: float, zoom: float) -> dict[str, Any]:
    joints = [((left + 3 * j) * zoom, (30 + 8 * j) * zoom, 2) for j in range(17)]
    box = [zoom * value for value in (left - 5, 20, 70, 160)]
    return {
        "id": number,
        "image_id": image,
        "category_id": 1,
        "iscrowd": 0,
        "area": box[2] * box[3],
        "bbox": box,
        "keypoints": [value for joint in joints for value in joint],
    }


def write_file(
    root: Path, name: str, images: dict[str, bytes], first: int, lefts: tuple[float, ...] = (40,)
) -> Path:
    """Write a file of these images, with one person per value of ``lefts`` in each."""
    (root / name).mkdir(parents=True)
    document: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 1, "name": "person", "keypoints": list(COCO.joints)}],
    }
    for number, (file_name, data) in enumerate(images.items(), first):
        (root / name / file_name).write_bytes(data)
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        assert pixels is not None
        height, width = pixels.shape[:2]
        image = {"id": number, "file_name": file_name, "height": height, "width": width}
        document["images"].append(image)
        for place, left in enumerate(lefts):
            one = person(10 * number + place, number, left, width / WIDTH)
            document["annotations"].append(one)
    (root / f"{name}.json").write_text(json.dumps(document))
    return root / f"{name}.json"


def people_of(file: Path) -> People:
    return build_people(read_table(file, COCO), file.with_suffix(""))


def encoded(pixels: NDArray[np.uint8], suffix: str = ".jpg", quality: int = 95) -> bytes:
    options = [cv2.IMWRITE_JPEG_QUALITY, quality] if suffix == ".jpg" else []
    return cv2.imencode(suffix, pixels, options)[1].tobytes()


def half(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    size = (WIDTH // 2, HEIGHT // 2)
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA))


@pytest.mark.parametrize(
    ("copy", "reason"),
    [
        ({"x.jpg": encoded(scene(1))}, SAME_BYTES),
        ({"x.jpg": encoded(scene(1), quality=40)}, SAME_CONTENT),
        ({"x.png": encoded(scene(1), ".png")}, SAME_CONTENT),
        ({"x.jpg": encoded(half(scene(1)), quality=80)}, SAME_CONTENT),
    ],
    ids=["renamed", "quality", "png", "half"],
)
def test_copy_of_an_image_is_found(copy: dict[str, bytes], reason: str, tmp_path: Path) -> None:
    images = {f"{seed}.jpg": encoded(scene(seed)) for seed in (0, 1, 2)}
    ours = people_of(write_file(tmp_path, "a", images, first=1, lefts=(40, 180)))
    others = {"8.jpg": encoded(scene(8)), **copy}
    theirs = people_of(write_file(tmp_path, "b", others, first=100, lefts=(41,)))
    found = shared_people(ours, theirs, lambda name: lambda done, total: None)
    assert [ours.annotation_ids[one.row] for one in found] == [20, 21]
    assert {one.reason for one in found} == {reason}
    assert {one.other_image.name for one in found} == set(copy)
    # The second person of the image is not annotated in the copy.
    assert [one.other_row for one in found] == [1, None]


def test_different_images_are_not_the_same(tmp_path: Path) -> None:
    files = [
        write_file(
            tmp_path,
            name,
            {f"{seed}.jpg": encoded(scene(seed)) for seed in range(start, start + 40)},
            first=start,
        )
        for name, start in (("a", 100), ("b", 200))
    ]
    ours, theirs = map(people_of, files)
    assert shared_people(ours, theirs, lambda name: lambda done, total: None) == []


def test_frames_of_a_fixed_camera_are_not_taken_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = []
    for left in (40, 66):
        frame = scene(3)
        frame[100:150, left : left + 24] = 250 - scene(4)[100:150, 40:64] // 2  # who moves
        frames.append(encoded(frame))
    ours = people_of(write_file(tmp_path, "a", {"0.jpg": frames[0]}, first=1))
    theirs = people_of(write_file(tmp_path, "b", {"1.jpg": frames[1]}, first=10))

    def found() -> list[SharedPerson]:
        return shared_people(ours, theirs, lambda name: lambda done, total: None)

    assert found() == []
    monkeypatch.setattr(module, "MAX_DIFFERENCE", 10.0)
    assert [one.reason for one in found()] == [SAME_CONTENT]  # as a whole they are alike


def test_plain_images_are_not_taken_for_one(tmp_path: Path) -> None:
    gray = np.full((HEIGHT, WIDTH, 3), 90, np.uint8)
    ours = people_of(write_file(tmp_path, "a", {"a.png": encoded(gray, ".png")}, first=1))
    theirs = people_of(write_file(tmp_path, "b", {"b.png": encoded(gray + 1, ".png")}, first=9))
    assert shared_people(ours, theirs, lambda name: lambda done, total: None) == []


def test_same_ids_and_the_same_file_are_found(tmp_path: Path) -> None:
    file = write_file(tmp_path, "a", {"1.jpg": encoded(scene(1))}, first=1, lefts=(40, 180))
    ours = people_of(file)
    document = json.loads(file.read_text())
    document["annotations"][1]["id"] = 99
    (tmp_path / "b.json").write_text(json.dumps(document))
    theirs = build_people(read_table(tmp_path / "b.json", COCO), tmp_path / "a")
    found = shared_people(ours, theirs, lambda name: lambda done, total: None)
    assert [one.reason for one in found] == ["the same person", SAME_FILE]
    table = shared_table(ours, theirs, found).to_pylist()
    assert [row["other_annotation_id"] for row in table] == [10, 99]


def test_command_lists_shared_people_and_exits_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    images = {f"{seed}.jpg": encoded(scene(seed)) for seed in (0, 1)}
    ours = write_file(tmp_path, "a", images, first=1)
    theirs = write_file(tmp_path, "b", {"x.png": encoded(scene(1), ".png")}, first=100)
    with pytest.raises(SystemExit) as ended:
        main(["--compare", str(ours), str(theirs)])
    assert ended.value.code == 1
    shown = capsys.readouterr().out
    assert f"1 of 2 people in {ours} (50.0%) are in {theirs}, or their image is" in shown
    assert f"{SAME_CONTENT} (1): annotation 20 in {tmp_path}/a/1.jpg, there" in shown
    (row,) = pq.read_table(tmp_path / "compare-a-b" / "shared.parquet").to_pylist()
    assert row == {
        "annotation_id": 20,
        "image_id": 2,
        "image": f"{tmp_path}/a/1.jpg",
        "reason": SAME_CONTENT,
        "other_annotation_id": 1000,
        "other_image": f"{tmp_path}/b/x.png",
    }


def test_command_exits_with_0_if_no_person_is_in_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ours = write_file(tmp_path, "a", {"0.jpg": encoded(scene(0))}, first=1)
    theirs = write_file(tmp_path, "b", {"0.jpg": encoded(scene(1))}, first=7)
    with pytest.raises(SystemExit) as ended:
        main(["--compare", str(ours), str(theirs)])
    assert ended.value.code == 0
    assert pq.read_table(tmp_path / "compare-a-b" / "shared.parquet").num_rows == 0


def test_command_names_a_file_without_usable_people(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ours = write_file(tmp_path, "a", {"0.jpg": encoded(scene(0))}, first=1)
    (tmp_path / "b.json").write_text("[]")
    with pytest.raises(SystemExit) as ended:
        main(["--compare", str(ours), str(tmp_path / "b.json")])
    assert str(ended.value.code).startswith(f"error: no person of {tmp_path}/b.json can be used")


@pytest.mark.parametrize("arguments", [[], ["x", "--compare", "a", "b"]])
def test_command_takes_either_a_path_or_two_files(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "give either PATH or --compare A B" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["data", "nothing.json"])
def test_command_compares_files_alone(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(SystemExit) as ended:
        main(["--compare", str(tmp_path / name), str(tmp_path / name)])
    kind = "a folder" if name == "data" else "no such file"
    assert ended.value.code == 2
    assert f"takes two annotation files, got {kind}: {tmp_path}/{name}" in capsys.readouterr().err
