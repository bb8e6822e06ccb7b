"""Predictions in a file: read or refused, matched to people, stored unchanged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.skeleton import COCO, CROWDPOSE, Skeleton
from study.cache import predictions
from study.cache.crop_store import CropStore
from study.cache.predictions import NOBODY, START, Predictions
from study.data.crops import apply_affine, invert_affine
from study.data.people import People
from study.errors import InputError


def entries_of(people: People, confidence: float = 0.75) -> list[dict[str, Any]]:
    """Return a prediction for every person, with all joints within the person's box."""
    rng = np.random.RandomState(4)
    entries = []
    for row in range(len(people)):
        x, y, width, height = people.boxes[row]
        pose = rng.uniform((x, y), (x + width, y + height), (5, 2))
        pose[:2] = (x, y), (x + width, y + height)
        keypoints = np.c_[pose, np.full(5, confidence)].ravel().tolist()
        entries.append(
            {
                "image_id": int(people.image_ids[row]),
                "category_id": 1,
                "keypoints": keypoints,
                "score": 0.5 + row / 100,
            }
        )
    return entries


def read(entries: Any, folder: Path, skeleton: Skeleton) -> Predictions:
    file = folder / "poses.json"
    file.write_text(json.dumps(entries))
    return Predictions(file, skeleton)


def test_each_person_gets_the_prediction_on_its_box(
    five_people: People, five_store: CropStore, five: Skeleton, tmp_path: Path
) -> None:
    order = np.random.RandomState(1).permutation(13)
    entries = [entries_of(five_people)[place] for place in order]
    matched = read(entries, tmp_path, five).match(five_store)
    assert order[matched].tolist() == list(range(13))


def test_best_pair_is_matched_first_and_each_prediction_used_once(
    five_people: People, five_store: CropStore, five: Skeleton, tmp_path: Path
) -> None:
    first, second = np.flatnonzero(five_people.image_ids == 1)  # 25 px apart, 39 wide: IoU 0.22
    entries = entries_of(five_people)
    box = five_people.boxes[first]
    near = {**entries[first], "bbox": [box[0] + 4, *box[1:]], "score": 0.9}
    between = {**entries[first], "bbox": [box[0] + 10, *box[1:]], "score": 0.99}
    matched = read([between, near], tmp_path, five).match(five_store)
    # ``near`` fits the first best; ``between`` overlaps the second in 24 of 54 px
    assert matched[first] == 1 and matched[second] == 0
    alone = read([between], tmp_path, five).match(five_store)
    assert alone[first] == 0 and alone[second] == NOBODY


def test_higher_score_wins_between_equal_boxes(
    five_people: People, five_store: CropStore, five: Skeleton, tmp_path: Path
) -> None:
    entries = entries_of(five_people)[:1] * 2
    entries = [{**entries[0], "score": 0.2}, {**entries[0], "score": 0.3}]
    assert read(entries, tmp_path, five).match(five_store)[0] == 1


@pytest.mark.parametrize(("shift", "is_match"), [(20.9, True), (21.1, False)])
def test_prediction_with_iou_below_0_3_matches_no_person(
    shift: float,
    is_match: bool,
    five_people: People,
    five_store: CropStore,
    five: Skeleton,
    tmp_path: Path,
) -> None:
    (row,) = np.flatnonzero(five_people.image_ids == 3)  # alone in its image
    x, y, width, height = five_people.boxes[row]
    assert width == pytest.approx(39)
    entry = {**entries_of(five_people)[row], "bbox": [x + shift, y, width, height]}
    matched = read([entry], tmp_path, five).match(five_store)
    assert (matched[row] == 0) == is_match  # 18.1 / 59.9 = 0.302, 17.9 / 60.1 = 0.298


def test_unsure_joints_do_not_count_for_a_predictions_box(
    five_people: People, five_store: CropStore, five: Skeleton, tmp_path: Path
) -> None:
    entry = entries_of(five_people)[0]
    entry["keypoints"][12:15] = [1e4, 1e4, 0.2]  # far out, and no more than 0.2
    assert read([entry], tmp_path, five).match(five_store)[0] == 0
    unsure = {**entry, "keypoints": [*np.ravel([[3, 4, 0.1], [13, 24, 0]] * 3)[:15].tolist()]}
    assert read([unsure], tmp_path, five).boxes.tolist() == [
        [3, 4, 10, 20]
    ]  # then all joints count


