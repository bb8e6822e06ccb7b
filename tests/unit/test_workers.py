"""Two gloo workers equal one: the same gradients, the same AP, and they stop together.

The file is also a program: ``test_workers.py FOLDER RANK`` is one of the two workers.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.codecs.crop_frame import CropFrame
from models.skeleton import COCO, SKELETONS
from study.cache.prepare import PreparedData
from study.config import checks
from study.config.compose import from_plain, to_plain, with_values
from study.config.derived import resolve
from study.config.schema import AugmentConfig, StudyConfig
from study.storage.checkpoint import Checkpoints, Row, best_rows
from study.training.batches import Batch
from study.training.distill import DistillTask
from study.training.loop import combine, mean_terms
from study.training.loss_weights import GradientDiagnosis
from study.training.networks import build_distill_task, build_refiner, load_estimator
from study.training.refine import RefineTask
from study.training.training_data import TrainingData
from study.trial import Trial, run_trial
from study.workers import Workers

ROOT = Path(__file__).resolve().parents[2]
ROWS = [torch.arange(7), torch.arange(7, 14)]
"""Batches of an odd number of people: the first worker has one more."""
STOP_AT = 3
PARTS = ("pairwise", "bone", "angle", "relation")
WEIGHTS = {"truth": 1.0, "heatmap": 0.5, "teacher": 0.7} | {f"structure_{p}": 0.3 for p in PARTS}


def trial_in(folder: Path) -> Trial:
    """Read the trial that ``folder`` describes; it is trained there."""
    description = json.loads((folder / "trial.json").read_text())
    sigmas = (description["sigma"],) * 17
    SKELETONS["easy"] = dataclasses.replace(COCO, name="easy", oks_sigmas=sigmas)
    checks.SKELETONS = ("coco", "easy")
    config = from_plain(description["config"])
    fields = {**description["data"], "num_people": tuple(description["data"]["num_people"])}
    prepared = PreparedData(**fields)
    return Trial(
        1, config, resolve(config), prepared, folder / "trial", Path(description["targets"])
    )


def distill_task(config: StudyConfig) -> DistillTask:
    return build_distill_task(
        config.student, config.distill, config.trial, resolve(config), seed=1
    )


def tasks(trial: Trial) -> list[DistillTask | RefineTask]:
    """Build the tasks of both stages, in eval mode, no layer near zero.

    Stage 2 with a finetuned student and a choice of candidates, and with neither.
    """
    distill = distill_task(trial.config).eval()
    torch.manual_seed(2)
    nn.init.normal_(distill.student.final_layer.weight, std=0.3)
    skeleton = SKELETONS["easy"]
    both: list[DistillTask | RefineTask] = [distill]
    plain = {"refine.student": "frozen", "refine.candidates": 1}
    for config in (trial.config, with_values(trial.config, plain)):
        refiner = build_refiner(
            config.refine, resolve(config).skeleton, distill.student.pyramid_channels
        ).eval()
        for name, parameter in refiner.named_parameters():
            if name.endswith("head.weight"):
                nn.init.normal_(parameter, std=0.1)
        student = distill_task(config).student
        both.append(RefineTask(student, distill.codec, refiner, skeleton, config.refine))
    return both


def global_batches(data: TrainingData, augment: AugmentConfig) -> list[Batch]:
    """Return this worker's shares of the batches in ROWS."""
    generator = torch.Generator().manual_seed(3)
    frame = CropFrame(data.train.input_size)
    return list(data.batches(augment, frame, ROWS, generator))


