"""Learned weights: by hand, over workers, and in a trial that is interrupted and resumed."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from study.cache.prepare import PreparedData
from study.config.compose import with_values
from study.config.derived import resolve
from study.config.schema import StudyConfig
from study.search.controls import baseline_values
from study.storage.checkpoint import Checkpoints, Row
from study.teachers.make import build_task
from study.training.distill import DistillTask
from study.training.loop import combine
from study.training.loss_weights import UncertaintyWeights
from study.training.losses import Term
from study.training.networks import build_distill_task
from study.trial import Trial, run_trial, teacher_spec
from study.workers import Workers

LEARNED = {"distill.weights": "learned", "distill.structure.kind": "mix"}
TERMS = [
    "truth",
    "heatmap",
    *(f"structure_{k}" for k in ("pairwise", "bone", "angle", "relation")),
]
FIRST_RATE = 0.02


class Share(Workers):
    """One of two workers; ``totals`` are the sums over both of them."""

    def __init__(self, totals: Tensor) -> None:
        super().__init__(torch.device("cpu"))
        self.world, self.totals = 2, totals

    def total(self, values: Tensor) -> Tensor:
        return self.totals


def learned_at(**log_variances: float) -> UncertaintyWeights:
    weights = UncertaintyWeights(log_variances)
    weights.load_state_dict(
        {f"log_variances.{name}": torch.tensor(s) for name, s in log_variances.items()}
    )
    return weights


def distill_task(config: StudyConfig) -> DistillTask:
    return build_distill_task(
        config.student, config.distill, config.trial, resolve(config), seed=0
    )


def test_terms_count_exp_of_minus_s_times_the_loss_plus_half_s() -> None:
    counted = learned_at(truth=0.3, heatmap=-1.0)({"heatmap": torch.tensor(2.0)})
    assert counted.tolist() == pytest.approx([2 * math.e - 0.5])
    both = {"truth": torch.tensor(5.0), "heatmap": torch.tensor(2.0)}
    expected = [5 * math.exp(-0.3) + 0.15, 2 * math.e - 0.5]
    assert learned_at(heatmap=-1.0, truth=0.3)(both).tolist() == pytest.approx(expected)


def test_the_best_factor_of_a_loss_is_one_over_twice_the_loss() -> None:
    def slope(factor: float) -> float:
        weights = learned_at(truth=-math.log(factor))
        weights({"truth": torch.tensor(0.04)}).sum().backward()
        return float(weights.log_variances["truth"].grad)

    assert slope(1 / 0.08) == pytest.approx(0, abs=1e-6)
    # dL/ds = 1/2 - exp(-s) L: too high a factor is lowered, by a higher s
    assert (slope(25.0), slope(6.25)) == (pytest.approx(-0.5), pytest.approx(0.25))


def test_weight_that_starts_at_the_mean_makes_a_term_count_one() -> None:
    weights = learned_at(truth=0.0, heatmap=0.0)
    weights.start_at({"truth": 0.004, "heatmap": 7.0})
    assert weights.factors() == pytest.approx({"truth": 250.0, "heatmap": 1 / 7})


def test_two_workers_learn_the_weights_that_one_would() -> None:
    leaf = torch.tensor([3.0, 5.0], requires_grad=True)
    counts = torch.tensor([2.0, 4.0])
    factors = {"truth": 1.0, "other": 0.25}
    weights = learned_at(truth=0.4, other=-0.6)
    totals = torch.tensor([[8.0, 34.0], [6.0, 8.0]])  # sums, then counts
    halves = [
        combine(
            {"truth": Term(leaf[i], counts[i]), "other": Term(leaf[i] ** 2, counts[i] + 1)},
            factors,
            Share(totals),
            weights,
        )[0]
        for i in range(2)
    ]
    together = (halves[0] + halves[1]) / 2  # as gradients are averaged over workers
    s, t = weights.log_variances["truth"], weights.log_variances["other"]
    truth, other = leaf.sum() / 6, leaf.square().sum() / 8
    expected = torch.exp(-s) * truth + s / 2 + 0.25 * (torch.exp(-t) * other + t / 2)
    torch.testing.assert_close(together, expected)
    leaves = (leaf, s, t)
    for mine, one in zip(
        torch.autograd.grad(together, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        torch.testing.assert_close(mine, one)


def test_term_without_share_changes_neither_student_nor_learned_weight(workers: Workers) -> None:
    leaf = torch.tensor(3.0, requires_grad=True)
    weights = learned_at(truth=0.0, heatmap=0.5)
    terms = {name: Term(leaf * 2, torch.tensor(1.0)) for name in ("truth", "heatmap")}
    loss, means = combine(terms, {"truth": 1.0, "heatmap": 0.0}, workers, weights)
    loss.backward()
    assert loss.item() == 6 and means["heatmap"] == 6
    assert weights.log_variances["heatmap"].grad == 0 and leaf.grad == 2


def test_weights_learn_at_the_rate_of_new_layers_and_do_not_decay(
    mini_config: StudyConfig,
) -> None:
    changed = with_values(mini_config, LEARNED)
    task = distill_task(changed)
    assert task.uncertainty is not None and task.term_names == TERMS
    optimizer = dataclasses.replace(mini_config.distill.optimizer, lr=FIRST_RATE)
    *layers, learned = task.parameter_groups(optimizer)
    assert learned["lr"] == FIRST_RATE and learned["weight_decay"] == 0.0
    assert learned["params"] == list(task.uncertainty.parameters())
    assert all("weight_decay" not in group for group in layers)


def test_scales_set_the_learned_weights_and_the_schedule_remains(
    mini_config: StudyConfig,
) -> None:
    values = {**LEARNED, "distill.schedule": "linear", "distill.heatmap.weight": 9.0}
    changed = with_values(mini_config, values)
    task = distill_task(changed)
    task.set_scales({name: 0.5 + place for place, name in enumerate(TERMS)}, None)
    assert task.uncertainty is not None
    assert task.uncertainty.factors()["structure_bone"] == pytest.approx(1 / 3.5)
    assert task.weights(0.25) == {"truth": 1.0, **dict.fromkeys(TERMS[1:], 0.75)}


def test_fixed_weights_the_baseline_the_teacher_and_an_export_have_no_learned_weights(
    mini_config: StudyConfig,
) -> None:
    learned = with_values(mini_config, LEARNED)
    baseline = with_values(
        learned, baseline_values(learned.distill.epochs + learned.refine.epochs)
    )
    assert distill_task(mini_config).uncertainty is None
    assert distill_task(baseline).uncertainty is None
    assert build_task(teacher_spec(learned, resolve(learned))).uncertainty is None
    exported = distill_task(learned).estimator().state_dict()
    assert {name.split(".")[0] for name in exported} == {"student"}


@pytest.fixture(scope="module")
def trial(
    mini_config: StudyConfig,
    mini_data: PreparedData,
    mini_targets: Path,
    easy: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Trial:
    """A trial of three epochs with learned weights, finished without an interruption."""
    values = {**LEARNED, "data.skeleton": easy, "distill.epochs": 3, "refine.epochs": 0}
    folder = tmp_path_factory.mktemp("learned")
    changed = with_values(mini_config, values)
    trial = Trial(1, changed, resolve(changed), mini_data, folder, mini_targets)
    run_trial(trial, Workers(torch.device("cpu")), lambda row: False)
    return trial


def test_reports_contain_the_learned_weights(trial: Trial) -> None:
    last = Checkpoints(trial.folder).require_last()
    assert [row["epoch"] for row in last.rows] == [1, 2, 3]
    kept = last.weights()
    for term in TERMS:
        s = float(kept[f"uncertainty.log_variances.{term}"])
        assert last.rows[-1][f"weight.{term}"] == pytest.approx(math.exp(-s), rel=1e-6)
        assert last.rows[-1][f"weight.{term}"] != last.rows[0][f"weight.{term}"]
    for row in last.rows:
        weighted = sum(row[f"weight.{term}"] * row[f"loss.{term}"] for term in TERMS)
        assert row["loss"] == pytest.approx(weighted, rel=1e-5)


def test_resumed_trial_with_learned_weights_equals_an_undisturbed_one(
    trial: Trial, tmp_path: Path, workers: Workers
) -> None:
    again = dataclasses.replace(trial, folder=tmp_path)
    reported: list[int] = []

    def interrupt_once(row: Row) -> bool:
        reported.append(row["epoch"])
        if reported == [1]:
            raise InterruptedError
        return False

    with pytest.raises(InterruptedError):
        run_trial(again, workers, interrupt_once)
    run_trial(again, workers, interrupt_once)
    assert reported == [1, 1, 2, 3]
    whole, resumed = (Checkpoints(folder).at(3) for folder in (trial.folder, tmp_path))
    for name, value in whole.weights().items():
        assert torch.equal(resumed.weights()[name], value), name
