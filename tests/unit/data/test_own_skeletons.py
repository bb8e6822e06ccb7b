"""Skeletons of a study that are not built in: from the annotations, kept, and compared."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from models.skeleton import COCO, CROWDPOSE, SKELETONS, Skeleton
from study.config.compose import compose
from study.config.derived import Resolved, resolve
from study.config.schema import StudyConfig
from study.data import own_skeletons as module
from study.data.own_skeletons import (
    identity_of,
    kept_settings,
    kept_skeletons,
    own_skeletons,
    read_categories,
    skeleton_from_data,
)
from study.data.skeleton_file import UNIFORM_SIGMA, to_plain
from study.errors import InputError
from study.storage.study_file import write_settings

HORSE = {
    "id": 3,
    "name": "horse",
    "keypoints": ["nose", "left_ear", "right_ear", "withers", "tail"],
    "skeleton": [[1, 2], [1, 3], [2, 1], [1, 4], [4, 5]],
}


def annotations(
    folder: Path, *categories: dict[str, Any], name: str = "train.json", first: bool = False
) -> Path:
    """Write an annotation file with these categories, at its end or at its start."""
    lists = {"images": [], "annotations": [{"id": 1, "note": '"categories": ['}]}
    parts = [{"categories": list(categories)}, lists]
    content = {
        key: value for part in (parts if first else parts[::-1]) for key, value in part.items()
    }
    file = folder / name
    file.write_text(json.dumps(content))
    return file


def from_data(folder: Path, **changes: Any) -> tuple[Skeleton, list[str]]:
    notes: list[str] = []
    file = annotations(folder, HORSE | changes)
    return skeleton_from_data(file, None, "data.skeleton", notes.append), notes


def test_category_gives_joints_and_each_limb_once(tmp_path: Path) -> None:
    skeleton, notes = from_data(tmp_path)
    assert skeleton.joints == ("nose", "left_ear", "right_ear", "withers", "tail")
    assert skeleton.edges in (((0, 1), (0, 2), (0, 3), (3, 4)), ((1, 0), (0, 2), (0, 3), (3, 4)))
    assert skeleton.flip_pairs == ((1, 2),)
    assert skeleton.oks_sigmas == (UNIFORM_SIGMA,) * 5
    assert skeleton.upper_body == ()
    assert [note.partition("train.json ")[2] for note in notes] == [
        "has no flip_pairs; by their names the left-right pairs are left_ear/right_ear",
        "has no oks_sigmas; each joint has 0.05, so AP compares only with AP of the same sigmas",
    ]


def test_limbs_counted_from_zero_are_read_so_with_a_note(tmp_path: Path) -> None:
    skeleton, notes = from_data(tmp_path, skeleton=[[0, 1], [3, 4]])
    assert skeleton.edges == ((0, 1), (3, 4))
    assert any("from 0, not from 1" in note for note in notes)


@pytest.mark.parametrize(
    ("limbs", "is_noted"), [([[2, 1], [3, 4]], True), ([[2, 1], [4, 5]], False)]
)
def test_limbs_that_may_count_from_zero_are_named_as_read(
    limbs: list[list[int]], is_noted: bool, tmp_path: Path
) -> None:
    skeleton, notes = from_data(tmp_path, skeleton=limbs)
    assert skeleton.edges[0] == (1, 0)
    text = "read from 1, so its first limb is left_ear-nose; if that is wrong, write a skeleton"
    assert any(text in note for note in notes) == is_noted


@pytest.mark.parametrize(
    "limbs", [[[1, 6]], [[0, 5]], [[1, 2, 3]], [["nose", "tail"]], [[-1, 2]], 7]
)
def test_limbs_that_are_no_pairs_of_joints_are_refused(tmp_path: Path, limbs: Any) -> None:
    with pytest.raises(InputError, match=r"category horse.*'skeleton' must be pairs.* 1 to 5"):
        from_data(tmp_path, skeleton=limbs)


def test_category_without_limbs_has_none_with_a_note(tmp_path: Path) -> None:
    skeleton, notes = from_data(tmp_path, skeleton=[])
    assert skeleton.edges == ()
    assert any("no edges; IGP-GCN moves each joint alone" in note for note in notes)


def test_category_needs_names_of_joints(tmp_path: Path) -> None:
    for joints in (None, [], ["nose"], "nose"):
        with pytest.raises(InputError, match="names as its 'keypoints'"):
            from_data(tmp_path, keypoints=joints)
    with pytest.raises(InputError, match="each name once, got 'nose' twice"):
        from_data(tmp_path, keypoints=["nose", "nose"], skeleton=[])


def test_joints_of_a_built_in_skeleton_are_noted(tmp_path: Path) -> None:
    joints = {"keypoints": list(COCO.joints), "skeleton": [[1, 2]]}
    _, notes = from_data(tmp_path, **joints)
    assert "data.skeleton=coco, which has its sigmas" in notes[-1]


@pytest.mark.parametrize("first", [True, False])
def test_categories_are_read_wherever_they_are(tmp_path: Path, first: bool) -> None:
    file = annotations(tmp_path, HORSE, first=first)
    assert read_categories(file) == [HORSE]


def test_categories_of_one_file_are_found_without_parsing_the_people(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "train.json"
    file.write_text(json.dumps({"images": [], "annotations": [{}] * 9, "categories": [HORSE]}))

    def fail(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(module, "read_records", fail)
    assert read_categories(file) == [HORSE]


def test_broken_or_missing_file_is_refused_by_its_reader(tmp_path: Path) -> None:
    (tmp_path / "empty.json").write_text("")
    (tmp_path / "broken.json").write_text('{"categories": [{"id": 1')
    for name, fault in (
        ("empty.json", "must be valid JSON"),
        ("broken.json", "must be valid JSON"),
        ("none.json", "must exist"),
    ):
        with pytest.raises(InputError, match=fault):
            read_categories(tmp_path / name)


def study_of(folder: Path, *overrides: str) -> StudyConfig:
    """Settings of a study of the horses in this folder."""
    annotations(folder, HORSE)
    return compose(
        [
            "data=coco",
            f"data.root={folder}",
            "data.train.annotations=train.json",
            f"storage={folder / 'studies'}",
            "name=own",
            *overrides,
        ]
    )


def own_of(config: StudyConfig, notes: list[str] | None = None) -> dict[str, Skeleton]:
    return own_skeletons(config.data, config.teacher, (notes if notes is not None else []).append)


def skeleton_file(folder: Path, name: str, joints: Sequence[str], more: str = "") -> Path:
    file = folder / name
    file.write_text(f"joints: [{', '.join(joints)}]\noks_sigmas: 0.07\n{more}")
    return file


def resolved_of(config: StudyConfig) -> Resolved:
    return resolve(config, own_of(config))


def test_settings_select_the_skeleton(tmp_path: Path) -> None:
    file = skeleton_file(tmp_path, "two.yaml", ["nose", "tail"])
    found = resolved_of(study_of(tmp_path, f"data.skeleton={file}"))
    assert found.skeleton.joints == ("nose", "tail") == found.teacher_skeleton.joints
    found = resolved_of(
        study_of(
            tmp_path,
            "data.skeleton=from_data",
            f"teacher.skeleton={file}",
            "teacher.epochs=0",
            "teacher.init=some.pth",
        )
    )
    assert (found.skeleton.num_joints, found.teacher_skeleton.num_joints) == (5, 2)
    found = resolved_of(study_of(tmp_path))
    assert found.skeleton is COCO and found.teacher_skeleton is COCO


def test_teacher_must_share_a_joint_with_the_data(tmp_path: Path) -> None:
    untrained = ("teacher.epochs=0", "teacher.init=some.pth", "teacher.skeleton=coco")
    file = skeleton_file(tmp_path, "hand.yaml", ["thumb", "palm"])
    with pytest.raises(InputError, match=r"got teacher.skeleton=coco \(nose.*share none"):
        own_of(study_of(tmp_path, f"data.skeleton={file}", *untrained))
    notes: list[str] = []
    own_of(study_of(tmp_path, "data.skeleton=from_data", *untrained), notes)
    assert any("predicts 3 of the 5 joints" in note for note in notes)


def test_teacher_with_as_many_outputs_as_a_built_in_skeleton_is_noted(tmp_path: Path) -> None:
    paws = skeleton_file(tmp_path, "paws.yaml", [f"paw {number}" for number in range(17)])
    trained = ("teacher.init=some.pth", f"data.skeleton={paws}")
    for more, number in (
        ((), 1),
        ((f"teacher.skeleton={paws}",), 0),
        (("teacher.init=random",), 0),
    ):
        notes: list[str] = []
        own_of(study_of(tmp_path, *trained, *more), notes)
        found = [note for note in notes if "outputs of teacher.init are read as the 17" in note]
        assert len(found) == number
        assert all("set teacher.skeleton=coco if" in note for note in found)


def test_teacher_of_coco_shares_17_joints_with_a_whole_body(tmp_path: Path) -> None:
    names = [*(f"face-{number}" for number in range(116)), *COCO.joints]
    file, notes = skeleton_file(tmp_path, "body.yaml", names), []
    untrained = ("teacher.epochs=0", "teacher.init=some.pth", "teacher.skeleton=coco")
    own_of(study_of(tmp_path, f"data.skeleton={file}", *untrained), notes)
    assert any("predicts 17 of the 133 joints" in note for note in notes)


def test_drawn_people_have_the_joints_of_coco_alone(tmp_path: Path) -> None:
    same = skeleton_file(tmp_path, "same.yaml", COCO.joints)
    other = skeleton_file(tmp_path, "other.yaml", ["nose", "tail"])
    assert own_of(compose([f"data.skeleton={same}"]))["data.skeleton"].joints == COCO.joints
    with pytest.raises(InputError, match="data=drawn draws people with COCO's 17 joints"):
        own_of(compose([f"data.skeleton={other}"]))


def test_identity_is_the_content_and_not_the_name(tmp_path: Path) -> None:
    horse = skeleton_from_data(
        annotations(tmp_path, HORSE), None, "data.skeleton", lambda text: None
    )
    assert identity_of(COCO) == identity_of(dataclasses.replace(COCO, name="mine")) == ""
    assert identity_of(horse) == identity_of(dataclasses.replace(horse, name="pony")) != ""
    for changes in ({"oks_sigmas": (0.1,) * 5}, {"edges": ()}, {"flip_pairs": ()}):
        assert identity_of(dataclasses.replace(horse, **changes)) != identity_of(horse)
    assert {identity_of(known) for known in SKELETONS.values()} == {""}


def test_study_keeps_its_skeletons_without_their_files(tmp_path: Path) -> None:
    file = skeleton_file(tmp_path, "two.yaml", ["nose", "tail"], "edges: [[nose, tail]]\n")
    config, folder = study_of(tmp_path, f"data.skeleton={file}"), tmp_path / "studies" / "own"
    own = own_of(config)
    write_settings(config, folder, "data", "teacher", {}, {k: to_plain(s) for k, s in own.items()})
    file.unlink()
    assert kept_skeletons(folder) == {
        setting: dataclasses.replace(skeleton, name="two") for setting, skeleton in own.items()
    }
    write_settings(study_of(tmp_path), tmp_path / "studies" / "plain", "data", "teacher", {})
    assert kept_skeletons(tmp_path / "studies" / "plain") == {}


def test_study_is_refused_after_its_skeleton_changed(tmp_path: Path) -> None:
    file = skeleton_file(tmp_path, "two.yaml", ["nose", "tail"])
    config, folder = study_of(tmp_path, f"data.skeleton={file}"), tmp_path / "studies" / "own"
    assert kept_settings(own_of(config), folder) == set()  # it has not begun
    kept = {setting: to_plain(skeleton) for setting, skeleton in own_of(config).items()}
    write_settings(config, folder, "data", "teacher", {}, kept)
    moved = skeleton_file(tmp_path, "moved.yaml", ["nose", "tail"])
    for path in (file, moved):
        own = own_of(study_of(tmp_path, f"data.skeleton={path}"))
        assert kept_settings(own, folder) == {"data.skeleton"}
    skeleton_file(tmp_path, "two.yaml", ["nose", "tail"], "edges: [[nose, tail]]\n")
    with pytest.raises(InputError, match=r"data.skeleton must have the content .* other edges;"):
        kept_settings(own_of(config), folder)


def test_crowdpose_is_no_skeleton_of_one_s_own(tmp_path: Path) -> None:
    assert own_of(study_of(tmp_path, "data.skeleton=crowdpose")) == {}
    assert resolve(study_of(tmp_path, "data.skeleton=crowdpose")).skeleton is CROWDPOSE
