"""The analysis: figures from Parquet alone, and what they are worth."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from search_spaces.space import Parameter, SearchSpace
from study.analyze import main, near_bounds
from study.search.staged import PARENT
from study.storage import tables

ROOT = Path(__file__).resolve().parents[3]
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


def trial(number: int, objective: float | None, **changes: Any) -> dict[str, Any]:
    row = {
        "study": "made-up",
        "trial": number,
        "control": None,
        "state": "COMPLETE",
        "error": None,
        "objective": objective,
        "best_stage": "refine",
        "best_epoch": 3,
        "params.p.a": 0.5,
        "params.p.b": 0.01,
        "params.p.kind": "x",
    }
    return {**row, **changes}


@pytest.fixture
def study(tmp_path: Path) -> Path:
    rows = [
        trial(0, 0.20, control="baseline", best_stage="distill"),
        trial(1, 0.25, control="defaults"),
        {**trial(2, 0.31), "params.p.kind": "y", "params.p.depth": 6},
        trial(3, 0.22, state="PRUNED"),
        trial(4, None, state="FAIL", error="Traceback\nRuntimeError: loss is NaN [epoch 3]"),
        trial(5, 0.28),
    ]
    for row in rows:
        reports = [
            {"trial": row["trial"], "stage": stage, "epoch": epoch, "val_ap": 0.05 * epoch}
            for epoch, stage in enumerate(("distill", "distill", "refine"), start=1)
        ]
        tables.write_trial(tmp_path, row, reports, SPACE)
    return tmp_path


def printed(
    study: Path, capsys: pytest.CaptureFixture[str], *options: str, draws: bool = False
) -> str:
    """Return what the command prints; plots take longest and need ``draws``."""
    with pytest.MonkeyPatch.context() as patch:
        if not draws:
            patch.setattr("study.analyze._draw", lambda evidence, folder: ())
        main([str(study), *options])
    return capsys.readouterr().out


def cells(text: str, first: str) -> list[list[str]]:
    """The rows of tables that start with this cell, without it."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    return [line[1:] for line in lines if line and line[0] == first]


@pytest.mark.parametrize(
    ("values", "sentences"),
    [
        ({"p.a": 0.5, "p.b": 0.003, "p.depth": 3}, []),
        ({"p.a": 0.97}, ["p.a=0.97 lies near the upper bound of its range, 1:"]),
        ({"p.a": 0.0}, ["p.a=0 lies near the lower bound of its range, 0:"]),
        # 0.00013 is at 4 % of the range of logarithms, 0.0002 at 10 %.
        ({"p.b": 0.00013}, ["p.b=0.00013 lies near the lower bound of its range, 0.0001:"]),
        ({"p.b": 0.0002}, []),
        ({"p.depth": 6}, ["p.depth=6 lies near the upper bound of its range, 6:"]),
        ({"p.kind": "x", "p.depth": None}, []),
    ],
)
def test_best_value_near_a_bound_is_reported(
    values: dict[str, Any], sentences: Sequence[str]
) -> None:
    row = {f"params.{path}": value for path, value in values.items()}
    found = near_bounds(row, SPACE)
    assert len(found) == len(sentences)
    assert all(text.startswith(start) for text, start in zip(found, sentences, strict=True))


def test_range_of_parents_is_never_reported() -> None:
    """Rank 0 is the best parent; there is none below it."""
    rank = Parameter(PARENT, IntDistribution(0, 2), "nuisance")
    space = dataclasses.replace(SPACE, parameters=(rank, *SPACE.parameters))
    assert near_bounds({"params.parent": 0, "params.p.a": 0.5}, space) == []


