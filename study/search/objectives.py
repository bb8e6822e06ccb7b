"""Objectives and constraints of a search: AP, latency, parameters.

Trials are rows of the table ``trials``. A trial whose ``feasible`` is null or missing is feasible.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from study.config.schema import AP, LATENCY, PARAMETERS

UNITS = {LATENCY: "ms a crop", PARAMETERS: "parameters"}


def violations(limits: Mapping[str, float | None], costs: Mapping[str, float]) -> dict[str, float]:
    """Return the relative excess over each limit that is set; 0 or less satisfies it."""
    return {name: costs[name] / limit - 1 for name, limit in limits.items() if limit is not None}


def may_win(row: Mapping[str, Any]) -> bool:
    """Return whether the trial is complete, has an AP and is feasible."""
    is_done = row["state"] == "COMPLETE" and row.get("objective") is not None
    return is_done and row.get("feasible") is not False


def costs_in(objectives: str | None) -> list[str]:
    """Return the costs among comma-separated objectives, such as ``ap,latency_ms``."""
    return [name for name in (objectives or AP).split(",") if name != AP]


def pareto_front(trials: Sequence[Mapping[str, Any]], costs: Sequence[str]) -> list[Any]:
    """Return the trials that may win and that no other dominates, by descending AP.

    A trial dominates another if it is better in AP or a cost and worse in none.
    """

    def gains(row: Mapping[str, Any]) -> list[float]:
        return [row["objective"], *(-row[cost] for cost in costs)]

    candidates = [
        row for row in trials if may_win(row) and all(row.get(cost) is not None for cost in costs)
    ]
    front = []
    for row in candidates:
        pairs = [list(zip(gains(other), gains(row), strict=True)) for other in candidates]
        if not any(all(a >= b for a, b in p) and any(a > b for a, b in p) for p in pairs):
            front.append(row)
    return sorted(front, key=lambda row: (-row["objective"], row["trial"]))
