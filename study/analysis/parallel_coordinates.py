"""Parallel coordinates: every trial as a line through its parameters to its AP."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from optuna.distributions import CategoricalDistribution, FloatDistribution

from search_spaces.space import Parameter, SearchSpace
from study.analysis.figures import STOPPED_COLOR, save
from study.storage.tables import PARAMS, TableRow

UNUSED = -0.14
"""Height of a parameter that a trial does not have: below the scales, which span 0 to 1."""


@dataclasses.dataclass(frozen=True)
class Scale:
    """One vertical axis: a parameter, or AP."""

    title: str
    column: str
    place: Callable[[Any], float]
    """Maps a value to its height, 0 to 1."""
    ticks: tuple[tuple[float, str], ...]
    """Height and label of each."""
    spread: float = 0.0
    """Height of the band over which lines of equal values are spread."""


def draw_parallel_coordinates(trials: Sequence[TableRow], space: SearchSpace, file: Path) -> Path:
    """Plot a line per trial through its parameters to its AP, colored by AP; pruned ones gray."""
    scored = [row for row in trials if row["objective"] is not None]
    scored.sort(key=lambda row: (row["state"] == "COMPLETE", row["objective"], -row["trial"]))
    aps = [row["objective"] for row in scored] or [0.0, 1.0]
    done = [row["objective"] for row in scored if row["state"] == "COMPLETE"] or aps
    scales = [*map(_scale, space.parameters), _ap_scale(min(aps), max(aps))]
    figure = Figure(figsize=(max(7.0, 1.25 * len(scales) + 0.5), 5.8), layout="constrained")
    axes = figure.add_subplot()
    norm = Normalize(min(done), max(done))
    for index, row in enumerate(scored):
        heights = [_height(scale, row, index) for scale in scales]
        is_best = index == len(scored) - 1
        color = _color(norm(row["objective"])) if row["state"] == "COMPLETE" else STOPPED_COLOR
        axes.plot(*_smooth(heights), color=color, linewidth=3.4 if is_best else 1.5)
    any_unused = [any(row.get(scale.column) is None for row in scored) for scale in scales]
    if min(done) < max(done):
        low, high = scales[-1].place(min(done)), scales[-1].place(max(done))
        _color_last_scale(axes, len(scales) - 1, low, high)
    _draw_scales(axes, scales, any_unused)
    axes.set_title("Trials: parameters and AP (thick: the best; gray: pruned)", loc="left")
    return save(figure, file)


def _color(share: float) -> tuple[float, float, float, float]:
    """From light (0) to dark (1), without the palest colors, which fade on white."""
    return colormaps["plasma_r"](0.12 + 0.88 * share)


def _scale(parameter: Parameter) -> Scale:
    title = parameter.path.replace(".", "\n")
    column = PARAMS + parameter.path
    distribution = parameter.distribution
    if isinstance(distribution, CategoricalDistribution):
        choices = list(distribution.choices)
        heights = np.linspace(0, 1, len(choices)) if len(choices) > 1 else np.array([0.5])
        ticks = tuple((float(h), str(c)) for h, c in zip(heights, choices, strict=True))
        return Scale(title, column, lambda value: heights[choices.index(value)], ticks, 0.05)
    low, high = float(distribution.low), float(distribution.high)
    warp: Callable[[float], float] = math.log if distribution.log else float
    span = (warp(high) - warp(low)) or 1.0

    def place(value: float) -> float:
        return (warp(value) - warp(low)) / span if high > low else 0.5

    spread = 0.0 if isinstance(distribution, FloatDistribution) else 0.05
    ticks = tuple((place(value), f"{value:g}") for value in _tick_values(parameter))
    return Scale(title, column, place, ticks, spread)


def _tick_values(parameter: Parameter) -> list[float]:
    """The bounds, and decades, steps or fifths of the range between them."""
    distribution = parameter.distribution
    assert not isinstance(distribution, CategoricalDistribution)
    low, high = float(distribution.low), float(distribution.high)
    if distribution.log:
        first, last = math.ceil(math.log10(low)), math.floor(math.log10(high))
        between = [10.0**power for power in range(first, last + 1)]
        margin = (high / low) ** 0.07
        return [low, *(v for v in between if low * margin < v < high / margin), high]
    count = round((high - low) / distribution.step) if distribution.step else 5
    return list(np.linspace(low, high, count + 1)) if 0 < count <= 8 else [low, high]


def _ap_scale(low: float, high: float) -> Scale:
    span = (high - low) or 1.0
    ticks = tuple(
        ((value - low) / span, f"{100 * value:.1f}") for value in np.linspace(low, high, 5)
    )
    return Scale("AP", "objective", lambda value: (value - low) / span, ticks)


def _height(scale: Scale, row: TableRow, index: int) -> float:
    value = row.get(scale.column)
    # By the golden ratio, consecutive trials land far apart in the band.
    offset = (index * 0.618 % 1.0 - 0.5) * (0.05 if value is None else scale.spread)
    return offset + (UNUSED if value is None else scale.place(value))


def _smooth(heights: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """A curve that is horizontal at every scale, so that the eye can follow crossings."""
    share = np.linspace(0, 1, 25)
    ease = 3 * share**2 - 2 * share**3
    xs = [place + share for place in range(len(heights) - 1)]
    ys = [a + (b - a) * ease for a, b in itertools.pairwise(heights)]
    return np.concatenate(xs), np.concatenate(ys)


def _draw_scales(axes: Axes, scales: Sequence[Scale], any_unused: Sequence[bool]) -> None:
    halo = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 0.8}
    for place, (scale, unused) in enumerate(zip(scales, any_unused, strict=True)):
        axes.plot([place, place], [0, 1], color="#444444", linewidth=1.0, zorder=5)
        side, shift = ("left", 0.14) if place == len(scales) - 1 else ("right", -0.06)
        for height, label in [*scale.ticks, (UNUSED, "unused")] if unused else scale.ticks:
            axes.plot([place - 0.03, place], [height] * 2, color="#444444", lw=1.0, zorder=5)
            text = axes.text(place + shift, height, label, ha=side, va="center", fontsize=9)
            text.set(bbox=halo, zorder=6, style="italic" if label == "unused" else "normal")
        axes.text(place, 1.05, scale.title, ha="center", va="bottom", fontsize=9.5)
    axes.set_xlim(-0.8, len(scales) - 0.5)
    axes.set_ylim(UNUSED - 0.06 if any(any_unused) else -0.06, 1.22)
    axes.set_axis_off()


def _color_last_scale(axes: Axes, place: int, low: float, high: float) -> None:
    """Draw the colors of AP beside its scale, in place of a color bar."""
    strip = np.array([[_color(share)] for share in np.linspace(0, 1, 64)])
    extent = (place + 0.03, place + 0.1, low, high)
    axes.imshow(strip, extent=extent, origin="lower", aspect="auto", zorder=4)
