"""Find what is wrong with the data before anything is trained, and list it.

Faults concern people that the study would use. What the official readers skip by design, and
oddities that official files have, are notes: they stop nothing and leave nobody out.

The audit reads only the header and the last bytes of an image. That takes some 40 microseconds
where decoding takes milliseconds, and COCO has 118,000 images. Each is decoded later anyway, when
its people are cropped; damage between header and end is found there.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from study.data.annotations import AnnotationTable
from study.data.categories import naming_fault
from study.data.coco_json import WHERE
from study.data.coordinates import (
    COMMON,
    FEW,
    FRACTION_BOX,
    OTHER_SCALE,
    coordinate_checks,
    is_common,
    other_scale,
)
from study.data.image_files import (
    MISSING_IMAGE,
    NO_FILE,
    TURNED_IMAGE,
    image_problem,
    missing_detail,
)
from study.errors import InputError
from study.storage.files import atomic_path

WRONG_LENGTH = "keypoints of the wrong length"
WRONG_VISIBILITY = "visibility that is not 0, 1 or 2"
NOT_FINITE = "coordinates that are not finite"
JOINT_OUTSIDE = "joint far outside its image"
WRONG_BOX = "box that is not four finite numbers"
ZERO_BOX = "box of zero size"
NO_SIZE = "image without its size"
DUPLICATE_ID = "duplicate annotation id"
UNKNOWN_IMAGE = "image id without its one image"
WRONG_AREA = "area that is not a positive number"
OTHER_CATEGORY = "category that is not the person's"
OTHER_JOINTS = "joints of another skeleton"
FAR_OUTSIDE = 0.1
"""How far outside its image a labeled joint may lie, as a share of the image's longer side.

