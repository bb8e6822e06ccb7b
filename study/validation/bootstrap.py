"""Bootstrap AP over people: match poses as the official evaluation does, then reweight.

Matches are kept person by person, so that AP of any weighting needs no second matching.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.skeleton import Skeleton
from study.config.schema import Kind
from study.data.annotations import AREA_OF_BOX
from study.data.coco_json import load_document
from study.metrics import OKS_THRESHOLDS, oks, read_truth

MOST_POSES = 20
"""Poses of an image that count, the best first."""
RECALLS = np.linspace(0, 1, 101)
"""Where precision is read off."""
LEVEL = 0.95
"""Of every interval."""
RESAMPLES = 1000
Score = Callable[[NDArray[np.float64]], float]
"""What a run gets where each of the U units counts as often as these weights say, (U,)."""


@dataclass(frozen=True)
class Matches:
    """D poses, the best first, at T thresholds, of people in U units that are drawn as one."""

    units: NDArray[np.int64]
    """(D, T): whose weight a pose has: the person's that it was matched with, else the person's
    that it is most like."""
    is_right: NDArray[np.bool_]
    """(D, T)."""
    counts: NDArray[np.bool_]
    """(D, T): False for poses of people who are to be ignored."""
    people: NDArray[np.float64]
    """(U,): people to be found."""


def match_people(
    ground_truth: Path, detections: Sequence[dict[str, Any]], skeleton: Skeleton, kind: Kind
) -> Matches:
    """The matches of an evaluation; args as ``study.metrics.average_precision``.

    A unit is a source person where every annotation names one (``source_id``), else an image.
    """
    document = read_truth(ground_truth, skeleton)
    people, images = document["annotations"], sorted(i["id"] for i in document["images"])
    sources = [a.get("source_id") for a in load_document(ground_truth)["annotations"]]
    has_sources = None not in sources
    places: dict[Any, int] = {}

    def unit_of(number: int, image: int) -> int:
        name = ("source", sources[number]) if has_sources else ("image", image)
        return places.setdefault(name, len(places))

    people_in: dict[int, list[int]] = {image: [] for image in images}
    for number, person in enumerate(people):
        people_in[person["image_id"]].append(number)
    found_in: dict[int, list[dict[str, Any]]] = {image: [] for image in images}
    for found in detections:
        found_in[found["image_id"]].append(found)
    parts, scores, wanted = [], [], []
    for image in images:
        numbers = people_in[image]
        units = np.array([unit_of(number, image) for number in numbers], np.int64)
        own = [people[number] for number in numbers]
        if not own:
            units = np.array([places.setdefault(("image", image), len(places))])
        wanted += [u for u, p in zip(units, own, strict=False) if not _is_ignored(p)]
        best = sorted(found_in[image], key=lambda pose: -pose["score"])[:MOST_POSES]
        if best:
            parts.append(_match_image(best, own, units, skeleton, kind))
            scores += [pose["score"] for pose in best]
    order = np.argsort(-np.array(scores), kind="stable")
    shape = (0, len(OKS_THRESHOLDS))
    joined = [
        np.concatenate(part)[order] if parts else np.zeros(shape, int)
        for part in (list(zip(*parts, strict=True)) if parts else [()] * 3)
    ]
    return Matches(
        units=joined[0].astype(np.int64),
        is_right=joined[1].astype(bool),
        counts=joined[2].astype(bool),
        people=np.bincount(np.array(wanted, np.int64), minlength=len(places)).astype(float),
    )


def weighted_ap(matches: Matches, weights: NDArray[np.float64]) -> float:
    """AP where each unit's people and poses count as often as its weight says, (U,), 0..1."""
    weight = weights[matches.units] * matches.counts
    right = np.cumsum(weight * matches.is_right, axis=0)
    every = np.cumsum(weight, axis=0)
    number = float(weights @ matches.people)
    if not len(right) or number <= 0:
        return 0.0
    precision = right / np.maximum(every, np.spacing(1))
    precision = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
    recall = right / number
    total = 0.0
    for threshold in range(recall.shape[1]):
        first = np.searchsorted(recall[:, threshold], RECALLS, side="left")
        reached = first[first < len(recall)]
        total += float(precision[reached, threshold].sum()) / len(RECALLS)
    return total / recall.shape[1]


def _is_ignored(person: dict[str, Any]) -> bool:
    return bool(person["num_keypoints"] == 0 or person["iscrowd"])


