"""How long an evaluation takes: ``python tests/benchmarks/evaluation.py``.

The figures of CrowdPose's rules, easy, medium and hard among them, of many detections: ours, those
of faster-coco-eval called directly, and those of pycocotools, which knows no groups of images
and so is asked four times. Seconds of CPU, all threads together: the median of turns, which the
three take one after the other, and its ratio to faster-coco-eval's. Everyone is given the path of
the ground truth; ours parses it in the first turn alone, as in a study.

Without arguments, on people at random; with two, on a ground truth and its detections in CrowdPose
format.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from pycocotools.coco import COCO as OfficialGroundTruth
from pycocotools.cocoeval import COCOeval
from rich.console import Console
from rich.table import Table

from models.skeleton import CROWDPOSE
from study.data.annotations import CROWD_BOUNDS
from study.metrics import average_precision

SIGMAS = np.array(CROWDPOSE.oks_sigmas)
Records = list[dict[str, Any]]


def people_at_random(folder: Path, num_images: int) -> tuple[Path, Path]:
    """Ground truth of four people an image, and as many detections, shaken."""
    rng = np.random.RandomState(0)
    images, annotations, detections = list[Any](), list[Any](), list[Any]()
    for number in range(1, num_images + 1):
        images.append({"id": number, "width": 640, "height": 480, "crowdIndex": rng.rand()})
        for _ in range(4):
            size, corner = rng.uniform(80, 240), rng.uniform(0, 300, 2)
            points = corner + rng.uniform(0, size, (14, 2))
            seen = np.where(rng.rand(14) < 0.8, 2, 0)
            seen[0] = 2
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": 1,
                    "bbox": [*corner, size, size],
                    "iscrowd": 0,
                    "area": 0.53 * size * size,
                    "keypoints": np.c_[points, seen].ravel().tolist(),
                    "num_keypoints": int((seen > 0).sum()),
                }
            )
            shaken = points + rng.normal(0, rng.uniform(0, 0.1) * size, points.shape)
            row = np.c_[shaken, np.ones(14)].ravel().tolist()
            person = {"image_id": number, "category_id": 1, "keypoints": row}
            detections.append({**person, "score": rng.rand()})
    truth = {"images": images, "annotations": annotations, "categories": [{"id": 1}]}
    (folder / "truth.json").write_text(json.dumps(truth))
    (folder / "detections.json").write_text(json.dumps(detections))
    return folder / "truth.json", folder / "detections.json"


def ours(truth: Path, detections: Records) -> float:
    return average_precision(truth, detections, CROWDPOSE, "crowdpose")["ap"]


def faster_coco_eval(truth: Path, detections: Records) -> float:
    def silent(*_: object) -> None:
        """Nothing is printed."""

    ground = COCO(str(truth), print_function=silent)
    found = ground.loadRes([dict(pose) for pose in detections])
    settings = {"kpt_oks_sigmas": list(SIGMAS), "use_area": False, "print_function": silent}
    evaluation = COCOeval_faster(ground, found, "keypoints_crowd", **settings)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return float(evaluation.stats[0])


def pycocotools(truth: Path, detections: Records) -> float:
    ground = OfficialGroundTruth(str(truth))
    for person in ground.anns.values():
        person["area"] = 0.53 * person["bbox"][2] * person["bbox"][3]
    evaluation = COCOeval(ground, ground.loadRes([dict(p) for p in detections]), "keypoints")
    evaluation.params.kpt_oks_sigmas = SIGMAS
    images = ground.dataset["images"]
    levels = np.searchsorted(CROWD_BOUNDS, [i["crowdIndex"] for i in images], side="right")
    for level in (0, 1, 2, None):
        evaluation.params.imgIds = [
            image["id"]
            for image, own in zip(images, levels, strict=True)
            if level is None or own == level
        ]
        evaluation.evaluate()
        evaluation.accumulate()
    evaluation.summarize()
    return float(evaluation.stats[0])


WAYS: dict[str, Callable[[Path, Records], float]] = {
    "ours": ours,
    "faster-coco-eval": faster_coco_eval,
    "pycocotools": pycocotools,
}


def measure(truth: Path, detections: Records, turns: int) -> dict[str, list[float]]:
    """Seconds of each way in each turn; all must agree on AP."""
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(turns):
        aps = []
        for name, way in WAYS.items():
            start = time.process_time()
            with contextlib.redirect_stdout(io.StringIO()):
                aps.append(way(truth, detections))
            seconds[name].append(time.process_time() - start)
        assert np.ptp(aps) < 1e-9, aps
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="TRUTH DETECTIONS")
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    if len(options.files) not in (0, 2):
        parser.error(f"two files or none, got {len(options.files)}")
    with tempfile.TemporaryDirectory() as folder:
        truth, found = options.files or people_at_random(Path(folder), options.images)
        content = found.read_bytes()
        content = gzip.decompress(content) if found.suffix == ".gz" else content
        detections = json.loads(content)
        seconds = measure(truth, detections, options.turns)
    medians = {name: statistics.median(turns) for name, turns in seconds.items()}
    table = Table(title=f"{len(detections)} detections, {options.turns} turns")
    for heading in ("", "first turn, s", "median, s", "of faster-coco-eval"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, median in medians.items():
        ratio = median / medians["faster-coco-eval"]
        table.add_row(name, f"{seconds[name][0]:.2f}", f"{median:.2f}", f"{ratio:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
