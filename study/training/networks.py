"""Building of a trial's networks and tasks, their compilation, and their measured costs."""

from __future__ import annotations

import itertools
import shutil
import statistics
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from models.build import build_codec, build_model
from models.codecs.codec import HeatmapCodec
from models.igp_gcn import IgpGcn
from models.movenet_weights import load_movenet
from models.pose_features import PoseNetwork
from models.refined_pose import RefinedPose
from models.skeleton import Skeleton
from models.weights import load_weights
from study.config.derived import Resolved, seed_of
from study.config.schema import (
    LATENCY,
    PARAMETERS,
    RANDOM,
    STUDENT,
    DistillConfig,
    ModelConfig,
    RefineConfig,
    TrialConfig,
)
from study.errors import InputError
from study.storage.checkpoint import Checkpoint
from study.training.distill import DistillTask
from study.training.loop import Stage
from study.training.refine import RefineTask

WARM_UP, AT_LEAST, AT_MOST = 3, 5, 30
"""Calls before the first timed one; fewest and most timed calls."""
ENOUGH_S = 2.0
"""Timing stops after this many seconds, once AT_LEAST calls are timed."""
BACKEND = "inductor"
WORTH_STEPS = 20_000
"""Steps from which compiling pays: its minutes are won back if a step gets 5 ms shorter."""


def measure_costs(
    student: ModelConfig,
    refine: RefineConfig,
    arithmetic: TrialConfig,
    resolved: Resolved,
    device: torch.device,
) -> dict[str, float]:
    """Return the costs of the estimator that a trial of these settings ends with, by name.

    Latency is the median time in ms for one crop, with batch norms folded into convolutions, as in
    an exported estimator. On a CPU it is the time of one thread, without waiting for a core, so
    that trials that run at the same time measure nearly the same.
    """
    with torch.random.fork_rng(devices=[]):
        estimator = _untrained(student, refine, arithmetic, resolved).to(device).eval()
        crop = 255 * torch.rand(1, 3, *estimator.codec.input_size).to(device)
    parameters = sum(parameter.numel() for parameter in estimator.parameters())
    fold_batch_norms(estimator)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            latency = _latency_ms(lambda: estimator(crop), device)
    finally:
        torch.set_num_threads(threads)
    return {LATENCY: latency, PARAMETERS: parameters}


def fold_batch_norms(network: nn.Module) -> None:
    """Fold every 2-D batch norm into the convolution just before it in the same module."""
    for module in list(network.modules()):
        for (name, layer), (next_name, norm) in itertools.pairwise(module.named_children()):
            if isinstance(norm, nn.BatchNorm2d):
                assert isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)
                is_transposed = isinstance(layer, nn.ConvTranspose2d)
                setattr(module, name, fuse_conv_bn_eval(layer, norm, transpose=is_transposed))
                setattr(module, next_name, nn.Identity())


def _untrained(
    student: ModelConfig, refine: RefineConfig, arithmetic: TrialConfig, resolved: Resolved
) -> RefinedPose:
    skeleton = resolved.skeleton
    codec = build_codec(student.codec, resolved.input_size, student.sigma)
    network, _ = build_network(student, arithmetic, codec, skeleton, seed=0)
    refiner = None
    if refine.epochs:
        refiner = build_refiner(refine, skeleton, network.pyramid_channels)
    return RefinedPose(network, codec, refiner, skeleton.flip_order if student.flip_test else None)


def _latency_ms(call: Callable[[], object], device: torch.device) -> float:
    def seconds() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            return time.perf_counter()
        return time.thread_time()

    for _ in range(WARM_UP):
        call()
    times: list[float] = []
    while len(times) < AT_MOST and (len(times) < AT_LEAST or sum(times) < ENOUGH_S):
        start = seconds()
        call()
        times.append(seconds() - start)
    return 1000 * statistics.median(times)


def is_compiled(setting: str, device: torch.device, steps: int) -> bool:
    """Return whether a network that trains for this many steps is compiled.

    Args:
        setting: as ``trial.compile``; auto compiles on a GPU, from WORTH_STEPS steps on, if a
            C compiler and Python's headers are installed.
    """
    if setting == "auto":
        return device.type == "cuda" and steps >= WORTH_STEPS and _has_compiler()
    return setting == "true"


