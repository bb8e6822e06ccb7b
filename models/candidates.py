"""Chooses which of the student's peaks belong to this person, before the refiner's levels.

In a crowd a joint's highest peak is often another person's, and the right one is the next. The
nodes of this graph network are (joint, candidate) pairs. Along every limb each candidate receives
messages from all candidates at the other end; the limb vector is the edge's feature, so that
candidates of one body can support one another.

If another method's pose is given, its joints are the first candidates: the student's peaks correct
their errors, and so does the given place of a joint's left-right partner if the two are swapped.

Node features are (B, K, M, C). A candidate is x, y in crop pixels and the height of the student's
heatmap there; height 0 marks a missing candidate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.codecs.codec import HeatmapCodec
from models.pose_features import PoseFeatures, sample_features
from models.skeleton import Skeleton

MAX_CANDIDATES = 3
ROUNDS = 3
"""Rounds of messages: each carries them one limb further."""
NODE_CHANNELS = 7
LIMB_CHANNELS = 4
LOWEST_GIVEN = 1e-3
"""Least height of a given joint, which remains a candidate even where the heatmap is lower."""
_TINY = 1e-6
_FLOOR = 0.01
"""Added to heights before their logs are compared, since ratios of lower ones are noise."""


class Choice(NamedTuple):
    """The chosen candidate of each joint."""

    keypoints_crop: Tensor
    """(B, K, 2)."""
    scores: Tensor
    """The heights of the chosen candidates, (B, K)."""
    logits: Tensor | None
    """(B, K, M), -inf for missing candidates; None if there was only one to choose from."""


def read_candidates(
    codec: HeatmapCodec,
    features: PoseFeatures,
    count: int,
    given: tuple[Tensor, Tensor] | None = None,
    flip_order: Sequence[int] | None = None,
) -> Tensor:
    """List each joint's candidates: the given joint, then the student's peaks, highest first.

    The first peak is where ``codec.decode_features`` puts the joint. A given joint's height is the
    student's heatmap value at its place, since other methods' scores have other meanings.

    Args:
        codec: decodes the student's heatmaps.
        features: the student's output.
        count: candidates per joint.
        given: another method's keypoints_crop (B, K, 2) and scores (B, K). A joint of score 0 is
            not given and has one more peak instead.
        flip_order: the skeleton's. With it, a given pose and ``count`` above 1, each joint gets
            one more candidate: where its left-right partner was given.

    Returns:
        Candidates (B, K, count, 3), or (B, K, count + 1, 3) with the partners'.
    """
    keypoints_crop, scores = codec.decode_features(features)
    peaks = torch.cat((keypoints_crop, scores[..., None]), dim=-1)[:, :, None]
    if count > 1:
        lower = codec.decode_feature_modes(features, count)[:, :, 1:, :3]
        peaks = torch.cat((peaks, lower), dim=2)
    if given is None:
        return peaks
    places, scores = given
    is_given = scores > 0

    def candidate(at: Tensor, counts: Tensor) -> Tensor:
        maps = sample_features(features.heatmaps, at, codec.input_size)  # (B, K, K)
        heights = maps.diagonal(dim1=1, dim2=2).clamp_min(LOWEST_GIVEN)
        return torch.cat((at, torch.where(counts, heights, 0.0)[..., None]), dim=-1)[:, :, None]

    given_first = torch.cat((candidate(places, is_given), peaks[:, :, :-1]), dim=2)
    candidates = torch.where(is_given[..., None, None], given_first, peaks)
    if count == 1 or flip_order is None:
        return candidates
    order = list(flip_order)
    is_paired = torch.tensor([a != b for a, b in enumerate(order)], device=places.device)
    can_swap = is_paired & is_given & is_given[:, order]
    return torch.cat((candidates, candidate(places[:, order], can_swap)), dim=2)


class LimbMessages(nn.Module):
    """One round of messages along all limbs, in both directions.

    A candidate takes, for each channel, the maximum over the messages from a limb's other end, and
    then the mean over its joint's limbs.
    """

    def __init__(self, skeleton: Skeleton, channels: int, dropout: float) -> None:
        super().__init__()
        starts, ends = _directed_edges(skeleton)
        edges_into = F.one_hot(ends, skeleton.num_joints).T.float()  # (K, E)
        edge_weights = edges_into / edges_into.sum(dim=1, keepdim=True).clamp_min(1)
        self.starts: Tensor
        self.ends: Tensor
        self.edge_weights: Tensor
        self.register_buffer("starts", starts, persistent=False)
        self.register_buffer("ends", ends, persistent=False)
        self.register_buffer("edge_weights", edge_weights, persistent=False)
        self.speaker = nn.Linear(channels, channels)
        self.listener = nn.Linear(channels, channels)
        self.limb = nn.Parameter(torch.empty(len(starts), LIMB_CHANNELS, channels))
        nn.init.normal_(self.limb)
        self.message = nn.Linear(channels, channels)
        self.update = nn.Linear(2 * channels, channels)
        self.norm = nn.LayerNorm(channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, nodes: Tensor, limbs: Tensor, is_present: Tensor) -> Tensor:
        """Update the nodes (B, K, M, C).

        Args:
            nodes: features of all candidates.
            limbs: features of the vectors between the candidates of each directed edge's ends,
                (B, E, M at the end, M at the start, LIMB_CHANNELS).
            is_present: False for missing candidates, (B, K, M), which send no message.
        """
        sender = self.speaker(nodes)[:, self.starts, None]  # (B, E, 1, M, C)
        receiver = self.listener(nodes)[:, self.ends, :, None]  # (B, E, M, 1, C)
        geometry = limbs @ self.limb[:, None]  # (B, E, M, M, C)
        messages = F.relu(self.message(F.relu(sender + receiver + geometry)))
        messages = messages * is_present[:, self.starts, None, :, None]
        strongest = messages.amax(dim=3)  # (B, E, M, C)
        aggregated = torch.einsum("ke,bemc->bkmc", self.edge_weights, strongest)
        change = F.relu(self.update(torch.cat((nodes, aggregated), dim=-1)))
        out: Tensor = self.norm(nodes + self.dropout(change))
        return out


class CandidateChooser(nn.Module):
    """Chooses one candidate per joint. Untrained, it takes the first: the given joint or peak."""

    def __init__(
        self, skeleton: Skeleton, feature_channels: int, *, width: int, dropout: float
    ) -> None:
        super().__init__()
        starts, ends = _directed_edges(skeleton)
        self.starts: Tensor
        self.ends: Tensor
        self.register_buffer("starts", starts, persistent=False)
        self.register_buffer("ends", ends, persistent=False)
        partner = F.one_hot(torch.tensor(skeleton.flip_order), skeleton.num_joints).float()
        self.partner: Tensor
        self.register_buffer("partner", partner, persistent=False)  # (K, K)
        self.project = nn.Linear(feature_channels, width)
        self.enter = nn.Linear(NODE_CHANNELS + width, width)
        self.joint = nn.Parameter(torch.zeros(skeleton.num_joints, 1, width))
        nn.init.normal_(self.joint, std=0.1)
        self.first = nn.Parameter(torch.zeros(width))
        self.rounds = nn.ModuleList(LimbMessages(skeleton, width, dropout) for _ in range(ROUNDS))
        self.head = nn.Linear(width, 1, bias=False)  # a bias would not change the softmax
        nn.init.zeros_(self.head.weight)

    def forward(
        self, features: PoseFeatures, candidates: Tensor, crop_size: tuple[int, int]
    ) -> Tensor:
        """Compute logits (B, K, M) of each joint's candidates; -inf for missing ones.

        A logit is the log of the candidate's height relative to the first one's, plus a learned
        term. A joint without any candidate keeps the first.

        Args:
            features: the student's output: its heatmaps and the finest map of its pyramid.
            candidates: (B, K, M, 3), as ``read_candidates`` returns them.
            crop_size: height and width of the crop in pixels.
        """
        height, width = crop_size
        joints, count = candidates.shape[1:3]
        heights = candidates[..., 2]
        is_present = heights > 0
        share = (heights.clamp_min(_TINY) / heights[:, :, :1].clamp_min(_TINY)).clamp(_TINY, 1.0)
        center = candidates.new_tensor((width / 2, height / 2))
        places = (candidates[..., :2] - center) / height  # (B, K, M, 2)
        at = candidates[..., :2].flatten(1, 2)
        image_features = self.project(sample_features(features.pyramid[-1], at, crop_size))
        image_features = image_features.unflatten(1, (joints, count))
        maps = sample_features(features.heatmaps, at, crop_size).unflatten(1, (joints, count))
        evidence = torch.stack((heights, share, *self._comparisons(heights, maps)), dim=-1)
        inputs = torch.cat((places, evidence, image_features), dim=-1)
        is_first = torch.arange(count, device=heights.device) == 0
        embedding = self.joint + is_first[:, None] * self.first  # (K, M, width)
        nodes = F.relu(self.enter(inputs) + embedding)
        limbs = self._limb_features(places)
        for messages in self.rounds:
            nodes = messages(nodes, limbs, is_present)
        logits = share.log() + self.head(nodes)[..., 0]
        return logits.masked_fill(~(is_present | is_first), -torch.inf)

    def choose(
        self, features: PoseFeatures, candidates: Tensor, crop_size: tuple[int, int]
    ) -> Choice:
        """Take the candidate with the highest logit; among equal ones the first.

        This holds in training too: a softmax-weighted mean of candidates would lie between two
        people, where no pose ever starts. The softmax is in the loss.
        """
        logits = self(features, candidates, crop_size)
        best = logits.argmax(dim=2)[..., None, None].expand(-1, -1, 1, 3)
        chosen = candidates.gather(2, best)[:, :, 0]
        return Choice(chosen[..., :2], chosen[..., 2], logits)

    def _comparisons(self, heights: Tensor, maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compare a candidate's height with its rivals', which shows errors of any origin.

        Args:
            heights: (B, K, M).
            maps: all joints' heatmaps at the candidates, (B, K, M, K).

        Returns:
            The height of the left-right partner's map there (the joint's own if it has none), and
            the log-ratios of the candidate's height to that and to the highest candidate's.
        """
        partner = torch.einsum("bkmj,kj->bkm", maps, self.partner).clamp_min(0)
        best = heights.amax(dim=2, keepdim=True).clamp_min(0)
        log = (heights.clamp_min(0) + _FLOOR).log()
        return partner, log - (partner + _FLOOR).log(), log - (best + _FLOOR).log()

    def _limb_features(self, places: Tensor) -> Tensor:
        """Features of the vector from each start to each end: itself, its length, and 1."""
        starts, ends = places[:, self.starts], places[:, self.ends]
        vectors = ends[:, :, :, None] - starts[:, :, None]  # (B, E, M, M, 2)
        lengths = vectors.square().sum(dim=-1, keepdim=True).sqrt()
        return torch.cat((vectors, lengths, torch.ones_like(lengths)), dim=-1)


def _directed_edges(skeleton: Skeleton) -> tuple[Tensor, Tensor]:
    """Start and end joint of every directed edge, (E,) each: twice the skeleton's edges."""
    edges = torch.tensor(skeleton.edges, dtype=torch.long).view(-1, 2)
    starts, ends = torch.cat((edges, edges.flip(1))).unbind(dim=1)
    return starts, ends
