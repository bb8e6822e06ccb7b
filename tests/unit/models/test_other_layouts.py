"""Refiner, chooser and swap resolver on 5, 21 and 133 joints, with and without limbs and pairs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.build import build_codec, build_model
from models.candidates import read_candidates
from models.igp_gcn import IgpGcn
from models.pose_features import PoseFeatures
from models.refined_pose import RefinedPose
from models.skeleton import Skeleton
from models.swap_resolver import MAX_PAIRS

CROP = (64, 96)


def skeleton_of(joints: list[str], limbs: list[list[str]], *, has_pairs: bool) -> Skeleton:
    pairs = [
        (place, joints.index(joint.replace("left_", "right_")))
        for place, joint in enumerate(joints)
        if joint.startswith("left_") and has_pairs
    ]
    return Skeleton(
        name="other",
        joints=tuple(joints),
        edges=tuple((joints.index(start), joints.index(end)) for start, end in limbs),
        flip_pairs=tuple(pairs),
        oks_sigmas=(0.05,) * len(joints),
        upper_body=(),
    )


def estimator_of(skeleton: Skeleton) -> tuple[RefinedPose, Tensor]:
    """A tiny student with a whole refiner on top, and two crops."""
    torch.manual_seed(0)
    codec = build_codec("dark", CROP, 2.0)
    student = build_model("mobile_net", "tiny", skeleton, codec)
    refiner = IgpGcn(
        skeleton, student.pyramid_channels, width=8, depth=1, candidates=3, mirror_pairs=True
    )
    for parameter in refiner.parameters():  # an untrained refiner changes nothing
        torch.nn.init.normal_(parameter, std=0.02)
    estimator = RefinedPose(student, codec, refiner, skeleton.flip_order)
    return estimator.eval(), 255 * torch.rand(2, 3, *CROP)


@pytest.mark.parametrize("has_limbs", [True, False], ids=["limbs", "no limbs"])
@pytest.mark.parametrize("has_pairs", [True, False], ids=["pairs", "no pairs"])
def test_every_joint_is_refined_whatever_the_skeleton(
    layout: tuple[list[str], list[list[str]]], has_limbs: bool, has_pairs: bool
) -> None:
    joints, limbs = layout
    skeleton = skeleton_of(joints, limbs if has_limbs else [], has_pairs=has_pairs)
    estimator, crops = estimator_of(skeleton)
    start = torch.rand(2, len(joints), 2) * torch.tensor(CROP[::-1])
    given = start, torch.ones(2, len(joints))
    with torch.no_grad():
        for keypoints, scores in (estimator(crops), estimator(crops, given)):
            assert keypoints.shape == (2, len(joints), 2) and scores.shape == (2, len(joints))
            assert keypoints.isfinite().all() and scores.isfinite().all()


@pytest.mark.parametrize("has_limbs", [True, False], ids=["limbs", "no limbs"])
def test_all_parameters_of_the_refiner_have_a_gradient_but_those_of_missing_limbs(
    layout: tuple[list[str], list[list[str]]], has_limbs: bool
) -> None:
    joints, limbs = layout
    skeleton = skeleton_of(joints, limbs if has_limbs else [], has_pairs=True)
    estimator, crops = estimator_of(skeleton)
    assert estimator.refiner is not None
    refined = estimator.refiner.refine(estimator.codec, estimator.student.predict(crops))
    assert refined.choice.logits is not None
    logits = refined.choice.logits.clamp_min(-50)
    (sum(pose.sum() for pose in refined.poses) + logits.square().sum()).backward()
    missing = [
        name
        for name, parameter in estimator.refiner.named_parameters()
        if parameter.grad is None and not name.startswith("mirror_pairs")
    ]
    assert missing == []


def test_joint_without_a_limb_hears_no_other_joint() -> None:
    skeleton = skeleton_of(["a", "b", "alone"], [["a", "b"]], has_pairs=True)
    weights = skeleton.adjacency()
    assert weights[2].tolist() == [0, 0, 1]
    assert weights.sum() == 5


def test_partner_of_a_joint_without_a_pair_is_no_candidate(
    layout: tuple[list[str], list[list[str]]],
) -> None:
    joints, limbs = layout
    skeleton = skeleton_of(joints, limbs, has_pairs=True)
    codec = build_codec("dark", CROP, 2.0)
    maps = torch.rand(2, len(joints), CROP[0] // 4, CROP[1] // 4)
    places = torch.rand(2, len(joints), 2) * 60
    found = read_candidates(
        codec, PoseFeatures(maps, ()), 2, (places, torch.ones(2, len(joints))), skeleton.flip_order
    )
    is_paired = torch.zeros(len(joints), dtype=torch.bool)
    is_paired[[joint for pair in skeleton.flip_pairs for joint in pair]] = True
    assert ((found[:, :, -1, 2] > 0) == is_paired).all()


def test_swap_resolver_has_at_most_eight_pairs(
    layout: tuple[list[str], list[list[str]]],
) -> None:
    joints, limbs = layout
    estimator, _ = estimator_of(skeleton_of(joints, limbs, has_pairs=True))
    assert estimator.refiner is not None
    resolver, number = estimator.refiner.mirror_pairs, {5: 1, 21: 0, 133: MAX_PAIRS}[len(joints)]
    assert (resolver is None) == (number == 0)
    if resolver is not None:
        assert resolver.orders.shape == (2**number, len(joints))
