"""The epoch loop on a task of one number: rates, rows, stopping, resuming, and NaN."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from study.config.derived import seed_of
from study.config.schema import OptimizerConfig
from study.errors import TrainingDiverged
from study.storage.checkpoint import Row
from study.training.loop import Progress, Stage, combine, mean_terms, rate_share, run_stage
from study.training.losses import Term
from study.workers import Workers

START = Progress(epoch=0, seconds=0.0, optimizer=None)


class Line(nn.Module):
    """Task that learns the mean of each batch; ``old`` and ``new`` have different rates."""

    name = "line"
    uncertainty = None

    def __init__(self) -> None:
        super().__init__()
        self.new = nn.Parameter(torch.tensor(4.0))
        self.old = nn.Parameter(torch.tensor(3.0))
        self.dropout = nn.Dropout(0.5)
        self.seen: list[float] = []
        self.progress: list[float] = []
        self.modes: list[bool] = []

    def forward(self, batch: Any) -> dict[str, Term]:
        self.seen.append(float(batch.crops.sum()))
        self.modes.append(self.dropout.training)
        noise = self.dropout(torch.ones(3)).sum()
        error = (self.new + self.old - batch.crops + 0.01 * noise).square()
        count = torch.tensor(float(len(error)))
        return {"truth": Term(error.sum(), count), "other": Term(error.abs().sum(), 2 * count)}

    def weights(self, progress: float) -> dict[str, float]:
        self.progress.append(progress)
        return {"truth": 1.0, "other": 0.5}

    def parameter_groups(self, optimizer: OptimizerConfig) -> list[dict[str, object]]:
        groups: list[dict[str, object]] = [{"params": [self.new], "lr": optimizer.lr}]
        return [*groups, {"params": [self.old], "lr": 0.1 * optimizer.lr}]

    def trainable(self) -> Iterable[nn.Module]:
        return [self.dropout]

    def estimator(self) -> Any:
        assert not self.dropout.training
        return self


def stage_of(epochs: int, *, bad_step: int | None = None, lr: float = 0.05) -> Stage:
    """Return a stage of three batches of four numbers; those of ``bad_step`` are NaN."""

    def batches(generator: torch.Generator) -> Iterator[Any]:
        for step in range(3):
            crops = torch.rand(4, generator=generator)
            yield SimpleNamespace(crops=crops * math.nan if step == bad_step else crops)

    def evaluate(estimator: Any) -> dict[str, float]:
        return {"ap": estimator.new.item()}

    return Stage(
        name="distill",
        epochs=epochs,
        steps_per_epoch=3,
        optimizer=OptimizerConfig(lr, 0.0, warmup_fraction=0.2, pretrained_factor=0.1),
        seed=7,
        batches=batches,
        evaluate=evaluate,
    ).after(epochs=10, steps=0)


class Recorder:
    """Records the rows and states that ``finish`` receives; stops after ``stop_at`` epochs."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.rows: list[Row] = []
        self.states: list[tuple[dict[str, Tensor], dict[str, Any]]] = []
        self.rates: list[list[float]] = []
        self.stop_at = stop_at

    def __call__(self, row: Row, task: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
        self.rows.append(row)
        weights = {name: value.clone() for name, value in task.state_dict().items()}
        self.states.append((weights, copy.deepcopy(optimizer.state_dict())))
        self.rates.append([group["lr"] for group in optimizer.param_groups])
        return len(self.rows) == self.stop_at


class Share(Workers):
    """One of several workers; ``totals`` are the sums over all of them."""

    def __init__(self, world: int, totals: Tensor) -> None:
        super().__init__(torch.device("cpu"))
        self.world, self.totals = world, totals

    def total(self, values: Tensor) -> Tensor:
        return self.totals


def test_rate_rises_on_a_line_and_falls_on_a_cosine() -> None:
    shares = [rate_share(step, 10, 0.2) for step in range(10)]
    assert shares[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert shares[6] == pytest.approx(0.5)  # half of the eight steps after the warm-up
    assert shares[9] == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))
    assert shares[2:] == sorted(shares[2:], reverse=True) and min(shares) > 0


