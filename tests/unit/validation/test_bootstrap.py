"""AP of any weighting of the people, and intervals and probabilities by bootstrap."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.skeleton import COCO, CROWDPOSE, Skeleton
from study.config.schema import Kind
from study.metrics import average_precision
from study.validation.bootstrap import (
    draws_of_mean,
    interval,
    match_people,
    probability_above_zero,
    resampled_scores,
    weighted_ap,
)

RESAMPLES = 400


def world(
    skeleton: Skeleton, seed: int, *, sources: int = 0
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Make 12 images of up to four people, some of them crowds, unlabeled or missed, and poses."""
    rng = np.random.RandomState(seed)
    joints, people, poses = len(skeleton.joints), [], []
    for image in range(12):
        for place in range(rng.randint(0, 5)):
            corner, size = rng.uniform(0, 60, 2), rng.uniform(40, 120, 2)
            points = corner + rng.rand(joints, 2) * size
            seen = np.where(rng.rand(joints) < 0.7, 2, 0) * (rng.rand() > 0.15)
            person = {
                "id": 10 * image + place + 1,
                "image_id": image,
                "category_id": 1,
                "keypoints": np.c_[points * (seen[:, None] > 0), seen].ravel().tolist(),
                "num_keypoints": int((seen > 0).sum()),
                "iscrowd": int(rng.rand() < 0.1),
                "bbox": [*corner.tolist(), *size.tolist()],
                "area": float(size.prod()) / 2,
            }
            if sources:
                person["source_id"] = int(rng.randint(sources))
            people.append(person)
            for _ in range(rng.randint(0, 3)):
                noise = rng.normal(0, rng.choice([1, 4, 12]), (joints, 2))
                row = np.c_[points + noise, np.ones(joints)].ravel().tolist()
                score = float(rng.randint(1, 6)) / 5  # equal scores occur
                poses.append(
                    {"image_id": image, "category_id": 1, "keypoints": row, "score": score}
                )
    images = [{"id": image, "height": 200, "width": 200} for image in range(12)]
    category = {"id": 1, "name": "person", "keypoints": list(skeleton.joints), "skeleton": []}
    return {"images": images, "annotations": people, "categories": [category]}, poses


def written(folder: Path, document: dict[str, Any]) -> Path:
    file = folder / f"truth-{len(list(folder.iterdir()))}.json"
    file.write_text(json.dumps(document))
    return file


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("skeleton", "kind"), [(COCO, "coco"), (CROWDPOSE, "crowdpose")])
def test_equal_weights_give_the_official_ap(
    skeleton: Skeleton, kind: Kind, seed: int, tmp_path: Path
) -> None:
    document, poses = world(skeleton, seed)
    truth = written(tmp_path, document)
    matches = match_people(truth, poses, skeleton, kind)
    official = average_precision(truth, poses, skeleton, kind)["ap"]
    assert 0.05 < official < 0.95
    assert weighted_ap(matches, np.ones(len(matches.people))) == pytest.approx(official, abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_weighted_ap_is_that_of_copied_images(seed: int, tmp_path: Path) -> None:
    """Copies get new ids and are evaluated by the official code."""
    document, poses = world(COCO, seed)
    rng = np.random.RandomState(seed)
    matches = match_people(written(tmp_path, document), poses, COCO, "coco")
    weights = rng.randint(0, 3, 12)
    copied: dict[str, Any] = {**document, "images": [], "annotations": []}
    found = []
    for image, times in enumerate(weights):
        for copy in range(times):
            number = 100 * image + copy  # in the order of the originals
            copied["images"].append({**document["images"][image], "id": number})
            for person in document["annotations"]:
                if person["image_id"] == image:
                    ident = 1000 * person["id"] + copy
                    copied["annotations"].append({**person, "image_id": number, "id": ident})
            found += [{**p, "image_id": number} for p in poses if p["image_id"] == image]
    official = average_precision(written(tmp_path, copied), found, COCO, "coco")["ap"]
    own = weighted_ap(matches, weights.astype(float))
    # The order of poses with equal scores differs among copies, which moves precision a little.
    assert own == pytest.approx(official, abs=0.02)


def test_units_are_source_persons_if_all_annotations_have_one(tmp_path: Path) -> None:
    document, poses = world(COCO, 0, sources=5)
    truth = written(tmp_path, document)
    people = document["annotations"]
    empty = 12 - len({person["image_id"] for person in people})
    matches = match_people(truth, poses, COCO, "coco")
    assert len(matches.people) == len({p["source_id"] for p in people}) + empty
    counted = sum(p["num_keypoints"] > 0 and not p["iscrowd"] for p in people)
    assert matches.people.sum() == counted
    del people[0]["source_id"]
    assert len(match_people(written(tmp_path, document), poses, COCO, "coco").people) == 12


def test_ap_without_poses_is_zero(tmp_path: Path) -> None:
    document, _ = world(COCO, 1)
    matches = match_people(written(tmp_path, document), [], COCO, "coco")
    assert weighted_ap(matches, np.ones(len(matches.people))) == 0


def mean_score(values: np.ndarray) -> object:
    """Make a score function: the weighted mean of the units' values."""
    return lambda weights: float(weights @ values / weights.sum())


def resampled(values: np.ndarray, rng: np.random.RandomState) -> np.ndarray:
    """Resample values by configuration, seed and unit, (C, S, U)."""
    scores = [[mean_score(units) for units in seeds] for seeds in values]
    return resampled_scores(scores, values.shape[2], rng, RESAMPLES)  # type: ignore[arg-type]


def test_interval_of_a_hundred_draws_excludes_the_outermost() -> None:
    draws = np.arange(101.0)
    assert interval(draws) == pytest.approx((2.5, 97.5))


def test_ties_count_half() -> None:
    assert probability_above_zero(np.array([1.0, 0.0, 0.0, -1.0])) == 0.5
    assert probability_above_zero(np.array([1.0, 1.0, 0.0, 2.0])) == 0.875


def test_one_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="got 1 seed"):
        draws_of_mean(np.zeros((10, 1)), np.random.RandomState(0))


