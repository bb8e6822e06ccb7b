"""Evaluation: keypoints in the image, each person once, the same AP on all workers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.build import build_codec, build_model
from models.refined_pose import RefinedPose
from models.skeleton import COCO, Skeleton
from study.cache.crop_store import CropStore, StoreSpec, make_crop_store, open_crop_store
from study.cache.prepare import PreparedData
from study.config.schema import StudyConfig
from study.data.annotations import read_table
from study.data.crops import plain_affines, transform_points
from study.data.people import People, build_people
from study.errors import TrainingDiverged
from study.training import evaluation
from study.training.evaluation import detect_people, evaluate, predict_crops
from study.workers import Workers


class Oracle(nn.Module):
    """Estimator that predicts the truth of the people at ``rows``, shifted by ``error``."""

    def __init__(
        self, store: CropStore, rows: list[int], error: float = 0.0, codec: str = "dark"
    ) -> None:
        super().__init__()
        self.frame = build_codec(codec, store.input_size, 2.0).frame
        affine = plain_affines(len(rows), self.frame)
        self.predictions = (
            transform_points(torch.from_numpy(store.keypoints_stored[rows]), affine) + error
        )
        self.shown = 0

    def forward(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        keypoints = self.predictions[self.shown : self.shown + len(crops)]
        self.shown += len(crops)
        assert len(keypoints) == len(crops)
        return keypoints, torch.full(keypoints.shape[:2], 0.9)


class Peer(Workers):
    """One of two workers in a process; the first receives the values of the second."""

    def __init__(self, rank: int, others: list[Any]) -> None:
        super().__init__(torch.device("cpu"))
        self.rank, self.world = rank, 2
        self.others = others

    def gather(self, value: Any) -> list[Any]:
        if self.rank == 1:
            self.others.append(value)
            return [value]
        return [value, self.others.pop()]


def network(store: CropStore, skeleton: Skeleton) -> RefinedPose:
    """Return a student with a random head, so that it predicts different places."""
    torch.manual_seed(0)
    student = build_model("mobile_net", "tiny", skeleton)
    nn.init.normal_(student.final_layer.weight, std=1.0)
    return RefinedPose(student, build_codec("dark", store.input_size, 2.0), None).eval()


@pytest.fixture(scope="module")
def search(mini_data: PreparedData) -> CropStore:
    return open_crop_store(Path(mini_data.search))


def test_perfect_keypoints_score_ap_1_through_the_whole_chain(
    search: CropStore, mini_data: PreparedData, workers: Workers
) -> None:
    oracle: Any = Oracle(search, list(range(len(search))))
    scores = evaluate(oracle, search, Path(mini_data.search_truth), COCO, "coco", workers)
    assert scores["ap"] == pytest.approx(1) and scores["ar"] == pytest.approx(1)


def test_perfect_keypoints_of_real_images_score_ap_1(
    shared: Path, tmp_path: Path, workers: Workers
) -> None:
    root = shared / "data/coco_tiny"
    truth = root / "annotations/person_keypoints_val2017.json"
    people = build_people(read_table(truth, COCO), root / "val2017")
    store = open_crop_store(make_crop_store(people, StoreSpec((96, 64), tmp_path)))
    oracle: Any = Oracle(store, list(range(len(store))))
    assert evaluate(oracle, store, truth, COCO, "coco", workers)["ap"] == pytest.approx(1)


@pytest.mark.parametrize("codec", ["dark", "udp"])
def test_crop_keypoints_are_transformed_back_to_the_image(
    codec: str, five_people: People, five_store: CropStore, five: Skeleton, workers: Workers
) -> None:
    oracle: Any = Oracle(five_store, list(range(13)), codec=codec)
    detections = detect_people(oracle, five_store, five, workers)
    found = np.array([detection["keypoints"] for detection in detections]).reshape(13, 5, 3)
    np.testing.assert_allclose(found[..., :2], five_people.keypoints_image, atol=1e-3)
    assert [d["image_id"] for d in detections] == five_people.image_ids.tolist()
    assert [d["score"] for d in detections] == pytest.approx([0.9] * 13)


def test_shift_in_the_crop_is_a_shift_in_the_image_over_the_zoom(
    five_people: People, five_store: CropStore, five: Skeleton, workers: Workers
) -> None:
    oracle: Any = Oracle(five_store, list(range(13)), error=4.0)
    detections = detect_people(oracle, five_store, five, workers)
    found = np.array([detection["keypoints"] for detection in detections]).reshape(13, 5, 3)
    away = found[..., :2] - five_people.keypoints_image
    zoom = five_store.image_to_stored[:, 0, 0]
    np.testing.assert_allclose(
        away, np.broadcast_to((4 / zoom)[:, None, None], away.shape), atol=1e-3
    )


def test_two_workers_predict_what_one_does_and_each_person_once(
    five_store: CropStore, five: Skeleton, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    estimator = network(five_store, five)
    monkeypatch.setattr(evaluation, "BATCH_SIZE", 3)
    alone, alone_scores = predict_crops(estimator, five_store, five, workers)
    others: list[Any] = []
    predict_crops(estimator, five_store, five, Peer(1, others))
    rows = np.concatenate(others[0][0]).tolist()
    assert rows == [1, 3, 5, 7, 9, 11]  # 13 people: the first worker has one more
    both, both_scores = predict_crops(estimator, five_store, five, Peer(0, others))
    assert both.shape == (13, 5, 2) and len(np.unique(both)) > 20
    np.testing.assert_allclose(both, alone, atol=1e-3)
    np.testing.assert_allclose(both_scores, alone_scores, atol=1e-5)


def test_worker_without_people_gathers_like_the_others(
    five_store: CropStore, five: Skeleton, workers: Workers
) -> None:
    estimator = network(five_store, five)
    others: list[Any] = []
    predict_crops(estimator, five_store, five, Peer(1, others), count=1)
    both, _ = predict_crops(estimator, five_store, five, Peer(0, others), count=1)
    alone, _ = predict_crops(estimator, five_store, five, workers, count=1)
    np.testing.assert_allclose(both, alone, atol=1e-3)


def test_a_count_takes_the_first_people(
    five_store: CropStore, five: Skeleton, workers: Workers
) -> None:
    estimator = network(five_store, five)
    everyone, _ = predict_crops(estimator, five_store, five, workers)
    first, _ = predict_crops(estimator, five_store, five, workers, count=4)
    np.testing.assert_allclose(first, everyone[:4], atol=1e-3)
    assert len(predict_crops(estimator, five_store, five, workers, count=99)[0]) == 13


def test_evaluation_does_not_change_the_network(
    search: CropStore, mini_config: StudyConfig, mini_data: PreparedData, workers: Workers
) -> None:
    estimator = network(search, COCO)
    before = {name: value.clone() for name, value in estimator.state_dict().items()}
    truth = Path(mini_data.search_truth)
    first = evaluate(estimator, search, truth, COCO, "coco", workers)
    assert evaluate(estimator, search, truth, COCO, "coco", workers) == first
    for name, value in estimator.state_dict().items():
        assert torch.equal(value, before[name])


def test_keypoints_that_are_not_finite_end_the_training(
    five_store: CropStore, five: Skeleton, workers: Workers
) -> None:
    estimator: Any = Oracle(five_store, list(range(13)), error=float("nan"))
    with pytest.raises(TrainingDiverged, match="lower the learning rate"):
        detect_people(estimator, five_store, five, workers)


def test_heatmaps_that_are_not_finite_end_the_training(
    five_store: CropStore, five: Skeleton, workers: Workers
) -> None:
    estimator = network(five_store, five)
    nn.init.constant_(estimator.student.final_layer.weight, float("nan"))  # type: ignore[union-attr,arg-type]
    with pytest.raises(TrainingDiverged, match="lower the learning rate"):
        detect_people(estimator, five_store, five, workers)


def test_figures_without_people_are_left_out(
    five_people: People, five_store: CropStore, five: Skeleton, workers: Workers
) -> None:
    oracle: Any = Oracle(five_store, list(range(13)))
    scores = evaluate(oracle, five_store, five_people.annotations, five, "coco", workers)
    assert scores["ap"] == pytest.approx(1)
    assert "ap_l" not in scores  # all areas are near 1,500 square pixels, medium


def test_only_the_first_worker_computes_ap_and_the_others_receive_it(
    five_people: People, five_store: CropStore, five: Skeleton, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Second(Peer):
        def from_first(self, value: Any) -> Any:
            assert value is None
            return {"ap": 0.25}

    monkeypatch.setattr(evaluation, "average_precision", None)
    store = dataclasses.replace(five_store)
    monkeypatch.setattr(evaluation, "detect_people", lambda *arguments: [])
    scores = evaluate(
        network(store, five), store, five_people.annotations, five, "coco", Second(1, [])
    )
    assert scores == {"ap": 0.25}
