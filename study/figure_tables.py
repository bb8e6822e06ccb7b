"""What is in a data set, as it is shown on a screen."""

from __future__ import annotations

import itertools

import numpy as np
from rich.table import Table

from models.skeleton import Skeleton
from study.people_figures import HEIGHT_SHARES, Figures

BAR = 20
"""Characters of the longest bar."""


def counts_table(figures: Figures) -> Table:
    """How many, and how large."""
    grid = Table.grid(padding=(0, 2))
    people = len(figures.rows)
    heights = "  ".join(
        f"{100 * share:.0f} %: {height:.0f}"
        for share, height in zip(HEIGHT_SHARES, figures.box_heights, strict=True)
    )
    grid.add_row("pictures", f"{figures.num_pictures}, {figures.num_with_people} with people")
    grid.add_row("annotations", f"{figures.num_annotations}")
    grid.add_row("people", f"{people}, {people / figures.num_with_people:.2f} a picture with any")
    grid.add_row("labelled joints", f"{round(people * figures.labelled.sum())}")
    grid.add_row("box heights, px", heights)
    return grid


def bars_table(figures: Figures) -> Table:
    """Counts as bars: how crowded, how large, how well labelled."""
    table = Table(box=None, padding=(0, 2))
    for heading in ("", "", "number", ""):
        table.add_column(heading, justify="right" if heading else "left")
    origin = "from the joints" if figures.is_crowd_computed else "of the file"
    joints = figures.joints_per_person
    edges = np.unique(np.linspace(1, len(joints), 6).astype(int)).tolist()
    spans = {
        f"{start} to {stop - 1}": int(joints[start:stop].sum())
        for start, stop in itertools.pairwise(edges)
    }
    groups: dict[str, dict[str, int]] = {
        f"crowdIndex {origin}": dict(
            zip(("easy", "medium", "hard"), figures.crowd_groups().tolist(), strict=True)
        ),
        "size by COCO's area": dict(
            zip(("small", "medium", "large"), figures.sizes.tolist(), strict=True)
        ),
        "labelled joints": spans,
    }
    for title, counts in groups.items():
        most = max(1, *counts.values())
        for place, (name, count) in enumerate(counts.items()):
            table.add_row(
                "" if place else title, name, str(count), "#" * round(BAR * count / most)
            )
    return table


def joints_table(figures: Figures, skeleton: Skeleton) -> Table:
    """How often each joint is labelled, and how often it is then visible."""
    table = Table("joint", box=None, padding=(0, 2))
    table.add_column("labelled, % of people", justify="right")
    table.add_column("visible, % of labelled", justify="right")
    for name, labelled, visible in zip(
        skeleton.joints, figures.labelled, figures.visible, strict=True
    ):
        seen = "-" if np.isnan(visible) else f"{100 * visible:.1f}"
        table.add_row(name, f"{100 * labelled:.1f}", seen)
    return table
