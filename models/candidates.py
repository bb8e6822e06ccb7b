"""Which of the student's peaks are this person's: level 0 of stage 2.

Where people crowd, a joint's highest peak is often another person's, and the right one the next.
Nodes are (joint, candidate). Along every limb each candidate hears from the candidates at the
other end, the limb's vector being the edge's feature, so that those of one body find one another.
Where another method's pose is given, its joints are candidates too, the first ones: the student's
peaks mend what is wrong in it, and so does, where left and right are swapped, the given place of
the joint's mirror partner. Node features are (B, K, M, C), a candidate is x, y in crop pixels and
the height of the student's map there; height 0 stands for no candidate.
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
"""How many limbs far a candidate hears of others."""
NODE_CHANNELS = 7
LIMB_CHANNELS = 4
LOWEST_GIVEN = 1e-3
"""Height of a given joint where the student's map has less; it is a candidate all the same."""
_TINY = 1e-6
_FLOOR = 0.01
"""Height below which a map says nothing: there its ratios to others are those of noise."""


class Choice(NamedTuple):
    """One of the candidates of each joint."""

    keypoints_crop: Tensor
    """(B, K, 2)."""
    scores: Tensor
    """The heights of the chosen candidates, (B, K)."""
    logits: Tensor | None
    """(B, K, M), -inf where there is no candidate; None where there is nothing to choose."""


def read_candidates(
    codec: HeatmapCodec,
    features: PoseFeatures,
    count: int,
    given: tuple[Tensor, Tensor] | None = None,
    flip_order: Sequence[int] | None = None,
) -> Tensor:
    """The candidates for each joint, (B, K, count, 3): the given one, then the student's peaks.

    The first of the peaks is what the codec's ``read`` gives. A given joint's height is that of
    the student's map at its place, for a method's own scores mean something else. With more than
    one candidate, a given pose adds one more: where the joint's mirror partner was given.

    Args:
        given: another method's keypoints_crop (B, K, 2) and scores (B, K); a joint of score 0 is
            not given and has one more peak instead.
        flip_order: the skeleton's, for that one more candidate; None goes without.
    """
    keypoints_crop, scores = codec.decode_features(features)
    own = torch.cat((keypoints_crop, scores[..., None]), dim=-1)[:, :, None]
    if count > 1:
        own = torch.cat((own, codec.decode_feature_modes(features, count)[:, :, 1:, :3]), dim=2)
    if given is None:
        return own
    places, scores = given
    is_given = scores > 0

    def candidate(at: Tensor, counts: Tensor) -> Tensor:
        maps = sample_features(features.heatmaps, at, codec.input_size)  # (B, K, K)
        heights = maps.diagonal(dim1=1, dim2=2).clamp_min(LOWEST_GIVEN)
        return torch.cat((at, torch.where(counts, heights, 0.0)[..., None]), dim=-1)[:, :, None]

    first = torch.cat((candidate(places, is_given), own[:, :, :-1]), dim=2)
    candidates = torch.where(is_given[..., None, None], first, own)
    if count == 1 or flip_order is None:
        return candidates
    order = list(flip_order)
    is_paired = torch.tensor([a != b for a, b in enumerate(order)], device=places.device)
    can_swap = is_paired & is_given & is_given[:, order]
    return torch.cat((candidates, candidate(places[:, order], can_swap)), dim=2)


class LimbMessages(nn.Module):
    """One round: a candidate hears the most that any at a limb's other end has to say."""

    def __init__(self, skeleton: Skeleton, channels: int, dropout: float) -> None:
        super().__init__()
        starts, ends = _both_ways(skeleton)
        hears = F.one_hot(ends, skeleton.num_joints).T.float()  # (K, E)
        hears = hears / hears.sum(dim=1, keepdim=True).clamp_min(1)
        self.starts: Tensor
        self.ends: Tensor
        self.hears: Tensor
        self.register_buffer("starts", starts, persistent=False)
        self.register_buffer("ends", ends, persistent=False)
        self.register_buffer("hears", hears, persistent=False)
        self.speaker = nn.Linear(channels, channels)
        self.listener = nn.Linear(channels, channels)
        self.limb = nn.Parameter(torch.empty(len(starts), LIMB_CHANNELS, channels))
        nn.init.normal_(self.limb)
        self.message = nn.Linear(channels, channels)
        self.update = nn.Linear(2 * channels, channels)
        self.norm = nn.LayerNorm(channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, nodes: Tensor, limbs: Tensor, is_there: Tensor) -> Tensor:
        """The nodes (B, K, M, C) after one round.

        Args:
            limbs: features of the vectors between the candidates of each directed edge's ends,
                (B, E, M at the end, M at the start, LIMB_CHANNELS).
            is_there: whether a node is a candidate, (B, K, M); others say nothing.
        """
        said = self.speaker(nodes)[:, self.starts, None]  # (B, E, 1, M, C)
        heard = self.listener(nodes)[:, self.ends, :, None]  # (B, E, M, 1, C)
        geometry = limbs @ self.limb[:, None]  # (B, E, M, M, C)
        messages = F.relu(self.message(F.relu(said + heard + geometry)))
        messages = messages * is_there[:, self.starts, None, :, None]
        loudest = messages.amax(dim=3)  # (B, E, M, C)
        received = torch.einsum("ke,bemc->bkmc", self.hears, loudest)
        change = F.relu(self.update(torch.cat((nodes, received), dim=-1)))
        out: Tensor = self.norm(nodes + self.dropout(change))
        return out


