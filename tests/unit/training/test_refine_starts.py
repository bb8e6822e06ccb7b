"""refine.start: the refiner learns to improve the poses of other methods."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.candidates import LOWEST_GIVEN
from models.codecs.codec import Dark
from models.igp_gcn import IgpGcn
from models.pose_features import PoseFeatures, PoseNetwork
from models.skeleton import COCO, Skeleton
from study.cache import predictions
from study.cache.crop_store import CropStore
from study.cache.predictions import check_start, given_starts, stored_starts
from study.config import checks
from study.config.compose import compose, flatten, to_plain
from study.config.schema import AugmentConfig, OptimizerConfig, RefineConfig
from study.config.study_paths import with_absolute_paths
from study.data.crops import apply_affine, invert_affine
from study.errors import InputError
from study.training.batches import Batch
from study.training.pose_errors import jittered
from study.training.refine import RefineTask

CROP = (96, 64)
CODEC = Dark(input_size=CROP, heatmap_size=(24, 16))
AREA = 1600.0
JITTER = 0.15


class Seer(PoseNetwork):
    """Student that finds every joint at the middle; its features point to the true joints."""

    pyramid_channels = (2, 2, 2)
    truth: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, crops: Tensor) -> PoseFeatures:
        maps = torch.zeros(len(crops), self.truth.shape[1], 24, 16)
        maps[:, :, 12, 8] = 1
        return PoseFeatures(maps, tuple(self._towards(stride) for stride in (16, 8, 4)))

    def _towards(self, stride: int) -> Tensor:
        """Return the offset from each cell to the nearest joint, x and y."""
        height, width = CROP[0] // stride, CROP[1] // stride
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        cells = stride * torch.stack((x, y), dim=-1)  # (h, w, 2)
        offsets = self.truth[:, :, None, None] - cells  # (B, K, h, w, 2)
        nearest = offsets.norm(dim=-1).argmin(dim=1)[:, None, :, :, None].expand(-1, -1, -1, -1, 2)
        return offsets.gather(1, nearest)[:, 0].permute(0, 3, 1, 2) / 20


def poses(count: int) -> Tensor:
    """Return bodies at random places in the crop, their joints far from one another."""
    body = torch.tensor([[32.0, 12.0], [14.0, 42.0], [50.0, 42.0], [16.0, 80.0], [48.0, 80.0]])
    return body + 4 * torch.rand(count, 1, 2) + 4 * torch.rand(count, 5, 2)


def batch_of(truth: Tensor, visibility: Tensor | None = None) -> Batch:
    count = len(truth)
    return Batch(
        crops=torch.zeros(count, 3, *CROP),
        keypoints_crop=truth,
        visibility=torch.full((count, 5), 2) if visibility is None else visibility,
        areas_crop=torch.full((count,), AREA),
        neighbor_crop=truth,
        neighbor_visibility=torch.zeros(count, 5),
        teacher_modes=None,
        teacher_mask=None,
        teacher_relation=None,
    )


def task_of(five: Skeleton, start: str) -> RefineTask:
    settings = RefineConfig(
        epochs=1,
        batch_size=64,
        optimizer=OptimizerConfig(3e-3, 1e-4, warmup_fraction=0.05, pretrained_factor=0.1),
        student="frozen",
        student_factor=0.1,
        start=start,
        jitter=JITTER,
        candidates=1,
        levels=1,
        depth=1,
        width=32,
        dropout=0.0,
        gate=True,
        loss="smooth_l1",
        progressive="final",
        teacher_weight=1.0,
        truth_weight=1.0,
        perturb=False,
        augment=AugmentConfig(0, 0, 0, 0, 0, 0, 0),
    )
    torch.manual_seed(0)
    refiner = IgpGcn(five, Seer.pyramid_channels, levels=1, depth=1, width=32)
    return RefineTask(Seer(), CODEC, refiner, five, settings)


def mean_errors(task: RefineTask, kind: str) -> tuple[float, float]:
    """Return mean distances to the truth before and after, px, of 300 other people."""
    torch.manual_seed(99)
    truth = poses(300)
    task.student.truth = truth  # type: ignore[assignment]
    if kind == "jittered":
        start = truth + JITTER * AREA**0.5 * torch.randn(truth.shape)
    else:  # every fifth joint is 15 px off in any direction
        angle = torch.rand(300, 5, 1) * 6.2832
        there = torch.cat((angle.cos(), angle.sin()), dim=-1) * 15
        start = truth + torch.where(torch.rand(300, 5, 1) < 0.2, there, 0.0)
    with torch.inference_mode():
        found, _ = task.estimator().eval()(torch.zeros(300, 3, *CROP), (start, torch.ones(300, 5)))
    return tuple((pose - truth).norm(dim=-1).mean().item() for pose in (start, found))  # type: ignore[return-value]


def test_refiner_trained_on_jitter_improves_jittered_and_displaced_poses(
    five: Skeleton,
) -> None:
    task = task_of(five, "jitter")
    optimizer = torch.optim.AdamW(task.refiner.parameters(), lr=2e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-2, 50)
    task.train()
    for _ in range(50):
        truth = poses(32)
        task.student.truth = truth  # type: ignore[assignment]
        term = task(batch_of(truth))["truth"]
        optimizer.zero_grad()
        (term.sum / term.count).backward()
        optimizer.step()
        schedule.step()
    for kind in ("jittered", "displaced"):
        before, after = mean_errors(task, kind)
        assert after < 0.7 * before, (kind, before, after)


def test_jitter_has_its_spread_and_unlabeled_joints_have_score_zero() -> None:
    torch.manual_seed(0)
    truth, visibility = torch.rand(4000, 5, 2), torch.full((4000, 5), 2)
    visibility[:, 3] = 0
    areas = torch.tensor([400.0, 10000.0]).repeat(2000)
    pose, scores = jittered(truth, visibility, areas, 0.1)
    offsets = [(pose - truth)[place::2] for place in (0, 1)]
    # the mean square of the k-th power of a uniform share is 1 / (2k + 1), over k from 2 to 12
    expected = (math.log(25 / 5) / 20) ** 0.5
    spreads = [offset.std().item() for offset in offsets]
    assert spreads == pytest.approx([2.0 * expected, 10.0 * expected], rel=0.06)
    is_far = offsets[1].norm(dim=-1) > 1
    assert 0.25 < is_far.float().mean() < 0.5  # Gaussians of the whole spread alike: 0.995
    numbers = is_far.sum(dim=1).float()  # of five joints; were all people alike, a binomial
    share = is_far.float().mean()
    assert numbers.var() > 1.2 * 5 * share * (1 - share)
    assert torch.equal(scores, (visibility > 0).float())


class Kept(nn.Module):
    """Refiner that records its input and returns the start."""

    num_candidates, chooser, flip_order, mirror_pairs = 1, None, None, None
    choose, refine = IgpGcn.choose, IgpGcn.refine
    start: Tensor
    scores: Tensor

    def forward(self, _: Any, start: Tensor, scores: Tensor, __: Any) -> list[Tensor]:
        self.start, self.scores = start, scores
        return [start]


def start_of(five: Skeleton, start: str, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the pose that the refiner starts from, and its scores."""
    task = task_of(five, start)
    kept = Kept()
    task.refiner = kept  # type: ignore[assignment]
    task.student.truth = batch.keypoints_crop  # type: ignore[assignment]
    task(batch)
    return kept.start, kept.scores