def gradients(task: DistillTask | RefineTask, batch: Batch, workers: Workers) -> dict[str, Tensor]:
    """Return gradients of the loss on a global batch, means of its terms, and its diagnosis."""
    wrapped = workers.wrap(task)  # averages gradients only while it lives
    terms = wrapped(batch)
    diagnosis = GradientDiagnosis(next(iter(task.trainable())).parameters(), workers)
    alone = {name: combine({name: term}, {name: 1.0}, workers)[0] for name, term in terms.items()}
    diagnosis.add(alone, WEIGHTS)
    loss, means = combine(terms, WEIGHTS, workers, task.uncertainty)
    loss.backward()
    named = {
        name: parameter.grad
        for name, parameter in task.named_parameters()
        if parameter.grad is not None
    }
    figures = {name: torch.tensor(figure) for name, figure in diagnosis.row().items()}
    return {**named, **figures, **{f"term {name}": mean for name, mean in means.items()}}


def data_of(trial: Trial, workers: Workers) -> TrainingData:
    return TrainingData.open(trial.prepared, resolve(trial.config), workers, trial.targets)


def results(trial: Trial, workers: Workers) -> dict[str, Any]:
    """Compute what must not depend on the number of workers."""
    data = data_of(trial, workers)
    batches = global_batches(data, trial.config.distill.augment)
    distill, refine, plain = tasks(trial)
    rounded, *_ = tasks(trial)
    rounded.student.precision = "bf16"
    return {
        "bf16": gradients(rounded, batches[0], workers),
        "terms": mean_terms(distill, batches, workers),
        "scores": data.score(distill.estimator()),
        "distill": gradients(distill, batches[0], workers),
        "refine": gradients(refine, batches[1], workers),
        "plain": gradients(plain, batches[1], workers),
    }


def compiled_and_not(trial: Trial, workers: Workers) -> list[dict[str, Tensor]]:
    """Return gradients and terms of a compiled network in train mode, and of an uncompiled one."""
    data = data_of(trial, workers)
    batch = global_batches(data, trial.config.distill.augment)[0]
    compiled, plain = (tasks(trial)[0].train() for _ in range(2))
    compiled.student.compile(backend="eager", dynamic=False)
    return [gradients(task, batch, workers) for task in (compiled, plain)]