@pytest.mark.parametrize(
    ("step", "total", "warmup", "share"),
    [(0, 4, 0.0, 1.0), (2, 4, 0.0, 0.5), (0, 1, 0.0, 1.0), (0, 1, 0.9, 1 / 1.9), (4, 4, 0.0, 0.0)],
)
def test_rate_by_hand(step: int, total: int, warmup: float, share: float) -> None:
    assert rate_share(step, total, warmup) == pytest.approx(share, abs=1e-12)


def test_every_group_follows_the_schedule_from_its_own_rate(workers: Workers) -> None:
    recorder = Recorder()
    run_stage(Line(), stage_of(4), START, workers, recorder)
    shares = [rate_share(3 * epoch - 1, 12, 0.2) for epoch in range(1, 5)]
    assert recorder.rates == [pytest.approx([0.05 * s, 0.005 * s]) for s in shares]
    assert [row["lr"] for row in recorder.rows] == pytest.approx([0.05 * s for s in shares])


def test_rows_contain_the_epoch_in_the_trial_and_the_mean_losses(workers: Workers) -> None:
    recorder, task = Recorder(), Line()
    assert not run_stage(task, stage_of(2), START, workers, recorder)
    assert [row["epoch"] for row in recorder.rows] == [11, 12]
    assert [row["step"] for row in recorder.rows] == [3, 6]
    for row in recorder.rows:
        assert row["stage"] == "distill" and row["images_per_s"] > 0
        assert row["loss.other"] == pytest.approx(row["loss.truth"] / 2)
        assert row["loss"] == pytest.approx(row["loss.truth"] + 0.5 * row["loss.other"])
        assert (row["weight.truth"], row["weight.other"]) == (1.0, 0.5)
        assert not [name for name in row if name.startswith("gradient")]
    assert recorder.rows[1]["val_ap"] == float(task.new.detach()) < recorder.rows[0]["val_ap"]
    assert recorder.rows[1]["loss"] < recorder.rows[0]["loss"]


def test_training_time_includes_earlier_epochs(workers: Workers) -> None:
    recorder = Recorder()
    run_stage(Line(), stage_of(1), dataclasses.replace(START, seconds=500.0), workers, recorder)
    assert 500 < recorder.rows[0]["seconds"] < 510


@pytest.mark.parametrize(("epochs", "expected"), [(1, [0.0]), (3, [0.0, 0.5, 1.0])])
def test_the_schedule_of_weights_goes_from_0_to_1(
    epochs: int, expected: list[float], workers: Workers
) -> None:
    task = Line()
    run_stage(task, stage_of(epochs), START, workers, Recorder())
    assert task.progress == pytest.approx(expected)


def test_training_is_in_train_mode_and_scoring_in_eval_mode(workers: Workers) -> None:
    task = Line().eval()
    run_stage(task, stage_of(1), START, workers, Recorder())
    assert all(task.modes) and not task.dropout.training


def test_stop_ends_the_stage_at_once(workers: Workers) -> None:
    recorder = Recorder(stop_at=2)
    assert run_stage(Line(), stage_of(5), START, workers, recorder)
    assert len(recorder.rows) == 2


@pytest.mark.parametrize("epoch", [1, 3])
def test_resumed_stage_equals_an_undisturbed_one(epoch: int, workers: Workers) -> None:
    whole, rest = Recorder(), Recorder()
    run_stage(Line(), stage_of(4), START, workers, whole)
    weights, optimizer = whole.states[epoch - 1]
    task = Line()
    task.load_state_dict(weights)
    torch.manual_seed(99)  # whatever was drawn before must not matter
    run_stage(task, stage_of(4), Progress(epoch, 0.0, optimizer), workers, rest)
    for old, new in zip(whole.rows[epoch:], rest.rows, strict=True):
        times = {"seconds": 0, "images_per_s": 0}
        assert {**old, **times} == {**new, **times}
    assert torch.equal(task.new.detach(), whole.states[-1][0]["new"])


