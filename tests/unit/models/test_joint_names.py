"""Names of joints: which ones mean the same, and which never do."""

from __future__ import annotations

import pytest

from models.joint_names import match_joints, repeated_names, split_side
from models.skeleton import COCO, CROWDPOSE

MPII = (
    "r_ankle r_knee r_hip l_hip l_knee l_ankle pelvis thorax upper_neck head_top r_wrist r_elbow "
    "r_shoulder l_shoulder l_elbow l_wrist"
).split()
AI_CHALLENGER = (
    "Right Shoulder,Right Elbow,Right Wrist,Left Shoulder,Left Elbow,Left Wrist,Right Hip,"
    "Right Knee,Right Ankle,Left Hip,Left Knee,Left Ankle,Head top,Neck"
).split(",")
POSETRACK18 = (
    "nose head_bottom head_top left_ear right_ear left_shoulder right_shoulder left_elbow "
    "right_elbow left_wrist right_wrist left_hip right_hip left_knee right_knee left_ankle "
    "right_ankle"
).split()
HUMAN36M = (
    "Hip RHip RKnee RFoot LHip LKnee LFoot Spine Thorax Nose Head LShoulder LElbow LWrist "
    "RShoulder RElbow RWrist"
).split()
OPENPOSE_COCO = (
    "Nose RShoulder RElbow RWrist LShoulder LElbow LWrist RHip RKnee RAnkle LHip LKnee LAnkle "
    "REye LEye REar LEar"
).split()
LIGHTWEIGHT_OPENPOSE = (
    "nose r_sho r_elb r_wri l_sho l_elb l_wri r_hip r_knee r_ank l_hip l_knee l_ank r_eye l_eye "
    "r_ear l_ear"
).split()
BLAZEPOSE = (
    "nose left_eye_inner left_eye left_eye_outer right_eye_inner right_eye right_eye_outer "
    "left_ear right_ear mouth_left mouth_right left_shoulder right_shoulder left_elbow "
    "right_elbow left_wrist right_wrist left_pinky right_pinky left_index right_index left_thumb "
    "right_thumb left_hip right_hip left_knee right_knee left_ankle right_ankle left_heel "
    "right_heel left_foot_index right_foot_index"
).split()


def read_as(names: list[str], wanted: tuple[str, ...]) -> dict[str, str]:
    """The wanted joints that are found, with the given name of each."""
    places = match_joints(names, wanted).places
    return {joint: names[i] for joint, i in zip(wanted, places, strict=True) if i is not None}


SPELLINGS = (
    "right ankle,RAnkle,right_foot,r_ankle,rightAnkle,ankle_right,R-Ankle,RIGHTANKLE,Ankle.R,"
    "ankleRight,RANKLE, Right  Ankle ,anklel,rank,ank_r"
).split(",")


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_of_an_ankle_is_found(name: str) -> None:
    side = "left" if name == "anklel" else "right"
    match = match_joints(["nose", name], ["left_ankle", "right_ankle", "nose"])
    assert match.places == ((None, 1, 0) if side == "right" else (1, None, 0))
    assert match.extra == () and match.order is None  # one ankle is missing


@pytest.mark.parametrize("name", ["Head top", "top_head", "head_top", "HeadTop", "HEADTOP"])
@pytest.mark.parametrize("neck", ["thorax", "neck", "upper_neck", "UpperNeck"])
def test_head_and_neck_are_found_by_their_synonyms(name: str, neck: str) -> None:
    assert match_joints([neck, name], ["head", "neck"]).order == (1, 0)


@pytest.mark.parametrize("names", [OPENPOSE_COCO, LIGHTWEIGHT_OPENPOSE])
def test_other_projects_names_of_coco_are_read_in_its_order(names: list[str]) -> None:
    found = read_as(names, COCO.joints)
    assert match_joints(names, COCO.joints).order is not None
    initial = {"left": "l", "right": "r"}
    for joint, name in found.items():
        side, _, place = joint.rpartition("_")
        spelled = name.lower().replace("_", "")
        assert spelled.startswith(initial.get(side, "") + place[:3]), (joint, name)


def test_names_of_ai_challenger_are_crowdposes_in_another_order() -> None:
    order = match_joints(AI_CHALLENGER, CROWDPOSE.joints).order
    assert order == (3, 0, 4, 1, 5, 2, 9, 6, 10, 7, 11, 8, 12, 13)


@pytest.mark.parametrize(
    ("names", "missing", "extra"),
    [
        (POSETRACK18, {"left_eye", "right_eye"}, {"head_bottom", "head_top"}),
        (
            HUMAN36M,
            {"left_eye", "right_eye", "left_ear", "right_ear"},
            {"Hip", "Spine", "Thorax", "Head"},
        ),
    ],
)
def test_seventeen_other_joints_are_never_cocos(
    names: list[str], missing: set[str], extra: set[str]
) -> None:
    match = match_joints(names, COCO.joints)
    assert len(names) == 17 and match.order is None
    assert set(COCO.joints) - read_as(names, COCO.joints).keys() == missing
    assert {names[place] for place in match.extra} == extra


def test_neck_that_could_be_two_names_is_not_matched() -> None:
    found = read_as(MPII, CROWDPOSE.joints)
    assert "neck" not in found and found["head"] == "head_top"
    extra = match_joints(MPII, CROWDPOSE.joints).extra
    assert [MPII[place] for place in extra] == ["pelvis", "thorax", "upper_neck"]


def test_equal_spelling_goes_before_synonyms() -> None:
    assert match_joints(["right_foot", "RAnkle"], ["right_ankle", "right_foot"]).order == (1, 0)
    match = match_joints(["head_top", "head", "neck"], ["head", "neck"])
    assert match.places == (1, 2) and match.extra == (0,)


@pytest.mark.parametrize(
    "names", [MPII, AI_CHALLENGER, POSETRACK18, HUMAN36M, BLAZEPOSE, COCO.joints]
)
def test_names_of_a_published_skeleton_are_all_different(names: list[str]) -> None:
    assert repeated_names(names) == ()
    assert match_joints(names, names).order == tuple(range(len(names)))


def test_names_that_differ_in_spelling_alone_are_repeated() -> None:
    assert repeated_names(["nose", "LEye", "left eye", "nose tip"]) == ("LEye", "left eye")
    match = match_joints(["LEye", "left eye"], ["left_eye", "right_eye"])
    assert match.places == (None, None) and match.extra == (0, 1)


def test_names_without_latin_letters_are_compared_as_they_are() -> None:
    names = ["\u5de6\u80a9", "\u53f3\u80a9"]
    assert match_joints(names, names[::-1]).order == (1, 0)
    assert match_joints(["1", "2"], ["nose", "neck"]).places == (None, None)


@pytest.mark.parametrize(
    ("name", "side", "place"),
    [
        ("LBigToe", "left", "big toe"),
        ("foot_index.R", "right", "foot index"),
        ("LPaw", "left", "paw"),
        ("leftshoulder", "left", "shoulder"),
        ("nose", "", "nose"),
        ("left", "", "left"),
        ("mid hip", "", "mid hip"),
        ("left_right_hip", "", "left right hip"),
    ],
)
def test_side_is_split_from_the_place(name: str, side: str, place: str) -> None:
    assert split_side(name) == (side, place)
