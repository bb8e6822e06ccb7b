"""``study/tune.py`` on impossible input: one clear message, exit code 1, and nothing started."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow  # ray is imported, though never started

Document = dict[str, Any]
TRAIN = "annotations/person_keypoints_train2017.json"
VAL = "annotations/person_keypoints_val2017.json"
PERSON = 12
"""Annotation that the tests change; it is in image 2."""


def write_split(root: Path, annotations: str, images: str, first: int) -> None:
    """Write four images of one person each, numbered from ``first``."""
    (root / images).mkdir(parents=True)
    rng = np.random.RandomState(first)
    document: Document = {"images": [], "annotations": []}
    for number in range(first, first + 4):
        image = rng.randint(0, 256, (96, 64, 3), np.uint8)
        cv2.imwrite(str(root / images / f"{number}.jpg"), image)
        document["images"].append(
            {"id": number, "file_name": f"{number}.jpg", "height": 96, "width": 64}
        )
        keypoints = [value for joint in range(17) for value in (20.0 + joint, 30.0 + joint, 2)]
        document["annotations"].append(
            {
                "id": 10 + number,
                "image_id": number,
                "category_id": 1,
                "iscrowd": 0,
                "bbox": [10, 20, 40, 60],
                "area": 1200,
                "num_keypoints": 17,
                "keypoints": keypoints,
            }
        )
    (root / annotations).parent.mkdir(exist_ok=True)
    (root / annotations).write_text(json.dumps(document))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data set without faults, in COCO's layout."""
    root = tmp_path / "coco"
    write_split(root, TRAIN, "train2017", first=1)
    write_split(root, VAL, "val2017", first=5)
    return root


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test if Ray is started."""
    # The script puts the checkout first on the path when it is loaded.
    monkeypatch.setattr(sys, "path", list(sys.path))
    import ray

    def start(*_: object, **__: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray, "init", start)


def refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *settings: str
) -> str:
    """Run the script, which must fail, and return its message."""
    from study.tune import main

    monkeypatch.setattr(sys, "argv", ["tune.py", "display=plain", *settings])
    with pytest.raises(SystemExit) as end:
        main()
    message = str(end.value.code)  # a text: the interpreter prints it and exits with 1
    assert message.startswith("error: ")
    printed = capsys.readouterr()
    assert "Traceback" not in printed.out + printed.err + message
    assert "error" not in printed.out + printed.err
    return message


@pytest.fixture
def refusal(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """Runner of a study on the data that must be refused and keep no file but its audit."""

    def run(*settings: str) -> str:
        storage = tmp_path / "studies"
        basic = ("data=coco", f"data.root={data}", "data.input_size=[96,64]", f"storage={storage}")
        message = refused(capsys, monkeypatch, *basic, *settings)
        files = [file for file in storage.rglob("*") if file.is_file()]
        assert {f.name for f in files if f.parent.name != "audit"} <= {".lock"}
        return message

    return run


def change(data: Path, **changes: Any) -> None:
    """Change annotation PERSON of the training file."""
    document = json.loads((data / TRAIN).read_text())
    next(a for a in document["annotations"] if a["id"] == PERSON).update(changes)
    (data / TRAIN).write_text(json.dumps(document))


def test_no_such_data_folder(refusal: Callable[..., str]) -> None:
    message = refusal("data.root=/no/such/folder")
    assert message == (
        "error: data.root must be the folder of the data, got data.root=/no/such/folder, which "
        "does not exist; set data.root to the folder of its annotations and images"
    )


def test_json_that_does_not_parse(refusal: Callable[..., str], data: Path) -> None:
    (data / VAL).write_text('{"images": [],\n "annotations": [')
    message = refusal()
    assert "valid JSON" in message and "line 2, column 18" in message
    assert str(data / VAL) in message


def test_keypoints_of_the_wrong_length(refusal: Callable[..., str], data: Path) -> None:
    change(data, keypoints=[1, 2, 2] * 16)
    message = refusal()
    assert "keypoints of the wrong length: 1" in message
    assert f"{data / TRAIN}, annotation {PERSON}: " in message
    assert "17 joints, got 48 numbers (16 joints); change data.skeleton or the file" in message
    assert "data.max_bad_fraction=0.25" in message


def test_no_labeled_person(refusal: Callable[..., str], data: Path) -> None:
    document = json.loads((data / TRAIN).read_text())
    for annotation in document["annotations"]:
        annotation.update(keypoints=[0] * 51, num_keypoints=0)
    (data / TRAIN).write_text(json.dumps(document))
    message = refusal()
    assert "at least one person with a labeled joint, got 4 annotations" in message
    assert str(data / TRAIN) in message


def test_image_that_is_missing(refusal: Callable[..., str], data: Path) -> None:
    (data / "train2017" / "2.jpg").unlink()
    message = refusal()
    assert "image missing: 1" in message
    assert f"{data / 'train2017' / '2.jpg'}, annotation {PERSON}: there is no such file" in message


def test_image_that_is_truncated(refusal: Callable[..., str], data: Path) -> None:
    image = data / "train2017" / "2.jpg"
    image.write_bytes(image.read_bytes()[:-100])
    message = refusal()
    assert "image truncated or unreadable: 1" in message
    assert f"{image}, annotation {PERSON}: the JPEG is cut off" in message


def test_box_of_zero_size(refusal: Callable[..., str], data: Path) -> None:
    change(data, bbox=[10, 20, 0, 60])
    message = refusal()
    assert "box of zero size: 1" in message
    assert f"{data / TRAIN}, annotation {PERSON}: the box [10.0, 20.0, 0.0, 60.0]" in message


def test_faults_of_several_kinds_are_listed_in_one_message(
    refusal: Callable[..., str], data: Path
) -> None:
    change(data, bbox=[10, 20, 0, 60], keypoints=[1, 2])
    (data / "train2017" / "3.jpg").unlink()
    message = refusal()
    assert "got 2 of 4" in message
    for kind in ("wrong length: 1", "zero size: 1", "missing: 1"):
        assert kind in message


def space_file(folder: Path, entry: str) -> Path:
    file = folder / "mine.yaml"
    file.write_text(f"question: Why?\nparameters:\n  {entry}\n")
    return file


def test_search_space_key_that_is_no_config_path(
    refusal: Callable[..., str], tmp_path: Path
) -> None:
    file = space_file(tmp_path, "distil.optimizer.lr: {low: 1e-4, high: 1e-2, role: nuisance}")
    message = refusal(f"search_space={file}")
    assert "mine: distil.optimizer.lr: every path must be one of the config's" in message
    assert "did you mean 'distill.optimizer.lr'?" in message
    assert not (tmp_path / "studies").exists()


def test_lower_bound_above_the_upper_one(refusal: Callable[..., str], tmp_path: Path) -> None:
    file = space_file(tmp_path, "refine.depth: {low: 6, high: 1, role: scientific}")
    message = refusal(f"search_space={file}")
    assert message == (
        f"error: {file}: refine.depth: low <= high must hold, got low=6, high=1; swap them"
    )
    assert not (tmp_path / "studies").exists()


def test_bound_outside_the_range_of_its_setting(
    refusal: Callable[..., str], tmp_path: Path
) -> None:
    file = space_file(tmp_path, "refine.depth: {low: 1, high: 60, role: scientific}")
    message = refusal(f"search_space={file}")
    assert "mine: refine.depth may become 60, but impossible settings" in message
    assert "refine.depth must lie within 1 and 6" in message


def test_step_that_its_setting_does_not_accept(
    refusal: Callable[..., str], tmp_path: Path
) -> None:
    file = space_file(tmp_path, "refine.width: {low: 32, high: 64, role: scientific}")
    message = refusal(f"search_space={file}")
    assert "mine: refine.width may become 33, but impossible settings" in message
    assert "must be a multiple of 4, got refine.width=33; change to 32 (in a search" in message


def test_no_such_search_space(refusal: Callable[..., str]) -> None:
    assert "distill, joint, poses, refine, smoke" in refusal("search_space=jont")


def test_no_such_weights(refusal: Callable[..., str]) -> None:
    message = refusal("teacher.init=/no/such/weights.pth", "data.root=/no/such/folder")
    assert "/no/such/weights.pth must be a file of weights" in message  # before the data


@pytest.mark.parametrize("plan_only", ["false", "true"])
def test_folders_that_are_no_studies_are_refused_before_the_data_are_read(
    plan_only: str, refusal: Callable[..., str], data: Path
) -> None:
    message = refusal(
        f"search.warm_start=[{data}]", "data.root=/no/such/folder", f"plan_only={plan_only}"
    )
    assert f"search.warm_start must name folders of older studies, got {data}: " in message
    assert message.endswith("correct it or leave it out")


@pytest.mark.parametrize("plan_only", ["false", "true"])
@pytest.mark.parametrize(
    ("setting", "others"),
    [
        ("refine.start", ()),
        ("teacher.init", ("teacher.name=predictions", "teacher.epochs=0", "search_space=poses")),
    ],
)
def test_poses_that_are_no_list_are_refused_before_the_data_are_read(
    setting: str, others: Sequence[str], plan_only: str, refusal: Callable[..., str], data: Path
) -> None:
    file = data / "poses.json"
    settings = [f"{setting}={file}", "data.root=/no/such/folder", f"plan_only={plan_only}"]
    assert f"{setting} must be a" in refusal(*settings, *others)
    file.write_text("{}")
    message = refusal(*settings, *others)
    assert f"COCO keypoint results, with at least one entry, got {{}} in {file}" in message


@pytest.mark.parametrize("plan_only", ["false", "true"])
def test_storage_that_is_a_file(plan_only: str, refusal: Callable[..., str], data: Path) -> None:
    message = refusal(f"storage={data / TRAIN}", f"plan_only={plan_only}")
    assert message == (
        f"error: storage must be a folder that can be written to, got storage={data / TRAIN}, "
        f"where {data / TRAIN} is no folder; change storage=..."
    )


def test_trial_that_needs_more_than_this_machine_has(
    refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    message = refusal("trial.gpus=99", "data.root=/no/such/folder")  # before the data
    assert "a trial needs 1 workers of 1 CPUs and 99 GPUs" in message
    assert message.endswith("lower trial.cpus, trial.gpus or trial.num_workers")


@pytest.mark.parametrize("content", ["{a: [1", "a: 1", "config: 1", "[config]"])
def test_settings_that_no_study_wrote(
    content: str,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "studies" / "torn"
    folder.mkdir(parents=True)
    (folder / "study.yaml").write_text(content)
    basic = ("data=coco", f"data.root={data}", f"storage={tmp_path / 'studies'}")
    for settings in (["name=torn"], [f"search.warm_start=[{folder}]"]):
        message = refused(capsys, monkeypatch, *basic, *settings)
        assert f"{folder / 'study.yaml'} must hold the settings that a study wrote" in message


@pytest.mark.parametrize("storage", [f"{__file__}/studies", "/proc/studies"])
def test_storage_that_cannot_be_created(storage: str, refusal: Callable[..., str]) -> None:
    """Root may write into any folder, but cannot create one in /proc."""
    message = refusal(f"storage={storage}")
    assert "a folder that can be" in message and storage in message
    assert "; change storage" in message


def test_unknown_override(refusal: Callable[..., str], tmp_path: Path) -> None:
    message = refusal("refine.dept=3")
    assert message == "error: unknown setting refine.dept; did you mean refine.depth?"
    assert not (tmp_path / "studies").exists()


def test_bad_data_end_the_process_with_exit_code_1(data: Path, tmp_path: Path) -> None:
    change(data, bbox=[10, 20, 0, 60])
    script = ROOT / "study" / "tune.py"
    command = [sys.executable, script, "data=coco", f"data.root={data}", "storage=studies"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: at most a fraction of 0 of the people may be faulty")
    assert f"annotation {PERSON}: the box" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert "Ray" not in done.stdout
