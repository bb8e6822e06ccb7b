"""Videos: every frame is read once, in its time, turned upright, and drawn into an MP4."""

from __future__ import annotations

import json
import math
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from study.deploy import video as video_module
from study.deploy.video import FramePoses, VideoPoses, find_poses, open_video
from study.errors import InputError

HEIGHT, WIDTH = 48, 64
FRAMES, FPS = 20, 4.0
Image = NDArray[np.uint8]


def frame(number: int) -> Image:
    """A gray frame with a red corner at the top left, and its number in bits at the bottom."""
    image = np.full((HEIGHT, WIDTH, 3), 90, np.uint8)
    image[:12, :12] = (255, 0, 0)
    for bit in range(8):
        image[24:40, 8 * bit : 8 * bit + 8] = 255 if number >> bit & 1 else 0
    return image


def number_of(image: Image) -> int:
    bits = image[28:36].reshape(8, 8, 8, 3).mean(axis=(0, 2, 3)) > 128
    return int((bits * 2 ** np.arange(8)).sum())


def write_video(path: Path, codec: str = "mp4v", frames: int = FRAMES, fps: float = FPS) -> Path:
    writer = cv2.VideoWriter(
        str(path), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*codec), fps, (WIDTH, HEIGHT)
    )
    assert writer.isOpened()
    for number in range(frames):
        writer.write(np.ascontiguousarray(frame(number)[..., ::-1]))
    writer.release()
    return path


def one_person(number: int, image: Image) -> FramePoses:
    drawn = image.copy()
    drawn[-8:, -8:] = (0, 0, 255)
    return FramePoses([{"image_id": number, "seen": number_of(image)}], drawn)


def nothing(done: int, total: int) -> None:
    pass


def process(
    path: Path,
    find: Callable[[int, Image], FramePoses] = one_person,
    progress: Callable[[int, int], None] = nothing,
) -> tuple[VideoPoses, list[dict[str, Any]]]:
    """Runs it; returns what was done and the list."""
    out = path.parent / "out"
    done = find_poses(open_video(path), out / "list.json", out / "drawn.mp4", find, progress)
    return done, json.loads((out / "list.json").read_text())


