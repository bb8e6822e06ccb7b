"""Is an evaluation as fast as it can be? ``python tests/benchmarks/evaluation.py``

AP by CrowdPose's rules, with easy, medium and hard images, for many detections: by study.metrics,
by faster-coco-eval directly, and by pycocotools, which has no groups of images and so is called
four times. Seconds of CPU, summed over threads: the median of turns, in which the three run one
after another, and its ratio to faster-coco-eval's. All get the path of the ground truth;
study.metrics parses it only in the first turn, as in a study.

Without arguments it uses random people; with two, a ground truth and its detections in CrowdPose's
format.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from benchmark import new_parser, new_table
from faster_coco_eval import COCO, COCOeval_faster
from pycocotools.coco import COCO as OfficialGroundTruth
from pycocotools.cocoeval import COCOeval
from rich.console import Console

from models.skeleton import CROWDPOSE
from study.data.annotations import CROWD_BOUNDS
from study.metrics import average_precision

SIGMAS = np.array(CROWDPOSE.oks_sigmas)
Records = list[dict[str, Any]]


def people_at_random(folder: Path, num_images: int) -> tuple[Path, Path]:
    """Write a ground truth of four people per image, and a disturbed detection of each."""
    rng = np.random.RandomState(0)
    images, annotations, detections = list[Any](), list[Any](), list[Any]()
    for number in range(1, num_images + 1):
        images.append({"id": number, "width": 640, "height": 480, "crowdIndex": rng.rand()})
        for _ in range(4):
            size, corner = rng.uniform(80, 240), rng.uniform(0, 300, 2)
            points = corner + rng.uniform(0, size, (14, 2))
            visibility = np.where(rng.rand(14) < 0.8, 2, 0)
            visibility[0] = 2
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": 1,
                    "bbox": [*corner, size, size],
                    "iscrowd": 0,
                    "area": 0.53 * size * size,
                    "keypoints": np.c_[points, visibility].ravel().tolist(),
                    "num_keypoints": int((visibility > 0).sum()),
                }
            )
            disturbed = points + rng.normal(0, rng.uniform(0, 0.1) * size, points.shape)
            detections.append(
                {
                    "image_id": number,
                    "category_id": 1,
                    "keypoints": np.c_[disturbed, np.ones(14)].ravel().tolist(),
                    "score": rng.rand(),
                }
            )
    truth = {"images": images, "annotations": annotations, "categories": [{"id": 1}]}
    (folder / "truth.json").write_text(json.dumps(truth))
    (folder / "detections.json").write_text(json.dumps(detections))
    return folder / "truth.json", folder / "detections.json"


def study_metrics(truth: Path, detections: Records) -> float:
    return average_precision(truth, detections, CROWDPOSE, "crowdpose")["ap"]


def faster_coco_eval(truth: Path, detections: Records) -> float:
    def silent(*_: object) -> None:
        """Print nothing."""

    ground_truth = COCO(str(truth), print_function=silent)
    results = ground_truth.loadRes([dict(pose) for pose in detections])
    evaluation = COCOeval_faster(
        ground_truth,
        results,
        "keypoints_crowd",
        kpt_oks_sigmas=list(SIGMAS),
        use_area=False,
        print_function=silent,
    )
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return float(evaluation.stats[0])


def pycocotools(truth: Path, detections: Records) -> float:
    ground_truth = OfficialGroundTruth(str(truth))
    for person in ground_truth.anns.values():
        person["area"] = 0.53 * person["bbox"][2] * person["bbox"][3]
    results = ground_truth.loadRes([dict(pose) for pose in detections])
    evaluation = COCOeval(ground_truth, results, "keypoints")
    evaluation.params.kpt_oks_sigmas = SIGMAS
    images = ground_truth.dataset["images"]
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
    "study.metrics": study_metrics,
    "faster-coco-eval": faster_coco_eval,
    "pycocotools": pycocotools,
}


def measure(truth: Path, detections: Records, turns: int) -> dict[str, list[float]]:
    """Return the seconds of each way in each turn; all must agree on AP."""
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
    parser = new_parser(__doc__)
    parser.add_argument(
        "files",
        nargs="*",
        type=Path,
        metavar="TRUTH DETECTIONS",
        help="files in CrowdPose's format (default: random people)",
    )
    parser.add_argument(
        "--images",
        "--pictures",
        dest="num_images",
        type=int,
        default=2000,
        help="images of random people (default 2000)",
    )
    parser.add_argument("--turns", type=int, default=3, help="default 3")
    options = parser.parse_args()
    if len(options.files) not in (0, 2):
        parser.error(f"give two files or none, got {len(options.files)}")
    with tempfile.TemporaryDirectory() as folder:
        truth, results = options.files or people_at_random(Path(folder), options.num_images)
        content = results.read_bytes()
        content = gzip.decompress(content) if results.suffix == ".gz" else content
        detections = json.loads(content)
        seconds = measure(truth, detections, options.turns)
    medians = {name: statistics.median(turns) for name, turns in seconds.items()}
    table = new_table(
        f"{len(detections)} detections, {options.turns} turns",
        "",
        "first turn, s",
        "median, s",
        "of faster-coco-eval",
    )
    for name, median in medians.items():
        ratio = median / medians["faster-coco-eval"]
        table.add_row(name, f"{seconds[name][0]:.2f}", f"{median:.2f}", f"{ratio:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
