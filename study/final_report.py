"""Tables to print: the finalists on val, whole and joint by joint; the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence

import rich.box
from rich.table import Table

from study.display import percent
from study.objectives import AP, COSTS, LATENCY, PARAMETERS, UNITS, costs_in, pareto_front
from study.results import AVERAGE_PRECISION, TableRow

ROLES = ("teacher", "baseline", "best_distilled", "best_refined", "winner")


def final_table(final: Sequence[TableRow], box: rich.box.Box) -> Table:
    """A row per finalist, with the figures that any of them has."""
    figures = [column.name for column in AVERAGE_PRECISION]
    shown = [name for name in figures if any(row[name] is not None for row in final)]
    table = Table(title="On the official validation set", box=box)
    for name in ("", "trial", "stage", *(_heading(name) for name in shown)):
        table.add_column(name, justify="left" if name in ("", "stage") else "right")
    for row in sorted(final, key=lambda row: ROLES.index(row["role"])):
        table.add_row(
            row["role"].replace("_", " "),
            "-" if row["trial"] is None else str(row["trial"]),
            row["stage"] or "-",
            *(percent(row[name]) for name in shown),
        )
    return table


def joint_table(joints: Sequence[TableRow], box: rich.box.Box) -> Table:
    """A row per joint, a column per finalist."""
    by_role = ap_by_role(joints, "joint")
    table = Table(title="AP of each joint alone, on the official validation set", box=box)
    table.add_column("joint")
    for role in by_role:
        table.add_column(role.replace("_", " "), justify="right")
    for joint in dict.fromkeys(row["joint"] for row in joints):
        table.add_row(joint, *(percent(aps.get(joint)) for aps in by_role.values()))
    return table


def front_table(trials: Sequence[TableRow], box: rich.box.Box) -> Table | None:
    """The trials that no other one beats in AP and cost; None where costs were not measured.

    The costs are those among the study's objectives, of a study of AP alone all that there are.
    """
    costs = costs_in(trials[0].get("objectives")) or list(COSTS)
    front = pareto_front(trials, costs)
    if not front:
        return None
    title = f"Pareto front of {', '.join([AP.upper(), *(UNITS[cost] for cost in costs)])}"
    table = Table(title=title, box=box)
    for name in ("trial", "AP", *UNITS.values()):
        table.add_column(name, justify="right")
    for row in front:
        name = f"{row['trial']}" + (f" ({row['control']})" if row["control"] else "")
        latency, count = row[LATENCY], row[PARAMETERS]
        table.add_row(name, percent(row["objective"]), f"{latency:.3g}", f"{count:,}")
    return table


def ap_by_role(rows: Sequence[TableRow], key: str) -> dict[str, dict[str | float, float | None]]:
    """AP by that column's value, of each finalist in the order of the story."""
    return {
        role: {row[key]: row["ap"] for row in rows if row["role"] == role}
        for role in ROLES
        if any(row["role"] == role for row in rows)
    }


def _heading(figure: str) -> str:
    name, _, kind = figure.partition("_")
    return f"{name.upper()}({kind.upper() if len(kind) == 1 else kind})" if kind else name.upper()
