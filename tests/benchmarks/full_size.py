"""Do data of COCO's size fit in memory? ``tests/benchmarks/full_size.py SOURCE --folder DIR``

An annotation file of the size of COCO's is made by repeating the people of a small one, with their
segmentations: 118,287 images, 150,000 people with joints. Its images are links to SOURCE's few
files, so the time to read that many from a disk is not measured. Each step runs in its own
process, as in a study, and its memory is monitored: RssAnon, a process's private memory without
the files that it maps. SOURCE is a folder in COCO's layout with official names.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmark import ROOT, new_parser, new_table

LIMIT = 2 * 1024**3
"""Most bytes of private memory for any process."""
FULL = 150_000
"""People with joints; all other numbers of COCO 2017 are scaled in proportion."""
IMAGES, VAL_PEOPLE = 118_287, 6_352
POLL_S = 0.05
STEPS = ("audit", "dataset.py", "prepare", "targets", "train")
SPARE = 1.2
"""Upper bound of all bytes written, relative to the stored crops."""


def repeated(source: Path, split: str, people: int) -> Iterator[tuple[dict[str, Any], list]]:
    """Repeat the source's images with their annotations, under new ids."""
    document = json.loads((source / f"annotations/person_keypoints_{split}2017.json").read_text())
    by_image: dict[int, list[dict[str, Any]]] = {}
    for annotation in document["annotations"]:
        by_image.setdefault(annotation["image_id"], []).append(annotation)
    images = [image for image in document["images"] if image["id"] in by_image]
    annotation_ids, num_people = itertools.count(1), 0
    for image_id, image in enumerate(itertools.cycle(images), start=1):
        annotations = [
            {**annotation, "id": next(annotation_ids), "image_id": image_id}
            for annotation in by_image[image["id"]]
        ]
        yield {**image, "id": image_id, "linked": image["file_name"]}, annotations
        num_people += sum(a["num_keypoints"] > 0 and not a["iscrowd"] for a in annotations)
        if num_people >= people:
            return


