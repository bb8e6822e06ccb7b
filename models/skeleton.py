"""Skeletons: joints, the limbs that connect them, left-right pairs and OKS sigmas."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Collection

import torch
from torch import Tensor

from models.joint_names import split_side


@dataclasses.dataclass(frozen=True)
class Skeleton:
    """The joints of one annotation scheme; K always follows the order of ``joints``."""

    name: str
    joints: tuple[str, ...]
    edges: tuple[tuple[int, int], ...]
    """Pairs of joint indices connected by a limb."""
    flip_pairs: tuple[tuple[int, int], ...]
    """Left-right pairs of joint indices, which a mirrored image exchanges."""
    oks_sigmas: tuple[float, ...]
    """COCO's sigma of each joint: the annotators' spread over the root of the person's area."""
    upper_body: tuple[int, ...]
    """Indices of the joints above the hips, for half-body augmentation."""
    stand_ins: tuple[tuple[str, str], ...] = ()
    """Pairs of a joint that other schemes may lack and a nearby joint that they have: a heatmap
    head trained on such a scheme starts the first from the second one's weights."""

    def __post_init__(self) -> None:
        if len(self.oks_sigmas) != self.num_joints:
            raise ValueError(
                f"a skeleton needs one OKS sigma per joint, got {len(self.oks_sigmas)} sigmas for "
                f"{self.num_joints} joints ({self.name}); change oks_sigmas"
            )
        used = [index for pair in (*self.edges, *self.flip_pairs) for index in pair]
        outside = [i for i in (*used, *self.upper_body) if not 0 <= i < self.num_joints]
        if outside:
            raise ValueError(
                f"edges, flip_pairs and upper_body must name joints 0 to {self.num_joints - 1}, "
                f"got {outside} ({self.name})"
            )

    @property
    def num_joints(self) -> int:
        return len(self.joints)

    @property
    def flip_order(self) -> tuple[int, ...]:
        """The joint order of a mirrored pose: ``mirrored = keypoints[flip_order]``."""
        order = list(range(self.num_joints))
        for left, right in self.flip_pairs:
            order[left], order[right] = right, left
        return tuple(order)

    def adjacency(self) -> Tensor:
        """Build the matrix (K, K): 1 where joints share an edge or are the same, 0 elsewhere."""
        matrix = torch.eye(self.num_joints)
        for start, end in self.edges:
            matrix[start, end] = matrix[end, start] = 1.0
        return matrix


COCO = Skeleton(
    name="coco",
    joints=(
        "nose",
        "left_eye",
        "right_eye",
        "left_ear",
        "right_ear",
        "left_shoulder",
        "right_shoulder",
        "left_elbow",
        "right_elbow",
        "left_wrist",
        "right_wrist",
        "left_hip",
        "right_hip",
        "left_knee",
        "right_knee",
        "left_ankle",
        "right_ankle",
    ),
    edges=(
        (0, 1),
        (0, 2),
        (1, 2),
        (1, 3),
        (2, 4),
        (3, 5),
        (4, 6),
        (5, 6),
        (5, 7),
        (6, 8),
        (7, 9),
        (8, 10),
        (5, 11),
        (6, 12),
        (11, 12),
        (11, 13),
        (12, 14),
        (13, 15),
        (14, 16),
    ),
    flip_pairs=((1, 2), (3, 4), (5, 6), (7, 8), (9, 10), (11, 12), (13, 14), (15, 16)),
    oks_sigmas=(
        0.026,
        0.025,
        0.025,
        0.035,
        0.035,
        0.079,
        0.079,
        0.072,
        0.072,
        0.062,
        0.062,
        0.107,
        0.107,
        0.087,
        0.087,
        0.089,
        0.089,
    ),
    upper_body=tuple(range(11)),
)

CROWDPOSE = Skeleton(
    name="crowdpose",
    joints=(
        "left_shoulder",
        "right_shoulder",
        "left_elbow",
        "right_elbow",
        "left_wrist",
        "right_wrist",
        "left_hip",
        "right_hip",
        "left_knee",
        "right_knee",
        "left_ankle",
        "right_ankle",
        "head",
        "neck",
    ),
    edges=(
        (12, 13),
        (13, 0),
        (13, 1),
        (0, 1),
        (0, 2),
        (1, 3),
        (2, 4),
        (3, 5),
        (0, 6),
        (1, 7),
        (6, 7),
        (6, 8),
        (7, 9),
        (8, 10),
        (9, 11),
    ),
    flip_pairs=((0, 1), (2, 3), (4, 5), (6, 7), (8, 9), (10, 11)),
    oks_sigmas=(
        0.079,
        0.079,
        0.072,
        0.072,
        0.062,
        0.062,
        0.107,
        0.107,
        0.087,
        0.087,
        0.089,
        0.089,
        0.079,
        0.079,
    ),
    upper_body=(0, 1, 2, 3, 4, 5, 12, 13),
    stand_ins=(("head", "nose"), ("neck", "left_shoulder")),
)

SKELETONS = {skeleton.name: skeleton for skeleton in (COCO, CROWDPOSE)}


def shared_joints(first: Skeleton, second: Skeleton) -> list[tuple[int, int]]:
    """List index pairs (in first, in second) of the joints in both, in the first one's order.

    Equal names are matched first, then those that differ in spelling alone: ``LeftEye`` is
    ``left_eye``.
    """
    pairs = {
        index: second.joints.index(joint)
        for index, joint in enumerate(first.joints)
        if joint in second.joints
    }
    ours, theirs = _by_side_and_place(first, pairs), _by_side_and_place(second, pairs.values())
    pairs |= {ours[key]: theirs[key] for key in ours.keys() & theirs.keys()}
    return sorted(pairs.items())


def _by_side_and_place(skeleton: Skeleton, skip: Collection[int]) -> dict[tuple[str, str], int]:
    """Return the index of each joint by ``split_side``, without joints that are equal by it."""
    keys = {i: split_side(joint) for i, joint in enumerate(skeleton.joints) if i not in skip}
    counts = collections.Counter(keys.values())
    return {key: index for index, key in keys.items() if counts[key] == 1}


def rows_from(trained: Skeleton, wanted: Skeleton) -> list[int | None]:
    """Return, for each joint of ``wanted``, the row of a ``trained`` heatmap head to start from.

    This is the joint of the same name or, if there is none, its stand-in: CrowdPose's head starts
    from COCO's nose, its neck from the left shoulder. None if ``trained`` has neither.
    """
    rows: list[int | None] = [None] * wanted.num_joints
    stand_ins = dict(wanted.stand_ins)
    for index, joint in enumerate(wanted.joints):
        if stand_ins.get(joint) in trained.joints:
            rows[index] = trained.joints.index(stand_ins[joint])
    for own, other in shared_joints(wanted, trained):
        rows[own] = other
    return rows
