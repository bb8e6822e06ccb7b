"""Whole studies with a teacher that was trained elsewhere, from its files to the final table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from study.data.synthetic.dataset import draw_dataset
from study.storage.tables import read_final, read_reports, read_trials

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow

SMALL = (
    "name=whole",
    "data=drawn",
    "data.num_train_images=24",
    "data.num_val_images=2",
    "data.seed=3",
    "data.input_size=[64,64]",
    "data.search_fraction=0.25",
    "search_space=poses",
    "teacher.epochs=0",
    "distill.epochs=1",
    "refine.epochs=1",
    "refine.width=16",
    "search.trials=2",
    "confirm.trials=0",
    "trial.launcher=inline",
)
ROLES = {"baseline", "best_distilled", "best_refined", "winner"}


def study_of(home: Path, *overrides: str) -> tuple[Path, str]:
    """Run a study of two trials; return its folder and what it printed."""
    command = [sys.executable, str(ROOT / "study/tune.py"), *SMALL, *overrides]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return home / "studies/whole", done.stdout


def check_evidence(folder: Path, roles: set[str]) -> None:
    trials = read_trials(folder).to_pylist()
    assert [trial["state"] for trial in trials] == ["COMPLETE", "COMPLETE"]
    final = {row["role"]: row for row in read_final(folder).to_pylist()}
    assert set(final) == roles
    assert all(0 <= row["ap"] <= 1 for row in final.values())
    reports = reports_of(folder, trial=1)
    assert reports[0]["loss.heatmap"] > 0 and reports[1]["loss.teacher"] > 0


def reports_of(folder: Path, trial: int) -> list[dict[str, Any]]:
    return [row for row in read_reports(folder).to_pylist() if row["trial"] == trial]


def test_study_learns_from_predictions_in_a_file(tmp_path: Path) -> None:
    draw_dataset(tmp_path / "drawn", seed=3, num_train_images=24, num_val_images=2)
    annotations = tmp_path / "drawn/annotations/person_keypoints_train2017.json"
    rng = np.random.RandomState(0)
    entries = []
    for person in json.loads(annotations.read_text())["annotations"]:
        x, y, width, height = person["bbox"]
        pose = rng.uniform((x, y), (x + width, y + height), (17, 2))
        keypoints = np.c_[pose, np.full(17, 0.8)].ravel().tolist()
        entries.append({"image_id": person["image_id"], "keypoints": keypoints, "score": 0.8})
    (tmp_path / "poses.json").write_text(json.dumps(entries))
    folder, printed = study_of(tmp_path, "teacher.name=predictions", "teacher.init=poses.json")
    assert "people to train on have a prediction; the rest have no target" in printed
    check_evidence(folder, ROLES)  # no teacher: the file has no predictions for val
    assert reports_of(folder, trial=1)[0]["loss.structure"] > 0
    arguments = [sys.executable, str(ROOT / "study/analyze.py"), str(folder)]
    subprocess.run(arguments, cwd=tmp_path, capture_output=True, check=True)


def test_study_learns_from_a_square_onnx_teacher_and_scores_it_on_val(tmp_path: Path) -> None:
    weight = np.random.RandomState(0).normal(size=(17, 3, 1, 1)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Conv", ["crops", "weight"], ["maps"], strides=[4, 4])],
        "pose",
        [helper.make_tensor_value_info("crops", TensorProto.FLOAT, ("batch", 3, 96, 96))],
        [helper.make_tensor_value_info("maps", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, tmp_path / "pose.onnx")
    folder, printed = study_of(
        tmp_path,
        "teacher.name=onnx",
        "teacher.init=pose.onnx",
        "teacher.input_size=[96,96]",
    )
    assert "the teacher's targets are stored" in printed
    check_evidence(folder, {"teacher", *ROLES})
    teacher = next(row for row in read_final(folder).to_pylist() if row["role"] == "teacher")
    assert (teacher["stage"], teacher["epoch"]) == ("teacher", 0)
    assert teacher["checkpoint"] == str(tmp_path / "pose.onnx")
