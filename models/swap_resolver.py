"""Resolves left-right swaps in a pose that another method predicted.

Such a pose has its joints at the right places but under the labels of the wrong side. There are
2^P labelings, one for each subset of the skeleton's first P left-right pairs that may be swapped;
later pairs keep their labels. A small network rates how plausible the body is under each
labeling, and the student's heatmaps show which label fits each place. It is the first step of
stage 2 and applies to given poses only.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from models.pose_features import sample_features
from models.skeleton import Skeleton

MAX_PAIRS = 8
"""Largest P. COCO has 8 pairs, which make 256 labelings."""
MARGIN = 4.0
"""Log-odds by which a labeling must beat the given one, for each pair that it swaps."""
WIDTHS = (128, 64)
"""Channels of the network's hidden layers."""
_FLOOR = 0.01
"""Heatmap values below this are noise and count as this much."""
_TINY = 1e-6


class SwapResolver(nn.Module):
    """Finds the most plausible left-right labeling of a pose; keeps the given one if in doubt."""

    def __init__(self, skeleton: Skeleton) -> None:
        """Start with a network that rates all labelings alike, so that only the heatmaps count.

        Raises:
            ValueError: the skeleton has no pairs.
        """
        super().__init__()
        pairs = skeleton.flip_pairs[:MAX_PAIRS]
        if not pairs:
            raise ValueError(
                f"a skeleton must have flip_pairs to resolve left-right swaps, got none "
                f"({skeleton.name}); change the skeleton or set refine.start=student"
            )
        swaps = list(itertools.product((False, True), repeat=len(pairs)))
        orders = [list(range(skeleton.num_joints)) for _ in swaps]
        for order, labeling in zip(orders, swaps, strict=True):
            for (left, right), is_swapped in zip(pairs, labeling, strict=True):
                if is_swapped:
                    order[left], order[right] = right, left
        self.pairs: Tensor
        self.swaps: Tensor
        self.orders: Tensor
        # L labelings: the pairs that each swaps, and the order in which it takes the joints.
        self.register_buffer("pairs", torch.tensor(pairs), persistent=False)  # (P, 2)
        self.register_buffer("swaps", torch.tensor(swaps), persistent=False)  # (L, P)
        self.register_buffer("orders", torch.tensor(orders), persistent=False)  # (L, K)
        self.trust = nn.Parameter(torch.ones(len(pairs)))
        widths = (3 * skeleton.num_joints, *WIDTHS)
        layers = [
            layer
            for inputs, outputs in itertools.pairwise(widths)
            for layer in (nn.Linear(inputs, outputs), nn.ReLU())
        ]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], 1, bias=False)  # a bias would not change the softmax
        nn.init.zeros_(self.head.weight)

    def forward(self, keypoints_crop: Tensor, is_given: Tensor, evidence: Tensor) -> Tensor:
        """Compute the labelings' logits (B, L); -inf where one swaps a joint that is not given.

        Args:
            keypoints_crop: (B, K, 2); only joints with ``is_given`` (B, K) count.
            evidence: (B, P), from ``heatmap_evidence``.
        """
        counts = is_given.to(keypoints_crop)[..., None]
        number = counts.sum(dim=1, keepdim=True).clamp_min(1)
        centered = keypoints_crop - (keypoints_crop * counts).sum(dim=1, keepdim=True) / number
        distances = centered.square().sum(dim=-1, keepdim=True).sqrt()
        size = (distances * counts).sum(dim=1, keepdim=True) / number
        pose = torch.cat((centered / size.clamp_min(_TINY) * counts, counts), dim=-1)  # (B, K, 3)
        logits = self.head(self.body(pose[:, self.orders].flatten(2)))[..., 0]  # (B, L)
        logits = logits - (evidence * self.trust) @ self.swaps.to(evidence).T
        is_fixed = ~is_given[:, self.pairs].all(dim=2)  # (B, P)
        return logits.masked_fill((is_fixed[:, None] & self.swaps).any(dim=2), -torch.inf)

    def heatmap_evidence(
        self, heatmaps: Tensor, keypoints_crop: Tensor, crop_size: tuple[int, int]
    ) -> Tensor:
        """Measure how much the heatmaps (B, K, H, W) favor each pair's given labels, (B, P).

        This is the log-ratio between a joint's own heatmap and its partner's at the joint's place,
        summed over both joints of the pair.
        """
        maps = sample_features(heatmaps, keypoints_crop, crop_size).clamp_min(_FLOOR).log()
        left, right = self.pairs.unbind(dim=1)
        own = maps[:, left, left] + maps[:, right, right]
        return own - maps[:, left, right] - maps[:, right, left]

    @torch.no_grad()
    def resolve_swaps(
        self,
        heatmaps: Tensor,
        keypoints_crop: Tensor,
        is_given: Tensor,
        crop_size: tuple[int, int],
    ) -> Tensor:
        """Return the keypoints (B, K, 2) under the best labeling, without gradient.

        A labeling other than the given one must be better by ``MARGIN`` for each pair it swaps,
        and it swaps only pairs whose two joints are given.
        """
        evidence = self.heatmap_evidence(heatmaps, keypoints_crop, crop_size)
        logits = self(keypoints_crop, is_given, evidence)
        best = (logits - MARGIN * self.swaps.sum(dim=1)).argmax(dim=1)
        order = self.orders[best][..., None].expand(-1, -1, 2)
        return keypoints_crop.gather(1, order)
