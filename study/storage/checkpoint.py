"""A trial on disk: each epoch's weights, optimizer state and reports, in a folder of its own.

A folder appears whole or not at all. Kept are the last epoch, to go on from, and the best one of
each stage: the better of them is the trial's result. No pickle: safetensors, JSON, and
torch's ``weights_only`` format.
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
from study.storage.paths import epoch_folder, epoch_folders

Row = dict[str, Any]
"""One report: an epoch's figures by column name."""


@dataclass(frozen=True)
class Checkpoint:
    """One epoch of a trial; ``rows`` are the reports up to it, one an epoch."""

    folder: Path
    rows: list[Row]

    @property
    def stage(self) -> str:
        return str(self.rows[-1]["stage"])

    @property
    def epoch(self) -> int:
        return int(self.rows[-1]["epoch"])

    def weights(self) -> dict[str, Tensor]:
        """State dict of the task, on the CPU."""
        return load_file(self.folder / "model.safetensors")

    def optimizer(self) -> dict[str, Any]:
        """State dict of the optimizer."""
        state = torch.load(self.folder / "optimizer.pt", map_location="cpu", weights_only=True)
        assert isinstance(state, dict)
        return state


def best_row(rows: list[Row]) -> Row:
    """The report of the highest ``val_ap``, the first of equals."""
    return max(rows, key=lambda row: (row["val_ap"], -row["epoch"]))


def best_rows(rows: list[Row]) -> dict[str, Row]:
    """The best report of each stage, by the stage's name."""
    stages = dict.fromkeys(row["stage"] for row in rows)
    return {stage: best_row([row for row in rows if row["stage"] == stage]) for stage in stages}


class Checkpoints:
    """The checkpoints of one trial, in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, epoch: int) -> Path:
        return epoch_folder(self.folder, epoch)

    def at(self, epoch: int) -> Checkpoint:
        """The checkpoint of an epoch that was kept."""
        folder = self.path(epoch)
        rows = json.loads((folder / "state.json").read_text())["rows"]
        return Checkpoint(folder, rows)

    def last(self) -> Checkpoint | None:
        """The latest checkpoint, None before the first."""
        epochs = self._epochs()
        return self.at(max(epochs)) if epochs else None

    def save(
        self, weights: Mapping[str, Tensor], optimizer: Mapping[str, Any], rows: list[Row]
    ) -> Checkpoint:
        """Writes the epoch that the last row reports; drops all but it and the best."""
        epoch = int(rows[-1]["epoch"])
        folder = self.path(epoch)
        aside = self.folder / f".epoch-{epoch:03d}"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        tensors = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
        save_file(tensors, aside / "model.safetensors")
        state = io.BytesIO()  # torch does not say of a file why it could not be written
        torch.save(dict(optimizer), state)
        (aside / "optimizer.pt").write_bytes(state.getbuffer())
        (aside / "state.json").write_text(json.dumps({"rows": rows}))
        for file in aside.iterdir():
            sync(file)
        if folder.exists():  # the epoch was trained again after a crash
            shutil.rmtree(folder)
        aside.replace(folder)
        sync(self.folder)
        self._drop_all_but({epoch, *(row["epoch"] for row in best_rows(rows).values())})
        return Checkpoint(folder, rows)

    def _drop_all_but(self, kept: set[int]) -> None:
        for epoch in self._epochs() - kept:
            shutil.rmtree(self.path(epoch))

    def _epochs(self) -> set[int]:
        return {epoch for epoch, _ in epoch_folders(self.folder)}
