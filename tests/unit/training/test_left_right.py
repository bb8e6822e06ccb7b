"""Swap resolver of stage 2: trained once, on poses without a swap, reproducibly."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.skeleton import Skeleton
from models.swap_resolver import SwapResolver
from study.cache.crop_store import open_crop_store
from study.cache.prepare import PreparedData
from study.config.compose import with_values
from study.config.derived import resolve
from study.config.schema import StudyConfig
from study.data.crops import apply_affine, invert_affine
from study.storage.checkpoint import Checkpoints
from study.training import left_right
from study.training.left_right import Examples, collect_examples, fit_swap_resolver
from study.training.losses import swap_loss
from study.training.networks import (
    build_distill_task,
    build_refine_task,
    build_refiner,
    load_estimator,
)
from study.training.training_data import TrainingData
from study.trial import Trial, run_trial
from study.workers import Workers

SIGMAS = (0.1, 0.1, 0.1)
AREA = torch.tensor([100.0])  # at sigma 0.1 a joint that is 2 sqrt(2) px off has an OKS of 1 / e
TRUTH = torch.tensor([[[0.0, 0.0], [50.0, 0.0], [50.0, 50.0]]])
WEIGHTS = torch.ones(1, 3)
BODY = torch.tensor([[32.0, 8.0], [12.0, 40.0], [52.0, 44.0], [16.0, 80.0], [48.0, 84.0]])
BOTH = [0, 2, 1, 4, 3]


def labelings(*moved_px: tuple[float, float, float]) -> Tensor:
    """Return a pose per labeling: the truth with each joint moved to the right, px."""
    offsets = torch.tensor(moved_px)
    return TRUTH[:, None] + torch.stack((offsets, torch.zeros_like(offsets)), dim=-1)


def test_swap_loss_is_the_cross_entropy_against_all_labelings_as_good_as_the_best() -> None:
    close = 2 * math.sqrt(-2 * math.log(1 - 0.09))  # its summed OKS is lower by 0.09
    poses = labelings((0, 0, 0), (close, 0, 0), (3 * close, 0, 0), (40, 0, 0))
    logits = torch.tensor([[1.0, 2.0, 0.5, -1.0]])
    loss, count = swap_loss(logits, poses, TRUTH, WEIGHTS, AREA, SIGMAS)
    chances = [math.exp(logit) for logit in (1.0, 2.0, 0.5, -1.0)]
    assert float(count) == 1
    assert float(loss) == pytest.approx(-math.log(sum(chances[:2]) / sum(chances)), rel=1e-5)


def test_swap_loss_counts_only_labeled_joints_and_possible_labelings() -> None:
    poses = labelings((9, 0, 0), (0, 9, 0), (9, 0, 0))
    logits = torch.tensor([[0.0, 0.0, -torch.inf]], requires_grad=True)
    loss, _ = swap_loss(logits, poses, TRUTH, torch.tensor([[1.0, 0.0, 1.0]]), AREA, SIGMAS)
    assert loss.item() == pytest.approx(math.log(2))
    loss.backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.tensor([[0.5, -0.5, 0.0]]))


def test_person_with_equally_good_labelings_adds_no_loss() -> None:
    poses = labelings((9, 0, 0), (0, 0, 9))
    for logits, weights in (
        (torch.tensor([[0.0, 3.0]]), torch.tensor([[0.0, 1.0, 0.0]])),
        (torch.tensor([[0.0, -torch.inf]]), WEIGHTS),
        (torch.tensor([[0.0, 3.0]]), torch.zeros(1, 3)),
    ):
        loss, count = swap_loss(logits, poses, TRUTH, weights, AREA, SIGMAS)
        assert float(loss) == 0 and float(count) == 0


def bodies(count: int, evidence: Tensor) -> Examples:
    """Return people who face the same way at random places, none of them swapped."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, 2, generator=generator)

    truth = BODY + 5 * noise(count, 1) + 2 * noise(count, 5)
    poses = truth[:, None] + noise(count, 3, 5)
    given = torch.ones(count, 3, 5, dtype=torch.bool)
    areas = torch.full((count,), 1600.0)
    return Examples(poses, given, evidence, truth, torch.ones(count, 5), areas)


