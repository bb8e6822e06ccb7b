"""Is the crop store faster than image files? ``python tests/benchmarks/data.py --data FOLDER``

Training samples per second of one thread, at 256x192: from the crop store with augmentation,
targets and normalization, compared with a classic pipeline, which reads, warps and normalizes each
person's image and renders its heatmaps, one person at a time. Both take turns. Times are CPU time
of the thread, so that other work on the machine does not count.

--official DIR adds the official HRNet's dataset class; DIR is its repository.
"""

from __future__ import annotations

import runpy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import torch
from benchmark import new_parser, new_table
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from models.build import build_codec
from models.pose_features import IMAGENET
from models.skeleton import SKELETONS, Skeleton
from study.cache.crop_store import CropStore, StoreSpec, make_crop_store, open_crop_store
from study.config.schema import AugmentConfig
from study.data.annotations import read_table
from study.data.crops import image_to_crop_affine
from study.data.people import People, build_people
from study.training.batches import TrainingPeople, training_batches
from study.workers import Workers, configure_process

SIZE, CELLS, SIGMA = (256, 192), (64, 48), 2
BATCH = 64
OFFICIAL = AugmentConfig(
    scale=0.35, rotation=40.0, flip=0.5, half_body=0.3, color=0.0, erase=0.0, occlude=0.0
)
COLORED = AugmentConfig(
    scale=0.35, rotation=40.0, flip=0.5, half_body=0.3, color=0.2, erase=0.2, occlude=0.2
)
MEAN, STD = (torch.tensor(v).view(3, 1, 1) / 255 for v in (IMAGENET.mean, IMAGENET.std))


