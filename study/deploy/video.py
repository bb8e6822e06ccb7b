"""Poses in a video: frames are read one by one, listed, and drawn into another video.

Nothing is kept of a frame that is done, so that a video may have any length.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from study.deploy.detector import Detector
from study.deploy.estimation import find_poses_of, load_estimator
from study.deploy.inputs import RESULTS, warn
from study.deploy.outputs import Outputs
from study.deploy.person_boxes import PersonBoxes
from study.errors import InputError
from study.storage.files import atomic_path, commit_file, is_full_disk, temp_path

CODEC = "mp4v"
"""MPEG-4 Part 2: every build of OpenCV has it."""
DEFAULT_FPS = 30.0
MAX_FPS = 250.0
"""Higher rates are a container's clock, not frames."""
PROBED_FRAMES = 60
SLACK_S = 1.0
"""A container's sound may be longer than its frames by this much."""
SLACK_FRAMES = 0.01
"""Share of frames that an AVI counts but does not have, because the recorder dropped them."""
MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide")
"""First boxes of MP4 and MOV files."""

Image = NDArray[np.uint8]
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Video:
    """A video that can be read."""

    path: Path
    fps: float
    """Frames per second; the mean if it varies."""
    size: tuple[int, int]
    """Height and width of a frame, pixels."""
    num_frames: int | None
    """According to the file, which may be wrong; None if it does not state it."""

    def frames(self) -> Iterator[tuple[float, Image]]:
        """Yield the time in seconds and the RGB image (H, W, 3) of each frame, turned upright."""
        capture = _capture(self.path)
        try:
            time_s = -1 / self.fps
            while True:
                is_read, image = capture.read()
                if not is_read:
                    return
                stated = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
                is_later = math.isfinite(stated) and stated > max(time_s, -1e-9)
                time_s = stated if is_later else time_s + 1 / self.fps
                yield max(time_s, 0.0), np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB))
        finally:
            capture.release()


class FramePoses(NamedTuple):
    """The poses of one frame."""

    rows: Rows
    """COCO results of its people."""
    drawn: Image
    """The frame with its poses."""


class VideoPoses(NamedTuple):
    """The outcome of a video."""

    num_frames: int
    num_poses: int
    is_stopped: bool
    """Ctrl-C ended it; the frames before are written."""
    is_cut_off: bool
    """The file ends before its last frame, or has damaged ones."""


def predict_video(
    export: Path,
    file: Path,
    detector: Detector | None,
    outputs: Outputs,
    device: torch.device,
    progress: Callable[[int, int], None],
) -> VideoPoses:
    """Estimate the poses in each frame of a video, draw them, and write them as COCO results.

    Args:
        detector: finds the people; None: each frame is one person.

    Raises:
        InputError: ``export`` is no export, or ``file`` no video, or it would be overwritten.
    """
    video, results = open_video(file), outputs.out / RESULTS
    drawn = outputs.out / f"{file.stem}.mp4"
    if file.resolve() in (drawn.resolve(), results.resolve()):
        raise InputError(
            f"inputs must not be overwritten, got --out {outputs.out}, which holds {file}; give "
            "another folder by --out"
        )
    estimator, skeleton = load_estimator(export, device)
    outputs.make_folder()
    doubtful: list[int] = []

    def find(number: int, image: Image) -> FramePoses:
        people = PersonBoxes(number, None, np.ones(1))
        if detector is not None:
            people = detector.people(image, number)
        poses = find_poses_of(people, image, file, estimator, skeleton)
        if poses.is_doubtful:
            doubtful.append(number)
        return FramePoses([{**row, "file_name": file.name} for row in poses.rows], poses.drawn)

    try:
        found = find_poses(video, results, drawn, find, progress)
    except OSError as error:
        if is_full_disk(error):
            raise
        raise InputError(
            f"--out must be a folder to write to, got {outputs.out} ({error})"
        ) from None
    if doubtful:
        warn(
            f"in {len(doubtful)} of {found.num_frames} frames of {file} the pose is unsure or "
            "small: without --detector each frame is taken as one person who fills it; give a "
            "person detector by --detector"
        )
    return found


def open_video(path: Path) -> Video:
    """Open a video.

    Raises:
        InputError: the file is no video, or none of its frames can be decoded.
    """
    if not path.is_file():
        raise InputError(f"--video must be a file, got {path}; correct its path")
    capture = _capture(path)
    try:
        fps, stated = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
        times: list[float] = []
        is_read, image = capture.read()
        while is_read and len(times) < PROBED_FRAMES:
            times.append(capture.get(cv2.CAP_PROP_POS_MSEC) / 1000)
            is_read = capture.grab()
    finally:
        capture.release()
    if not times:
        raise InputError(
            f"--video must be a video that OpenCV can decode, got {path}, of which it decodes no "
            "frame; convert it to MP4, or copy it again if it is only a part of a file"
        )
    if len(times) == 1 and cv2.haveImageReader(str(path)):
        raise InputError(
            f"--video must be a video, got the image {path}; give images without --video"
        )
    num_frames = int(stated) if math.isfinite(stated) and stated > 0 else None
    size = (image.shape[0], image.shape[1])
    return Video(path, _frame_rate(fps, times), size, num_frames)


