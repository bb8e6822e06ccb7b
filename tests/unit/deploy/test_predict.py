"""An export on images: its people, its joints in the image, its files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from models.build import build_codec, build_refined_pose, load_export
from models.codecs.codec import CODECS
from models.skeleton import SKELETONS, Skeleton
from study.cache.crop_store import CropStore
from study.data.crops import apply_affine, invert_affine, read_image
from study.data.people import People
from study.deploy.drawing import COLORS, draw_poses
from study.deploy.estimation import estimate
from study.predict import main
from study.training.evaluation import predict_crops
from study.workers import Workers

ROOT = Path(__file__).resolve().parents[3]
SIZE = (96, 64)
HEIGHT, WIDTH = 90, 120


@pytest.fixture(scope="module", autouse=True)
def known_five(five: Skeleton) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SKELETONS, "five", five)
        yield


def write_export(
    folder: Path,
    codec_name: str = "dark",
    flip_test: bool = False,
    faults: dict[str, Any] | None = None,
) -> Path:
    """An export of random weights whose student predicts other places for each crop."""
    info: dict[str, Any] = {
        "skeleton": "five",
        "input_size": list(SIZE),
        "student": {"name": "mobile_net", "size": "tiny"},
        "codec": {"name": codec_name, "sigma": 2.0},
        "flip_test": flip_test,
        "refiner": {"levels": 2, "depth": 1, "width": 8, "dropout": 0.0, "gate": True},
    }
    torch.manual_seed(0)
    estimator = build_refined_pose(info)
    assert isinstance(estimator.student.final_layer, nn.Conv2d)
    nn.init.normal_(estimator.student.final_layer.weight, std=0.3)
    assert estimator.refiner is not None
    for parameter in estimator.refiner.parameters():  # zeros would move nothing
        nn.init.normal_(parameter, std=0.1)
    folder.mkdir()
    save_file(estimator.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(info | (faults or {})))
    return folder


@pytest.fixture(scope="module")
def export(known_five: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_export(tmp_path_factory.mktemp("made") / "export")


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """Three images of noise, 000000000007.png, 000000000011.png and 000000000023.png."""
    rng = np.random.RandomState(0)
    folder = tmp_path / "images"
    folder.mkdir()
    paths = [folder / f"{number:012d}.png" for number in (7, 11, 23)]
    for path in paths:
        cv2.imwrite(str(path), rng.randint(0, 256, (HEIGHT, WIDTH, 3), np.uint8))
    return paths


def run(export: Path, tmp_path: Path, *arguments: str | Path) -> list[dict[str, Any]]:
    """Runs the script; returns ``keypoints.json``."""
    out = tmp_path / "out"
    main([str(export), *map(str, arguments), "--out", str(out)])
    rows = json.loads((out / "keypoints.json").read_text())
    assert isinstance(rows, list)
    return rows


def refusal(export: Path, tmp_path: Path, *arguments: str | Path) -> str:
    """The error that the script ends with; no results are written."""
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as raised:
        main([str(export), *map(str, arguments), "--out", str(out)])
    text = str(raised.value.code)
    assert text.startswith("error: ") and not (out / "keypoints.json").exists()
    return text


def annotation(number: int, image: int, bbox: object, **changes: object) -> dict[str, object]:
    return {"id": number, "image_id": image, "category_id": 1, "bbox": bbox, **changes}


def write_boxes(tmp_path: Path, content: object) -> Path:
    file = tmp_path / "boxes.json"
    file.write_text(json.dumps(content))
    return file


class Spot(nn.Module):
    """Sees every joint in the middle of the crop's one bright spot, joint k being k px lower."""

    def __init__(self, joints: int, codec: str) -> None:
        super().__init__()
        self.codec = build_codec(codec, SIZE, 2.0)
        self.offsets = nn.Parameter(torch.stack([torch.zeros(joints), torch.arange(joints)], 1))

    def forward(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        shine = (crops.mean(1) - crops.mean(1).amin((1, 2), keepdim=True)) ** 4  # (B, h, w)
        shine = shine / shine.sum((1, 2), keepdim=True)
        rows, columns = torch.arange(SIZE[0]), torch.arange(SIZE[1])
        middle = torch.stack([(shine.sum(1) * columns).sum(1), (shine.sum(2) * rows).sum(1)], 1)
        return middle[:, None] + self.offsets, torch.ones(len(crops), len(self.offsets))


@pytest.mark.parametrize(("codec", "zoom_down"), [("dark", 1.0), ("udp", 95 / 96)])
def test_joints_in_the_image_match_those_in_the_crop(
    codec: str, zoom_down: float, five: Skeleton
) -> None:
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    cv2.circle(image, (70, 30), 4, (255, 255, 255), -1)
    # Crops of 64 px for 1.25 times the box's width, or 96 for its height: zoom 1.28, 0.96, 1.7.
    boxes = np.array([[50.0, 10.0, 40.0, 60.0], [45.5, 0.0, 30.0, 80.0], [60.0, 20.0, 30.0, 30.0]])
    zooms = zoom_down * np.array([64 / 40 / 1.25, 96 / 80 / 1.25, 64 / 30 / 1.25])
    keypoints, scores = estimate(Spot(5, codec), five, image, boxes)  # type: ignore[arg-type]
    expected = np.array([70, 30]) + np.arange(5)[None, :, None] * [0, 1] / zooms[:, None, None]
    np.testing.assert_allclose(keypoints, expected, atol=0.25)
    assert scores.shape == (3, 5)


@pytest.mark.parametrize("flip_test", [False, True])
@pytest.mark.parametrize("codec", ["msra", "simcc"])
def test_poses_equal_those_of_the_studys_evaluation(
    codec: str,
    flip_test: bool,
    tmp_path: Path,
    five: Skeleton,
    five_people: People,
    five_store: CropStore,
    workers: Workers,
) -> None:
    """Cut straight from the image, and cut from the crops that a study stores."""
    estimator = load_export(write_export(tmp_path / "export", codec, flip_test))[0]
    assert estimator.codec == CODECS[codec](SIZE, (24, 16))
    assert (estimator.flip_order is not None) == flip_test
    stored, scores = predict_crops(estimator, five_store, five, workers)
    expected = apply_affine(stored, invert_affine(five_store.image_to_stored))
    for person, path in enumerate(five_people.image_paths):
        image = read_image(path)
        found, sure = estimate(estimator, five, image, five_people.boxes[person : person + 1])
        np.testing.assert_allclose(found[0], expected[person], atol=0.01)
        np.testing.assert_allclose(sure[0], scores[person], atol=1e-5)


def test_whole_image_is_one_person_without_boxes(
    export: Path, images: list[Path], tmp_path: Path
) -> None:
    before = [image.read_bytes() for image in images]
    rows = run(export, tmp_path, images[0].parent)
    assert [row["image_id"] for row in rows] == [7, 11, 23]
    assert [row["file_name"] for row in rows] == [image.name for image in images]
    assert {(len(row["keypoints"]), row["category_id"]) for row in rows} == {(15, 1)}
    drawn = [tmp_path / "out" / f"{image.stem}.jpg" for image in images]
    assert sorted((tmp_path / "out").iterdir()) == [*drawn, tmp_path / "out" / "keypoints.json"]
    assert {read_image(path).shape for path in drawn} == {(HEIGHT, WIDTH, 3)}
    assert [image.read_bytes() for image in images] == before


def test_images_without_unique_numbers_are_counted(
    export: Path, images: list[Path], tmp_path: Path
) -> None:
    one, other = images[0].with_name("one.png"), images[0].with_name("two7.png")
    images[1].rename(one)
    images[2].rename(other)
    assert [r["image_id"] for r in run(export, tmp_path, images[0], one)] == [1, 2]
    assert [r["image_id"] for r in run(export, tmp_path, images[0], other)] == [1, 2]


def test_boxes_of_an_annotation_file_are_found_by_file_name(
    export: Path, images: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = {
        "images": [
            {"id": 900 + place, "file_name": f"val/{image.name}"}
            for place, image in enumerate(images)
        ],
        "categories": [{"id": 4, "name": "person"}, {"id": 1, "name": "dog"}],
        "annotations": [
            annotation(1, 901, [5, 5, 40, 60], category_id=4),
            annotation(2, 901, [60, 5, 40, 60], category_id=4),
            annotation(3, 901, [0, 0, 99, 60], category_id=4, iscrowd=1),
            annotation(4, 901, [0, 0, 99, 60]),
            annotation(5, 902, [5, 5, 40, 60], category_id=4),
            annotation(6, 555, None),
        ],
    }
    rows = run(export, tmp_path, *images, "--boxes", write_boxes(tmp_path, content))
    assert [(row["image_id"], row["file_name"]) for row in rows] == [
        (901, images[1].name),
        (901, images[1].name),
        (902, images[2].name),
    ]
    # An image without boxes is left out, and named.
    assert not (tmp_path / "out" / f"{images[0].stem}.jpg").exists()
    warning = capsys.readouterr().err
    assert f"has no person's box for {images[0].name}; left out" in warning


def test_boxes_of_a_detector_are_found_by_number_and_their_scores_count(
    export: Path, images: list[Path], tmp_path: Path
) -> None:
    box = [5.5, 5, 40, 60]
    detections = [
        {"image_id": 11, "category_id": 1, "bbox": box, "score": 0.5},
        {"image_id": 11, "category_id": 1, "bbox": box, "score": 1.0},
        {"image_id": 11, "category_id": 2, "bbox": box, "score": 1.0},
    ]
    rows = run(export, tmp_path, images[1], "--boxes", write_boxes(tmp_path, detections))
    assert [row["image_id"] for row in rows] == [11, 11]
    assert rows[0]["score"] == pytest.approx(rows[1]["score"] / 2)
    assert rows[0]["keypoints"] == rows[1]["keypoints"]


def test_box_beyond_the_image_is_left_out_with_a_warning(
    export: Path, images: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    boxes = write_boxes(
        tmp_path, [annotation(1, 7, [WIDTH + 5, 5, 40, 60]), annotation(2, 7, [5, 5, 40, 60])]
    )
    assert len(run(export, tmp_path, images[0], "--boxes", boxes)) == 1
    assert "boxes outside the image left out: 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            [annotation(3, 7, [1, 2, 3])],
            "entry 0 (from 0), annotation 3: bbox must be four finite numbers",
        ),
        ([{"image_id": 7, "bbox": None}], "entry 0 (from 0): bbox must be four finite numbers"),
        (
            [annotation(3, 7, [1, 2, 3, 4], score="high")],
            "annotation 3: score must be a finite number, got 'high'",
        ),
        ([{"bbox": [1, 2, 3, 4]}], "entry 0 (from 0): image_id must be a whole number, got None"),
        ([annotation(3, 8, [1, 2, 3, 4])], "a person's box for at least one of the 1 images"),
        ({"images": []}, "must be a COCO annotation file or a list"),
        (
            {
                "images": [{"id": i, "file_name": "000000000007.png"} for i in (1, 2)],
                "annotations": [],
            },
            "000000000007.png for the ids [1, 2]",
        ),
    ],
)
def test_broken_or_unmatched_boxes_are_refused(
    export: Path, images: list[Path], tmp_path: Path, content: object, expected: str
) -> None:
    boxes = write_boxes(tmp_path, content)
    error = refusal(export, tmp_path, images[0], "--boxes", boxes)
    assert expected in error and str(boxes) in error


