"""Tables to print: the finalists on val, AP by joint, the Pareto front, and the last screen."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import rich.box
from rich.console import Console
from rich.table import Table

from study.config.schema import AP, COSTS, LATENCY, PARAMETERS
from study.display import heading, percent
from study.search.controls import BASELINE
from study.search.objectives import UNITS, costs_in, pareto_front
from study.storage.tables import AVERAGE_PRECISION, PARAMS, TableRow, read_final, read_trials
from study.validation.confirm_table import (
    WINNER,
    confirm_table,
    read_verdicts,
    verdict_sentence,
)
from study.validation.finalists import BEST_DISTILLED, BEST_REFINED, TEACHER, front_of

TITLES = {
    TEACHER: "teacher",
    BASELINE: "baseline student (no teacher)",
    BEST_DISTILLED: "best distilled student",
    BEST_REFINED: "best refined student",
    WINNER: "winner",
}
"""The finalists in the order that tables list them."""


def finalists_table(
    final: Sequence[TableRow],
    figures: Mapping[str, str],
    identity: Sequence[str],
    *,
    title: str,
    box: rich.box.Box,
) -> Table:
    """Return a table with a row per finalist, the winner's in bold.

    Args:
        final: rows of ``final``.
        figures: headings of the figures to show, by column.
        identity: columns that identify the checkpoint: trial, stage, epoch.
    """
    rows = {row["role"]: row for row in final}
    table = Table(title=title, title_justify="left", box=box)
    table.add_column("")
    for name in figures.values():
        table.add_column(name, justify="right")
    for name in identity:
        table.add_column(name, justify="left" if name == "stage" else "right")
    for role, finalist in TITLES.items():
        if role not in rows:
            continue
        row = rows[role]
        table.add_row(
            finalist,
            *(percent(row[name]) for name in figures),
            *("-" if row[name] is None else str(row[name]) for name in identity),
            style="bold" if role == WINNER else None,
        )
    return table


def final_table(final: Sequence[TableRow], box: rich.box.Box) -> Table:
    """Return the finalists with all official figures that any of them has."""
    names = [column.name for column in AVERAGE_PRECISION]
    return finalists_table(
        final,
        {name: heading(name) for name in names if any(row[name] is not None for row in final)},
        ("trial", "stage", "epoch"),
        title="On the official validation set",
        box=box,
    )


def joint_table(joints: Sequence[TableRow], box: rich.box.Box) -> Table:
    """Return a table with a row per joint and a column per finalist."""
    by_role = ap_by_role(joints, "joint")
    table = Table(title="AP of each joint alone, on the official validation set", box=box)
    table.add_column("joint")
    for role in by_role:
        table.add_column(role.replace("_", " "), justify="right")
    for joint in dict.fromkeys(row["joint"] for row in joints):
        table.add_row(joint, *(percent(aps.get(joint)) for aps in by_role.values()))
    return table


def front_table(trials: Sequence[TableRow], box: rich.box.Box) -> Table | None:
    """Return the Pareto front of AP and cost; None if no costs were measured.

    The costs are those among the study's objectives, or all costs if AP is the only objective.
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
    """Return AP by the value of a column (joint, oks), for each finalist in table order."""
    return {
        role: {row[key]: row["ap"] for row in rows if row["role"] == role}
        for role in TITLES
        if any(row["role"] == role for row in rows)
    }


def show_finals(study_folder: Path, console: Console) -> None:
    """Print the last screen: finalists on val, verdicts, winner, and the next commands."""
    final = read_final(study_folder).to_pylist()
    figures = {"ap": "AP", "ap50": "AP50", "ap75": "AP75"}
    identity: tuple[str, ...] = ("trial", "stage", "epoch")
    if any(row["ap_medium"] is not None for row in final):
        # CrowdPose's figures; with more columns the table exceeds a width of 80.
        figures = {"ap": "AP", "ap_easy": "easy", "ap_medium": "medium", "ap_hard": "hard"}
        identity = ("trial", "epoch")
    title = "AP on val (x100)"
    console.print(finalists_table(final, figures, identity, title=title, box=rich.box.HEAVY_HEAD))
    if verdicts := read_verdicts(study_folder):
        console.print(confirm_table(verdicts))
        console.print(verdict_sentence(verdicts))
    trials = read_trials(study_folder)
    _show_front(front_of(trials), console)
    winner = next((row for row in final if row["role"] == WINNER), None)
    if winner is not None:
        _show_winner(winner, trials, study_folder, console)
    else:
        console.print(
            "no winner: no complete trial satisfies search.constraints; raise them, or give the "
            "search space cheaper values"
        )
    folder = shlex.quote(str(study_folder))
    console.print(f"look closer:  python study/analyze.py {folder}", markup=False)
    if winner is not None:
        console.print(f"take it away: python study/export.py {folder}", markup=False)


def _show_winner(winner: TableRow, trials: pa.Table, study_folder: Path, console: Console) -> None:
    trial = next(row for row in trials.to_pylist() if row["trial"] == winner["trial"])
    checkpoint = study_folder / winner["checkpoint"]
    console.print(f"winner: trial {trial['trial']}, {checkpoint}", markup=False)
    for name, value in trial.items():
        if name.startswith(PARAMS) and value is not None:
            shown = f"{value:.3g}" if isinstance(value, float) else value
            console.print(f"  {name.removeprefix(PARAMS)}={shown}", markup=False)


def _show_front(front: list[dict[str, Any]], console: Console) -> None:
    """Print the Pareto front if the search had several objectives."""
    costs = costs_in(front[0].get("objectives")) if front else []
    if not costs:
        return
    console.print(f"Pareto front of AP on the search slice and {' and '.join(costs)}:")
    for row in front:
        cost = f"{row[LATENCY]:.3g} ms a crop, {row[PARAMETERS]:,} parameters"
        console.print(f"  trial {row['trial']}: AP {percent(row['objective'])}, {cost}")
