"""Plots: learning curves, the Pareto front, AP by OKS threshold and by joint."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from study.analysis.tables import ap_by_role
from study.config.schema import COSTS
from study.search.objectives import UNITS, may_win, pareto_front
from study.storage.tables import TableRow

BASELINE, DEFAULTS, BEST, TEACHER = "#1a1a1a", "#2a7f62", "#d1495b", "#7d55a8"
OTHER, ENDED_EARLY, END_MARK = "#8fb1d3", "#cfcfcf", "#9a9a9a"
COLORS = {
    "teacher": TEACHER,
    "baseline": BASELINE,
    "best_distilled": OTHER,
    "best_refined": DEFAULTS,
    "winner": BEST,
}


def draw_oks_curves(curves: Sequence[TableRow], file: Path) -> Path:
    """Saves AP by the OKS from which on a pose is right, a line per finalist."""
    figure = Figure(figsize=(8.0, 5.0), layout="constrained")
    axes = figure.add_subplot()
    for role, aps in ap_by_role(curves, "oks").items():
        thresholds = sorted(oks for oks, ap in aps.items() if ap is not None)
        points = [100 * (aps[oks] or 0.0) for oks in thresholds]
        style = "--" if role == "winner" else "-"  # it lies on another finalist's line
        label = role.replace("_", " ")
        axes.plot(thresholds, points, style, color=COLORS[role], marker=".", label=label)
    axes.set_xlabel("a pose is right from this OKS on")
    _dress_bars(axes, "AP by OKS threshold, on val")
    figure.legend(loc="outside lower center", ncols=len(COLORS), frameon=False)
    return save(figure, file)


def draw_joint_bars(joints: Sequence[TableRow], file: Path) -> Path:
    """Saves the AP of each joint alone, a bar per finalist but the winner, who is one of them."""
    by_role = ap_by_role([row for row in joints if row["role"] != "winner"], "joint")
    names = list(dict.fromkeys(row["joint"] for row in joints))
    width = 0.8 / len(by_role)
    figure = Figure(figsize=(max(8.0, 0.75 * len(names)), 5.0), layout="constrained")
    axes = figure.add_subplot()
    for place, (role, aps) in enumerate(by_role.items()):
        left = [joint + (place + 0.5) * width - 0.4 for joint in range(len(names))]
        heights = [100 * (aps.get(name) or 0.0) for name in names]
        axes.bar(left, heights, width, color=COLORS[role], label=role.replace("_", " "))
    labels = [name.replace("_", " ") for name in names]
    axes.set_xticks(range(len(names)), labels, rotation=40, ha="right")
    _dress_bars(axes, "AP of each joint alone, on val")
    figure.legend(loc="outside lower center", ncols=len(COLORS), frameon=False)
    return save(figure, file)


def _dress_bars(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left")
    axes.set_ylabel("AP")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color="#ececec")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


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


def draw_learning_curves(
    trials: Sequence[TableRow], reports: Sequence[TableRow], file: Path
) -> Path:
    """Saves the AP of every trial by epoch; controls and the best stand out, pruned ones fade."""
    figure = Figure(figsize=(9.5, 5.4), layout="constrained")
    axes = figure.add_subplot()
    curves, emphasis = _curves(reports), _emphasis(trials)
    states = {row["trial"]: row["state"] for row in trials}
    notes: list[tuple[float, str, str]] = []
    for number, rows in curves.items():
        epochs = [row["epoch"] for row in rows]
        points = [100 * row["val_ap"] for row in rows]
        if number in emphasis:
            name, color = emphasis[number]
            top = points.index(max(points))
            axes.plot(epochs, points, color=color, linewidth=2.6, zorder=4)
            axes.plot(epochs[top], points[top], color=color, marker="o", ms=8, mec="w", zorder=5)
            notes.append((points[top], name, color))
        elif states.get(number, "COMPLETE") == "COMPLETE":
            axes.plot(epochs, points, color=OTHER, linewidth=1.3, zorder=3, marker=".", ms=4)
        else:
            axes.plot(epochs, points, color=ENDED_EARLY, linewidth=1.1, zorder=2)
            axes.plot(epochs[-1], points[-1], color=END_MARK, marker="x", ms=5, zorder=2)
    teacher = [row["val_ap"] for row in reports if row["stage"] == "teacher"]
    reached = max((100 * ap for ap in teacher if ap is not None), default=None)
    if reached is not None:
        axes.axhline(reached, color=TEACHER, linestyle=(0, (5, 3)), linewidth=1.5)
        notes.append((reached, "teacher", TEACHER))
    axes.set_ylim(bottom=0)
    _mark_change_of_stage(axes, curves)
    _write_notes(axes, notes)
    _dress(axes)
    return save(figure, file)


def _curves(reports: Sequence[TableRow]) -> dict[int, list[TableRow]]:
    """The reports with an AP by trial, in the order of their epochs."""
    curves: dict[int, list[TableRow]] = {}
    for row in sorted(reports, key=lambda row: row["epoch"]):
        if row["trial"] is not None and row["val_ap"] is not None:
            curves.setdefault(row["trial"], []).append(row)
    return curves


def _emphasis(trials: Sequence[TableRow]) -> dict[int, tuple[str, str]]:
    """Name and color of the trials that stand out."""
    done = [row for row in trials if row["state"] == "COMPLETE" and row["objective"] is not None]
    found = {
        row["trial"]: (_control(row), {"baseline": BASELINE}.get(row["control"], DEFAULTS))
        for row in done
        if row["control"]
    }
    if done:
        able = [row for row in done if may_win(row)] or done
        best = max(able, key=lambda row: row["objective"])["trial"]
        name, color = found.get(best, (f"trial {best}", BEST))
        found[best] = (f"best: {name}", color)
    return found


def _control(row: TableRow) -> str:
    """The known config's name; plan staged has defaults of either stage."""
    has_parent = row.get("parent_trial") is not None
    return f"{row['control']}, refined" if has_parent else str(row["control"])