def drawn_frames(folder: Path) -> list[Image]:
    return [image for _, image in open_video(folder / "out" / "drawn.mp4").frames()]


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mp4", "mp4v"),
        ("a.mov", "mp4v"),
        ("a.avi", "MJPG"),
        ("a.mkv", "mp4v"),
        ("a.avi", "FFV1"),
    ],
)
def test_frames_are_listed_and_drawn_in_order(name: str, codec: str, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    path = write_video(tmp_path / name, codec)
    done, rows = process(path, progress=lambda n, total: steps.append((n, total)))
    assert done == VideoPoses(FRAMES, FRAMES, is_stopped=False, is_cut_off=False)
    assert (
        [row["image_id"] for row in rows] == [row["seen"] for row in rows] == list(range(FRAMES))
    )
    np.testing.assert_allclose([row["time_s"] for row in rows], np.arange(FRAMES) / FPS, atol=1e-6)
    assert [number_of(image) for image in drawn_frames(tmp_path)] == list(range(FRAMES))
    last = drawn_frames(tmp_path)[-1]
    assert last.shape == (HEIGHT, WIDTH, 3)
    assert last[4, 4, 0] > 200 > 100 > last[4, 4, 2]  # red stays red
    assert last[-3, -3, 2] > 200 > 100 > last[-3, -3, 0]
    assert open_video(tmp_path / "out" / "drawn.mp4").fps == FPS
    assert steps[-1] == (FRAMES, FRAMES)
    assert [n for n, total in steps if n == total] == [FRAMES]
    assert sorted(os.listdir(tmp_path / "out")) == ["drawn.mp4", "list.json"]


def test_frames_without_people_are_drawn_and_not_listed(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4")
    done, rows = process(path, lambda number, image: FramePoses([], image))
    assert (done.num_frames, done.num_poses, rows) == (FRAMES, 0, [])
    assert len(drawn_frames(tmp_path)) == FRAMES


def rotated(content: bytes) -> bytes:
    """The MP4 with the display matrix of a phone that was held upright: a quarter turn."""
    edited = bytearray(content)
    matrix = content.index(b"tkhd") + 44
    one = 1 << 16
    edited[matrix : matrix + 36] = struct.pack(
        ">9i", 0, one, 0, -one, 0, 0, HEIGHT * one, 0, 1 << 30
    )
    return bytes(edited)


def test_frames_are_turned_upright(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4")
    path.write_bytes(rotated(path.read_bytes()))
    video = open_video(path)
    assert video.size == (WIDTH, HEIGHT)
    _, image = next(video.frames())
    assert image.shape == (WIDTH, HEIGHT, 3)
    assert image[4, -4, 0] > 200 and image[4, 4, 0] < 100
    process(path, lambda number, image: FramePoses([], image))
    assert drawn_frames(tmp_path)[0].shape == (WIDTH, HEIGHT, 3)


def boxes(content: bytes) -> dict[bytes, tuple[int, int]]:
    """Start and length of the MP4's outer boxes."""
    found, start = {}, 0
    while start < len(content):
        length, name = struct.unpack(">I4s", content[start : start + 8])
        found[name] = (start, length)
        start += length
    return found


def with_index_first(content: bytes) -> bytes:
    """The MP4 as it is streamed: its index stands before its frames."""
    start, length = boxes(content)[b"moov"]
    index = bytearray(content[start:])
    table = index.index(b"stco") + 12
    (count,) = struct.unpack(">I", index[table - 4 : table])
    for place in range(table, table + 4 * count, 4):
        (offset,) = struct.unpack(">I", index[place : place + 4])
        index[place : place + 4] = struct.pack(">I", offset + length)
    head = boxes(content)[b"ftyp"][1]
    return content[:head] + bytes(index) + content[head:start]


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp4", "mp4v"), ("a.avi", "MJPG"), ("a.mkv", "mp4v")]
)
def test_frames_before_the_cut_are_kept_and_the_cut_is_stated(
    name: str, codec: str, tmp_path: Path
) -> None:
    path = write_video(tmp_path / name, codec)
    content = path.read_bytes()
    if name == "a.mp4":
        content = with_index_first(content)
        path.write_bytes(content)
        assert not process(path)[0].is_cut_off
    path.write_bytes(content[: len(content) * 3 // 4])
    done, rows = process(path)
    assert done.is_cut_off and 1 < done.num_frames < FRAMES
    assert [row["seen"] for row in rows] == list(range(done.num_frames))
    assert len(drawn_frames(tmp_path)) == done.num_frames


def test_frames_that_an_edit_hides_are_no_cut(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4")
    content = bytearray(path.read_bytes())
    entry = content.index(b"elst") + 12
    (duration,) = struct.unpack(">I", content[entry : entry + 4])
    content[entry : entry + 4] = struct.pack(">I", duration // 2)
    path.write_bytes(content)
    done, _ = process(path)
    assert done == VideoPoses(FRAMES // 2, FRAMES // 2, is_stopped=False, is_cut_off=False)
    assert open_video(path).num_frames == FRAMES


def test_ctrl_c_keeps_the_frames_that_are_done(tmp_path: Path) -> None:
    def interrupted(number: int, image: Image) -> FramePoses:
        if number == 7:
            raise KeyboardInterrupt
        return one_person(number, image)

    done, rows = process(write_video(tmp_path / "a.mp4"), interrupted)
    assert done == VideoPoses(7, 7, is_stopped=True, is_cut_off=False)
    assert [row["image_id"] for row in rows] == list(range(7))
    assert len(drawn_frames(tmp_path)) == 7


def test_error_in_a_frame_leaves_no_file(tmp_path: Path) -> None:
    def broken(number: int, image: Image) -> FramePoses:
        if number == 3:
            raise InputError("the export is broken")
        return one_person(number, image)

    with pytest.raises(InputError, match="the export is broken"):
        process(write_video(tmp_path / "a.mp4"), broken)
    assert list((tmp_path / "out").iterdir()) == []


def test_files_that_are_no_video_are_refused(tmp_path: Path) -> None:
    no_frame = (
        "--video must be a video that OpenCV can decode, got .*, of which it decodes no frame"
    )
    contents = {"text.mp4": b"no video" * 99, "empty.mp4": b"", "cut.mp4": b""}
    whole = write_video(tmp_path / "a.mp4").read_bytes()
    contents["cut.mp4"] = whole[: len(whole) // 2]  # without the index at its end
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=no_frame):
            open_video(tmp_path / name)
    for name in ("a.png", "a.jpg"):
        cv2.imwrite(str(tmp_path / name), frame(0))
        with pytest.raises(InputError, match=rf"got the image .*{name}; give images without"):
            open_video(tmp_path / name)
    for path in (tmp_path, tmp_path / "gone.mp4"):
        with pytest.raises(InputError, match="--video must be a file, got"):
            open_video(path)


def test_video_of_one_frame_is_no_image(tmp_path: Path) -> None:
    done, rows = process(write_video(tmp_path / "a.mp4", frames=1))
    assert (done.num_frames, len(rows), done.is_cut_off) == (1, 1, False)


@pytest.mark.parametrize("stated", [0.0, math.nan, 1000.0, -1.0])
def test_frame_rate_is_measured_if_the_file_states_none(stated: float) -> None:
    times = [0.0, 0.04, 0.08, 0.12, 0.16]
    assert video_module._frame_rate(stated, times) == pytest.approx(25)
    assert video_module._frame_rate(stated, [0.0]) == 30
    assert video_module._frame_rate(stated, [0.0, 0.0, 0.0]) == 30
    assert video_module._frame_rate(29.97, times) == 29.97


class Capture:
    """A capture whose file states nothing about its frames, or other times than by their rate."""

    def __init__(self, times_ms: list[float]) -> None:
        self.times_ms = times_ms
        self.place = -1

    def get(self, key: int) -> float:
        return self.times_ms[self.place] if key == cv2.CAP_PROP_POS_MSEC else -9.2e18

    def read(self) -> tuple[bool, Image | None]:
        self.place += 1
        is_read = self.place < len(self.times_ms)
        return is_read, frame(self.place) if is_read else None

    def grab(self) -> bool:
        return self.read()[0]

    def release(self) -> None:
        pass


@pytest.mark.parametrize(
    ("times_ms", "expected"),
    [
        ([0, 10, 90, 100], [0, 0.01, 0.09, 0.1]),
        ([0, 0, 0, 0], [0, 1 / 30, 2 / 30, 3 / 30]),
        ([-9.2e18, math.nan, 50, 50], [0, 1 / 30, 0.05, 0.05 + 1 / 30]),
    ],
    ids=["varying", "none", "some"],
)
def test_times_are_those_of_the_frames_and_rise(
    times_ms: list[float], expected: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "stream.webm"
    path.touch()
    monkeypatch.setattr(video_module, "_capture", lambda path: Capture(times_ms))
    video = open_video(path)
    assert video.num_frames is None
    steady = video_module.Video(path, 30.0, video.size, None)
    assert [time for time, _ in steady.frames()] == pytest.approx(expected)


def test_full_bar_comes_only_at_the_end_if_the_number_of_frames_is_unknown(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4")
    video = open_video(path)
    steps: list[tuple[int, int]] = []
    for count in (None, 5, FRAMES + 9):
        steps.clear()
        guess = video_module.Video(path, FPS, video.size, count)
        out = tmp_path / "out"
        find_poses(
            guess, out / "l.json", out / "d.mp4", one_person, lambda n, m: steps.append((n, m))
        )
        assert [n for n, total in steps if n == total] == [FRAMES]


def test_frame_of_another_size_is_scaled_to_the_first(tmp_path: Path) -> None:
    def grown(number: int, image: Image) -> FramePoses:
        size = (2 * WIDTH, 2 * HEIGHT) if number == 4 else (WIDTH, HEIGHT)
        return FramePoses([], np.asarray(cv2.resize(image, size), np.uint8))

    process(write_video(tmp_path / "a.mp4"), grown)
    assert [number_of(image) for image in drawn_frames(tmp_path)] == list(range(FRAMES))


def test_video_that_is_not_whole_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a full disk, which OpenCV does not report."""
    path = write_video(tmp_path / "a.mp4")
    real = cv2.VideoWriter

    class Forgetful:
        """Loses frames."""

        def __init__(self, *arguments: Any) -> None:
            self.writer = real(*arguments)
            self.isOpened, self.release = self.writer.isOpened, self.writer.release

        def write(self, image: Image) -> None:
            if number_of(image) % 5:
                self.writer.write(image)

        fourcc = real.fourcc

    monkeypatch.setattr(cv2, "VideoWriter", Forgetful)
    with pytest.raises(InputError, match=r"drawn\.mp4 must get 20 frames, got \d+; free space"):
        process(path)
    assert list((tmp_path / "out").iterdir()) == []


def test_memory_does_not_grow_with_the_number_of_frames(tmp_path: Path) -> None:
    def many(number: int, image: Image) -> FramePoses:
        return FramePoses([{"keypoints": [float(number)] * 500}] * 5, image)

    peaks = []
    for count in (20, 120):
        video = open_video(write_video(tmp_path / f"{count}.avi", "MJPG", frames=count))
        tracemalloc.start()
        find_poses(video, tmp_path / "list.json", tmp_path / "drawn.mp4", many, nothing)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]