def test_unlabeled_joints_and_those_without_prediction_start_from_the_student(
    five: Skeleton,
) -> None:
    truth, visibility = poses(3), torch.full((3, 5), 2)
    visibility[0, 1] = visibility[2, 4] = 0
    batch = batch_of(truth, visibility)
    start, scores = start_of(five, "jitter", batch)
    middle = torch.tensor([32.0, 48.0])
    is_own = (start - middle).norm(dim=-1) < 2  # the peak is on a cell
    assert torch.equal(is_own, visibility == 0) and (scores[visibility == 0] == 1).all()
    given = torch.cat((truth + 5, torch.full((3, 5, 1), 0.5)), dim=-1)
    given[1, :, 2] = 0
    start, scores = start_of(five, "poses.json", Batch(**{**vars(batch), "start_crop": given}))
    assert torch.equal(start[[0, 2]], truth[[0, 2]] + 5)
    assert (scores[[0, 2]] == LOWEST_GIVEN).all()  # far from where the student sees joints
    assert ((start[1] - middle).norm(dim=-1) < 2).all() and (scores[1] == 1).all()


def entries_of(store: CropStore, rows: list[int], skeleton: Skeleton) -> list[dict[str, Any]]:
    """Return poses by annotation id: the truth, 2 px to the right in the stored crop."""
    moved = store.keypoints_stored[rows] + np.array([2.0, 0.0])
    image = apply_affine(moved, invert_affine(store.image_to_stored[rows]))
    keypoints = np.concatenate((image, np.full((*image.shape[:2], 1), 0.6)), axis=-1)
    return [
        {
            "image_id": int(store.image_ids[row]),
            "category_id": 1,
            "score": 0.5,
            "annotation_id": int(store.annotation_ids[row]),
            "keypoints": pose.ravel().tolist(),
        }
        for row, pose in zip(rows, keypoints, strict=True)
    ]


