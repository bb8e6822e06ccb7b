"""Fixtures that many tests share."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from models.skeleton import COCO, SKELETONS, Skeleton
from study.cache import crop_parts
from study.cache.crop_store import CropStore, StoreSpec, make_crop_store, open_crop_store
from study.cache.prepare import PreparedData, prepare_data
from study.cache.teacher_store import TeacherTargets, write_teacher_store
from study.config import checks
from study.config.compose import compose
from study.config.derived import resolve
from study.config.schema import StudyConfig
from study.data.annotations import read_table
from study.data.crops import stored_size
from study.data.people import People, build_people
from study.storage.paths import TARGETS
from study.workers import Workers

ROOT = Path(__file__).resolve().parent.parent
# Last, because the study's scripts put the project in the first one's place.
sys.path.append(str(ROOT / "tests" / "promises"))
EASY_SIGMA = 1.0
FIVE = Skeleton(
    name="five",
    joints=("head", "left_hand", "right_hand", "left_foot", "right_foot"),
    edges=((0, 1), (0, 2), (1, 3), (2, 4)),
    flip_pairs=((1, 2), (3, 4)),
    oks_sigmas=(0.05, 0.08, 0.08, 0.1, 0.1),
    upper_body=(0, 1, 2),
)

FINGERS = ("thumb", "forefinger", "middle_finger", "ring_finger", "pinky_finger")
FEET = ("big_toe", "small_toe", "heel")
NUM_FACE = 68

FAST = "not slow"
SLOW_COMMAND = "python -m pytest -n 2 --dist loadfile -m slow"


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print the command for the slow tests after a run that left them out."""
    if config.option.markexpr == FAST:
        terminalreporter.write_line(f"slow tests were left out; run them by: {SLOW_COMMAND}")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of reference numbers and real images; the test is skipped if it is missing."""
    folder = Path(os.environ.get("POSE_STUDY_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing: it holds the reference numbers and real images")
    return folder


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Run torch on one thread: tiny networks are faster, and sums have one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.testing.assert_close(
        torch.zeros(1), torch.zeros(1)
    )  # its first call imports for seconds
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def five() -> Skeleton:
    """A skeleton of five joints, so that a literal 17 fails."""
    return FIVE


def hand(side: str) -> tuple[list[str], list[list[str]]]:
    """Joints and limbs of a hand: its root, and four joints of each finger, from root to tip."""
    root = f"{side}hand_root"
    fingers = [[f"{side}{finger}{joint}" for joint in range(1, 5)] for finger in FINGERS]
    limbs = [list(pair) for finger in fingers for pair in itertools.pairwise([root, *finger])]
    return [root, *itertools.chain(*fingers)], limbs


def whole_body() -> tuple[list[str], list[list[str]]]:
    """The 133 joints of COCO-WholeBody, in its order: body, feet, face, hands; limbs by name.

    The 68 of the face have no limb.
    """
    joints = list(COCO.joints)
    limbs = [[COCO.joints[start], COCO.joints[end]] for start, end in COCO.edges]
    for side in ("left_", "right_"):
        joints += [side + part for part in FEET]
        limbs += [[f"{side}ankle", side + part] for part in FEET]
    joints += [f"face-{number}" for number in range(NUM_FACE)]
    for side in ("left_", "right_"):
        own, own_limbs = hand(side)
        joints += own
        limbs += own_limbs
    return joints, limbs


LAYOUTS = {
    "animal": (["nose", "left_ear", "right_ear", "withers", "tail"], [["nose", "withers"]]),
    "hand": hand(""),
    "whole_body": whole_body(),
}
"""Joints and limbs by name: an animal of 5 joints, a hand of 21, and COCO-WholeBody's 133."""


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> tuple[list[str], list[list[str]]]:
    """Joints, and limbs by name, of an animal, of a hand, and of a whole body."""
    return LAYOUTS[request.param]


@pytest.fixture(scope="session")
def five_people(tmp_path_factory: pytest.TempPathFactory) -> People:
    """13 people of 5 joints, some unlabeled, in 8 images; two people in an image overlap."""
    root = tmp_path_factory.mktemp("five")
    rng = np.random.RandomState(3)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    (root / "images").mkdir()
    for image in range(1, 9):
        pixels = cv2.resize(rng.randint(0, 256, (20, 24, 3), np.uint8), (120, 100))
        cv2.imwrite(str(root / f"images/{image}.png"), pixels)
        images.append({"id": image, "file_name": f"{image}.png", "height": 100, "width": 120})
        for place in range(1 if image % 3 == 0 else 2):
            annotations.append(_person(rng, 10 * image + place, image, 20 + 25 * place))
    annotations.pop()  # an odd number of people
    category = {"id": 1, "name": "person", "keypoints": list(FIVE.joints), "skeleton": []}
    content = {"images": images, "annotations": annotations, "categories": [category]}
    (root / "five.json").write_text(json.dumps(content))
    return build_people(read_table(root / "five.json", FIVE), root / "images")