def make_split(
    source: Path, root: Path, split: str, people: int, num_images: int
) -> dict[str, int]:
    """Write the annotation file and link the images; return images, annotations and bytes."""
    originals, folder = root / "originals" / split, root / f"{split}2017"
    shutil.copytree(source / f"{split}2017", originals, dirs_exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    file = root / f"annotations/person_keypoints_{split}2017.json"
    file.parent.mkdir(exist_ok=True)
    images: list[dict[str, Any]] = []
    count = 0
    with file.open("w") as out:
        category = json.loads(
            (source / f"annotations/person_keypoints_{split}2017.json").read_text()
        )["categories"]
        out.write(f'{{"categories": {json.dumps(category)}, "annotations": [')
        for image, annotations in repeated(source, split, people):
            images.append(image)
            for annotation in annotations:
                out.write((", " if count else "") + json.dumps(annotation))
                count += 1
        last = dict(images[-1])
        images += [{**last, "id": n} for n in range(len(images) + 1, num_images + 1)]
        out.write('], "images": [')
        for place, image in enumerate(images):
            image["file_name"] = f"{image['id']:012d}.jpg"
            os.link(originals / image.pop("linked"), folder / image["file_name"])
            out.write((", " if place else "") + json.dumps(image))
        out.write("]}")
    return {"images": len(images), "annotations": count, "bytes": file.stat().st_size}


def settings_of(root: Path, size: int) -> list[str]:
    """Return the settings of a study of these people: the tiny student, no stage 2."""
    return [
        "data=coco",
        f"data.root={root}",
        f"storage={root / 'studies'}",
        f"data.input_size=[{size},{size}]",
        "student.size=tiny",
        "teacher.size=tiny",
        "distill.epochs=1",
        "refine.epochs=0",
        "distill.batch_size=64",
    ]


def run_step(step: str, root: Path, size: int) -> None:
    """Run a step other than train in this process."""
    from study.cache.prepare import prepare_data
    from study.config.compose import compose
    from study.config.derived import resolve

    config = compose(settings_of(root, size))
    if step == "audit":
        return run_audit(root / config.data.train.annotations, root / "train2017", root / "audit")
    began = time.monotonic()
    data = prepare_data(
        config.data, resolve(config), lambda _: lambda *_: None, print, audit_folder=root / "audit"
    )
    print(f"prepared in {time.monotonic() - began:.0f} s: {data.num_people}", flush=True)
    if step == "targets":
        write_targets(Path(data.train), root / "targets.arrow")
    (root / "data.json").write_text(json.dumps(vars(data)))


def run_audit(annotations: Path, images: Path, folder: Path) -> None:
    """Audit the split as a study does, with separate times for annotations and images."""
    from models.skeleton import COCO
    from study.data.annotations import read_table
    from study.data.audit import audit, describe, write_audit
    from study.data.audit_notes import find_notes

    began = time.monotonic()
    table = read_table(annotations, COCO)
    read, seen = time.monotonic(), [0]
    faults = audit(table, images, progress=lambda done, _: seen.append(done))
    seconds = time.monotonic() - read
    print(f"annotation file: {read - began:.1f} s, {seen[-1] / seconds:,.0f} images/s")
    print(describe(faults) or "no faults")
    write_audit(folder / "train.parquet", faults + find_notes(table))


def write_targets(store: Path, file: Path) -> None:
    """Write the truth as three modes per joint, so that the store has a real one's size."""
    import torch

    from study.cache.crop_store import open_crop_store
    from study.cache.teacher_store import TeacherTargets, write_teacher_store
    from study.data.crops import stored_size

    people = open_crop_store(store)

    def asked(start: int, stop: int) -> TeacherTargets:
        truth = torch.tensor(people.keypoints_stored[start:stop, :, None]).repeat(1, 1, 3, 1)
        modes = torch.cat((truth, torch.ones_like(truth)), dim=3)  # (b, K, 3, 4)
        modes[:, :, 1:, 2] = 0.1
        taught = torch.ones(modes.shape[:2])
        return TeacherTargets(modes, taught, taught[:, :, None] * taught[:, None])

    write_teacher_store(file, stored_size(people.input_size), len(people), asked)


def train(root: Path, size: int) -> None:
    """Train one epoch of stage 1, as a worker does."""
    import torch

    from study.cache.prepare import PreparedData
    from study.config.compose import compose
    from study.config.derived import resolve
    from study.trial import Trial, run_trial
    from study.workers import Workers

    data = PreparedData(**json.loads((root / "data.json").read_text()))
    config = compose(settings_of(root, size))
    shutil.rmtree(root / "trial", ignore_errors=True)
    torch.set_num_threads(1)

    def notify(row: dict[str, Any]) -> bool:
        speed = row["images_per_s"]
        print(f"AP {100 * row['val_ap']:.1f}, loss {row['loss']:.3g}, {speed:.0f} people/s")
        return False

    trial = Trial(0, config, resolve(config), data, root / "trial", root / "targets.arrow")
    run_trial(trial, Workers(torch.device("cpu")), notify)


class Usage(NamedTuple):
    """Time and memory of a step."""

    step: str
    seconds: float
    bytes: int
    """Most private memory of one of its processes."""


def watch(step: str, command: list[str]) -> Usage:
    """Run the command and monitor the memory of its processes until it ends."""
    began, most = time.monotonic(), 0
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            most = max([most, *map(private_memory, process_tree(process.pid))])
            time.sleep(POLL_S)
    if process.returncode:
        sys.exit(f"{step} failed with status {process.returncode}")
    return Usage(step, time.monotonic() - began, most)


def process_tree(pid: int) -> list[int]:
    """List the process and its descendants."""
    pids = [pid]
    for parent in pids:
        try:
            for task in Path(f"/proc/{parent}/task").iterdir():
                pids += map(int, (task / "children").read_text().split())
        except OSError:  # it has ended
            continue
    return pids


def private_memory(pid: int) -> int:
    """Return RssAnon in bytes, 0 if the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    sizes = [line.split()[1] for line in lines if line.startswith("RssAnon:")]
    return int(sizes[0]) * 1024 if sizes else 0


def check_disk(root: Path, people: int, size: int) -> None:
    """Print how much will be written; exit if the disk has less space."""
    needed = people * (2000 + (1.5 * size) ** 2 * 3 * SPARE) + 1e8
    free = shutil.disk_usage(root).free
    print(f"{needed / 1e9:.1f} GB will be written to {root}, {free / 1e9:.1f} GB are free")
    if needed > 0.9 * free:
        sys.exit(
            "the disk must have more free space; lower --people or --size, or change --folder"
        )


def show(used: list[Usage], root: Path) -> None:
    from rich.console import Console

    table = new_table("each step in its own process", "step", "seconds", "most RssAnon, MB")
    for usage in used:
        table.add_row(usage.step, f"{usage.seconds:.1f}", f"{usage.bytes / 1e6:.0f}")
    console = Console(width=100)
    console.print(table)
    stores = sorted((root / "studies/cache").glob("crops-*"))
    lengths = (sum(part.stat().st_size for part in store.iterdir()) for store in stores)
    sizes = ", ".join(f"{length / 1e6:.0f}" for length in lengths)
    console.print(f"crop stores on disk, MB: {sizes}")


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("source", type=Path, help="a small data set in COCO's layout")
    parser.add_argument(
        "--folder", type=Path, required=True, help="folder for all that is written"
    )
    parser.add_argument(
        "--people", type=int, default=FULL, help=f"people with joints (default {FULL})"
    )
    parser.add_argument(
        "--size", type=int, default=64, help="side of the crops in pixels (default 64)"
    )
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS, help="default: all")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    root = options.folder.absolute()
    if options.step == "train":
        return train(root, options.size)
    if options.step:
        return run_step(options.step, root, options.size)
    root.mkdir(parents=True, exist_ok=True)
    check_disk(root, options.people, options.size)
    share = options.people / FULL
    for split, people, images in (
        ("train", options.people, round(share * IMAGES)),
        ("val", max(1, round(share * VAL_PEOPLE)), 0),
    ):
        made = make_split(options.source, root, split, people, images)
        print(split, *(f"{number:,} {what}" for what, number in made.items()), flush=True)
    this_script = [
        sys.executable,
        __file__,
        str(options.source),
        "--folder",
        str(root),
        "--size",
        str(options.size),
        "--step",
    ]
    survey = [
        sys.executable,
        str(ROOT / "study/dataset.py"),
        str(root),
        "--out",
        str(root / "survey"),
    ]
    used = [
        watch(step, survey if step == "dataset.py" else [*this_script, step])
        for step in options.steps
    ]
    show(used, root)
    if too_large := [usage.step for usage in used if usage.bytes > LIMIT]:
        sys.exit(
            f"no process may have more than {LIMIT / 1e9:.1f} GB of private memory, got more in "
            f"{', '.join(too_large)}"
        )


if __name__ == "__main__":
    main()
