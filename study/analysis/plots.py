"""Plots: learning curves, the Pareto front, AP by OKS threshold and by joint."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from study.analysis.figures import (
    BASELINE_COLOR,
    BEST_COLOR,
    DEFAULTS_COLOR,
    STOPPED_COLOR,
    STOPPED_MARK_COLOR,
    TEACHER_COLOR,
    TRIAL_COLOR,
    open_frame,
    save,
)
from study.analysis.tables import ap_by_role
from study.config.schema import COSTS
from study.search.controls import BASELINE, DEFAULTS
from study.search.objectives import UNITS, may_win, pareto_front
from study.storage.tables import TableRow
from study.validation.confirm_table import WINNER
from study.validation.finalists import BEST_DISTILLED, BEST_REFINED, TEACHER

FEW_JOINTS = 24
"""With more joints their bars are narrow and their names upright."""
ROLE_COLORS = {
    TEACHER: TEACHER_COLOR,
    BASELINE: BASELINE_COLOR,
    BEST_DISTILLED: TRIAL_COLOR,
    BEST_REFINED: DEFAULTS_COLOR,
    WINNER: BEST_COLOR,
}
CONTROL_COLORS = {BASELINE: BASELINE_COLOR, DEFAULTS: DEFAULTS_COLOR}


class CurveLabel(NamedTuple):
    """The label of a learning curve at the right edge of the plot."""

    ap: float
    """Best AP of the curve, 0 to 100: the height of the label."""
    name: str
    color: str


def draw_learning_curves(
    trials: Sequence[TableRow], reports: Sequence[TableRow], file: Path
) -> Path:
    """Plot AP by epoch, a curve per trial; the best and the controls are named."""
    figure = Figure(figsize=(9.5, 5.4), layout="constrained")
    axes = figure.add_subplot()
    curves, named = _curves(reports), _named_trials(trials)
    states = {row["trial"]: row["state"] for row in trials}
    labels: list[CurveLabel] = []
    for number, rows in curves.items():
        epochs = [row["epoch"] for row in rows]
        points = [100 * row["val_ap"] for row in rows]
        if number in named:
            name, color = named[number]
            best = points.index(max(points))
            axes.plot(epochs, points, color=color, linewidth=2.6, zorder=4)
            axes.plot(epochs[best], points[best], color=color, marker="o", ms=8, mec="w", zorder=5)
            labels.append(CurveLabel(points[best], name, color))
        elif states.get(number, "COMPLETE") == "COMPLETE":
            axes.plot(epochs, points, color=TRIAL_COLOR, linewidth=1.3, zorder=3, marker=".", ms=4)
        else:
            end, last = epochs[-1], points[-1]
            axes.plot(epochs, points, color=STOPPED_COLOR, linewidth=1.1, zorder=2)
            axes.plot(end, last, color=STOPPED_MARK_COLOR, marker="x", ms=5, zorder=2)
    teacher_aps = [row["val_ap"] for row in reports if row["stage"] == "teacher"]
    reached = max((100 * ap for ap in teacher_aps if ap is not None), default=None)
    if reached is not None:
        axes.axhline(reached, color=TEACHER_COLOR, linestyle=(0, (5, 3)), linewidth=1.5)
        labels.append(CurveLabel(reached, "teacher", TEACHER_COLOR))
    axes.set_ylim(bottom=0)
    _mark_change_of_stage(axes, curves)
    _write_labels(axes, labels)
    _label_learning_curves(axes)
    return save(figure, file)


def _curves(reports: Sequence[TableRow]) -> dict[int, list[TableRow]]:
    """Reports that have an AP, by trial and in the order of epochs."""
    curves: dict[int, list[TableRow]] = {}
    for row in sorted(reports, key=lambda row: row["epoch"]):
        if row["trial"] is not None and row["val_ap"] is not None:
            curves.setdefault(row["trial"], []).append(row)
    return curves


def _named_trials(trials: Sequence[TableRow]) -> dict[int, tuple[str, str]]:
    """Name and color of the best trial and of the controls."""
    done = [row for row in trials if row["state"] == "COMPLETE" and row["objective"] is not None]
    named = {
        row["trial"]: (_control_name(row), CONTROL_COLORS.get(row["control"], DEFAULTS_COLOR))
        for row in done
        if row["control"]
    }
    if done:
        candidates = [row for row in done if may_win(row)] or done
        best = max(candidates, key=lambda row: row["objective"])["trial"]
        name, color = named.get(best, (f"trial {best}", BEST_COLOR))
        named[best] = (f"best: {name}", color)
    return named


def _control_name(row: TableRow) -> str:
    """The control's name; with plan=staged each stage has defaults of its own."""
    has_parent = row.get("parent_trial") is not None
    return f"{row['control']}, refined" if has_parent else str(row["control"])


def _mark_change_of_stage(axes: Axes, curves: dict[int, list[TableRow]]) -> None:
    """Draw a line where trials change from stage 1 to 2; name the stages if all do at once."""
    changes = {
        later["epoch"] - 0.5
        for rows in curves.values()
        for earlier, later in itertools.pairwise(rows)
        if (earlier["stage"], later["stage"]) == ("distill", "refine")
    }
    for epoch in changes:
        axes.axvline(epoch, color="#b0b0b0", linewidth=1.0, zorder=1)
    if len(changes) == 1:
        (epoch,) = changes
        for text, side, shift in (("distill", "right", -6), ("refine", "left", 6)):
            axes.annotate(
                text,
                xy=(epoch, 1.0),
                xytext=(shift, 3),
                xycoords=axes.get_xaxis_transform(),
                textcoords="offset points",
                ha=side,
                va="bottom",
                color="#7a7a7a",
            )