def _mark_change_of_stage(axes: Axes, curves: dict[int, list[TableRow]]) -> None:
    """A line where trials pass from stage 1 to stage 2; the words only where all do it at once."""
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
                *(text, (epoch, 1.0), (shift, 3)),
                xycoords=axes.get_xaxis_transform(),
                textcoords="offset points",
                ha=side,
                va="bottom",
                color="#7a7a7a",
            )


def _write_notes(axes: Axes, notes: Sequence[tuple[float, str, str]]) -> None:
    """Names and best APs at the right edge, pushed apart where they would overlap."""
    gap = 0.05 * axes.get_ylim()[1]
    height = -math.inf
    for point, name, color in sorted(notes):
        height = max(point, height + gap)
        axes.annotate(
            *(f"{name}  {point:.1f}", (1.0, height), (8, 0)),
            xycoords=axes.get_yaxis_transform(),
            textcoords="offset points",
            va="center",
            color=color,
            annotation_clip=False,
        )


def _dress(axes: Axes) -> None:
    axes.set_title("Learning curves", loc="left")
    axes.set_xlabel("epoch, counted over both stages")
    axes.set_ylabel("AP on the slice held out of train")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="#ececec")
    axes.spines[["top", "right"]].set_visible(False)
    handles = [
        Line2D([], [], color=OTHER, marker=".", label="other trials"),
        Line2D([], [], color=ENDED_EARLY, marker="x", mec=END_MARK, label="pruned or failed"),
        Line2D([], [], color="#555555", marker="o", ms=8, mec="w", lw=2.6, label="its best epoch"),
    ]
    axes.legend(handles=handles, loc="lower right", frameon=False)


def save(figure: Figure, file: Path) -> Path:
    """The plot is in the file, whose folder is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    return file
