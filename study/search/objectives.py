"""What a search is to reach, and what it must keep to: AP, latency, parameters.

Trials are rows of ``trials`` in Parquet. One without ``feasible``, or where it is null, keeps to
whatever was asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from study.config.schema import AP, LATENCY, PARAMETERS

UNITS = {LATENCY: "ms a crop", PARAMETERS: "parameters"}


def violations(limits: Mapping[str, float | None], costs: Mapping[str, float]) -> dict[str, float]:
    """By constraint, the share by which its limit is passed; 0 or less where it is kept."""
    return {name: costs[name] / limit - 1 for name, limit in limits.items() if limit is not None}


def may_win(row: Mapping[str, Any]) -> bool:
    """Whether the trial came to its end, has an AP and keeps to the constraints."""
    is_done = row["state"] == "COMPLETE" and row.get("objective") is not None
    return is_done and row.get("feasible") is not False


def costs_in(objectives: str | None) -> list[str]:
    """The costs among the objectives, as ``trials`` names them: ap,latency_ms."""
    return [name for name in (objectives or AP).split(",") if name != AP]


def pareto_front(trials: Sequence[Mapping[str, Any]], costs: Sequence[str]) -> list[Any]:
    """The trials that may win and that no other one beats, the highest AP first.

    One beats another if it is better in AP or a cost, and worse in none of them.
    """

    def gains(row: Mapping[str, Any]) -> list[float]:
        return [row["objective"], *(-row[cost] for cost in costs)]

    able = [row for row in trials if may_win(row) and None not in (row.get(c) for c in costs)]
    front = []
    for row in able:
        pairs = [list(zip(gains(other), gains(row), strict=True)) for other in able]
        if not any(all(a >= b for a, b in p) and any(a > b for a, b in p) for p in pairs):
            front.append(row)
    return sorted(front, key=lambda row: (-row["objective"], row["trial"]))
