"""OKS and AP against the official evaluations and figures worked out by hand."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO as OfficialGroundTruth
from pycocotools.cocoeval import COCOeval

from models.skeleton import COCO, CROWDPOSE, Skeleton
from study.config.schema import Kind
from study.errors import InputError
from study.metrics import average_precision, oks, to_detections

FIVE = Skeleton(
    name="five",
    joints=("head", "left_shoulder", "right_shoulder", "left_hip", "right_hip"),
    edges=((0, 1), (0, 2), (1, 3), (2, 4)),
    flip_pairs=((1, 2), (3, 4)),
    oks_sigmas=(0.05, 0.08, 0.08, 0.1, 0.1),
    upper_body=(0, 1, 2),
)
MANY = Skeleton(
    name="many",
    joints=tuple(f"joint {number}" for number in range(133)),
    edges=(),
    flip_pairs=(),
    oks_sigmas=tuple(0.03 + 0.0005 * number for number in range(133)),
    upper_body=(),
)
OFFICIAL_NAMES = {
    "AP": "ap",
    "AP50": "ap50",
    "AP75": "ap75",
    "AR": "ar",
    "AR50": "ar50",
    "AR75": "ar75",
    "AP_medium_area": "ap_m",
    "AP_large_area": "ap_l",
    "AR_medium_area": "ar_m",
    "AR_large_area": "ar_l",
    "AP_easy": "ap_easy",
    "AP_medium": "ap_medium",
    "AP_hard": "ap_hard",
}
OFFICIAL_ORDER = ("ap", "ap50", "ap75", "ap_m", "ap_l", "ar", "ar50", "ar75", "ar_m", "ar_l")
GROUND_TRUTH = {
    "coco": "data/coco_tiny/annotations/person_keypoints_val2017.json",
    "crowdpose": "data/crowdpose_tiny/annotations/crowdpose_val.json",
}
Records = list[dict[str, Any]]


def load_detections(shared: Path, name: str) -> Records:
    path = shared / f"reference/evaluation/detections_{name}.json.gz"
    records: Records = json.loads(gzip.decompress(path.read_bytes()))
    return records


def made_up(folder: Path, skeleton: Skeleton, *, num_images: int = 12) -> tuple[Path, Records]:
    """Ground truth of two people an image, large and small, and detections partly off."""
    rng = np.random.RandomState(3)
    annotations: Records = []
    detections: Records = []
    for image_id in range(1, num_images + 1):
        for size in (60.0, 160.0):
            corner = rng.uniform(0, 200, 2)
            points = corner + rng.uniform(0, size, (skeleton.num_joints, 2))
            visibility = rng.randint(0, 3, skeleton.num_joints)
            visibility[0] = 2
            row = np.concatenate([points, visibility[:, None]], axis=1) * (visibility > 0)[:, None]
            annotations.append(
                {
                    "id": 1 + len(annotations),
                    "image_id": image_id,
                    "category_id": 1,
                    "bbox": [*corner.tolist(), size, size],
                    "area": size * size * 0.5,
                    "keypoints": row.ravel().tolist(),
                    "iscrowd": 0,
                    "num_keypoints": int((visibility > 0).sum()),
                }
            )
            shaken = points + rng.normal(0, rng.uniform(0, 0.1) * size, points.shape)
            row = np.concatenate([shaken, np.ones((len(points), 1))], axis=1)
            detections.append(
                {
                    "image_id": image_id,
                    "category_id": 1,
                    "keypoints": row.ravel().tolist(),
                    "score": round(rng.uniform(), 2),
                }
            )
    images = [
        {
            "id": i,
            "height": 400,
            "width": 400,
            "file_name": f"{i}.jpg",
            "crowdIndex": i / num_images,
        }
        for i in range(1, num_images + 1)
    ]
    categories = [{"id": 1, "name": "person"}]
    path = folder / "truth.json"
    document = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(document))
    return path, detections


def official_figures(path: Path, detections: Records, skeleton: Skeleton) -> dict[str, float]:
    truth = OfficialGroundTruth(str(path))
    evaluation = COCOeval(truth, truth.loadRes([dict(d) for d in detections]), "keypoints")
    evaluation.params.kpt_oks_sigmas = np.array(skeleton.oks_sigmas)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return dict(zip(OFFICIAL_ORDER, evaluation.stats.tolist(), strict=True))


@pytest.mark.parametrize("name", ["coco_tiny_val", "lspet_crowd_val", "crowdpose_val"])
def test_figures_equal_the_official_ones(shared: Path, name: str) -> None:
    expected = json.loads((shared / "reference/evaluation/expected_stats.json").read_text())[name]
    kind: Kind = "coco" if name.startswith("coco") else "crowdpose"
    skeleton = COCO if kind == "coco" else CROWDPOSE
    detections = load_detections(shared, name)
    figures = average_precision(shared / expected["ground_truth"], detections, skeleton, kind)
    official = {OFFICIAL_NAMES[key]: value for key, value in expected["stats"].items()}
    assert figures == pytest.approx(official, abs=1e-4)


def test_figures_on_coco_equal_pycocotools(shared: Path) -> None:
    path = shared / GROUND_TRUTH["coco"]
    detections = load_detections(shared, "coco_tiny_val")
    figures = average_precision(path, detections, COCO, "coco")
    assert figures == pytest.approx(official_figures(path, detections, COCO), abs=1e-12)


@pytest.mark.parametrize("skeleton", [FIVE, COCO, MANY], ids=lambda skeleton: skeleton.name)
def test_figures_on_made_up_people_equal_pycocotools(tmp_path: Path, skeleton: Skeleton) -> None:
    path, detections = made_up(tmp_path, skeleton)
    official = official_figures(path, detections, skeleton)
    assert 0.2 < official["ap"] < 0.8
    figures = average_precision(path, detections, skeleton, "coco")
    assert figures == pytest.approx(official, abs=1e-12)


@pytest.mark.parametrize("skeleton", [FIVE, MANY], ids=lambda skeleton: skeleton.name)
def test_crowd_figures_of_other_joints_are_those_of_the_groups(
    tmp_path: Path, skeleton: Skeleton
) -> None:
    path, detections = made_up(tmp_path, skeleton)
    figures = average_precision(path, detections, skeleton, "crowdpose")
    document = json.loads(path.read_text())
    for annotation in document["annotations"]:  # the area that the crowd evaluation uses
        annotation["area"] = 0.53 * annotation["bbox"][2] * annotation["bbox"][3]
    path.write_text(json.dumps(document))
    whole = official_figures(path, detections, skeleton)
    assert {key: figures[key] for key in ("ap", "ar75")} == pytest.approx(
        {key: whole[key] for key in ("ap", "ar75")}, abs=1e-12
    )
    easy = {image["id"] for image in document["images"] if image["crowdIndex"] < 0.2}
    assert easy == {1, 2}
    document["images"] = [image for image in document["images"] if image["id"] in easy]
    document["annotations"] = [a for a in document["annotations"] if a["image_id"] in easy]
    path.write_text(json.dumps(document))
    ours = [detection for detection in detections if detection["image_id"] in easy]
    official = official_figures(path, ours, skeleton)
    assert figures["ap_easy"] == pytest.approx(official["ap"], abs=1e-12)


@pytest.mark.parametrize("kind", ["coco", "crowdpose"])
def test_no_detections_score_zero_and_not_minus_one(tmp_path: Path, kind: Kind) -> None:
    path, _ = made_up(tmp_path, FIVE)
    figures = average_precision(path, [], FIVE, kind)
    assert set(figures.values()) == {0.0}


def test_figures_without_counted_people_are_nan(tmp_path: Path) -> None:
    path, detections = made_up(tmp_path, FIVE)
    document = json.loads(path.read_text())
    for annotation in document["annotations"]:
        annotation["area"] = 20000.0
    for image in document["images"]:
        image["crowdIndex"] = 0.5
    path.write_text(json.dumps(document))
    by_area = average_precision(path, detections, FIVE, "coco")
    assert np.isnan([by_area["ap_m"], by_area["ar_m"]]).all()
    assert by_area["ap_l"] > 0
    by_crowd = average_precision(path, detections, FIVE, "crowdpose")
    assert np.isnan([by_crowd["ap_easy"], by_crowd["ap_hard"]]).all()
    assert by_crowd["ap_medium"] == by_crowd["ap"] > 0


def test_crowd_groups_are_nan_if_an_image_has_no_crowd_index(tmp_path: Path) -> None:
    path, detections = made_up(tmp_path, FIVE)
    document = json.loads(path.read_text())
    del document["images"][3]["crowdIndex"]
    path.write_text(json.dumps(document))
    figures = average_precision(path, detections, FIVE, "crowdpose")
    assert np.isnan([figures[f"ap_{group}"] for group in ("easy", "medium", "hard")]).all()
    assert figures["ap"] > 0


def test_ground_truth_without_people_is_refused(tmp_path: Path) -> None:
    path, detections = made_up(tmp_path, FIVE)
    document = json.loads(path.read_text())
    for annotation in document["annotations"]:
        annotation["num_keypoints"] = 0
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"num_keypoints above 0 .*truth\.json"):
        average_precision(path, detections, FIVE, "coco")


def test_detections_of_an_unknown_image_are_refused(tmp_path: Path) -> None:
    path, detections = made_up(tmp_path, FIVE)
    detections[0]["image_id"] = 999
    with pytest.raises(InputError, match=r"image ids \[999\]"):
        average_precision(path, detections, FIVE, "coco")


def assert_same_figures(
    folder: Path, change: Callable[[dict[str, Any], Records], None], kind: Kind = "coco"
) -> None:
    """Check that a change of the ground truth and its detections changes no figure."""
    path, detections = made_up(folder, FIVE)
    expected = average_precision(path, detections, FIVE, kind)
    document = json.loads(path.read_text())
    change(document, detections)
    path.write_text(json.dumps(document))
    assert average_precision(path, detections, FIVE, kind) == expected


def test_ids_from_zero_and_other_category_numbers_change_no_figure(tmp_path: Path) -> None:
    def change(document: dict[str, Any], detections: Records) -> None:
        for number, annotation in enumerate(document["annotations"]):
            annotation.update(id=number, category_id=0)
        document["categories"] = [{"id": 0, "name": "person"}]

    assert_same_figures(tmp_path, change)


def test_neighboring_image_ids_above_two_to_the_53_change_no_figure(tmp_path: Path) -> None:
    def change(document: dict[str, Any], detections: Records) -> None:
        for image in document["images"]:
            image["id"] += 2**60
        for record in (*document["annotations"], *detections):
            record["image_id"] += 2**60

    assert_same_figures(tmp_path, change)


def test_annotation_without_its_image_changes_no_figure(tmp_path: Path) -> None:
    def change(document: dict[str, Any], detections: Records) -> None:
        document["annotations"].append({**document["annotations"][0], "image_id": 999})

    assert_same_figures(tmp_path, change)


def test_file_with_the_fewest_keys_is_evaluated_alike(tmp_path: Path) -> None:
    def change(document: dict[str, Any], detections: Records) -> None:
        for annotation in document["annotations"]:
            for key in ("area", "iscrowd", "num_keypoints", "category_id"):
                del annotation[key]
        document["annotations"].append({"id": 99, "image_id": 1})  # a person without labels
        del document["categories"]

    assert_same_figures(tmp_path, change, "crowdpose")


def test_evaluation_prints_nothing_and_leaves_its_input_unchanged(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    path, detections = made_up(tmp_path, FIVE)
    before = json.dumps(detections)
    caplog.set_level("DEBUG")
    first = average_precision(path, detections, FIVE, "crowdpose")
    assert json.dumps(detections) == before
    assert average_precision(path, detections, FIVE, "crowdpose") == first
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_rewritten_ground_truth_is_read_again(tmp_path: Path) -> None:
    path, detections = made_up(tmp_path, FIVE)
    assert average_precision(path, detections, FIVE, "coco")["ap"] > 0
    document = json.loads(path.read_text())
    for annotation in document["annotations"]:
        annotation["keypoints"] = [value + 1000 for value in annotation["keypoints"]]
    path.write_text(json.dumps(document))
    assert average_precision(path, detections, FIVE, "coco")["ap"] == 0


def test_perfect_poses_score_one(tmp_path: Path) -> None:
    path, _ = made_up(tmp_path, FIVE)
    annotations = json.loads(path.read_text())["annotations"]
    rows = np.array([a["keypoints"] for a in annotations]).reshape(-1, 5, 3)
    image_ids = np.array([a["image_id"] for a in annotations])
    ones = np.ones(len(rows))
    detections = to_detections(rows[:, :, :2], np.ones(rows.shape[:2]), image_ids, ones)
    figures = average_precision(path, detections, FIVE, "coco")
    assert figures["ap"] == figures["ar"] == pytest.approx(1)


def test_detection_score_is_box_score_times_mean_of_joint_scores_above_a_fifth() -> None:
    keypoints = np.arange(20.0).reshape(2, 5, 2)
    scores = np.array([[0.2, 0.4, 0.8, 0.1, 0.0], [0.2, 0.1, 0.0, -0.1, 0.0]])
    detections = to_detections(keypoints, scores, np.array([7, 9]), np.array([0.5, 1.0]))
    assert [d["score"] for d in detections] == pytest.approx([0.5 * 0.6, 0.0])
    assert [d["image_id"] for d in detections] == [7, 9]
    assert detections[0]["keypoints"][:6] == [0.0, 1.0, 0.2, 2.0, 3.0, 0.4]
    json.dumps(detections)


def test_no_poses_make_no_detections() -> None:
    empty = np.zeros(0)
    assert to_detections(np.zeros((0, 5, 2)), np.zeros((0, 5)), empty, empty) == []


def test_poses_that_are_not_finite_are_refused() -> None:
    scores = np.ones((2, 5))
    scores[1, 3] = np.nan
    with pytest.raises(ValueError, match=r"finite .* person 1 in image 9"):
        to_detections(np.zeros((2, 5, 2)), scores, np.array([7, 9]), np.ones(2))


def test_oks_of_every_pair_equals_the_official_one(shared: Path) -> None:
    pairs = json.loads((shared / "reference/evaluation/oks_pairs.json").read_text())
    for kind, skeleton in (("coco", COCO), ("crowdpose", CROWDPOSE)):
        truth = json.loads((shared / GROUND_TRUTH[kind]).read_text())["annotations"]
        by_id = {annotation["id"]: annotation for annotation in truth}
        name = "coco_tiny_val" if kind == "coco" else "crowdpose_val"
        detections = load_detections(shared, name)
        for case in pairs[kind]:
            people = [by_id[i] for i in case["gt_ids"]]
            poses = np.array([detections[i]["keypoints"] for i in case["det_index"]])
            rows = np.array([person["keypoints"] for person in people], float)
            rows = rows.reshape(len(people), -1, 3)
            boxes = np.array([person["bbox"] for person in people])
            areas = np.array([p.get("area", 0.53 * p["bbox"][2] * p["bbox"][3]) for p in people])
            poses = poses.reshape(len(poses), 1, -1, 3)[..., :2]
            found = oks(poses, rows[..., :2], rows[..., 2], areas, skeleton.oks_sigmas, boxes)
            np.testing.assert_allclose(found, case["oks"], atol=1e-9)


def test_oks_is_one_for_a_perfect_pose_and_zero_without_labels() -> None:
    pose = np.random.RandomState(0).uniform(0, 100, (5, 2))
    sigmas = FIVE.oks_sigmas
    assert oks(pose, pose, np.ones(5), np.array(900.0), sigmas) == 1
    assert oks(pose, pose, np.zeros(5), np.array(900.0), sigmas) == 0


def test_oks_of_one_joint_off_by_hand() -> None:
    truth = np.zeros((5, 2))
    pose = truth.copy()
    pose[0] = [3.0, 4.0]  # 5 px; 25 / (2 * (2 * 0.05) ** 2 * 1250) = 1
    found = oks(pose, truth, np.array([2, 1, 0, 0, 0]), np.array(1250.0), FIVE.oks_sigmas)
    assert found == pytest.approx((np.exp(-1) + 1) / 2)