def test_annotation_ids_of_the_file_decide_the_match(
    five_people: People, five_store: CropStore, five: Skeleton, tmp_path: Path
) -> None:
    entries = entries_of(five_people)
    swapped = [5, 4, 3]
    for place, row in enumerate(swapped):
        entries[place]["annotation_id"] = int(five_people.annotation_ids[row])
    entries[3]["annotation_id"] = 10**6  # a person outside of the training data
    matched = read(entries[:4], tmp_path, five).match(five_store)
    assert {row: matched[row] for row in swapped} == {5: 0, 4: 1, 3: 2}
    assert (np.delete(matched, swapped) == NOBODY).all()


def test_poses_are_stored_unchanged_and_other_joints_have_height_0(
    five_people: People, five_store: CropStore, five: Skeleton, tmp_path: Path
) -> None:
    entries = entries_of(five_people)[:2]
    entries[0]["keypoints"][5] = 0.0
    entries[0]["keypoints"][8] = 2.0  # COCO's flag for a visible joint
    given = read(entries, tmp_path, five)
    matched = np.full(13, NOBODY)
    matched[[6, 0]] = [0, 1]
    modes = given.modes(five_store, matched, 3, five)
    known = modes[:, :, 0, 2] > 0
    assert modes.shape == (13, 5, 3, 4)
    restored = apply_affine(
        modes[[6], :, 0, :2].astype(float), invert_affine(five_store.image_to_stored[[6]])
    )
    np.testing.assert_allclose(restored[0], given.keypoints_image[0], atol=1e-3)
    np.testing.assert_allclose(modes[6, :, 0, 2], [0.75, 0, 1, 0.75, 0.75])
    assert known[6].tolist() == [1, 0, 1, 1, 1] and known[0].tolist() == [1] * 5
    assert known.sum() == 9 and (modes[..., 1:, 2] == 0).all() and (modes[..., 3] == 1).all()


def test_predictions_of_coco_joints_fill_those_shared_with_crowdpose(
    five_people: People, five_store: CropStore, tmp_path: Path
) -> None:
    entry = entries_of(five_people)[0]
    entry["keypoints"] = np.ravel([[j, 10 * j, 0.5] for j in range(17)]).tolist()
    matched = np.where(np.arange(13) == 4, 0, NOBODY)
    modes = read([entry], tmp_path, COCO).modes(five_store, matched, 3, CROWDPOSE)
    known = modes[:, :, 0, 2] > 0
    assert known[4].tolist() == [1] * 12 + [0, 0] and known.sum() == 12
    knee = modes[4, CROWDPOSE.joints.index("left_knee"), 0, :2]
    restored = apply_affine(
        knee[None, None].astype(float), invert_affine(five_store.image_to_stored[[4]])
    )
    own = COCO.joints.index("left_knee")
    np.testing.assert_allclose(restored[0, 0], [own, 10 * own], atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": "7"}, r"entry 2 \(from 0\): image_id must be a whole number, got '7'"),
        (
            {"keypoints": [0.0] * 51},
            r"entry 2 \(from 0\): keypoints must be 15 .* \(.*five\), got 51",
        ),
        (
            {"keypoints": [0.0] * 14 + [float("nan")]},
            r"entry 2 \(from 0\): keypoints must be 15 finite",
        ),
        ({"keypoints": None}, r"entry 2 \(from 0\): keypoints must be 15 .* got None"),
        ({"score": "high"}, r"entry 2 \(from 0\): score must be a finite number, got 'high'"),
        (
            {"bbox": [1, 2, 3]},
            r"entry 2 \(from 0\): bbox must be four finite numbers.* got \[1, 2, 3\]",
        ),
        (
            {"annotation_id": 4},
            r"entry 0 \(from 0\): annotation_id must be a whole number .*all entries",
        ),
    ],
)
def test_faulty_entry_is_named_with_the_rule(
    change: dict[str, Any], message: str, five_people: People, five: Skeleton, tmp_path: Path
) -> None:
    entries = entries_of(five_people)[:4]
    entries[2].update(change)
    with pytest.raises(InputError, match=rf"poses\.json, {message}"):
        read(entries, tmp_path, five)


def test_duplicate_annotation_id_is_refused(
    five_people: People, five: Skeleton, tmp_path: Path
) -> None:
    entries = [{**entry, "annotation_id": 7} for entry in entries_of(five_people)[:2]]
    with pytest.raises(
        InputError, match=r"entry 1 \(from 0\): annotation_id .* no other entry .*got 7"
    ):
        read(entries, tmp_path, five)


