"""Do stored crops and targets save time? ``python tests/benchmarks/caching.py epochs|study``

``epochs`` compares an epoch of stage 1 and of stage 2 with stored targets to one with a teacher
that predicts online (teacher.mode=online). The teacher's forward pass costs about ten times the
student's; its measured cost is printed. Images are synthetic.

``study`` compares all trials of the built-in study, by plain calls, with all stores and with none:
then the teacher predicts online, and every crop, in every epoch and evaluation, is cut from its
image. Trials are not pruned, so that both do the same work. The teacher is trained once, and its
time counts on both sides or on neither. Making the stores, once for all trials, counts in a row of
its own: cropping, predicting the targets, and measuring their difference from online ones.

Seconds are CPU time of this process, so that other work on the machine does not count.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from benchmark import ignore_row, new_parser, new_table, prepare_quietly
from numpy.typing import NDArray
from rich.console import Console

from search_spaces.space import load_space
from study.cache.crop_store import CropStore, open_crop_store
from study.config.compose import compose, flatten, to_plain, with_values
from study.config.derived import resolve
from study.config.schema import StudyConfig
from study.data.coco_json import load_document
from study.data.crops import read_image, stored_size, warp
from study.storage.checkpoint import Checkpoints, Row, best_row
from study.storage.paths import TARGETS
from study.teachers import make
from study.teachers.adapters import open_network
from study.teachers.identity import teacher_folder
from study.teachers.make import is_ready, make_teacher, open_online_teacher
from study.training import training_data
from study.training.loop import Progress, run_stage
from study.training.networks import build_distill_task, build_refine_task, build_refiner
from study.training.training_data import TrainingData
from study.trial import Trial, run_trial, teacher_spec
from study.workers import Workers, configure_process

EPOCHS = (
    "data.input_size=[128,96]",
    "data.num_train_images=150",
    "data.num_val_images=20",
    "student.size=large",
    "teacher.name=simple_baseline",
    "teacher.size=r50",
    "teacher.epochs=1",
    "teacher.batch_size=32",
    "distill.batch_size=32",
    "teacher.optimizer.lr=1e-4",
    "distill.optimizer.lr=1e-3",
    "refine.optimizer.lr=1e-3",
)


def timed(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def forward_seconds(network: Any, size: tuple[int, int]) -> float:
    """Time a forward pass of 32 crops, the fastest of five."""
    crops = torch.rand(32, 3, *size) * 255
    network = network.eval()
    with torch.inference_mode():
        return min(timed(lambda: network.predict(crops)) for _ in range(5))


def epochs(storage: str, rounds: int) -> list[tuple[str, float, float]]:
    """Return name and seconds, online and stored, of an epoch of each stage."""
    config = compose([f"storage={storage}", *EPOCHS])
    resolved = resolve(config)
    spec = teacher_spec(config, resolved)
    data = prepare_quietly(config, resolved)
    workers = Workers(torch.device("cpu"))
    make_teacher(spec, config.student, data, workers, ignore_row)
    folder = teacher_folder(spec, data)
    stored = TrainingData.open(data, resolved, workers, folder / TARGETS)
    online_teacher = open_online_teacher(spec, data, folder, workers)
    online = dataclasses.replace(stored, targets=online_teacher)
    distilled = build_distill_task(config.student, config.distill, config.trial, resolved, seed=0)
    # A second one, since stage 2 freezes its student in place.
    frozen = build_distill_task(config.student, config.distill, config.trial, resolved, seed=0)
    refiner = build_refiner(config.refine, resolved.skeleton, frozen.student.pyramid_channels)
    refined = build_refine_task(config.refine, frozen, refiner)
    size = resolved.input_size
    network = open_network(spec)[0]
    cost = forward_seconds(network, size) / forward_seconds(distilled.student, size)
    print(f"a forward pass of the teacher costs {cost:.1f} times the student's")

    def epoch(task: Any, data: TrainingData) -> float:
        settings = config.distill if task is distilled else config.refine
        stage = data.stage(task.name, settings, config.distill.augment, task.codec.frame, seed=0)
        stage = dataclasses.replace(stage, epochs=1, evaluate=lambda _: {})
        return timed(lambda: run_stage(task, stage, Progress(0, 0.0, None), workers, finish))

    def finish(row: Row, task: Any, optimizer: Any) -> bool:
        return False

    found = []
    for name, task in (("stage 1", distilled), ("stage 2", refined)):
        turns = [(epoch(task, online), epoch(task, stored)) for _ in range(rounds)]
        with_online, with_stored = (
            float(np.median(column)) for column in zip(*turns, strict=True)
        )
        found.append((f"an epoch of {name}", with_online, with_stored))
    return found


@dataclasses.dataclass(frozen=True)
class UncachedCrops(CropStore):
    """A store without pixels, which cuts each crop from its image whenever it is read."""

    @classmethod
    def of(cls, store: CropStore, paths: dict[int, Path]) -> UncachedCrops:
        """Copy the store but for its pixels.

        Args:
            store: has the people.
            paths: their images, by image id.
        """
        uncached = cls(**{f.name: getattr(store, f.name) for f in dataclasses.fields(store)})
        object.__setattr__(uncached, "paths", [paths[int(image)] for image in store.image_ids])
        return uncached

    def crops(self, rows: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        size = stored_size(self.input_size)
        paths: list[Path] = self.paths  # type: ignore[attr-defined]
        return [warp(read_image(paths[row]), self.image_to_stored[row], size) for row in rows]


def images_of(config: StudyConfig) -> dict[int, Path]:
    """Map image ids, which differ between train and val, to the synthetic images."""
    root, paths = Path(config.data.root), {}
    for split in (config.data.train, config.data.val):
        for image in load_document(root / split.annotations)["images"]:
            paths[int(image["id"])] = root / split.images / image["file_name"]
    return paths


def study(storage: str, trials: int) -> list[tuple[str, float, float]]:
    """Return seconds without and with stores: of trials, plus making stores, plus the teacher.

    Each trial is run both ways before the next one, so that changes in the machine's speed affect
    both. A teacher that the storage already has is not counted.
    """
    config = compose([f"storage={storage}"])
    workers = Workers(torch.device("cpu"))
    resolved = resolve(config)
    spec = teacher_spec(config, resolved)
    data = prepare_quietly(config, resolved)
    paths, folder = images_of(config), teacher_folder(spec, data)

    def seconds_of_teacher() -> float:
        return timed(lambda: make_teacher(spec, config.student, data, workers, ignore_row))

    made = None if is_ready(folder) else seconds_of_teacher()
    predicted = seconds_of_teacher()  # a trained teacher only predicts its targets again
    with tempfile.TemporaryDirectory() as other:
        empty = compose([f"storage={other}", f"data.root={config.data.root}"])
        cropped = timed(lambda: prepare_quietly(empty, resolve(empty), lambda _: None))
    print(f"cropping took {cropped:.1f} s, predicting targets {predicted:.1f} s", flush=True)

    def open_uncached(path: Path) -> CropStore:
        return UncachedCrops.of(open_crop_store(path), paths)

    ways = {"none": ("online", open_uncached), "all stores": ("cached", open_crop_store)}
    space, defaults = load_space(config.search_space), flatten(to_plain(config))
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampled = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    scores: dict[str, list[float]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(trials):
            values = space.suggest(sampled.ask(), defaults)
            for way, (mode, opener) in ways.items():
                training_data.open_crop_store = opener  # type: ignore[attr-defined]
                make.open_crop_store = opener  # type: ignore[attr-defined]
                changed = with_values(config, {**values, "teacher.mode": mode})
                out = Path(scratch) / way / str(number)
                trial = Trial(number, changed, resolve(changed), data, out, folder / TARGETS)
                seconds[way].append(timed(lambda: run_trial(trial, workers, ignore_row)))  # noqa: B023
                last = Checkpoints(out).last()
                assert last is not None
                scores[way].append(100 * best_row(last.rows)["val_ap"])
                result = f"AP {scores[way][-1]:.1f}, {seconds[way][-1]:.1f} s"
                print(f"trial {number} with {way}: {result}", flush=True)
    for way, reached in scores.items():
        print(f"with {way} the trials reach AP {np.mean(reached):.1f} in the mean")
    none, stored = (sum(seconds[way]) for way in ways)
    rows = [(f"{trials} trials", none, stored)]
    stored += cropped + predicted
    rows.append(("and making the stores", none, stored))
    if made is not None:
        trained = made - predicted
        rows.append(("and training the teacher", none + trained, stored + trained))
    return rows


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("what", choices=("epochs", "study"), help="the comparison, see the script")
    parser.add_argument(
        "--storage", help="folder of data and teacher (default: a temporary folder)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="epochs of each kind (default 3)")
    parser.add_argument("--trials", type=int, default=12, help="trials of the study (default 12)")
    options = parser.parse_args()
    configure_process(1)
    with tempfile.TemporaryDirectory() as scratch:
        storage = options.storage or scratch
        if options.what == "epochs":
            rows = epochs(storage, options.rounds)
        else:
            rows = study(storage, options.trials)
    table = new_table("seconds of CPU, one thread", "what", "nothing stored", "stored", "ratio")
    for name, without, stored in rows:
        table.add_row(name, f"{without:.1f}", f"{stored:.1f}", f"{without / stored:.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