def _person(rng: np.random.RandomState, number: int, image: int, left: int) -> dict[str, Any]:
    points = rng.uniform((left, 20), (left + 40, 90), (5, 2)).round(2)
    visibility = np.where(rng.rand(5) < 0.75, 2, 0)
    visibility[0] = 2
    keypoints = np.where(visibility[:, None] > 0, np.c_[points, visibility], 0)
    return {
        "id": number,
        "image_id": image,
        "category_id": 1,
        "iscrowd": 0,
        "bbox": [left, 20, 40, 70],
        "area": 1500.0 + number,
        "num_keypoints": int((visibility > 0).sum()),
        "keypoints": keypoints.ravel().tolist(),
    }


@pytest.fixture
def five_data(five_people: People, tmp_path: Path) -> Path:
    """The files of ``five_people`` in a folder that the test may change.

    ``val.json`` has the same people, their ids higher by 1000, and its images are in ``others``.
    """
    root = tmp_path / "data"
    shutil.copytree(five_people.annotations.parent, root)
    shutil.copytree(root / "images", root / "others")
    content = json.loads((root / "five.json").read_text())
    for person in content["annotations"]:
        person["id"] += 1000
    (root / "val.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="session")
def five_store(five_people: People, tmp_path_factory: pytest.TempPathFactory) -> CropStore:
    """Crops of ``five_people``, 96 high and 64 wide."""
    return open_crop_store(
        make_crop_store(five_people, StoreSpec((96, 64), tmp_path_factory.mktemp("five-cache")))
    )


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut crops in parts of four people and batches of two: ``five_people`` fill three parts."""
    monkeypatch.setattr(crop_parts, "PEOPLE_PER_PART", 4)
    monkeypatch.setattr(crop_parts, "PEOPLE_PER_BATCH", 2)


@pytest.fixture(scope="module")
def easy() -> Iterator[str]:
    """Name of a COCO skeleton with sigmas so wide that one epoch of training scores some AP."""
    skeleton = dataclasses.replace(COCO, name="easy", oks_sigmas=(EASY_SIGMA,) * 17)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SKELETONS, "easy", skeleton)
        patch.setattr(checks, "SKELETONS", ("coco", "crowdpose", "easy"))
        yield "easy"


@pytest.fixture(scope="session")
def workers() -> Workers:
    """One worker on the CPU."""
    return Workers(torch.device("cpu"))


@pytest.fixture(scope="session")
def mini_config(tmp_path_factory: pytest.TempPathFactory) -> StudyConfig:
    """A study of 24 drawn images and tiny networks, with two epochs a stage."""
    return compose(
        [
            f"storage={tmp_path_factory.mktemp('mini')}",
            "data=drawn",
            "data.num_train_images=24",
            "data.num_val_images=2",
            "data.seed=3",
            "data.input_size=[64,64]",
            "data.search_fraction=0.25",
            "teacher.size=tiny",
            "teacher.epochs=1",
            "teacher.batch_size=16",
            "teacher.flip_test=false",
            "teacher.views=2",
            "distill.epochs=2",
            "distill.batch_size=16",
            "refine.epochs=2",
            "refine.batch_size=16",
            "refine.width=16",
        ]
    )


@pytest.fixture(scope="session")
def mini_data(mini_config: StudyConfig) -> PreparedData:
    """The prepared data of the mini study."""
    return prepare_data(
        mini_config.data,
        resolve(mini_config),
        lambda name: lambda done, total: None,
        lambda text: None,
    )


@pytest.fixture(scope="session")
def mini_targets(mini_data: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random teacher targets for the mini study: modes near the truth, and weaker rivals."""
    store = open_crop_store(Path(mini_data.train))
    rng = np.random.RandomState(5)
    count, joints = store.visibility.shape
    modes = np.zeros((count, joints, 3, 4), np.float32)
    modes[..., :2] = store.keypoints_stored[:, :, None] + rng.normal(0, 2, (count, joints, 3, 2))
    modes[..., 2] = np.sort(rng.rand(count, joints, 3))[..., ::-1]
    modes[..., 3] = rng.uniform(0.8, 1.3, (count, joints, 3))
    relation = torch.from_numpy(rng.uniform(-1, 1, (count, joints, joints)))
    targets = TeacherTargets(torch.from_numpy(modes), torch.ones(count, joints), relation)
    path = tmp_path_factory.mktemp("targets") / TARGETS
    write_teacher_store(path, stored_size(store.input_size), count, targets.part)
    return path
