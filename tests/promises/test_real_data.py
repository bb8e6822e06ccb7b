"""Studies on real images, by the same command with other settings: analyzed and exported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from study.storage.tables import read_final, read_reports, read_trials

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow

QUICK = (
    "data.input_size=[96,64]",
    "data.max_people=200",
    "teacher.epochs=1",
    "teacher.size=tiny",
    "distill.epochs=1",
    "refine.epochs=1",
    "search.trials=2",
    "confirm.trials=0",
    "search_space=smoke",
)


def script(folder: Path, name: str, *arguments: str) -> str:
    """Run a script in this folder and return what it prints."""
    command = [sys.executable, str(ROOT / "study" / name), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def study_on(home: Path, *overrides: str) -> Path:
    """Run a study of two trials, its analysis and its export; return the study's folder.

    Paths are relative, although Ray's workers have other working directories.
    """
    script(home, "tune.py", "name=real", *QUICK, *overrides)
    assert "baseline" in script(home, "analyze.py", "studies/real")
    script(home, "export.py", "studies/real")
    return home / "studies/real"


def check_evidence(folder: Path, num_joints: int, figures: set[str]) -> None:
    trials = read_trials(folder).to_pylist()
    assert [trial["state"] for trial in trials] == ["COMPLETE", "COMPLETE"]
    assert [trial["control"] for trial in trials] == ["baseline", "defaults"]
    reports = [row for row in read_reports(folder).to_pylist() if row["trial"] is not None]
    assert [(row["trial"], row["epoch"]) for row in reports] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    final = {row["role"]: row for row in read_final(folder).to_pylist()}
    assert set(final) >= {"teacher", "baseline", "best_distilled", "best_refined", "winner"}
    assert all(0 <= final["teacher"][name] <= 1 for name in figures)
    for name in ("learning_curves.png", "parallel_coordinates.png"):
        assert (folder / "plots" / name).stat().st_size > 1000
    config = json.loads((folder / "export" / "config.json").read_text())
    assert len(config["joints"]) == num_joints
    assert (folder / "export" / "model.safetensors").is_file()


def test_coco_by_its_official_names(shared: Path, tmp_path: Path) -> None:
    (tmp_path / "coco").symlink_to(shared / "data/coco_tiny")
    folder = study_on(tmp_path, "data=coco", "data.root=coco")
    check_evidence(folder, 17, {"ap", "ap_m", "ap_l"})
    image = next((shared / "data/coco_tiny/val2017").glob("*.jpg"))
    script(
        tmp_path,
        "predict.py",
        str(folder / "export"),
        str(image),
        "--out",
        str(tmp_path / "poses"),
    )
    assert (tmp_path / "poses" / image.name).is_file()


@pytest.mark.parametrize(
    ("name", "figures"),
    [("lspet_crowd", {"ap", "ap_easy", "ap_medium", "ap_hard"}), ("lspet", {"ap", "ap_easy"})],
)
def test_crowdpose_joints_and_rules(
    shared: Path, tmp_path: Path, name: str, figures: set[str]
) -> None:
    folder = study_on(
        tmp_path,
        "data=crowdpose",
        f"data.root={shared / 'data' / name}",
        f"data.train.annotations=annotations/{name}_train.json",
        "data.train.images=images/train",
        f"data.val.annotations=annotations/{name}_val.json",
        "data.val.images=images/val",
    )
    check_evidence(folder, 14, figures)
