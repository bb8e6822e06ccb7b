"""What storing the teacher's answers costs: their error against a teacher that is asked anew."""

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


def target_error(
    cached: TeacherStore,
    live: OnlineTeacher,
    skeleton: Skeleton,
    codec: HeatmapCodec,
    device: torch.device,
    seed: int,
) -> dict[str, float]:
    """How far stored targets are from what the teacher says of the augmented crops themselves.

    People are drawn at random, scaled by 0.65 to 1.35, turned by up to 40 degrees either way, and
    every second one mirrored. Places count where the live teacher's score is above SCORED_JOINT
    and its joint lies in the crop. Part of the difference is the teacher's own: no network says
    quite the same of a turned crop.

    Args:
        codec: the student's, in whose frame and by which targets are rendered.
    """
    generator = torch.Generator().manual_seed(seed)
    store, frame = live.student, codec.frame
    order = torch.randperm(len(store), generator=generator)[:MEASURED]
    height, width = frame.size
    far, steps, energy, total = [], [], 0.0, 0.0
    for people in order.split(BATCH_SIZE):
        count = len(people)
        draws = torch.rand(3, count, generator=generator)
        mirrored = draws[2] < 0.5
        turned = affines_of(
            torch.tensor(stored_frame(frame.size).center).expand(count, 2),
            width * (SCALES[0] + (SCALES[1] - SCALES[0]) * draws[0]),
            math.radians(ROTATION) * (2 * draws[1] - 1),
            frame,
        )
        affine = mirror(turned, mirrored, frame)
        drawn, rows = Augmentation(affine, flip_order_of(mirrored, skeleton)), people.numpy()
        crops = cut_crops(store.crops(rows), affine, frame, device)
        said = live.answers(rows, drawn, frame, crops).modes_crop.cpu()
        kept = cached.answers(rows, drawn, frame, crops).modes_crop
        places = said[:, :, 0, :2]
        inside = ((places >= 0) & (places < torch.tensor([width, height]))).all(dim=-1)
        counted = inside & (said[:, :, 0, 2] > SCORED_JOINT)
        far.append((kept[:, :, 0, :2] - places).norm(dim=-1)[counted])
        steps.append((kept[:, :, 0, 2] - said[:, :, 0, 2]).abs()[counted])
        rendered, expected = codec.render(kept), codec.render(said)
        energy += float((rendered - expected).square().sum())
        total += float(expected.square().sum())
    pixels, heights = torch.cat(far), torch.cat(steps)
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


def note_target_error(
    folder: Path,
    cached: TeacherStore,
    live: OnlineTeacher,
    skeleton: Skeleton,
    codec: HeatmapCodec,
    device: torch.device,
    seed: int,
) -> None:
    """Write the error of the targets and their bytes per person to the teacher's folder.

    Args:
        codec: as ``target_error``.
    """
    error = target_error(cached, live, skeleton, codec, device, seed)
    size = cached.num_bytes / cached.num_views / len(cached)
    note = {**error, "bytes_per_person": size, "views": cached.num_views}
    target_error_file(folder).write_text(json.dumps(note))


def describe_targets(folder: Path) -> str:
    """One line on the stored targets: their error and their size."""
    found = json.loads(target_error_file(folder).read_text())
    size = found["bytes_per_person"]
    words = f"{size:.0f} bytes a person, {size * COCO_PEOPLE / 1e6:.0f} MB for COCO's 150,000"
    if found["views"] > 1:
        words += f" (here {found['views']} times that, for as many views of each)"
    if not found["joints"]:
        return f"stored targets: {words}; the teacher is sure of no joint"
    return (
        "stored targets, against the teacher asked about augmented crops: "
        f"{found['median_px']:.1f} px off in the median, {found['p90_px']:.1f} in the worst "
        f"tenth, {found['energy']:.0%} of the heatmaps' energy; {words}"
    )
