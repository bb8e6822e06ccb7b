"""The network that chooses among candidates: its inputs, and what must not affect it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from models.candidates import CandidateChooser
from models.pose_features import PoseFeatures
from models.skeleton import Skeleton

CROP = (128, 96)


def example(skeleton: Skeleton, count: int = 3) -> tuple[CandidateChooser, PoseFeatures, Tensor]:
    """Build a chooser with a random head, features, and candidates, some of them missing."""
    torch.manual_seed(4)
    chooser = CandidateChooser(skeleton, 3, width=8, dropout=0.0).eval()
    nn.init.normal_(chooser.head.weight)
    candidates = torch.rand(6, skeleton.num_joints, count, 3) * torch.tensor([96.0, 128.0, 1.0])
    candidates[..., 2] = candidates[..., 2].sort(dim=2, descending=True).values
    candidates[0, :, 1:] = 0
    candidates[1] = 0
    candidates[2, 1, -1] = 0
    maps = torch.rand(6, skeleton.num_joints, 32, 24)
    return chooser, PoseFeatures(maps, (torch.randn(6, 3, 32, 24),)), candidates


@pytest.mark.parametrize("count", [2, 3])
def test_untrained_chooser_takes_the_first_candidate_to_the_bit(
    count: int, five: Skeleton
) -> None:
    _, features, candidates = example(five, count)
    untrained = CandidateChooser(five, 3, width=8, dropout=0.0)
    candidates[3, :, 1] = candidates[3, :, 0]  # among equals the first wins
    candidates[4, :, 1, 2] = candidates[4, :, 0, 2] * 1.05  # a fitted height may exceed the first
    choice = untrained.choose(features, candidates, CROP)
    assert torch.equal(choice.keypoints_crop, candidates[:, :, 0, :2])
    assert torch.equal(choice.scores, candidates[:, :, 0, 2])


def test_missing_candidate_is_never_chosen(five: Skeleton) -> None:
    chooser, features, candidates = example(five)
    nn.init.normal_(chooser.head.weight, std=100.0)
    choice = chooser.choose(features, candidates, CROP)
    assert choice.logits is not None
    first = torch.arange(3) == 0
    assert torch.equal(choice.logits > -torch.inf, (candidates[..., 2] > 0) | first)
    assert torch.equal(choice.keypoints_crop[:2], candidates[:2, :, 0, :2])
    best = choice.logits.argmax(dim=2)
    assert (best[2:] != 0).any()  # or the test would prove nothing
    for person, joint in ((2, 0), (4, 3)):
        chosen = candidates[person, joint, best[person, joint]]
        assert torch.equal(choice.keypoints_crop[person, joint], chosen[:2])
        assert choice.scores[person, joint] == chosen[2]


def test_missing_candidate_sends_no_message(five: Skeleton) -> None:
    chooser, features, candidates = example(five)
    moved = candidates.clone()
    moved[..., :2] += torch.where(candidates[..., 2:] > 0, 0.0, 20.0)
    before, after = (chooser(features, given, CROP) for given in (candidates, moved))
    others = candidates[..., 2] > 0
    assert torch.equal(before[others], after[others])
    moved = candidates.clone()
    moved[2:, 0, 1, 0] += 20.0
    after = chooser(features, moved, CROP)
    assert (before[2:, 1] != after[2:, 1])[others[2:, 1]].all()  # present candidates send messages


def test_peaks_below_zero_give_no_nan(five: Skeleton) -> None:
    """The heatmaps of an untrained student may be negative everywhere."""
    chooser, features, candidates = example(five)
    candidates[3, :, :, 2] = torch.tensor([-0.2, -0.3, -0.4])
    logits = chooser(features, candidates, CROP)
    assert torch.isfinite(logits[3, :, 0]).all()
    assert torch.equal(logits[3, :, 1:], torch.full_like(logits[3, :, 1:], -torch.inf))
    logits[3, :, 0].sum().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in chooser.parameters())


def test_messages_reach_as_many_limbs_as_there_are_rounds() -> None:
    chain = Skeleton(
        name="chain",
        joints=tuple("abcdef"),
        edges=((0, 1), (1, 2), (2, 3), (3, 4), (4, 5)),
        flip_pairs=(),
        oks_sigmas=(0.1,) * 6,
        upper_body=(0,),
    )
    chooser, features, candidates = example(chain)
    moved = candidates.clone()
    moved[3, 0, 0, 0] += 20.0
    differs = chooser(features, moved, CROP) != chooser(features, candidates, CROP)
    assert differs[3].any(dim=1).tolist() == [True, True, True, True, False, False]
    assert not differs[[0, 1, 2, 4, 5]].any()


def test_order_of_the_other_candidates_does_not_matter(five: Skeleton) -> None:
    chooser, features, candidates = example(five)
    swapped = candidates[:, :, [0, 2, 1]]
    logits, other = (chooser(features, given, CROP) for given in (candidates, swapped))
    torch.testing.assert_close(other, logits[:, :, [0, 2, 1]], atol=1e-5, rtol=0)


def test_features_are_sampled_at_every_candidate(five: Skeleton) -> None:
    chooser, features, candidates = example(five)
    maps, (finest,) = features.heatmaps, features.pyramid
    for read in (maps, finest):
        read.requires_grad_()
    logits = chooser(features, candidates, CROP)
    logits[5, 2, 1].backward()
    assert finest.grad is not None and maps.grad is not None
    x, y = (candidates[5, 2, 1, :2] / 4).long().tolist()
    assert finest.grad[5, :, y, x].abs().sum() > 0
    assert not finest.grad[:5].any()
    partner = five.flip_order[2]
    assert partner != 2 and maps.grad[5, partner, y, x] != 0
    assert not maps.grad[5, 2, y, x]  # its height is part of the candidate
