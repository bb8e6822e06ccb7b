"""Plain lines and live panels of a running study."""

from __future__ import annotations

import io
import itertools
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from study import display
from study.display import (
    PREDICTED,
    Display,
    clock,
    confirm_line,
    confirm_panel,
    escape_unprintable,
    heading,
    percent,
    remaining,
    teacher_line,
    teacher_panel,
    trials_line,
    trials_panel,
)

ROW = {"epoch": 3, "val_ap": 0.1234}
TARGETS = ", predicted targets of 1,280 of 6,815 crops"
WITH_TARGETS = {**ROW, PREDICTED: (1280, 6815)}


def stage(trials: int, epochs: int = 0, left: float = 0, is_bound: bool = False) -> Any:
    return {"trials": trials, "epochs": epochs, "left": left, "is_bound": is_bound}


def status(**changes: Any) -> dict[str, Any]:
    """A search of 5 trials: two ended after 6 and 2 epochs, a third is in its fourth."""
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
def test_seconds_are_formatted_as_a_clock(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown


def test_ap_is_formatted_in_points_and_none_as_a_dash() -> None:
    assert percent(0.1234) == "12.3" and percent(None) == "-"


def test_figures_have_the_headings_of_coco() -> None:
    names = ["ap", "ap50", "ar_m", "ap_easy"]
    assert [heading(name) for name in names] == ["AP", "AP50", "AR(M)", "AP(easy)"]


def test_remaining_time_assumes_the_same_time_per_epoch() -> None:
    assert remaining(status(), elapsed=24.0) == "about 0:16"


def test_remaining_time_is_none_before_the_first_epoch() -> None:
    nothing = status(stages=[stage(5, left=30)], running=[], states={"COMPLETE": 0})
    assert remaining(nothing, elapsed=9.0) is None


def test_remaining_time_counts_only_epochs_of_this_session() -> None:
    """8 epochs are left; 10 of the 12 are of an earlier session, so 2 took 6 s."""
    assert remaining(status(epochs_before=10), elapsed=6.0) == "about 0:24"


def test_remaining_time_includes_a_stage_that_has_not_begun() -> None:
    stages = [stage(4, epochs=21, left=3), stage(4, left=8)]
    assert remaining(status(stages=stages), elapsed=21.0) == "about 0:11"


def test_remaining_time_is_a_bound_while_the_pruner_is_unpredictable() -> None:
    stages = [stage(4, epochs=21, left=3), stage(4, left=8, is_bound=True)]
    assert remaining(status(stages=stages), elapsed=21.0) == "at most 0:11"
    over = [stage(4, epochs=21, is_bound=True), stage(4, left=8)]
    assert remaining(status(stages=over), elapsed=21.0) == "about 0:08"


def test_trials_line_has_states_best_baseline_resources_and_time_left() -> None:
    line = trials_line(status(), 24.0)
    assert "trials 2/5 (complete 1, pruned 1)" in line
    assert "best AP 25.0" in line and "baseline -" in line
    assert "2 at 4/6" in line and "left about 0:16" in line
    assert "| CPUs 1.5/2, GPUs 1/4 |" in line


def test_every_panel_has_the_resources_in_use() -> None:
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


def test_resources_are_read_at_each_poll(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(display, "POLL_S", 0.0)
    polls = iter(range(1, 1000))
    ended, over = itertools.count(), threading.Event()

    def in_use() -> dict[str, tuple[float, float]]:
        number = next(polls)
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
        (WITH_TARGETS, 3, f"teacher: epoch 3/3, AP 12.3{TARGETS}"),
        (None, 0, "teacher: starting"),
        (ROW, 0, "teacher: not trained here, AP 12.3"),
        (WITH_TARGETS, 0, f"teacher: not trained here, AP 12.3{TARGETS}"),
    ],
)
def test_teacher_line_has_epochs_ap_and_predicted_targets(
    row: dict[str, Any] | None, epochs: int, line: str
) -> None:
    assert teacher_line({"teacher": row}, epochs, 1.0) == line


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_name_that_the_terminal_cannot_print_is_escaped(
    monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    escape_unprintable()
    name = "\u4eba \udcff.jpg"  # a letter, and a byte that is no UTF-8
    print(name, flush=True)
    Display("plain").notify(name)
    sys.stdout.flush()
    letter = name[0].encode() if encoding == "utf-8" else b"\\u4eba"
    assert written.getvalue().count(letter + b" \\udcff.jpg\n") == 2


@pytest.mark.parametrize("command", ["tune", "analyze", "dataset", "export", "predict"])
def test_each_command_escapes_what_it_cannot_print(command: str) -> None:
    source = (Path(display.__file__).parent / f"{command}.py").read_text()
    assert source.count("    escape_unprintable()\n") == 1
