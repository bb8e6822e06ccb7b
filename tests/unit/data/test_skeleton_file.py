"""A skeleton from a YAML file: what it may hold, and the message of every fault."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from models.skeleton import Skeleton
from study.data.skeleton_file import UNIFORM_SIGMA, read_skeleton, to_plain
from study.errors import InputError

HORSE: dict[str, Any] = {
    "joints": ["nose", "left_ear", "right_ear", "withers", "tail"],
    "edges": [["nose", "left_ear"], ["nose", "right_ear"], ["nose", "withers"], [3, 4]],
    "flip_pairs": [["left_ear", "right_ear"]],
    "oks_sigmas": [0.03, 0.04, 0.04, 0.08, 0.1],
    "upper_body": ["nose", "left_ear", "right_ear"],
}


def read(tmp_path: Path, content: Any) -> tuple[Skeleton, list[str]]:
    """Write the content, read it as a skeleton, and return that with the notes."""
    text = content if isinstance(content, str) else yaml.safe_dump(content)
    file = tmp_path / "horse.yaml"
    file.write_text(text)
    notes: list[str] = []
    return read_skeleton(file, "data.skeleton", notes.append), notes


def test_file_gives_joints_limbs_pairs_sigmas_and_upper_body(tmp_path: Path) -> None:
    skeleton, notes = read(tmp_path, HORSE)
    assert skeleton == Skeleton(
        name="horse",
        joints=("nose", "left_ear", "right_ear", "withers", "tail"),
        edges=((0, 1), (0, 2), (0, 3), (3, 4)),
        flip_pairs=((1, 2),),
        oks_sigmas=(0.03, 0.04, 0.04, 0.08, 0.1),
        upper_body=(0, 1, 2),
    )
    assert notes == []


def test_written_skeleton_is_read_as_the_same(
    tmp_path: Path, layout: tuple[list[str], list[list[str]]]
) -> None:
    joints, limbs = layout
    skeleton, _ = read(tmp_path, {"name": "own", "joints": joints, "edges": limbs})
    assert skeleton.joints == tuple(joints)
    assert len(skeleton.edges) == len(limbs)
    assert read(tmp_path, to_plain(skeleton))[0] == skeleton


def test_left_right_pairs_follow_from_the_names(
    tmp_path: Path, layout: tuple[list[str], list[list[str]]]
) -> None:
    joints, limbs = layout
    skeleton, notes = read(tmp_path, {"joints": joints, "edges": limbs, "oks_sigmas": 0.05})
    found = {frozenset(joints[index] for index in pair) for pair in skeleton.flip_pairs}
    left = [joint for joint in joints if joint.startswith("left_")]
    assert len(left) == {5: 1, 21: 0, 133: 8 + 3 + 21}[len(joints)]
    assert found == {frozenset((joint, joint.replace("left_", "right_"))) for joint in left}
    assert len(notes) == 1 and "has no flip_pairs" in notes[0]
    assert ("exchanges no joints" in notes[0]) == (not left)


@pytest.mark.parametrize(
    ("left", "right"),
    [("LeftEar", "RightEar"), ("ear_l", "ear_r"), ("L Ear", "R Ear"), ("leftear", "rightear")],
)
def test_pairs_are_found_in_other_spellings(tmp_path: Path, left: str, right: str) -> None:
    skeleton, _ = read(tmp_path, {"joints": ["nose", right, left]})
    assert skeleton.flip_pairs == ((2, 1),)


@pytest.mark.parametrize(
    "joints",
    [
        ["0:nose", "1:left_eye", "2:right_eye"],
        ["0_nose", "1_left_eye", "2_right_eye"],
        ["nose_1", "left_eye_2", "right_eye_3"],
        ["nose (1)", "left eye (2)", "right eye (3)"],
        ["01nose", "02leftEye", "03rightEye"],
    ],
)
def test_pairs_are_found_among_numbered_names(tmp_path: Path, joints: list[str]) -> None:
    skeleton, notes = read(tmp_path, {"joints": joints})
    assert skeleton.flip_pairs == ((1, 2),) and skeleton.joints == tuple(joints)
    assert f"the left-right pairs are {joints[1]}/{joints[2]}" in notes[0]


def test_sides_without_any_pair_need_flip_pairs(tmp_path: Path) -> None:
    joints = ["nose", "left_eye", "left_ear", "right_oeil"]
    with pytest.raises(InputError, match=r"flip_pairs must be given.*left_eye and right_oeil"):
        read(tmp_path, {"joints": joints})
    assert read(tmp_path, {"joints": joints, "flip_pairs": []})[0].flip_pairs == ()
    pairs = [["left_eye", "right_oeil"]]
    assert read(tmp_path, {"joints": joints, "flip_pairs": pairs})[0].flip_pairs == ((1, 3),)
    fingers = ["left_thumb_1", "left_thumb_2", "right_thumb_3", "right_thumb_4"]
    with pytest.raises(InputError, match="flip_pairs must be given"):  # 1 with 3, or with 4?
        read(tmp_path, {"joints": fingers})


def test_names_without_a_side_are_said_to_have_none(tmp_path: Path) -> None:
    for joints in (["nez", "oeil_gauche", "oeil_droit"], ["left_thumb", "left_palm"]):
        skeleton, notes = read(tmp_path, {"joints": joints})
        assert skeleton.flip_pairs == ()
        assert "no two names have the words left and right" in notes[0]
        assert "list the pairs as flip_pairs in a skeleton file" in notes[0]


def test_no_pairs_stay_none_with_a_note_if_names_have_some(tmp_path: Path) -> None:
    skeleton, notes = read(tmp_path, HORSE | {"flip_pairs": []})
    assert skeleton.flip_pairs == ()
    (note,) = notes
    assert "flip_pairs" in note and "lacks left_ear/right_ear" in note


def test_pairs_beyond_those_of_the_names_need_no_note(tmp_path: Path) -> None:
    pairs = [["left_ear", "right_ear"], ["withers", "tail"]]
    skeleton, notes = read(tmp_path, HORSE | {"flip_pairs": pairs})
    assert skeleton.flip_pairs == ((1, 2), (3, 4)) and notes == []
    _, (note,) = read(tmp_path, HORSE | {"flip_pairs": [["left_ear", "withers"]]})
    assert "lacks left_ear/right_ear" in note


def test_lists_that_hold_each_other_are_refused_at_once(tmp_path: Path) -> None:
    levels = [f"&x{n} [{', '.join([f'*x{n - 1}'] * 9)}]" for n in range(1, 12)]
    endless = f"[&x0 [a], {', '.join(levels)}]"  # 9 to the power of 11 letters
    for text in ("joints: &a [*a, *a]", f"joints: {endless}", f"joints: [a, b]\nname: {endless}"):
        with pytest.raises(InputError, match=r"must be"):
            read(tmp_path, text)


@pytest.mark.parametrize(
    "sigmas",
    [
        {"tail": 0.1, "nose": 0.03, "left_ear": 0.04, "right_ear": 0.04, "withers": 0.08},
        [0.03, "4e-2", "4e-2", 0.08, 0.1],
    ],
)
def test_sigmas_may_be_given_by_name_and_with_an_exponent(tmp_path: Path, sigmas: Any) -> None:
    skeleton, _ = read(tmp_path, HORSE | {"oks_sigmas": sigmas})
    assert skeleton.oks_sigmas == (0.03, 0.04, 0.04, 0.08, 0.1)


def test_one_sigma_is_that_of_all_joints_and_none_is_the_uniform_one(tmp_path: Path) -> None:
    assert read(tmp_path, HORSE | {"oks_sigmas": 0.07})[0].oks_sigmas == (0.07,) * 5
    skeleton, notes = read(tmp_path, {"joints": ["a", "b"], "edges": [[0, 1]], "flip_pairs": []})
    assert skeleton.oks_sigmas == (UNIFORM_SIGMA,) * 2 == (0.05, 0.05)
    assert "no oks_sigmas; each joint has 0.05" in notes[0]


def test_sigmas_of_pycocotools_before_division_are_noted(tmp_path: Path) -> None:
    times_10 = [0.26, 0.35, 0.35, 0.79, 0.62]
    skeleton, (note,) = read(tmp_path, HORSE | {"oks_sigmas": times_10})
    assert skeleton.oks_sigmas == tuple(times_10)
    assert "oks_sigmas of up to 0.79, while COCO's largest is 0.107" in note
    assert "divide those by 10" in note
    assert read(tmp_path, HORSE | {"oks_sigmas": 0.15})[1] == []


def test_file_without_limbs_is_read_with_a_note(tmp_path: Path) -> None:
    for edges in ([], None):
        skeleton, notes = read(tmp_path, HORSE | {"edges": edges})
        assert skeleton.edges == ()
        assert any("no edges; IGP-GCN moves each joint alone" in note for note in notes)


def test_file_without_upper_body_has_none(tmp_path: Path) -> None:
    assert read(tmp_path, {"joints": ["a", "b"]})[0].upper_body == ()


FAULTS: list[tuple[Any, str]] = [
    ("joints: [a, b", "must be plain YAML"),
    ("joints: [a, b]\njoints: [a, c]", "the key joints is there 2 times"),
    ("joints: !!python/object/apply:os.getcwd []", "must be plain YAML.*os.getcwd"),
    ("- a\n- b", r"must map name, joints, .* of which joints is required, got \['a', 'b'\]"),
    ("", "must map .* got None"),
    ({"edges": []}, "joints must be a list of at least 2 names, got None"),
    ({"joints": ["a"]}, "joints must be a list of at least 2 names"),
    ({"joints": ["a", "b", "a"]}, "each name once, got 'a' twice"),
    ({"joints": ["a", True]}, "joints must be names, .* got True at place 1"),
    ({"joints": ["a", ["b"]]}, "joints must be names, .* at place 1"),
    (HORSE | {"sigmas": 0.1}, "got 'sigmas'; did you mean oks_sigmas?"),
    (HORSE | {"flip_pair": []}, "got 'flip_pair'; did you mean flip_pairs?"),
    (HORSE | {"name": 7}, "name must be text, got 7"),
    (HORSE | {"edges": [["nose", "tial"]]}, "edges, place 0.*got 'tial'; did you mean tail?"),
    (HORSE | {"edges": [["nose", 5]]}, "edges, place 0.* its place 0 to 4, got 5"),
    (HORSE | {"edges": [[0, -1]]}, "edges, place 0.*got -1"),
    (HORSE | {"edges": [["nose", "tail", 1]]}, r"edges, place 0.*a pair of joints, \[a, b\]"),
    (HORSE | {"edges": "nose"}, "edges must be a list of pairs"),
    (HORSE | {"edges": [[1, "left_ear"]]}, "two different joints, got left_ear twice"),
    (HORSE | {"edges": [[0, 1], [1, 0]]}, "edges, place 1.*every pair must be there once"),
    (HORSE | {"flip_pairs": [["tail", "tail"]]}, "two different joints, got tail twice"),
    (HORSE | {"flip_pairs": [[1, 2], [2, 1]]}, "flip_pairs, place 1.*once"),
    (HORSE | {"flip_pairs": [[1, 2], [2, 3]]}, "in one pair at most, got right_ear in two"),
    (HORSE | {"oks_sigmas": [0.1]}, "one for each of the 5 joints, got 1"),
    (HORSE | {"oks_sigmas": [0.1, 0.1, 0.1, 0.1, -0.1]}, "above 0 .*got -0.1 for tail"),
    (HORSE | {"oks_sigmas": 0}, "above 0 .*got 0 for nose"),
    (HORSE | {"oks_sigmas": 5.0}, "at most 1, .*got 5.0 for nose"),
    (HORSE | {"oks_sigmas": "wide"}, "above 0 .*got 'wide'"),
    (HORSE | {"oks_sigmas": float("nan")}, "above 0 .*got nan"),
    (HORSE | {"oks_sigmas": {"nose": 0.1, "tial": 0.1}}, "oks_sigmas.*'tial'; did you mean tail"),
    (HORSE | {"oks_sigmas": {"nose": 0.1}}, "for every joint, got none for left_ear, right_ear"),
    (HORSE | {"upper_body": ["nose", "noes"]}, "upper_body.*'noes'; did you mean nose?"),
    (HORSE | {"upper_body": [0, "nose"]}, "upper_body must name some of the 5 joints, each once"),
    (HORSE | {"upper_body": [0, 1, 2, 3, 4]}, "upper_body must name some .* not all"),
    (HORSE | {"upper_body": "nose"}, "upper_body must be a list"),
]


@pytest.mark.parametrize(("content", "fault"), FAULTS, ids=range(len(FAULTS)))
def test_fault_is_one_line_that_names_file_and_key(
    tmp_path: Path, content: Any, fault: str
) -> None:
    with pytest.raises(InputError) as error:
        read(tmp_path, content)
    message = str(error.value)
    assert message.startswith(f"data.skeleton={tmp_path / 'horse.yaml'}")
    assert re.search(fault, message), message
    assert "\n" not in message and len(message) < 500


def test_missing_file_folder_and_bytes_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(InputError, match=r"YAML file that exists and can be read, got "):
            read_skeleton(path, "data.skeleton", print)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00joints")
    with pytest.raises(InputError, match="plain YAML"):
        read_skeleton(tmp_path / "bytes.yaml", "data.skeleton", print)
