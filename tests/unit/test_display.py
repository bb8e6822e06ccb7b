"""The lines that a study shows where the output is no terminal."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import pytest
from rich.console import Console

from study import display
from study.display import (
    Display,
    clock,
    confirm_line,
    confirm_panel,
    percent,
    remaining,
    teacher_line,
    teacher_panel,
    trials_line,
    trials_panel,
)

ROW = {"epoch": 3, "val_ap": 0.1234}
ASKED = {**ROW, "asked": (1280, 6815)}


def stage(trials: int, epochs: int = 0, left: float = 0, is_bound: bool = False) -> Any:
    return {"trials": trials, "epochs": epochs, "left": left, "is_bound": is_bound}


def status(**changes: Any) -> dict[str, Any]:
    """Two of 5 trials have ended, of 6 and of 2 epochs; a third has come to its fourth."""
    known: dict[str, Any] = {
        "states": {"COMPLETE": 1, "PRUNED": 1, "FAIL": 0},
        "running": [{"trial": 2, "epoch": 4, "budget": 6, "ap": 0.2}],
        "best": {"trial": 0, "ap": 0.25},
        "baseline": None,
        "stages": [stage(5, epochs=12, left=8)],
        "epochs_before": 0,
        "resources": {"CPU": (1.5, 2.0), "GPU": (1.0, 4.0)},
    }
    return known | changes


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0:00"), (61.6, "1:02"), (3599.4, "59:59"), (3722, "1:02:02")]
)
def test_seconds_are_shown_as_a_clock_shows_them(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown


def test_ap_is_shown_in_points_and_no_ap_as_a_dash() -> None:
    assert percent(0.1234) == "12.3" and percent(None) == "-"


def test_epochs_to_come_take_as_long_as_those_that_were() -> None:
    assert remaining(status(), elapsed=24.0) == "about 0:16"


def test_nothing_is_said_of_the_time_left_before_the_first_epoch() -> None:
    nothing = status(stages=[stage(5, left=30)], running=[], states={"COMPLETE": 0})
    assert remaining(nothing, elapsed=9.0) is None


def test_the_pace_is_that_of_the_epochs_since_the_search_went_on() -> None:
    """8 epochs to come; of the 12 there are, 10 were there before: 2 took 6 s."""
    assert remaining(status(epochs_before=10), elapsed=6.0) == "about 0:24"


def test_a_stage_to_come_is_counted_too() -> None:
    stages = [stage(4, epochs=21, left=3), stage(4, left=8)]
    assert remaining(status(stages=stages), elapsed=21.0) == "about 0:11"


def test_time_that_nobody_can_foresee_is_bounded() -> None:
    stages = [stage(4, epochs=21, left=3), stage(4, left=8, is_bound=True)]
    assert remaining(status(stages=stages), elapsed=21.0) == "at most 0:11"
    over = [stage(4, epochs=21, is_bound=True), stage(4, left=8)]
    assert remaining(status(stages=over), elapsed=21.0) == "about 0:08"


def test_the_trials_line_tells_states_best_baseline_resources_and_time_left() -> None:
    line = trials_line(status(), 24.0)
    assert "trials 2/5 (complete 1, pruned 1)" in line
    assert "best AP 25.0" in line and "baseline -" in line
    assert "2 at 4/6" in line and "left about 0:16" in line
    assert "| CPUs 1.5/2, GPUs 1/4 |" in line


def test_every_image_tells_what_is_in_use_of_what_there_is() -> None:
    confirming = {"states": {"COMPLETE": 1}, "runs": 6, "running": []}
    confirming["resources"] = status()["resources"]
    console = Console(width=100)
    with console.capture() as seen:
        console.print(trials_panel(status(), 24.0))
        console.print(teacher_panel(status(teacher=ROW), 20, 9.0))
        console.print(confirm_panel(confirming, 9.0))
    shown = [line for line in seen.get().splitlines() if "CPUs 1.5/2, GPUs 1/4" in line]
    assert len(shown) == 3
    assert "CPUs 1.5/2" in confirm_line(confirming, 9.0)


def test_what_is_in_use_is_asked_at_each_look(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(display, "POLL_S", 0.0)
    looks = iter(range(1, 1000))
    ended, over = itertools.count(), threading.Event()

    def in_use() -> dict[str, tuple[float, float]]:
        number = next(looks)
        if number == 3:
            over.set()
        return {"CPU": (number, 8.0)}

    def poll() -> dict[str, Any]:
        return status(states={"COMPLETE": next(ended)}, resources={})

    with Display("plain", in_use).watching(poll, trials_panel, trials_line):
        assert over.wait(10)
    printed = capsys.readouterr().out
    assert "CPUs 1/8" in printed and "CPUs 2/8" in printed


@pytest.mark.parametrize(
    ("row", "epochs", "line"),
    [
        (None, 20, "teacher: starting (20 epochs)"),
        (ROW, 20, "teacher: epoch 3/20, AP 12.3"),
        (ROW, 3, "teacher: epoch 3/3, AP 12.3"),
        (ASKED, 3, "teacher: epoch 3/3, AP 12.3, asked about 1,280 of 6,815 crops"),
        (None, 0, "teacher: starting"),
        (ROW, 0, "teacher: AP 12.3 as it comes"),
        (ASKED, 0, "teacher: AP 12.3 as it comes, asked about 1,280 of 6,815 crops"),
    ],
)
def test_the_teachers_line_tells_whether_it_is_trained_or_asked(
    row: dict[str, Any] | None, epochs: int, line: str
) -> None:
    assert teacher_line({"teacher": row}, epochs, 1.0) == line
