"""Diagnosis of the gradient of each term: values by hand, and no effect on training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from models.codecs.crop_frame import CropFrame
from search_spaces.space import load_space
from study.cache.prepare import PreparedData
from study.config import derived
from study.config.compose import with_values
from study.config.derived import resolve
from study.config.schema import StudyConfig
from study.storage.checkpoint import Checkpoint, Checkpoints
from study.storage.tables import read_reports, write_running
from study.training import loop
from study.training.loop import combine
from study.training.loss_weights import GradientDiagnosis
from study.training.networks import build_distill_task
from study.training.training_data import TrainingData
from study.trial import Trial, run_trial
from study.workers import Workers

MIX = {"distill.structure.kind": "mix", "distill.heatmap.weight": 2.0}
TERMS = [
    "truth",
    "heatmap",
    *(f"structure_{k}" for k in ("pairwise", "bone", "angle", "relation")),
]
GRADIENTS = ("gradient_share.", "gradient_cosine.")


def test_shares_and_cosines_by_hand(workers: Workers) -> None:
    point = nn.Parameter(torch.zeros(2))
    unused = nn.Parameter(torch.zeros(3))
    diagnosis = GradientDiagnosis([point, unused], workers)
    losses = {
        "heatmap": torch.tensor([0.0, 2.0]) @ point,
        "truth": torch.tensor([3.0, 4.0]) @ point,
        "structure": torch.tensor([-3.0, -4.0]) @ point + point.square().sum(),
        "nothing": 0 * point.sum(),
    }
    diagnosis.add(losses, {"heatmap": 2.5, "truth": 1.0, "structure": 2.0, "nothing": 9.0})
    row = diagnosis.row()
    shares = {"heatmap": 0.25, "truth": 0.25, "structure": 0.5, "nothing": 0.0}
    cosines = {"heatmap": 0.8, "truth": 1.0, "structure": -1.0, "nothing": 0.0}
    assert row == pytest.approx(
        {f"gradient_share.{name}": share for name, share in shares.items()}
        | {f"gradient_cosine.{name}": cosine for name, cosine in cosines.items()},
        abs=1e-6,
    )
    assert point.grad is None and unused.grad is None


def test_steps_count_equally_and_a_step_without_gradient_has_no_shares(workers: Workers) -> None:
    point = nn.Parameter(torch.zeros(2))
    diagnosis = GradientDiagnosis([point], workers)
    assert diagnosis.row() == {}
    axes = point[0], 100 * point[1]
    diagnosis.add({"truth": axes[0], "heatmap": axes[0] + axes[1]}, {"truth": 0, "heatmap": 7})
    diagnosis.add({"truth": 0 * axes[0], "heatmap": 0 * axes[1]}, {"truth": 1, "heatmap": 1})
    row = diagnosis.row()
    assert (row["gradient_share.truth"], row["gradient_share.heatmap"]) == (0.0, 0.5)
    cosine = 0.5 / (1 + 100**2) ** 0.5
    assert row["gradient_cosine.heatmap"] == pytest.approx(cosine, rel=1e-5)


def train_one_epoch(
    trial: Trial, values: dict[str, Any], folder: Path, workers: Workers
) -> Checkpoint:
    """Run a trial's only epoch with these settings and return its checkpoint."""
    config = with_values(trial.config, values)
    run_trial(
        Trial(1, config, resolve(config), trial.prepared, folder, trial.targets),
        workers,
        lambda row: False,
    )
    return Checkpoints(folder).at(1)


@pytest.fixture(scope="module")
def trial(
    mini_config: StudyConfig,
    mini_data: PreparedData,
    mini_targets: Path,
    easy: str,
    tmp_path_factory: Any,
) -> Trial:
    """A trial that has not run; its stage 1 has every kind of term."""
    values = {**MIX, "data.skeleton": easy, "distill.epochs": 1, "refine.epochs": 0}
    folder = tmp_path_factory.mktemp("diagnosed")
    changed = with_values(mini_config, values)
    return Trial(1, changed, resolve(changed), mini_data, folder, mini_targets)


