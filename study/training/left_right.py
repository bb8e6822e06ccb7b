"""How the names of left and right are learned, at the start of stage 2, before the refiner is.

The student, which may be finetuned later, looks once at plain crops, and what it sees under poses
with the errors of ``refine.start`` is kept. From this, a few numbers a person, ``SwapResolver``
learns quickly which way of naming the pairs is right: wrong ones there are enough of in every
pose, none needs to be made. In the epochs that follow it stays as it is, so that a trial that goes
on has it with its first checkpoint, and one that was broken off before learns it again, the same.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from models.swap_resolver import SwapResolver
from study.config.derived import seed_of
from study.training.batches import evaluation_batches
from study.training.loop import rate_share
from study.training.losses import swap_loss
from study.training.refine import RefineTask
from study.training.training_data import Starts, TrainingData

EPOCHS = 40
BATCH_SIZE = 64
RATE = 2e-3
WARMUP_FRACTION = 0.05
MAX_PEOPLE = 5_000
"""So many are enough; the student looks at no more."""


def train_swap_resolver(
    task: RefineTask, ground: TrainingData, starts: Starts | None, seed: int
) -> None:
    """The refiner's names of left and right are learned, the same on every worker.

    Args:
        starts: the poses of ``refine.start``'s file, None for jitter.
        seed: what is random follows it.
    """
    mirror_pairs = task.refiner.mirror_pairs
    assert mirror_pairs is not None
    torch.manual_seed(seed_of(seed, ground.workers.rank))
    examples = collect_examples(task, mirror_pairs, ground, starts)
    mirror_pairs.requires_grad_()
    fit_swap_resolver(mirror_pairs, examples, ground.skeleton.oks_sigmas, seed)
    mirror_pairs.requires_grad_(False)


class Examples(NamedTuple):
    """N people and D poses of each, in pixels of plain crops."""

    poses: Tensor
    """(N, D, K, 2)."""
    is_given: Tensor
    """(N, D, K)."""
    evidence: Tensor
    """What the student's maps say of each pose's pairs, (N, D, P)."""
    truth: Tensor
    """(N, K, 2)."""
    weights: Tensor
    """1 for labeled joints, (N, K)."""
    areas: Tensor
    """(N,)."""


def collect_examples(
    task: RefineTask, mirror_pairs: SwapResolver, ground: TrainingData, starts: Starts | None
) -> Examples:
    """Of the first people to train on, EPOCHS draws of jitter, or the one pose of a file."""
    store, workers = ground.train, ground.workers
    count = min(len(store), MAX_PEOPLE)
    estimator, crop_size = task.estimator(), task.codec.input_size
    parts: list[tuple[Tensor, ...]] = []
    with torch.no_grad():
        for rows, batch in evaluation_batches(
            *(store, ground.skeleton, task.codec.frame, count, BATCH_SIZE, workers),
            starts.train if starts else None,
        ):
            maps = estimator.predict(batch.crops).heatmaps
            draws = (task.given(batch) for _ in range(1 if starts else EPOCHS))
            given = [draw for draw in draws if draw is not None]
            poses, scores = (torch.stack(values, dim=1) for values in zip(*given, strict=True))
            evidence = [
                mirror_pairs.heatmap_evidence(maps, pose, crop_size) for pose in poses.unbind(1)
            ]
            labels = (batch.keypoints_crop, (batch.visibility > 0).to(poses), batch.areas_crop)
            seen = (poses, scores > 0, torch.stack(evidence, dim=1), *labels)
            parts.append((rows, *(values.cpu() for values in seen)))
    gathered = [part for worker in workers.gather(parts) for part in worker]
    rows, *values = (torch.cat(tensors) for tensors in zip(*gathered, strict=True))
    order = rows.argsort()
    return Examples(*(value[order].to(workers.device) for value in values))


def fit_swap_resolver(
    mirror_pairs: SwapResolver, examples: Examples, sigmas: tuple[float, ...], seed: int
) -> None:
    """EPOCHS of AdamW over the examples, in an order that follows the seed."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(mirror_pairs.parameters(), lr=RATE, weight_decay=1e-4)
    count, draws = examples.poses.shape[:2]
    steps = EPOCHS * -(-count // BATCH_SIZE)
    step = 0
    for epoch in range(EPOCHS):
        for rows in torch.randperm(count, generator=generator).split(BATCH_SIZE):
            rows = rows.to(examples.poses.device)
            poses, is_given, evidence = (
                values[rows, epoch % draws]
                for values in (examples.poses, examples.is_given, examples.evidence)
            )
            term = swap_loss(
                mirror_pairs(poses, is_given, evidence),
                poses[:, mirror_pairs.orders],
                *(examples.truth[rows], examples.weights[rows], examples.areas[rows]),
                sigmas,
            )
            for group in optimizer.param_groups:
                group["lr"] = RATE * rate_share(step, steps, WARMUP_FRACTION)
            optimizer.zero_grad(set_to_none=True)
            (term.sum / term.count.clamp_min(1)).backward()
            optimizer.step()
            step += 1
