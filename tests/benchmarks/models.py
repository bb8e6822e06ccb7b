"""Do the light students save time? ``python tests/benchmarks/models.py``, a quarter of an hour

Parameters, multiply-adds and time of all models, on one CPU thread and crops of 256x192, singly
and in batches of 32. Batch norms are folded, as in every inference runtime. In each round the
networks take turns; times are CPU time of the thread, and a ratio is the median over rounds of the
time relative to SimpleBaseline-R50's in the same round. The second table has IGP-GCN's time
relative to each light student's, without decoding. ``--shapes`` compares other shapes of the light
students, scaled to equal numbers of parameters, with MoveNet's ``lightning``; their sizes were
chosen by it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from benchmark import new_parser, new_table
from rich.console import Console
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
    """A network's shape apart from its width: proportions, depth, expansion."""

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
    """Scale the shape, in multiples of 8 channels, to the budget of parameters."""

    def at(percent: int) -> MobileNetSize:
        def scaled(channels: int) -> int:
            return max(8, round(channels * percent / 800) * 8)

        return dataclasses.replace(
            SIZES[budget],  # for its pyramid and head
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
    """Count the multiply-adds of a call's convolutions and matrix products."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops() // 2


def network_costs(build: Callable[[], PoseNetwork]) -> tuple[int, int]:
    """Return parameters, and multiply-adds per crop, without running the network."""
    with torch.device("meta"):
        network = build().eval()
        return num_parameters(network), multiply_adds(lambda: network(torch.zeros(1, 3, *CROP)))


def inference(network: PoseNetwork, batch: int) -> Call:
    """Return a call of the network on a batch of crops, folded as in deployment."""
    fold_batch_norms(network.eval())
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    crops = torch.randn(batch, 3, *CROP).contiguous(memory_format=torch.channels_last)
    return lambda: network(crops)


def refinement(channels: Sequence[int], candidates: int, batch: int) -> tuple[IgpGcn, Call]:
    """Return IGP-GCN with the study's settings, and a call of it on a batch of people."""
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
    """Return each call's time relative to that of call ``over[name]``, the median over rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for number in range(rounds + 1):
            for name, call in calls.items():
                start = time.thread_time()
                call()
                if number:
                    seconds[name].append(time.thread_time() - start)
                elif "IGP-GCN" not in name:
                    print(f"  warmed up {name}", flush=True)
            print(f"  round {number}/{rounds} done" if number else "  timing", flush=True)
    return {
        name: statistics.median(a / b for a, b in zip(times, seconds[over[name]], strict=True))
        for name, times in seconds.items()
    }


def measure(
    builds: dict[str, Callable[[], PoseNetwork]], refined: Sequence[str], batch: int, rounds: int
) -> dict[str, float]:
    """Return times of networks relative to the first one's, of refiners to their student's."""
    print(f"batch {batch}", flush=True)
    calls: dict[str, Call] = {}
    over = dict.fromkeys(builds, next(iter(builds)))
    for name, build in builds.items():
        network = build()
        calls[name] = inference(network, batch)
        for candidates in CANDIDATES if name in refined else ():
            key = refiner_name(name, candidates)
            _, calls[key] = refinement(network.pyramid_channels, candidates, batch)
            over[key] = name
    return ratios(calls, over, rounds)


def refiner_name(student: str, candidates: int) -> str:
    return f"{student}, IGP-GCN of {candidates}"


def with_unit(count: int) -> str:
    unit, letter = next(pair for pair in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if count >= pair[0])
    return f"{count / unit:.3g} {letter}"


def show(
    builds: dict[str, Callable[[], PoseNetwork]],
    refined: Sequence[str],
    found: dict[int, dict[str, float]],
) -> None:
    """Print a table of networks, then one of refiners."""
    baseline, console = next(iter(builds)), Console(width=110)
    batches = [f"batch {batch}" for batch in found]
    table = new_table(
        f"time relative to {baseline}, {CROP[0]}x{CROP[1]}, one CPU thread",
        "",
        "parameters",
        "multiply-adds",
        *batches,
    )
    for name, build in builds.items():
        costs = map(with_unit, network_costs(build))
        table.add_row(name, *costs, *(f"{times[name]:.3f}" for times in found.values()))
    console.print(table)
    if not refined:
        return
    table = new_table(
        "IGP-GCN, and its time relative to its student's",
        "student",
        "candidates",
        "parameters",
        "multiply-adds",
        *batches,
    )
    for name, candidates in itertools.product(refined, CANDIDATES):
        with torch.device("meta"):
            channels = builds[name]().pyramid_channels
        refiner, call = refinement(channels, candidates, 1)
        costs = map(with_unit, (num_parameters(refiner), multiply_adds(call)))
        shares = (times[refiner_name(name, candidates)] for times in found.values())
        table.add_row(name, str(candidates), *costs, *(f"{100 * share:.1f} %" for share in shares))
    console.print(table)


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[1, 32], help="crops at a time (default 1 32)"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=30,
        help="at batch 1; a tenth of them at larger batches (default 30)",
    )
    parser.add_argument("--shapes", action="store_true", help="compare other shapes of students")
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
