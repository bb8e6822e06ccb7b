"""Which side of the body is which in a pose that another method gave.

A pose whose left and right are mixed up lies on the right places under the wrong names. All ways
of naming its P left-right pairs are held against one another: a small network says how well the
body hangs together under each, and the student's maps which name they see at each place. Before
anything else in stage 2, and of a given pose alone.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from models.pose_features import sample_features
from models.skeleton import Skeleton

MAX_PAIRS = 8
"""There are 2 to the power of the pairs ways; COCO has 8 pairs."""
MARGIN = 4.0
"""Log-odds by which an exchanged pair has to be likelier than the given names."""
WIDTHS = (128, 64)
_FLOOR = 0.01
"""Height below which a map says nothing."""
_TINY = 1e-6


class SwapResolver(nn.Module):
    """Gives the joints of a pose their names back; one with names as good as any is as it was."""

    def __init__(self, skeleton: Skeleton) -> None:
        """Start with the student's maps alone, each pair trusted as it is.

        Raises:
            ValueError: the skeleton has no pairs, or more than MAX_PAIRS.
        """
        super().__init__()
        pairs = skeleton.flip_pairs
        if not 1 <= len(pairs) <= MAX_PAIRS:
            raise ValueError(
                f"a skeleton must have 1 to {MAX_PAIRS} flip_pairs for their names to be held "
                f"against one another, got {len(pairs)} ({skeleton.name}); change the skeleton "
                "or set refine.start=student"
            )
        ways = list(itertools.product((False, True), repeat=len(pairs)))
        orders = [list(range(skeleton.num_joints)) for _ in ways]
        for order, way in zip(orders, ways, strict=True):
            for (left, right), is_exchanged in zip(pairs, way, strict=True):
                if is_exchanged:
                    order[left], order[right] = right, left
        self.pairs: Tensor
        self.ways: Tensor
        self.orders: Tensor
        self.register_buffer("pairs", torch.tensor(pairs), persistent=False)  # (P, 2)
        self.register_buffer("ways", torch.tensor(ways), persistent=False)  # (W, P)
        self.register_buffer("orders", torch.tensor(orders), persistent=False)  # (W, K)
        self.trust = nn.Parameter(torch.ones(len(pairs)))
        widths = (3 * skeleton.num_joints, *WIDTHS)
        layers = [
            layer
            for before, after in itertools.pairwise(widths)
            for layer in (nn.Linear(before, after), nn.ReLU())
        ]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], 1, bias=False)  # a softmax feels no bias
        nn.init.zeros_(self.head.weight)

    def forward(self, keypoints_crop: Tensor, is_given: Tensor, evidence: Tensor) -> Tensor:
        """Logits (B, W) of the ways; -inf of those that exchange what is not given.

        Args:
            keypoints_crop: (B, K, 2), of which ``is_given`` (B, K) joints count.
            evidence: (B, P), as ``evidence`` gives it.
        """
        counts = is_given.to(keypoints_crop)[..., None]
        number = counts.sum(dim=1, keepdim=True).clamp_min(1)
        centered = keypoints_crop - (keypoints_crop * counts).sum(dim=1, keepdim=True) / number
        distances = centered.square().sum(dim=-1, keepdim=True).sqrt()
        size = (distances * counts).sum(dim=1, keepdim=True) / number
        pose = torch.cat((centered / size.clamp_min(_TINY) * counts, counts), dim=-1)  # (B, K, 3)
        logits = self.head(self.body(pose[:, self.orders].flatten(2)))[..., 0]  # (B, W)
        logits = logits - (evidence * self.trust) @ self.ways.to(evidence).T
        cannot = ~is_given[:, self.pairs].all(dim=2)  # (B, P)
        return logits.masked_fill((cannot[:, None] & self.ways).any(dim=2), -torch.inf)

    def evidence(
        self, heatmaps: Tensor, keypoints_crop: Tensor, crop_size: tuple[int, int]
    ) -> Tensor:
        """How much the maps (B, K, H, W) prefer the given names of each pair, (B, P).

        The log of the height of a joint's own map at its place over that of its partner's, of
        both joints together.
        """
        maps = sample_features(heatmaps, keypoints_crop, crop_size).clamp_min(_FLOOR).log()
        left, right = self.pairs.unbind(dim=1)
        own = maps[:, left, left] + maps[:, right, right]
        return own - maps[:, left, right] - maps[:, right, left]

    @torch.no_grad()
    def named(
        self,
        heatmaps: Tensor,
        keypoints_crop: Tensor,
        is_given: Tensor,
        crop_size: tuple[int, int],
    ) -> Tensor:
        """The keypoints (B, K, 2) under the likeliest names; no gradient flows through the choice.

        Exchanged are those pairs that are given whole, and only where that is likelier than the
        given names by ``MARGIN`` for each.
        """
        evidence = self.evidence(heatmaps, keypoints_crop, crop_size)
        logits = self(keypoints_crop, is_given, evidence)
        best = (logits - MARGIN * self.ways.sum(dim=1)).argmax(dim=1)
        order = self.orders[best][..., None].expand(-1, -1, 2)
        return keypoints_crop.gather(1, order)