def main(folder: Path, rank: int) -> None:
    """Run one of two workers; its results are saved in ``folder``."""
    torch.set_num_threads(1)
    meeting = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    workers = Workers(torch.device("cpu"))
    trial = trial_in(folder)
    seen = results(trial, workers)
    seen["compiled"] = compiled_and_not(trial, workers)
    rows: list[Row] = []

    def report(row: Row) -> bool:
        rows.append(row)
        return rank == 0 and row["epoch"] == STOP_AT

    run_trial(trial, workers, report)
    workers.wait()
    torch.save({**seen, "rows": rows}, folder / f"seen-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(
    mini_config: StudyConfig,
    mini_data: PreparedData,
    mini_targets: Path,
    easy: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Folder of a trial that both workers trained until the first one stopped it."""
    folder = tmp_path_factory.mktemp("pair")
    values = {
        "data.skeleton": easy,
        "refine.epochs": 3,
        "distill.structure.kind": "mix",
        "distill.weights": "learned",
        "distill.diagnose": True,
        "refine.student": "finetuned",
        "refine.candidates": 2,
    }
    description = {
        "config": to_plain(with_values(mini_config, values)),
        "data": dataclasses.asdict(mini_data),
        "targets": str(mini_targets),
        "sigma": SKELETONS[easy].oks_sigmas[0],
    }
    (folder / "trial.json").write_text(json.dumps(description))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pair = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder), str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            cwd=ROOT,
        )
        for rank in range(2)
    ]
    try:
        outputs = [worker.communicate(timeout=300)[0] for worker in pair]
    finally:
        for worker in pair:
            worker.kill()
    assert [worker.returncode for worker in pair] == [0, 0], "\n".join(outputs)
    return folder


@pytest.fixture(scope="module")
def trial(folder: Path) -> Trial:
    return trial_in(folder)


@pytest.fixture(scope="module")
def seen(folder: Path) -> list[dict[str, Any]]:
    """Results of both workers, by rank."""
    return [torch.load(folder / f"seen-{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(trial: Trial, workers: Workers) -> dict[str, Any]:
    """Results of a single worker."""
    return results(trial, workers)


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("stage", ["distill", "refine", "plain"])
def test_gradients_of_a_global_batch_are_those_of_one_worker(
    stage: str, seen: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    expected = alone[stage]
    if stage != "distill":
        parts = {name.split(".")[0] for name in expected if not name.startswith("term ")}
        learns = parts - {"gradient_share", "gradient_cosine"}
        assert learns == ({"refiner", "student"} if stage == "refine" else {"refiner"})
    assert expected.keys() == seen[0][stage].keys() and len(expected) > 20
    for name, value in expected.items():
        rounding = max(1e-5, 5e-6 * float(value.abs().max()))
        for rank in range(2):
            difference = (seen[rank][stage][name] - value).abs().max()
            assert difference < rounding, f"{name}: {difference} > {rounding}"
    largest = max(float(value.abs().max()) for value in expected.values())
    assert largest > 1e-3  # otherwise the tolerance would prove nothing


def test_gradients_in_bf16_are_those_of_one_worker_up_to_rounding(
    seen: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    one, first, second, plain = (
        torch.cat([value.flatten() for value in source.values()])
        for source in (alone["bf16"], seen[0]["bf16"], seen[1]["bf16"], alone["distill"])
    )
    assert torch.equal(first, second)
    rounding = (one - plain).norm()
    assert rounding > 1e-3 * plain.norm()
    assert (first - one).norm() < rounding


def test_compiled_network_has_the_gradients_of_an_uncompiled_one_on_two_workers(
    seen: list[dict[str, Any]],
) -> None:
    for rank in range(2):
        compiled, plain = seen[rank]["compiled"]
        assert list(compiled) == list(plain) and len(compiled) > 20
        for name, value in plain.items():
            assert torch.equal(compiled[name], value), name
            assert torch.equal(seen[1 - rank]["compiled"][1][name], value), name


def test_means_of_the_terms_are_those_of_one_worker(
    seen: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    assert set(alone["terms"]) == {"truth", "heatmap", *(f"structure_{p}" for p in PARTS)}
    assert seen[0]["terms"] == pytest.approx(alone["terms"], rel=1e-5)
    assert seen[1]["terms"] == seen[0]["terms"]


def test_ap_over_all_people_is_that_of_one_worker(
    seen: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    assert 0 < alone["scores"]["ap"] < 1
    assert seen[0]["scores"] == pytest.approx(alone["scores"], abs=1e-6)
    assert seen[1]["scores"] == seen[0]["scores"]


def test_both_workers_see_every_epoch_and_stop_together(seen: list[dict[str, Any]]) -> None:
    for rank in range(2):
        assert [row["epoch"] for row in seen[rank]["rows"]] == list(range(1, STOP_AT + 1))
    for first, second in zip(seen[0]["rows"], seen[1]["rows"], strict=True):
        assert first["val_ap"] == second["val_ap"] > 0
        assert first["loss"] == pytest.approx(second["loss"])
        figures = {key: first[key] for key in first if key.startswith(("weight.", "gradient"))}
        assert figures == {key: second[key] for key in figures}
        assert len(figures) == (18 if first["stage"] == "distill" else 2)


def test_reported_ap_is_that_of_the_kept_weights(
    trial: Trial, seen: list[dict[str, Any]], workers: Workers
) -> None:
    checkpoints = Checkpoints(trial.folder)
    last = checkpoints.require_last()
    assert last.epoch == STOP_AT
    assert [row["val_ap"] for row in last.rows] == [row["val_ap"] for row in seen[0]["rows"]]
    config, resolved = trial.config, resolve(trial.config)
    data = TrainingData.open(trial.prepared, resolved, workers, targets=None)
    for row in best_rows(last.rows).values():
        kept = checkpoints.at(row["epoch"])
        scores = data.score(
            load_estimator(
                kept, config.student, config.distill, config.refine, config.trial, resolved
            )
        )
        assert scores["ap"] == pytest.approx(row["val_ap"], abs=1e-9)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
