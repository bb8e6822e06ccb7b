"""How fast shapes of equal size are: ``python tests/benchmarks/students.py``, some minutes.

For each number of parameters that a student may have, several shapes of ``mobile_net`` are widened
until they have so many, and timed against MoveNet's ``lightning`` on one CPU thread, 256x192
crops, one at a time and 32 together. Batch norms are folded, as every inference runtime does. All
networks are timed in turn, round after round, and a ratio is the median over the rounds of the
time over lightning's in the same round: other load on the machine changes both alike. The sizes
``small``, ``medium`` and ``large`` are in the table too.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.utils.fusion import fuse_conv_bn_eval  # noqa: E402

from models.mobile_net import SIZES, MobileNet, MobileNetSize  # noqa: E402

BASELINE = "lightning"
CROP = (256, 192)
JOINTS = 17
BATCHES = (1, 32)
BUDGETS = {"small": 300_000, "medium": 1_000_000, "large": 2_300_000}
EVEN = (16, 24, 32, 64, 96, 160, 320)
LATE = (16, 24, 40, 80, 112, 192, 256)


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

    sizes = {at(percent) for percent in range(15, 200)}
    return min(sizes, key=lambda size: abs(num_parameters(size) - BUDGETS[budget]))


def num_parameters(size: MobileNetSize) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in MobileNet(JOINTS, size).parameters())


def multiply_adds(size: MobileNetSize) -> int:
    """Of one crop, convolutions alone."""
    total = 0

    def count(module: nn.Module, _: object, out: torch.Tensor) -> None:
        nonlocal total
        assert isinstance(module, nn.Conv2d)
        total += out.shape[2] * out.shape[3] * module.weight.numel()

    with torch.device("meta"):
        network = MobileNet(JOINTS, size)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(count)
        network(torch.zeros(1, 3, *CROP))
    return total


def ready(size: MobileNetSize) -> nn.Module:
    """The network as it would be shipped: batch norms folded, in the layout that is fastest."""
    network = MobileNet(JOINTS, size).eval()
    for layers in [m for m in network.modules() if isinstance(m, nn.Sequential)]:
        for index, layer in enumerate(layers):
            if isinstance(layer, nn.BatchNorm2d):
                layers[index - 1] = fuse_conv_bn_eval(layers[index - 1], layer)
                layers[index] = nn.Identity()
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def ratios(sizes: dict[str, MobileNetSize], batch: int, rounds: int) -> dict[str, float]:
    """Each network's time over the baseline's, the median over the rounds."""
    networks = {name: ready(size) for name, size in sizes.items()}
    crops = torch.randn(batch, 3, *CROP).contiguous(memory_format=torch.channels_last)
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    with torch.inference_mode():
        for _ in range(rounds + 1):
            for name, network in networks.items():
                start = time.perf_counter()
                network(crops)
                seconds[name].append(time.perf_counter() - start)
    first = seconds[BASELINE][1:]  # without the warm-up
    return {
        name: statistics.median(a / b for a, b in zip(own[1:], first, strict=True))
        for name, own in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Time shapes of students of equal size.")
    parser.add_argument("--rounds", type=int, default=60, help="of batch 32 a tenth (default 60)")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    sizes = {BASELINE: SIZES[BASELINE]}
    for budget in BUDGETS:
        sizes |= {f"{budget}: {name}": widened(shape, budget) for name, shape in SHAPES.items()}
        sizes[budget] = SIZES[budget]
    found = {
        batch: ratios(sizes, batch, rounds if batch == 1 else max(3, rounds // 10))
        for batch in BATCHES
    }
    show(sizes, found)


def show(sizes: dict[str, MobileNetSize], found: dict[int, dict[str, float]]) -> None:
    """Prints a row a network."""
    table = Table(title=f"time over {BASELINE}'s, {CROP[0]}x{CROP[1]}, one CPU thread")
    for heading in ("", "parameters", "multiply-adds", *(f"batch {batch}" for batch in found)):
        table.add_column(heading, justify="right" if heading else "left")
    for name, size in sizes.items():
        table.add_row(
            name,
            f"{num_parameters(size):,}",
            f"{multiply_adds(size) / 1e6:.0f} M",
            *(f"{by_name[name]:.2f}" for by_name in found.values()),
            end_section=name in (BASELINE, *BUDGETS),
        )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
