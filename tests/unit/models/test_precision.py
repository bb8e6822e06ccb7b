"""Precision: bf16 in the forward pass only, memory formats, compiled networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.codecs.crop_frame import CropFrame
from models.pose_features import computes_in_bf16
from study.cache.prepare import PreparedData
from study.config.compose import MAY_CHANGE, StudyConfig, compose, to_plain, with_values
from study.config.derived import resolve
from study.errors import InputError
from study.teachers.identity import teacher_folder
from study.training import networks
from study.training.batches import Batch
from study.training.distill import DistillTask
from study.training.loop import combine
from study.training.networks import (
    WORTH_STEPS,
    build_distill_task,
    build_refiner,
    compile_network,
    is_compiled,
)
from study.training.refine import RefineTask
from study.training.training_data import TrainingData
from study.trial import teacher_spec
from study.workers import Workers

CPU, GPU = torch.device("cpu"), torch.device("cuda")
BF16_STEP = 2.0**-8
"""Relative distance of two neighbors in bf16, which has 8 significant bits."""
ROUNDED = 4 * (4 * 25) ** 0.5 * BF16_STEP / 2
"""Relative error of an output: weight, input, sum and norm of 25 layers are each rounded by up to
half a step, one as likely up as down; batch norms, which take the mean out, may multiply it."""
WEIGHTS = {"truth": 1.0, "heatmap": 0.5, "structure": 0.3, "teacher": 0.7}


@pytest.fixture(scope="module")
def data(
    mini_config: StudyConfig, mini_data: PreparedData, mini_targets: Path, workers: Workers
) -> TrainingData:
    return TrainingData.open(mini_data, resolve(mini_config), workers, mini_targets)


@pytest.fixture(scope="module")
def batch(data: TrainingData, mini_config: StudyConfig) -> Batch:
    generator = torch.Generator().manual_seed(0)
    order = [torch.arange(8)]
    frame = CropFrame(data.train.input_size)
    return next(data.batches(mini_config.distill.augment, frame, order, generator))


def build(config: StudyConfig, stage: str = "distill", **trial: str) -> DistillTask | RefineTask:
    """Build a stage's task in train mode, with heatmaps that are not nearly zero."""
    config = with_values(config, {f"trial.{key}": value for key, value in trial.items()})
    task = build_distill_task(
        config.student, config.distill, config.trial, resolve(config), seed=1
    )
    torch.manual_seed(2)
    nn.init.normal_(task.student.final_layer.weight, std=0.3)  # type: ignore[arg-type]
    if stage == "distill":
        return task.train()
    refiner = build_refiner(config.refine, resolve(config).skeleton, task.student.pyramid_channels)
    return RefineTask(task.student, task.codec, refiner, task.skeleton, config.refine).train()


def step(task: nn.Module, batch: Batch, workers: Workers) -> float:
    """Compute the loss on the batch and the gradients of the parameters."""
    loss, _ = combine(task(batch), WEIGHTS, workers)
    loss.backward()
    return loss.item()


def inputs_of(layer: nn.Module) -> list[Tensor]:
    """Return a list that collects the layer's inputs."""
    inputs: list[Tensor] = []
    layer.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    return inputs