Official files have joints up to 7 pixels outside an image of 640; swapped axes and wrong images
give much more."""
EXAMPLES = 3
"""Faults of a kind that a message shows."""
READERS = 16
"""Threads that check images; they mostly wait for the disk."""
CHUNK = 128
"""Images that a thread checks at once."""
Progress = Callable[[int, int], None]
"""Called with the number of images checked and of all."""
Check = tuple[str, np.ndarray, Callable[[int], str]]
"""Kind of fault, whether each annotation has it (N,), and the detail of annotation i."""
NO_AREA = "person without area"
NO_COUNT = "num_keypoints 0 of a person with labeled joints"
LABELED_CROWD = "crowd region with labeled joints"
UNSEEN = "person whose joints all have visibility 0"
AT_ORIGIN = "labeled joint at 0, 0"
MANY, MOST = 0.3, 0.75
"""Share of the people, and of few people, from which a skipped person is a fault where official
files have some; CrowdPose skips 0.11 of its people."""
SCHEMA = pa.schema(
    [
        ("kind", pa.dictionary(pa.int32(), pa.string())),
        ("is_fault", pa.bool_()),  # False: a note, which stops nothing
        ("file", pa.dictionary(pa.int32(), pa.string())),  # the image, or the annotation file
        ("image_id", pa.int64()),  # null if the row is about a whole file
        ("annotation_id", pa.int64()),
        ("detail", pa.string()),
    ]
)


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
    table: AnnotationTable,
    image_folder: Path,
    *,
    verify_images: bool = True,
    progress: Progress | None = None,
) -> list[Fault]:
    """List all faults of an annotation file and of the images that its people are in.

    Raises:
        InputError: the folder of the images is missing, or the file has no person to use.
    """
    if verify_images:
        check_image_folder(image_folder)
    require_people(table)
    faults = annotation_faults(table)
    if verify_images:
        faults += _image_faults(table, image_folder, progress)
    return faults


def check_image_folder(folder: Path) -> None:
    """Raise if the folder of the images is missing."""
    if not folder.is_dir():
        raise InputError(
            f"the folder of the images must exist, got {folder}; "
            "change data.root or data.{train,val}.images"
        )


def require_people(table: AnnotationTable, left_out: int = 0) -> None:
    """Raise if no usable person remains after this many are left out."""
    if table.num_people > left_out:
        return
    num_others = np.count_nonzero(~table.is_person)
    others = f"{num_others} of other categories than {table.category.name}, " if num_others else ""
    skipped = [
        f"{kind}: {mask.sum()}; {detail(0)}"
        for (kind, mask, detail), _ in skipped_checks(table)
        if mask.any()
    ]
    raise InputError(
        "the annotation file must have at least one person with a labeled joint, got "
        f"{len(table.ids)} annotations ({others}{np.count_nonzero(table.is_crowd)} crowd regions, "
        f"{np.count_nonzero(table.is_labeled)} with labeled joints, {left_out} left out for "
        f"their faults) in {table.path}; {'; '.join(skipped) or WHERE}"
    )


def annotation_faults(table: AnnotationTable) -> list[Fault]:
    """List the faults in the annotations of used people; a person may have several."""
    units = coordinate_checks(table)
    checks = (
        *_keypoint_checks(table),
        *units,
        *_box_checks(table, dict((kind, mask) for kind, mask, _ in units).get(FRACTION_BOX)),
        *_category_checks(table),
    )
    found = run_checks(table, checks, table.is_used)
    skipped = [check for check, is_fault in skipped_checks(table) if is_fault]
    found += run_checks(table, skipped, ~table.is_used)
    if detail := other_scale(table):
        found.insert(0, Fault(OTHER_SCALE, table.path, None, None, detail))
    if detail := naming_fault(table.category, table.skeleton):
        found.insert(0, Fault(OTHER_JOINTS, table.path, None, None, detail))
    return found


def skipped_checks(table: AnnotationTable) -> list[tuple[Check, bool]]:
    """Return why official readers skip people with joints, and whether that is a fault.

    It is one if many are skipped, since a converter rather than an annotator did that.
    """
    visibility = table.keypoints[:, :, 2]
    has_joints = (visibility > 0).any(axis=1)
    has_position = (table.keypoints[:, :, :2] > 0).any(axis=(1, 2))
    candidates = table.is_person & ~table.is_used
    is_one = candidates & ~table.is_crowd
    has_box = (table.boxes[:, 2:] > 0).all(axis=1)

    def check(kind: str, mask: np.ndarray, share: float, advice: str) -> tuple[Check, bool]:
        count = int(mask.sum())
        total = count + table.num_people
        if share == MANY and total < FEW:
            share = MOST
        is_fault = is_common(count, total, share)
        return (kind, mask, lambda _: advice), is_fault

    return [
        check(
            NO_AREA,
            is_one & table.is_labeled & (table.areas == 0) & has_box,
            COMMON,
            "leave area out, or write the person's square pixels, since readers skip area 0",
        ),
        check(
            NO_COUNT,
            is_one & has_joints & (table.num_keypoints == 0),
            MANY,
            "leave num_keypoints out, or correct it, since readers skip num_keypoints 0",
        ),
        check(
            LABELED_CROWD,
            candidates & table.is_crowd & has_joints,
            MANY,
            "write iscrowd 0 for one person, since readers skip crowd regions",
        ),
        check(
            UNSEEN,
            is_one & ~has_joints & has_position & (visibility == 0).all(axis=1),
            MANY,
            "write visibility 1 or 2 for labeled joints, since 0 means not labeled",
        ),
    ]


def run_checks(
    table: AnnotationTable,
    checks: Iterable[Check],
    candidates: np.ndarray,
    *,
    is_warning: bool = False,
) -> list[Fault]:
    """Return a fault for each failed check of the annotations in the mask ``candidates`` (N,)."""
    ids, image_ids = table.ids.tolist(), table.image_ids.tolist()
    return [
        Fault(kind, table.path, ids[i], image_ids[i], detail(i), is_warning)
        for kind, is_faulty, detail in checks
        for i in np.flatnonzero(is_faulty & candidates).tolist()
    ]


def _keypoint_checks(table: AnnotationTable) -> list[Check]:
    num_joints = table.keypoints.shape[1]
    has_length = table.num_numbers == 3 * num_joints
    is_finite = np.isfinite(table.keypoints).all(axis=(1, 2))
    has_visibility = np.isin(table.keypoints[:, :, 2], (0, 1, 2)).all(axis=1)
    outside = table.pixels_outside().max(axis=1)
    origin = origin_check(table)
    has_size = (table.image_sizes > 0).all(axis=1)
    is_far = is_finite & has_size & (outside > FAR_OUTSIDE * table.image_sizes.max(axis=1))

    def length(i: int) -> str:
        found, text = int(table.num_numbers[i]), table.unread.get(("keypoints", i), "")
        got = f"{found} numbers ({found / 3:g} joints)"
        advice = "change data.skeleton or the file"
        if found < 0:
            got, advice = text, "write a list"
        elif text.startswith("[["):
            got, advice = f"{found} lists, {text}", "write all numbers into one list"
        elif found == 2 * num_joints:
            advice = "write the visibility after x and y: 2 visible, 1 hidden, 0 not labeled"
        return (
            f"keypoints must be 3 numbers for each of the skeleton's {num_joints} joints, got "
            f"{got}; {advice}"
        )

    def content(i: int) -> str:
        text = table.unread.get(("keypoints", i))
        return "keypoints hold null, NaN, infinity or text" + (f": {text}" if text else "")

    def visibility(i: int) -> str:
        return f"its visibility has the values {np.unique(table.keypoints[i, :, 2]).tolist()}"

    def distance(i: int) -> str:
        return f"a joint is {outside[i]:g} px beyond the edge {_of_image(table, i)}"

    return [
        (WRONG_LENGTH, ~has_length, length),
        (
            NOT_FINITE,
            has_length & ~is_finite,
            content,
        ),
        (WRONG_VISIBILITY, is_finite & ~has_visibility, visibility),
        (JOINT_OUTSIDE, is_far, distance),
        *([origin] if is_common(int(origin[1].sum()), table.num_people) else []),
    ]


def origin_check(table: AnnotationTable) -> Check:
    """Return which used people have labeled joints at 0, 0 or less: missing, yet labeled."""
    at_origin = (table.keypoints[:, :, 2] > 0) & (table.keypoints[:, :, :2] <= 0).all(axis=2)

    def text(i: int) -> str:
        return f"{at_origin[i].sum()} joints; visibility 0 would leave them unlabeled"

    return AT_ORIGIN, at_origin.any(axis=1) & table.is_used, text


def _box_checks(table: AnnotationTable, is_fraction: np.ndarray | None) -> list[Check]:
    has_box = np.isfinite(table.boxes).all(axis=1)
    has_image = table.image_rows >= 0
    has_size = (table.image_sizes > 0).all(axis=1)
    is_void = ~(table.clipped_boxes[:, 2:] > 0).all(axis=1)
    if is_fraction is not None:  # a fault already
        is_void &= ~is_fraction
    _, places = np.unique(table.ids, return_inverse=True)
    num_alike = np.bincount(places[table.is_person], minlength=len(places) + 1)[places]

    def void(i: int) -> str:
        return f"the box {table.boxes[i].tolist()} covers nothing {_of_image(table, i)}"

    def size(i: int) -> str:
        height, width = table.image_sizes[i]
        return f"'images' must have its height and width in pixels, got {height:g} and {width:g}"

    return [
        (
            WRONG_BOX,
            ~has_box,
            lambda i: (
                "bbox must be x, y, width, height in image pixels, got "
                f"{table.unread.get(('bbox', i))}"
            ),
        ),
        (NO_SIZE, has_image & ~has_size, size),
        (ZERO_BOX, has_box & has_size & is_void, void),
        (DUPLICATE_ID, num_alike > 1, lambda i: f"{num_alike[i]} annotations have this id"),
        (UNKNOWN_IMAGE, ~has_image, lambda i: f"'images' must have id {table.image_ids[i]} once"),
        (
            WRONG_AREA,
            ~(np.isfinite(table.areas) & (table.areas >= 0)) & has_box,
            lambda i: f"area must be square pixels, got {table.areas[i]:g}",
        ),
    ]


def _category_checks(table: AnnotationTable) -> list[Check]:
    """Check that people are of the people's category, if the file has one."""
    number, others = table.category.id, table.category.others
    is_other = (table.category_ids >= 0) & (table.category_ids != number)

    def category(i: int) -> str:
        found = int(table.category_ids[i])
        if found in others:
            name = f"({others[found]}, which lists no joints)"
            advice = "set data.category to its name to read that one"
        else:
            name, advice = "(which the file does not list)", "correct the file"
        return f"category_id must be the person's, {number}, got {found} {name}; {advice}"

    return [(OTHER_CATEGORY, is_other & (number is not None), category)]