def test_finished_stage_trains_nothing(workers: Workers) -> None:
    recorder = Recorder()
    assert not run_stage(Line(), stage_of(3), Progress(3, 0.0, None), workers, recorder)
    assert not recorder.rows


def test_each_epoch_and_each_seed_draw_other_people(workers: Workers) -> None:
    task, again, other = Line(), Line(), Line()
    run_stage(task, stage_of(2), START, workers, Recorder())
    run_stage(again, stage_of(2), START, workers, Recorder())
    run_stage(other, dataclasses.replace(stage_of(2), seed=8), START, workers, Recorder())
    assert task.seen == again.seen
    assert len(set(task.seen + other.seen)) == 12


@pytest.mark.parametrize("bad_step", [0, 2])
def test_loss_that_is_not_finite_ends_the_stage_with_its_name_and_rate(
    bad_step: int, workers: Workers
) -> None:
    recorder = Recorder()
    with pytest.raises(TrainingDiverged) as error:
        run_stage(Line(), stage_of(3, bad_step=bad_step, lr=0.25), START, workers, recorder)
    message = str(error.value)
    assert "stage distill" in message and "distill.optimizer.lr=0.25" in message
    assert "epoch 1" in message and not recorder.rows


def test_two_halves_combine_to_the_whole() -> None:
    leaf = torch.tensor([3.0, 5.0], requires_grad=True)
    counts = torch.tensor([2.0, 4.0])
    weights = {"truth": 0.5, "other": 2.0}
    halves = [
        {"truth": Term(leaf[rank], counts[rank]), "other": Term(leaf[rank] ** 2, counts[rank] + 1)}
        for rank in range(2)
    ]
    totals = torch.tensor([[8.0, 34.0], [6.0, 8.0]])  # sums, then counts
    losses = [combine(half, weights, Share(2, totals)) for half in halves]
    together = (losses[0][0] + losses[1][0]) / 2  # as gradients are averaged over workers
    expected = 0.5 * leaf.sum() / 6 + 2.0 * leaf.square().sum() / 8
    torch.testing.assert_close(together, expected)
    gradient, expected_gradient = (
        torch.autograd.grad(value, leaf, retain_graph=True)[0] for value in (together, expected)
    )
    torch.testing.assert_close(gradient, expected_gradient)
    for _, means in losses:
        assert means == {"truth": pytest.approx(8 / 6), "other": pytest.approx(34 / 8)}


def test_term_without_people_adds_nothing(workers: Workers) -> None:
    leaf = torch.tensor(0.0, requires_grad=True)
    empty = Term(leaf * 0, torch.zeros(()))
    some = Term(leaf + 3, torch.tensor(2.0))
    loss, means = combine({"a": empty, "b": some}, {"a": 1.0, "b": 1.0}, workers)
    assert loss.item() == 1.5 and float(means["a"]) == 0


def test_means_of_terms_are_over_batches_and_leave_no_gradient(workers: Workers) -> None:
    task = Line().eval()
    batches: list[Any] = [SimpleNamespace(crops=torch.full((n,), 7.0 - n)) for n in (1, 3)]
    means = mean_terms(task, batches, workers)
    # the errors are 4 + 3 + 0.03 - 6 and - 4; each batch counts once
    expected = (1.03**2 + 3.03**2) / 2
    assert means == pytest.approx({"truth": expected, "other": expected / 2})
    assert task.new.grad is None
    assert mean_terms(task, [], workers) == {}


def test_seeds_depend_only_on_their_parts() -> None:
    digest = hashlib.sha256(b"3/refine/12").digest()
    assert seed_of(3, "refine", 12) == int.from_bytes(digest[:8], "big") // 2
    assert len({seed_of(s, n, e) for s in (0, 1) for n in ("a", "b") for e in (1, 2)}) == 8
    torch.Generator().manual_seed(seed_of("any"))  # 63 bits: fits
