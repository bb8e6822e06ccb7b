"""Training of the swap resolver, before the first epoch of stage 2.

It starts from poses of another method, or of jitter, and learns which joints carry the label of
the wrong side. The student sees each training person's plain crop once; its heatmaps' evidence
for each pose is kept, a few numbers per person, so that training takes seconds. Every correct pose
yields all its swapped variants as negatives. Afterwards the resolver is frozen: a resumed trial
loads it with its first checkpoint, or repeats this training with the same result.
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
"""Training people used; more of them change nothing."""


def train_swap_resolver(
    task: RefineTask, data: TrainingData, starts: Starts | None, seed: int
) -> None:
    """Train the refiner's swap resolver, with the same result on every worker.

    Args:
        starts: poses of the file that ``refine.start`` names; None for jitter.
    """
    resolver = task.refiner.mirror_pairs
    assert resolver is not None
    torch.manual_seed(seed_of(seed, data.workers.rank))
    examples = collect_examples(task, resolver, data, starts)
    resolver.requires_grad_()
    fit_swap_resolver(resolver, examples, data.skeleton.oks_sigmas, seed)
    resolver.requires_grad_(False)


class Examples(NamedTuple):
    """N people and D poses of each, in pixels of plain crops."""

    poses: Tensor
    """(N, D, K, 2)."""
    is_given: Tensor
    """(N, D, K)."""
    evidence: Tensor
    """Evidence of the student's heatmaps for each pose's pairs, (N, D, P)."""
    truth: Tensor
    """(N, K, 2)."""
    weights: Tensor
    """1 for labeled joints, else 0, (N, K)."""
    areas: Tensor
    """(N,)."""


def collect_examples(
    task: RefineTask, resolver: SwapResolver, data: TrainingData, starts: Starts | None
) -> Examples:
    """Collect poses of the first training people: EPOCHS draws of jitter, or a file's one pose."""
    store, workers = data.train, data.workers
    count = min(len(store), MAX_PEOPLE)
    estimator, crop_size = task.estimator(), task.codec.input_size
    parts: list[tuple[Tensor, ...]] = []
    with torch.no_grad():
        for rows, batch in evaluation_batches(
            store,
            data.skeleton,
            task.codec.frame,
            count,
            BATCH_SIZE,
            workers,
            starts.train if starts else None,
        ):
            maps = estimator.predict(batch.crops).heatmaps
            draws = (task.given(batch) for _ in range(1 if starts else EPOCHS))
            given = [draw for draw in draws if draw is not None]
            poses, scores = (torch.stack(values, dim=1) for values in zip(*given, strict=True))
            evidence = [
                resolver.heatmap_evidence(maps, pose, crop_size) for pose in poses.unbind(1)
            ]
            example = Examples(
                poses=poses,
                is_given=scores > 0,
                evidence=torch.stack(evidence, dim=1),
                truth=batch.keypoints_crop,
                weights=(batch.visibility > 0).to(poses),
                areas=batch.areas_crop,
            )
            parts.append((rows, *(values.cpu() for values in example)))
    gathered = [part for worker in workers.gather(parts) for part in worker]
    rows, *values = (torch.cat(tensors) for tensors in zip(*gathered, strict=True))
    order = rows.argsort()
    return Examples(*(value[order].to(workers.device) for value in values))


def fit_swap_resolver(
    resolver: SwapResolver, examples: Examples, sigmas: tuple[float, ...], seed: int
) -> None:
    """Train for EPOCHS by AdamW on the examples, in an order that follows from the seed."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(resolver.parameters(), lr=RATE, weight_decay=1e-4)
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
                resolver(poses, is_given, evidence),
                poses[:, resolver.orders],
                examples.truth[rows],
                examples.weights[rows],
                examples.areas[rows],
                sigmas,
            )
            for group in optimizer.param_groups:
                group["lr"] = RATE * rate_share(step, steps, WARMUP_FRACTION)
            optimizer.zero_grad(set_to_none=True)
            (term.sum / term.count.clamp_min(1)).backward()
            optimizer.step()
            step += 1
