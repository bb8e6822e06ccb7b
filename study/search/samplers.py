"""Optuna samplers and pruners by the names that the settings use.

Each trial has a sampler of its own, seeded by study and trial: a single sampler would repeat its
draws after a restart. Its only state is the Optuna study.
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
    """Sobol sequence over all parameters, indexed by the trial.

    Optuna's sampler counts the points it has drawn, so that a restart skips some, and omits
    parameters that the first trial lacks. Here a trial ignores the coordinates of parameters that
    it lacks.
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
    """TPE that models a parameter given its conditions, and independent parameters one by one.

    A loss weight is modeled from trials with the same kind of loss: p(kind) p(weight | kind).
    Optuna's joint models differ: ``multivariate`` omits parameters that only some trials have, and
    ``group`` models them apart from their conditions.
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
        matching = [t for t in trials if self.given.items() <= t.params.items()]
        return super()._get_internal_repr(matching, search_space, study)


def build_sampler(
    settings: SearchConfig, study_seed: int, space: SearchSpace, number: int, point: int
) -> BaseSampler:
    """Build ``search.sampler`` for a trial.

    Args:
        number: the trial's number in the study.
        point: its number among the trials that are no controls.
    """
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
    """Build ``search.pruner`` for trials of ``budget`` epochs; it starts at ``min_epochs``."""
    first, factor = settings.min_epochs, settings.reduction_factor
    if settings.pruner == "successive_halving":
        return SuccessiveHalvingPruner(min_resource=first, reduction_factor=factor)
    if settings.pruner == "hyperband":
        return HyperbandPruner(
            min_resource=first,
            # Optuna's default, "auto", depends on the trial that completes first.
            max_resource=max(first, budget),
            reduction_factor=factor,
        )
    if settings.pruner == "median":
        return MedianPruner(n_startup_trials=settings.startup_trials, n_warmup_steps=first)
    if settings.pruner == "percentile":
        return PercentilePruner(
            settings.percentile,
            n_startup_trials=settings.startup_trials,
            n_warmup_steps=first,
        )
    return NopPruner()


def sampler_messages(sampler: str, space: SearchSpace) -> Iterator[str]:
    """Yield a line for the user if the sampler can't model some of the parameters."""
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
