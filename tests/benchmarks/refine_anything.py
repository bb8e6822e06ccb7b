"""Does the refiner improve other methods' poses? ``refine_anything.py --data DIR --out DIR``

A student is trained from labels only. Then IGP-GCN, on the frozen student, learns to improve given
poses (``refine.start``): each given joint is a candidate among the student's peaks. It is scored
on poses of the validation people:

  real      another method's predictions: MoveNet's (--movenet), or any COCO results (--poses)
  swapped   the truth with a third of the left-right pairs swapped, ten draws per person
  missed    the truth with a fifth of the joints at a random place in the person's box
  jitter    the truth with the noise of the training

The table has AP by CrowdPose's rules and the mean OKS, before and after; means over the draws. The
interval of the gain in mean OKS is from a bootstrap over the photographed persons from whom the
data are composed (each may be in many images), or over images if these are not recorded. Every
step is saved under --out; the same command resumes.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from benchmark import new_parser, new_table, prepare_quietly
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from models.build import build_codec, build_model
from models.movenet_weights import load_movenet
from models.pose_features import PoseFeatures
from models.refined_pose import RefinedPose
from models.skeleton import COCO, CROWDPOSE, shared_joints
from study.cache.crop_store import CropStore, open_crop_store
from study.cache.predictions import given_starts
from study.cache.prepare import PreparedData
from study.config.compose import compose, with_values
from study.config.derived import resolve
from study.config.schema import MOVENET_SIZES, StudyConfig
from study.data.crops import apply_affine, crop_to_image_affine, invert_affine
from study.metrics import average_precision, oks, to_detections
from study.storage.checkpoint import Checkpoints, Row
from study.storage.files import write_atomic
from study.training.batches import evaluation_batches
from study.training.evaluation import BATCH_SIZE, predict_crops
from study.training.networks import load_estimator
from study.training.pose_errors import jittered
from study.trial import Trial, run_trial
from study.workers import Workers

SWAPPED, MISSED = 1 / 3, 1 / 5
SWAP_DRAWS = 10
RESAMPLES = 2000
SHARED = [CROWDPOSE.joints.index(joint) for joint in CROWDPOSE.joints if joint in COCO.joints]
"""Joints that methods with COCO's 17 joints predict; head and neck they can only extrapolate."""
FACE = ("nose", "left_eye", "right_eye", "left_ear", "right_ear")
QUICK = ("data.max_people=120", "distill.epochs=1", "refine.epochs=1")
SETTINGS = (
    "data=crowdpose",
    "data.input_size=[128,128]",
    "data.search_fraction=0.05",
    "seed=0",
    "data.train.annotations=annotations/lspet_crowd_train.json",
    "data.val.annotations=annotations/lspet_crowd_val.json",
    "data.train.images=images/train",
    "data.val.images=images/val",
    "distill.heatmap.kind=none",
    "distill.structure.kind=none",
    "distill.normalize=none",
    "distill.epochs=4",
    "distill.optimizer.lr=2e-4",
    "distill.optimizer.pretrained_factor=0.2",
    "refine.epochs=7",
    "refine.optimizer.lr=2e-3",
    "refine.candidates=3",
    "refine.jitter=1.0",
    "data.max_people=2500",
    "student.size=teacher",
    "display=none",
)
Poses = NDArray[np.float32]
"""x, y in stored-crop pixels and score, (N, K, 3)."""


def print_epoch(row: Row) -> bool:
    print(
        f"  {row['stage']} epoch {row['epoch']}: AP {100 * row['val_ap']:.1f} on held-out people, "
        f"loss {row['loss']:.4f}, {row['seconds']:.0f} s",
        flush=True,
    )
    return False


def train(config: StudyConfig, data: PreparedData, out: Path, starts: list[str]) -> None:
    """Train or resume the student, then, on copies of it, a refiner for each start."""
    workers = Workers(torch.device("cpu"))

    def train_or_resume(name: str, values: dict[str, Any]) -> None:
        print(f"training {name}", flush=True)
        changed = with_values(config, values)
        trial = Trial(0, changed, resolve(changed), data, out / name, targets=None)
        run_trial(trial, workers, print_epoch)

    train_or_resume("student", {"refine.epochs": 0})
    for start in starts:
        folder = out / name_of(start)
        if not folder.exists():
            partial = out / f".{folder.name}"
            shutil.copytree(out / "student", partial, dirs_exist_ok=True)
            partial.rename(folder)
        train_or_resume(folder.name, {"refine.start": start})