def test_resolver_trained_on_unswapped_bodies_corrects_swapped_ones(five: Skeleton) -> None:
    torch.manual_seed(0)
    module = SwapResolver(five)
    no_evidence = torch.zeros(256, 3, 2)  # the maps have no evidence
    fit_swap_resolver(module, bodies(256, no_evidence), five.oks_sigmas, seed=0)
    truth = bodies(300, no_evidence).truth[256:]
    maps, given = torch.zeros(44, 5, 24, 16), torch.ones(44, 5, dtype=torch.bool)
    for order in (BOTH, [0, 2, 1, 3, 4]):
        corrected = module.resolve_swaps(maps, truth[:, order], given, (96, 64))
        is_correct = (corrected == truth).all(dim=2).all(dim=1)
        assert is_correct.float().mean() > 0.9
    assert torch.equal(module.resolve_swaps(maps, truth, given, (96, 64)), truth)


def test_people_missing_in_the_file_add_no_loss(
    five: Skeleton, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    module = SwapResolver(five)
    examples = bodies(64, torch.zeros(64, 3, 2))
    missing = torch.arange(64) % 2 == 0
    examples.is_given[missing] = False
    examples.poses[missing] = 0
    logits = module(examples.poses[:, 0], examples.is_given[:, 0], examples.evidence[:, 0])
    assert torch.equal(logits[missing].isfinite(), module.swaps.sum(dim=1).eq(0).expand(32, -1))
    labels = (examples.truth, examples.weights, examples.areas)
    poses = examples.poses[:, 0][:, module.orders]
    both = swap_loss(logits, poses, *labels, five.oks_sigmas)
    given = swap_loss(
        logits[~missing], poses[~missing], *(v[~missing] for v in labels), five.oks_sigmas
    )
    assert float(given.count) > 0
    torch.testing.assert_close(tuple(both), tuple(given))
    monkeypatch.setattr(left_right, "EPOCHS", 2)
    fit_swap_resolver(module, examples, five.oks_sigmas, seed=0)
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    assert module.head.weight.any()


def test_resolver_learns_to_trust_reliable_evidence(
    five: Skeleton, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(left_right, "EPOCHS", 12)
    torch.manual_seed(0)
    module = SwapResolver(five)
    evidence = torch.randn(256, 3, 2)
    evidence[..., 0] = 2.0  # right about hands always, about feet by chance
    fit_swap_resolver(module, bodies(256, evidence), five.oks_sigmas, seed=0)
    assert module.trust[0] > 1 > module.trust[1]


@pytest.fixture(scope="module")
def start_file(mini_data: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """File of another method's results: the truth of the people to train on."""
    store = open_crop_store(Path(mini_data.train))
    image = apply_affine(store.keypoints_stored, invert_affine(store.image_to_stored))
    entries = [
        {
            "image_id": int(store.image_ids[row]),
            "category_id": 1,
            "score": 0.5,
            "annotation_id": int(store.annotation_ids[row]),
            "keypoints": [value for x, y in pose.tolist() for value in (x, y, 0.5)],
        }
        for row, pose in enumerate(image)
    ]
    file = tmp_path_factory.mktemp("start") / "poses.json"
    file.write_text(json.dumps(entries))
    return file


class OneOfTwo(Workers):
    """One of two workers; ``others`` are the values of the other one."""

    def __init__(self, rank: int, others: list[Any]) -> None:
        super().__init__(torch.device("cpu"))
        self.rank, self.world, self.others = rank, 2, others

    def gather(self, value: Any) -> list[Any]:
        self.own_parts: list[Any] = [value]
        return [value, *self.others]


def test_two_workers_collect_what_one_does(
    mini_config: StudyConfig, mini_data: PreparedData, start_file: Path, workers: Workers
) -> None:
    config = with_values(mini_config, {"refine.start": str(start_file)})
    resolved = resolve(config)
    distilled = build_distill_task(config.student, config.distill, config.trial, resolved, seed=0)
    torch.nn.init.normal_(distilled.student.final_layer.weight, std=0.3)  # type: ignore[arg-type]
    refiner = build_refiner(config.refine, resolved.skeleton, distilled.student.pyramid_channels)
    task = build_refine_task(config.refine, distilled, refiner).eval()
    assert refiner.mirror_pairs is not None

    def collect(by: Workers) -> Examples:
        data = TrainingData.open(mini_data, resolved, by, None)
        assert refiner.mirror_pairs is not None
        return collect_examples(task, refiner.mirror_pairs, data, data.starts(config.refine.start))

    alone, second = collect(workers), OneOfTwo(1, [])
    collect(second)
    for ours, theirs in zip(collect(OneOfTwo(0, second.own_parts)), alone, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    store = open_crop_store(Path(mini_data.train))
    assert len(alone.truth) == len(store) and alone.poses.shape[1] == 1
    assert torch.equal(alone.weights > 0, torch.from_numpy(store.visibility > 0))
    seen = alone.is_given[:, 0] & (alone.weights > 0)
    away = (alone.poses[:, 0] - alone.truth).norm(dim=-1)
    assert seen.any() and away[seen].max() < 0.01  # the file is the truth


def resolver_weights(trial: Trial, epoch: int) -> dict[str, Tensor]:
    weights = Checkpoints(trial.folder).at(epoch).weights()
    return {name: value for name, value in weights.items() if "mirror_pairs" in name}


@pytest.mark.parametrize("kind", ["jitter", "file"])
def test_swap_resolver_is_trained_before_the_first_epoch_of_stage_2_and_kept(
    kind: str,
    mini_config: StudyConfig,
    mini_data: PreparedData,
    mini_targets: Path,
    start_file: Path,
    easy: str,
    tmp_path: Path,
    workers: Workers,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(left_right, "EPOCHS", 3)
    values = {"refine.start": "jitter" if kind == "jitter" else str(start_file)}
    config = with_values(mini_config, {"data.skeleton": easy, "distill.epochs": 1, **values})
    saved: list[dict[str, Tensor]] = []
    whole = Trial(1, config, resolve(config), mini_data, tmp_path / "whole", mini_targets)

    def report(row: dict[str, object]) -> bool:
        saved.append(resolver_weights(whole, int(str(row["epoch"]))))
        return False

    run_trial(whole, workers, report)
    assert not saved[0] and saved[1]
    assert all(torch.equal(saved[1][name], saved[2][name]) for name in saved[1])
    assert saved[1]["refiner.mirror_pairs.head.weight"].any()
    interrupted = dataclasses.replace(whole, folder=tmp_path / "interrupted")
    for stop in (1, 2, None):
        run_trial(interrupted, workers, lambda row, stop=stop: row["epoch"] == stop)
    ours, theirs = (Checkpoints(trial.folder).at(3).weights() for trial in (whole, interrupted))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_trial_that_starts_from_the_students_pose_has_no_swap_resolver(
    mini_config: StudyConfig,
    mini_data: PreparedData,
    mini_targets: Path,
    easy: str,
    tmp_path: Path,
    workers: Workers,
) -> None:
    config = with_values(mini_config, {"data.skeleton": easy, "distill.epochs": 1})
    resolved = resolve(config)
    trial = Trial(1, config, resolved, mini_data, tmp_path, mini_targets)
    run_trial(trial, workers, lambda row: False)
    kept = Checkpoints(trial.folder).require_last()
    assert not resolver_weights(trial, kept.epoch)
    estimator = load_estimator(
        kept, config.student, config.distill, config.refine, config.trial, resolved
    )
    assert estimator.refiner is not None and estimator.refiner.mirror_pairs is None
