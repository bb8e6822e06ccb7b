"""The study's teacher: its crops have a separate size, its targets are in the student's frame."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from models.build import build_model
from models.codecs.codec import Dark
from models.codecs.crop_frame import CropFrame
from models.skeleton import COCO, CROWDPOSE, Skeleton
from study.cache.crop_store import CropStore, StoreSpec, make_crop_store, open_crop_store
from study.cache.prepare import PreparedData, prepare_data
from study.cache.teacher_store import TeacherTargets, open_teacher_store
from study.config.compose import with_values
from study.config.derived import resolve
from study.config.schema import AugmentConfig, StudyConfig
from study.data.crops import apply_affine, invert_affine, stored_to_crop_affine
from study.data.people import People
from study.driver import load_checked_space
from study.errors import InputError
from study.storage.checkpoint import Row
from study.storage.paths import TARGETS
from study.teachers.adapters import TeacherSpec
from study.teachers.identity import teacher_folder
from study.teachers.make import (
    draw_views,
    is_ready,
    load_teacher,
    make_teacher,
    prepare_teacher,
    store_targets,
)
from study.teachers.online import OnlineTeacher
from study.training.batches import plain_batch
from study.trial import teacher_spec
from study.workers import Workers

CPU = torch.device("cpu")


def spec_of(config: StudyConfig) -> TeacherSpec:
    return teacher_spec(config, resolve(config))


def prepare(config: StudyConfig) -> PreparedData:
    return prepare_data(
        config.data, resolve(config), lambda name: lambda done, total: None, lambda text: None
    )


def poses_of(store: CropStore) -> list[dict[str, Any]]:
    """Return the truth of these people as predictions, unlabeled joints without confidence."""
    keypoints = apply_affine(
        store.keypoints_stored.astype(float), invert_affine(store.image_to_stored)
    )
    confidence = 0.9 * (store.visibility > 0)
    rows = np.concatenate([keypoints, confidence[..., None]], axis=2)
    rows = rows.reshape(len(store), keypoints.shape[1] * 3)
    return [
        {"image_id": int(image), "annotation_id": int(number), "keypoints": row, "score": 0.8}
        for image, number, row in zip(
            store.image_ids, store.annotation_ids, rows.tolist(), strict=True
        )
    ]


def from_predictions(config: StudyConfig, entries: Any, folder: Path) -> StudyConfig:
    file = folder / "poses.json"
    file.write_text(json.dumps(entries))
    return with_values(
        config,
        {"teacher.name": "predictions", "teacher.init": str(file), "teacher.epochs": 0},
    )


class FixedTeacher:
    """Teacher that predicts the given places, in the order of the crops."""

    def __init__(self, size: tuple[int, int], in_crop: Tensor) -> None:
        self.frame = CropFrame(size)
        self.modes = torch.zeros(*in_crop.shape[:2], 1, 4)
        self.modes[:, :, 0, :2] = in_crop

    def predict_targets(self, crops: Tensor) -> TeacherTargets:
        assert crops.shape[1:] == (3, *self.frame.size)
        return TeacherTargets(self.modes, torch.ones(self.modes.shape[:2]), None)


@pytest.mark.parametrize("size", [(96, 64), (64, 64), (128, 128), (64, 96)])
def test_target_keeps_its_place_in_the_image(
    size: tuple[int, int],
    five_people: People,
    five_store: CropStore,
    five: Skeleton,
    tmp_path: Path,
) -> None:
    own = open_crop_store(make_crop_store(five_people, StoreSpec(size, tmp_path)))
    in_image = np.random.RandomState(0).uniform(10, 90, (13, 4, 2))
    plain = stored_to_crop_affine(CropFrame(size))[None]
    in_crop = apply_affine(apply_affine(in_image, own.image_to_stored), plain)
    teacher: Any = FixedTeacher(size, torch.from_numpy(in_crop))
    still = AugmentConfig(*[0.0] * 7)
    views = draw_views(five_store, five, CropFrame((96, 64)), still, number=1, seed=0)
    online = OnlineTeacher(teacher, own, five_store)
    store_targets(online, views, five, Workers(torch.device("cpu")), tmp_path / TARGETS)
    found = open_teacher_store(tmp_path / TARGETS).modes_stored()[:, :, 0, :2]
    expected = apply_affine(in_image, five_store.image_to_stored)
    inside = ((expected > -40) & (expected < np.array([130, 200]))).all(axis=-1)
    np.testing.assert_allclose(found[inside], expected[inside], atol=0.01)
    assert inside.mean() > 0.9 and np.abs(expected - in_crop).max() > 5


def test_teacher_of_the_students_size_shares_its_crops(
    mini_config: StudyConfig, mini_data: PreparedData
) -> None:
    config = with_values(mini_config, {"teacher.input_size": [64, 64]})
    assert prepare(config) == mini_data == mini_data.for_teacher()


def test_teacher_of_another_size_has_the_same_people_in_separate_crops(
    mini_config: StudyConfig, mini_data: PreparedData
) -> None:
    data = prepare(with_values(mini_config, {"teacher.input_size": [96, 64]}))
    for part in ("train", "search", "val"):
        assert getattr(data, part) == getattr(mini_data, part)
    assert data.fingerprint != mini_data.fingerprint
    teachers_data = data.for_teacher()
    for theirs, ours in ((teachers_data.train, data.train), (teachers_data.search, data.search)):
        store, student = open_crop_store(Path(theirs)), open_crop_store(Path(ours))
        assert store.input_size == (96, 64) and student.input_size == (64, 64)
        assert np.array_equal(store.annotation_ids, student.annotation_ids)


@pytest.mark.slow
@pytest.mark.parametrize("size", [[96, 96], [64, 64]])
def test_targets_of_a_square_teacher_are_in_the_students_frame(
    size: list[int], mini_config: StudyConfig, workers: Workers
) -> None:
    values: dict[str, Any] = {"teacher.input_size": size, "data.input_size": [96, 64]}
    config = with_values(mini_config, values)
    data = prepare(config)
    make_teacher(spec_of(config), config.student, data, workers, lambda row: False)
    folder = teacher_folder(spec_of(config), data)
    assert is_ready(folder)
    targets = open_teacher_store(folder / TARGETS)
    student = open_crop_store(Path(data.train))
    own = open_crop_store(Path(data.for_teacher().train))
    assert own.input_size == tuple(size) and targets.known.all()

    # by hand: each crop that the teacher sees, decoded, and both poses in the image
    rows = torch.arange(5)
    crops = plain_batch(own, COCO, CropFrame((size[0], size[1])), rows, CPU).crops
    teacher = load_teacher(spec_of(config), folder, CPU)
    with torch.inference_mode():
        heatmaps = teacher.pose.student.predict(crops).heatmaps  # type: ignore[attr-defined]
    cells = (size[0] // 4, size[1] // 4)
    codec = Dark((size[0], size[1]), cells, config.teacher.sigma)
    keypoints, scores = codec.decode(heatmaps)
    margin = np.array([size[1] / 4, size[0] / 4])
    image_to_own = own.image_to_stored[:5]
    expected = apply_affine(keypoints.double().numpy() + margin, invert_affine(image_to_own))
    stored = targets.modes_stored(slice(5))[:, :, 0, :2].astype(float)
    found = apply_affine(stored, invert_affine(student.image_to_stored[:5]))
    has_peak = scores.numpy() > 0
    assert has_peak.any()
    np.testing.assert_allclose(found[has_peak], expected[has_peak], atol=0.02)


def test_untrained_teacher_of_other_joints_has_targets_and_is_scored(
    mini_config: StudyConfig, mini_data: PreparedData, workers: Workers, tmp_path: Path
) -> None:
    init = tmp_path / "crowd.safetensors"
    torch.manual_seed(0)
    network = build_model("mobile_net", "tiny", CROWDPOSE)
    save_file(network.state_dict(), init)
    values = {"teacher.init": str(init), "teacher.skeleton": "crowdpose", "teacher.epochs": 0}
    config = with_values(mini_config, values)
    rows: list[Row] = []

    def report(row: Row) -> bool:
        rows.append(row)
        return False

    make_teacher(spec_of(config), config.student, mini_data, workers, report)
    assert [(row["stage"], row["epoch"]) for row in rows] == [("teacher", 0)]
    assert 0 <= rows[0]["val_ap"] <= 1
    targets = open_teacher_store(teacher_folder(spec_of(config), mini_data) / TARGETS)
    known = [joint in CROWDPOSE.joints for joint in COCO.joints]
    assert (targets.known == np.array(known)).all() and sum(known) == 12
    assert targets.relation is not None
    relation = targets.relations() - np.eye(17)
    assert (relation[:, ~np.array(known)] == 0).all() and (relation != 0).any()


def test_predictions_are_stored_before_anything_starts(
    mini_config: StudyConfig, mini_data: PreparedData, tmp_path: Path
) -> None:
    store = open_crop_store(Path(mini_data.train))
    config = from_predictions(mini_config, poses_of(store)[1:], tmp_path)
    messages: list[str] = []
    prepare_teacher(spec_of(config), mini_data, messages.append)
    folder = teacher_folder(spec_of(config), mini_data)
    assert is_ready(folder)
    assert messages[0].startswith(
        f"{len(store) - 1} of {len(store)} people to train on have a pred"
    )
    targets = open_teacher_store(folder / TARGETS)
    labeled = store.visibility > 0
    labeled[0] = False  # has no prediction
    assert np.array_equal(targets.known > 0, labeled) and targets.relation is None
    np.testing.assert_allclose(
        targets.modes_stored()[:, :, 0, :2][labeled], store.keypoints_stored[labeled], atol=0.002
    )
    prepare_teacher(spec_of(config), mini_data, messages.append)
    assert len(messages) == 1  # the targets exist already


def test_predictions_without_a_training_person_are_refused(
    mini_config: StudyConfig, mini_data: PreparedData, tmp_path: Path
) -> None:
    entries = poses_of(open_crop_store(Path(mini_data.search)))
    config = from_predictions(mini_config, entries, tmp_path)
    with pytest.raises(InputError, match=r"people to train on, got none .*poses\.json; change"):
        prepare_teacher(spec_of(config), mini_data, lambda text: None)
    assert not is_ready(teacher_folder(spec_of(config), mini_data))


def test_other_predictions_make_another_teacher(
    mini_config: StudyConfig, mini_data: PreparedData, tmp_path: Path
) -> None:
    entries = poses_of(open_crop_store(Path(mini_data.train)))
    config = from_predictions(mini_config, entries, tmp_path)
    before = teacher_folder(spec_of(config), mini_data)
    other = from_predictions(mini_config, entries[1:], tmp_path)
    assert teacher_folder(spec_of(other), mini_data) != before


def test_space_with_the_relation_is_refused_for_teachers_without_features(
    mini_config: StudyConfig, tmp_path: Path
) -> None:
    config = from_predictions(mini_config, [], tmp_path)
    with pytest.raises(InputError, match=r"structure\.kind may become 'relation'"):
        load_checked_space(config)
    with pytest.raises(InputError, match="search_space=poses"):
        load_checked_space(config)
    space = load_checked_space(with_values(config, {"search_space": "poses"}))
    assert "distill.structure.weight" in space.paths
