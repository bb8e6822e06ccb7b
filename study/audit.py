"""Everything that is wrong with the data, found and listed before anything is trained.

Faults are told of people whom the study would use. What the official readers skip by design, and
joints a few pixels outside their picture, which official files have, are counted by ``notes``.

Of a picture the audit looks at no more than its first and last bytes: a JPEG that was cut off
lacks its end-of-image marker (decoders differ in whether they mind), a PNG its last chunk. Only a
picture that fails this, or is of another kind, is read whole and decoded. That is some 30
microseconds for a sound picture, not the milliseconds of a decoder: COCO has 118,000, and each is
decoded once anyway, when its people are cropped, where damage between the two ends comes to light.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np

from models.skeleton import Skeleton
from study.annotation_table import WHERE, AnnotationTable, read_table
from study.config import InputError

WRONG_LENGTH = "keypoints of the wrong length"
WRONG_VISIBILITY = "visibility that is not 0, 1 or 2"
NOT_FINITE = "coordinates that are not finite"
JOINT_OUTSIDE = "joint far outside its picture"
WRONG_BOX = "box that is not four finite numbers"
ZERO_BOX = "box of zero size"
DUPLICATE_ID = "duplicate annotation id"
UNKNOWN_IMAGE = "image id without its one picture"
MISSING_PICTURE = "picture missing"
BROKEN_PICTURE = "picture truncated or unreadable"

FAR_OUTSIDE = 0.1
"""How far beyond the edge a labelled joint may lie, over the picture's longer side. Official files
go up to 7 pixels in 640; exchanged axes and wrong pictures go much further."""
EXAMPLES = 3
"""How many faults of a kind a message shows."""
READERS = 16
"""Threads that look at pictures: what they wait for is the disk."""
CHUNK = 128

Progress = Callable[[int, int], None]
"""Called with the number of pictures looked at and of all."""

Check = tuple[str, np.ndarray, Callable[[int], str]]
"""Kind of fault, whether each annotation has it (N,), and the detail of annotation i."""


@dataclasses.dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong with the data, and where; a warning stops nothing."""

    kind: str
    file: Path
    annotation_id: int | None
    image_id: int | None
    detail: str
    is_warning: bool = False


def audit(
    annotations: Path,
    images: Path,
    skeleton: Skeleton,
    *,
    verify_pictures: bool = True,
    progress: Progress | None = None,
) -> list[Fault]:
    """All faults of the file and of the pictures that its people are in; none where all is well.

    Raises:
        InputError: where there is nothing to list: no folder, no file, no such format, no person.
    """
    if verify_pictures and annotations.is_file() and not images.is_dir():
        raise InputError(
            f"the folder of the pictures must exist, got {images}; "
            "change data.root or data.{train,val}.images"
        )
    table = read_table(annotations, skeleton)
    require_people(table)
    faults = annotation_faults(table)
    if verify_pictures:
        faults += _picture_faults(table, images, progress)
    return faults


def require_people(table: AnnotationTable, left_out: int = 0) -> None:
    """Nothing, where the file has a person to use beside the people left out."""
    if np.count_nonzero(table.is_used) > left_out:
        return
    raise InputError(
        "the annotation file must have at least one person with a labelled joint, got "
        f"{len(table.ids)} annotations ({np.count_nonzero(table.is_crowd)} crowd regions, "
        f"{np.count_nonzero(table.is_labelled)} with labelled joints, {left_out} left out for "
        f"their faults) in {table.path}; {WHERE}"
    )


def notes(annotations: Path, skeleton: Skeleton) -> dict[str, int]:
    """How many annotations are people, and how many official readers skip or mend for what."""
    table = read_table(annotations, skeleton)
    outside = table.joints_outside().max(axis=1, initial=0)
    start, size = table.boxes[:, :2], table.boxes[:, 2:]
    is_cut = ((start < 0) | (start + size > table.image_sizes[:, ::-1])).any(axis=1)
    return {
        "people": int(table.is_used.sum()),
        "crowd regions": int(table.is_crowd.sum()),
        "people without labelled joints": int((~table.is_labelled & ~table.is_crowd).sum()),
        "people without area": int((table.is_labelled & ~table.is_crowd & ~table.is_used).sum()),
        "boxes clipped to the picture": int((is_cut & table.is_used).sum()),
        "people with a joint outside the picture": int(((outside > 0) & table.is_used).sum()),
    }


