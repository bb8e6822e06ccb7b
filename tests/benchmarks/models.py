"""What every model costs: ``python tests/benchmarks/models.py``, a quarter of an hour.

One CPU thread, crops of 256x192, one at a time and 32 together; batch norms are folded, as every
inference runtime does. All networks are timed in turn, round after round, by the thread's own
time, to which waiting for a core doesn't count, and a ratio is the median over the rounds of the
time over SimpleBaseline-R50's in the same round. The second table sets IGP-GCN beside the light
students, decoding left out. With ``--shapes`` other shapes of the light students, widened until
they have as many parameters, are set beside MoveNet's ``lightning``: that is how their sizes were
chosen.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models.build import MODELS, build_model
from models.igp_gcn import IgpGcn
from models.mobile_net import SIZES, MobileNet, MobileNetSize
from models.pose_features import PoseFeatures, PoseNetwork
from models.skeleton import COCO
from study.training.networks import fold_batch_norms

BASELINE, SHAPES_BASELINE = "simple_baseline r50", "mobile_net lightning"
CROP = (256, 192)
CANDIDATES = (1, 3)
BUDGETS = {"small": 300_000, "medium": 1_000_000, "large": 2_300_000}
EVEN = (16, 24, 32, 64, 96, 160, 320)
LATE = (16, 24, 40, 80, 112, 192, 256)
Call = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Shape:
    """What is left when the width is taken out: proportions, depth, expansion."""

    channels: tuple[int, ...]
    repeats: tuple[int, ...]
    expansion: int
    last: int


SHAPES = {
    "MobileNetV2": Shape(EVEN, (1, 2, 3, 4, 3, 3, 1), 6, 1280),
    "deep, narrow end": Shape(EVEN, (1, 2, 3, 4, 3, 3, 1), 6, 640),
    "deep, expansion 4": Shape(EVEN, (1, 2, 3, 4, 3, 3, 1), 4, 640),
    "shallow": Shape(EVEN, (1, 1, 1, 2, 1, 2, 1), 6, 640),
    "shallow, expansion 4": Shape(EVEN, (1, 1, 1, 2, 1, 2, 1), 4, 640),
    "late": Shape(LATE, (1, 1, 1, 2, 2, 3, 1), 6, 480),
    "late, expansion 4": Shape(LATE, (1, 1, 1, 2, 2, 3, 1), 4, 480),
    "late, expansion 3": Shape(LATE, (1, 1, 2, 3, 2, 3, 1), 3, 480),
}


def widened(shape: Shape, budget: str) -> MobileNetSize:
    """The shape at that width, in multiples of 8, whose parameters come nearest to the budget."""

    def at(percent: int) -> MobileNetSize:
        def scaled(channels: int) -> int:
            return max(8, round(channels * percent / 800) * 8)

        return dataclasses.replace(
            SIZES[budget],  # its pyramid and its head
            stem=scaled(32),
            channels=tuple(scaled(channels) for channels in shape.channels),
            repeats=shape.repeats,
            expansion=shape.expansion,
            last=scaled(shape.last),
        )

    def distance(size: MobileNetSize) -> int:
        with torch.device("meta"):
            return abs(num_parameters(MobileNet(COCO.num_joints, size)) - BUDGETS[budget])

    return min({at(percent) for percent in range(15, 200)}, key=distance)


def num_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def multiply_adds(call: Call) -> int:
    """Of what the call computes: convolutions and matrix products."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops() // 2


def network_costs(build: Callable[[], PoseNetwork]) -> tuple[int, int]:
    """Parameters, and multiply-adds of one crop; nothing is computed."""
    with torch.device("meta"):
        network = build().eval()
        return num_parameters(network), multiply_adds(lambda: network(torch.zeros(1, 3, *CROP)))


def answering(network: PoseNetwork, batch: int) -> Call:
    """The network at work on so many crops, as it would be shipped."""
    fold_batch_norms(network.eval())
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    crops = torch.randn(batch, 3, *CROP).contiguous(memory_format=torch.channels_last)
    return lambda: network(crops)