def test_poses_of_a_file_are_in_stored_crops_and_unlisted_people_have_none(
    five_store: CropStore, five: Skeleton, tmp_path: Path
) -> None:
    file = tmp_path / "poses.json"
    file.write_text(json.dumps(entries_of(five_store, [4, 1], five)))
    starts = given_starts(file, five_store, five)
    assert starts.shape == (13, 5, 3) and starts.dtype == np.float32
    expected = five_store.keypoints_stored[[1, 4]] + np.array([2.0, 0.0])
    np.testing.assert_allclose(starts[[1, 4], :, :2], expected, atol=1e-3)
    np.testing.assert_allclose(starts[[1, 4], :, 2], 0.6)
    assert (np.delete(starts, [1, 4], axis=0)[..., 2] == 0).all()
    assert check_start(file, five_store, five) == (2, 11)


def test_file_is_matched_once_until_it_changes(
    five_store: CropStore, five: Skeleton, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, own = tmp_path / "poses.json", dataclasses.replace(five_store, path=tmp_path / "crops")
    matched = []

    def match(path: Path, store: CropStore, skeleton: Skeleton) -> np.ndarray:
        matched.append(path)
        return given_starts(path, store, skeleton)

    monkeypatch.setattr(predictions, "given_starts", match)
    for rows, number in (([4, 1], 1), ([4, 1], 1), ([7], 2), ([4, 1], 2)):
        file.write_text(json.dumps(entries_of(five_store, rows, five)))
        starts = stored_starts(file, own, five)
        assert np.array_equal(starts, given_starts(file, five_store, five))
        assert len(matched) == number


def test_file_of_another_skeleton_is_refused(
    five_store: CropStore, five: Skeleton, tmp_path: Path
) -> None:
    file = tmp_path / "poses.json"
    (entry,) = entries_of(five_store, [0], five)
    file.write_text(json.dumps([{**entry, "keypoints": [1.0, 2.0, 0.5] * COCO.num_joints}]))
    message = r"refine\.start must hold poses of joints that the data have, got .* 17 joints"
    with pytest.raises(InputError, match=message):
        check_start(file, five_store, five)  # COCO has no joint of five's


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", r"list of COCO keypoint results.*got \{\} in .*change refine\.start"),
        ("nonsense", r"refine\.start must be a JSON"),
        (
            '[{"image_id": 1, "score": 1, "keypoints": [1]}]',
            r"entry 0 \(from 0\): keypoints must be 15",
        ),
    ],
)
def test_broken_file_is_refused_with_the_settings_name(
    content: str, message: str, five_store: CropStore, five: Skeleton, tmp_path: Path
) -> None:
    file = tmp_path / "poses.json"
    file.write_text(content)
    with pytest.raises(InputError, match=message):
        check_start(file, five_store, five)


def test_impossible_starts_are_refused() -> None:
    flat = flatten(to_plain(compose()))
    assert flat["refine.start"] == "student"
    for start in ("jitter", "folder/poses.json"):
        for count in (1, 3):
            values = {**flat, "refine.start": start, "refine.candidates": count}
            assert checks.faults(values) == []
    (fault,) = checks.faults({**flat, "refine.start": "noise"})
    assert fault.startswith("refine.start must be student, jitter or the path of a .json")


def test_path_of_a_file_is_made_absolute() -> None:
    for start in ("student", "jitter"):
        assert with_absolute_paths(compose([f"refine.start={start}"])).refine.start == start
    found = with_absolute_paths(compose(["refine.start=poses.json"])).refine.start
    assert found == str(Path.cwd() / "poses.json")
