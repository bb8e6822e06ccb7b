"""Studies and exports of the code before ``study/`` had packages can still be used."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from study_command import LIMIT_S, ROOT
from torch import Tensor
from torch.nn import functional

from models.build import load_export
from study.search.stage import open_study
from study.storage.tables import read_final, read_reports, read_trials

HERE = Path(__file__).parent
COMMAND = (
    "storage=studies",
    "name=old",
    "data.train_pictures=12",
    "data.val_pictures=4",
    "data.input_size=[64,64]",
    "teacher.size=tiny",
    "teacher.epochs=1",
    "refine.width=16",
    "distill.epochs=2",
    "refine.epochs=1",
    "search.min_epochs=1",
    "search.startup_trials=2",
    "search.concurrent=1",
    "confirm.trials=0",
    "display=plain",
    "trial.launcher=inline",
)
"""The command of old_study/README.md but for search.trials."""


@pytest.fixture
def older(tmp_path: Path) -> Path:
    """The folder of the older study, in ``studies`` of an empty folder."""
    with tarfile.open(HERE / "old_study" / "old.tar.xz") as archive:
        archive.extractall(tmp_path / "studies", filter="data")
    return tmp_path / "studies" / "old"


def run_again(older: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    """Run the older study's command from the folder that it was run in."""
    return subprocess.run(
        [sys.executable, str(ROOT / "study" / "tune.py"), *COMMAND, *settings],
        cwd=older.parent.parent,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )


def rows_by_trial(folder: Path) -> dict[int, tuple[dict[str, Any], list[dict[str, Any]]]]:
    """The row of ``trials`` and the rows of ``reports`` of each finished trial."""
    reports = read_reports(folder).to_pylist()
    return {
        row["trial"]: (row, [report for report in reports if report["trial"] == row["trial"]])
        for row in read_trials(folder).to_pylist()
    }


@pytest.mark.slow
def test_older_study_continues_and_keeps_its_trials(older: Path) -> None:
    before = rows_by_trial(older)
    assert sorted(before) == [0, 1]

    done = run_again(older, "search.trials=3")
    assert done.returncode == 0, done.stdout + done.stderr

    after = rows_by_trial(older)
    assert sorted(after) == [0, 1, 2]
    assert {number: after[number] for number in before} == before
    new, new_reports = after[2]
    assert new["state"] in ("COMPLETE", "PRUNED") and new["control"] is None
    assert [report["epoch"] for report in new_reports] == list(range(1, new["epochs"] + 1))

    counted = Counter((row["trial"], row["epoch"]) for row in read_reports(older).to_pylist())
    assert set(counted.values()) == {1}
    journal = open_study(older, "old").get_trials()
    assert [trial.number for trial in journal] == [0, 1, 2]
    assert [trial.state.name for trial in journal] == [
        after[number][0]["state"] for number in after
    ]
    epochs = {(trial.number, epoch) for trial in journal for epoch in trial.intermediate_values}
    assert {key for key in counted if key[0] is not None} == epochs
    roles = Counter(row["role"] for row in read_final(older).to_pylist())
    assert set(roles.values()) == {1} and {"teacher", "baseline", "winner"} <= set(roles)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "path"),
    [
        ("data.val_pictures=5", "data.num_val_images: 4 in the study, 5 now"),
        ("distill.augment.colour=0.3", "distill.augment.color: 0.2 in the study, 0.3 now"),
    ],
)
def test_changed_setting_of_an_older_study_is_refused(
    older: Path, setting: str, path: str
) -> None:
    before = rows_by_trial(older)
    refused = run_again(older, "search.trials=3", setting)
    assert refused.returncode == 1
    assert path in refused.stderr
    assert rows_by_trial(older) == before


def test_older_export_predicts_the_same_joints() -> None:
    folder = HERE / "old_export"
    estimator, info = load_export(folder)
    recorded = json.loads((folder / "keypoints.json").read_text())
    crops, given = crops_and_poses(tuple(info["input_size"]), len(info["joints"]))
    with torch.inference_mode():
        keypoints_crop, scores = estimator(crops)
        refined_crop, _ = estimator(crops, (given, torch.ones(given.shape[:2])))
    # Not to the last bit, since other CPUs sum in another order.
    assert (keypoints_crop - torch.tensor(recorded["keypoints_crop"])).abs().max() < 0.01
    assert (refined_crop - torch.tensor(recorded["refined_crop"])).abs().max() < 0.01
    assert (scores - torch.tensor(recorded["scores"])).abs().max() < 1e-4


def crops_and_poses(size: tuple[int, int], num_joints: int) -> tuple[Tensor, Tensor]:
    """Four smooth random crops, RGB in 0..255, and poses in crop pixels.

    With this seed no map of the student has two peaks that rounding could exchange.
    """
    generator = torch.Generator().manual_seed(12)
    coarse = 255 * torch.rand(4, 3, 8, 8, generator=generator)
    crops = functional.interpolate(coarse, size=size, mode="bilinear", align_corners=False)
    given = 64 * torch.rand(4, num_joints, 2, generator=generator)
    return crops, given
