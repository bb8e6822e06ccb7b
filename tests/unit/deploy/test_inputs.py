"""Images and poses that a user gives, and the export's model card, as plain functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from models.skeleton import COCO, CROWDPOSE
from study.deploy.given_poses import GivenPoses
from study.deploy.inputs import GivenImage, find_images, number_of, read_given
from study.deploy.model_card import model_card
from study.deploy.outputs import check_targets, drawn_file
from study.deploy.person_boxes import whole_images
from study.errors import InputError

SCORES: dict[str, Any] = {"num_people": 3, "ap": 0.125, "ap50": None}


OUT = Path("nowhere/out")


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """A folder with two image files and a text file."""
    files = [tmp_path / "images" / name for name in ("000785.jpg", "b.PNG", "notes.txt")]
    files[0].parent.mkdir()
    for file in files:
        file.touch()
    return files[:2]


def given(path: Path) -> GivenImage:
    return GivenImage(path, path.name)


def paths(*arguments: Path, out: Path = OUT) -> list[Path]:
    """The images that are found, of which all folders can be listed."""
    found, problems = find_images(arguments, out)
    assert problems == {}
    return [image.path for image in found]


def test_images_of_files_and_folders_are_found_once(images: list[Path], tmp_path: Path) -> None:
    assert paths(images[1], images[0].parent) == [images[1], images[0]]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"must hold images \(\.jpg .*empty"):
        find_images([tmp_path / "empty"], OUT)
    with pytest.raises(InputError, match=r"must exist.*none\.jpg; correct its path"):
        find_images([tmp_path / "none.jpg"], OUT)


def test_sub_folders_are_searched_and_kept_in_the_names(
    images: list[Path], tmp_path: Path
) -> None:
    inner = tmp_path / "images/day 1/cam.jpg/000785.png"
    inner.parent.mkdir(parents=True)
    inner.touch()
    found, _ = find_images([tmp_path / "images"], OUT)
    assert [image.name for image in found] == ["000785.jpg", "b.PNG", "day 1/cam.jpg/000785.png"]
    drawn = [drawn_file(image, OUT).relative_to(OUT).as_posix() for image in found]
    assert drawn == ["000785.jpg", "b.jpg", "day 1/cam.jpg/000785.jpg"]
    check_targets(found, None, tmp_path / "out")


def test_hidden_files_and_the_folder_of_results_are_passed_over(
    images: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = images[0].parent
    for name in ("._b.jpg", ".trash/c.jpg", "__MACOSX/._000785.jpg", "poses/000785.jpg"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    assert paths(folder, out=folder / "poses") == images
    assert "passed over: 1 .txt" in capsys.readouterr().err
    assert paths(folder) == [*images, folder / "poses/000785.jpg"]
    (folder / "poses/keypoints.json").touch()  # of an earlier run
    assert paths(folder) == images
    assert f"{folder / 'poses'} holds results of predict.py" in capsys.readouterr().err
    assert paths(folder / "poses") == [folder / "poses/000785.jpg"]


def test_links_are_images_of_their_own_and_circles_end(images: list[Path], tmp_path: Path) -> None:
    folder = images[0].parent
    (folder / "again").symlink_to(folder)
    (folder / "c.jpg").symlink_to(images[0])
    (folder / "gone.jpg").symlink_to(tmp_path / "nowhere")
    assert paths(folder) == [*images, folder / "c.jpg", folder / "gone.jpg"]
    assert paths(folder / "gone.jpg") == [folder / "gone.jpg"]


def test_outputs_that_would_overwrite_are_refused(images: list[Path], tmp_path: Path) -> None:
    both = [given(image) for image in images]
    check_targets(both, tmp_path / "boxes.json", tmp_path / "out")
    with pytest.raises(InputError, match=r"--out .*images.*000785\.jpg"):
        check_targets(both, None, images[0].parent)
    other = given(tmp_path / "000785.png")
    with pytest.raises(InputError, match=rf"{images[0]} and {other.path}.*would both be drawn to"):
        check_targets([both[0], other], None, tmp_path / "out")


def test_an_image_has_the_number_of_its_name_or_its_place(images: list[Path]) -> None:
    assert [number_of(given(image)) for image in images] == [785, None]
    assert number_of(given(Path(f"{2**63 - 1}.jpg"))) == 2**63 - 1
    assert number_of(given(Path(f"{2**63}.jpg"))) is None  # too large for an id
    numbered = whole_images([given(images[0]), given(Path("7.jpg"))])
    assert [person.image_id for person in numbered.values()] == [785, 7]
    counted = whole_images([given(image) for image in images])
    assert [person.image_id for person in counted.values()] == [1, 2]
    assert all(person.boxes is None for person in numbered.values())


def test_16_bit_image_that_uses_few_of_its_bits_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = np.random.default_rng(0).integers(0, 4096, (8, 8, 3), dtype=np.uint16)
    for name, pixels in (("12-bit.png", noise), ("16-bit.png", noise * 16)):
        assert cv2.imwrite(str(tmp_path / name), pixels)
        read_given(given(tmp_path / name))
    (warning,) = capsys.readouterr().err.splitlines()
    assert "12-bit.png is almost black, its brightest value is 15 of 255; 16-bit" in warning


def test_given_joints_are_paired_by_name_and_their_scores_clipped() -> None:
    keypoints = np.zeros((17, 3))
    keypoints[COCO.joints.index("left_hip")] = 30, 40, 2
    keypoints[COCO.joints.index("nose")] = 10, 20, 1
    image = given(Path("1.jpg"))
    entry = {"image_id": 1, "keypoints": keypoints.ravel().tolist(), "score": 3.0}
    poses = GivenPoses(Path("poses.json"), [entry], {image: [0]}, theirs=COCO, ours=CROWDPOSE)
    (start,) = poses.starts(image)
    assert start[CROWDPOSE.joints.index("left_hip")].tolist() == [30, 40, 1]
    assert np.count_nonzero(start) == 3  # CrowdPose has no nose
    assert poses.scores(image).tolist() == [1]


def test_card_states_the_settings_the_figures_and_the_joints() -> None:
    info = {
        "source": {
            "study": "mine",
            "trial": 4,
            "stage": "refine",
            "epoch": 6,
            "data": "crowdpose",
            "data_fingerprint": "f00d",
            "versions": {"torch": "2.13.0"},
        },
        "student": {"name": "hrnet", "size": "tiny"},
        "refiner": {"levels": 3, "candidates": 2},
        "input_size": [96, 64],
        "joints": ["head", "neck"],
        "box_centre": [31.5, 47.5],
        "box_padding": 1.25,
        "crop_span": [64.0, 96.0],
        "flip_test": False,
        "pixel_mean": [123.0],
        "pixel_std": [58.0],
        "search": SCORES,
        "val": None,
    }
    card = model_card(info, {"refine.depth": 2}, 12345)
    assert "# mine, trial 4" in card and "12,345 parameters" in card
    assert "refined by IGP-GCN in 3 levels from one of 2 peaks a joint" in card
    assert "| scored on | people | AP |" in card and "| 3 | 12.5 |" in card
    assert "CrowdPose" in card and "51.2 wide and 76.8 high" in card
    assert "`refine.depth=2`" in card and "head, neck" in card and "torch 2.13.0" in card