def _match_image(
    found: Sequence[dict[str, Any]],
    people: Sequence[dict[str, Any]],
    units: NDArray[np.int64],
    skeleton: Skeleton,
    kind: Kind,
) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.bool_]]:
    """Units, is_right and counts of an image's poses, the best first, each (D, T)."""
    thresholds = np.minimum(OKS_THRESHOLDS, 1 - 1e-10)
    shape = (len(found), len(thresholds))
    whose, is_right = np.full(shape, units[0]), np.zeros(shape, bool)
    counts = np.ones(shape, bool)
    if not people:
        return whose, is_right, counts
    similarity = _similarity(found, people, skeleton, kind)
    is_ignored = np.array([_is_ignored(person) for person in people])
    is_crowd = np.array([bool(person["iscrowd"]) for person in people])
    is_taken = np.zeros((len(thresholds), len(people)), bool)
    each = np.arange(len(thresholds))
    for pose in range(len(found)):
        is_free = (~is_taken | is_crowd) & (similarity[pose] >= thresholds[:, None])
        matched, person = np.zeros(len(thresholds), bool), np.zeros(len(thresholds), np.int64)
        for group in (is_ignored, ~is_ignored):  # whom one must find goes before the ignored
            open_to = np.where(is_free & group, similarity[pose], -1.0)
            last = open_to.shape[1] - 1 - open_to[:, ::-1].argmax(axis=1)  # the last of equals
            is_open = open_to[each, last] >= 0
            person = np.where(is_open, last, person)
            matched |= is_open
        is_taken[each[matched], person[matched]] = True
        whose[pose] = units[np.where(matched, person, int(similarity[pose].argmax()))]
        is_right[pose] = matched
        counts[pose] = ~(matched & is_ignored[person])
    return whose, is_right, counts


def _similarity(
    found: Sequence[dict[str, Any]],
    people: Sequence[dict[str, Any]],
    skeleton: Skeleton,
    kind: Kind,
) -> NDArray[np.float64]:
    """OKS of each pose and each person, (D, N)."""
    poses = np.array([p["keypoints"] for p in found], float).reshape(len(found), -1, 3)
    truth = np.array([p["keypoints"] for p in people], float).reshape(len(people), -1, 3)
    boxes = np.array([p["bbox"] for p in people], float)
    areas = np.array([p["area"] for p in people], float)
    if kind == "crowdpose":
        areas = AREA_OF_BOX * boxes[:, 2] * boxes[:, 3]
    return oks(
        poses[:, None, :, :2],
        truth[None, :, :, :2],
        truth[None, :, :, 2],
        areas[None],
        skeleton.oks_sigmas,
        boxes[None],
    )


def resampled_scores(
    scores: Sequence[Sequence[Score]],
    num_units: int,
    rng: np.random.RandomState,
    resamples: int = RESAMPLES,
) -> NDArray[np.float64]:
    """The score of each configuration and seed, (R, C, S), in each of R draws of the units.

    Args:
        scores: by configuration and seed.
    """
    found = np.empty((resamples, len(scores), len(scores[0])))
    for draw in range(resamples):
        picked = rng.randint(0, num_units, num_units)
        weights = np.bincount(picked, minlength=num_units).astype(float)
        found[draw] = [[score(weights) for score in seeds] for seeds in scores]
    return found


def draws_of_mean(
    resampled: NDArray[np.float64], rng: np.random.RandomState
) -> NDArray[np.float64]:
    """R draws of what the mean over all seeds and people may be.

    Args:
        resampled: of one configuration, or of the difference of two, (R, S), at least 2 seeds.
    """
    resamples, seeds = resampled.shape
    if seeds < 2:
        raise ValueError(f"the scatter of seeds must be seen, got {seeds} seed; use 2 at least")
    error = resampled.std(axis=1, ddof=1) / np.sqrt(seeds)
    return np.asarray(resampled.mean(axis=1) + error * rng.standard_t(seeds - 1, resamples))


def interval(draws: NDArray[np.float64]) -> tuple[float, float]:
    """Between which bounds LEVEL of the draws lie, as many above as below."""
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def probability_above_zero(draws: NDArray[np.float64]) -> float:
    """The share of the draws above 0; of those that are 0, half."""
    return float((draws > 0).mean() + (draws == 0).mean() / 2)