def name_of(start: str) -> str:
    """Return the name of the folder of the refiner trained on this start."""
    return f"refiner-{Path(start).stem}"


def write_movenet_poses(file: Path, weights: Path, store: CropStore) -> None:
    """Write COCO results of MoveNet, untrained and with its own decoding, on square crops.

    Head and neck, which it lacks, are extrapolated along the line from the middle of the shoulders
    to that of the face: the neck at 0.12 of it, the head at 0.6.
    """
    size = next(size for size in MOVENET_SIZES if size in weights.name)
    codec = build_codec("movenet", store.input_size, 2.0)
    network = build_model("mobile_net", size, COCO, codec)
    load_movenet(network, weights, COCO)
    movenet = RefinedPose(network, codec, None).eval()
    workers = Workers(torch.device("cpu"))
    crop_to_image = crop_to_image_affine(movenet.frame, store.image_to_stored)
    face = [place for place, joint in enumerate(COCO.joints) if joint in FACE]
    shoulders = [COCO.joints.index(f"{side}_shoulder") for side in ("left", "right")]
    entries = []
    with torch.inference_mode():
        for rows, batch in evaluation_batches(
            store, CROWDPOSE, movenet.frame, len(store), BATCH_SIZE, workers
        ):
            keypoints_crop, scores = (output.double().numpy() for output in movenet(batch.crops))
            keypoints_image = apply_affine(keypoints_crop, crop_to_image[rows.numpy()])
            predicted = np.concatenate((keypoints_image, scores[..., None]), axis=-1)
            below, above = (predicted[:, which].mean(axis=1) for which in (shoulders, face))
            poses = np.zeros((len(rows), CROWDPOSE.num_joints, 3))
            for joint, coco_joint in shared_joints(CROWDPOSE, COCO):
                poses[:, joint] = predicted[:, coco_joint]
            for name, start, share in (("neck", below, 0.12), ("head", above, 0.6)):
                joint = CROWDPOSE.joints.index(name)
                poses[:, joint, :2] = (start + share * (above - below))[:, :2]
                poses[:, joint, 2] = start[:, 2]
            for row, keypoints in zip(rows.tolist(), poses, strict=True):
                entries.append(
                    {
                        "image_id": int(store.image_ids[row]),
                        "category_id": 1,
                        "annotation_id": int(store.annotation_ids[row]),
                        "keypoints": keypoints.ravel().tolist(),
                        "score": float(keypoints[:, 2].mean()),
                    }
                )
    file.write_text(json.dumps(entries))


def movenet_poses(
    config: StudyConfig, weights: Path, out: Path, part: Literal["train", "val"]
) -> Path:
    """Return the file of a MoveNet's results on a split; make it first if it is missing."""
    file = out / f"{weights.stem}-{part}.json"
    if not file.exists():
        side = 256 if "thunder" in weights.name else 192
        changed = with_values(config, {"data.input_size": [side, side]})
        data = prepare_quietly(changed, resolve(changed))
        parts = (data.train, data.search) if part == "train" else (data.val,)
        entries = []
        for number, path in enumerate(parts):
            temporary = out / f".{file.name}.{number}"
            write_movenet_poses(temporary, weights, open_crop_store(Path(path)))
            entries += json.loads(temporary.read_text())
            temporary.unlink()
        file.write_text(json.dumps(entries))
    return file


