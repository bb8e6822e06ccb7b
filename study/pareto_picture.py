"""AP over what the trials cost, with the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from study.objectives import COSTS, UNITS, may_win, pareto_front
from study.pictures import BASELINE, BEST, DEFAULTS, ENDED_EARLY, OTHER, save
from study.results import TableRow


def draw_pareto_front(trials: Sequence[TableRow], file: Path) -> Path:
    """Saves AP over latency and over parameters, a point per trial, with the front of each."""
    figure = Figure(figsize=(10.5, 4.8), layout="constrained")
    for axes, cost in zip(figure.subplots(1, 2, sharey=True), COSTS, strict=True):
        known = [row for row in trials if row.get(cost) and row["objective"] is not None]
        for row in known:
            style = {"color": _color(row), "marker": "o" if may_win(row) else "x"}
            axes.plot(row[cost], 100 * row["objective"], linestyle="", ms=6, zorder=3, **style)
        _draw_front(axes, [*pareto_front(known, [cost])][::-1], cost)
        axes.set_xlabel(UNITS[cost])
        axes.grid(color="#ececec")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("AP on the slice held out of train")
    figure.suptitle(
        "AP and cost (red: the front; black: baseline; green: defaults; cross: may not win)",
        **{"x": 0.01, "ha": "left"},
    )
    return save(figure, file)


def _color(row: TableRow) -> str:
    if not may_win(row):
        return ENDED_EARLY
    return {"baseline": BASELINE, "defaults": DEFAULTS}.get(row["control"], OTHER)


def _draw_front(axes: Axes, front: Sequence[TableRow], cost: str) -> None:
    """Steps from the cheapest member to the best one, each with its number."""
    costs = [row[cost] for row in front]
    points = [100 * row["objective"] for row in front]
    axes.step(costs, points, where="post", color=BEST, linewidth=1.5, zorder=2)
    for row, x, y in zip(front, costs, points, strict=True):
        axes.annotate(str(row["trial"]), (x, y), (0, 6), textcoords="offset points", ha="center")
