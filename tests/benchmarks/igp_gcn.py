"""What stage 2 costs, in ratios: ``python tests/benchmarks/igp_gcn.py --size teacher``.

Two tables, of one process on one thread. The first reads a student's features at its joints: by
four gathers, by grid_sample, and by gathers joint for joint, each checked against the others. The
second sets the refiner beside the forward pass of its student, decoding left out. What is
compared is run in turn, and the median of all rounds counts.
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

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from torch import Tensor  # noqa: E402

from models.build import MODELS, build_codec, build_model  # noqa: E402
from models.candidates import read_candidates  # noqa: E402
from models.igp_gcn import IgpGcn  # noqa: E402
from models.mobile_net import SIZES  # noqa: E402
from models.pose_features import PoseNetwork, sample_features  # noqa: E402
from models.skeleton import COCO  # noqa: E402

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
            *(str(CROP[0] // features.shape[2]), str(features.shape[1])),
            *(f"{ratio:.2f}" for ratio in ratios),
        )
    Console(width=100).print(table)


def show_refiners(student: PoseNetwork, crops: Tensor, name: str, rounds: int) -> None:
    """Prints each refiner's share of its student's time."""
    codec = build_codec("dark", CROP, 2.0)
    out = student.look(crops)
    table = Table(title=f"refiner beside student ({name}), {len(crops)} crops of 256 x 192")
    headings = ("levels", "depth", "width", "candidates", "parameters", "share of the student's")
    for heading in headings:
        table.add_column(heading, justify="right")
    for levels, depth, width, candidates in ((3, 2, 64, 1), (3, 6, 64, 1), (3, 2, 64, 3)):
        refiner = IgpGcn(
            *(COCO, student.pyramid_channels),
            **{"levels": levels, "depth": depth, "width": width, "candidates": candidates},
        ).eval()
        places = read_candidates(codec, out, candidates)

        def refine(refiner: IgpGcn = refiner, places: Tensor = places) -> object:
            start = refiner.choose(out.pyramid, places, CROP)
            return refiner(out.pyramid, start.keypoints_crop, start.scores, CROP)

        seconds = medians([lambda: student.look(crops), refine], rounds)
        parameters = sum(parameter.numel() for parameter in refiner.parameters())
        row = (levels, depth, width, candidates, f"{parameters:,}")
        table.add_row(*map(str, row), f"{100 * seconds[1] / seconds[0]:.1f} %")
    Console(width=100).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Set the refiner's cost beside its student's.")
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
    crops = crops.contiguous(memory_format=torch.channels_last)
    keypoints = torch.rand(options.batch, COCO.num_joints, 2) * torch.tensor(CROP[::-1])
    parameters = sum(parameter.numel() for parameter in student.parameters())
    with torch.no_grad():
        pyramid = student.look(crops).pyramid
    show_sampling(pyramid, keypoints, options.rounds)
    name = f"{options.model} {options.size}, {parameters:,} parameters"
    with torch.inference_mode():
        show_refiners(student, crops, name, options.rounds)


if __name__ == "__main__":
    main()
