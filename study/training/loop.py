"""The one epoch loop, of teacher, stage 1 and stage 2 alike, and the recorder of its epochs.

Everything random is drawn from the trial's seed, the stage and the epoch, so that an epoch comes
out the same whether the run was broken off before it or not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from models.refined_pose import RefinedPose
from study.config.derived import seed_of
from study.config.schema import OptimizerConfig
from study.errors import TrainingDiverged
from study.storage import failpoints
from study.storage.checkpoint import Checkpoints, Row
from study.training.batches import Batch
from study.training.loss_weights import DIAGNOSED_STEPS, GradientDiagnosis, UncertaintyWeights
from study.training.losses import Term
from study.workers import Workers

Report = Callable[[Row], bool]
"""Takes an epoch's row, on every worker; the first worker's answer is whether to stop."""
CHECK_EVERY = 50
"""Steps between two looks at whether the loss is still a number."""


class Task(Protocol):
    """What the loop trains: ``DistillTask`` and ``RefineTask`` are such."""

    name: str
    uncertainty: UncertaintyWeights | None
    """What weighs the terms beyond ``weights``; None where nothing does."""

    def weights(self, progress: float) -> dict[str, float]: ...

    def parameter_groups(self, optimizer: OptimizerConfig) -> list[dict[str, object]]: ...

    def trainable(self) -> Iterable[nn.Module]: ...

    def estimator(self) -> RefinedPose: ...


@dataclass(frozen=True)
class Stage:
    """How long and on what a task is trained."""

    name: str
    """teacher | distill | refine, as it stands in the reports."""
    epochs: int
    steps_per_epoch: int
    optimizer: OptimizerConfig
    seed: int
    first_epoch: int
    """Epochs of the trial before this stage: reports count on from there."""
    first_step: int
    """Optimizer steps of the trial before this stage, likewise."""
    batches: Callable[[torch.Generator], Iterator[Batch]]
    """This worker's batches of one epoch."""
    evaluate: Callable[[RefinedPose], dict[str, float]]
    """AP and the like on held-out people, the same on every worker."""
    diagnose: bool = False
    """Whether the reports tell each term's part in the gradient."""


@dataclass(frozen=True)
class Progress:
    """How far a stage has come."""

    epoch: int
    """Epochs of this stage that are over."""
    seconds: float
    """Training time of the trial so far."""
    optimizer: Mapping[str, Any] | None
    """The optimizer's state then; None before the first epoch."""


FinishEpoch = Callable[[Row, nn.Module, torch.optim.Optimizer], bool]
"""Saves and reports an epoch; returns whether to stop."""


def run_stage(
    task: nn.Module, stage: Stage, progress: Progress, workers: Workers, finish: FinishEpoch
) -> bool:
    """Trains until the stage is over or ``finish`` says stop; returns whether it said so.

    Raises:
        TrainingDiverged: the loss is not finite.
    """
    role: Task = task  # type: ignore[assignment]  # a module that is a Task
    optimizer = _build_optimizer(role, stage.optimizer)
    if progress.optimizer is not None:
        optimizer.load_state_dict(dict(progress.optimizer))
    wrapped = workers.wrap(task)
    started = time.monotonic() - progress.seconds
    for epoch in range(progress.epoch + 1, stage.epochs + 1):
        seed = seed_of(stage.seed, stage.name, epoch)
        torch.manual_seed(seed_of(seed, workers.rank))
        for module in role.trainable():
            module.train()
        row = _train_epoch(wrapped, role, optimizer, stage, epoch, seed, workers)
        for module in role.trainable():
            module.eval()
        workers.share_buffers(task)
        scores = stage.evaluate(role.estimator())
        row |= {f"val_{name}": value for name, value in scores.items()}
        row["seconds"] = time.monotonic() - started
        if finish(row, task, optimizer):
            return True
    return False


