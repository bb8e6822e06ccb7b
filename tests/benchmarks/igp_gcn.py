"""Reading features at joints, in ratios: ``python tests/benchmarks/igp_gcn.py --size teacher``.

By four gathers, by grid_sample, and by gathers joint for joint, each checked against the others,
in one process on one thread. What is compared is run in turn, and the median of all rounds counts.
What the refiner costs beside its student: models.py.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from models.build import MODELS, build_model
from models.mobile_net import SIZES
from models.pose_features import sample_features
from models.skeleton import COCO

CROP = (256, 192)
Sampler = Callable[[Tensor, Tensor], Tensor]


def by_gathers(features: Tensor, keypoints: Tensor) -> Tensor:
    return sample_features(features, keypoints, CROP)


def by_grid_sample(features: Tensor, keypoints: Tensor) -> Tensor:
    cells = keypoints.new_tensor((features.shape[3], features.shape[2]))
    grid = 2 * keypoints / keypoints.new_tensor(CROP[::-1]) + 1 / cells - 1
    sampled = F.grid_sample(features, grid[:, :, None], padding_mode="border", align_corners=False)
    return sampled[..., 0].transpose(1, 2)


def by_joint(features: Tensor, keypoints: Tensor) -> Tensor:
    joints = keypoints.split(1, dim=1)
    return torch.cat([sample_features(features, joint, CROP) for joint in joints], dim=1)


SAMPLERS: list[Sampler] = [by_gathers, by_grid_sample, by_joint]


def medians(calls: list[Callable[[], object]], rounds: int) -> list[float]:
    """Seconds of each call, the calls taking turns."""
    seconds: list[list[float]] = [[] for _ in calls]
    for number in range(rounds + 1):
        for call, own in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call()
            if number:  # the first round warms up
                own.append(time.perf_counter() - start)
    return [statistics.median(own) for own in seconds]


def reading_times(
    features: Tensor, keypoints: Tensor, rounds: int
) -> tuple[list[float], list[float]]:
    """Seconds of each sampler: reading alone, and with the gradient of the features."""
    leaf = features.clone().requires_grad_()

    def alone(read: Sampler) -> Callable[[], object]:
        def call() -> None:
            with torch.inference_mode():
                read(features, keypoints)

        return call

    def with_gradient(read: Sampler) -> Callable[[], object]:
        def call() -> None:
            leaf.grad = None
            read(leaf, keypoints).sum().backward()

        return call

    return (
        medians([alone(read) for read in SAMPLERS], 10 * rounds),
        medians([with_gradient(read) for read in SAMPLERS], rounds),
    )


def show_sampling(pyramid: tuple[Tensor, ...], keypoints: Tensor, rounds: int) -> None:
    """Prints how many times as long as four gathers the others take."""
    table = Table(title=f"reading {keypoints.shape[1]} joints of {len(keypoints)} people")
    headings = ("stride", "channels", "gathers", "grid_sample", "per-joint loop")
    for heading in (*headings, "grid_sample, gradient", "loop, gradient"):
        table.add_column(heading, justify="right")
    for features in pyramid:
        found = [read(features.double(), keypoints.double()) for read in SAMPLERS]
        for other in found[1:]:
            torch.testing.assert_close(other, found[0], atol=1e-6, rtol=0)
        alone, with_gradient = reading_times(features, keypoints, rounds)
        ratios = [time / alone[0] for time in alone]
        ratios += [time / with_gradient[0] for time in with_gradient[1:]]
        table.add_row(
            str(CROP[0] // features.shape[2]),
            str(features.shape[1]),
            *(f"{ratio:.2f}" for ratio in ratios),
        )
    Console(width=100).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare ways to read features at joints.")
    parser.add_argument("--model", choices=sorted(MODELS), default="mobile_net")
    parser.add_argument("--size", choices=sorted(SIZES), default="teacher")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    student = build_model(options.model, options.size, COCO).eval()
    student = student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    crops = 255 * torch.rand(options.batch, 3, *CROP)
    keypoints = torch.rand(options.batch, COCO.num_joints, 2) * torch.tensor(CROP[::-1])
    with torch.no_grad():
        pyramid = student.predict(crops).pyramid
    show_sampling(pyramid, keypoints, options.rounds)


if __name__ == "__main__":
    main()
