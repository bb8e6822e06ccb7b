"""The cost of storing a teacher's targets: their error against the same teacher, run online."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch

from models.codecs.codec import HeatmapCodec
from models.skeleton import Skeleton
from study.cache.teacher_store import BATCH_SIZE, TeacherStore
from study.data.annotations import SCORED_JOINT
from study.data.augmentation import Augmentation, affines_of, cut_crops, flip_order_of, mirror
from study.data.crops import stored_frame
from study.storage.paths import target_error_file
from study.teachers.online import OnlineTeacher

COCO_PEOPLE = 150_000
MEASURED = 512
"""People whose targets are compared."""
SCALES, ROTATION = (0.65, 1.35), 40.0
"""Range of the scale, and largest rotation either way, degrees."""


def target_error(
    cached: TeacherStore,
    online: OnlineTeacher,
    skeleton: Skeleton,
    codec: HeatmapCodec,
    device: torch.device,
    seed: int,
) -> dict[str, float]:
    """Measure how far stored targets are from those that the teacher predicts for augmented crops.

    People are drawn at random, scaled by 0.65 to 1.35, rotated by up to 40 degrees either way, and
    half of them mirrored. A joint counts if the online teacher's score is above SCORED_JOINT and
    its place lies in the crop. Part of the difference is not due to storing: no network predicts
    exactly the same pose for a rotated crop.

    Args:
        codec: the student's; it sets the frame and renders the heatmaps to compare.
    """
    generator = torch.Generator().manual_seed(seed)
    store, frame = online.student, codec.frame
    order = torch.randperm(len(store), generator=generator)[:MEASURED]
    height, width = frame.size
    distances, height_errors, energy, total = [], [], 0.0, 0.0
    for people in order.split(BATCH_SIZE):
        count = len(people)
        draws = torch.rand(3, count, generator=generator)
        mirrored = draws[2] < 0.5
        rotated = affines_of(
            torch.tensor(stored_frame(frame.size).center).expand(count, 2),
            width * (SCALES[0] + (SCALES[1] - SCALES[0]) * draws[0]),
            math.radians(ROTATION) * (2 * draws[1] - 1),
            frame,
        )
        affine = mirror(rotated, mirrored, frame)
        drawn, rows = Augmentation(affine, flip_order_of(mirrored, skeleton)), people.numpy()
        crops = cut_crops(store.crops(rows), affine, frame, device)
        expected = online.targets(rows, drawn, frame, crops).modes_crop.cpu()
        stored = cached.targets(rows, drawn, frame, crops).modes_crop
        places = expected[:, :, 0, :2]
        inside = ((places >= 0) & (places < torch.tensor([width, height]))).all(dim=-1)
        counted = inside & (expected[:, :, 0, 2] > SCORED_JOINT)
        distances.append((stored[:, :, 0, :2] - places).norm(dim=-1)[counted])
        height_errors.append((stored[:, :, 0, 2] - expected[:, :, 0, 2]).abs()[counted])
        stored_maps, expected_maps = codec.render(stored), codec.render(expected)
        energy += float((stored_maps - expected_maps).square().sum())
        total += float(expected_maps.square().sum())
    pixels, heights = torch.cat(distances), torch.cat(height_errors)
    if not len(pixels):
        return {"joints": 0.0}
    return {
        "joints": float(len(pixels)),
        "median_px": float(pixels.median()),
        "p90_px": float(pixels.quantile(0.9)),
        "mean_px": float(pixels.mean()),
        "beyond_a_cell": float((pixels > height / codec.heatmap_size[0]).float().mean()),
        "height": float(heights.mean()),
        "energy": energy / max(total, 1e-9),
    }


def record_target_error(
    folder: Path,
    cached: TeacherStore,
    online: OnlineTeacher,
    skeleton: Skeleton,
    codec: HeatmapCodec,
    device: torch.device,
    seed: int,
) -> None:
    """Write the error of the targets and their bytes per person to the teacher's folder.

    Args:
        folder: the teacher's.
        codec: see ``target_error``.
    """
    error = target_error(cached, online, skeleton, codec, device, seed)
    size = cached.num_bytes / cached.num_views / len(cached)
    record = {**error, "bytes_per_person": size, "views": cached.num_views}
    target_error_file(folder).write_text(json.dumps(record))


def describe_targets(folder: Path) -> str:
    """Describe the stored targets, their error and their size, in one line."""
    found = json.loads(target_error_file(folder).read_text())
    size = found["bytes_per_person"]
    text = f"{size:.0f} bytes a person, {size * COCO_PEOPLE / 1e6:.0f} MB for COCO's 150,000"
    if found["views"] > 1:
        text += f" (here times {found['views']}, for the views of each person)"
    if not found["joints"]:
        return f"stored targets: {text}; the teacher is sure of no joint"
    return (
        "stored targets, against the teacher's on augmented crops: "
        f"{found['median_px']:.1f} px off in the median, {found['p90_px']:.1f} in the worst "
        f"tenth, {found['energy']:.0%} of the heatmaps' energy; {text}"
    )