@pytest.mark.parametrize(
    ("precision", "device", "has_bf16", "expected"),
    [
        ("fp32", CPU, True, False),
        ("bf16", CPU, True, True),
        ("auto", CPU, True, False),
        ("fp32", GPU, True, False),
        ("bf16", GPU, False, True),
        ("auto", GPU, True, True),
        ("auto", GPU, False, False),
    ],
)
def test_auto_is_bf16_on_gpus_that_have_it(
    precision: str,
    device: torch.device,
    has_bf16: bool,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def answer(including_emulation: bool = True) -> bool:
        return has_bf16 or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", answer)
    assert computes_in_bf16(precision, device) == expected


def test_bf16_outputs_are_fp32_tensors_close_to_fp32(
    mini_config: StudyConfig, batch: Batch
) -> None:
    answers = []
    for precision in ("fp32", "bf16"):
        student = build(mini_config, precision=precision).student
        inputs = inputs_of(student.final_layer)  # type: ignore[arg-type]
        answers.append(student.predict(batch.crops))
        assert inputs[0].dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
    for exact, rounded in zip(
        *((answer.heatmaps, *answer.pyramid) for answer in answers), strict=True
    ):
        assert exact.dtype == rounded.dtype == torch.float32
        difference = (exact - rounded).square().mean().sqrt() / exact.square().mean().sqrt()
        assert BF16_STEP / 2 < difference < ROUNDED


@pytest.mark.parametrize("stage", ["distill", "refine"])
def test_bf16_step_has_nearly_the_loss_of_fp32_and_fp32_gradients(
    stage: str, mini_config: StudyConfig, batch: Batch, workers: Workers
) -> None:
    losses = []
    for precision in ("fp32", "bf16"):
        task = build(mini_config, stage, precision=precision)
        losses.append(step(task, batch, workers))
        grads = [p.grad for p in task.parameters() if p.grad is not None]
        assert len(grads) > 20 and {grad.dtype for grad in grads} == {torch.float32}
        assert {p.dtype for p in task.parameters()} == {torch.float32}
        assert all(bool(grad.isfinite().all()) for grad in grads)
    assert losses[0] != losses[1] or stage == "refine"  # an untrained refiner moves nothing
    assert losses[1] == pytest.approx(losses[0], rel=ROUNDED)


@pytest.mark.parametrize("value", ["auto", "true", "false"])
def test_weights_and_inputs_have_the_memory_format(
    value: str, mini_config: StudyConfig, batch: Batch
) -> None:
    student, other = (build(mini_config, channels_last=v).student.eval() for v in (value, "true"))
    expected_format = torch.contiguous_format if value == "false" else torch.channels_last
    layer: Any = student.top
    inputs = inputs_of(layer)
    answer = student.predict(batch.crops).heatmaps
    for tensor in (inputs[0], student.stem[0].weight):  # type: ignore[index]
        assert tensor.is_contiguous(memory_format=expected_format)
    assert answer.is_contiguous()  # like the targets
    expected = other.predict(batch.crops).heatmaps
    assert (answer - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("setting", "device", "steps", "expected"),
    [
        ("auto", CPU, 10 * WORTH_STEPS, False),
        ("auto", GPU, WORTH_STEPS - 1, False),
        ("auto", GPU, WORTH_STEPS, True),
        ("true", CPU, 1, True),
        ("false", GPU, 10 * WORTH_STEPS, False),
    ],
)
def test_auto_compiles_long_trainings_on_a_gpu(
    setting: str,
    device: torch.device,
    steps: int,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(networks.shutil, "which", {"gcc": "/usr/bin/gcc"}.get)
    monkeypatch.setattr(networks.Path, "is_file", lambda path: path.name == "Python.h")
    assert is_compiled(setting, device, steps) == expected
    monkeypatch.setattr(networks.shutil, "which", lambda name: None)
    assert is_compiled(setting, device, steps) == (expected and setting == "true")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_network_trains_alike_under_the_same_names(
    precision: str,
    mini_config: StudyConfig,
    data: TrainingData,
    batch: Batch,
    workers: Workers,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(networks, "BACKEND", "eager")
    config = with_values(mini_config, {"trial.precision": precision})
    augment, frame = config.distill.augment, CropFrame(data.train.input_size)
    stage = data.stage("distill", config.distill, augment, frame, seed=1)
    plain, compiled = build(config), build(config)
    compile_network(compiled.student, "true", stage, workers.device)
    traced = torch._dynamo.utils.counters["stats"]
    traced.clear()
    assert step(compiled, batch, workers) == step(plain, batch, workers)
    assert traced["unique_graphs"] == 1 and traced["calls_captured"] > 50
    for own, other in zip(compiled.parameters(), plain.parameters(), strict=True):
        assert own.grad is not None and other.grad is not None
        assert torch.equal(own.grad, other.grad)
    states = compiled.state_dict(), plain.state_dict()
    assert list(states[0]) == list(states[1])
    assert all(map(torch.equal, states[0].values(), states[1].values()))
    with torch.inference_mode():
        answers = [task.eval().estimator()(batch.crops)[0] for task in (compiled, plain)]
    assert torch.equal(*answers)
    assert traced["unique_graphs"] == 1  # evaluation is not compiled


def test_true_and_false_are_accepted_as_typed() -> None:
    config = compose(["trial.compile=true", "trial.channels_last=false"])
    assert (config.trial.compile, config.trial.channels_last) == ("true", "false")
    assert with_values(config, {"trial.compile": False}).trial.compile == "false"
    with pytest.raises(InputError, match=r"trial\.compile must be one of auto, true, false, got"):
        compose(["trial.compile=yes"])


@pytest.mark.parametrize("change", [("precision", "bf16"), ("compile", "true")])
def test_other_precision_makes_another_teacher(
    change: tuple[str, str], mini_config: StudyConfig, mini_data: PreparedData
) -> None:
    other = with_values(mini_config, {f"trial.{change[0]}": change[1]})
    assert teacher_folder(teacher_spec(other, resolve(other)), mini_data) != teacher_folder(
        teacher_spec(mini_config, resolve(mini_config)), mini_data
    )


def test_settings_that_change_results_are_fixed_in_a_study() -> None:
    places = {"launcher", "num_workers", "cpus", "gpus", "max_failures", "timeout_s"}
    may = {key for key in to_plain(compose())["trial"] if f"trial.{key}" in MAY_CHANGE}
    assert may == places
