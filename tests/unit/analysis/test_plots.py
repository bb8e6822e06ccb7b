"""Plots: positions, labels and colors, also of few, equal or failed trials."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from search_spaces.space import Parameter, SearchSpace
from study.analysis import figures, parallel_coordinates, plots

SPACE = SearchSpace(
    "made_up",
    "Which?",
    (
        Parameter("p.lr", FloatDistribution(1e-4, 1e-2, log=True), "nuisance"),
        Parameter("p.kind", CategoricalDistribution(("x", "y", "z")), "scientific"),
        Parameter("p.depth", IntDistribution(1, 5), "scientific", {"p.kind": ("y",)}),
    ),
)


def trial(number: int, objective: float | None, **changes: Any) -> dict[str, Any]:
    row = {"trial": number, "state": "COMPLETE", "control": None, "objective": objective}
    return {**row, "params.p.lr": 1e-3, "params.p.kind": "x", "params.p.depth": None, **changes}


def curve(number: int | None, *aps: float | None, stages: str = "ddrr") -> list[dict[str, Any]]:
    names = {"d": "distill", "r": "refine", "t": "teacher"}
    return [
        {"trial": number, "stage": names[stages[index]], "epoch": index + 1, "val_ap": ap}
        for index, ap in enumerate(aps)
    ]


TRIALS = [
    trial(0, 0.2, control="baseline"),
    trial(1, 0.3, control="defaults"),
    trial(2, 0.4),
    trial(3, 0.1, state="PRUNED"),
    trial(4, None, state="FAIL"),
]
REPORTS = [
    *curve(0, 0.1, 0.2, 0.2, 0.15, stages="dddd"),
    *curve(1, 0.1, 0.2, 0.25, 0.3),
    *curve(2, 0.2, 0.3, 0.4, 0.35),
    *curve(3, 0.1),
    *curve(5, 0.15, 0.2),
    *curve(None, 0.3, 0.5, stages="tt"),
]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that a test saves."""
    saved: list[Figure] = []
    save = plots.save

    def keep(figure: Figure, file: Path) -> Path:
        saved.append(figure)
        return save(figure, file)

    monkeypatch.setattr(plots, "save", keep)
    monkeypatch.setattr(parallel_coordinates, "save", keep)
    return saved


def words(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def test_best_trial_and_controls_are_named_with_their_best_ap(
    tmp_path: Path, drawn: list[Figure]
) -> None:
    file = plots.draw_learning_curves(TRIALS, REPORTS, tmp_path / "new" / "curves.png")
    assert file.read_bytes().startswith(b"\x89PNG")
    named = ["baseline  20.0", "defaults  30.0", "best: trial 2  40.0", "teacher  50.0"]
    assert words(drawn[0]) == ["distill", "refine", *named]


def test_a_control_may_be_the_best() -> None:
    assert plots._named_trials(TRIALS[:1]) == {0: ("best: baseline", figures.BASELINE_COLOR)}


def test_defaults_of_the_two_stages_have_two_names() -> None:
    refined = trial(7, 0.35, control="defaults", parent_trial=2)
    names = {number: name for number, (name, _) in plots._named_trials([*TRIALS, refined]).items()}
    assert (names[1], names[7]) == ("defaults", "defaults, refined")


def test_stages_are_named_only_if_all_trials_change_at_once(
    tmp_path: Path, drawn: list[Figure]
) -> None:
    early = curve(2, 0.2, 0.3, 0.4, stages="drr")
    plots.draw_learning_curves(TRIALS, [*curve(1, 0.1, 0.2, 0.3), *early], tmp_path / "curves.png")
    assert "distill" not in words(drawn[0])


def test_reports_without_an_ap_are_left_out_of_a_curve() -> None:
    assert [row["epoch"] for row in plots._curves(curve(0, None, 0.2, None, 0.3))[0]] == [2, 4]


def test_a_value_stands_at_its_place_on_its_own_scale() -> None:
    lr, kind, depth = map(parallel_coordinates._scale, SPACE.parameters)
    assert [lr.place(value) for value in (1e-4, 1e-3, 1e-2)] == pytest.approx([0.0, 0.5, 1.0])
    assert [kind.place(value) for value in "xyz"] == [0.0, 0.5, 1.0]
    assert [depth.place(value) for value in (1, 2, 5)] == [0.0, 0.25, 1.0]
    assert [label for _, label in lr.ticks] == ["0.0001", "0.001", "0.01"]
    assert [label for _, label in depth.ticks] == ["1", "2", "3", "4", "5"]


def test_a_range_of_one_value_stands_in_the_middle() -> None:
    for distribution, value in (
        (IntDistribution(3, 3), 3),
        (FloatDistribution(0.1, 0.1, log=True), 0.1),
        (CategoricalDistribution(("x",)), "x"),
    ):
        scale = parallel_coordinates._scale(Parameter("p", distribution, "nuisance"))
        assert scale.place(value) == 0.5


def test_missing_value_stands_below_the_scales(tmp_path: Path, drawn: list[Figure]) -> None:
    depth = parallel_coordinates._scale(SPACE.parameters[2])
    assert parallel_coordinates._height(depth, trial(0, 0.1), index=7) < -0.1
    parallel_coordinates.draw_parallel_coordinates(TRIALS, SPACE, tmp_path / "parallel.png")
    assert words(drawn[0]).count("unused") == 1
    assert {"p\nlr", "p\nkind", "p\ndepth", "AP", "10.0", "40.0"} <= set(words(drawn[0]))


def test_pruned_trials_are_gray_and_the_best_is_thick(tmp_path: Path, drawn: list[Figure]) -> None:
    parallel_coordinates.draw_parallel_coordinates(TRIALS, SPACE, tmp_path / "parallel.png")
    pruned, baseline, defaults, best = drawn[0].axes[0].lines[:4]
    assert pruned.get_color() == figures.STOPPED_COLOR
    assert len({str(line.get_color()) for line in (baseline, defaults, best)}) == 3
    assert best.get_linewidth() > defaults.get_linewidth() == pruned.get_linewidth()


@pytest.mark.parametrize("trials", [TRIALS[:1], TRIALS[3:], TRIALS[4:], [TRIALS[0]] * 2])
def test_few_or_equal_or_failed_trials_can_be_drawn(
    tmp_path: Path, trials: list[dict[str, Any]]
) -> None:
    plots.draw_learning_curves(trials, REPORTS[:1], tmp_path / "curves.png")
    plots.draw_learning_curves(trials, [], tmp_path / "empty.png")
    parallel_coordinates.draw_parallel_coordinates(trials, SPACE, tmp_path / "parallel.png")
    for name in ("curves", "empty", "parallel"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("number", [17, 133])
def test_bars_of_many_joints_fit_on_a_page(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(plots, "save", lambda figure, file: drawn.append(figure) or file)
    joints = [{"role": "teacher", "joint": f"j{n}", "ap": 0.5} for n in range(number)]
    plots.draw_joint_bars(joints, tmp_path / "joint_ap.png")
    labels = [label.get_text() for label in drawn[0].axes[0].get_xticklabels()]
    assert labels == [f"j{n}" for n in range(number)]
    assert drawn[0].get_figwidth() < 36  # inches