def _capture(path: Path) -> Any:
    with _quiet():
        return cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence OpenCV, and FFmpeg's messages on single packets, which would tear a progress bar."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    level = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        yield
    finally:
        cv2.utils.logging.setLogLevel(level)


def _frame_rate(stated: float, times: list[float]) -> float:
    """Return the frames per second that the file states, or those of its first frames."""
    if math.isfinite(stated) and 0 < stated <= MAX_FPS:
        return stated
    seconds = times[-1] - times[0]
    measured = (len(times) - 1) / seconds if seconds > 0 else DEFAULT_FPS
    return measured if 0 < measured <= MAX_FPS else DEFAULT_FPS


def find_poses(
    video: Video,
    results: Path,
    drawn: Path,
    find: Callable[[int, Image], FramePoses],
    progress: Callable[[int, int], None],
) -> VideoPoses:
    """Find the poses of each frame, list them, and draw them into an MP4 of the same frame rate.

    Each row of the list gets the frame's time in seconds. Ctrl-C ends both files with the last
    whole frame.

    Args:
        results: the JSON file to write.
        drawn: the MP4 file to write.
        find: finds the poses of a frame by its number and its RGB image.
        progress: takes the number of frames done and in all.

    Raises:
        InputError: the video cannot be written.
    """
    num_frames = num_poses = 0
    end_s, is_stopped = 0.0, False
    with _json_list(results) as add, _mp4(drawn, video) as draw:
        try:
            for time_s, image in video.frames():
                found = find(num_frames, image)
                add([{**row, "time_s": round(time_s, 6)} for row in found.rows])
                draw(found.drawn)
                num_poses += len(found.rows)
                num_frames, end_s = num_frames + 1, time_s + 1 / video.fps
                progress(num_frames, max(video.num_frames or 0, num_frames + 1))
        except KeyboardInterrupt:
            is_stopped = True
    progress(num_frames, num_frames)
    is_cut_off = not is_stopped and _is_cut_off(video, num_frames, end_s)
    return VideoPoses(num_frames, num_poses, is_stopped, is_cut_off)


@contextmanager
def _json_list(file: Path) -> Iterator[Callable[[Rows], None]]:
    """Yield a function that appends rows to a JSON list; the file appears when the block ends."""
    with atomic_path(file) as temporary, temporary.open("w", encoding="utf-8") as text:
        separator = "[\n"

        def add(rows: Rows) -> None:
            nonlocal separator
            for row in rows:
                text.write(separator + json.dumps(row))
                separator = ",\n"

        yield add
        text.write("\n]\n" if separator != "[\n" else "[]\n")
        text.close()  # before it gets its name


@contextmanager
def _mp4(file: Path, video: Video) -> Iterator[Callable[[Image], None]]:
    """Yield a function that appends an RGB image; the file appears when the block ends.

    Raises:
        InputError: the video cannot be created, or is not whole.
    """
    height, width = video.size
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(f"{temp_path(file)}.mp4")  # OpenCV takes the format from the name
    count = 0
    try:
        code = cv2.VideoWriter.fourcc(*CODEC)
        with _quiet():
            writer = cv2.VideoWriter(
                str(temporary), cv2.CAP_FFMPEG, code, video.fps, (width, height)
            )
        if not writer.isOpened():
            raise InputError(
                f"--out must be a folder where OpenCV can write a video of {width} x {height} "
                f"pixels, got {file.parent}"
            )

        def draw(image: Image) -> None:
            nonlocal count
            if image.shape[:2] != video.size:  # OpenCV would skip the frame
                image = np.asarray(cv2.resize(image, (width, height)), np.uint8)
            writer.write(np.ascontiguousarray(image[..., ::-1]))
            count += 1

        yield draw
        writer.release()
        if count:
            _check_written(temporary, count, file)
            commit_file(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def _check_written(temporary: Path, count: int, file: Path) -> None:
    """Check that all frames are in the file, since OpenCV does not report a full disk.

    Raises:
        InputError: frames are missing.
    """
    capture = _capture(temporary)
    written = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if capture.isOpened() else 0
    capture.release()
    if written != count:
        raise InputError(
            f"{file} must get {count} frames, got {written}; free space on its disk, or give "
            "another folder by --out"
        )


def _is_cut_off(video: Video, num_frames: int, end_s: float) -> bool:
    """Return whether the file has fewer frames than it should.

    An MP4's count includes frames that an edit hides, so the file's own structure decides. Other
    formats estimate the count from the length, which the sound can extend.
    """
    with video.path.open("rb") as file:
        head = file.read(8)
    if head[4:] in MP4_BOXES:
        return _is_mp4_cut_off(video.path)
    if video.num_frames is None:
        return False
    if head[:4] == b"RIFF":
        return num_frames + 1 < video.num_frames * (1 - SLACK_FRAMES)
    return end_s + SLACK_S < video.num_frames / video.fps


def _is_mp4_cut_off(path: Path) -> bool:
    """Return whether a box of the file is longer than the file."""
    size, start = path.stat().st_size, 0
    with path.open("rb") as file:
        while start + 8 <= size:
            file.seek(start)
            length = int.from_bytes(file.read(4))
            if length == 1:  # the length follows the name, in 8 bytes
                file.seek(start + 8)
                length = int.from_bytes(file.read(8))
            if length == 0:  # to the end of the file
                return False
            if length < 8:
                return True
            start += length
    return start > size