def _write_labels(axes: Axes, labels: Sequence[CurveLabel]) -> None:
    """Write the labels at the right edge, moved up where they would overlap."""
    gap = 0.05 * axes.get_ylim()[1]
    height = -math.inf
    for label in sorted(labels):
        height = max(label.ap, height + gap)
        axes.annotate(
            f"{label.name}  {label.ap:.1f}",
            xy=(1.0, height),
            xytext=(8, 0),
            xycoords=axes.get_yaxis_transform(),
            textcoords="offset points",
            va="center",
            color=label.color,
            annotation_clip=False,
        )


def _label_learning_curves(axes: Axes) -> None:
    axes.set_title("Learning curves", loc="left")
    axes.set_xlabel("epoch, counted over both stages")
    axes.set_ylabel("AP on the slice held out of train")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    open_frame(axes, grid="y")
    handles = [
        Line2D([], [], color=TRIAL_COLOR, marker=".", label="other trials"),
        Line2D(
            [],
            [],
            color=STOPPED_COLOR,
            marker="x",
            mec=STOPPED_MARK_COLOR,
            label="pruned or failed",
        ),
        Line2D([], [], color="#555555", marker="o", ms=8, mec="w", lw=2.6, label="its best epoch"),
    ]
    axes.legend(handles=handles, loc="lower right", frameon=False)


def draw_pareto_front(trials: Sequence[TableRow], file: Path) -> Path:
    """Plot AP over latency and over parameters, a point per trial, with both Pareto fronts."""
    figure = Figure(figsize=(10.5, 4.8), layout="constrained")
    for axes, cost in zip(figure.subplots(1, 2, sharey=True), COSTS, strict=True):
        known = [row for row in trials if row.get(cost) and row["objective"] is not None]
        for row in known:
            axes.plot(
                row[cost],
                100 * row["objective"],
                color=_point_color(row),
                marker="o" if may_win(row) else "x",
                linestyle="",
                ms=6,
                zorder=3,
            )
        cheapest_first = pareto_front(known, [cost])[::-1]
        _draw_front(axes, cheapest_first, cost)
        axes.set_xlabel(UNITS[cost])
        open_frame(axes, grid="both")
    figure.axes[0].set_ylabel("AP on the slice held out of train")
    figure.suptitle(
        "AP and cost (red: the front; black: baseline; green: defaults; cross: may not win)",
        x=0.01,
        ha="left",
    )
    return save(figure, file)


def _point_color(row: TableRow) -> str:
    return CONTROL_COLORS.get(row["control"], TRIAL_COLOR) if may_win(row) else STOPPED_COLOR


def _draw_front(axes: Axes, front: Sequence[TableRow], cost: str) -> None:
    """Draw steps from the cheapest member to the best, each with its trial's number."""
    costs = [row[cost] for row in front]
    points = [100 * row["objective"] for row in front]
    axes.step(costs, points, where="post", color=BEST_COLOR, linewidth=1.5, zorder=2)
    for row, x, y in zip(front, costs, points, strict=True):
        axes.annotate(str(row["trial"]), (x, y), (0, 6), textcoords="offset points", ha="center")


def draw_oks_curves(curves: Sequence[TableRow], file: Path) -> Path:
    """Plot AP by OKS threshold, a line per finalist."""
    figure = Figure(figsize=(8.0, 5.0), layout="constrained")
    axes = figure.add_subplot()
    for role, aps in ap_by_role(curves, "oks").items():
        thresholds = sorted(oks for oks, ap in aps.items() if ap is not None)
        points = [100 * (aps[oks] or 0.0) for oks in thresholds]
        style = "--" if role == WINNER else "-"  # it covers another finalist's line
        label = role.replace("_", " ")
        axes.plot(thresholds, points, style, color=ROLE_COLORS[role], marker=".", label=label)
    axes.set_xlabel("OKS from which a pose counts as right")
    _label_finalists(axes, "AP by OKS threshold, on val")
    figure.legend(loc="outside lower center", ncols=len(ROLE_COLORS), frameon=False)
    return save(figure, file)


def draw_joint_bars(joints: Sequence[TableRow], file: Path) -> Path:
    """Plot the AP of each joint alone, a bar per finalist except the winner, which is another."""
    by_role = ap_by_role([row for row in joints if row["role"] != WINNER], "joint")
    names = list(dict.fromkeys(row["joint"] for row in joints))
    width = 0.8 / len(by_role)
    has_room = len(names) <= FEW_JOINTS
    inches = (0.75 if has_room else 0.25) * len(names)
    figure = Figure(figsize=(max(8.0, inches), 5.0), layout="constrained")
    axes = figure.add_subplot()
    for place, (role, aps) in enumerate(by_role.items()):
        left = [joint + (place + 0.5) * width - 0.4 for joint in range(len(names))]
        heights = [100 * (aps.get(name) or 0.0) for name in names]
        axes.bar(left, heights, width, color=ROLE_COLORS[role], label=role.replace("_", " "))
    ticks = [name.replace("_", " ") for name in names]
    axes.set_xticks(
        range(len(names)),
        ticks,
        rotation=40 if has_room else 90,
        ha="right" if has_room else "center",
    )
    _label_finalists(axes, "AP of each joint alone, on val")
    figure.legend(loc="outside lower center", ncols=len(ROLE_COLORS), frameon=False)
    return save(figure, file)


def _label_finalists(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left")
    axes.set_ylabel("AP")
    axes.set_ylim(bottom=0)
    axes.set_axisbelow(True)
    open_frame(axes, grid="y")
