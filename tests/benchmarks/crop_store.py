"""Are JPEG crops worth their cost? ``python tests/benchmarks/crop_store.py data.root=DIR``

Bytes, reading speed and pixel error, relative to raw crops, of up to PEOPLE of the study's
training people. Speeds are ratios within one run, medians of ROUNDS in which raw and JPEG take
turns. Raw crops are in the page cache, as with ``data.crops=auto``.

    python tests/benchmarks/crop_store.py data=crowdpose data.root=/data/crowdpose
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from benchmark import new_parser

from study.cache import crop_parts
from study.cache.crop_parts import JPEG, RAW
from study.cache.crop_store import CropStore, StoreSpec, make_crop_store, open_crop_store
from study.config.compose import compose
from study.config.derived import resolve
from study.data.annotations import read_table
from study.data.people import People, build_people
from study.data.synthetic.dataset import draw_dataset

PEOPLE = 600
ROUNDS = 7
BATCH = 32
BATCHES = 12
FORMS = {
    "jpeg 95 4:4:4": (95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444),
    "jpeg 95 4:2:0": (95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420),
    "jpeg 90 4:4:4": (90, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444),
}


def people_of(overrides: list[str]) -> tuple[People, tuple[int, int]]:
    config = compose(overrides)
    root, split = Path(config.data.root), config.data.train
    if config.data.kind == "drawn":
        draw_dataset(root, seed=0, num_train_images=200, num_val_images=1)
    resolved = resolve(config)
    table = read_table(root / split.annotations, resolved.skeleton)
    people = build_people(table, root / split.images)
    return people.take(np.arange(min(PEOPLE, len(people)))), resolved.input_size


def bytes_per_person(store: CropStore) -> float:
    return sum(file.stat().st_size for file in store.path.glob("part-*")) / len(store)


def seconds_per_person(store: CropStore, rng: np.random.RandomState) -> float:
    rows = rng.randint(0, len(store), (BATCHES, BATCH))
    began = time.perf_counter()
    for batch in rows:
        np.stack(store.crops(batch))
    return (time.perf_counter() - began) / rows.size


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="settings, as of tune.py")
    settings = parser.parse_args().settings
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        people, size = people_of([*settings, f"storage={scratch}"])
        stores = {RAW: open_crop_store(make_crop_store(people, StoreSpec(size, Path(scratch))))}
        for name, (quality, sampling) in FORMS.items():
            crop_parts.JPEG_SETTINGS = (
                cv2.IMWRITE_JPEG_QUALITY,
                quality,
                cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
                sampling,
            )
            stores[name] = open_crop_store(
                make_crop_store(people, StoreSpec(size, Path(scratch), form=JPEG))
            )
        everyone = np.arange(len(people))
        raw = np.stack(stores[RAW].crops(everyone)).astype(np.int16)
        rng = np.random.RandomState(0)
        seconds: dict[str, list[float]] = {name: [] for name in stores}
        for _ in range(ROUNDS):
            for name, store in stores.items():
                seconds[name].append(seconds_per_person(store, rng))
        base = statistics.median(seconds[RAW])
        print(f"{len(people)} people, crops of {raw.shape[1]} x {raw.shape[2]}, one thread")
        print(f"{'':14} {'kB/person':>9} {'of raw':>7} {'read, of raw':>12} {'pixel error':>11}")
        for name, store in stores.items():
            error = np.abs(np.stack(store.crops(everyone)).astype(np.int16) - raw).mean()
            size_kb, speed = bytes_per_person(store) / 1e3, base / statistics.median(seconds[name])
            share = bytes_per_person(store) / bytes_per_person(stores[RAW])
            print(f"{name:14} {size_kb:9.1f} {share:7.3f} {speed:12.3f} {error:11.2f}")


if __name__ == "__main__":
    main()
