"""IGP-GCN: moves a pose level by level, reading image features where its joints currently are.

The network of stage 2. Before the levels it may resolve left-right swaps (swap_resolver.py) and
choose among several candidates for each joint (candidates.py). The graph layers are those of
SemGCN (Zhao et al., CVPR 2019) as used by OPEC-Net (Qiu et al., ECCV 2020), under their state-dict
names. Node features are (B, K, C) throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.candidates import MAX_CANDIDATES, CandidateChooser, Choice, read_candidates
from models.codecs.codec import HeatmapCodec
from models.pose_features import PoseFeatures, sample_features
from models.skeleton import Skeleton
from models.swap_resolver import SwapResolver

MAX_DEPTH = 6


class SemGraphConv(nn.Module):
    """A graph convolution with a matrix for the joint, one for its neighbors, and edge weights."""

    def __init__(self, in_channels: int, out_channels: int, adjacency: Tensor) -> None:
        """Start with equal weights for all edges of a joint.

        Args:
            in_channels: input channels of a node.
            out_channels: output channels of a node.
            adjacency: (K, K), nonzero where joints are connected; each is connected to itself.
        """
        super().__init__()
        self.num_joints = len(adjacency)
        rows, columns = adjacency.nonzero().unbind(dim=1)
        self.W = nn.Parameter(torch.empty(2, in_channels, out_channels))
        self.e = nn.Parameter(torch.ones(len(rows)))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        nn.init.xavier_uniform_(self.W[0], gain=2**0.5)
        nn.init.xavier_uniform_(self.W[1], gain=2**0.5)
        self.rows: Tensor
        self.columns: Tensor
        self.off_diagonal: Tensor
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("columns", columns, persistent=False)
        self.register_buffer("off_diagonal", 1 - torch.eye(self.num_joints), persistent=False)

    def forward(self, nodes: Tensor) -> Tensor:
        """Mix each node (B, K, in) with its neighbors into (B, K, out)."""
        no_edges = self.e.new_full((self.num_joints, self.num_joints), -9e15)
        logits = no_edges.index_put((self.rows, self.columns), self.e)
        weights = logits.softmax(dim=1)
        own, neighbor = (nodes @ matrix for matrix in self.W.unbind())
        neighbor_weights = (weights * self.off_diagonal).expand(nodes.shape[0], -1, -1)
        aggregated = torch.bmm(neighbor_weights, neighbor)
        return torch.addcmul(aggregated + self.bias, weights.diagonal()[:, None], own)


class GraphConv(nn.Module):
    """A graph convolution, batch norm over people and joints, ReLU and dropout."""

    def __init__(
        self, in_channels: int, out_channels: int, adjacency: Tensor, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.gconv = SemGraphConv(in_channels, out_channels, adjacency)
        self.bn = nn.BatchNorm1d(out_channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, nodes: Tensor) -> Tensor:
        return self.dropout(F.relu(_per_channel(self.bn, self.gconv(nodes))))


class NodeAttention(nn.Module):
    """Adds each joint's features scaled by a gate, computed from the mean over all joints."""

    def __init__(self, channels: int, num_joints: int) -> None:
        super().__init__()
        self.squeeze = nn.Sequential(
            nn.Linear(channels, channels // 4),
            nn.ReLU(),
            nn.Linear(channels // 4, num_joints),
            nn.Sigmoid(),
        )

    def forward(self, nodes: Tensor) -> Tensor:
        gates = self.squeeze(nodes.mean(dim=1))  # (B, K)
        return nodes + nodes * gates[..., None]


class _PlainGraphConv(nn.Module):
    """A graph convolution without batch norm, under the published name ``gconv``."""

    def __init__(self, in_channels: int, out_channels: int, adjacency: Tensor) -> None:
        super().__init__()
        self.gconv = SemGraphConv(in_channels, out_channels, adjacency)

    def forward(self, nodes: Tensor) -> Tensor:
        out: Tensor = self.gconv(nodes)
        return out


class ResGraphBlock(nn.Module):
    """Two graph convolutions with half the channels between them, a shortcut, then attention."""

    def __init__(self, channels: int, adjacency: Tensor, dropout: float = 0.0) -> None:
        super().__init__()
        self.gconv1 = GraphConv(channels, channels // 2, adjacency, dropout)
        self.gconv2 = _PlainGraphConv(channels // 2, channels, adjacency)
        self.bn = nn.BatchNorm1d(channels)
        self.attention = NodeAttention(channels, len(adjacency))

    def forward(self, nodes: Tensor) -> Tensor:
        added = nodes + self.gconv2(self.gconv1(nodes))
        out: Tensor = self.attention(F.relu(_per_channel(self.bn, added)))
        return out


class RefineLevel(nn.Module):
    """One level: read features at the joints, pass messages along the skeleton, predict a step."""

    def __init__(
        self,
        skeleton: Skeleton,
        node_channels: int,
        feature_channels: int,
        *,
        depth: int,
        width: int,
        dropout: float,
        gate: bool,
    ) -> None:
        super().__init__()
        adjacency = skeleton.adjacency()
        self.project = nn.Linear(feature_channels, width)
        self.enter = GraphConv(node_channels + width, width, adjacency, dropout)
        self.blocks = nn.Sequential(
            *(ResGraphBlock(width, adjacency, dropout) for _ in range(depth))
        )
        self.head = nn.Linear(width, 2)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.gate = nn.Linear(width, 1) if gate else None

    def forward(self, nodes: Tensor, joint_features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the new nodes (B, K, width) and the step (B, K, 2) in units of crop height."""
        nodes = self.enter(torch.cat((nodes, self.project(joint_features)), dim=-1))
        nodes = self.blocks(nodes)
        step: Tensor = self.head(nodes)
        if self.gate is not None:
            step = step * self.gate(nodes).sigmoid()
        return nodes, step


class Refinement(NamedTuple):
    """The refiner's output for a batch, with the intermediate results that its losses need."""

    poses: list[Tensor]
    """Keypoints in crop pixels after each level, (B, K, 2) each; the last is the result."""
    choice: Choice
    """Where each joint started."""
    candidates: Tensor
    """What it was chosen from, (B, K, M, 3), as ``read_candidates`` returns them."""


class IgpGcn(nn.Module):
    """The refiner. An untrained one returns every pose unchanged, to the bit."""

    def __init__(
        self,
        skeleton: Skeleton,
        pyramid_channels: Sequence[int],
        *,
        levels: int = 3,
        depth: int = 2,
        width: int = 64,
        dropout: float = 0.0,
        gate: bool = True,
        candidates: int = 1,
        mirror_pairs: bool = False,
    ) -> None:
        """Build the levels, with zeros in the last layer of each.

        Args:
            skeleton: supplies the graph.
            pyramid_channels: channels of the student's features, coarse to fine.
            levels: steps of refinement; level by level they read that many of the finest maps.
            depth: residual graph blocks per level.
            width: channels of a node, a multiple of 4.
            dropout: share of node channels that training zeroes, 0 to 1.
            gate: scale each joint's step by a learned confidence.
            candidates: candidates per joint to choose from; with 1 there is no chooser.
            mirror_pairs: resolve left-right swaps of a given pose. No effect on a skeleton
                without flip_pairs.
        """
        super().__init__()
        if not 1 <= levels <= len(pyramid_channels):
            raise ValueError(
                f"levels must be 1 to {len(pyramid_channels)}, the maps in the student's pyramid, "
                f"got {levels=}; change refine.levels"
            )
        if not 1 <= depth <= MAX_DEPTH:
            raise ValueError(f"depth must be 1 to {MAX_DEPTH}, got {depth=}; change refine.depth")
        if width < 4 or width % 4:
            raise ValueError(f"width must be a multiple of 4, got {width=}; change refine.width")
        if not 1 <= candidates <= MAX_CANDIDATES:
            raise ValueError(
                f"candidates must be 1 to {MAX_CANDIDATES}, got {candidates=}; "
                "change refine.candidates"
            )
        self.num_levels = levels
        self.num_candidates = candidates
        self.flip_order = skeleton.flip_order
        node_channels = [3] + [width] * (levels - 1)
        self.levels = nn.ModuleList(
            RefineLevel(
                skeleton, nodes, features, depth=depth, width=width, dropout=dropout, gate=gate
            )
            for nodes, features in zip(node_channels, pyramid_channels[-levels:], strict=True)
        )
        self.chooser = None
        if candidates > 1:
            self.chooser = CandidateChooser(
                skeleton, pyramid_channels[-1], width=width, dropout=dropout
            )
        resolves_swaps = mirror_pairs and bool(skeleton.flip_pairs)
        self.mirror_pairs = SwapResolver(skeleton) if resolves_swaps else None

    def refine(
        self,
        codec: HeatmapCodec,
        features: PoseFeatures,
        given: tuple[Tensor, Tensor] | None = None,
        disturb: Callable[[Tensor], Tensor] | None = None,
    ) -> Refinement:
        """Run stage 2: resolve left-right swaps, choose where each joint starts, then move it.

        Args:
            codec: decodes the student's heatmaps; its input size is that of the crops.
            features: the student's output.
            given: another method's keypoints_crop (B, K, 2) and scores (B, K). A swapped pair
                exchanges its places; scores stay with their joints. None starts from the
                student's peaks alone.
            disturb: changes the candidates before one is chosen, in training only.
        """
        crop_size = codec.input_size
        if given is not None and self.mirror_pairs is not None:
            places, scores = given
            places = self.mirror_pairs.resolve_swaps(
                features.heatmaps, places, scores > 0, crop_size
            )
            given = places, scores
        candidates = read_candidates(codec, features, self.num_candidates, given, self.flip_order)
        if disturb is not None:
            candidates = disturb(candidates)
        choice = self.choose(features, candidates, crop_size)
        poses = self(features.pyramid, choice.keypoints_crop, choice.scores, crop_size)
        return Refinement(poses, choice, candidates)

    def choose(
        self, features: PoseFeatures, candidates: Tensor, crop_size: tuple[int, int]
    ) -> Choice:
        """Choose the place from which each joint starts.

        Args:
            features: the student's output: its heatmaps and the finest map of its pyramid.
            candidates: as ``read_candidates`` returns them, (B, K, ``num_candidates``, 3), or one
                more if a pose was given.
        """
        if self.chooser is None:
            return Choice(candidates[:, :, 0, :2], candidates[:, :, 0, 2], logits=None)
        return self.chooser.choose(features, candidates, crop_size)

    def forward(
        self,
        pyramid: Sequence[Tensor],
        keypoints_crop: Tensor,
        scores: Tensor,
        crop_size: tuple[int, int],
    ) -> list[Tensor]:
        """Move the pose once per level.

        No gradient flows from a level's pose to the level before: each learns its own step.

        Args:
            pyramid: the student's features, (B, C_l, h / s_l, w / s_l), coarse to fine.
            keypoints_crop: the pose to start from, (B, K, 2).
            scores: the heights of the student's heatmaps there, (B, K).
            crop_size: height and width of the crop in pixels.

        Returns:
            Keypoints in crop pixels after each level, (B, K, 2) each; the last is the result.
        """
        height, width = crop_size
        center = keypoints_crop.new_tensor((width / 2, height / 2))
        nodes = torch.cat(((keypoints_crop - center) / height, scores[..., None]), dim=-1)
        poses = []
        for level, features in zip(self.levels, pyramid[-self.num_levels :], strict=True):
            keypoints_crop = keypoints_crop.detach()
            joint_features = sample_features(features, keypoints_crop, crop_size)
            nodes, step = level(nodes, joint_features)
            keypoints_crop = keypoints_crop + step * height
            poses.append(keypoints_crop)
        return poses


def _per_channel(norm: nn.BatchNorm1d, nodes: Tensor) -> Tensor:
    out: Tensor = norm(nodes.flatten(0, 1))
    return out.view_as(nodes)
