"""What a study of COCO's size takes: ``python tests/benchmarks/full_size.py SOURCE --folder DIR``.

An annotation file like COCO's of training people is made by repeating the people of a small one,
outlines and all: 118,287 images, 150,000 people with joints. Its images are links to SOURCE's
few files, so what reading so many from a disk takes is not measured. Then each step runs in a
process of its own, as in a study, and its memory is watched: RssAnon, what a process has of its
own, without the files that it maps. SOURCE is a folder in COCO's layout with official names.
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

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

LIMIT = 2 * 1024**3
"""Bytes that no process may have of its own."""
FULL = 150_000
"""People with joints; what else is as large as in COCO 2017 follows in proportion."""
IMAGES, VAL_PEOPLE = 118_287, 6_352
POLL_S = 0.05
STEPS = ("audit", "dataset.py", "prepare", "targets", "train")
SPARE = 1.2
"""What is written at most, over the stored crops."""


def repeated(source: Path, split: str, people: int) -> Iterator[tuple[dict[str, Any], list]]:
    """Images of the source with their annotations, over and over, numbered anew."""
    document = json.loads((source / f"annotations/person_keypoints_{split}2017.json").read_text())
    of: dict[int, list[dict[str, Any]]] = {}
    for annotation in document["annotations"]:
        of.setdefault(annotation["image_id"], []).append(annotation)
    images = [image for image in document["images"] if image["id"] in of]
    number, found = itertools.count(1), 0
    for image_id, image in enumerate(itertools.cycle(images), start=1):
        annotations = [
            {**annotation, "id": next(number), "image_id": image_id}
            for annotation in of[image["id"]]
        ]
        yield {**image, "id": image_id, "linked": image["file_name"]}, annotations
        found += sum(a["num_keypoints"] > 0 and not a["iscrowd"] for a in annotations)
        if found >= people:
            return


def make_split(
    source: Path, root: Path, split: str, people: int, num_images: int
) -> dict[str, int]:
    """Writes the annotation file and links the images; returns the number of each thing."""
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
    """A study of these people with the tiny student, without a second stage."""
    return [
        *("data=coco", f"data.root={root}", f"storage={root / 'studies'}"),
        *(f"data.input_size=[{size},{size}]", "student.size=tiny", "teacher.size=tiny"),
        *("distill.epochs=1", "refine.epochs=0", "distill.batch_size=64"),
    ]


def run_step(step: str, root: Path, size: int) -> None:
    """One step, in this process."""
    from study.cache.prepare import prepare_data
    from study.config.compose import compose
    from study.config.derived import resolve

    config = compose(settings_of(root, size))
    if step == "audit":
        return look(root / config.data.train.annotations, root / "train2017", root / "audit")
    began = time.monotonic()
    data = prepare_data(
        config.data, resolve(config), lambda _: lambda *_: None, print, audit_folder=root / "audit"
    )
    print(f"prepared in {time.monotonic() - began:.0f} s: {data.num_people}", flush=True)
    if step == "targets":
        write_targets(Path(data.train), root / "targets.arrow")
    (root / "data.json").write_text(json.dumps(vars(data)))


def look(annotations: Path, images: Path, folder: Path) -> None:
    """A study's audit, the annotation file and the images timed apart."""
    from models.skeleton import COCO
    from study.data.annotations import read_table
    from study.data.audit import audit, describe, find_notes, write_audit

    began = time.monotonic()
    table = read_table(annotations, COCO)
    read, seen = time.monotonic(), [0]
    faults = audit(table, images, progress=lambda done, _: seen.append(done))
    seconds = time.monotonic() - read
    print(f"annotation file: {read - began:.1f} s, {seen[-1] / seconds:,.0f} images/s")
    print(describe(faults) or "no faults")
    write_audit(folder / "train.parquet", faults + find_notes(table))


def write_targets(store: Path, file: Path) -> None:
    """What a teacher would say: the truth, thrice, so that the store is as large as a real one."""
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
    """One epoch of stage 1, as a worker trains it."""
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


class Used(NamedTuple):
    """What a step took."""

    step: str
    seconds: float
    bytes: int
    """Of its own, the process that had most."""


def watch(step: str, command: list[str]) -> Used:
    """Runs the command, and looks at the memory of its processes until it ends."""
    began, most = time.monotonic(), 0
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            most = max([most, *map(own_memory, family(process.pid))])
            time.sleep(POLL_S)
    if process.returncode:
        sys.exit(f"{step} failed with status {process.returncode}")
    return Used(step, time.monotonic() - began, most)


def family(pid: int) -> list[int]:
    """The process and its descendants."""
    found = [pid]
    for parent in found:
        try:
            for task in Path(f"/proc/{parent}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
        except OSError:  # it has ended
            continue
    return found


def own_memory(pid: int) -> int:
    """RssAnon in bytes; 0 of a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    found = [line for line in lines if line.startswith("RssAnon:")]
    return int(found[0].split()[1]) * 1024 if found else 0


def check_disk(root: Path, people: int, size: int) -> None:
    """Says how much will be written; stops where there is less room."""
    needed = people * (2000 + (1.5 * size) ** 2 * 3 * SPARE) + 1e8
    free = shutil.disk_usage(root).free
    print(f"{needed / 1e9:.1f} GB will be written to {root}, {free / 1e9:.1f} GB are free")
    if needed > 0.9 * free:
        sys.exit("that is too little room; lower --people or --size, or change --folder")


def show(used: list[Used], root: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="a step in a process of its own")
    for heading in ("step", "seconds", "most RssAnon, MB"):
        table.add_column(heading, justify="left" if heading == "step" else "right")
    for one in used:
        table.add_row(one.step, f"{one.seconds:.1f}", f"{one.bytes / 1e6:.0f}")
    console = Console(width=100)
    console.print(table)
    stores = sorted((root / "studies/cache").glob("crops-*"))
    lengths = (sum(part.stat().st_size for part in store.iterdir()) for store in stores)
    sizes = ", ".join(f"{length / 1e6:.0f}" for length in lengths)
    console.print(f"crop stores on disk, MB: {sizes}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Time, memory and disk of a study of COCO's size")
    parser.add_argument("source", type=Path, help="a small data set in COCO's layout")
    parser.add_argument("--folder", type=Path, required=True, help="where all is written")
    parser.add_argument("--people", type=int, default=FULL, help=f"with joints (default {FULL})")
    parser.add_argument("--size", type=int, default=64, help="of the square crop (default 64)")
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
    own = [sys.executable, __file__, str(options.source), "--folder", str(root)]
    own += ["--size", str(options.size), "--step"]
    survey = [sys.executable, str(ROOT / "study/dataset.py"), str(root)]
    survey += ["--out", str(root / "survey")]
    used = [
        watch(step, survey if step == "dataset.py" else [*own, step]) for step in options.steps
    ]
    show(used, root)
    if worst := [one.step for one in used if one.bytes > LIMIT]:
        sys.exit(f"no process may have more than {LIMIT / 1e9:.1f} GB of its own: {worst}")


if __name__ == "__main__":
    main()
