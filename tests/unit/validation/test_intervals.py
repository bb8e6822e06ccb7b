"""Intervals and probabilities of a comparison: hand-worked, and by simulation."""

from __future__ import annotations

import numpy as np
import pytest

from study.validation.bootstrap import (
    draws_of_mean,
    interval,
    probability_above_zero,
    resampled_scores,
)

RESAMPLES = 400


def mean_score(values: np.ndarray) -> object:
    """A run's score is the weighted mean of what it gets on each unit."""
    return lambda weights: float(weights @ values / weights.sum())


def resampled(values: np.ndarray, rng: np.random.RandomState) -> np.ndarray:
    """Of values by configuration, seed and unit, (C, S, U)."""
    scores = [[mean_score(units) for units in seeds] for seeds in values]
    return resampled_scores(scores, values.shape[2], rng, RESAMPLES)  # type: ignore[arg-type]


def test_interval_of_a_hundred_draws_leaves_out_the_outermost() -> None:
    draws = np.arange(101.0)
    assert interval(draws) == pytest.approx((2.5, 97.5))


def test_ties_count_half() -> None:
    assert probability_above_zero(np.array([1.0, 0.0, 0.0, -1.0])) == 0.5
    assert probability_above_zero(np.array([1.0, 1.0, 0.0, 2.0])) == 0.875


def test_one_seed_tells_no_scatter() -> None:
    with pytest.raises(ValueError, match="got 1 seed"):
        draws_of_mean(np.zeros((10, 1)), np.random.RandomState(0))


def test_seeds_that_agree_leave_the_people_alone_to_scatter() -> None:
    """The bootstrap's spread of a mean of U values is their spread over the root of U."""
    rng = np.random.RandomState(0)
    units = rng.normal(0, 1, 50)
    units = (units - units.mean()) / units.std()
    drawn = resampled(np.tile(units, (1, 3, 1)), rng)[:, 0]
    draws = draws_of_mean(drawn, rng)
    assert draws.std() == pytest.approx(1 / np.sqrt(50), rel=0.1)
    assert draws.mean() == pytest.approx(0, abs=0.03)


def test_people_that_agree_leave_the_seeds_alone_to_scatter() -> None:
    """Then the interval is Student's: mean 2, s = 1, three seeds, t of 2 degrees 4.303."""
    drawn = np.tile([1.0, 2.0, 3.0], (20000, 1))
    low, high = interval(draws_of_mean(drawn, np.random.RandomState(1)))
    half = 4.303 / np.sqrt(3)
    assert (low, high) == pytest.approx((2 - half, 2 + half), rel=0.05)


def test_identical_configurations_are_a_toss_up() -> None:
    rng = np.random.RandomState(2)
    values = np.tile(rng.normal(0, 1, (1, 3, 40)), (2, 1, 1))
    drawn = resampled(values, rng)
    assert probability_above_zero(draws_of_mean(drawn[:, 0] - drawn[:, 1], rng)) == 0.5


def test_configurations_far_apart_are_told_apart() -> None:
    rng = np.random.RandomState(3)
    values = rng.normal(0, 0.1, (2, 3, 40)) + np.array([1.0, 0.0])[:, None, None]
    drawn = resampled(values, rng)
    ahead = draws_of_mean(drawn[:, 0] - drawn[:, 1], rng)
    assert probability_above_zero(ahead) > 0.99
    assert probability_above_zero(-ahead) < 0.01


def test_a_difference_that_all_seeds_and_people_share_is_sure_however_they_scatter() -> None:
    """Paired: the two scatter by 1, their difference not at all."""
    rng = np.random.RandomState(4)
    first = rng.normal(0, 1, (3, 40))
    drawn = resampled(np.stack([first + 0.01, first]), rng)
    assert probability_above_zero(draws_of_mean(drawn[:, 0] - drawn[:, 1], rng)) == 1
    assert probability_above_zero(draws_of_mean(drawn[:, 0], rng)) < 0.9


@pytest.mark.parametrize(("of_seed", "of_unit"), [(0.1, 2.0), (0.5, 2.0), (1.0, 1.0)])
def test_nineteen_of_twenty_intervals_hold_the_truth(of_seed: float, of_unit: float) -> None:
    """Known variances of seeds and of people, whichever is larger; 40 people, 3 seeds."""
    rng = np.random.RandomState(5)
    simulations, inside = 300, 0
    for _ in range(simulations):
        seeds = rng.normal(0, of_seed, 3)
        values = seeds[:, None] + rng.normal(0, of_unit, 40)
        picked = rng.randint(0, 40, (RESAMPLES, 40))
        drawn = values[:, picked].mean(axis=2).T  # what resampled_scores gives, at once
        low, high = interval(draws_of_mean(drawn, rng))
        inside += low <= 0 <= high
    # 0.95 +- 3 standard errors, and a bootstrap of 40 units is a little narrow.
    assert 0.90 <= inside / simulations <= 0.985
