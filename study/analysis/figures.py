"""Parts of all plots: colors, frame and grid of the axes, and saving."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure

BASELINE_COLOR = "#1a1a1a"
DEFAULTS_COLOR = "#2a7f62"
BEST_COLOR = "#d1495b"
TEACHER_COLOR = "#7d55a8"
TRIAL_COLOR = "#8fb1d3"
STOPPED_COLOR = "#cfcfcf"
"""Of trials that were pruned or failed."""
STOPPED_MARK_COLOR = "#9a9a9a"
GRID_COLOR = "#ececec"


def open_frame(axes: Axes, grid: Literal["both", "x", "y"]) -> None:
    """Leave out the top and right borders, and draw a light grid."""
    axes.grid(axis=grid, color=GRID_COLOR)
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, file: Path) -> Path:
    """Save the plot, creating its folder; return the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    return file
