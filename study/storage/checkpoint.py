"""Checkpoints of a trial: weights, optimizer state and reports of an epoch, a folder each.

A folder appears whole or not at all. Two kinds of epochs are kept: the last, to resume from, and
the best of each stage, the better of which is the trial's result. No pickle: safetensors, JSON,
and torch's ``weights_only`` format.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from study.storage.files import sync
from study.storage.paths import OPTIMIZER, STATE, WEIGHTS, epoch_folder, epoch_folders

Row = dict[str, Any]
"""One report: the figures of an epoch by column name."""


@dataclass(frozen=True)
class Checkpoint:
    """One epoch of a trial; ``rows`` has the report of each epoch up to it."""

    folder: Path
    rows: list[Row]

    @property
    def stage(self) -> str:
        return str(self.rows[-1]["stage"])

    @property
    def epoch(self) -> int:
        return int(self.rows[-1]["epoch"])

    def weights(self) -> dict[str, Tensor]:
        """Load the state dict of the task, on the CPU."""
        return load_file(self.folder / WEIGHTS)

    def optimizer(self) -> dict[str, Any]:
        """Load the state dict of the optimizer."""
        state = torch.load(self.folder / OPTIMIZER, map_location="cpu", weights_only=True)
        assert isinstance(state, dict)
        return state


def best_row(rows: list[Row]) -> Row:
    """Return the report with the highest ``val_ap``, the first of equals."""
    return max(rows, key=lambda row: (row["val_ap"], -row["epoch"]))


def best_rows(rows: list[Row]) -> dict[str, Row]:
    """Return the best report of each stage, by the stage's name."""
    stages = dict.fromkeys(row["stage"] for row in rows)
    return {stage: best_row([row for row in rows if row["stage"] == stage]) for stage in stages}


class Checkpoints:
    """The checkpoints in a trial's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, epoch: int) -> Path:
        return epoch_folder(self.folder, epoch)

    def at(self, epoch: int) -> Checkpoint:
        """Open the checkpoint of an epoch that was kept."""
        folder = self.path(epoch)
        rows = json.loads((folder / STATE).read_text())["rows"]
        return Checkpoint(folder, rows)

    def last(self) -> Checkpoint | None:
        """Open the latest checkpoint; None before the first."""
        epochs = self._epochs()
        return self.at(max(epochs)) if epochs else None

    def require_last(self) -> Checkpoint:
        """Return the latest checkpoint.

        Raises:
            FileNotFoundError: the folder has no checkpoint.
        """
        last = self.last()
        if last is None:
            raise FileNotFoundError(f"{self.folder} must hold a checkpoint, got none")
        return last

    def rows(self, stage: str | None = None) -> list[Row]:
        """Return the reports of one stage, or of all, in order.

        Raises:
            FileNotFoundError: the folder has no checkpoint.
        """
        return [row for row in self.require_last().rows if stage in (None, row["stage"])]

    def best(self, stage: str | None = None) -> Checkpoint:
        """Return the checkpoint of the highest ``val_ap``, of one stage or of all.

        Raises:
            FileNotFoundError: the folder has no checkpoint.
        """
        return self.at(int(best_row(self.rows(stage))["epoch"]))

    def save(
        self, weights: Mapping[str, Tensor], optimizer: Mapping[str, Any], rows: list[Row]
    ) -> Checkpoint:
        """Write the epoch of the last row; remove all others but the best of each stage."""
        epoch = int(rows[-1]["epoch"])
        folder = self.path(epoch)
        temporary = self.folder / f".epoch-{epoch:03d}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        tensors = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
        save_file(tensors, temporary / WEIGHTS)
        state = io.BytesIO()  # torch.save to a file hides the reason of a failure, as a full disk
        torch.save(dict(optimizer), state)
        (temporary / OPTIMIZER).write_bytes(state.getbuffer())
        (temporary / STATE).write_text(json.dumps({"rows": rows}))
        for file in temporary.iterdir():
            sync(file)
        if folder.exists():  # the epoch was trained again after a crash
            shutil.rmtree(folder)
        temporary.replace(folder)
        sync(self.folder)
        self._remove_all_but({epoch, *(row["epoch"] for row in best_rows(rows).values())})
        return Checkpoint(folder, rows)

    def _remove_all_but(self, kept: set[int]) -> None:
        for epoch in self._epochs() - kept:
            shutil.rmtree(self.path(epoch))

    def _epochs(self) -> set[int]:
        return {epoch for epoch, _ in epoch_folders(self.folder)}
