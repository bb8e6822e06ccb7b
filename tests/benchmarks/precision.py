"""Are bf16, channels-last and compiling faster? ``python tests/benchmarks/precision.py``

Images/s of stage 1's training step (without a teacher) and of inference, relative to uncompiled
fp32 in channels-last. All variants take turns, so that other work on the machine affects them
equally; the result is the median over turns. On a CPU, times are CPU time of one thread. Compiling
needs a C++ compiler. A study compiles only the training; compiled inference is for comparison.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from benchmark import new_parser, new_table
from rich.console import Console

from models.pose_features import computes_in_bf16
from study.config.compose import compose, with_values
from study.config.derived import resolve
from study.config.schema import StudyConfig
from study.teachers.make import build_task
from study.training.batches import Batch
from study.training.distill import DistillTask
from study.training.loop import combine
from study.training.networks import BACKEND
from study.trial import teacher_spec
from study.workers import Workers

SIZES = ("tiny", "teacher")
INPUTS = ((96, 64), (256, 192))
WORK = ("training", "inference")
PEOPLE = {(96, 64): 32, (256, 192): 16}
"""Batch size by the size of crops."""


@dataclass(frozen=True)
class Variant:
    """A combination of precision, memory format and compilation."""

    precision: str
    channels_last: str
    is_compiled: bool

    @property
    def name(self) -> str:
        parts = [self.precision]
        parts += ["contiguous"] if self.channels_last == "false" else []
        parts += ["compiled"] if self.is_compiled else []
        return ", ".join(parts)


VARIANTS = (
    Variant("fp32", "true", False),
    Variant("bf16", "true", False),
    Variant("fp32", "false", False),
    Variant("bf16", "false", False),
    Variant("fp32", "true", True),
    Variant("bf16", "true", True),
)
Step = Callable[[], object]


def build(config: StudyConfig, variant: Variant, device: torch.device) -> DistillTask:
    """Build a network and its training from ground truth only."""
    values = {"trial.precision": variant.precision, "trial.channels_last": variant.channels_last}
    changed = with_values(config, values)
    return build_task(teacher_spec(changed, resolve(changed))).to(device)


def training_step(task: DistillTask, batch: Batch, workers: Workers) -> Step:
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-3, fused=True)
    task.train()

    def step() -> None:
        loss, _ = combine(task(batch), {"truth": 1.0}, workers)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def inference_step(
    task: DistillTask, batch: Batch, variant: Variant, *, is_compiled: bool
) -> Step:
    """Return a call as in an estimator; a compiled network is called directly.

    ``predict`` would run it uncompiled, since it is in eval mode.
    """
    estimator = task.eval().estimator()
    network, codec = task.student, task.codec
    is_bf16 = computes_in_bf16(variant.precision, batch.crops.device)

    def step() -> None:
        with torch.inference_mode():
            if not is_compiled:
                estimator(batch.crops)
                return
            inputs = network.pixels.normalize(batch.crops)
            inputs = inputs.contiguous(memory_format=network.memory_format)
            with torch.autocast(batch.crops.device.type, torch.bfloat16, enabled=is_bf16):
                features = network(inputs)
            codec.decode(features.heatmaps)

    return step


def random_batch(config: StudyConfig, device: torch.device) -> Batch:
    """Return noise with all joints labeled."""
    height, width = config.data.input_size
    count = PEOPLE[height, width]
    torch.manual_seed(0)
    return Batch(
        crops=torch.rand(count, 3, height, width) * 255,
        keypoints_crop=torch.rand(count, 17, 2) * torch.tensor((width, height)),
        visibility=torch.full((count, 17), 2),
        areas_crop=torch.full((count,), height * width / 2),
        neighbor_crop=torch.zeros(count, 17, 2),
        neighbor_visibility=torch.zeros(count, 17),
        teacher_modes=None,
        teacher_mask=None,
        teacher_relation=None,
    ).to(device)


def time_all(
    work: str, config: StudyConfig, device: torch.device, variants: list[Variant], turns: int
) -> tuple[dict[Variant, float], dict[Variant, float]]:
    """Return the seconds of a step of each variant, and of its first, which compiles."""
    batch = random_batch(config, device)
    steps: dict[Variant, Step] = {}
    first: dict[Variant, float] = {}
    for variant in variants:
        task = build(config, variant, device)
        if work == "training":
            steps[variant] = training_step(task, batch, Workers(device))
        else:
            compiled = variant.is_compiled
            steps[variant] = inference_step(task, batch, variant, is_compiled=compiled)
        if variant.is_compiled:
            task.student.compile(backend=BACKEND, dynamic=False)
        start = time.perf_counter()
        steps[variant]()
        first[variant] = time.perf_counter() - start
        steps[variant]()
    seconds: dict[Variant, list[float]] = {variant: [] for variant in variants}
    for _ in range(turns):
        for variant, step in steps.items():
            seconds[variant].append(seconds_of(step, device))
    return {variant: statistics.median(turn) for variant, turn in seconds.items()}, first


def seconds_of(step: Step, device: torch.device) -> float:
    if device.type == "cpu":
        start = time.process_time()
        step()
        return time.process_time() - start
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--turns", type=int, default=15, help="of each variant (default 15)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--work", nargs="+", choices=WORK, default=WORK, help="default: both")
    parser.add_argument(
        "--sizes", nargs="+", choices=SIZES, default=SIZES, help="of mobile_net (default: both)"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave out compiled variants")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(options.device)
    variants = [v for v in VARIANTS if not (options.no_compile and v.is_compiled)]
    console = Console(width=120)
    for work in options.work:
        table = new_table(
            f"{work}: images/s, and ratios to it (first step of compiled, s)",
            "network",
            "crops",
            *(variant.name for variant in variants),
            num_left=0,
        )
        for size in options.sizes:
            for height, width in INPUTS:
                values = {"teacher.size": size, "data.input_size": [height, width]}
                config = with_values(compose(), values)
                seconds, first = time_all(work, config, device, variants, options.turns)
                base = seconds[variants[0]]
                cells = [f"{PEOPLE[height, width] / base:.0f}"]
                for variant in variants[1:]:
                    compiling = f" ({first[variant]:.0f})" if variant.is_compiled else ""
                    cells.append(f"{base / seconds[variant]:.2f}{compiling}")
                table.add_row(size, f"{height}x{width}", *cells)
                console.print(f"{work} {size} {height}x{width}: {' | '.join(cells)}")
        console.print(table)


if __name__ == "__main__":
    main()
