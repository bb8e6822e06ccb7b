"""Plan ``staged``, coarse to fine: which parameters, trials and parents either stage has.

Students are searched first. At the hand-over the best of them become parents, and from then on
trials are refiners: which parent one starts from, by its rank, is a parameter like others.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

from optuna.distributions import FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial

from search_spaces.space import Parameter, SearchSpace, place_in
from study.config.schema import STAGED, PlanConfig

PARENT = "parent"
"""The parameter that chooses among the parents: 0 is the one of the highest AP."""
REFINE_PATHS = "refine."


def with_parent(plan: PlanConfig, space: SearchSpace) -> SearchSpace:
    """The space and, in plan staged, the parameter that chooses the parent."""
    if plan.kind != STAGED:
        return space
    parameters = (_rank_among(plan.parents), *space.parameters)
    return dataclasses.replace(space, parameters=parameters)


def distill_space(space: SearchSpace) -> SearchSpace:
    """What the students of plan staged vary: everything but the refiner."""
    own = (parameter for parameter in space.parameters if not is_of_refiner(parameter))
    return dataclasses.replace(space, parameters=tuple(own))


def refine_space(space: SearchSpace, num_parents: int) -> SearchSpace:
    """What the refiners of plan staged vary, the parent's rank among them."""
    own = (p for p in space.parameters if is_of_refiner(p) and p.path != PARENT)
    return dataclasses.replace(space, parameters=(_rank_among(num_parents), *own))


def _rank_among(num_parents: int) -> Parameter:
    return Parameter(PARENT, IntDistribution(0, num_parents - 1), "nuisance")


def is_of_refiner(parameter: Parameter) -> bool:
    """Whether it is stage 2's in plan staged, as the parent's rank is."""
    return parameter.path == PARENT or parameter.path.startswith(REFINE_PATHS)


def staged_faults(plan: PlanConfig, refine_epochs: int, space: SearchSpace) -> Iterator[str]:
    """What keeps these settings and this space from being a staged study; nothing if joint."""
    if plan.kind != STAGED:
        return
    if not refine_epochs:
        yield "plan=staged has a stage 2, got refine.epochs=0; raise it, or set plan=joint"
    refiners = [is_of_refiner(parameter) for parameter in space.parameters]
    for stage, is_varied in (("stage 1", not all(refiners)), ("stage 2", any(refiners))):
        if not is_varied:
            yield (
                f"plan=staged searches parameters of both stages, got search_space={space.name}, "
                f"which has none of {stage}; try search_space=staged, or set plan=joint"
            )


def num_distill_trials(trials: int, share: float) -> int:
    """How many of so many trials are students: both controls at least, and never all."""
    return min(max(round(share * trials), 2), trials - 1)


def choose_parents(students: Sequence[FrozenTrial], count: int) -> list[FrozenTrial]:
    """The best students, spread over what was searched, the highest AP first.

    The best one of all, then, among the 2 x ``count`` best, whichever is farthest from those that
    were chosen: two students of nearly the same weights would teach refiners the same.
    """
    ranked = sorted(students, key=lambda trial: (-trial.values[0], trial.number))
    pool = ranked[: 2 * count]
    chosen = pool[:1]
    while len(chosen) < min(count, len(pool)):
        left = [trial for trial in pool if trial not in chosen]
        chosen.append(max(left, key=lambda trial: min(_distance(trial, c) for c in chosen)))
    return [trial for trial in pool if trial in chosen]


def _distance(one: FrozenTrial, other: FrozenTrial) -> float:
    """From 0 to 1: the mean over the parameters that either has."""
    gaps = [_gap(path, one, other) for path in {*one.params, *other.params}]
    return math.fsum(gaps) / max(len(gaps), 1)


def _gap(path: str, one: FrozenTrial, other: FrozenTrial) -> float:
    if path not in one.params or path not in other.params:
        return 1.0
    distribution = one.distributions[path]
    if not isinstance(distribution, FloatDistribution | IntDistribution):
        return float(one.params[path] != other.params[path])
    return abs(
        place_in(distribution, one.params[path]) - place_in(distribution, other.params[path])
    )
