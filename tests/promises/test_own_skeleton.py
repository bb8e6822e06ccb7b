"""A study of five joints of an animal: by the commands, from a skeleton file to drawn poses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from study_command import SETTINGS, run

from study.config.compose import compose
from study.display import Display
from study.driver import run_study
from study.errors import InputError
from study.export import export_study
from study.predict import main as predict
from study.storage.tables import JOINTS, read_final, read_trials

JOINTS_IN_FILE = ("tail", "left_ear", "nose", "right_ear", "withers")
HORSE: dict[str, Any] = {
    "joints": ["nose", "left_ear", "right_ear", "withers", "tail"],
    "edges": [["nose", "left_ear"], ["nose", "right_ear"], ["withers", "tail"]],
    "oks_sigmas": 1.0,  # so that a student that learned for two epochs has an AP
}
NAME = "horses"


def draw_horses(root: Path) -> None:
    """Write train and val: images with a dot per joint, which the files list in another order."""
    rng = np.random.RandomState(0)
    for split, count, first in (("train", 30, 1), ("val", 6, 1001)):
        (root / split).mkdir(parents=True)
        images, annotations = [], []
        for number in range(first, first + count):
            pixels = cv2.resize(rng.randint(0, 256, (10, 12, 3), np.uint8), (120, 100))
            points = rng.uniform((20, 15), (100, 85), (5, 2)).round(1)
            for joint, (x, y) in enumerate(points):
                cv2.circle(pixels, (int(x), int(y)), 5, (50 * joint, 0, 255), -1)
            cv2.imwrite(str(root / split / f"{number}.png"), pixels)
            file = {"id": number, "file_name": f"{number}.png", "height": 100, "width": 120}
            images.append(file)
            annotations.append(
                {
                    "id": number,
                    "image_id": number,
                    "category_id": 1,
                    "iscrowd": 0,
                    "bbox": [10, 10, 100, 80],
                    "area": 5000.0,
                    "num_keypoints": 5,
                    "keypoints": np.c_[points, np.full(5, 2)].ravel().tolist(),
                }
            )
        category = {"id": 1, "name": "horse", "keypoints": JOINTS_IN_FILE, "skeleton": [[1, 5]]}
        content = {"images": images, "annotations": annotations, "categories": [category]}
        (root / f"{split}.json").write_text(json.dumps(content))


def settings(folder: Path) -> list[str]:
    return [
        "data=coco",
        f"data.root={folder}",
        f"data.skeleton={folder / 'horse.yaml'}",
        "data.train.annotations=train.json",
        "data.train.images=train",
        "data.val.annotations=val.json",
        "data.val.images=val",
        "search_space=smoke",
        "distill.epochs=2",
        "distill.batch_size=8",
        "refine.epochs=1",
        "refine.batch_size=8",
        "search.trials=2",
        "confirm.trials=0",
        "trial.launcher=inline",
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("horses")
    draw_horses(folder)
    (folder / "horse.yaml").write_text(yaml.safe_dump(HORSE))
    return folder


@pytest.fixture(scope="module")
def study(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished study of two trials."""
    storage = tmp_path_factory.mktemp("own")
    printed = run(storage, NAME, *settings(data))
    assert "the left-right pairs are left_ear/right_ear" in printed
    assert "half_body is off, since the skeleton has 5 joints" in printed
    return storage / NAME


def run_here(study: Path, *more: str) -> None:
    """Run the command's study in this process, as far as its checks."""
    run_study(compose([*SETTINGS, f"storage={study.parent}", f"name={study.name}", *more]))


@pytest.mark.slow
def test_trials_and_joints_are_those_of_the_skeleton(study: Path) -> None:
    trials = read_trials(study).to_pylist()
    assert [trial["state"] for trial in trials] == ["COMPLETE", "COMPLETE"]
    assert max(trial["objective"] for trial in trials) > 0.5
    rows = read_final(study, JOINTS).to_pylist()
    assert list(dict.fromkeys(row["joint"] for row in rows)) == HORSE["joints"]


@pytest.mark.slow
def test_changed_skeleton_is_refused(study: Path, data: Path) -> None:
    file = data / "horse.yaml"
    file.write_text(yaml.safe_dump(HORSE | {"oks_sigmas": 0.5}))
    with pytest.raises(InputError, match=r"must have the content .* other oks_sigmas"):
        run_here(study, *settings(data))
    file.write_text(yaml.safe_dump(HORSE))
    run_here(study, *settings(data))  # it is finished
    moved = file.rename(data / "moved.yaml")
    run_here(study, *settings(data), f"data.skeleton={moved}")
    moved.rename(file)


@pytest.mark.slow
def test_export_needs_no_file_and_draws_its_own_joints(study: Path, data: Path) -> None:
    (data / "horse.yaml").unlink()
    export_study(study, None, Display("none"), is_refined=True)
    (data / "horse.yaml").write_text(yaml.safe_dump(HORSE))
    info = json.loads((study / "export" / "config.json").read_text())
    assert info["joints"] == HORSE["joints"]
    assert info["edges"] == [[0, 1], [0, 2], [3, 4]] and info["flip_pairs"] == [[1, 2]]
    assert info["oks_sigmas"] == [1.0] * 5
    assert ", ".join(HORSE["joints"]) in (study / "export" / "README.md").read_text()
    out = study.parent / "poses"
    predict([str(study / "export"), str(data / "val" / "1001.png"), "--out", str(out)])
    (pose,) = json.loads((out / "keypoints.json").read_text())
    assert len(pose["keypoints"]) == 3 * 5
    assert (out / "1001.jpg").stat().st_size > 1000


def test_structure_loss_without_limbs_is_refused_before_any_data_are_read(
    data: Path, tmp_path: Path
) -> None:
    (tmp_path / "dots.yaml").write_text(yaml.safe_dump({"joints": HORSE["joints"]}))
    (tmp_path / "apart.yaml").write_text(
        yaml.safe_dump({"joints": HORSE["joints"], "edges": [[0, 1], [3, 4]]})
    )
    for file, kind, fault in (
        ("dots.yaml", "bone", "structure loss bone compares limbs, got none"),
        ("dots.yaml", "mix", "structure loss angle compares angles between limbs"),
        ("apart.yaml", "angle", "structure loss angle compares angles between limbs"),
    ):
        more = [f"data.skeleton={tmp_path / file}", "data.train.annotations=none.json"]
        with pytest.raises(InputError, match=f"{fault}.*search_space=poses"):
            run_here(tmp_path / NAME, *settings(data), *more, f"distill.structure.kind={kind}")


def test_each_thing_that_a_skeleton_turns_off_is_one_note(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    joints = [f"{side}_rib_{number}" for number in range(10) for side in ("left", "right")]
    edges = [[0, 1], [1, 2]]
    for upper, halves in (({}, 1), ({"upper_body": joints[:6]}, 0)):
        content = {"joints": joints, "edges": edges, "oks_sigmas": 0.05, **upper}
        (tmp_path / "ribs.yaml").write_text(yaml.safe_dump(content))
        more = [f"data.skeleton={tmp_path / 'ribs.yaml'}", "data.train.annotations=none.json"]
        with pytest.raises(InputError, match="the annotation file must exist"):
            run_here(tmp_path / NAME, *settings(data), *more, "refine.start=jitter")
        printed = " ".join(capsys.readouterr().out.split())
        assert printed.count("half_body is off, since the skeleton has no upper_body") == halves
        assert printed.count("swaps are resolved for the first 8 flip_pairs") == 1
        assert printed.count("left_rib_0/right_rib_0") == 1
