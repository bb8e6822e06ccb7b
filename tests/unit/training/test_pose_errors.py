"""Pose errors: counted by kind, and poses disturbed with the same rates."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.skeleton import COCO, Skeleton
from study.training.batches import Labels
from study.training.pose_errors import (
    INVERSION,
    MISS,
    NEIGHBOR,
    PoseErrors,
    disturb,
    disturb_candidates,
    excess,
    measure_errors,
)

AREA = 10_000.0
PLACES = torch.tensor([[50.0, 10], [20, 60], [80, 60], [30, 120], [70, 120]])
"""Places of the five joints, far from one another by the OKS of this area."""
FAR = torch.tensor([400.0, 0.0])
"""Offset from a person to its neighbor."""
AWAY = torch.tensor([0.0, 700.0])
"""Offset from a joint to a place without people."""


def people(count: int) -> Labels:
    """Return fully labeled people with fully labeled neighbors."""
    truth = PLACES.expand(count, 5, 2).clone()
    seen = torch.full((count, 5), 2)
    return Labels(truth, seen, truth + FAR, seen.clone(), torch.full((count,), AREA))


def disturbed(pose: Tensor, labels: Labels, errors: PoseErrors, skeleton: Skeleton) -> Tensor:
    return disturb(pose, labels, errors, skeleton)[0]


def nothing() -> Tensor:
    return torch.zeros(5)


def errors_of(
    inversion: float = 0, neighbor: float = 0, miss: float = 0, jitter: float = 0
) -> PoseErrors:
    rates = torch.tensor([inversion, neighbor, miss])[:, None].expand(3, 5).clone()
    rates[INVERSION, 0] = 0  # the head has no other side
    return PoseErrors(rates, jitter=torch.full((5,), jitter), miss=torch.full((5,), 2.0))


def test_a_perfect_pose_has_no_errors(five: Skeleton) -> None:
    labels = people(4)
    truth = labels[0]
    errors = measure_errors(truth, labels, five)
    assert torch.equal(errors.rates, torch.zeros(3, 5))
    assert torch.equal(errors.jitter, nothing()) and torch.equal(errors.miss, nothing())


def test_each_kind_of_error_is_counted_as_itself(five: Skeleton) -> None:
    labels = people(10)
    truth = labels[0]
    pose = truth.clone()
    pose[:3, 1] = truth[:3, 2]  # the left hand on the right one
    pose[:2, 3] = truth[:2, 3] + FAR  # the foot of the neighbor
    pose[2, 3] = truth[2, 4] + FAR  # its other foot
    pose[:4, 0] = truth[:4, 0] + AWAY
    errors = measure_errors(pose, labels, five)
    expected = torch.zeros(3, 5)
    expected[INVERSION, 1], expected[NEIGHBOR, 3], expected[MISS, 0] = 0.3, 0.3, 0.4
    torch.testing.assert_close(errors.rates, expected)
    # root mean square per axis, over the root of the area: 700 / sqrt(2) / 100
    torch.testing.assert_close(errors.miss, torch.tensor([7 / 2**0.5, 0, 0, 0, 0]))


def test_jitter_is_the_root_mean_square_of_found_joints(five: Skeleton) -> None:
    labels = people(2)
    truth = labels[0]
    pose = truth.clone()
    pose[0, 3] += torch.tensor([3.0, 4.0])
    pose[1, 3] += torch.tensor([0.0, 1.0])
    pose[1, 4] += AWAY  # counts as a miss, not as jitter
    errors = measure_errors(pose, labels, five)
    expected = ((25 + 1) / 2 / 2) ** 0.5 / 100
    torch.testing.assert_close(errors.jitter, torch.tensor([0, 0, 0, expected, 0]))


def test_no_inversion_is_counted_if_the_other_side_is_unlabeled(five: Skeleton) -> None:
    labels = people(1)
    pose = labels[0].clone()
    pose[:, 1] = labels[0][:, 2]
    labels[1][:, 2] = 0
    errors = measure_errors(pose, labels, five)
    assert errors.rates[:, 1].tolist() == [0, 0, 1]


def test_joint_in_the_middle_of_the_body_never_inverts(five: Skeleton) -> None:
    labels = people(1)
    truth = labels[0]
    assert measure_errors(truth + AWAY, labels, five).rates[:, 0].tolist() == [0, 0, 1]


def test_rates_are_fractions_of_the_people_with_a_possible_error(five: Skeleton) -> None:
    truth, seen, neighbor, there, areas = people(8)
    there[2:] = 0  # six of eight stand alone
    seen[:4, 2] = 0  # four of eight have no right hand to confuse
    pose = truth.clone()
    pose[0] = neighbor[0]
    pose[4, 1] = truth[4, 2]
    errors = measure_errors(pose, Labels(truth, seen, neighbor, there, areas), five)
    assert errors.rates[NEIGHBOR, 3] == 0.5 and errors.rates[INVERSION, 1] == 0.25


def test_unlabeled_joints_have_no_errors_and_no_nan(five: Skeleton) -> None:
    truth, seen, neighbor, there, areas = people(3)
    seen, there = torch.zeros_like(seen), torch.zeros_like(there)
    errors = measure_errors(truth + AWAY, Labels(truth, seen, neighbor, there, areas), five)
    for value in (errors.rates, errors.jitter, errors.miss):
        assert torch.equal(value, torch.zeros_like(value))
    extra = excess(errors, errors)
    moved = disturb(truth, Labels(truth, seen, neighbor, there, areas), extra, five)[0]
    assert torch.equal(moved, truth)


def test_excess_of_equal_statistics_disturbs_nothing(five: Skeleton) -> None:
    labels = people(50)
    truth = labels[0]
    same = errors_of(0.2, 0.1, 0.3, 0.05)
    extra = excess(same, same)
    assert torch.equal(extra.rates, torch.zeros(3, 5)) and torch.equal(extra.jitter, nothing())
    assert torch.equal(disturbed(truth + 1, labels, extra, five), truth + 1)


def test_excess_by_hand() -> None:
    held_out, seen = errors_of(0.3, 0.1, 0.2, 0.05), errors_of(0.1, 0.1, 0.3, 0.03)
    extra = excess(held_out, seen)
    # of the 0.5 that lie right on seen people, 0.2 must invert; the other kinds are no rarer there
    torch.testing.assert_close(extra.rates[:, 1], torch.tensor([0.4, 0.0, 0.0]))
    torch.testing.assert_close(extra.jitter, torch.full((5,), 0.04))


def test_disturbed_poses_have_the_given_rates(five: Skeleton) -> None:
    torch.manual_seed(0)
    labels = people(6000)
    truth = labels[0]
    errors = errors_of(0.2, 0.1, 0.05)
    moved = disturbed(truth, labels, errors, five)
    found = measure_errors(moved, labels, five)
    torch.testing.assert_close(found.rates, errors.rates, atol=0.02, rtol=0)


def test_disturbed_poses_have_the_rates_despite_missing_labels_and_neighbors(
    five: Skeleton,
) -> None:
    torch.manual_seed(0)
    truth, seen, neighbor, there, areas = people(9000)
    seen[torch.rand(9000, 5) < 0.3] = 0
    there[torch.rand(9000) < 0.5] = 0
    errors = errors_of(0.2, 0.1, 0.05)
    moved = disturb(truth, Labels(truth, seen, neighbor, there, areas), errors, five)[0]
    found = measure_errors(moved, Labels(truth, seen, neighbor, there, areas), five)
    torch.testing.assert_close(found.rates, errors.rates, atol=0.02, rtol=0)


def test_disturbed_poses_have_the_given_jitter(five: Skeleton) -> None:
    torch.manual_seed(0)
    labels = people(6000)
    truth = labels[0]
    errors = PoseErrors(torch.zeros(3, 5), jitter=torch.full((5,), 0.01), miss=nothing())
    found = measure_errors(disturbed(truth, labels, errors, five), labels, five)
    torch.testing.assert_close(found.jitter, errors.jitter, atol=5e-4, rtol=0)
    assert not found.rates.any()


def test_lone_person_has_no_jump_and_an_unlabeled_joint_no_miss(
    five: Skeleton,
) -> None:
    torch.manual_seed(0)
    truth, seen, neighbor, there, areas = people(500)
    there[:], seen[:, 3] = 0, 0
    moved = disturb(
        truth, Labels(truth, seen, neighbor, there, areas), errors_of(0.0, 0.9, 0.1), five
    )[0]
    assert (moved[:, 3] == truth[:, 3]).all()
    share = (moved[:, 1] != truth[:, 1]).any(-1).float().mean().item()
    assert share == pytest.approx(0.1, abs=0.04)


def test_seed_determines_the_disturbance() -> None:
    truth = torch.rand(7, 17, 2, generator=torch.Generator().manual_seed(0)) * 100
    seen = torch.full((7, 17), 2)
    rates = torch.full((3, 17), 0.2)
    errors = PoseErrors(rates, jitter=torch.full((17,), 0.1), miss=torch.full((17,), 1.0))
    moved = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        areas = torch.full((7,), 900.0)
        moved.append(disturb(truth, Labels(truth, seen, truth, seen, areas), errors, COCO)[0])
    assert torch.equal(moved[0], moved[1]) and not torch.equal(moved[0], moved[2])


def candidates_of(pose: Tensor, count: int) -> Tensor:
    """Return ever lower peaks, the first at the pose, each next one a pixel further right."""
    steps = torch.arange(float(count))[:, None] * torch.tensor([1.0, 0.0])
    heights = (1 - 0.25 * torch.arange(float(count))).expand(*pose.shape[:2], count)
    return torch.cat((pose[:, :, None] + steps, heights[..., None]), dim=-1)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_first_candidate_is_disturbed_like_a_pose(count: int, five: Skeleton) -> None:
    labels = people(50)
    errors = errors_of(0.2, 0.2, 0.1, jitter=0.05)
    torch.manual_seed(0)
    moved = disturbed(labels[0], labels, errors, five)
    torch.manual_seed(0)
    given = candidates_of(labels[0], count)
    found = disturb_candidates(given, labels, errors, five)
    assert found.shape == given.shape
    assert torch.equal(found[:, :, 0, :2], moved)
    assert torch.equal(found[:, :, 0, 2], given[:, :, 0, 2])


def test_place_before_a_jump_is_the_second_candidate(five: Skeleton) -> None:
    torch.manual_seed(0)
    labels = people(400)
    given = candidates_of(labels[0], 3)
    found = disturb_candidates(given, labels, errors_of(neighbor=0.5), five)
    jumped = (found[:, :, 0, :2] != given[:, :, 0, :2]).any(dim=-1)
    assert 0.4 < jumped.float().mean() < 0.6
    assert torch.equal(found[~jumped], given[~jumped])
    assert torch.equal(found[jumped][:, 1, :2], given[jumped][:, 0, :2])
    assert torch.equal(found[jumped][:, 2], given[jumped][:, 1])
    heights = found[jumped][:, 1, 2]  # drawn from 0 to the first one's, which is 1
    assert 0 <= heights.min() < 0.05 and 0.95 < heights.max() < 1
    assert heights.mean().item() == pytest.approx(0.5, abs=0.04)


def test_jitter_and_misses_add_no_candidate(five: Skeleton) -> None:
    labels = people(50)
    given = candidates_of(labels[0], 3)
    found = disturb_candidates(given, labels, errors_of(miss=0.5, jitter=0.05), five)
    assert torch.equal(found[:, :, 1:], given[:, :, 1:])
