"""Importance: the deciding parameter, pruned trials, and shares that are chance."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from search_spaces.space import Parameter, SearchSpace
from study.analysis.importance import beyond_chance, importance

SPACE = SearchSpace(
    "made_up",
    "Which of three?",
    (
        Parameter("p.a", FloatDistribution(0.0, 1.0), "scientific"),
        Parameter("p.b", FloatDistribution(1e-4, 1e-1, log=True), "nuisance"),
        Parameter("p.kind", CategoricalDistribution(("x", "y")), "scientific"),
        Parameter("p.depth", IntDistribution(1, 6), "scientific", {"p.kind": ("y",)}),
    ),
)


def sampled(count: int, ap: Callable[[float, float, str], float]) -> list[dict[str, Any]]:
    """Random trials; ``ap`` takes a, the place of b on its scale (0 to 1), and kind."""
    draw = random.Random(0)
    rows = []
    for _ in range(count):
        a, place, kind = draw.random(), draw.random(), draw.choice("xy")
        parameters = {"a": a, "b": 1e-4 * 1000**place, "kind": kind, "depth": draw.randint(1, 6)}
        if kind == "x":
            del parameters["depth"]
        row = {f"params.p.{name}": value for name, value in parameters.items()}
        rows.append({**row, "state": "COMPLETE", "objective": ap(a, place, kind)})
    return rows


def test_the_parameter_that_decides_everything_is_the_most_important() -> None:
    for decisive, ap in (
        ("p.a", lambda a, place, kind: 0.5 * a),
        ("p.b", lambda a, place, kind: 0.5 - abs(place - 0.3)),
        ("p.kind", lambda a, place, kind: 0.3 if kind == "x" else 0.1 + 1e-4 * a),
    ):
        shares = importance(sampled(60, ap), SPACE)
        assert next(iter(shares)) == decisive
        assert sum(shares.values()) == pytest.approx(1.0)


def test_importance_is_of_what_makes_trials_good_not_bad() -> None:
    # Good is decided by a alone, in a narrow region; bad by b alone, in another.
    def ap(a: float, place: float, kind: str) -> float:
        return 0.3 + 0.2 * (abs(a - 0.5) < 0.06) - 0.2 * (abs(place - 0.5) < 0.06) + 1e-3 * a

    rows = sampled(240, ap)
    upside_down = [{**row, "objective": 1.0 - row["objective"]} for row in rows]
    assert next(iter(importance(rows, SPACE))) == "p.a"
    assert next(iter(importance(upside_down, SPACE))) == "p.b"


def test_a_pruned_trial_is_never_among_the_good_ones() -> None:
    def prune(row: dict[str, Any]) -> dict[str, Any]:
        # Early AP is high where b is low, but only trials with a high a ran to their end.
        pruned = row["params.p.a"] < 0.7
        early = 0.9 - row["params.p.b"]
        return {**row, "state": "PRUNED", "objective": early} if pruned else row

    rows = [prune(row) for row in sampled(60, lambda a, place, kind: 0.1 * a)]
    assert next(iter(importance(rows, SPACE))) == "p.a"


def test_few_or_equal_trials_have_no_importance() -> None:
    assert importance([], SPACE) == {}
    assert importance(sampled(7, lambda a, place, kind: a), SPACE) == {}
    assert importance(sampled(30, lambda a, place, kind: 0.0), SPACE) == {}
    failed = [{**row, "state": "FAIL"} for row in sampled(30, lambda a, place, kind: a)]
    assert importance(failed, SPACE) == {}


def test_parameter_of_few_trials_has_no_importance() -> None:
    rows = sampled(12, lambda a, place, kind: a)
    having = sum("params.p.depth" in row for row in rows)
    assert 0 < having < 8
    assert set(importance(rows, SPACE)) == {"p.a", "p.b", "p.kind"}


def test_only_deciding_parameter_is_more_than_chance() -> None:
    assert beyond_chance(sampled(40, lambda a, place, kind: a), SPACE) == {"p.a"}


def test_chance_alone_passes_in_hardly_any_study() -> None:
    draw = random.Random(1)
    rows = sampled(16, lambda a, place, kind: 0.0)
    studies = [[{**row, "objective": draw.random()} for row in rows] for _ in range(10)]
    assert sum(len(beyond_chance(study, SPACE)) for study in studies) <= 1


def test_the_order_of_trials_does_not_change_their_importance() -> None:
    rows = sampled(30, lambda a, place, kind: a)
    there = importance(rows, SPACE)
    back = importance(rows[::-1], SPACE)
    assert list(there) == list(back)
    assert there == pytest.approx(back)
    assert beyond_chance(rows, SPACE) == beyond_chance(rows, SPACE)


STAGED = SearchSpace(
    "staged",
    "Which student, which refiner?",
    (
        Parameter("parent", IntDistribution(0, 2), "nuisance"),
        Parameter("distill.a", FloatDistribution(0.0, 1.0), "scientific"),
        Parameter("distill.b", FloatDistribution(0.0, 1.0), "scientific"),
        Parameter("refine.c", FloatDistribution(0.0, 1.0), "scientific"),
    ),
)


def test_parents_values_are_not_counted_again_in_its_refiners() -> None:
    """All refiners have one parent and are the better half, which is no evidence about its b."""
    draw = random.Random(0)
    students, refiners = [], []
    for _ in range(20):
        a, b, c = draw.random(), draw.random(), draw.random()
        row = {"params.distill.a": a, "params.distill.b": b}
        students.append({**row, "state": "COMPLETE", "objective": 0.1 * a, "parent_trial": None})
        row = {"params.distill.a": 0.99, "params.distill.b": 0.5, "params.parent": 0}
        row |= {"params.refine.c": c, "parent_trial": 3}
        refiners.append({**row, "state": "COMPLETE", "objective": 0.5 + 0.1 * c})
    shares = importance([*students, *refiners], STAGED)
    alone = importance(students, STAGED)
    assert set(shares) == {"distill.a", "distill.b", "refine.c", "parent"}
    assert shares["distill.b"] / shares["distill.a"] == pytest.approx(
        alone["distill.b"] / alone["distill.a"]
    )
    assert shares["parent"] < 0.05
    assert sum(shares.values()) == pytest.approx(1.0)
    assert beyond_chance([*students, *refiners], STAGED) == {"distill.a", "refine.c"}
