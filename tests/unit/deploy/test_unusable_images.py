"""predict.py on images that cannot be used: they are listed, all else is written."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import study.deploy.drawing
from models.build import build_codec
from models.skeleton import Skeleton
from study.deploy.drawing import LONGEST
from study.predict import main

HEIGHT, WIDTH = 90, 120
SIZE = (96, 64)
BOX = [10, 5, 80, 70]
POSE = [value for joint in range(5) for value in (30 + joint, 40, 0.9)]


class Fixed(nn.Module):
    """Sees the joints of each crop in a row, or where they are given."""

    refiner = True

    def __init__(self, span: float = 60.0) -> None:
        super().__init__()
        self.codec = build_codec("dark", SIZE, 2.0)
        self.x = nn.Parameter(torch.linspace(2, 2 + span, 5))
        self.score = 0.9

    def forward(
        self, crops: Tensor, given: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        row = torch.stack([self.x, torch.full((5,), 48.0)], 1).expand(len(crops), 5, 2)
        return (row, torch.full((len(crops), 5), self.score)) if given is None else given


@pytest.fixture
def network(five: Skeleton) -> Iterator[Fixed]:
    """The network that every export holds."""
    made = Fixed()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("study.predict.load_estimator", lambda export, device: (made, five))
        yield made


@pytest.fixture
def photos(tmp_path: Path, network: Fixed) -> Path:
    """A folder with the images 1.jpg to 3.jpg."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.RandomState(0)
    for number in (1, 2, 3):
        image = rng.randint(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
        cv2.imwrite(str(folder / f"{number}.jpg"), image)
    return folder


def run(photos: Path, *arguments: str | Path) -> tuple[list[dict[str, Any]] | None, str]:
    """Runs the script; returns ``keypoints.json`` and the error that it ends with."""
    out = photos.parent / "out"
    error = ""
    try:
        main(["export", str(photos), "--out", str(out), *map(str, arguments)])
    except SystemExit as exit_:
        error = str(exit_.code)
    file = out / "keypoints.json"
    assert not [path.name for path in out.rglob(".*")]
    return (json.loads(file.read_text()) if file.exists() else None), error


def drawn(photos: Path) -> list[str]:
    return sorted(path.name for path in (photos.parent / "out").glob("*.jpg"))


def write(photos: Path, content: object) -> Path:
    file = photos.parent / "given.json"
    file.write_text(json.dumps(content))
    return file


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:900])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def text(file: Path) -> None:
    file.write_bytes(b"no image")


def dangling_link(file: Path) -> None:
    file.unlink()
    file.symlink_to("nowhere")


def circle_of_links(file: Path) -> None:
    file.unlink()
    file.symlink_to(file)


def pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def test_damage_within_a_file_is_named_once(photos: Path) -> None:
    stored = cv2.imencode(".png", np.random.RandomState(0).randint(0, 256, (40, 40, 3)))[1]
    content = stored.tobytes()
    (photos / "4.png").write_bytes(content[:900] + bytes(300) + content[1200:])
    found, error = run(photos)
    assert found is not None and len(found) == 3
    assert error.count("4.png") == 1 and "must be a complete image" in error


@pytest.mark.parametrize("option", ["", "--boxes", "--poses"])
@pytest.mark.parametrize("damage", [cut_off, empty, text, dangling_link, circle_of_links, pipe])
def test_unreadable_image_is_listed_and_the_others_are_written(
    damage: Any, option: str, photos: Path
) -> None:
    damage(photos / "2.jpg")
    entries = [{"image_id": n, "bbox": BOX, "keypoints": POSE} for n in (1, 2, 3)]
    found, error = run(photos, *((option, write(photos, entries)) if option else ()))
    assert error.startswith(f"error: not all images are in the results:\n  {photos}/2.jpg: ")
    assert drawn(photos) == ["1.jpg", "3.jpg"]
    assert found is not None
    if option == "--poses":
        assert found[1] == entries[1]  # as it was
    else:
        assert [row["image_id"] for row in found] == [1, 3]


def test_of_many_unusable_images_the_first_are_listed(photos: Path) -> None:
    for number in range(10, 120):
        (photos / f"{number}.jpg").touch()
    found, error = run(photos)
    assert found is not None and len(found) == 3
    lines = error.splitlines()
    assert len(lines) == 102 and lines[-1] == "  and 10 more"


@pytest.mark.parametrize("option", ["--boxes", "--poses"])
def test_poses_of_an_image_that_cannot_be_drawn_are_listed(option: str, photos: Path) -> None:
    (photos.parent / "out/2.jpg").mkdir(parents=True)
    cv2.imwrite(str(photos / "4.png"), np.zeros((2, LONGEST + 1), np.uint8))
    box = [0, 0, 100, 70]
    entries = [{"image_id": n, "bbox": box, "keypoints": POSE} for n in (1, 2, 3, 4)]
    found, error = run(photos, option, write(photos, entries))
    assert found is not None and len(found) == 4
    assert f"{photos}/2.jpg: its poses are listed, but it cannot be drawn: Is a dir" in error
    assert f"{photos}/4.png: its poses are listed, but it cannot be drawn: a JPEG has" in error
    assert f"got 2 x {LONGEST + 1}" in error and len(error.splitlines()) == 3
    assert drawn(photos) == ["1.jpg", "2.jpg", "3.jpg"]


