"""Bootstrap AP over people: match poses as the official evaluation does, then reweight.

Matches are kept per pose and person, so AP of any weighting needs no second matching.
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

MAX_POSES = 20
"""Poses per image that count, by descending score."""
RECALLS = np.linspace(0, 1, 101)
"""Recalls at which precision is sampled."""
LEVEL = 0.95
"""Confidence level of every interval."""
RESAMPLES = 1000
"""Bootstrap draws."""
Score = Callable[[NDArray[np.float64]], float]
"""Maps the weights of the U units, (U,), to a run's score."""


@dataclass(frozen=True)
class Matches:
    """Matches of D poses, by descending score, at T OKS thresholds; people belong to U units.

    A unit is what the bootstrap draws: a source person, or an image.
    """

    units: NDArray[np.int64]
    """(D, T): the unit of the matched person, or without a match of the most similar person."""
    is_right: NDArray[np.bool_]
    """(D, T): whether the pose was matched."""
    counts: NDArray[np.bool_]
    """(D, T): False for poses matched with ignored people."""
    people: NDArray[np.float64]
    """(U,): people to find per unit."""


def match_people(
    ground_truth: Path, detections: Sequence[dict[str, Any]], skeleton: Skeleton, kind: Kind
) -> Matches:
    """Match poses with people as the official evaluation does.

    Arguments are those of ``study.metrics.average_precision``. A unit is a source person if every
    annotation has a ``source_id``, an image otherwise.
    """
    document = read_truth(ground_truth, skeleton)
    people, images = document["annotations"], sorted(i["id"] for i in document["images"])
    sources = [a.get("source_id") for a in load_document(ground_truth)["annotations"]]
    has_sources = None not in sources
    unit_ids: dict[Any, int] = {}

    def unit_of(number: int, image: int) -> int:
        name = ("source", sources[number]) if has_sources else ("image", image)
        return unit_ids.setdefault(name, len(unit_ids))

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
            units = np.array([unit_ids.setdefault(("image", image), len(unit_ids))])
        wanted += [u for u, p in zip(units, own, strict=False) if not _is_ignored(p)]
        best = sorted(found_in[image], key=lambda pose: -pose["score"])[:MAX_POSES]
        if best:
            parts.append(_match_image(best, own, units, skeleton, kind))
            scores += [pose["score"] for pose in best]
    order = np.argsort(-np.array(scores), kind="stable")

    def by_score(column: int) -> NDArray[Any]:
        if not parts:
            return np.zeros((0, len(OKS_THRESHOLDS)))
        return np.concatenate([part[column] for part in parts])[order]

    return Matches(
        units=by_score(0).astype(np.int64),
        is_right=by_score(1).astype(bool),
        counts=by_score(2).astype(bool),
        people=np.bincount(np.array(wanted, np.int64), minlength=len(unit_ids)).astype(float),
    )


def weighted_ap(matches: Matches, weights: NDArray[np.float64]) -> float:
    """Compute AP, 0..1, with each unit's people and poses counted ``weights`` times, (U,)."""
    weight = weights[matches.units] * matches.counts
    right = np.cumsum(weight * matches.is_right, axis=0)
    total_weight = np.cumsum(weight, axis=0)
    num_people = float(weights @ matches.people)
    if not len(right) or num_people <= 0:
        return 0.0
    precision = right / np.maximum(total_weight, np.spacing(1))
    precision = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
    recall = right / num_people
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
    """Return ``units``, ``is_right`` and ``counts`` of one image's poses, each (D, T)."""
    thresholds = np.minimum(OKS_THRESHOLDS, 1 - 1e-10)
    shape = (len(found), len(thresholds))
    pose_units, is_right = np.full(shape, units[0]), np.zeros(shape, bool)
    counts = np.ones(shape, bool)
    if not people:
        return pose_units, is_right, counts
    similarity = _similarity(found, people, skeleton, kind)
    is_ignored = np.array([_is_ignored(person) for person in people])
    is_crowd = np.array([bool(person["iscrowd"]) for person in people])
    is_taken = np.zeros((len(thresholds), len(people)), bool)
    each = np.arange(len(thresholds))
    for pose in range(len(found)):
        is_free = (~is_taken | is_crowd) & (similarity[pose] >= thresholds[:, None])
        matched, person = np.zeros(len(thresholds), bool), np.zeros(len(thresholds), np.int64)
        for group in (is_ignored, ~is_ignored):  # people to find take precedence over ignored ones
            candidates = np.where(is_free & group, similarity[pose], -1.0)
            # Of equal candidates the last one, as in pycocotools.
            best = candidates.shape[1] - 1 - candidates[:, ::-1].argmax(axis=1)
            is_found = candidates[each, best] >= 0
            person = np.where(is_found, best, person)
            matched |= is_found
        is_taken[each[matched], person[matched]] = True
        pose_units[pose] = units[np.where(matched, person, int(similarity[pose].argmax()))]
        is_right[pose] = matched
        counts[pose] = ~(matched & is_ignored[person])
    return pose_units, is_right, counts


def _similarity(
    found: Sequence[dict[str, Any]],
    people: Sequence[dict[str, Any]],
    skeleton: Skeleton,
    kind: Kind,
) -> NDArray[np.float64]:
    """Compute OKS of every pose with every person, (D, N)."""
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
    """Score each configuration and seed on R bootstrap draws of the units.

    Args:
        scores: score functions by configuration and seed, (C, S).
        num_units: U.

    Returns:
        Scores, (R, C, S).
    """
    drawn = np.empty((resamples, len(scores), len(scores[0])))
    for draw in range(resamples):
        picked = rng.randint(0, num_units, num_units)
        weights = np.bincount(picked, minlength=num_units).astype(float)
        drawn[draw] = [[score(weights) for score in seeds] for seeds in scores]
    return drawn


def draws_of_mean(
    resampled: NDArray[np.float64], rng: np.random.RandomState
) -> NDArray[np.float64]:
    """Draw R values of the mean over all possible seeds and people.

    The seeds' scatter is Student's t with S - 1 degrees of freedom.

    Args:
        resampled: scores of one configuration, or differences of two, (R, S).

    Raises:
        ValueError: there are fewer than 2 seeds.
    """
    resamples, seeds = resampled.shape
    if seeds < 2:
        raise ValueError(
            f"the scatter of seeds needs at least 2 seeds, got {seeds} seed; use more"
        )
    error = resampled.std(axis=1, ddof=1) / np.sqrt(seeds)
    return np.asarray(resampled.mean(axis=1) + error * rng.standard_t(seeds - 1, resamples))


def interval(draws: NDArray[np.float64]) -> tuple[float, float]:
    """Return the central interval that holds LEVEL of the draws."""
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def probability_above_zero(draws: NDArray[np.float64]) -> float:
    """Return the share of draws above 0; draws equal to 0 count half."""
    return float((draws > 0).mean() + (draws == 0).mean() / 2)