def require_few_faults(faults: Sequence[Fault], max_bad_fraction: float, num_people: int) -> None:
    """Raise if more than this fraction of the people is faulty; warnings do not count.

    Args:
        num_people: all people of the file, including the faulty ones.

    Raises:
        InputError: too many people are faulty; names the number of faults of each kind and the
            first examples.
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
        f"fix the files or change data.root{advice if num_bad < num_people else ''}"
    )


def describe(faults: Iterable[Fault]) -> str:
    """Return a line per kind with its number of faults, and the first of them with their files."""
    by_kind: dict[str, list[Fault]] = collections.defaultdict(list)
    for fault in faults:
        by_kind[fault.kind].append(fault)
    lines = []
    for kind, group in by_kind.items():
        lines.append(f"  {kind}: {len(group)}")
        lines += [
            f"    {fault.file}{_annotation_of(fault)}: {fault.detail}"
            for fault in group[:EXAMPLES]
        ]
        lines += [f"    and {len(group) - EXAMPLES} more"] if len(group) > EXAMPLES else []
    return "\n".join(lines)


def _annotation_of(fault: Fault) -> str:
    return "" if fault.annotation_id is None else f", annotation {fault.annotation_id}"


def faulty_ids(faults: Iterable[Fault]) -> frozenset[int]:
    """Return the ids of annotations that have a fault; warnings do not count."""
    return frozenset(
        fault.annotation_id
        for fault in faults
        if fault.annotation_id is not None and not fault.is_warning
    )


def _image_faults(table: AnnotationTable, folder: Path, progress: Progress | None) -> list[Fault]:
    """Return a fault for every used person whose image is missing or broken."""
    people = np.flatnonzero(table.is_used & (table.image_rows >= 0))
    rows = np.unique(table.image_rows[people])
    problems: dict[int, tuple[str, str]] = {}

    def find_problem(name: str, height: float, width: float) -> tuple[str, str] | None:
        problem = image_problem(folder / name, height, width)
        if problem == (MISSING_IMAGE, NO_FILE):
            return MISSING_IMAGE, missing_detail(folder, name)
        return problem

    def find_problems(chunk: np.ndarray) -> list[tuple[str, str] | None]:
        sizes = table.images.sizes[chunk].tolist()
        names = (table.images.names[row] for row in chunk)
        return [find_problem(n, *size) for n, size in zip(names, sizes, strict=True)]

    chunks = [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]
    num_checked = 0
    with ThreadPoolExecutor(READERS) as pool:
        for chunk, found in zip(chunks, pool.map(find_problems, chunks), strict=True):
            problems.update((int(r), p) for r, p in zip(chunk, found, strict=True) if p)
            num_checked += len(chunk)
            if progress is not None:
                progress(num_checked, len(rows))
    return [
        Fault(
            kind,
            folder / table.images.names[table.image_rows[i]],
            int(table.ids[i]),
            int(table.image_ids[i]),
            detail,
            is_warning=kind == TURNED_IMAGE,
        )
        for i in people[np.isin(table.image_rows[people], list(problems))]
        for kind, detail in [problems[int(table.image_rows[i])]]
    ]


def _of_image(table: AnnotationTable, i: int) -> str:
    height, width = table.image_sizes[i]
    return f"of its image, which is {height:g} px high and {width:g} px wide"


def write_audit(file: Path, faults: Iterable[Fault]) -> Path:
    """Write faults and notes as a Parquet file, with no rows if there are none."""
    rows = list(faults)
    columns = [
        pa.array([fault.kind for fault in rows]),
        pa.array([not fault.is_warning for fault in rows], pa.bool_()),
        pa.array([printable(str(fault.file)) for fault in rows], pa.string()),
        pa.array([fault.image_id for fault in rows], pa.int64()),
        pa.array([fault.annotation_id for fault in rows], pa.int64()),
        pa.array([printable(fault.detail) for fault in rows], pa.string()),
    ]
    arrays = [
        column if field.type == column.type else column.cast(pa.string()).cast(field.type)
        for column, field in zip(columns, SCHEMA, strict=True)
    ]
    write_parquet(file, pa.Table.from_arrays(arrays, schema=SCHEMA))
    return file


def write_parquet(file: Path, table: pa.Table) -> None:
    """Write a Parquet file atomically, creating its folder."""
    with atomic_path(file) as temporary, temporary.open("wb") as content:
        pq.write_table(table, content)


def printable(text: str) -> str:
    """Escape the bytes of a file name that are no UTF-8, which Parquet refuses."""
    return text.encode(errors="backslashreplace").decode()
