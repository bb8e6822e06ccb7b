"""What it saves to compute once per study: ``python tests/benchmarks/caching.py epochs|study``.

``epochs``: an epoch of stage 1 and of stage 2 taught by stored answers, against one in which the
teacher is asked live (make.mode=online). The teacher's forward pass costs about ten times the
student's; what it really costs here is printed. Images are drawn people's.

``study``: all trials of the built-in study, by plain calls, with every store, against the same
with none: the teacher is asked live, and every crop, of every epoch and every scoring, is cut anew
out of its image. Trials are not pruned, so that both do the same. The teacher is trained once,
as in any toolbox: what that took counts on either side, or on none. What making the stores takes,
once for all trials, counts against them in a row of its own: cropping, asking the make, and
measuring how far what is stored is from what it says live.

Seconds are this process's own, so that nobody else on the machine counts.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import optuna
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from search_spaces.space import load_space
from study.cache.crop_store import CropStore, open_crop_store
from study.cache.prepare import prepare_data
from study.config.compose import compose, flatten, to_plain, with_values
from study.config.derived import resolve
from study.config.schema import StudyConfig
from study.data.coco_json import load_document
from study.data.crops import read_image, stored_size, warp
from study.storage.checkpoint import Checkpoints, Row, best_row
from study.storage.paths import TARGETS
from study.teachers.adapters import open_network
from study.teachers.make import is_ready, make_teacher, open_online_teacher, teacher_folder
from study.training import training_data
from study.training.loop import Progress, run_stage
from study.training.networks import build_distill_task, build_refine_task, build_refiner
from study.training.training_data import TrainingData
from study.trial import Trial, run_trial, teacher_spec
from study.workers import Workers, configure_process

EPOCHS = (
    *("data.input_size=[128,96]", "data.num_train_images=150", "data.num_val_images=20"),
    *("student.size=large", "teacher.name=simple_baseline", "teacher.size=r50"),
    *("teacher.epochs=1", "teacher.batch_size=32", "distill.batch_size=32"),
    *("teacher.optimizer.lr=1e-4", "distill.optimizer.lr=1e-3", "refine.optimizer.lr=1e-3"),
)


def quiet(row: Row) -> bool:
    return False


def timed(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def forward_seconds(network: Any, size: tuple[int, int]) -> float:
    """Of a batch of 32, the fastest of five."""
    crops = torch.rand(32, 3, *size) * 255
    network = network.eval()
    with torch.inference_mode():
        return min(timed(lambda: network.predict(crops)) for _ in range(5))


def epochs(storage: str, rounds: int) -> list[tuple[str, float, float]]:
    """Name and seconds, live and stored, of an epoch of either stage."""
    config = compose([f"storage={storage}", *EPOCHS])
    resolved = resolve(config)
    spec = teacher_spec(config, resolved)
    data = prepare_data(config.data, resolved, lambda _: lambda *_: None, print)
    workers = Workers(torch.device("cpu"))
    make_teacher(spec, config.student, data, workers, quiet)
    folder = teacher_folder(spec, data)
    stored = TrainingData.open(data, resolved, workers, folder / TARGETS)
    asking = open_online_teacher(spec, data, folder, workers)
    asked = dataclasses.replace(stored, targets=asking)
    distilled = build_distill_task(config.student, config.distill, config.trial, resolved, seed=0)
    # Of its own, since stage 2 freezes it in place.
    frozen = build_distill_task(config.student, config.distill, config.trial, resolved, seed=0)
    refiner = build_refiner(config.refine, resolved.skeleton, frozen.student.pyramid_channels)
    refined = build_refine_task(config.refine, frozen, refiner)
    size = resolved.input_size
    network = open_network(spec)[0]
    cost = forward_seconds(network, size) / forward_seconds(distilled.student, size)
    print(f"a forward pass of the teacher costs {cost:.1f} times the student's")

    def epoch(task: Any, ground: TrainingData) -> float:
        settings = config.distill if task is distilled else config.refine
        stage = ground.stage(task.name, settings, config.distill.augment, task.codec.frame, seed=0)
        stage = dataclasses.replace(stage, epochs=1, evaluate=lambda _: {})
        return timed(lambda: run_stage(task, stage, Progress(0, 0.0, None), workers, finish))

    def finish(row: Row, task: Any, optimizer: Any) -> bool:
        return False

    found = []
    for name, task in (("stage 1", distilled), ("stage 2", refined)):
        turns = [(epoch(task, asked), epoch(task, stored)) for _ in range(rounds)]
        live, kept = (float(np.median(column)) for column in zip(*turns, strict=True))
        found.append((f"an epoch of {name}", live, kept))
    return found


@dataclasses.dataclass(frozen=True)
class ImagesRenewed(CropStore):
    """A store whose pixels are not kept: each crop is cut out of its image when asked for."""

    @classmethod
    def of(cls, store: CropStore, paths: dict[int, Path]) -> ImagesRenewed:
        anew = cls(**{f.name: getattr(store, f.name) for f in dataclasses.fields(store)})
        object.__setattr__(anew, "paths", [paths[int(image)] for image in store.image_ids])
        return anew

    def crops(self, rows: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        size = stored_size(self.input_size)
        paths: list[Path] = self.paths  # type: ignore[attr-defined]
        return [warp(read_image(paths[row]), self.image_to_stored[row], size) for row in rows]


def images_of(config: StudyConfig) -> dict[int, Path]:
    """The drawn images by image id; those of train and val have ids of their own."""
    root, found = Path(config.data.root), {}
    for split in (config.data.train, config.data.val):
        for image in load_document(root / split.annotations)["images"]:
            found[int(image["id"])] = root / split.images / image["file_name"]
    return found


def study(storage: str, trials: int) -> list[tuple[str, float, float]]:
    """Seconds with no store and with all: of trials, with making the stores, training the teacher.

    Each trial is run both ways before the next one, so that a machine that slows down slows both.
    A teacher that the storage has already is not counted.
    """
    config = compose([f"storage={storage}"])
    workers = Workers(torch.device("cpu"))
    resolved = resolve(config)
    spec = teacher_spec(config, resolved)
    data = prepare_data(config.data, resolved, lambda _: lambda *_: None, print)
    paths, folder = images_of(config), teacher_folder(spec, data)

    def make() -> float:
        return timed(lambda: make_teacher(spec, config.student, data, workers, quiet))

    made = None if is_ready(folder) else make()
    asked = make()  # of a teacher that is trained, only the asking is done again
    with tempfile.TemporaryDirectory() as other:
        anew = compose([f"storage={other}", f"data.root={config.data.root}"])
        cropped = timed(
            lambda: prepare_data(
                anew.data, resolve(anew), lambda _: lambda *_: None, lambda _: None
            )
        )
    print(f"cropping took {cropped:.1f} s, asking the teacher {asked:.1f} s", flush=True)

    def cut_anew(path: Path) -> CropStore:
        return ImagesRenewed.of(open_crop_store(path), paths)

    ways = {"none": ("online", cut_anew), "all stores": ("cached", open_crop_store)}
    space, defaults = load_space(config.search_space), flatten(to_plain(config))
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    drawn = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    scores: dict[str, list[float]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(trials):
            chosen = space.suggest(drawn.ask(), defaults)
            for way, (mode, opener) in ways.items():
                training_data.open_crop_store = make.open_crop_store = opener  # type: ignore[attr-defined]
                own = with_values(config, {**chosen, "teacher.mode": mode})
                kept = Path(scratch) / way / str(number)
                trial = Trial(number, own, resolve(own), data, kept, folder / TARGETS)
                seconds[way].append(timed(lambda: run_trial(trial, workers, quiet)))  # noqa: B023
                last = Checkpoints(kept).last()
                assert last is not None
                scores[way].append(100 * best_row(last.rows)["val_ap"])
                what = f"AP {scores[way][-1]:.1f}, {seconds[way][-1]:.1f} s"
                print(f"trial {number} with {way}: {what}", flush=True)
    for way, reached in scores.items():
        print(f"with {way} the trials reach AP {np.mean(reached):.1f} in the mean")
    none, stored = (sum(seconds[way]) for way in ways)
    rows = [(f"{trials} trials", none, stored)]
    stored += cropped + asked
    rows.append(("and making the stores", none, stored))
    if made is not None:
        trained = made - asked
        rows.append(("and training the teacher", none + trained, stored + trained))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=("epochs", "study"))
    parser.add_argument("--storage", help="of data and teacher (default: a temporary folder)")
    parser.add_argument("--rounds", type=int, default=3, help="epochs of each kind (default 3)")
    parser.add_argument("--trials", type=int, default=12, help="of the study (default 12)")
    options = parser.parse_args()
    configure_process(1)
    with tempfile.TemporaryDirectory() as scratch:
        storage = options.storage or scratch
        if options.what == "epochs":
            rows = epochs(storage, options.rounds)
        else:
            rows = study(storage, options.trials)
    table = Table(title="seconds of CPU, one thread")
    for heading in ("what", "nothing stored", "stored", "ratio"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for name, anew, kept in rows:
        table.add_row(name, f"{anew:.1f}", f"{kept:.1f}", f"{anew / kept:.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
