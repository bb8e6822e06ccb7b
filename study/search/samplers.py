"""What chooses the values to try and what ends trials early, by name.

A sampler is built for each trial, seeded by study and trial: one sampler for all would repeat its
draws after every restart. What it learns from lies in the Optuna study alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import optuna
from numpy.typing import NDArray
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
from study.config.derived import seed_of
from study.config.schema import SearchConfig


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


class ConditionalTPE(TPESampler):
    """TPE that models a parameter jointly with what it depends on, and with nothing else.

    A weight is learned from the trials of the same kind alone: the model of both is that of the
    kind times that of the weight given the kind. Parameters that are independent of each other
    are modeled one by one. Optuna's own joint models are another thing: ``multivariate`` leaves
    out what only some trials have, and ``group`` models it apart from what it depends on.
    """

    def __init__(self, space: SearchSpace, startup_trials: int, seed: int) -> None:
        super().__init__(multivariate=False, n_startup_trials=startup_trials, seed=seed)
        self.conditions = {parameter.path: tuple(parameter.when) for parameter in space.parameters}
        self.given: dict[str, Any] = {}

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        paths = self.conditions.get(param_name, ())
        self.given = {path: trial.params[path] for path in paths if path in trial.params}
        return super().sample_independent(study, trial, param_name, param_distribution)

    def _get_internal_repr(
        self,
        trials: list[FrozenTrial],
        search_space: dict[str, BaseDistribution],
        study: optuna.Study,
    ) -> dict[str, NDArray[Any]]:
        alike = [t for t in trials if self.given.items() <= t.params.items()]
        return super()._get_internal_repr(alike, search_space, study)


def build_sampler(
    settings: SearchConfig, study_seed: int, space: SearchSpace, number: int, point: int
) -> BaseSampler:
    """``search.sampler`` for the trial of that number, the ``point``-th that is no control."""
    seed = seed_of(study_seed, "sampler", number) % 2**32
    if settings.sampler == "random":
        return RandomSampler(seed=seed)
    if settings.sampler == "qmc":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return SobolSampler(space, point, seed_of(study_seed, "sobol") % 2**32)
    if settings.sampler == "nsga2":
        return NSGAIISampler(population_size=settings.population, seed=seed)
    startup = settings.startup_trials
    tpe = ConditionalTPE(space, startup, seed)
    if settings.sampler == "tpe":
        return tpe
    sampler = {"gp": GPSampler, "cmaes": CmaEsSampler}[settings.sampler]
    return sampler(
        seed=seed,
        n_startup_trials=startup,
        independent_sampler=tpe,
        warn_independent_sampling=False,
    )


def build_pruner(settings: SearchConfig, budget: int) -> BasePruner:
    """``search.pruner``, which ends no trial of ``budget`` epochs before ``search.min_epochs``."""
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


def sampler_notes(sampler: str, space: SearchSpace) -> Iterator[str]:
    """A line where the sampler models some of the parameters alone."""
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
