"""plan=staged: the parameters and trials of each stage, and the refiners' parents.

Stage 1 searches students. At the hand-over the best of them become parents. Stage 2 searches
refiners; the rank of the parent that a refiner starts from is one of its parameters.
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
"""Parameter of a refiner: its parent's rank by AP, from 0."""
REFINE_PATHS = "refine."


def with_parent(plan: PlanConfig, space: SearchSpace) -> SearchSpace:
    """Return the space, for plan=staged with the parent's rank as its first parameter."""
    if plan.kind != STAGED:
        return space
    parameters = (_rank_among(plan.parents), *space.parameters)
    return dataclasses.replace(space, parameters=parameters)


def distill_space(space: SearchSpace) -> SearchSpace:
    """Return the search space of students: all parameters but those of stage 2."""
    own = (parameter for parameter in space.parameters if not is_of_refiner(parameter))
    return dataclasses.replace(space, parameters=tuple(own))


def refine_space(space: SearchSpace, num_parents: int) -> SearchSpace:
    """Return the search space of refiners: the parent's rank and the parameters of stage 2."""
    own = (p for p in space.parameters if is_of_refiner(p) and p.path != PARENT)
    return dataclasses.replace(space, parameters=(_rank_among(num_parents), *own))


def _rank_among(num_parents: int) -> Parameter:
    return Parameter(PARENT, IntDistribution(0, num_parents - 1), "nuisance")


def is_of_refiner(parameter: Parameter) -> bool:
    """Return whether plan=staged searches the parameter in stage 2."""
    return parameter.path == PARENT or parameter.path.startswith(REFINE_PATHS)


def staged_faults(plan: PlanConfig, refine_epochs: int, space: SearchSpace) -> Iterator[str]:
    """Yield what makes plan=staged impossible with these settings and this space."""
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
    """Return how many of ``trials`` are students: at least both controls, never all."""
    return min(max(round(share * trials), 2), trials - 1)


def choose_parents(students: Sequence[FrozenTrial], count: int) -> list[FrozenTrial]:
    """Choose good and diverse students, by descending AP.

    The best student is chosen first, then repeatedly, of the 2 x ``count`` best, the one farthest
    from those already chosen: refiners learn little from two nearly equal students.
    """
    ranked = sorted(students, key=lambda trial: (-trial.values[0], trial.number))
    pool = ranked[: 2 * count]
    chosen = pool[:1]
    while len(chosen) < min(count, len(pool)):
        left = [trial for trial in pool if trial not in chosen]
        chosen.append(max(left, key=lambda trial: min(_distance(trial, c) for c in chosen)))
    return [trial for trial in pool if trial in chosen]


def _distance(one: FrozenTrial, other: FrozenTrial) -> float:
    """Mean distance, 0..1, over the parameters of both."""
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
