"""The lines that a study shows where the output is no terminal."""

from __future__ import annotations

from typing import Any

import pytest

from study.display import clock, percent, remaining, teacher_line, trials_line

ROW = {"epoch": 3, "val_ap": 0.1234}


def status(**changes: Any) -> dict[str, Any]:
    """Two trials have ended, of 6 and of 2 epochs; a third has come to its fourth."""
    known: dict[str, Any] = {
        "states": {"COMPLETE": 1, "PRUNED": 1, "FAIL": 0},
        "running": [{"trial": 2, "epoch": 4, "budget": 6, "ap": 0.2}],
        "best": {"trial": 0, "ap": 0.25},
        "baseline": None,
        "epochs": 12,
    }
    return known | changes


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0:00"), (61.6, "1:02"), (3599.4, "59:59"), (3722, "1:02:02")]
)
def test_seconds_are_shown_as_a_clock_shows_them(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown


def test_ap_is_shown_in_points_and_no_ap_as_a_dash() -> None:
    assert percent(0.1234) == "12.3" and percent(None) == "-"


def test_trials_to_come_are_taken_to_be_as_long_as_those_that_ended() -> None:
    """8 epochs in 2 ended trials: 4 each. 3 trials to come are 12 epochs, of which 4 are done."""
    assert remaining(status(), trials=5, budget=6, elapsed=24.0) == pytest.approx(16.0)


def test_nothing_is_said_of_the_time_left_before_the_first_epoch() -> None:
    nothing = status(epochs=0, running=[], states={"COMPLETE": 0})
    assert remaining(nothing, trials=5, budget=6, elapsed=9.0) is None


def test_the_trials_line_tells_states_best_baseline_and_time_left() -> None:
    line = trials_line(status(), 5, 6, 24.0)
    assert "trials 2/5 (complete 1, pruned 1)" in line
    assert "best AP 25.0" in line and "baseline -" in line
    assert "2 at 4/6" in line and "left about 0:16" in line


@pytest.mark.parametrize(
    ("row", "epochs", "line"),
    [
        (None, 20, "teacher: starting (20 epochs)"),
        (ROW, 20, "teacher: epoch 3/20, AP 12.3"),
        (None, 0, "teacher: asked about everyone"),
        (ROW, 0, "teacher: asked about everyone, AP 12.3 as it comes"),
    ],
)
def test_the_teachers_line_tells_whether_it_is_trained_or_asked(
    row: dict[str, Any] | None, epochs: int, line: str
) -> None:
    assert teacher_line({"teacher": row}, epochs, 1.0) == line
