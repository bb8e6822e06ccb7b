"""predict.py --poses: another method's JSON in, the same entries with improved joints out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from models.build import build_refined_pose, load_export
from models.skeleton import COCO, CROWDPOSE, shared_joints
from study.data.annotations import clip_boxes
from study.data.crops import apply_affine, image_to_crop_affine, invert_affine, read_image, warp
from study.predict import main

HEIGHT, WIDTH = 90, 120
SIZE = (96, 64)
BOX = [20.0, 10.0, 60.0, 70.0]


def write_export(
    folder: Path,
    *,
    moves: bool = False,
    trusts_student: bool = False,
    names_pairs: bool = False,
    is_refined: bool = True,
) -> Path:
    """A tiny CrowdPose export of random weights.

    Its refiner moves joints or does not; it takes the student's peaks before the given joints or
    does not; it names left and right as the student's maps have them or does not.
    """
    info: dict[str, Any] = {
        "skeleton": "crowdpose",
        "input_size": list(SIZE),
        "student": {"name": "mobile_net", "size": "tiny"},
        "codec": {"name": "dark", "sigma": 2.0},
        "flip_test": False,
        "refiner": {"levels": 2, "depth": 1, "width": 8, "dropout": 0.0, "gate": True}
        | {"candidates": 2, "mirror_pairs": names_pairs},
    }
    info["refiner"] = info["refiner"] if is_refined else None
    torch.manual_seed(0)
    estimator = build_refined_pose(info)
    assert isinstance(estimator.student.final_layer, nn.Conv2d)
    nn.init.normal_(estimator.student.final_layer.weight, std=0.3)
    assert estimator.student.final_layer.bias is not None
    nn.init.constant_(estimator.student.final_layer.bias, 3.0)  # above the threshold
    if moves:
        assert estimator.refiner is not None
        for parameter in estimator.refiner.parameters():
            nn.init.normal_(parameter, std=0.1)
    if trusts_student:
        assert estimator.refiner is not None and estimator.refiner.chooser is not None
        with torch.no_grad():
            estimator.refiner.chooser.first[0] = 100
            estimator.refiner.chooser.head.weight[0, 0] = -100
    if names_pairs:
        assert estimator.refiner is not None and estimator.refiner.mirror_pairs is not None
        nn.init.constant_(estimator.refiner.mirror_pairs.trust, 1e7)
    folder.mkdir()
    save_file(estimator.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(info))
    return folder


@pytest.fixture(scope="module")
def still(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_export(tmp_path_factory.mktemp("still") / "export")


@pytest.fixture(scope="module")
def moving(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_export(tmp_path_factory.mktemp("moving") / "export", moves=True)


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    rng = np.random.RandomState(0)
    paths = [tmp_path / f"{number:012d}.png" for number in (7, 11)]
    for path in paths:
        cv2.imwrite(str(path), rng.randint(0, 256, (HEIGHT, WIDTH, 3), np.uint8))
    return paths


def entry(image: int = 7, joints: int = 14, seed: int = 0, **changes: Any) -> dict[str, Any]:
    rng = np.random.RandomState(seed)
    pose = rng.uniform((25, 15), (75, 75), (joints, 2)).round(2)
    keypoints = np.c_[pose, rng.uniform(0.3, 1, joints).round(3)].ravel().tolist()
    return {"image_id": image, "category_id": 1, "keypoints": keypoints, "bbox": BOX, **changes}


def run(export: Path, tmp_path: Path, given: Any, images: list[Path]) -> list[dict[str, Any]]:
    file, out = tmp_path / "given.json", tmp_path / "out"
    file.write_text(given if isinstance(given, str) else json.dumps(given))
    main([str(export), *map(str, images), "--poses", str(file), "--out", str(out)])
    found = json.loads((out / "keypoints.json").read_text())
    assert isinstance(found, list)
    return found


def rows(found: dict[str, Any]) -> np.ndarray:
    return np.reshape(found["keypoints"], (-1, 3))


def test_untrained_refiner_returns_the_file_unchanged(
    still: Path, tmp_path: Path, images: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    given = [
        entry(11, seed=1, id=5, score=0.25, extra={"a": [1]}),
        entry(7, seed=2),
        entry(99, seed=3, id=8),  # of no image here
        entry(11, seed=4, score=0.75),
    ]
    found = run(still, tmp_path, given, images)
    for before, after in zip(given, found, strict=True):
        assert {**before, "keypoints": 0} == {**after, "keypoints": 0}
        np.testing.assert_allclose(rows(after), rows(before), atol=1e-4)
        assert np.array_equal(rows(after)[:, 2], rows(before)[:, 2])
    assert "1 entries are of other images; kept as they are" in capsys.readouterr().err
    assert (tmp_path / "out" / f"{7:012d}.jpg").is_file()


def test_joints_move_as_the_refiner_moves_them_in_the_crop(
    moving: Path, tmp_path: Path, images: list[Path]
) -> None:
    given = entry()
    (found,) = run(moving, tmp_path, [given], images[:1])
    estimator, _ = load_export(moving)
    box = clip_boxes(np.array([BOX]), np.array([[HEIGHT, WIDTH]]))
    affine = image_to_crop_affine(box, estimator.codec.frame)
    crop = warp(read_image(images[0]), affine[0], SIZE)
    start = torch.from_numpy(apply_affine(rows(given)[None, :, :2], affine)).float()
    scores = torch.from_numpy(rows(given)[None, :, 2]).float()
    with torch.inference_mode():
        pose, _ = estimator(torch.from_numpy(crop).permute(2, 0, 1)[None].float(), (start, scores))
    expected = apply_affine(pose.double().numpy(), invert_affine(affine))[0]
    np.testing.assert_allclose(rows(found)[:, :2], expected, atol=1e-3)
    assert np.abs(expected - rows(given)[:, :2]).max() > 1


@pytest.mark.parametrize("names_pairs", [True, False])
def test_export_that_resolves_swaps_undoes_them(
    names_pairs: bool, tmp_path: Path, images: list[Path]
) -> None:
    export = write_export(tmp_path / "export", names_pairs=names_pairs)
    given = entry()
    pose, order = rows(given), list(CROWDPOSE.flip_order)
    swapped = {**given, "keypoints": np.c_[pose[order, :2], pose[:, 2]].ravel().tolist()}
    found = [rows(person) for person in run(export, tmp_path, [given, swapped], images[:1])]
    is_same = np.abs(found[0][:, :2] - found[1][:, :2]).max(axis=1) < 1e-3
    unpaired = np.array(order) == np.arange(CROWDPOSE.num_joints)
    assert np.array_equal(is_same, unpaired | names_pairs)
    assert all(np.array_equal(person[:, 2], pose[:, 2]) for person in found)


def test_missing_joints_start_from_the_students_own(
    still: Path, tmp_path: Path, images: list[Path]
) -> None:
    given = entry()
    given["keypoints"][3 * 2 + 2] = 0
    given["keypoints"][3 * 5 : 3 * 5 + 3] = [0, 0, 0.9]
    (found,) = run(still, tmp_path, [given], images[:1])
    boxes = tmp_path / "boxes.json"
    boxes.write_text(json.dumps([{"image_id": 7, "category_id": 1, "bbox": BOX, "score": 1}]))
    out = tmp_path / "own"
    main([str(still), str(images[0]), "--boxes", str(boxes), "--out", str(out)])
    own = rows(json.loads((out / "keypoints.json").read_text())[0])
    for joint in range(14):
        expected = own if joint in (2, 5) else rows(given)
        np.testing.assert_allclose(rows(found)[joint], expected[joint], atol=1e-4)


def test_given_joint_moves_to_the_students_peak_and_keeps_its_score(
    still: Path, tmp_path: Path, images: list[Path]
) -> None:
    trusting = write_export(tmp_path / "trusting", trusts_student=True)
    keypoints = rows(entry())
    keypoints[1:12:2] = 0  # no right joint, where its left one might go instead
    given = entry(keypoints=keypoints.ravel().tolist())
    (found,) = run(trusting, tmp_path, [given], images[:1])
    (own,) = run(still, tmp_path, [entry(keypoints=[0.0] * 42)], images[:1])
    is_given = keypoints[:, 2] > 0
    found_rows, own_rows = rows(found)[is_given], rows(own)[is_given]
    np.testing.assert_allclose(found_rows[:, :2], own_rows[:, :2], atol=1e-4)
    assert np.abs(found_rows[:, :2] - keypoints[is_given, :2]).max() > 1
    assert np.array_equal(found_rows[:, 2], keypoints[is_given, 2])


def test_cocos_visibility_counts_as_sure_and_is_kept(
    moving: Path, tmp_path: Path, images: list[Path]
) -> None:
    seen, sure = entry(), entry()
    seen["keypoints"][2::3], sure["keypoints"][2::3] = [2] * 14, [1.0] * 14
    first, second = run(moving, tmp_path, [seen, sure], images[:1])
    assert rows(first)[:, 2].tolist() == [2] * 14
    np.testing.assert_allclose(rows(first)[:, :2], rows(second)[:, :2], atol=1e-4)


def test_without_bbox_the_crop_follows_the_given_joints(
    moving: Path, tmp_path: Path, images: list[Path]
) -> None:
    given = entry()
    given["keypoints"][0:3] = [0.0, 0.0, 0.0]  # not given, so not in the box
    joints = rows(given)[1:, :2]
    low, high = joints.min(0), joints.max(0)
    boxed = {**given, "bbox": [*low.tolist(), *(high - low).tolist()]}
    plain = {key: value for key, value in given.items() if key != "bbox"}
    first, second, other = run(moving, tmp_path, [plain, boxed, given], images[:1])
    np.testing.assert_allclose(rows(first), rows(second), atol=1e-4)
    assert "bbox" not in first
    assert np.abs(rows(other) - rows(second)).max() > 0.1


def test_poses_of_17_joints_give_12_to_an_export_of_14(
    still: Path, tmp_path: Path, images: list[Path]
) -> None:
    given, nothing = entry(joints=17), entry(joints=17)
    nothing["keypoints"] = [0.0] * 51
    found, own = run(still, tmp_path, [given, nothing], images[:1])
    pairs = shared_joints(CROWDPOSE, COCO)
    assert len(pairs) == 12
    expected = rows(own).copy()  # the student's head and neck
    for ours, theirs in pairs:
        expected[ours] = rows(given)[theirs]
    np.testing.assert_allclose(rows(found), expected, atol=1e-4)


def test_annotation_file_names_its_images(still: Path, tmp_path: Path, images: list[Path]) -> None:
    entries = [{"id": 3, "file_name": images[1].name}]
    given = [entry(3, id=1), entry(7, id=2)]
    found = run(still, tmp_path, {"images": entries, "annotations": given}, images[1:])
    assert [one["id"] for one in found] == [1, 2]
    assert (tmp_path / "out" / f"{images[1].stem}.jpg").is_file()


def annotated(images: list[Path], *entries: dict[str, Any], **categories: Any) -> dict[str, Any]:
    """An annotation file of the first image, with joints in each category by its name."""
    listed = [
        {"id": number, "name": name, "keypoints": joints}
        for number, (name, joints) in enumerate(categories.items(), 1)
    ]
    names = [{"id": 7, "file_name": images[0].name}]
    return {"images": names, "categories": listed, "annotations": list(entries)}


def test_joints_are_read_in_the_order_that_the_file_names(
    still: Path, tmp_path: Path, images: list[Path]
) -> None:
    order = np.random.RandomState(5).permutation(14)
    spelled = [CROWDPOSE.joints[joint].replace("_", " ").title() for joint in order]
    keypoints = rows(entry())[order].ravel().tolist()
    given = annotated(images, entry(keypoints=keypoints), person=spelled)
    (found,) = run(still, tmp_path, given, images[:1])
    np.testing.assert_allclose(rows(found), rows(entry()), atol=1e-4)
    # More joints than ours, which no known skeleton has.
    given = annotated(images, entry(keypoints=[1, 2, 1, *keypoints]), person=["tail", *spelled])
    (found,) = run(still, tmp_path, given, images[:1])
    np.testing.assert_allclose(rows(found), rows(entry()), atol=1e-4)


def test_entries_of_categories_without_joints_stay_as_they_are(
    still: Path, tmp_path: Path, images: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    ball = {"image_id": 7, "category_id": 2, "bbox": BOX}
    given = annotated(images, ball, entry(), person=list(CROWDPOSE.joints), ball=[])
    found = run(still, tmp_path, given, images[:1])
    assert found[0] == ball and len(found[1]["keypoints"]) == 42
    assert "1 entries are of categories without joints" in capsys.readouterr().err


def test_joints_of_other_names_or_of_several_categories_are_refused(
    still: Path, tmp_path: Path, images: list[Path]
) -> None:
    numbers = [str(number) for number in range(14)]
    with pytest.raises(SystemExit, match=r"joints of the export, left_shoulder.*got 0, 1, 2"):
        run(still, tmp_path, annotated(images, entry(), person=numbers), images[:1])
    given = annotated(images, entry(), person=list(CROWDPOSE.joints[:5]))
    with pytest.raises(SystemExit, match=r"keypoints must be 15 .*that the file's category names"):
        run(still, tmp_path, given, images[:1])
    joints = {"person": list(CROWDPOSE.joints), "rider": list(COCO.joints)}
    given = annotated(images, entry(), entry(category_id=2), **joints)
    with pytest.raises(SystemExit, match="poses of one category with joints, got several"):
        run(still, tmp_path, given, images[:1])
    given = annotated(images, entry(), person=[1, 2])
    with pytest.raises(SystemExit, match=r"keypoints must be a list of joints' names, got \[1, 2"):
        run(still, tmp_path, given, images[:1])


SHORT = entry()["keypoints"][:-1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("[{", r"--poses must be a COCO annotation file or a list.*\(Expecting property name"),
        (
            {"images": []},
            "must be a COCO annotation file or a list.*got {'images': .*change --poses",
        ),
        ([], "with at least one entry, got an empty list in .*change --poses"),
        ([{"image_id": 7}], r"entry 0 \(from 0\): .*42 \(crowdpose\) or 51 \(coco\) numbers"),
        (
            [entry(), entry(keypoints=SHORT)],
            r"entry 1 \(from 0\): keypoints must be 42 finite.* got 41",
        ),
        ([entry(), entry(joints=17)], r"entry 1 \(from 0\): keypoints must be 42 finite.* got 51"),
        (
            [entry(), entry(keypoints=[1.5, None] * 21)],
            r"entry 1 \(from 0\): keypoints must be 42 finite.* got None among them",
        ),
        (
            [entry(), entry(keypoints=[float("nan")] * 42)],
            r"entry 1 \(from 0\): keypoints must be 42 finite",
        ),
        (
            [entry(), entry(image_id="7")],
            r"entry 1 \(from 0\): image_id must be a whole number, got '7'",
        ),
        ([entry(), 5], r"entry 1 \(from 0\): must be an object, got 5"),
        (
            [entry(), entry(bbox=[1, 2, 3])],
            r"entry 1 \(from 0\): bbox must be four.*got \[1, 2, 3\]",
        ),
        (
            [entry(), entry(score="high")],
            r"entry 1 \(from 0\): score must be a finite number, got 'high'",
        ),
        (
            [entry(), entry(bbox=[200, 5, 9, 9])],
            r"entry 1 \(from 0\): must have a bbox.*120 x 90 pixels",
        ),
        (
            [entry(bbox=None, keypoints=[0.0] * 42)],
            r"entry 0 \(from 0\): must have a bbox, or joints",
        ),
        ([entry(8)], "must have a pose in at least one of the 2 images"),
        (
            [entry(keypoints=[0.25, 0.5, 0.9] * 14)],
            r"must have joints in pixels, got fractions of the image, like \[0\.25, 0\.5\]",
        ),
    ],
)
def test_broken_file_is_refused_with_file_entry_and_rule(
    given: Any, message: str, still: Path, tmp_path: Path, images: list[Path]
) -> None:
    with pytest.raises(SystemExit, match=message) as raised:
        run(still, tmp_path, given, images)
    assert "given.json" in str(raised.value)
    assert not (tmp_path / "out/keypoints.json").exists()


def test_export_without_refiner_and_overwritten_file_are_refused(
    still: Path, tmp_path: Path, images: list[Path]
) -> None:
    plain = write_export(tmp_path / "plain", is_refined=False)
    with pytest.raises(SystemExit, match=r"needs an export with a refiner.*refine\.epochs"):
        run(plain, tmp_path, [entry()], images)
    file = tmp_path / "keypoints.json"
    file.write_text(json.dumps([entry()]))
    with pytest.raises(SystemExit, match="inputs must not be overwritten"):
        main([str(still), str(images[0]), "--poses", str(file), "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"--poses must be a COCO .*gone\.json \(.*No such file"):
        main([str(still), str(images[0]), "--poses", str(tmp_path / "gone.json")])