def annotation_faults(table: AnnotationTable) -> list[Fault]:
    """The faults in the annotations of used people; one person may have several."""
    return [
        Fault(kind, table.path, int(table.ids[i]), int(table.image_ids[i]), detail(int(i)))
        for kind, is_faulty, detail in (*_keypoint_checks(table), *_box_checks(table))
        for i in np.flatnonzero(is_faulty & table.is_used)
    ]


def _keypoint_checks(table: AnnotationTable) -> list[Check]:
    num_joints = table.keypoints.shape[1]
    has_length = table.num_numbers == 3 * num_joints
    is_finite = np.isfinite(table.keypoints).all(axis=(1, 2))
    has_visibility = np.isin(table.keypoints[:, :, 2], (0, 1, 2)).all(axis=1)
    outside = table.joints_outside().max(axis=1)
    is_far = is_finite & (outside > FAR_OUTSIDE * table.image_sizes.max(axis=1))

    def length(i: int) -> str:
        found = int(table.num_numbers[i])
        return (
            f"keypoints must be 3 numbers for each of the skeleton's {num_joints} joints, got "
            f"{found} numbers ({found / 3:g} joints); change data.skeleton or the file"
        )

    def visibility(i: int) -> str:
        return f"its visibility has the values {np.unique(table.keypoints[i, :, 2]).tolist()}"

    def distance(i: int) -> str:
        return f"a joint is {outside[i]:g} px beyond the edge {_of_picture(table, i)}"

    return [
        (WRONG_LENGTH, ~has_length, length),
        (
            NOT_FINITE,
            has_length & ~is_finite,
            lambda _: "keypoints hold NaN, infinity or text",
        ),
        (WRONG_VISIBILITY, is_finite & ~has_visibility, visibility),
        (JOINT_OUTSIDE, is_far, distance),
    ]


def _box_checks(table: AnnotationTable) -> list[Check]:
    has_box = np.isfinite(table.boxes).all(axis=1)
    has_image = table.image_rows >= 0
    is_void = ~(table.clipped_boxes[:, 2:] > 0).all(axis=1)
    _, places, counts = np.unique(table.ids, return_inverse=True, return_counts=True)
    num_alike = counts[places]

    def void(i: int) -> str:
        return f"the box {table.boxes[i].tolist()} covers nothing {_of_picture(table, i)}"

    return [
        (WRONG_BOX, ~has_box, lambda _: "bbox must be x, y, width, height in image pixels"),
        (ZERO_BOX, has_box & has_image & is_void, void),
        (DUPLICATE_ID, num_alike > 1, lambda i: f"{num_alike[i]} annotations have this id"),
        (UNKNOWN_IMAGE, ~has_image, lambda i: f"'images' must have id {table.image_ids[i]} once"),
    ]


def check(faults: Sequence[Fault], max_bad_fraction: float, num_people: int) -> None:
    """Nothing, where at most that fraction of the people has a fault; warnings do not count.

    Args:
        num_people: how many people there are, the faulty among them (``notes(...)["people"]``).

    Raises:
        InputError: with the number of faults of each kind and the first examples.
    """
    counted = [fault for fault in faults if not fault.is_warning]
    num_bad = len({(fault.annotation_id, fault.image_id) for fault in counted})
    if num_bad <= max_bad_fraction * num_people:
        return
    needed = math.ceil(1e4 * num_bad / num_people) / 1e4
    advice = f", or set data.max_bad_fraction={needed:g} to leave these people out"
    raise InputError(
        f"at most a fraction of {max_bad_fraction:g} of the people may be faulty "
        f"(data.max_bad_fraction), got {num_bad} of {num_people}:\n{describe(counted)}\n"
        f"mend the files or change data.root{advice if num_bad < num_people else ''}"
    )


