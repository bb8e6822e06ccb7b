"""Tables to print: the winner, the finalists on val, AP by joint, the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import rich.box
from rich.console import Console
from rich.table import Table

from study.config.schema import AP, COSTS, LATENCY, PARAMETERS
from study.display import percent
from study.search.objectives import UNITS, costs_in, pareto_front
from study.storage.tables import AVERAGE_PRECISION, PARAMS, TableRow, read_final, read_trials
from study.validation.confirm_table import confirm_table, read_verdicts, verdict_sentence
from study.validation.finalists import front_of

TITLES = {
    "teacher": "teacher",
    "baseline": "baseline student (no teacher)",
    "best_distilled": "best distilled student",
    "best_refined": "best refined student",
    "winner": "winner",
}
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


def show_finals(study_folder: Path, console: Console) -> None:
    """Prints what each finalist got on val, and the commands that go on from here."""
    rows = {row["role"]: row for row in read_final(study_folder).to_pylist()}
    table = Table(title="AP on val (x100)", title_justify="left")
    figures: tuple[str, ...] = ("ap", "ap50", "ap75")
    place: tuple[str, ...] = ("trial", "stage", "epoch")
    if any(row["ap_medium"] is not None for row in rows.values()):
        # What CrowdPose is about; more than this would not fit into 80 columns.
        figures, place = ("ap", "ap_easy", "ap_medium", "ap_hard"), ("trial", "epoch")
    table.add_column("")
    for name in figures:
        table.add_column(name.upper() if "_" not in name else name[3:], justify="right")
    for name in place:
        table.add_column(name, justify="left" if name == "stage" else "right")
    for role, title in TITLES.items():
        if role in rows:
            row = rows[role]
            table.add_row(
                title,
                *(percent(row[name]) for name in figures),
                *("-" if row[name] is None else str(row[name]) for name in place),
                style="bold" if role == "winner" else None,
            )
    console.print(table)
    if verdicts := read_verdicts(study_folder):
        console.print(confirm_table(verdicts))
        console.print(verdict_sentence(verdicts))
    trials = read_trials(study_folder)
    _show_front(front_of(trials), console)
    if "winner" in rows:
        _show_winner(rows["winner"], trials, study_folder, console)
    else:
        console.print(
            "no winner: no trial that came to its end keeps to search.constraints; raise them, or "
            "give the search space cheaper values"
        )
    console.print(f"look closer:  python study/analyze.py {study_folder}")
    if "winner" in rows:
        console.print(f"take it away: python study/export.py {study_folder}")


def _show_winner(winner: TableRow, trials: pa.Table, study_folder: Path, console: Console) -> None:
    trial = next(t for t in trials.to_pylist() if t["trial"] == winner["trial"])
    console.print(f"winner: trial {trial['trial']}, {study_folder / winner['checkpoint']}")
    for key, value in trial.items():
        if key.startswith(PARAMS) and value is not None:
            shown = f"{value:.3g}" if isinstance(value, float) else value
            console.print(f"  {key.removeprefix(PARAMS)}={shown}")


def _show_front(front: list[dict[str, Any]], console: Console) -> None:
    """Names its members where the search had several objectives."""
    costs = costs_in(front[0].get("objectives")) if front else []
    if costs:
        console.print(f"Pareto front of AP on the search slice and {' and '.join(costs)}:")
        for row in front:
            cost = f"{row[LATENCY]:.3g} ms a crop, {row[PARAMETERS]:,} parameters"
            console.print(f"  trial {row['trial']}: AP {percent(row['objective'])}, {cost}")
