"""Two pictures of the finalists on val: AP by OKS threshold, and AP joint by joint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from study.final_report import ap_by_role
from study.pictures import BASELINE, BEST, DEFAULTS, OTHER, TEACHER, save
from study.results import TableRow

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
