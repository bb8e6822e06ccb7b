"""One whole study in the fast suite: all five commands, and the losses that are on record."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from study_command import INLINE, ROOT, run
from torch import nn

from study.storage.tables import read_final, read_reports, read_trials

NAME = "whole"
GOLDEN = Path(__file__).parent / "golden" / "whole_study.json"
"""Loss and AP of every epoch, and the machine that recorded them.

To record again after a change of method, run this file with RECORD set in the environment.
"""
RECORD = "POSE_STUDY_RECORD_GOLDEN"
SAME_MACHINE = 1e-6
OTHER_MACHINE = 0.5
"""Relative tolerances. Twenty steps of training amplify the rounding of another machine's kernels:
AVX2 in place of AVX-512 moved losses by up to 5 %, SSE4.1 by up to 14 %.
"""


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished study: five trials, two of them trained again from new seeds."""
    storage = tmp_path_factory.mktemp("whole")
    assert "winner: trial " in run(storage, NAME, *INLINE)
    return storage


def script(storage: Path, name: str, *arguments: str) -> str:
    """Run another command in this folder and return what it prints."""
    command = [sys.executable, str(ROOT / "study" / name), *arguments]
    done = subprocess.run(command, cwd=storage, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def drawn_data(storage: Path) -> Path:
    (folder,) = (storage / "cache").glob("drawn-*")
    return folder.relative_to(storage)


def epochs_of(folder: Path) -> list[dict[str, Any]]:
    columns = ("trial", "stage", "epoch", "loss", "val_ap")
    rows = [{name: row[name] for name in columns} for row in read_reports(folder).to_pylist()]
    # The teacher has no trial.
    return sorted(
        rows, key=lambda row: (-1 if row["trial"] is None else row["trial"], row["epoch"])
    )


def this_machine() -> dict[str, Any]:
    """Version and kernels of torch, and the losses of a small network, which show its rounding."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ConvTranspose2d(32, 8, 4, stride=2, padding=1),
            nn.Flatten(),
            nn.Linear(8 * 32 * 32, 4),
        )
        crops = torch.rand(8, 3, 32, 32)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
    losses = []
    for _ in range(4):
        loss = network(crops).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return {
        "torch": torch.__version__,
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "losses": losses,
    }


def test_study_reports_every_trial_and_final_role(storage: Path) -> None:
    trials = read_trials(storage / NAME).to_pylist()
    assert [trial["trial"] for trial in trials] == [0, 1, 2, 3, 4]
    assert [trial["control"] for trial in trials] == ["baseline", "defaults", None, None, None]
    assert {trial["state"] for trial in trials} == {"COMPLETE"}
    final = [row["role"] for row in read_final(storage / NAME).to_pylist()]
    assert final == ["teacher", "baseline", "best_distilled", "best_refined", "winner"]
    tables = {path.name for path in (storage / NAME / "results").iterdir() if path.is_dir()}
    assert tables >= {"audit", "confirm", "confirmed", "final", "reports", "trials"}


def test_losses_are_those_on_record(storage: Path) -> None:
    machine, epochs = this_machine(), epochs_of(storage / NAME)
    if os.environ.get(RECORD):
        GOLDEN.write_text(json.dumps({"machine": machine, "epochs": epochs}, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    tolerance = SAME_MACHINE if machine == golden["machine"] else OTHER_MACHINE
    assert [(row["trial"], row["stage"], row["epoch"]) for row in epochs] == [
        (row["trial"], row["stage"], row["epoch"]) for row in golden["epochs"]
    ]
    for name in ("loss", "val_ap"):
        recorded = [row[name] for row in golden["epochs"]]
        assert [row[name] for row in epochs] == pytest.approx(recorded, rel=tolerance), name


def test_finished_study_is_analyzed(storage: Path) -> None:
    printed = script(storage, "analyze.py", NAME)
    assert "baseline" in printed and "Pareto front" in printed
    plots = {path.name: path.stat().st_size for path in (storage / NAME / "plots").iterdir()}
    for name in ("learning_curves.png", "parallel_coordinates.png", "pareto_front.png"):
        assert plots[name] > 1000


def test_winner_is_exported_and_predicts_poses(storage: Path) -> None:
    script(storage, "export.py", NAME)
    exported = storage / NAME / "export"
    assert len(json.loads((exported / "config.json").read_text())["joints"]) == 17
    image = drawn_data(storage) / "val2017" / "000001000001.jpg"
    script(storage, "predict.py", f"{NAME}/export", str(image), "--out", "poses")
    assert (storage / "poses" / image.name).stat().st_size > 1000
    (pose,) = json.loads((storage / "poses" / "keypoints.json").read_text())
    assert len(pose["keypoints"]) == 3 * 17


def test_data_of_the_study_pass_the_audit(storage: Path) -> None:
    printed = script(storage, "dataset.py", str(drawn_data(storage)))
    assert "no faults" in printed
