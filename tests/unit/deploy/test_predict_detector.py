"""``predict.py`` with a detector, on images and on videos."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from safetensors.torch import save_file

from models.build import build_refined_pose
from models.skeleton import SKELETONS, Skeleton
from study.deploy import estimation, video
from study.predict import main

HEIGHT, WIDTH = 60, 100
BOXES = [[10.0, 20.0, 30.0, 35.0], [60.0, 5.0, 25.0, 50.0]]
SCORES = [0.9, 0.4]
FRAMES = 6


@pytest.fixture(scope="module")
def export(five: Skeleton, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    info: dict[str, Any] = {
        "skeleton": "five",
        "input_size": [96, 64],
        "student": {"name": "mobile_net", "size": "tiny"},
        "codec": {"name": "dark", "sigma": 2.0},
        "flip_test": False,
        "refiner": None,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SKELETONS, "five", five)
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp("made") / "export"
        folder.mkdir()
        save_file(build_refined_pose(info).state_dict(), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(info))
        yield folder


def write_detector(folder: Path, boxes: list[list[float]]) -> Path:
    """A YOLOX of mmdeploy that sees these boxes, xywh, in every image of 60 x 100 pixels."""
    zoom = 2.0  # to its input of 128 x 200
    corners = np.array([[x, y, x + w, y + h] for x, y, w, h in boxes]).reshape(-1, 4) * zoom
    dets = np.concatenate([corners, np.array(SCORES)[: len(boxes), None]], axis=1)
    values = {"boxes": dets[None].astype(np.float32), "classes": np.zeros((1, len(boxes)), int)}
    graph = helper.make_graph(
        [
            helper.make_node("Identity", ["boxes"], ["dets"]),
            helper.make_node("Identity", ["classes"], ["labels"]),
        ],
        "multi_level_conv_cls",
        [helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, [1, 3, 128, 200])],
        [
            helper.make_tensor_value_info("dets", onnx.TensorProto.FLOAT, [1, len(boxes), 5]),
            helper.make_tensor_value_info("labels", onnx.TensorProto.INT64, [1, len(boxes)]),
        ],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, folder / "detector.onnx")
    return folder / "detector.onnx"


@pytest.fixture
def detector(tmp_path: Path) -> Path:
    return write_detector(tmp_path, BOXES)


def noise(seed: int) -> NDArray[np.uint8]:
    return np.random.RandomState(seed).randint(0, 256, (HEIGHT, WIDTH, 3), np.uint8)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in (4, 9):
        cv2.imwrite(str(folder / f"{number}.png"), noise(number))
    return folder


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = tmp_path / "clip.avi"
    code = cv2.VideoWriter.fourcc(*"FFV1")  # without loss
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, code, 5, (WIDTH, HEIGHT))
    for number in range(FRAMES):
        writer.write(noise(number))
    writer.release()
    return path


def run(export: Path, tmp_path: Path, *arguments: str | Path) -> list[dict[str, Any]]:
    """Runs the script; returns ``keypoints.json``."""
    out = tmp_path / "out"
    main([str(export), *map(str, arguments), "--out", str(out)])
    rows = json.loads((out / "keypoints.json").read_text())
    assert isinstance(rows, list)
    return rows


def refusal(export: Path, *arguments: str | Path) -> str:
    with pytest.raises(SystemExit) as raised:
        main([str(export), *map(str, arguments)])
    return str(raised.value.code)


def test_boxes_of_the_detector_give_the_poses_of_the_same_boxes_in_a_file(
    export: Path, images: Path, detector: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(export, tmp_path, images, "--detector", detector)
    assert "class 0 is the person" in capsys.readouterr().out
    drawn = (tmp_path / "out" / "4.jpg").read_bytes()
    boxes = [
        {"image_id": number, "category_id": 1, "bbox": box, "score": score}
        for number in (4, 9)
        for box, score in zip(BOXES, SCORES, strict=True)
    ]
    file = tmp_path / "boxes.json"
    file.write_text(json.dumps(boxes))
    expected = run(export, tmp_path, images, "--boxes", file)
    assert [row["image_id"] for row in found] == [4, 4, 9, 9]
    for row, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(row.pop("keypoints"), other.pop("keypoints"), atol=1e-3)
        assert row.pop("score") == pytest.approx(other.pop("score"))
        assert row == other
    assert len(drawn) > 1000


def test_image_without_a_person_is_drawn_and_named(
    export: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    detector = write_detector(tmp_path, [])
    assert run(export, tmp_path, images, "--detector", detector) == []
    assert (tmp_path / "out" / "9.jpg").exists()
    warning = capsys.readouterr().err
    assert "the detector finds no person in 2 of 2 images (4.png, 9.png)" in warning


def test_frames_of_a_video_get_the_poses_of_their_images(
    export: Path, clip: Path, detector: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run(export, tmp_path, "--video", clip, "--detector", detector)
    assert f"{2 * FRAMES} poses in {FRAMES} frames" in capsys.readouterr().out
    assert [row["image_id"] for row in rows] == [n for n in range(FRAMES) for _ in BOXES]
    assert {row["file_name"] for row in rows} == {"clip.avi"}
    np.testing.assert_allclose([row["time_s"] for row in rows[::2]], np.arange(FRAMES) / 5)
    folder = tmp_path / "frames"
    folder.mkdir()
    cv2.imwrite(str(folder / "3.png"), noise(3))
    expected = run(export, tmp_path, folder, "--detector", detector)
    for row, other in zip(rows[6:8], expected, strict=True):
        # a lossless video still rounds its colors
        np.testing.assert_allclose(row["keypoints"], other["keypoints"], atol=1.0)
    drawn = video.open_video(tmp_path / "out" / "clip.mp4")
    assert (drawn.size, drawn.fps, drawn.num_frames) == ((HEIGHT, WIDTH), 5, FRAMES)


def test_frame_without_a_detector_is_one_person(
    export: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run(export, tmp_path, "--video", clip)
    assert [row["image_id"] for row in rows] == list(range(FRAMES))
    # The network was not trained, so it is sure of no joint.
    warning = capsys.readouterr().err
    assert f"in {FRAMES} of {FRAMES} frames of {clip} the pose is unsure or small" in warning


def test_cut_off_video_is_named_and_its_frames_are_written(
    export: Path, clip: Path, tmp_path: Path
) -> None:
    content = clip.read_bytes()
    clip.write_bytes(content[: len(content) // 2])
    error = refusal(export, "--video", clip, "--out", tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "keypoints.json").read_text())
    assert 0 < len(rows) < FRAMES
    assert f"clip.avi is cut off or damaged, only {len(rows)} frames could be read" in error
    assert video.open_video(tmp_path / "out" / "clip.mp4").num_frames == len(rows)


def test_ctrl_c_names_the_frames_that_are_written(
    export: Path,
    clip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real, calls = estimation.estimate, []

    def interrupted(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(estimation, "estimate", interrupted)
    error = refusal(export, "--video", clip, "--out", tmp_path / "out")
    assert "interrupted; the first 3 frames of" in error
    assert "3 poses in the first 3 frames, drawn and listed in" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "out" / "keypoints.json").read_text())) == 3


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "either IMAGES or --video must be given, got neither"),
        (["IMAGES", "--video", "CLIP"], "either IMAGES or --video must be given, got both"),
        (["--video", "CLIP", "--boxes", "b.json"], "each frame as one person, got --boxes"),
        (["--video", "CLIP", "--poses", "b.json"], "each frame as one person, got --poses"),
        (["--video", "IMAGES"], "--video must be a file"),
        (["IMAGES", "--detector-class", "1"], "need --detector, got none"),
        (["IMAGES", "--detector-threshold", "0.5"], "need --detector, got none"),
        (
            ["IMAGES", "--detector", "DETECTOR", "--detector-threshold", "30"],
            "--detector-threshold must be 0 to 1, got 30",
        ),
        (["IMAGES", "--detector", "CLIP"], "--detector must be an ONNX file"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    arguments: list[str], expected: str, export: Path, images: Path, clip: Path, detector: Path
) -> None:
    paths = {"IMAGES": images, "CLIP": clip, "DETECTOR": detector}
    assert expected in refusal(export, *(paths.get(one, one) for one in arguments))


def test_video_is_not_overwritten(export: Path, clip: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    inside = out / "clip.mp4"
    inside.write_bytes(clip.read_bytes())
    assert "inputs must not be overwritten" in refusal(export, "--video", inside, "--out", out)
    assert inside.read_bytes() == clip.read_bytes()


def test_list_that_cannot_be_written_is_an_error(export: Path, clip: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "keypoints.json").mkdir(parents=True)
    error = refusal(export, "--video", clip, "--out", tmp_path / "out")
    assert "--out must be a folder to write to, got" in error and "directory" in error