def test_poses_to_start_from_must_share_a_joint(
    five: Skeleton, five_people: People, tmp_path: Path
) -> None:
    entries = [{**entry, "keypoints": [1.0] * 51} for entry in entries_of(five_people)]
    (tmp_path / "poses.json").write_text(json.dumps(entries))
    with pytest.raises(InputError, match=r"entries of 17 joints \(coco\).*those of five are 5"):
        Predictions(tmp_path / "poses.json", five, START)


def moved(entry: dict[str, Any], factor: Any = 1.0, offset: Any = (0, 0)) -> dict[str, Any]:
    """Return the entry with x and y times the factor, less the offset."""
    joints = np.reshape(entry["keypoints"], (-1, 3))
    joints[:, :2] = joints[:, :2] * factor - offset
    return {**entry, "keypoints": joints.ravel().tolist()}


@pytest.mark.parametrize("setting", ["teacher.init", START])
def test_fractions_of_the_image_are_refused_though_some_lie_beyond_it(
    setting: str, five_people: People, five: Skeleton, tmp_path: Path
) -> None:
    entries = [moved(entry, 1 / np.array([120, 100])) for entry in entries_of(five_people)]
    entries[3]["keypoints"][0] = 1.1
    (tmp_path / "poses.json").write_text(json.dumps(entries))
    with pytest.raises(InputError, match=r"must have joints in pixels, got fractions .* multiply"):
        Predictions(tmp_path / "poses.json", five, setting)


@pytest.mark.parametrize("key", ["bbox", "annotation_id"])
def test_joints_counted_from_elsewhere_are_refused(
    key: str, five_people: People, five_store: CropStore, five: Skeleton, tmp_path: Path
) -> None:
    values = {
        "bbox": five_people.boxes.tolist(),
        "annotation_id": five_store.annotation_ids.tolist(),
    }[key]
    right = [
        {**entry, key: value} for entry, value in zip(entries_of(five_people), values, strict=True)
    ]
    wrong = [moved(entry, offset=(80, 80)) for entry in right]
    with pytest.raises(InputError, match=r"got 13 of 13 people with most joints outside"):
        read(wrong, tmp_path, five).match(five_store)
    matched = read([*wrong[:3], *right[3:]], tmp_path, five).match(five_store)
    assert matched.tolist() == list(range(13))  # a few may be wrong


def test_joints_at_0_0_do_not_count_as_outside(
    five_people: People, five_store: CropStore, five: Skeleton, tmp_path: Path
) -> None:
    for joint, is_fault in ((0.0, False), (-300.0, True)):
        entries = []
        numbers = five_store.annotation_ids.tolist()
        for entry, number in zip(entries_of(five_people), numbers, strict=True):
            keypoints = [*entry["keypoints"][:6], *[joint, joint, 0.75] * 3]
            entries.append({**entry, "annotation_id": number, "keypoints": keypoints})
        given = read(entries, tmp_path, five)
        if is_fault:
            with pytest.raises(InputError, match="13 of 13 people with most joints outside"):
                given.match(five_store)
        else:
            assert given.match(five_store).tolist() == list(range(13))


def test_poses_that_overlap_few_people_of_their_images_are_refused(
    five_people: People,
    five_store: CropStore,
    five: Skeleton,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(predictions, "MANY_PAIRS", 13)
    right = entries_of(five_people)
    wrong = [moved(entry, offset=(200, 200)) for entry in right]
    with pytest.raises(InputError, match=r"got 3 that do of 13 in .*pixels of the whole image"):
        read([*right[:3], *wrong[3:]], tmp_path, five).match(five_store)
    found = read([*right[:4], *wrong[4:]], tmp_path, five).match(five_store) != NOBODY
    assert found.sum() == 4
    # poses of a few people of the images are no fault
    found = read(right[:3], tmp_path, five).match(five_store) != NOBODY
    assert found.sum() == 3


def test_file_without_a_list_of_predictions_is_refused(five: Skeleton, tmp_path: Path) -> None:
    for content, got in (
        ({"annotations": []}, r"got \{'annotations': \[\]\} in"),
        ([], "got an empty list in"),
    ):
        with pytest.raises(
            InputError, match=f"COCO keypoint results, with at least one entry, {got}"
        ):
            read(content, tmp_path, five)
    with pytest.raises(InputError, match=r"entry 0 \(from 0\): must be an object, got 3"):
        read([3], tmp_path, five)
    with pytest.raises(InputError, match=r"JSON list of COCO keypoint results.*gone\.json"):
        Predictions(tmp_path / "gone.json", five)