def test_file_of_boxes_must_exist_and_be_json(
    export: Path, images: list[Path], tmp_path: Path
) -> None:
    nowhere = tmp_path / "nowhere.json"
    assert "No such file" in refusal(export, tmp_path, images[0], "--boxes", nowhere)
    assert "--boxes must be a COCO annotation file" in refusal(
        export, tmp_path, images[0], "--boxes", images[1]
    )


def test_image_that_is_missing_is_named(export: Path, images: list[Path], tmp_path: Path) -> None:
    missing = tmp_path / "missing.jpg"
    assert f"an image must exist, got {missing}" in refusal(export, tmp_path, missing)
    (tmp_path / "nothing").mkdir()
    assert "got none in" in refusal(export, tmp_path, tmp_path / "nothing")


def test_image_named_twice_is_drawn_once(export: Path, images: list[Path], tmp_path: Path) -> None:
    assert len(run(export, tmp_path, images[0], images[0].parent, images[0])) == 3


def test_inputs_are_not_overwritten(export: Path, images: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    inside = out / "7.jpg"
    cv2.imwrite(str(inside), np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    content = inside.read_bytes()
    assert "must not be overwritten" in refusal(export, tmp_path, images[0], inside)
    link = tmp_path / "7.jpg"
    link.symlink_to(inside)
    assert "must not be overwritten" in refusal(export, tmp_path, link)
    assert inside.read_bytes() == content and list(out.iterdir()) == [inside]
    boxes = write_boxes(tmp_path, [annotation(1, 7, [5, 5, 40, 60])])
    boxes = boxes.rename(out / "keypoints.json")
    with pytest.raises(SystemExit, match="must not be overwritten"):
        main([str(export), str(images[0]), "--boxes", str(boxes), "--out", str(out)])
    assert json.loads(boxes.read_text())[0]["id"] == 1


def test_two_images_of_one_name_are_refused(
    export: Path, images: list[Path], tmp_path: Path
) -> None:
    other = tmp_path / images[0].name
    other.write_bytes(images[0].read_bytes())
    assert "different names" in refusal(export, tmp_path, images[0], other)


def test_folder_that_is_no_export_is_refused(
    export: Path, images: list[Path], tmp_path: Path
) -> None:
    expected = "must be an export, with config.json and model.safetensors that match"
    assert expected in refusal(tmp_path / "nowhere", tmp_path, images[0])
    assert expected in refusal(images[0].parent, tmp_path, images[0])
    faults = {"skeleton": "centaur", "codec": None, "refiner": None, "input_size": [64]}
    for key, value in faults.items():
        broken = write_export(tmp_path / key, faults={key: value})
        assert expected in refusal(broken, tmp_path, images[0])
    (broken / "model.safetensors").write_bytes(b"no weights")
    (broken / "config.json").write_bytes((export / "config.json").read_bytes())
    assert expected in refusal(broken, tmp_path, images[0])


def test_device_that_is_not_there_is_refused(
    export: Path, images: list[Path], tmp_path: Path
) -> None:
    error = refusal(export, tmp_path, images[0], "--device", "abacus")
    assert "cpu or cuda, got abacus" in error


def poses_drawn(
    five: Skeleton, score: float, shift: float = 0.0, box_score: float = 1.0
) -> NDArray[np.uint8]:
    """One person on gray: head in the middle above, left to the right in the image."""
    image = np.full((HEIGHT, WIDTH, 3), 128, np.uint8)
    keypoints = np.array([[[60, 10], [100, 40], [20, 40], [90, 80], [30, 80]]]) + shift
    boxes = np.array([[20.0, 10.0, 80.0, 70.0]])
    scores = np.full((1, 5), score)
    drawn = draw_poses(image, keypoints, scores, boxes, np.array([box_score]), five)
    assert (image == 128).all()
    return drawn


def test_sides_have_different_colors(five: Skeleton) -> None:
    drawn = poses_drawn(five, 1.0)
    assert tuple(drawn[40, 100]) == COLORS["left"]
    assert tuple(drawn[40, 20]) == COLORS["right"]
    assert tuple(drawn[10, 60]) == COLORS["middle"]
    # Half way along limbs: hand to foot on a side, head to hand across.
    np.testing.assert_allclose(drawn[60, 95], COLORS["left"], atol=40)
    np.testing.assert_allclose(drawn[25, 80], COLORS["middle"], atol=40)
    assert (drawn[60, 60] == 128).all()


def test_unsure_joints_and_people_are_drawn_faintly(five: Skeleton) -> None:
    def change(score: float, box_score: float) -> int:
        drawn = poses_drawn(five, score, box_score=box_score)
        return int(np.abs(drawn.astype(int) - 128).sum())

    assert 0 < change(0.0, 1.0) < change(0.3, 1.0) / 2 < change(1.0, 1.0) / 3
    assert change(1.0, 1.0) == change(9.0, 1.0)
    assert change(1.0, 0.0) == 0 < change(1.0, 0.1) < change(1.0, 1.0) / 5


def test_joints_far_outside_are_not_drawn(five: Skeleton) -> None:
    assert (poses_drawn(five, 1.0, shift=1e5) == 128).all()
    assert (poses_drawn(five, 1.0, shift=-50.0) != 128).any()


@pytest.mark.slow
def test_export_and_predict_load_no_ray() -> None:
    code = "import study.export, study.predict, sys; assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