def combine(
    terms: Mapping[str, Term],
    weights: Mapping[str, float],
    workers: Workers,
    uncertainty: UncertaintyWeights | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss to take the gradient of, and each term's mean over all workers' people.

    A term's sum is divided by the count over all workers; the factor ``world`` undoes the mean
    over workers that follows, so that the gradient is one worker's on the whole batch.
    """
    names = list(terms)
    sums = torch.stack([terms[name].sum for name in names])
    counts = torch.stack([terms[name].count for name in names])
    both = workers.total(torch.stack([sums.detach(), counts.to(sums)]))
    counts = both[1].clamp(min=1e-6)
    factors = torch.tensor([weights[name] for name in names], device=sums.device)
    if uncertainty is None:
        loss = (factors * sums / counts).sum() * workers.world
    else:
        shares = dict(zip(names, sums / counts * workers.world, strict=True))
        loss = (factors * uncertainty(shares)).sum()
    return loss, dict(zip(names, both[0] / counts, strict=True))


def mean_terms(task: nn.Module, batches: Iterable[Batch], workers: Workers) -> dict[str, float]:
    """Each term's mean over these batches and all workers, without gradient."""
    totals: dict[str, Tensor] = {}
    number = 0
    with torch.no_grad():
        for batch in batches:
            terms = task(batch)
            _, means = combine(terms, dict.fromkeys(terms, 1.0), workers)
            for name, mean in means.items():
                totals[name] = totals.get(name, torch.zeros_like(mean)) + mean
            number += 1
    return {name: float(total) / max(number, 1) for name, total in totals.items()}


def _train_epoch(
    wrapped: nn.Module,
    task: Task,
    optimizer: torch.optim.Optimizer,
    stage: Stage,
    epoch: int,
    seed: int,
    workers: Workers,
) -> Row:
    started = time.monotonic()
    weights = task.weights((epoch - 1) / max(stage.epochs - 1, 1))
    diagnosis = GradientDiagnosis(_trained_parameters(task), workers)
    totals = torch.zeros(len(weights), device=workers.device)
    people = step = 0
    for batch in stage.batches(torch.Generator().manual_seed(seed)):
        _set_rate(optimizer, stage, (epoch - 1) * stage.steps_per_epoch + step)
        terms = wrapped(batch)
        if stage.diagnose and step < DIAGNOSED_STEPS:
            alone = {name: combine({name: terms[name]}, {name: 1.0}, workers)[0] for name in terms}
            diagnosis.add(alone, _factors(task, weights))
        loss, means = combine(terms, weights, workers, task.uncertainty)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        totals += torch.stack([means[name] for name in weights])
        people += len(batch.crops)
        step += 1
        if step % CHECK_EVERY == 0 or step == stage.steps_per_epoch:
            _check_finite(totals, stage, epoch, step)
    averages = totals / max(step, 1)
    weights = _factors(task, weights)
    factors = torch.tensor(list(weights.values()), device=workers.device)
    elapsed = time.monotonic() - started
    return {
        "stage": stage.name,
        "epoch": stage.first_epoch + epoch,
        "step": stage.first_step + epoch * stage.steps_per_epoch,
        "images_per_s": people * workers.world / elapsed,
        "lr": max(group["lr"] for group in optimizer.param_groups),
        "loss": float((averages * factors).sum()),
        **{f"loss.{name}": float(v) for name, v in zip(weights, averages, strict=True)},
        **{f"weight.{name}": factor for name, factor in weights.items()},
        **diagnosis.row(),
    }


def _factors(task: Task, weights: dict[str, float]) -> dict[str, float]:
    """What each term's mean is multiplied by in the loss at present."""
    if task.uncertainty is None:
        return weights
    learned = task.uncertainty.factors()
    return {name: weight * learned[name] for name, weight in weights.items()}


def _trained_parameters(task: Task) -> Iterator[nn.Parameter]:
    return (parameter for module in task.trainable() for parameter in module.parameters())


def _check_finite(totals: Tensor, stage: Stage, epoch: int, step: int) -> None:
    if not bool(totals.isfinite().all()):
        raise TrainingDiverged(
            f"the loss must be finite, got {totals.tolist()} by step {step} of epoch {epoch} of "
            f"stage {stage.name}; lower {stage.name}.optimizer.lr={stage.optimizer.lr:g}"
        )


def _build_optimizer(task: Task, settings: OptimizerConfig) -> torch.optim.Optimizer:
    groups = task.parameter_groups(settings)
    for group in groups:
        group["base_lr"] = group["lr"]
    return torch.optim.AdamW(groups, weight_decay=settings.weight_decay, fused=True)


def _set_rate(optimizer: torch.optim.Optimizer, stage: Stage, step: int) -> None:
    share = rate_share(step, stage.epochs * stage.steps_per_epoch, stage.optimizer.warmup_fraction)
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * share


def rate_share(step: int, total: int, warmup_fraction: float) -> float:
    """The share of the full rate at a step (from 0) of ``total``: a line up, a cosine down."""
    warmup = warmup_fraction * total
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


class Recorder:
    """Keeps each epoch on disk, then reports it: in this order a kill loses neither."""

    def __init__(self, checkpoints: Checkpoints, workers: Workers, report: Report) -> None:
        self.checkpoints = checkpoints
        self.workers = workers
        self.report = report
        last = checkpoints.last()
        self.rows: list[Row] = list(last.rows) if last else []

    def replay(self) -> bool:
        """Reports again what the last checkpoint tells; returns whether to stop."""
        stops = [self.report(row) for row in self.rows]
        return bool(self.workers.from_first(any(stops)))

    def finish(self, row: Row, task: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
        """Saves and reports an epoch; returns whether to stop, the same on every worker."""
        self.rows.append(row)
        if self.workers.rank == 0:
            self.checkpoints.save(task.state_dict(), optimizer.state_dict(), self.rows)
            failpoints.point("saved")
        return bool(self.workers.from_first(self.report(row)))

    def resume(self, stage: Stage, task: nn.Module) -> Progress:
        """The task as its last checkpoint in this stage left it, and how far it had come."""
        seconds = float(self.rows[-1]["seconds"]) if self.rows else 0.0
        last = self.checkpoints.last()
        if last is None or last.stage != stage.name:
            return Progress(epoch=0, seconds=seconds, optimizer=None)
        task.load_state_dict(last.weights())
        return Progress(last.epoch - stage.first_epoch, seconds, last.optimizer())