def compile_network(
    network: PoseNetwork, setting: str, stage: Stage, device: torch.device
) -> None:
    """Compile the network in place, if the setting asks for it in this stage.

    Names and weights stay unchanged. Each batch size gets its own code, so that an epoch's result
    does not depend on earlier batch sizes.
    """
    if is_compiled(setting, device, stage.epochs * stage.steps_per_epoch):
        network.compile(backend=BACKEND, dynamic=False)


def _has_compiler() -> bool:
    """Return whether Triton can build its launchers: with a C compiler and Python's headers."""
    headers = Path(sysconfig.get_path("include"), "Python.h")
    return any(map(shutil.which, ("gcc", "clang"))) and headers.is_file()


def build_network(
    model: ModelConfig, trial: TrialConfig, codec: HeatmapCodec, skeleton: Skeleton, seed: int
) -> tuple[PoseNetwork, frozenset[str]]:
    """Build the teacher's or the student's network.

    Parameters that ``init`` does not hold are random and depend only on the seed.

    Returns:
        The network, and the names of its parameters that come from ``init``.

    Raises:
        InputError: ``init`` is not a file of weights that fit.
    """
    torch.manual_seed(seed)
    network = build_model(model.name, model.size, skeleton, codec)
    trained: frozenset[str] = frozenset()
    if model.init != RANDOM:
        try:
            path = Path(model.init)
            left_random = (
                load_movenet(network, path, skeleton)
                if path.suffix == ".json"
                else load_weights(network, path)
            )
        except ValueError as error:
            raise InputError(str(error)) from None
        trained = frozenset(name for name, _ in network.named_parameters()) - set(left_random)
    return with_arithmetic(network, trial), trained


def with_arithmetic(network: PoseNetwork, trial: TrialConfig) -> PoseNetwork:
    """Set the precision and memory format that the network computes in."""
    network.precision = trial.precision
    if trial.channels_last == "false":
        network.memory_format = torch.contiguous_format
    return network.to(memory_format=network.memory_format)  # type: ignore[call-overload]


def build_distill_task(
    student: ModelConfig,
    distill: DistillConfig,
    arithmetic: TrialConfig,
    resolved: Resolved,
    *,
    seed: int,
) -> DistillTask:
    """Build stage 1 of a trial: its student, before training."""
    skeleton = resolved.skeleton
    codec = build_codec(student.codec, resolved.input_size, student.sigma)
    network, trained = build_network(
        student, arithmetic, codec, skeleton, seed_of(seed, "student")
    )
    return DistillTask(network, codec, skeleton, distill, trained, flip_test=student.flip_test)


def build_refiner(
    settings: RefineConfig, skeleton: Skeleton, pyramid_channels: tuple[int, int, int]
) -> IgpGcn:
    """Build the IGP-GCN of these settings, for a student with these features."""
    return IgpGcn(
        skeleton,
        pyramid_channels,
        levels=settings.levels,
        depth=settings.depth,
        width=settings.width,
        dropout=settings.dropout,
        gate=settings.gate,
        candidates=settings.candidates,
        mirror_pairs=settings.start != STUDENT,
    )


def build_refine_task(
    settings: RefineConfig, distilled: DistillTask, refiner: IgpGcn
) -> RefineTask:
    """Build stage 2 of a trial on top of its student, before training."""
    return RefineTask(
        distilled.student,
        distilled.codec,
        refiner,
        distilled.skeleton,
        settings,
        flip_test=distilled.flip_order is not None,
    )


def load_estimator(
    checkpoint: Checkpoint,
    student: ModelConfig,
    distill: DistillConfig,
    refine: RefineConfig,
    arithmetic: TrialConfig,
    resolved: Resolved,
) -> RefinedPose:
    """Load the pose estimator of a trial's epoch, in eval mode; the settings are the trial's."""
    distilled = build_distill_task(student, distill, arithmetic, resolved, seed=0)
    task: DistillTask | RefineTask = distilled
    if checkpoint.stage == RefineTask.name:
        refiner = build_refiner(refine, resolved.skeleton, distilled.student.pyramid_channels)
        task = build_refine_task(refine, distilled, refiner)
    task.load_state_dict(checkpoint.weights())
    return task.estimator().eval()
