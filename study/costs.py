"""What a trial's estimator costs, measured before it is trained: parameters and latency."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from models.refined_pose import RefinedPose
from study.objectives import LATENCY, PARAMETERS
from study.schema import StudyConfig
from study.training import build_distill_task, build_refine_task, build_refiner

WARM_UP, AT_LEAST, AT_MOST = 3, 5, 30
"""Calls before the first timed one; of those that are timed, the fewest and the most."""
ENOUGH_S = 2.0
"""Timed so long, no further call is needed."""


def measure_costs(config: StudyConfig, device: torch.device) -> dict[str, float]:
    """The costs of the estimator that a trial of these settings ends with, by name.

    Latency is the median time in ms for one crop, with batch norms folded into convolutions as in
    an exported estimator. On a CPU it is one thread's own time, to which waiting for a core
    doesn't count: so trials that run side by side measure nearly the same.
    """
    with torch.random.fork_rng(devices=[]):
        estimator = _untrained(config).to(device).eval()
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
    """Every 2-D batch norm is part of the convolution that its module holds just before it."""
    for module in list(network.modules()):
        for (name, layer), (next_name, norm) in itertools.pairwise(module.named_children()):
            if isinstance(norm, nn.BatchNorm2d):
                assert isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)
                is_transposed = isinstance(layer, nn.ConvTranspose2d)
                setattr(module, name, fuse_conv_bn_eval(layer, norm, transpose=is_transposed))
                setattr(module, next_name, nn.Identity())


def _untrained(config: StudyConfig) -> RefinedPose:
    distilled = build_distill_task(config, seed=0)
    if not config.refine.epochs:
        return distilled.estimator()
    refiner = build_refiner(config, distilled.student.pyramid_channels)
    return build_refine_task(config, distilled, refiner).estimator()


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
