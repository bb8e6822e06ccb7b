"""List what stops nothing in a data set: what official readers skip, and other oddities."""

from __future__ import annotations

import collections

import numpy as np

from study.data.annotations import AnnotationTable
from study.data.audit import (
    EXAMPLES,
    NO_AREA,
    UNSEEN,
    Check,
    Fault,
    annotation_faults,
    origin_check,
    run_checks,
    skipped_checks,
)
from study.data.categories import LEFT_OUT, READING, naming_notes
from study.data.coordinates import KEPT, coordinate_notes, kept_note, upside_down_note

CROWD = "crowd region"
NO_LABELS = "person without labeled joints"
CLIPPED = "box clipped to the image"
OUTSIDE = "joint a little outside the image"
OTHER_COUNT = "num_keypoints that is not the number of labeled joints"
TWICE = "person annotated twice"
BLANK = "unlabeled joint without coordinates"
NO_BOX = "person who is skipped and has no box"
SAME_IMAGE = "image under several ids"
NO_CROWD_INDEX = "image without crowdIndex"
UPSIDE_DOWN = "people upside down"
IN_FULL = (*READING, KEPT, UPSIDE_DOWN)
"""Kinds of notes about a whole file, which are shown in full."""


def find_notes(table: AnnotationTable) -> list[Fault]:
    """List what official readers skip or fix, and other oddities, as warnings."""
    found = run_checks(table, _note_checks(table), table.is_person, is_warning=True)
    return reading_notes(table) + _file_notes(table) + found


def reading_notes(table: AnnotationTable) -> list[Fault]:
    """List how the file's category and joints are read, where it is not plainly as they stand."""
    found = naming_notes(table.category, table.skeleton)
    left_out = table.category_ids[~table.is_person]
    numbers, counts = np.unique(left_out, return_counts=True)
    if len(numbers):
        largest = np.argsort(-counts, kind="stable")[:EXAMPLES].tolist()
        others = [f"{counts[i]} of {table.category.others[int(numbers[i])]}" for i in largest]
        more = f" and {len(numbers) - EXAMPLES} more" if len(numbers) > EXAMPLES else ""
        kept = f"people are of {table.category.name}"
        found.append((LEFT_OUT, f"{', '.join(others)}{more} are left out, {kept}"))
    if detail := kept_note(table):
        found.append((KEPT, detail))
    if detail := upside_down_note(table):
        found.append((UPSIDE_DOWN, detail))
    return [Fault(kind, table.path, None, None, detail, True) for kind, detail in found]


def _note_checks(table: AnnotationTable) -> list[Check]:
    outside = table.pixels_outside().max(axis=1, initial=0)
    start, size = table.boxes[:, :2], table.boxes[:, 2:]
    is_cut = ((start < 0) | (start + size > table.image_sizes[:, ::-1])).any(axis=1)
    labeled = table.keypoints[:, :, 2] > 0  # (N, K)
    counts = labeled.sum(axis=1)
    is_read = np.isfinite(table.keypoints).all(axis=(1, 2))
    faults = {fault.kind for fault in annotation_faults(table)}
    rare = [check for check, _ in skipped_checks(table) if check[0] in (NO_AREA, UNSEEN)]
    rare = [check for check in (*rare, origin_check(table)) if check[0] not in faults]
    is_other_count = (table.num_keypoints >= 0) & (table.num_keypoints != counts) & is_read
    return [
        (CROWD, table.is_crowd, lambda _: "official readers skip it"),
        (NO_LABELS, ~table.is_labeled & ~table.is_crowd, lambda _: "official readers skip it"),
        (BLANK, table.is_blank, lambda _: "read as 0, 0, 0"),
        (
            NO_BOX,
            ~table.is_used & ~np.isfinite(table.boxes).all(axis=1),
            lambda _: "an evaluation does not see it",
        ),
        (CLIPPED, is_cut & table.is_used, lambda i: f"its box is {table.boxes[i].tolist()}"),
        (OUTSIDE, (outside > 0) & table.is_used, lambda i: f"by {outside[i]:g} px"),
        (
            OTHER_COUNT,
            is_other_count,
            lambda i: f"it is {table.num_keypoints[i]}, {counts[i]} are labeled",
        ),
        *rare,
        *coordinate_notes(table),
        (TWICE, _is_repeated(table), lambda _: "same image, box and joints as another"),
    ]


def _is_repeated(table: AnnotationTable) -> np.ndarray:
    """Return whether a used person has the same image, box and joints as an earlier one, (N,)."""
    rows = np.flatnonzero(table.is_used)
    firsts: dict[int, int] = {}  # by hash, which is wrong once in 2 ** 64 pairs
    is_repeated = np.zeros(len(table.ids), bool)
    for row in rows.tolist():
        parts = (table.image_ids[row], table.boxes[row], table.keypoints[row])
        key = hash(b"".join(part.tobytes() for part in parts))
        is_repeated[row] = firsts.setdefault(key, row) != row
    return is_repeated


def _file_notes(table: AnnotationTable) -> list[Fault]:
    """Return notes about the file or its images rather than about a person."""
    found: list[tuple[str, str]] = []
    used = np.unique(table.image_rows[table.is_used & (table.image_rows >= 0)]).tolist()
    by_name = collections.Counter(table.images.names[row] for row in used)
    found += [
        (SAME_IMAGE, f"{name} is listed {count} times: it may be in train and in search")
        for name, count in by_name.items()
        if count > 1
    ]
    has_index = np.isfinite(table.images.crowd_indices[used])
    if has_index.any() and not has_index.all():
        count = int(np.count_nonzero(~has_index))
        found.append(
            (NO_CROWD_INDEX, f"{count} of {len(used)}: AP easy, medium, hard cannot be measured")
        )
    return [Fault(kind, table.path, None, None, detail, True) for kind, detail in found]