def test_equal_seeds_leave_only_the_scatter_of_people() -> None:
    """The bootstrap's spread of a mean of U values is their spread over sqrt(U)."""
    rng = np.random.RandomState(0)
    units = rng.normal(0, 1, 50)
    units = (units - units.mean()) / units.std()
    drawn = resampled(np.tile(units, (1, 3, 1)), rng)[:, 0]
    draws = draws_of_mean(drawn, rng)
    assert draws.std() == pytest.approx(1 / np.sqrt(50), rel=0.1)
    assert draws.mean() == pytest.approx(0, abs=0.03)


def test_equal_people_leave_only_the_scatter_of_seeds() -> None:
    """Then the interval is Student's: mean 2, s = 1, three seeds, t of 2 degrees 4.303."""
    drawn = np.tile([1.0, 2.0, 3.0], (20000, 1))
    low, high = interval(draws_of_mean(drawn, np.random.RandomState(1)))
    half = 4.303 / np.sqrt(3)
    assert (low, high) == pytest.approx((2 - half, 2 + half), rel=0.05)


def test_identical_configurations_beat_each_other_with_probability_one_half() -> None:
    rng = np.random.RandomState(2)
    values = np.tile(rng.normal(0, 1, (1, 3, 40)), (2, 1, 1))
    drawn = resampled(values, rng)
    assert probability_above_zero(draws_of_mean(drawn[:, 0] - drawn[:, 1], rng)) == 0.5


def test_configurations_far_apart_have_a_certain_winner() -> None:
    rng = np.random.RandomState(3)
    values = rng.normal(0, 0.1, (2, 3, 40)) + np.array([1.0, 0.0])[:, None, None]
    drawn = resampled(values, rng)
    ahead = draws_of_mean(drawn[:, 0] - drawn[:, 1], rng)
    assert probability_above_zero(ahead) > 0.99
    assert probability_above_zero(-ahead) < 0.01


def test_constant_difference_is_certain_despite_the_scatter() -> None:
    """Each scatters by 1, their paired difference by 0."""
    rng = np.random.RandomState(4)
    first = rng.normal(0, 1, (3, 40))
    drawn = resampled(np.stack([first + 0.01, first]), rng)
    assert probability_above_zero(draws_of_mean(drawn[:, 0] - drawn[:, 1], rng)) == 1
    assert probability_above_zero(draws_of_mean(drawn[:, 0], rng)) < 0.9


@pytest.mark.parametrize(("of_seed", "of_unit"), [(0.1, 2.0), (0.5, 2.0), (1.0, 1.0)])
def test_95_percent_of_intervals_hold_the_true_mean(of_seed: float, of_unit: float) -> None:
    """Simulated with known variances of seeds and people; 40 people, 3 seeds."""
    rng = np.random.RandomState(5)
    simulations, inside = 300, 0
    for _ in range(simulations):
        seeds = rng.normal(0, of_seed, 3)
        values = seeds[:, None] + rng.normal(0, of_unit, 40)
        picked = rng.randint(0, 40, (RESAMPLES, 40))
        drawn = values[:, picked].mean(axis=2).T  # as resampled_scores, vectorized
        low, high = interval(draws_of_mean(drawn, rng))
        inside += low <= 0 <= high
    # 0.95 +- 3 standard errors, and a bootstrap of 40 units is a little narrow.
    assert 0.90 <= inside / simulations <= 0.985
