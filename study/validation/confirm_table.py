"""Tables of the confirming runs and of their verdicts.

``results/confirm`` has a file per finished run, ``results/confirmed`` a row per configuration.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rich.box
from rich.table import Table

from search_spaces.space import SearchSpace
from study.config.schema import ConfirmConfig
from study.display import percent
from study.search.controls import BASELINE
from study.search.objectives import may_win
from study.storage.paths import table_folder
from study.storage.tables import (
    AVERAGE_PRECISION,
    REAL,
    TEXT,
    WHOLE,
    Column,
    TableRow,
    read_table,
    read_trials,
    write_part,
)

CONFIRM, CONFIRMED = "confirm", "confirmed"
WINNER, RUNNER_UP, OTHER = "winner", "runner_up", "other"
"""Values of ``role`` in CONFIRMED, in addition to BASELINE."""

RUNS = (
    Column("study", TEXT, "name of the study"),
    Column("trial", WHOLE, "number of the trial whose configuration was trained again"),
    Column(
        "control", TEXT, "control of that trial: baseline or defaults; null for a searched one"
    ),
    Column("run", WHOLE, "number of the run, from 0; runs of equal number have equal seeds"),
    Column("seed", WHOLE, "seed of everything random in the run"),
    Column("error", TEXT, "why the run failed; null if it succeeded"),
    Column("stage", TEXT, "stage of the run's best epoch by AP on the search slice"),
    Column("epoch", WHOLE, "that epoch, whose checkpoint was scored"),
    Column("search_ap", REAL, "AP on the search slice in that epoch"),
    Column("duration_s", REAL, "training time, seconds"),
    Column("keypoints", TEXT, "file of the run's poses on val, relative to the study's folder"),
    *(Column(name, type_, f"{meaning}; on val") for name, type_, meaning in AVERAGE_PRECISION),
)
VERDICTS = (
    Column("study", TEXT, "name of the study"),
    Column("role", TEXT, "winner, baseline, runner_up or other"),
    Column("trial", WHOLE, "number of the trial with this configuration"),
    Column("control", TEXT, "control of that trial"),
    Column("num_seeds", WHOLE, "number of seeds it was trained from"),
    Column("ap", REAL, "mean AP on val over the seeds"),
    Column("ap_low", REAL, "lower bound of the 95 % interval of that mean, over people and seeds"),
    Column("ap_high", REAL, "its upper bound"),
    Column("winner_beats", REAL, "probability that the winner's mean is higher; null for itself"),
)


def chosen_trials(study_folder: Path, settings: ConfirmConfig) -> list[dict[str, Any]]:
    """Return the rows of ``trials`` to confirm: the best that may win, then the baseline."""
    if not settings.trials:
        return []
    trials = read_trials(study_folder).to_pylist()
    complete = [t for t in trials if t["state"] == "COMPLETE" and t["objective"] is not None]
    ranked = sorted(complete, key=lambda t: (-t["objective"], t["trial"]))
    searched = [t for t in ranked if t["control"] != BASELINE and may_win(t)]
    return searched[: settings.trials] + [t for t in ranked if t["control"] == BASELINE][:1]


def write_run(study_folder: Path, row: TableRow, space: SearchSpace) -> None:
    """Write the row of a finished run."""
    part = table_folder(study_folder, CONFIRM) / f"{row['trial']:05d}-{row['run']}.parquet"
    write_part(part, RUNS, [row], space)


def read_runs(study_folder: Path) -> list[dict[str, Any]]:
    """Return the rows of the finished runs, by trial and run."""
    return list(read_table(study_folder, CONFIRM, RUNS).to_pylist())


def write_verdicts(study_folder: Path, rows: Sequence[TableRow], space: SearchSpace) -> None:
    """Write the verdicts in place of any earlier ones."""
    part = table_folder(study_folder, CONFIRMED) / "confirmed.parquet"
    write_part(part, VERDICTS, rows, space)


def read_verdicts(study_folder: Path) -> list[dict[str, Any]]:
    """Return a row per configuration, by descending mean AP; empty if nothing is confirmed."""
    return list(read_table(study_folder, CONFIRMED, VERDICTS).to_pylist())


def confirmed_winner(study_folder: Path) -> int | None:
    """Return the trial with the highest mean AP, or None if nothing is confirmed."""
    rows = read_verdicts(study_folder)
    return next((row["trial"] for row in rows if row["role"] == WINNER), None)


def is_confirmed(study_folder: Path, settings: ConfirmConfig) -> bool:
    """Return whether all runs and verdicts of these settings are written."""
    chosen = {t["trial"] for t in chosen_trials(study_folder, settings)}
    runs = {(row["trial"], row["run"]): row["error"] for row in read_runs(study_folder)}
    pairs = [(trial, run) for trial in chosen for run in range(settings.seeds)]
    if not all(pair in runs for pair in pairs):
        return False
    sound = chosen - {trial for trial, run in pairs if runs[trial, run]}
    judged = {row["trial"]: row["num_seeds"] for row in read_verdicts(study_folder)}
    return judged == dict.fromkeys(sound, settings.seeds)


def confirm_table(verdicts: Sequence[TableRow], box: rich.box.Box | None = None) -> Table:
    """Return a table of mean AP, its interval, and the probability that the winner is better."""
    num_seeds = verdicts[0]["num_seeds"]
    table = Table(
        title=f"Trained again from {num_seeds} new seeds: mean AP on val (x100), 95 % interval",
        title_justify="left",
        box=box or rich.box.HEAVY_HEAD,
    )
    for name in ("", "trial", "AP", "interval", "winner is better"):
        table.add_column(name, justify="right" if name else "left")
    for row in verdicts:
        beats = row["winner_beats"]
        table.add_row(
            row["role"].replace("_", "-"),
            str(row["trial"]),
            percent(row["ap"]),
            f"{percent(row['ap_low'])} to {percent(row['ap_high'])}",
            "" if beats is None else probability(beats),
            style="bold" if row["role"] == WINNER else None,
        )
    return table


def verdict_sentence(verdicts: Sequence[TableRow]) -> str:
    """State the probabilities that the winner beats the baseline and the runner-up."""
    winner = next(row for row in verdicts if row["role"] == WINNER)
    others = {row["role"]: row["winner_beats"] for row in verdicts}
    parts = [
        f"the {name} with probability {probability(others[role])}"
        for role, name in ((BASELINE, "baseline"), (RUNNER_UP, "runner-up"))
        if others.get(role) is not None
    ]
    is_baseline = " (the baseline itself)" if winner["control"] == BASELINE else ""
    return f"Trial {winner['trial']}{is_baseline} beats " + (" and ".join(parts) or "nobody") + "."


def probability(value: float) -> str:
    """Format a probability; a thousand draws never prove certainty."""
    if value > 0.995:
        return "above 0.99"
    return "below 0.01" if value < 0.005 else f"{value:.2f}"
