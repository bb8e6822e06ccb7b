"""What chooses the values to try and what ends trials early, by name.

A sampler is built for each trial, seeded by study and trial: one sampler for all would repeat its
draws after every restart. What it learns from lies in the Optuna study alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.pruners import (
    BasePruner,
    HyperbandPruner,
    MedianPruner,
    NopPruner,
    PercentilePruner,
    SuccessiveHalvingPruner,
)
from optuna.samplers import (
    BaseSampler,
    CmaEsSampler,
    GPSampler,
    NSGAIISampler,
    QMCSampler,
    RandomSampler,
    TPESampler,
)
from optuna.trial import FrozenTrial

from search_spaces.space import SearchSpace
from study.loop import seed_of
from study.schema import StudyConfig


class SobolSampler(QMCSampler):
    """Sobol's sequence over all parameters; a trial's number says which point is its own.

    Optuna's counts the points that it has given, so that a restart skips some, and leaves out
    parameters that the first trial did not have. Here a trial that has no use for a parameter
    passes over its coordinate.
    """

    def __init__(self, space: SearchSpace, point: int, seed: int) -> None:
        super().__init__(scramble=True, seed=seed, warn_independent_sampling=False)
        self.space, self.point = space, point

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return {parameter.path: parameter.distribution for parameter in self.space.parameters}

    def _find_sample_id(
        self, study: optuna.Study, search_space: dict[str, BaseDistribution]
    ) -> int:
        return self.point


def build_sampler(config: StudyConfig, space: SearchSpace, number: int, point: int) -> BaseSampler:
    """``search.sampler`` for the trial of that number, the ``point``-th that is no control."""
    seed = seed_of(config.seed, "sampler", number) % 2**32
    with warnings.catch_warnings():
        # Optuna calls two things experimental: QMCSampler, and TPE's group=, without which
        # parameters that only some trials have are left out of the joint model.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return _sampler_of(config, space, point, seed)


def _sampler_of(config: StudyConfig, space: SearchSpace, point: int, seed: int) -> BaseSampler:
    settings = config.search
    if settings.sampler == "random":
        return RandomSampler(seed=seed)
    if settings.sampler == "qmc":
        return SobolSampler(space, point, seed_of(config.seed, "sobol") % 2**32)
    if settings.sampler == "nsga2":
        return NSGAIISampler(population_size=settings.population, seed=seed)
    startup = settings.startup_trials
    tpe = TPESampler(seed=seed, n_startup_trials=startup, multivariate=True, group=True)
    if settings.sampler == "tpe":
        return tpe
    sampler = {"gp": GPSampler, "cmaes": CmaEsSampler}[settings.sampler]
    return sampler(
        seed=seed,
        n_startup_trials=startup,
        independent_sampler=tpe,
        warn_independent_sampling=False,
    )


def build_pruner(config: StudyConfig, budget: int) -> BasePruner:
    """``search.pruner``, which ends no trial of ``budget`` epochs before ``search.min_epochs``."""
    settings = config.search
    first, factor = settings.min_epochs, settings.reduction_factor
    if settings.pruner == "successive_halving":
        return SuccessiveHalvingPruner(min_resource=first, reduction_factor=factor)
    if settings.pruner == "hyperband":
        return HyperbandPruner(
            # Given, because Optuna's own guess depends on which trial it sees complete first.
            **{"min_resource": first, "max_resource": max(first, budget)},
            reduction_factor=factor,
        )
    when = {"n_startup_trials": settings.startup_trials, "n_warmup_steps": first}
    if settings.pruner == "median":
        return MedianPruner(**when)
    if settings.pruner == "percentile":
        return PercentilePruner(settings.percentile, **when)
    return NopPruner()


def sampler_notes(config: StudyConfig, space: SearchSpace) -> Iterator[str]:
    """A line where the sampler models some of the parameters alone."""
    sampler = config.search.sampler
    if sampler not in ("gp", "cmaes", "nsga2"):
        return
    others = {
        parameter.path: None
        for parameter in space.parameters
        if parameter.when
        or (sampler == "cmaes" and isinstance(parameter.distribution, CategoricalDistribution))
    }
    if others:
        how = "at random" if sampler == "nsga2" else "by tpe, one by one"
        what = "choices and what" if sampler == "cmaes" else "what"
        yield (
            f"search.sampler={sampler} can't model {what} only some trials have; drawn {how}: "
            f"{', '.join(others)}"
        )
