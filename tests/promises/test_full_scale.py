"""The settings for full data sets run unchanged on few, small images for few epochs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models.build import build_model
from models.skeleton import COCO
from study.config.compose import compose
from study.storage.tables import read_final, read_trials

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "data.input_size=[64,64]",
    "data.max_people=24",
    "distill.epochs=1",
    "refine.epochs=1",
    "search.trials=2",
    "search_space=smoke",
    "confirm.trials=0",
    "trial.gpus=0",
    "trial.cpus=1",
    "distill.batch_size=8",
    "refine.batch_size=8",
    "teacher.batch_size=8",
)


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """HRNet-W48 for COCO in the form of the official file, its weights random."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("official") / "pose_hrnet_w48_256x192.pth"
    torch.save(build_model("hrnet", "w48", COCO).state_dict(), path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("group", "data", "files"),
    [
        (
            "coco_full",
            "coco_tiny",
            (
                "data.val.annotations=annotations/person_keypoints_val2017_det4.json",
                "data.val.detections="
                "person_detection_results/COCO_val2017_det4_AP_H_56_person.json",
            ),
        ),
        (
            "crowdpose_full",
            "lspet_crowd",
            (
                "data.train.annotations=annotations/lspet_crowd_train.json",
                "data.train.images=images/train",
                "data.val.annotations=VAL",
                "data.val.images=images/val",
                "teacher.epochs=1",
            ),
        ),
    ],
)
def test_full_settings_run_on_few_images(
    group: str,
    data: str,
    files: tuple[str, ...],
    shared: Path,
    official: Path,
    tmp_path: Path,
) -> None:
    few = few_images(shared / "data" / data / "annotations/lspet_crowd_val.json", tmp_path)
    overrides = [
        f"data={group}",
        f"data.root={shared / 'data' / data}",
        f"teacher.init={official}",
        *(file.replace("=VAL", f"={few}") for file in files),
        *SMALL,
    ]
    done = subprocess.run(
        [sys.executable, str(ROOT / "study/tune.py"), f"storage={tmp_path}", *overrides],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [trial["state"] for trial in read_trials(tmp_path / group).to_pylist()] == [
        "COMPLETE",
        "COMPLETE",
    ]
    final = {row["role"]: row for row in read_final(tmp_path / group).to_pylist()}
    assert set(final) >= {"teacher", "baseline", "winner"}


def few_images(annotations: Path, folder: Path) -> Path | None:
    """Write the first ten images of an annotation file to another; None if the file is missing."""
    if not annotations.is_file():
        return None
    content = json.loads(annotations.read_text())
    content["images"] = content["images"][:10]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
    few = folder / "few.json"
    few.write_text(json.dumps(content))
    return few


@pytest.mark.parametrize("group", ["coco_full", "crowdpose_full"])
def test_full_settings_are_those_of_the_literature(group: str) -> None:
    config = compose([f"data={group}"])
    assert (config.teacher.name, config.teacher.size) == ("hrnet", "w48")
    assert config.teacher.flip_test and config.student.flip_test
    assert config.distill.epochs == 210 and config.data.input_size == [256, 192]
    assert (config.data.val.detections is not None) == (group == "coco_full")
