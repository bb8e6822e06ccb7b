"""Are gathers the fastest way to sample features? ``python tests/benchmarks/igp_gcn.py``

Compares four gathers, grid_sample, and gathers for one joint after another, in one process on one
thread; all must agree. They take turns, and the median over rounds counts. For the refiner's cost
relative to its student see models.py.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from benchmark import new_parser, new_table
from rich.console import Console
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
    """Return the median seconds of each call; the calls take turns."""
    seconds: list[list[float]] = [[] for _ in calls]
    for number in range(rounds + 1):
        for call, times in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call()
            if number:  # the first round is the warm-up
                times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]


def sampling_times(
    features: Tensor, keypoints: Tensor, rounds: int
) -> tuple[list[float], list[float]]:
    """Return each sampler's seconds: forward only, and with the gradient of the features."""
    leaf = features.clone().requires_grad_()

    def forward(sample: Sampler) -> Callable[[], object]:
        def call() -> None:
            with torch.inference_mode():
                sample(features, keypoints)

        return call

    def with_gradient(sample: Sampler) -> Callable[[], object]:
        def call() -> None:
            leaf.grad = None
            sample(leaf, keypoints).sum().backward()

        return call

    return (
        medians([forward(sample) for sample in SAMPLERS], 10 * rounds),
        medians([with_gradient(sample) for sample in SAMPLERS], rounds),
    )


def show_sampling(pyramid: tuple[Tensor, ...], keypoints: Tensor, rounds: int) -> None:
    """Print the times of all samplers relative to four gathers."""
    table = new_table(
        f"sampling at {keypoints.shape[1]} joints of {len(keypoints)} people",
        "stride",
        "channels",
        "gathers",
        "grid_sample",
        "per-joint loop",
        "grid_sample, gradient",
        "loop, gradient",
        num_left=0,
    )
    for features in pyramid:
        sampled = [sample(features.double(), keypoints.double()) for sample in SAMPLERS]
        for other in sampled[1:]:
            torch.testing.assert_close(other, sampled[0], atol=1e-6, rtol=0)
        forward, with_gradient = sampling_times(features, keypoints, rounds)
        ratios = [time / forward[0] for time in forward]
        ratios += [time / with_gradient[0] for time in with_gradient[1:]]
        table.add_row(
            str(CROP[0] // features.shape[2]),
            str(features.shape[1]),
            *(f"{ratio:.2f}" for ratio in ratios),
        )
    Console(width=100).print(table)


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument(
        "--model", choices=sorted(MODELS), default="mobile_net", help="default mobile_net"
    )
    parser.add_argument("--size", choices=sorted(SIZES), default="teacher", help="default teacher")
    parser.add_argument("--batch", type=int, default=32, help="people at a time (default 32)")
    parser.add_argument(
        "--rounds",
        type=int,
        default=7,
        help="with gradient; ten times as many without (default 7)",
    )
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
