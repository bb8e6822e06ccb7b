"""Forecast epochs: from the pruner's rule and from the trials so far."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from study.config.compose import compose
from study.config.schema import StudyConfig
from study.search.forecast import (
    StageEpochs,
    TrialProgress,
    expected_epochs,
    forecast_stage,
    trial_groups,
)

JOINT = ("search.trials=10", "distill.epochs=3", "refine.epochs=1", "search.min_epochs=1")
"""Two controls of 4 epochs; half of the other trials pass epoch 1, a quarter epoch 2."""


@pytest.mark.parametrize(
    ("settings", "shares"),
    [
        ({"min_epochs": 2, "reduction_factor": 2}, [1, 1, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25]),
        ({"min_epochs": 1, "reduction_factor": 4}, [1, *[0.25] * 3, *[0.0625] * 4]),
        ({"min_epochs": 9, "reduction_factor": 2}, [1] * 8),
        ({"pruner": "none"}, [1] * 8),
    ],
)
def test_each_rung_lets_its_share_pass(
    settings: dict[str, Any], shares: list[float], mini_config: StudyConfig
) -> None:
    assert expected_epochs(8, dataclasses.replace(mini_config.search, **settings)) == shares


@pytest.mark.parametrize(
    ("finished", "expected"),
    [
        (0, [[(1, 7, 0), (0, 7, 0), (1, 5, 0), (3, 5, 0)], [(1, 0, 2), (4, 0, 2)]]),
        (4, [[(0, 7, 0), (0, 7, 0), (0, 5, 0), (1, 5, 0)], [(1, 0, 2), (4, 0, 2)]]),
        (7, [[(0, 7, 0), (0, 7, 0), (0, 5, 0), (0, 5, 0)], [(0, 0, 2), (3, 0, 2)]]),
    ],
)
def test_staged_plan_trains_students_then_refiners(
    finished: int, expected: list[list[tuple[int, int, int]]]
) -> None:
    config = compose(["plan=staged", "search.trials=10", "distill.epochs=5", "refine.epochs=2"])
    stages = trial_groups(
        config.plan,
        config.search.trials,
        StageEpochs(config.distill.epochs, config.refine.epochs),
        finished=finished,
    )
    assert [[group[:3] for group in groups] for groups in stages] == expected
    assert [g.can_be_pruned for groups in stages for g in groups] == [False, True] * 3


def test_more_trials_after_the_hand_over_are_refiners() -> None:
    config = compose(["plan=staged", "search.trials=20", "distill.epochs=5", "refine.epochs=2"])
    students, refiners = trial_groups(
        config.plan,
        config.search.trials,
        StageEpochs(config.distill.epochs, config.refine.epochs),
        finished=8,
        handed_over=4,
    )
    assert [group[:3] for group in (*students, *refiners) if group.trials] == [(12, 0, 2)]


def left_of(started: list[TrialProgress], *overrides: str) -> tuple[float, bool]:
    config = compose([*JOINT, *overrides])
    (groups,) = trial_groups(
        config.plan, config.search.trials, StageEpochs(config.distill.epochs, config.refine.epochs)
    )
    stage = forecast_stage(groups, started, config.search)
    assert stage["trials"] == 10 and stage["epochs"] == sum(trial.epochs for trial in started)
    return stage["left"], stage["is_bound"]


def trial(epochs: int, *, ended: bool = True, control: bool = False) -> TrialProgress:
    return TrialProgress(epochs, 4, ended, control)


CONTROLS = [trial(4, control=True), trial(4, control=True)]


def test_forecast_before_a_trial_ends_follows_the_pruners_rule() -> None:
    """8 trials of 1 + 1/2 + 1/4 + 1/4 epochs, and two controls, which are never pruned."""
    assert left_of([]) == (pytest.approx(2 * 4 + 8 * 2), False)
    running = [trial(3, ended=False, control=True), trial(0, ended=False, control=True)]
    assert left_of(running) == (pytest.approx(1 + 4 + 8 * 2), False)


def test_forecast_of_a_running_trial_follows_trials_that_reached_its_epoch() -> None:
    """Half of the trials past the first rung pass the second: 1 + 1/2 + 1/2 epochs more."""
    left, _ = left_of([*CONTROLS, trial(1, ended=False)], "search.pruner=none")
    assert left == pytest.approx(7 * 4 + 3)
    left, _ = left_of([*CONTROLS, trial(1, ended=False)])
    # This trial passed the rung, and one of the rule's two trials: 2 of 3 pass.
    assert left == pytest.approx(7 * (1 + 2 / 3 * 2) + 2)


def test_forecast_follows_ended_trials_but_not_controls() -> None:
    """All 4 ended after epoch 1, and one of the rule's 2: 1 of 6 continues, for 2 epochs."""
    left, _ = left_of([*CONTROLS, *[trial(1)] * 4])
    assert left == pytest.approx(4 * (1 + 1 / 6 * 2))
    assert left_of(CONTROLS)[0] == pytest.approx(8 * 2)


def test_failed_control_has_no_epochs_left() -> None:
    assert left_of([trial(1, control=True), CONTROLS[0]])[0] == pytest.approx(8 * 2)


@pytest.mark.parametrize("pruner", ["median", "percentile", "hyperband"])
def test_forecast_of_an_unpredictable_pruner_is_a_bound_until_a_trial_ends(pruner: str) -> None:
    overrides = f"search.pruner={pruner}"
    assert left_of([*CONTROLS, trial(1, ended=False)], overrides) == (7 * 4 + 3, True)
    left, is_bound = left_of([*CONTROLS, trial(1), trial(1, ended=False)], overrides)
    assert (left, is_bound) == (pytest.approx(6 * (1 + 1 / 2 * 3) + 3), False)


def test_finished_search_has_no_epochs_left() -> None:
    assert left_of([*CONTROLS, *[trial(2)] * 8]) == (0, False)
    assert left_of([*CONTROLS, *[trial(2)] * 9]) == (0, False)