def describe(faults: Iterable[Fault]) -> str:
    """A line for each kind with its number, and below it the first faults with their places."""
    by_kind: dict[str, list[Fault]] = defaultdict(list)
    for fault in faults:
        by_kind[fault.kind].append(fault)
    lines = []
    for kind, group in by_kind.items():
        lines.append(f"  {kind}: {len(group)}")
        lines += [
            f"    {fault.file}, annotation {fault.annotation_id}: {fault.detail}"
            for fault in group[:EXAMPLES]
        ]
        lines += [f"    and {len(group) - EXAMPLES} more"] if len(group) > EXAMPLES else []
    return "\n".join(lines)


def faulty_ids(faults: Iterable[Fault]) -> frozenset[int]:
    """The annotations to leave out: all that have a fault, those with a mere warning kept."""
    return frozenset(
        fault.annotation_id
        for fault in faults
        if fault.annotation_id is not None and not fault.is_warning
    )


def picture_problem(picture: Path) -> tuple[str, str] | None:
    """Kind and detail of what is wrong with the file, by a look at its two ends; else none."""
    try:
        with picture.open("rb", buffering=0) as file:
            start = file.read(8)
            file.seek(-min(12, file.seek(0, 2)), 2)
            end = file.read(12)
        is_jpeg = start.startswith(b"\xff\xd8\xff") and end.endswith(b"\xff\xd9")
        if is_jpeg or (start == b"\x89PNG\r\n\x1a\n" and end[4:8] == b"IEND"):
            return None
        detail = _decoding_problem(picture.read_bytes())
    except FileNotFoundError:
        return MISSING_PICTURE, "there is no such file"
    except OSError as error:
        return BROKEN_PICTURE, f"it cannot be read: {error.strerror}"
    return (BROKEN_PICTURE, detail) if detail else None


def _decoding_problem(data: bytes) -> str:
    """What keeps these bytes from being a whole picture; empty where nothing does."""
    if not data:
        return "the file is empty"
    if data.startswith(b"\xff\xd8\xff"):
        # A thumbnail in the header ends with a marker of its own: the picture's follows the scan.
        scan = data.rfind(b"\xff\xda")
        if scan < 0 or data.find(b"\xff\xd9", scan) < 0:
            return f"the JPEG is cut off after {len(data)} bytes: it has no end-of-image marker"
    if cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) is None:
        return f"its {len(data)} bytes are not a picture that can be decoded"
    return ""


def _picture_faults(
    table: AnnotationTable, images: Path, progress: Progress | None
) -> list[Fault]:
    """A fault for every used person whose picture is missing or broken."""
    people = np.flatnonzero(table.is_used & (table.image_rows >= 0))
    rows = np.unique(table.image_rows[people])
    problems: dict[int, tuple[str, str]] = {}

    def look(chunk: np.ndarray) -> list[tuple[str, str] | None]:
        return [picture_problem(images / table.image_names[row]) for row in chunk]

    chunks = [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]
    num_seen = 0
    with ThreadPoolExecutor(READERS) as pool:
        for chunk, found in zip(chunks, pool.map(look, chunks), strict=True):
            problems.update((int(r), p) for r, p in zip(chunk, found, strict=True) if p)
            num_seen += len(chunk)
            if progress is not None:
                progress(num_seen, len(rows))
    return [
        Fault(
            kind,
            images / table.image_names[table.image_rows[i]],
            int(table.ids[i]),
            int(table.image_ids[i]),
            detail,
        )
        for i in people[np.isin(table.image_rows[people], list(problems))]
        for kind, detail in [problems[int(table.image_rows[i])]]
    ]


def _of_picture(table: AnnotationTable, i: int) -> str:
    height, width = table.image_sizes[i]
    return f"of its picture, which is {height:g} px high and {width:g} px wide"
