"""The epoch loop of the teacher, stage 1 and stage 2, and the recorder of its epochs.

Everything random is drawn from the trial's seed, the stage and the epoch, so that an interrupted
run repeats the same epochs when it resumes.
"""

from __future__ import annotations

import dataclasses
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
"""Called with an epoch's row on every worker; the first worker's result says whether to stop."""
CHECK_EVERY = 50
"""Steps between two checks that the loss is finite."""


class Task(Protocol):
    """A module that the loop trains: ``DistillTask`` or ``RefineTask``."""

    name: str
    uncertainty: UncertaintyWeights | None
    """Learned weights of the terms, on top of ``weights``; None for fixed weights."""

    def weights(self, progress: float) -> dict[str, float]:
        """Return each term's factor in the loss; ``progress`` is the share of epochs done."""

    def parameter_groups(self, optimizer: OptimizerConfig) -> list[dict[str, object]]:
        """Return the parameters to train, with a rate for each group."""

    def trainable(self) -> Iterable[nn.Module]:
        """Return the modules to put in train mode."""

    def estimator(self) -> RefinedPose:
        """Return the pose estimator to evaluate."""


@dataclass(frozen=True)
class Stage:
    """The epochs, batches and evaluation of one stage."""

    name: str
    """``stage`` of its reports: teacher | distill | refine."""
    epochs: int
    steps_per_epoch: int
    optimizer: OptimizerConfig
    seed: int
    batches: Callable[[torch.Generator], Iterator[Batch]]
    """Yields this worker's batches of one epoch."""
    evaluate: Callable[[RefinedPose], dict[str, float]]
    """Returns AP and its variants on held-out people, the same on every worker."""
    diagnose: bool = False
    """Whether reports hold each term's share of the gradient."""
    first_epoch: int = 0
    """Epochs of the trial before this stage; reports count from there."""
    first_step: int = 0
    """Optimizer steps of the trial before this stage; reports count from there."""

    def after(self, *, epochs: int, steps: int) -> Stage:
        """Return the same stage, following an earlier one of this length."""
        return dataclasses.replace(self, first_epoch=epochs, first_step=steps)


@dataclass(frozen=True)
class Progress:
    """The point from which a stage resumes."""

    epoch: int
    """Finished epochs of this stage."""
    seconds: float
    """Training time of the trial so far."""
    optimizer: Mapping[str, Any] | None
    """State of the optimizer; None before the first epoch."""


FinishEpoch = Callable[[Row, nn.Module, torch.optim.Optimizer], bool]
"""Saves and reports an epoch; returns whether to stop."""


def run_stage(
    task: nn.Module, stage: Stage, progress: Progress, workers: Workers, finish: FinishEpoch
) -> bool:
    """Train until the stage is finished or ``finish`` returns True.

    Returns:
        Whether ``finish`` stopped the stage.

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
    """Return the loss to differentiate, and each term's mean over the people of all workers.

    A term's sum is divided by the count over all workers. The factor ``world`` cancels the mean
    over workers that DDP takes, so that the gradient equals that of one worker on the whole batch.
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
    """Return each term's mean over these batches and all workers, without gradient."""
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
    """Return each term's present factor in the loss, learned weights included."""
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
    """Return the share of the full rate at a step: a linear warm-up, then a cosine decay.

    Args:
        step: counted from 0.
        total: steps of the whole stage.
    """
    warmup = warmup_fraction * total
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


class Recorder:
    """Saves each epoch, then reports it; in this order, a killed process loses neither."""

    def __init__(self, checkpoints: Checkpoints, workers: Workers, report: Report) -> None:
        self.checkpoints = checkpoints
        self.workers = workers
        self.report = report
        last = checkpoints.last()
        self.rows: list[Row] = list(last.rows) if last else []

    def has_reached(self, stage: str) -> bool:
        """Return whether an epoch of this stage is finished."""
        return any(row["stage"] == stage for row in self.rows)

    def replay(self) -> bool:
        """Report all epochs of the last checkpoint again; return whether to stop."""
        stops = [self.report(row) for row in self.rows]
        return bool(self.workers.from_first(any(stops)))

    def finish_epoch(self, row: Row, task: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
        """Save and report an epoch; return whether to stop, the same on every worker."""
        self.rows.append(row)
        if self.workers.rank == 0:
            self.checkpoints.save(task.state_dict(), optimizer.state_dict(), self.rows)
            failpoints.point("saved")
        return bool(self.workers.from_first(self.report(row)))

    def resume(self, stage: Stage, task: nn.Module) -> Progress:
        """Load the task's last checkpoint of this stage; return the point to resume from."""
        seconds = float(self.rows[-1]["seconds"]) if self.rows else 0.0
        last = self.checkpoints.last()
        if last is None or last.stage != stage.name:
            return Progress(epoch=0, seconds=seconds, optimizer=None)
        task.load_state_dict(last.weights())
        return Progress(last.epoch - stage.first_epoch, seconds, last.optimizer())