def disturbed_truth(store: CropStore, spread: float) -> dict[str, list[Poses]]:
    """Disturb the truth of all people, in one or more draws; unlabeled joints have score 0."""
    rng = np.random.RandomState(0)
    truth, labeled = store.keypoints_stored, store.visibility > 0
    count, joints = labeled.shape
    swapped = [swap_some(truth, labeled, rng)]
    corners = store.boxes_image[:, None, :2]
    places = corners + rng.rand(count, joints, 2) * store.boxes_image[:, None, 2:]
    places = apply_affine(places, store.image_to_stored)
    missed = np.where(rng.rand(count, joints, 1) < MISSED, places, truth)
    swapped += [swap_some(truth, labeled, rng) for _ in range(SWAP_DRAWS - 1)]
    torch.manual_seed(0)
    noisy, _ = jittered(
        torch.from_numpy(truth),
        torch.from_numpy(store.visibility),
        torch.from_numpy(store.areas),
        spread,
    )
    poses = {"swapped": swapped, "missed": [missed], "jitter": [noisy.numpy()]}
    return {
        name: [
            np.concatenate((pose, labeled[..., None]), axis=-1).astype(np.float32)
            for pose in draws
        ]
        for name, draws in poses.items()
    }


def swap_some(
    truth: NDArray[np.float32], labeled: NDArray[np.bool_], rng: np.random.RandomState
) -> NDArray[np.float32]:
    """Swap a share of the labeled left-right pairs of the truth (N, K, 2)."""
    order = list(CROWDPOSE.flip_order)
    draws = rng.rand(*labeled.shape)
    draws = np.minimum(draws, draws[:, order])  # both of a pair are swapped or none
    share = 1 - (1 - SWAPPED) ** 0.5
    swaps = (draws < share) & labeled & labeled[:, order]
    return np.where(swaps[..., None], truth[:, order], truth)


def cache_student(estimator: RefinedPose, cache: dict[int, PoseFeatures]) -> None:
    """Make the estimator take the student's output from the cache if it has the crops."""
    predict = estimator.predict

    def cached_predict(crops: Tensor) -> PoseFeatures:
        key = hash(crops.numpy().tobytes())
        if key not in cache:
            cache[key] = predict(crops)
        return cache[key]

    estimator.predict = cached_predict  # type: ignore[method-assign]


def measure(
    estimator: RefinedPose, store: CropStore, truth: Path, draws: list[Poses], groups: list[int]
) -> dict[str, Any]:
    """Return AP and mean OKS before and after, and the interval of the gain in mean OKS."""
    workers, counts = Workers(torch.device("cpu")), (store.visibility > 0).any(axis=1)
    stored_to_image = invert_affine(store.image_to_stored)
    found: dict[str, list[Any]] = {}
    for starts in draws:
        after, scores = predict_crops(estimator, store, CROWDPOSE, workers, starts=starts)
        for when, pose in (("before", starts[..., :2].astype(float)), ("after", after)):
            image = apply_affine(pose, stored_to_image)
            people = to_detections(image, scores, store.image_ids, np.ones(len(store)))
            ap = average_precision(truth, people, CROWDPOSE, "crowdpose")
            for name in ap:
                if name.startswith("ap"):
                    found.setdefault(f"{name}_{when}", []).append(ap[name])
            for kind, which in (("all", slice(None)), ("shared", SHARED)):
                labels = store.keypoints_stored[:, which], store.visibility[:, which], store.areas
                sigmas = np.array(CROWDPOSE.oks_sigmas)[which].tolist()
                similar = oks(pose[:, which], *labels, sigmas)[counts]
                found.setdefault(f"{kind} {when}", []).append(similar)
    result: dict[str, Any] = {
        name: float(np.mean(values)) for name, values in found.items() if name.startswith("ap")
    }
    for kind in ("all", "shared"):
        before, after = (np.mean(found[f"{kind} {when}"], axis=0) for when in ("before", "after"))
        result[f"oks_{kind}"] = [float(before.mean()), float(after.mean())]
        result[f"gain_{kind}"] = interval(after - before, np.array(groups)[counts])
    return result


def interval(gains: NDArray[np.float64], groups: NDArray[np.int64]) -> list[float]:
    """Compute the mean's 95 % interval by a bootstrap over groups."""
    _, places = np.unique(groups, return_inverse=True)
    sums, sizes = np.bincount(places, gains), np.bincount(places)
    drawn = np.random.RandomState(0).randint(0, len(sums), (RESAMPLES, len(sums)))
    means = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    return np.percentile(means, [2.5, 97.5]).tolist()


