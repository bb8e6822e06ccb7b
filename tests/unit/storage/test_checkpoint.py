"""A trial's folder: what comes back, what is kept, and what a kill leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from study.storage import checkpoint
from study.storage.checkpoint import Checkpoints, Row, best_row, best_rows
from study.storage.paths import trial_folder


def row(epoch: int, ap: float, stage: str = "distill") -> Row:
    return {"stage": stage, "epoch": epoch, "val_ap": ap, "loss": 1.0 / epoch}


def trained(epoch: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return weights and an optimizer state that encode the epoch."""
    layer = nn.Linear(2, 1)
    nn.init.constant_(layer.weight, float(epoch))
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1 * epoch)
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return layer.state_dict(), optimizer.state_dict()


def save_all(checkpoints: Checkpoints, aps: list[float], stages: list[str]) -> list[Row]:
    rows: list[Row] = []
    for epoch, (ap, stage) in enumerate(zip(aps, stages, strict=True), 1):
        rows.append(row(epoch, ap, stage))
        checkpoints.save(*trained(epoch), rows)
    return rows


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_saved_checkpoint_is_read_back(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "trials" / "3")
    weights, optimizer = trained(1)
    checkpoints.save(weights, optimizer, [row(1, 0.5)])
    last = Checkpoints(tmp_path / "trials" / "3").require_last()
    assert last.rows == [row(1, 0.5)]
    assert (last.stage, last.epoch) == ("distill", 1)
    assert last.weights().keys() == weights.keys()
    assert all(torch.equal(last.weights()[name], value) for name, value in weights.items())
    state = last.optimizer()
    assert state["param_groups"] == optimizer["param_groups"]
    for index, values in optimizer["state"].items():
        assert all(torch.equal(state["state"][index][name], v) for name, v in values.items())


def test_layout_in_memory_does_not_matter(tmp_path: Path) -> None:
    weight = torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save({"weight": weight, "half": weight[:, :1]}, {}, [row(1, 0.1)])
    assert torch.equal(checkpoints.at(1).weights()["weight"], weight)


def test_no_checkpoint_before_the_first_epoch(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "nowhere").last() is None
    assert Checkpoints(tmp_path).last() is None


def test_only_the_last_and_the_best_of_each_stage_are_kept(tmp_path: Path) -> None:
    aps = [0.1, 0.4, 0.2, 0.3, 0.25, 0.2]
    stages = ["distill"] * 3 + ["refine"] * 3
    rows = save_all(Checkpoints(tmp_path), aps, stages)
    assert kept(tmp_path) == ["epoch-002", "epoch-004", "epoch-006"]
    assert Checkpoints(tmp_path).at(2).rows == rows[:2]
    weights = Checkpoints(tmp_path).at(4).weights()
    assert float(weights["weight"].mean()) == pytest.approx(4, abs=0.5)


def test_best_epoch_is_kept_when_later_ones_equal_it(tmp_path: Path) -> None:
    save_all(Checkpoints(tmp_path), [0.2, 0.4, 0.4, 0.4], ["distill"] * 4)
    assert kept(tmp_path) == ["epoch-002", "epoch-004"]


def test_best_row_is_the_first_of_equal_ones() -> None:
    rows = [row(1, 0.2), row(2, 0.4), row(3, 0.4), row(4, 0.9, "refine"), row(5, 0.1, "refine")]
    assert best_row(rows)["epoch"] == 4
    assert {stage: found["epoch"] for stage, found in best_rows(rows).items()} == {
        "distill": 2,
        "refine": 4,
    }


@pytest.mark.parametrize("broken", ["save_file", "sync", "json"])
def test_half_written_checkpoint_is_never_visible(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path)
    rows = save_all(checkpoints, [0.3], ["distill"])

    def fail(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if broken == "json":
            patch.setattr(json, "dumps", fail)
        else:
            patch.setattr(checkpoint, broken, fail)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save(*trained(2), [*rows, row(2, 0.4)])
    last = Checkpoints(tmp_path).require_last()
    assert last.epoch == 1 and last.rows == rows
    checkpoints.save(*trained(2), [*rows, row(2, 0.4)])  # over the files of the failure
    assert kept(tmp_path) == ["epoch-002"]


def test_kill_before_old_checkpoints_are_removed_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_remove_all_but", lambda kept: None)
        rows = save_all(checkpoints, [0.3, 0.5, 0.4], ["distill"] * 3)
    last = Checkpoints(tmp_path).require_last()
    assert last.epoch == 3
    Checkpoints(tmp_path).save(*trained(4), [*rows, row(4, 0.1)])
    assert kept(tmp_path) == ["epoch-002", "epoch-004"]


def test_epoch_that_is_trained_again_replaces_its_checkpoint(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    save_all(checkpoints, [0.3], ["distill"])
    checkpoints.save(*trained(5), [row(1, 0.7)])
    assert checkpoints.at(1).rows == [row(1, 0.7)]
    assert float(checkpoints.at(1).weights()["weight"].mean()) == pytest.approx(5, abs=0.6)


def test_other_files_in_the_folder_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "error.log").write_text("a trace")
    (tmp_path / ".epoch-009").mkdir()
    checkpoints = Checkpoints(tmp_path)
    save_all(checkpoints, [0.3], ["distill"])
    last = checkpoints.require_last()
    assert last.epoch == 1
    assert (tmp_path / "error.log").exists()


def test_epochs_past_999_still_sort_by_number(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    rows = [row(999, 0.3), row(1000, 0.2)]
    checkpoints.save(*trained(1), rows[:1])
    checkpoints.save(*trained(2), rows)
    last = checkpoints.require_last()
    assert last.epoch == 1000 and checkpoints.at(999).epoch == 999


def test_each_trial_has_a_folder_of_its_own(tmp_path: Path) -> None:
    assert trial_folder(tmp_path, 12) == tmp_path / "trials" / "12"
