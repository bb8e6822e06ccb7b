"""Left-right swaps of a given pose: resolved if the evidence is clear, otherwise kept."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from models.codecs.codec import Dark
from models.igp_gcn import IgpGcn
from models.pose_features import PoseFeatures, PoseNetwork
from models.refined_pose import RefinedPose
from models.skeleton import COCO, CROWDPOSE, SKELETONS, Skeleton
from models.swap_resolver import MARGIN, MAX_PAIRS, SwapResolver

CROP = (96, 64)
GIVEN = torch.ones(1, 5, dtype=torch.bool)
PLACES = torch.tensor([[[32.0, 8.0], [12.0, 40.0], [52.0, 44.0], [16.0, 80.0], [48.0, 84.0]]])
BOTH, HANDS, FEET = [0, 2, 1, 4, 3], [0, 2, 1, 3, 4], [0, 1, 2, 4, 3]


def maps_of(keypoints_crop: Tensor, height: float = 1.0) -> Tensor:
    """Build heatmaps with this height at each joint and 0 elsewhere."""
    maps = torch.zeros(*keypoints_crop.shape[:2], 24, 16)
    for person, pose in enumerate(keypoints_crop):
        for joint, (x, y) in enumerate((pose / 4).long().tolist()):
            maps[person, joint, y, x] = height
    return maps


@pytest.mark.parametrize("skeleton", SKELETONS.values(), ids=SKELETONS)
def test_there_is_a_labeling_for_each_subset_of_pairs(skeleton: Skeleton) -> None:
    module = SwapResolver(skeleton)
    pairs = len(skeleton.flip_pairs)
    assert len(set(map(tuple, module.orders.tolist()))) == 2**pairs
    assert module.orders[0].tolist() == list(range(skeleton.num_joints))
    assert module.orders[-1].tolist() == list(skeleton.flip_order)
    for swaps, order in zip(module.swaps, module.orders, strict=True):
        moved = order != torch.arange(skeleton.num_joints)
        assert moved.sum() == 2 * swaps.sum()
        assert torch.equal(moved[module.pairs].all(dim=1), swaps)


def with_pairs(number: int) -> Skeleton:
    return Skeleton(
        name="strange",
        joints=tuple(map(str, range(40))),
        edges=((0, 1),),
        flip_pairs=tuple((2 * place, 2 * place + 1) for place in range(number)),
        oks_sigmas=(0.1,) * 40,
        upper_body=(0,),
    )


def test_skeleton_without_pairs_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must have flip_pairs.*got none"):
        SwapResolver(with_pairs(0))


def test_pairs_after_the_first_eight_keep_their_labels() -> None:
    module = SwapResolver(with_pairs(20))
    assert module.orders.shape == (2**MAX_PAIRS, 40)
    every_pair_swapped = [place ^ 1 for place in range(16)] + list(range(16, 40))
    assert module.orders[-1].tolist() == every_pair_swapped


@pytest.mark.parametrize("order", [BOTH, HANDS, FEET])
def test_heatmaps_resolve_swapped_pairs(order: list[int], five: Skeleton) -> None:
    module = SwapResolver(five)
    maps = maps_of(PLACES)
    resolved = module.resolve_swaps(maps, PLACES[:, order], GIVEN, CROP)
    assert torch.equal(resolved, PLACES)
    assert torch.equal(
        module.resolve_swaps(maps, PLACES, GIVEN, CROP), PLACES
    )  # unchanged, to the bit


def test_evidence_is_the_log_ratio_of_own_and_partners_heights_of_both_joints(
    five: Skeleton,
) -> None:
    maps = maps_of(PLACES, height=0.3)
    evidence = SwapResolver(five).heatmap_evidence(maps, PLACES[:, HANDS], CROP)
    share = 2 * math.log(0.3 / 0.01)  # a heatmap of 0 counts as 0.01
    torch.testing.assert_close(evidence, torch.tensor([[-share, share]]))


def test_pose_without_evidence_is_kept(five: Skeleton) -> None:
    resolved = SwapResolver(five).resolve_swaps(
        torch.zeros(1, 5, 24, 16), PLACES[:, BOTH], GIVEN, CROP
    )
    assert torch.equal(resolved, PLACES[:, BOTH])


@pytest.mark.parametrize(("share", "is_swapped"), [(0.95, False), (1.05, True)])
def test_each_swapped_pair_must_exceed_the_margin(
    share: float, is_swapped: bool, five: Skeleton
) -> None:
    height = 0.01 * math.exp(share * MARGIN / 2)  # both joints add evidence
    resolved = SwapResolver(five).resolve_swaps(
        maps_of(PLACES, height), PLACES[:, BOTH], GIVEN, CROP
    )
    assert torch.equal(resolved, PLACES if is_swapped else PLACES[:, BOTH])


def test_incomplete_pair_is_not_swapped(five: Skeleton) -> None:
    given = GIVEN.clone()
    given[0, 2] = False
    resolved = SwapResolver(five).resolve_swaps(maps_of(PLACES), PLACES[:, BOTH], given, CROP)
    assert torch.equal(resolved, PLACES[:, HANDS])
    logits = SwapResolver(five)(PLACES, given, torch.zeros(1, 2))
    assert torch.isinf(logits).tolist() == [[False, False, True, True]]


def test_logits_ignore_place_size_and_joints_that_are_not_given(five: Skeleton) -> None:
    torch.manual_seed(0)
    module = SwapResolver(five)
    nn.init.normal_(module.head.weight)
    given = GIVEN.clone()
    given[0, 0] = False
    moved = 0.5 * PLACES + torch.tensor([7.0, 30.0])
    moved[0, 0] = 1000.0
    logits, same = (module(pose, given, torch.zeros(1, 2)) for pose in (PLACES, moved))
    torch.testing.assert_close(logits, same, atol=1e-4, rtol=0)
    assert logits[0].isfinite().all() and logits[0].std() > 0.01


class FixedStudent(PoseNetwork):
    """A student with fixed heatmaps of joints at these places."""

    pyramid_channels = (2, 2, 2)

    def __init__(self, places: Tensor) -> None:
        super().__init__()
        self.maps = nn.Parameter(maps_of(places))

    def forward(self, crops: Tensor) -> PoseFeatures:
        pyramid = tuple(torch.zeros(1, 2, 96 // s, 64 // s) for s in (16, 8, 4))
        return PoseFeatures(self.maps, pyramid)


def estimator_of(five: Skeleton, mirror_pairs: bool) -> RefinedPose:
    torch.manual_seed(0)
    refiner = IgpGcn(
        five, FixedStudent.pyramid_channels, width=8, candidates=3, mirror_pairs=mirror_pairs
    )
    return RefinedPose(FixedStudent(PLACES), Dark(CROP, (24, 16)), refiner).eval()


def test_given_pose_is_refined_after_its_swaps_and_keeps_its_scores(
    five: Skeleton,
) -> None:
    crops, scores = torch.zeros(1, 3, *CROP), torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5]])
    pose, kept = estimator_of(five, mirror_pairs=True)(crops, (PLACES[:, BOTH], scores))
    assert torch.equal(pose, PLACES) and torch.equal(kept, scores)


def test_students_own_pose_is_not_resolved(five: Skeleton) -> None:
    crops = torch.zeros(1, 3, *CROP)
    with_resolver, without = (estimator_of(five, mirror_pairs=m) for m in (True, False))
    for output, other in zip(with_resolver(crops), without(crops), strict=True):
        assert torch.equal(output, other)
    names = set(with_resolver.state_dict()) - set(without.state_dict())
    assert names and all(name.startswith("refiner.mirror_pairs.") for name in names)


def test_skeleton_without_pairs_has_no_swap_resolver(
    five: Skeleton,
) -> None:
    chain = dataclasses.replace(five, flip_pairs=())
    refiner = IgpGcn(chain, FixedStudent.pyramid_channels, width=8, mirror_pairs=True)
    assert refiner.mirror_pairs is None
    crops, scores = torch.zeros(1, 3, *CROP), torch.ones(1, 5)
    estimator = RefinedPose(FixedStudent(PLACES), Dark(CROP, (24, 16)), refiner).eval()
    assert torch.equal(estimator(crops, (PLACES[:, BOTH], scores))[0], PLACES[:, BOTH])


def test_resolving_swaps_passes_no_gradient(five: Skeleton) -> None:
    estimator = estimator_of(five, mirror_pairs=True)
    assert estimator.refiner is not None and estimator.refiner.mirror_pairs is not None
    start = PLACES[:, BOTH].clone().requires_grad_()
    resolved = estimator.refiner.mirror_pairs.resolve_swaps(
        estimator.student.maps, start, GIVEN, CROP
    )
    assert torch.equal(resolved, PLACES) and not resolved.requires_grad


def test_every_shipped_skeleton_has_a_swap_resolver() -> None:
    for skeleton in (COCO, CROWDPOSE):
        pose = 64 * torch.rand(3, skeleton.num_joints, 2)
        maps = torch.rand(3, skeleton.num_joints, 24, 16)
        given = torch.ones(3, skeleton.num_joints, dtype=torch.bool)
        resolved = SwapResolver(skeleton).resolve_swaps(maps, pose, given, CROP)
        assert torch.equal(resolved.sort(dim=1).values, pose.sort(dim=1).values)