def groups_of(truth: Path, store: CropStore) -> list[int]:
    """Return each person's group: its source in the annotations or, without one, its image."""
    annotations = json.loads(truth.read_text())["annotations"]
    own = {a["id"]: int(a.get("source_id", a["image_id"])) for a in annotations}
    return [own[int(number)] for number in store.annotation_ids]


def score(
    config: StudyConfig, data: PreparedData, out: Path, starts: list[str], real: list[Path]
) -> dict[str, Any]:
    """Return the results by refiner and case; measure and save those that are missing."""
    file = out / "results.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    store, truth = open_crop_store(Path(data.val)), Path(data.val_truth)
    annotations = Path(config.data.root) / config.data.val.annotations
    groups = groups_of(annotations, store)

    def given(path: Path) -> list[Poses]:
        return [given_starts(path, store, CROWDPOSE)]

    cases: dict[str, Callable[[], list[Poses]]] = {
        f"real: {path.stem}": functools.partial(given, path) for path in real
    }
    for name, draws in disturbed_truth(store, config.refine.jitter).items():
        cases[name] = functools.partial(list, draws)
    frozen: dict[int, PoseFeatures] = {}
    for start in starts:
        last = Checkpoints(out / name_of(start)).last()
        assert last is not None
        changed = with_values(config, {"refine.start": start})
        estimator = load_estimator(
            last,
            changed.student,
            changed.distill,
            changed.refine,
            changed.trial,
            resolve(changed),
        )
        cache_student(estimator, frozen if config.refine.student == "frozen" else {})
        for case, make in cases.items():
            key = f"{name_of(start)} / {case}"
            if key not in results:
                results[key] = measure(estimator, store, truth, make(), groups)
                write_atomic(file, json.dumps(results, indent=1))
    return results


def show(results: dict[str, Any]) -> None:
    table = new_table(
        "val people of lspet_crowd (x100): before > after",
        "refiner / poses",
        "AP",
        "easy",
        "hard",
        "mean OKS",
        "gain",
        "gain, 12 joints",
        num_left=7,
    )
    for key, row in results.items():
        pairs = [(row[f"{n}_before"], row[f"{n}_after"]) for n in ("ap", "ap_easy", "ap_hard")]
        table.add_row(
            key,
            *(f"{100 * b:.1f} > {100 * a:.1f}" for b, a in (*pairs, row["oks_all"])),
            *(
                "{:+.1f} .. {:+.1f}".format(*(100 * bound for bound in row[f"gain_{kind}"]))
                for kind in ("all", "shared")
            ),
        )
    console = Console(width=140)
    console.print(table)
    console.print(
        "gain: 95 % interval of the gain in mean OKS; 12 joints: without head and neck, which "
        "methods with COCO's 17 joints don't predict"
    )


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of lspet_crowd")
    parser.add_argument("--out", type=Path, required=True, help="folder of all output")
    parser.add_argument(
        "--poses",
        metavar="JSON",
        type=Path,
        action="append",
        default=[],
        help="COCO results on the val images; may be repeated",
    )
    parser.add_argument(
        "--start",
        metavar="START",
        action="append",
        help="refine.start of a refiner: jitter, or COCO results on the train images; may be "
        "repeated (default: jitter)",
    )
    parser.add_argument(
        "--movenet",
        metavar="JSON",
        type=Path,
        help="a MoveNet's TF.js .json: adds its results on val as a case, those on train as a "
        "start",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a short test; needs an --out of its own"
    )
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="settings, as of tune.py")
    options = parser.parse_args()
    out = options.out.absolute()
    config = compose(
        [
            f"storage={out}",
            f"data.root={options.data.absolute()}",
            *SETTINGS,
            *(QUICK if options.quick else ()),
            *options.settings,
        ]
    )
    torch.set_num_threads(max(1, int(config.trial.cpus)))
    data = prepare_quietly(config, resolve(config))
    starts, poses = options.start or ["jitter"], list(options.poses)
    if options.movenet:
        poses.append(movenet_poses(config, options.movenet, out, "val"))
        starts.append(str(movenet_poses(config, options.movenet, out, "train")))
    train(config, data, out, starts)
    show(score(config, data, out, starts, poses))


if __name__ == "__main__":
    main()
