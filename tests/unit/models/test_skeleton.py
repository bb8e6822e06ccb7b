"""The built-in skeletons, and the checks of a skeleton."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pycocotools.cocoeval import Params

from models.skeleton import COCO, CROWDPOSE, SKELETONS, Skeleton, rows_from, shared_joints


def stick_man(**changes: Any) -> Skeleton:
    fields: dict[str, Any] = {
        "name": "stick_man",
        "joints": ("head", "left_hand", "right_hand", "left_foot", "right_foot"),
        "edges": ((0, 1), (0, 2), (0, 3), (0, 4)),
        "flip_pairs": ((1, 2), (3, 4)),
        "oks_sigmas": (0.03, 0.06, 0.06, 0.09, 0.09),
        "upper_body": (0, 1, 2),
    }
    return Skeleton(**(fields | changes))


@pytest.fixture(params=[*SKELETONS, "stick_man"])
def skeleton(request: pytest.FixtureRequest) -> Skeleton:
    return SKELETONS.get(request.param) or stick_man()


def test_coco_and_crowdpose_have_their_joints_and_sigmas() -> None:
    assert (COCO.num_joints, CROWDPOSE.num_joints) == (17, 14)
    assert COCO.oks_sigmas == pytest.approx(Params(iouType="keypoints").kpt_oks_sigmas)
    # the CrowdPose evaluation's values, given a side at a time
    halved = [0.079, 0.072, 0.062, 0.107, 0.087, 0.089, 0.079]
    assert CROWDPOSE.oks_sigmas == tuple(sigma for sigma in halved for _ in range(2))
    assert COCO.joints[0] == "nose"
    assert CROWDPOSE.joints[-2:] == ("head", "neck")


def test_every_skeleton_is_found_by_its_name() -> None:
    assert SKELETONS == {"coco": COCO, "crowdpose": CROWDPOSE}


def test_no_joint_or_edge_is_named_twice(skeleton: Skeleton) -> None:
    assert len(set(skeleton.joints)) == skeleton.num_joints
    edges = {frozenset(edge) for edge in skeleton.edges}
    assert len(edges) == len(skeleton.edges)
    assert all(len(edge) == 2 for edge in edges)


def test_every_joint_is_connected(skeleton: Skeleton) -> None:
    reached = torch.linalg.matrix_power(skeleton.adjacency(), skeleton.num_joints)
    assert (reached > 0).all()


def test_flip_order_swaps_left_and_right(skeleton: Skeleton) -> None:
    mirrored = [skeleton.joints[index] for index in skeleton.flip_order]
    swap = {"left": "right", "right": "left"}
    for joint, other in zip(skeleton.joints, mirrored, strict=True):
        side, _, rest = joint.partition("_")
        assert other == (f"{swap[side]}_{rest}" if side in swap else joint)


def test_two_flips_cancel(skeleton: Skeleton) -> None:
    order = skeleton.flip_order
    assert [order[index] for index in order] == list(range(skeleton.num_joints))


def test_flip_keeps_edges_and_sigmas(skeleton: Skeleton) -> None:
    order = skeleton.flip_order
    edges = {frozenset(edge) for edge in skeleton.edges}
    assert {frozenset((order[a], order[b])) for a, b in skeleton.edges} == edges
    assert tuple(skeleton.oks_sigmas[index] for index in order) == skeleton.oks_sigmas


def test_adjacency_has_edges_both_ways_and_the_diagonal() -> None:
    expected = torch.eye(5)
    expected[0, 1:] = expected[1:, 0] = 1
    assert torch.equal(stick_man().adjacency(), expected)


def test_shared_joints_are_matched_by_name() -> None:
    pairs = shared_joints(CROWDPOSE, COCO)
    assert len(pairs) == 12
    assert all(CROWDPOSE.joints[i] == COCO.joints[j] for i, j in pairs)
    assert shared_joints(stick_man(), COCO) == []


def test_shared_joints_may_be_spelled_otherwise() -> None:
    names = ("LeftEye", "eye_R", "nose", "left_eye", "Tail")
    # The exact name is taken first, so that LeftEye finds no second left eye.
    assert shared_joints(stick_man(joints=names), COCO) == [(1, 2), (2, 0), (3, 1)]


def test_pretrained_head_is_copied_for_the_joints_that_it_names() -> None:
    horse = stick_man(joints=("nose", "LeftEar", "ear_r", "withers", "tail"))
    assert rows_from(COCO, horse) == [0, 3, 4, None, None]


def test_there_must_be_one_sigma_per_joint() -> None:
    with pytest.raises(ValueError, match=r"one OKS sigma per joint.*4 sigmas for 5.*stick_man"):
        stick_man(oks_sigmas=(0.1,) * 4)


@pytest.mark.parametrize("field", ["edges", "flip_pairs"])
def test_pairs_must_name_joints_of_the_skeleton(field: str) -> None:
    with pytest.raises(ValueError, match=r"joints 0 to 4, got \[5\].*stick_man"):
        stick_man(**dict.fromkeys([field], ((0, 5),)))


def test_upper_body_must_name_joints_of_the_skeleton() -> None:
    with pytest.raises(ValueError, match=r"got \[-1\]"):
        stick_man(upper_body=(0, -1))


def test_rows_are_found_by_name_then_by_stand_in() -> None:
    rows = rows_from(COCO, CROWDPOSE)
    assert [COCO.joints[row] for row in rows if row is not None] == [
        *CROWDPOSE.joints[:12],
        "nose",
        "left_shoulder",
    ]
    assert rows_from(COCO, COCO) == list(range(17))


def test_rows_without_joint_and_stand_in_are_none() -> None:
    one = Skeleton("one", ("tail", "nose"), (), (), (0.1, 0.1), (), stand_ins=(("tail", "rump"),))
    assert rows_from(COCO, one) == [None, 0]