def refining(channels: Sequence[int], candidates: int, batch: int) -> tuple[IgpGcn, Call]:
    """IGP-GCN of the study's settings, and it at work on so many people."""
    refiner = IgpGcn(COCO, channels, candidates=candidates).eval()
    pyramid = tuple(
        torch.randn(batch, count, CROP[0] // stride, CROP[1] // stride).contiguous(
            memory_format=torch.channels_last
        )
        for count, stride in zip(channels, (16, 8, 4), strict=True)
    )
    maps = torch.rand(batch, COCO.num_joints, CROP[0] // 4, CROP[1] // 4)
    places = torch.rand(batch, COCO.num_joints, candidates, 3)
    places = places * torch.tensor([CROP[1], CROP[0], 1.0])

    def call() -> None:
        start = refiner.choose(PoseFeatures(maps, pyramid), places, CROP)
        refiner(pyramid, start.keypoints_crop, start.scores, CROP)

    return refiner, call


def ratios(calls: dict[str, Call], over: dict[str, str], rounds: int) -> dict[str, float]:
    """Each call's time over that of the one named in ``over``, the median over the rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for number in range(rounds + 1):
            for name, call in calls.items():
                start = time.thread_time()
                call()
                if number:
                    seconds[name].append(time.thread_time() - start)
                elif "IGP-GCN" not in name:
                    print(f"  {name} is warm", flush=True)
            print(f"  round {number}/{rounds} done" if number else "  timing", flush=True)
    return {
        name: statistics.median(a / b for a, b in zip(own, seconds[over[name]], strict=True))
        for name, own in seconds.items()
    }


def measure(
    builds: dict[str, Callable[[], PoseNetwork]], refined: Sequence[str], batch: int, rounds: int
) -> dict[str, float]:
    """Times of the networks over the first one's, those of refiners over their student's."""
    print(f"batch {batch}", flush=True)
    calls: dict[str, Call] = {}
    over = dict.fromkeys(builds, next(iter(builds)))
    for name, build in builds.items():
        network = build()
        calls[name] = answering(network, batch)
        for candidates in CANDIDATES if name in refined else ():
            key = refiner_name(name, candidates)
            calls[key], over[key] = refining(network.pyramid_channels, candidates, batch)[1], name
    return ratios(calls, over, rounds)


def refiner_name(student: str, candidates: int) -> str:
    return f"{student}, IGP-GCN of {candidates}"


def shown(count: int) -> str:
    unit, letter = next(pair for pair in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if count >= pair[0])
    return f"{count / unit:.3g} {letter}"


def show(
    builds: dict[str, Callable[[], PoseNetwork]],
    refined: Sequence[str],
    found: dict[int, dict[str, float]],
) -> None:
    """Prints a row a network, then a row a refiner."""
    baseline, console = next(iter(builds)), Console(width=110)
    table = Table(title=f"time over {baseline}'s, {CROP[0]}x{CROP[1]}, one CPU thread")
    for heading in ("", "parameters", "multiply-adds", *(f"batch {batch}" for batch in found)):
        table.add_column(heading, justify="right" if heading else "left")
    for name, build in builds.items():
        costs = map(shown, network_costs(build))
        table.add_row(name, *costs, *(f"{times[name]:.3f}" for times in found.values()))
    console.print(table)
    if not refined:
        return
    table = Table(title="IGP-GCN, and its share of its student's time")
    headings = ("student", "candidates", "parameters", "multiply-adds")
    for heading in (*headings, *(f"batch {batch}" for batch in found)):
        table.add_column(heading, justify="left" if heading == "student" else "right")
    for name, candidates in itertools.product(refined, CANDIDATES):
        with torch.device("meta"):
            channels = builds[name]().pyramid_channels
        refiner, call = refining(channels, candidates, 1)
        costs = map(shown, (num_parameters(refiner), multiply_adds(call)))
        shares = (times[refiner_name(name, candidates)] for times in found.values())
        table.add_row(name, str(candidates), *costs, *(f"{100 * share:.1f} %" for share in shares))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="What models cost, beside one another.")
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[1, 32], help="crops at a time (default: 1 32)"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=30,
        help="at batch 1; at larger ones a tenth (default: 30)",
    )
    parser.add_argument("--shapes", action="store_true", help="shapes of students of equal size")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    builds: dict[str, Callable[[], PoseNetwork]] = {
        f"{name} {size}": functools.partial(build_model, name, size, COCO)
        for name, (_, sizes) in MODELS.items()
        for size in sizes
    }
    refined = [name for name in builds if name.startswith("mobile_net")]
    first = BASELINE
    if options.shapes:
        first, refined = SHAPES_BASELINE, []
        builds = {name: build for name, build in builds.items() if name.startswith("mobile_net")}
        for budget, (name, shape) in itertools.product(BUDGETS, SHAPES.items()):
            size = widened(shape, budget)
            builds[f"{budget}: {name}"] = functools.partial(MobileNet, COCO.num_joints, size)
    builds = {first: builds[first], **builds}
    found = {
        batch: measure(
            builds,
            refined,
            batch,
            options.rounds if batch == 1 else max(1, options.rounds // 10),
        )
        for batch in options.batch
    }
    show(builds, refined, found)


if __name__ == "__main__":
    main()