def test_nothing_is_written_if_no_image_can_be_read(photos: Path) -> None:
    for file in photos.iterdir():
        text(file)
    found, error = run(photos)
    assert found is None and drawn(photos) == []
    assert error.startswith("error: none of 3 images can be used, so ")
    assert [f"{n}.jpg: " in error for n in (1, 2, 3)] == [True] * 3


def test_image_of_another_size_than_the_file_says_is_left_out(photos: Path) -> None:
    names = [{"id": n, "file_name": f"{n}.jpg", "height": HEIGHT, "width": WIDTH} for n in (1, 2)]
    names[1] |= {"height": WIDTH, "width": HEIGHT}
    entries = [{"image_id": n, "bbox": BOX, "keypoints": POSE} for n in (1, 2)]
    file = write(photos, {"images": names, "annotations": entries})
    for option in ("--boxes", "--poses"):
        found, error = run(photos, option, file)
        assert f"{photos}/2.jpg: the image must be as high and wide as" in error
        assert "120 x 90, got 90 x 120" in error and "1.jpg" not in error
        assert found is not None and drawn(photos) == ["1.jpg"]


def test_turned_image_of_a_file_without_sizes_is_warned_of(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tag = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    file = photos / "2.jpg"
    stored = file.read_bytes()
    segment = b"\xff\xe1" + (len(tag) + 2).to_bytes(2, "big") + tag
    file.write_bytes(stored[:2] + segment + stored[2:])
    boxes = write(photos, [{"image_id": n, "bbox": BOX} for n in (1, 2, 3)])
    found, error = run(photos, "--boxes", boxes)
    assert found is not None and len(found) == 3 and not error
    warning = capsys.readouterr().err
    assert "1 images are turned by their EXIF tag (2.jpg): coordinates in" in warning
    assert cv2.imread(str(photos.parent / "out/2.jpg")).shape == (WIDTH, HEIGHT, 3)


def test_boxes_by_two_corners_are_warned_of(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    box = [30, 20, 80, 70]
    named = [{"id": 1, "file_name": "1.jpg", "height": HEIGHT, "width": WIDTH}]
    entries = [{"image_id": 1, "bbox": box}, {"image_id": 1, "bbox": [30, 20, 118, 88]}]
    for content in (entries, {"images": named, "annotations": entries}):
        found, error = run(photos, "--boxes", write(photos, content))
        assert found is not None and len(found) == 2 and not error
        # 30 + 118 is beyond 120, 20 + 70 is not beyond 90.
        assert "1 of 2 boxes of" in (warning := capsys.readouterr().err)
        assert "the first in 1.jpg); bbox must be x, y, width and height" in warning


@pytest.mark.parametrize("kind", ["gray", "alpha", "deep"])
def test_images_of_other_depths_are_read(kind: str, photos: Path) -> None:
    shape = {"gray": (HEIGHT, WIDTH), "alpha": (HEIGHT, WIDTH, 4), "deep": (HEIGHT, WIDTH, 3)}
    dtype = np.uint16 if kind == "deep" else np.uint8
    for file in photos.iterdir():
        file.unlink()
    cv2.imwrite(str(photos / "1.png"), np.full(shape[kind], np.iinfo(dtype).max // 2, dtype))
    found, error = run(photos)
    assert not error and found is not None and len(found) == 1


def test_small_or_unsure_pose_of_a_whole_image_is_warned_of(
    photos: Path, network: Fixed, capsys: pytest.CaptureFixture[str]
) -> None:
    def warning(*arguments: str | Path) -> str:
        run(photos, *arguments)
        return capsys.readouterr().err

    # A crop of 64 pixels shows 1.25 times the width, 150 px: 60 of it are 141 px, 10 are 23.
    assert warning() == ""
    network.x.data = torch.linspace(20, 30, 5)
    assert "in 3 of 3 images the pose is unsure or small (1.jpg, 2.jpg, 3.jpg)" in warning()
    boxes = write(photos, [{"image_id": n, "bbox": BOX} for n in (1, 2, 3)])
    assert warning("--boxes", boxes) == ""
    network.x.data, network.score = torch.linspace(2, 62, 5), 0.1
    assert "give the people's boxes by --boxes" in warning()


def test_full_disk_and_interrupt_leave_whole_files_and_one_sentence(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = study.deploy.drawing.cv2.imencode
    for error, message in (
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "error: disk full: no space left"),
        (KeyboardInterrupt(), "interrupted; "),
    ):
        calls = iter((1, 2))

        def encode(*arguments: Any, calls: Any = calls, error: Any = error) -> Any:
            if next(calls) == 2:
                raise error
            return original(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr("study.deploy.drawing.cv2.imencode", encode)
            found, text_ = run(photos)
        assert found is None and drawn(photos) == ["1.jpg"]
        assert text_.startswith(message) and "\n" not in text_
        assert "keypoints.json was not written" in text_
