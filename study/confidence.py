"""How sure a comparison is: people drawn again and again, crossed with the scatter of seeds.

Every configuration is trained from the same seeds and scored on the same people. The people are
resampled (a bootstrap over units: source persons or pictures). Seeds are too few for that: three
drawn again and again scatter far too little. What is known of their mean is therefore a t
distribution (the posterior of a normal's mean under a flat prior). Differences are paired over
both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
"""Of every interval."""
RESAMPLES = 1000

Score = Callable[[NDArray[np.float64]], float]
"""What a run gets where each of the U units counts as often as these weights say, (U,)."""


def resampled_scores(
    scores: Sequence[Sequence[Score]],
    num_units: int,
    dice: np.random.RandomState,
    resamples: int = RESAMPLES,
) -> NDArray[np.float64]:
    """The score of each configuration and seed, (R, C, S), in each of R draws of the units.

    Args:
        scores: by configuration and seed.
    """
    found = np.empty((resamples, len(scores), len(scores[0])))
    for draw in range(resamples):
        picked = dice.randint(0, num_units, num_units)
        weights = np.bincount(picked, minlength=num_units).astype(float)
        found[draw] = [[score(weights) for score in seeds] for seeds in scores]
    return found


def draws_of_mean(
    resampled: NDArray[np.float64], dice: np.random.RandomState
) -> NDArray[np.float64]:
    """R draws of what the mean over all seeds and people may be.

    Args:
        resampled: of one configuration, or of the difference of two, (R, S), at least 2 seeds.
    """
    resamples, seeds = resampled.shape
    if seeds < 2:
        raise ValueError(f"the scatter of seeds must be seen, got {seeds} seed; use 2 at least")
    error = resampled.std(axis=1, ddof=1) / np.sqrt(seeds)
    return np.asarray(resampled.mean(axis=1) + error * dice.standard_t(seeds - 1, resamples))


def interval(draws: NDArray[np.float64]) -> tuple[float, float]:
    """Between which bounds LEVEL of the draws lie, as many above as below."""
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def probability_above_zero(draws: NDArray[np.float64]) -> float:
    """The share of the draws above 0; of those that are 0, half."""
    return float((draws > 0).mean() + (draws == 0).mean() / 2)