def test_states_and_reasons_of_failures_are_printed(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables.write_running(study, 6, [{"trial": 6, "epoch": 1, "val_ap": 0.1}], SPACE)
    text = printed(study, capsys)
    assert "made-up: 6 trials ended: 4 COMPLETE, 1 FAIL, 1 PRUNED; 1 more started" in text
    assert "Trial 4 failed: RuntimeError: loss is NaN [epoch 3]" in text
    assert "Question: Which of three?" in text


def test_the_best_trials_come_first_with_their_parameters(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(study, capsys, "--top", "3")
    assert cells(text, "trial")[0] == ["2", "5", "1 (defaults)"]
    assert cells(text, "AP") == [["31.0", "28.0", "25.0"]]
    assert cells(text, "p.kind")[0] == ["y", "x", "x"]
    assert cells(text, "p.depth")[0] == ["6", "-", "-"]
    assert "p.depth=6 lies near the upper bound" in text


def test_gain_over_the_controls_is_printed(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(study, capsys)
    assert cells(text, "baseline") == [["0", "20.0", "", "-5.0"]]
    assert cells(text, "defaults") == [["1", "25.0", "+5.0", ""]]
    assert cells(text, "best") == [["2", "31.0", "+11.0", "+6.0"]]


def test_finalists_are_listed_from_teacher_to_winner(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "official validation set: none yet" in printed(study, capsys)
    rows = [
        {"role": "winner", "trial": 2, "stage": "refine", "ap": 0.3, "ap_easy": 0.4},
        {"role": "teacher", "stage": "teacher", "ap": 0.5, "ap_easy": 0.6},
    ]
    tables.write_final(study, rows, SPACE)
    text = printed(study, capsys)
    assert text.index("| teacher") < text.index("| winner")
    assert cells(text, "winner") == [["30.0", "40.0", "2", "refine", "-"]]
    assert "AP(easy)" in text
    assert "AP(M)" not in text


def test_finalists_are_printed_and_plotted_by_joint_and_by_oks(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    roles = (("winner", 0.4), ("teacher", 0.6), ("baseline", 0.3))
    rows = [{"role": role, "stage": "refine", "ap": ap} for role, ap in roles]
    joints = [
        {"role": role, "joint": joint, "ap": ap if joint == "left_hip" else None}
        for role, ap in roles
        for joint in ("left_hip", "head")
    ]
    curves = [{"role": role, "oks": oks, "ap": ap} for role, ap in roles for oks in (0.5, 0.55)]
    tables.write_final(study, rows, SPACE, joints, curves)
    text = printed(study, capsys, draws=True)
    assert cells(text, "joint") == [["teacher", "baseline", "winner"]]
    assert cells(text, "left_hip") == [["60.0", "30.0", "40.0"]]
    assert cells(text, "head") == [["-", "-", "-"]]
    for name in ("oks_curves.png", "joint_ap.png"):
        assert f"Saved {study / 'plots' / name}" in text
        assert (study / "plots" / name).read_bytes().startswith(b"\x89PNG")


def test_few_trials_have_no_importance(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "Importance of the parameters: not computed; it needs at least 8 trials" in (
        printed(study, capsys)
    )


def test_importance_is_printed_where_there_are_enough_trials(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(20):
        row = {**trial(number, number / 100), "params.p.a": number / 20}
        tables.write_trial(tmp_path, row, [], SPACE)
    text = printed(tmp_path, capsys)
    assert cells(text, "p.a")[-1][0] == "scientific"
    assert cells(text, "p.a")[-1][-1] == "yes"
    assert cells(text, "p.b")[-1][-1] == "not shown"
    assert "In too few trials to compute the importance: p.depth" in text


def test_shares_that_may_be_chance_are_called_hints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(10):
        row = {**trial(number, (0.1, 0.2)[number % 2]), "params.p.a": number / 10}
        tables.write_trial(tmp_path, row, [], SPACE)
    assert "exceeds what chance gives in this number of trials: treat them as hints" in (
        printed(tmp_path, capsys)
    )


def test_plots_are_saved_and_named(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(study, capsys, draws=True)
    for name in ("learning_curves.png", "parallel_coordinates.png"):
        file = study / "plots" / name
        assert f"Saved {file}" in text
        assert file.read_bytes().startswith(b"\x89PNG")


def test_study_whose_trials_all_failed_is_analyzed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables.write_trial(tmp_path, trial(0, None, state="FAIL", error=None), [], SPACE)
    text = printed(tmp_path, capsys, draws=True)
    assert "Trial 0 failed: no reason was recorded" in text
    assert "No complete trial yet" in text


def test_a_folder_that_is_no_study_ends_in_one_message(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"^error: a study must be named by its folder"):
        main([str(tmp_path)])


def test_listing_no_trial_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--top", "0"])
    assert "--top must be at least 1, got 0" in capsys.readouterr().err


def test_the_script_runs_from_any_folder_and_explains_itself(tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, str(ROOT / "study" / "analyze.py"), "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "parallel_coordinates.png" in found.stdout
    assert "python study/analyze.py studies/" in found.stdout