class ClassicDataset:
    """Reads, warps and normalizes one person at a time and renders each joint's Gaussian."""

    def __init__(self, people: People, skeleton: Skeleton) -> None:
        self.people = people
        self.skeleton = skeleton
        self.frame = build_codec("msra", SIZE, SIGMA).frame

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        people, rng = self.people, np.random
        image = cv2.imread(str(people.image_paths[row]), cv2.IMREAD_COLOR)
        assert image is not None
        image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
        box, joints = people.boxes[row].copy(), people.keypoints_image[row].copy()
        visibility = people.visibility[row]
        scale = float(np.clip(1 + 0.35 * rng.randn(), 0.65, 1.35))
        angle = float(np.clip(40 * rng.randn(), -80, 80)) if rng.rand() < 0.6 else 0.0
        if visibility.astype(bool).sum() > 8 and rng.rand() < 0.3:
            box = self._half(joints, visibility)
        if rng.rand() < 0.5:
            width = image.shape[1]
            image = image[:, ::-1]
            order = list(self.skeleton.flip_order)
            joints, visibility = joints[order], visibility[order]
            joints[:, 0] = width - 1 - joints[:, 0]
            box[0] = width - 1 - box[0] - box[2]
        affine = image_to_crop_affine(box[None], self.frame, scale=scale, rotation=angle)[0]
        crop = cv2.warpAffine(image, affine, (SIZE[1], SIZE[0]), flags=cv2.INTER_LINEAR)
        pixels = torch.from_numpy(crop.transpose(2, 0, 1)).contiguous().float().div(255)
        pixels = pixels.sub_(MEAN).div_(STD)
        joints = joints @ affine[:, :2].T + affine[:, 2]
        heatmaps, weights = self._heatmaps(joints, visibility)
        return pixels, torch.from_numpy(heatmaps), torch.from_numpy(weights)

    def _half(
        self, joints: NDArray[np.float64], visibility: NDArray[np.uint8]
    ) -> NDArray[np.float64]:
        upper = np.isin(np.arange(len(visibility)), self.skeleton.upper_body)
        halves = [joints[(visibility > 0) & half] for half in (upper, ~upper)]
        preferred, other = halves if np.random.randn() < 0.5 else halves[::-1]
        half = preferred if len(preferred) > 2 else other
        extent = 1.5 / 1.25 * np.ptp(half, axis=0)
        return np.concatenate((half.mean(axis=0) - extent / 2, extent))

    def _heatmaps(
        self, joints: NDArray[np.float64], visibility: NDArray[np.uint8]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        height, width = CELLS
        reach = 3 * SIGMA
        maps = np.zeros((len(joints), height, width), np.float32)
        weights = (visibility > 0).astype(np.float32)
        span = np.arange(2 * reach + 1, dtype=np.float32) - reach
        for joint in range(len(joints)):
            x, y = (int(value / 4 + 0.5) for value in joints[joint])
            left, top, right, bottom = x - reach, y - reach, x + reach + 1, y + reach + 1
            if left >= width or top >= height or right < 0 or bottom < 0:
                weights[joint] = 0
                continue
            blob = np.exp(-(span**2 + span[:, None] ** 2) / (2 * SIGMA**2))
            if weights[joint] > 0.5:
                ys, xs = (
                    slice(max(0, top), min(bottom, height)),
                    slice(max(0, left), min(right, width)),
                )
                maps[joint, ys, xs] = blob[
                    ys.start - top : ys.stop - top, xs.start - left : xs.stop - left
                ]
        return maps, weights


def official_dataset(folder: Path, people: People, skeleton: Skeleton) -> Any:
    """Build the official HRNet's dataset class for the same people."""
    sys.path.insert(0, str(folder / "lib"))
    for name, kind in (("float", float), ("int", int)):
        setattr(np, name, kind)  # removed from NumPy, still used there
    # From its file, since its package imports more than this class needs.
    file = folder / "lib" / "dataset" / "JointsDataset.py"
    dataset_class = runpy.run_path(str(file))["JointsDataset"]

    settings = SimpleNamespace(
        DATASET=SimpleNamespace(
            DATA_FORMAT="jpg", SCALE_FACTOR=0.35, ROT_FACTOR=40, FLIP=True, PROB_HALF_BODY=0.3,
            NUM_JOINTS_HALF_BODY=8, COLOR_RGB=True,
        ),
        MODEL=SimpleNamespace(
            TARGET_TYPE="gaussian", IMAGE_SIZE=np.array([192, 256]),
            HEATMAP_SIZE=np.array([48, 64]), SIGMA=SIGMA,
        ),
        LOSS=SimpleNamespace(USE_DIFFERENT_JOINTS_WEIGHT=False),
        OUTPUT_DIR="",
    )  # fmt: skip

    def transform(crop: NDArray[np.uint8]) -> Tensor:
        pixels = torch.from_numpy(crop.transpose(2, 0, 1)).contiguous().float().div(255)
        return pixels.sub_(MEAN).div_(STD)

    dataset = dataset_class(settings, "", "train", True, transform)
    dataset.num_joints, dataset.flip_pairs = skeleton.num_joints, skeleton.flip_pairs
    dataset.upper_body_ids = skeleton.upper_body
    dataset.aspect_ratio, dataset.joints_weight = 192 / 256, 1
    frame = build_codec("msra", SIZE, SIGMA).frame
    zooms = image_to_crop_affine(people.boxes, frame)[:, 0, 0]
    for row in range(len(people)):
        left, top, width, height = people.boxes[row]
        scale = np.array([192, 256], np.float32) / zooms[row] / dataset.pixel_std
        joints = np.zeros((skeleton.num_joints, 3))
        joints[:, :2] = people.keypoints_image[row]
        visible = np.repeat((people.visibility[row] > 0).astype(float)[:, None], 3, axis=1)
        center = np.array([left + width / 2, top + height / 2], np.float32)
        dataset.db.append(
            {
                "image": str(people.image_paths[row]), "center": center, "scale": scale,
                "joints_3d": joints, "joints_3d_vis": visible, "filename": "", "imgnum": 0,
            }
        )  # fmt: skip
    return dataset


def one_by_one(dataset: Any, orders: Callable[[], list[Tensor]]) -> None:
    """Read an epoch of batches, collated as a loader does."""
    for rows in orders():
        samples = [dataset[int(row)] for row in rows]
        for part in range(3):
            torch.stack([torch.as_tensor(sample[part]) for sample in samples])


def from_store(
    store: CropStore,
    skeleton: Skeleton,
    augment: AugmentConfig,
    orders: Callable[[], list[Tensor]],
) -> None:
    """Read an epoch of batches as in stage 1, up to the network's first layer."""
    codec = build_codec("msra", SIZE, SIGMA)
    workers, generator = Workers(torch.device("cpu")), torch.Generator()
    for batch in training_batches(
        TrainingPeople(store, skeleton, None), codec.frame, augment, orders(), generator, workers
    ):
        IMAGENET.normalize(batch.crops)
        codec.encode(batch.keypoints_crop, batch.visibility)


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of a COCO-format dataset")
    parser.add_argument("--annotations", help="file in it (default: the first *train*.json)")
    parser.add_argument("--images", help="folder in it (default: train2017, or images)")
    parser.add_argument("--skeleton", choices=sorted(SKELETONS), default="coco")
    parser.add_argument("--people", type=int, default=512, help="people per epoch (default 512)")
    parser.add_argument("--rounds", type=int, default=5, help="epochs of each way (default 5)")
    parser.add_argument(
        "--form", choices=("raw", "jpeg"), default="raw", help="of the store (default raw)"
    )
    parser.add_argument("--official", type=Path, help="the official HRNet's repository")
    options = parser.parse_args()
    configure_process(1)
    root, skeleton = options.data, SKELETONS[options.skeleton]
    found = sorted(root.glob("annotations/*train*.json"))
    annotations = root / options.annotations if options.annotations else found[0]
    images = next(
        folder
        for name in (options.images, "train2017", "images/train", "images")
        if name and (folder := root / name).is_dir()
    )
    people = build_people(read_table(annotations, skeleton), images)
    people = people.take(np.arange(min(len(people), options.people)))

    def orders() -> list[Tensor]:
        repeated = torch.randperm(len(people)).repeat(-(-options.people // len(people)))
        return list(repeated[: options.people].split(BATCH))

    with tempfile.TemporaryDirectory() as cache:
        path = make_crop_store(people, StoreSpec(SIZE, Path(cache), form=options.form))
        store = open_crop_store(path)
        classic = ClassicDataset(people, skeleton)
        ways: dict[str, Callable[[], None]] = {
            "classic, person by person": lambda: one_by_one(classic, orders),
            f"store ({options.form}), official augmentation": lambda: from_store(
                store, skeleton, OFFICIAL, orders
            ),
            "the same + color, erasing, occlusion": lambda: from_store(
                store, skeleton, COLORED, orders
            ),
        }
        if options.official:
            official = official_dataset(options.official, people, skeleton)
            ways["the official HRNet's dataset class"] = lambda: one_by_one(official, orders)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(options.rounds + 1):
            for name, way in ways.items():
                started = time.thread_time()
                way()
                if turn:  # the first is the warm-up
                    seconds[name].append(time.thread_time() - started)
    base = statistics.median(seconds["classic, person by person"])
    table = new_table(
        f"training samples of {root.name}, {SIZE[0]}x{SIZE[1]}, one thread",
        "way",
        "samples/s",
        "ratio to classic",
    )
    for name, times in seconds.items():
        median = statistics.median(times)
        table.add_row(name, f"{options.people / median:.0f}", f"{base / median:.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