def assert_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Check that two states of an optimizer are equal bit by bit."""
    assert first["param_groups"] == second["param_groups"]
    assert first["state"].keys() == second["state"].keys()
    for index, state in first["state"].items():
        assert all(torch.equal(value, second["state"][index][key]) for key, value in state.items())


@pytest.mark.parametrize("weights", ["fixed", "learned"])
def test_diagnosis_changes_no_bit_of_a_trial(
    weights: str, trial: Trial, tmp_path: Path, workers: Workers
) -> None:
    states, kept = [], []
    for diagnose in (False, True):
        values = {"distill.diagnose": diagnose, "distill.weights": weights}
        kept.append(train_one_epoch(trial, values, tmp_path / str(diagnose), workers))
        states.append(torch.get_rng_state())
    plain, diagnosed = kept
    assert torch.equal(*states)
    for key, value in plain.weights().items():  # batch norms' statistics among them
        assert torch.equal(diagnosed.weights()[key], value), key
    assert_same(plain.optimizer(), diagnosed.optimizer())
    figures = {prefix + term for prefix in GRADIENTS for term in TERMS}
    times = {"seconds", "images_per_s"}
    (row,), (other,) = plain.rows, diagnosed.rows
    assert other.keys() - row.keys() == figures
    assert {key: row[key] for key in row if key not in times} == {
        key: other[key] for key in other if key not in times | figures
    }


def test_figures_of_a_trial_equal_those_of_each_term_alone(
    trial: Trial, tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "DIAGNOSED_STEPS", 1)
    values = {"distill.diagnose": True, "distill.normalize": "none"}
    (row,) = train_one_epoch(trial, values, tmp_path, workers).rows

    config = with_values(trial.config, values)
    resolved = resolve(config)
    data = TrainingData.open(trial.prepared, resolved, workers, trial.targets)
    augment, frame = config.distill.augment, CropFrame(data.train.input_size)
    stage = data.stage("distill", config.distill, augment, frame, seed=trial.seed)
    seed = derived.seed_of(trial.seed, "distill", 1)
    batch = next(stage.batches(torch.Generator().manual_seed(seed)))
    gradients = {}
    for term in TERMS:
        task = build_distill_task(
            config.student, config.distill, config.trial, resolved, seed=trial.seed
        ).train()
        combine({term: task(batch)[term]}, task.weights(0.0), workers)[0].backward()
        gradients[term] = torch.cat(
            [
                torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
                for p in task.student.parameters()
            ]
        )
    lengths = {term: float(gradient.norm()) for term, gradient in gradients.items()}
    for term in TERMS:
        share = lengths[term] / sum(lengths.values())
        cosine = torch.cosine_similarity(gradients[term], gradients["truth"], dim=0)
        assert share > 1e-4
        assert row[f"gradient_share.{term}"] == pytest.approx(share, rel=1e-4)
        assert row[f"gradient_cosine.{term}"] == pytest.approx(float(cosine), abs=1e-4)


def test_only_the_first_steps_of_an_epoch_are_diagnosed(
    trial: Trial, tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    added: list[int] = []
    monkeypatch.setattr(GradientDiagnosis, "add", lambda *_: added.append(1))
    values = {"distill.batch_size": 3, "distill.diagnose": True}
    (row,) = train_one_epoch(trial, values, tmp_path, workers).rows
    assert row["step"] > loop.DIAGNOSED_STEPS == len(added)


def test_every_figure_has_its_column(tmp_path: Path) -> None:
    row = {"trial": 3, "epoch": 1, "stage": "distill"}
    row |= {prefix + term: 0.5 for prefix in ("loss.", "weight.", *GRADIENTS) for term in TERMS}
    write_running(tmp_path, 3, [row], load_space("joint"))
    (read,) = read_reports(tmp_path).to_pylist()
    assert {name: value for name, value in read.items() if value is not None} == row