class CandidateChooser(nn.Module):
    """Untrained, it takes every joint's first candidate: the given one, or the highest peak."""

    def __init__(
        self, skeleton: Skeleton, feature_channels: int, *, width: int, dropout: float
    ) -> None:
        super().__init__()
        starts, ends = _both_ways(skeleton)
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
        self.head = nn.Linear(width, 1, bias=False)  # a softmax feels no bias
        nn.init.zeros_(self.head.weight)

    def forward(
        self, features: PoseFeatures, candidates: Tensor, crop_size: tuple[int, int]
    ) -> Tensor:
        """Logits (B, K, M) of each joint's candidates; -inf where there is none.

        What is learned adds to the log of a peak's height, as a share of the first one's. A joint
        without any candidate keeps the first.

        Args:
            features: the student's, of whose pyramid the finest map is read.
            candidates: (B, K, M, 3), as ``read_candidates`` gives them.
        """
        height, width = crop_size
        joints, count = candidates.shape[1:3]
        heights = candidates[..., 2]
        is_there = heights > 0
        share = (heights.clamp_min(_TINY) / heights[:, :, :1].clamp_min(_TINY)).clamp(_TINY, 1.0)
        center = candidates.new_tensor((width / 2, height / 2))
        places = (candidates[..., :2] - center) / height  # (B, K, M, 2)
        at = candidates[..., :2].flatten(1, 2)
        seen = self.project(sample_features(features.pyramid[-1], at, crop_size))
        seen = seen.unflatten(1, (joints, count))
        maps = sample_features(features.heatmaps, at, crop_size).unflatten(1, (joints, count))
        evidence = torch.stack((heights, share, *self._compared(heights, maps)), dim=-1)
        own = torch.cat((places, evidence), dim=-1)
        is_first = torch.arange(count, device=heights.device) == 0
        known = self.joint + is_first[:, None] * self.first  # (K, M, width)
        nodes = F.relu(self.enter(torch.cat((own, seen), dim=-1)) + known)
        limbs = self._limbs(places)
        for messages in self.rounds:
            nodes = messages(nodes, limbs, is_there)
        logits = share.log() + self.head(nodes)[..., 0]
        return logits.masked_fill(~(is_there | is_first), -torch.inf)

    def choose(
        self, features: PoseFeatures, candidates: Tensor, crop_size: tuple[int, int]
    ) -> Choice:
        """The candidate of the highest logit, of equal ones the first.

        In training too: a mean of candidates, weighted by their softmax, lies between two people,
        where no pose ever starts. The softmax is in the loss.
        """
        logits = self(features, candidates, crop_size)
        best = logits.argmax(dim=2)[..., None, None].expand(-1, -1, 1, 3)
        chosen = candidates.gather(2, best)[:, :, 0]
        return Choice(chosen[..., :2], chosen[..., 2], logits)

    def _compared(self, heights: Tensor, maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What tells that a candidate (B, K, M) is wrong, whatever put it there.

        The height of the mirror partner's map (of a joint without partner its own), and the logs
        of the candidate's height over that and over the highest candidate's.

        Args:
            maps: all joints' maps at the candidates, (B, K, M, K).
        """
        other = torch.einsum("bkmj,kj->bkm", maps, self.partner).clamp_min(0)
        best = heights.amax(dim=2, keepdim=True).clamp_min(0)
        log = (heights.clamp_min(0) + _FLOOR).log()
        return other, log - (other + _FLOOR).log(), log - (best + _FLOOR).log()

    def _limbs(self, places: Tensor) -> Tensor:
        """What is known of the vector from each start to each end: itself, its length, and 1."""
        starts, ends = places[:, self.starts], places[:, self.ends]
        vectors = ends[:, :, :, None] - starts[:, :, None]  # (B, E, M, M, 2)
        lengths = vectors.square().sum(dim=-1, keepdim=True).sqrt()
        return torch.cat((vectors, lengths, torch.ones_like(lengths)), dim=-1)


def _both_ways(skeleton: Skeleton) -> tuple[Tensor, Tensor]:
    """Start and end of every directed edge, (E,) each: twice the skeleton's edges."""
    edges = torch.tensor(skeleton.edges)
    starts, ends = torch.cat((edges, edges.flip(1))).unbind(dim=1)
    return starts, ends
