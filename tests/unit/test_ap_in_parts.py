"""AP by OKS threshold and by joint, against the official curves, pycocotools and by hand."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO as OfficialGroundTruth
from pycocotools.cocoeval import COCOeval

from models.skeleton import COCO, CROWDPOSE, Skeleton
from study import metrics
from study.config.schema import Kind
from study.metrics import ap_by_joint, ap_by_threshold, average_precision

TWO = Skeleton("two", ("head", "foot"), ((0, 1),), (), (0.1, 0.1), (0,))
SETS: dict[Kind, tuple[str, str, Skeleton]] = {
    "coco": ("coco_tiny_val", "data/coco_tiny/annotations/person_keypoints_val2017.json", COCO),
    "crowdpose": (
        "crowdpose_val",
        "data/crowdpose_tiny/annotations/crowdpose_val.json",
        CROWDPOSE,
    ),
}
Records = list[dict[str, Any]]


def detections_of(shared: Path, name: str) -> Records:
    path = shared / f"reference/evaluation/detections_{name}.json.gz"
    records: Records = json.loads(gzip.decompress(path.read_bytes()))
    return records


def test_ap_by_threshold_is_the_mean_of_the_official_curves(shared: Path) -> None:
    name, truth, skeleton = SETS["coco"]
    curves = np.load(shared / "reference/evaluation/pr_curves.npz")["coco_precision"]
    found = ap_by_threshold(shared / truth, detections_of(shared, name), skeleton, "coco")
    assert list(found) == pytest.approx(np.arange(0.5, 0.99, 0.05).tolist())
    assert list(found.values()) == pytest.approx(curves[:, :, 0].mean(axis=1), abs=1e-12)


@pytest.mark.parametrize("kind", ["coco", pytest.param("crowdpose", marks=pytest.mark.slow)])
def test_precision_and_recall_equal_the_official_ones_everywhere(shared: Path, kind: Kind) -> None:
    name, truth, skeleton = SETS[kind]
    official = np.load(shared / "reference/evaluation/pr_curves.npz")
    document = metrics._ground_truth(shared / truth, skeleton.num_joints, ())
    found = detections_of(shared, name)
    evaluation = metrics._evaluation(document, found, skeleton.oks_sigmas, kind)
    image_ids = [image["id"] for image in document["images"]]
    precision, recall = metrics._accumulate(evaluation, image_ids)
    areas = slice(None) if kind == "coco" else slice(1)  # CrowdPose has no figure by area
    expected = official[f"{kind}_precision"][:, :, areas]
    np.testing.assert_allclose(precision[:, :, areas], expected, atol=1e-12)
    np.testing.assert_allclose(recall[:, areas], official[f"{kind}_recall"][:, areas], atol=1e-12)


def test_part_of_the_images_scores_as_if_alone(shared: Path) -> None:
    """OKS are measured once and kept."""
    name, truth, skeleton = SETS["coco"]
    document = metrics._ground_truth(shared / truth, skeleton.num_joints, ())
    arguments = (document, detections_of(shared, name), skeleton.oks_sigmas, "coco")
    image_ids = [image["id"] for image in document["images"]]
    evaluation, alone = metrics._evaluation(*arguments), metrics._evaluation(*arguments)
    whole, _ = metrics._accumulate(evaluation, image_ids)
    part, _ = metrics._accumulate(evaluation, image_ids[::3])
    assert np.array_equal(part, metrics._accumulate(alone, image_ids[::3])[0])
    assert not np.array_equal(part, whole)


def test_mean_over_thresholds_is_ap(shared: Path) -> None:
    truth = shared / "data/lspet_crowd/annotations/lspet_crowd_val.json"
    found = detections_of(shared, "lspet_crowd_val")
    by_threshold = ap_by_threshold(truth, found, CROWDPOSE, "crowdpose")
    whole = average_precision(truth, found, CROWDPOSE, "crowdpose")
    assert np.mean(list(by_threshold.values())) == pytest.approx(whole["ap"], abs=1e-12)
    assert (by_threshold[0.5], by_threshold[0.75]) == (whole["ap50"], whole["ap75"])


def official_joint_ap(truth: Path, found: Records, place: int, folder: Path) -> float:
    """pycocotools on files that have this joint alone."""
    numbers = slice(3 * place, 3 * place + 3)
    document = json.loads(truth.read_text())
    for person in document["annotations"]:
        keypoints = person["keypoints"][numbers]
        person.update(keypoints=keypoints, num_keypoints=int(keypoints[2] > 0))
    (folder / "one.json").write_text(json.dumps(document))
    one = OfficialGroundTruth(str(folder / "one.json"))
    poses = [{**pose, "keypoints": pose["keypoints"][numbers]} for pose in found]
    evaluation = COCOeval(one, one.loadRes(poses), "keypoints")
    evaluation.params.kpt_oks_sigmas = np.array([COCO.oks_sigmas[place]])
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return float(evaluation.stats[0])


def test_ap_of_a_joint_equals_that_of_people_with_no_other_joint(
    shared: Path, tmp_path: Path
) -> None:
    name, truth, _ = SETS["coco"]
    found = detections_of(shared, name)
    by_joint = ap_by_joint(shared / truth, found, COCO, "coco")
    assert list(by_joint) == list(COCO.joints)
    for joint in ("nose", "left_wrist", "right_ankle"):
        place = COCO.joints.index(joint)
        official = official_joint_ap(shared / truth, found, place, tmp_path)
        assert 0.05 < official < 0.95
        assert by_joint[joint] == pytest.approx(official, abs=1e-12)


def people_of_two_joints(folder: Path, *keypoints: list[float]) -> Path:
    """Ground truth: people in one image, each in a box of 100 x 100 that begins 1000 further."""
    annotations = [
        {
            "id": i,
            "image_id": 1,
            "category_id": 1,
            "keypoints": row,
            "iscrowd": 0,
            "bbox": [1000 * i, 0, 100, 100],
            "area": 5000.0,
        }
        for i, row in enumerate(keypoints)
    ]
    images = [{"id": 1, "width": 9000, "height": 100, "file_name": "1.jpg"}]
    file = folder / "two.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": []}))
    return file


def pose(*keypoints: float, score: float = 0.9) -> dict[str, Any]:
    return {"image_id": 1, "category_id": 1, "keypoints": list(keypoints), "score": score}


def test_joint_is_evaluated_on_people_with_its_label(tmp_path: Path) -> None:
    truth = people_of_two_joints(tmp_path, [10, 10, 2, 10, 90, 2], [1010, 10, 2, 0, 0, 0])
    poses = [pose(10, 10, 1, 10, 90, 1), pose(1090, 90, 1, 1050, 50, 1, score=0.95)]
    found = ap_by_joint(truth, poses, TWO, "coco")
    # Heads: the surest is wrong, so precision is 1/2 up to a recall of 1/2. Feet: the second
    # person's is unlabeled, and the pose in that person's box is no false one.
    assert found == pytest.approx({"head": 0.5 * 51 / 101, "foot": 1.0}, abs=1e-9)


def test_joint_without_labels_is_nan(tmp_path: Path) -> None:
    truth = people_of_two_joints(tmp_path, [10, 10, 2, 0, 0, 0])
    found = ap_by_joint(truth, [pose(10, 10, 1, 10, 90, 1)], TWO, "crowdpose")
    assert found["head"] == pytest.approx(1) and math.isnan(found["foot"])


def test_no_poses_score_zero_at_every_joint_and_threshold(tmp_path: Path) -> None:
    truth = people_of_two_joints(tmp_path, [10, 10, 2, 10, 90, 1])
    assert ap_by_joint(truth, [], TWO, "coco") == {"head": 0.0, "foot": 0.0}
    assert set(ap_by_threshold(truth, [], TWO, "coco").values()) == {0.0}
