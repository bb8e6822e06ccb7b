"""What is odd about the data and stops nothing: what readers skip, what official files have."""

from __future__ import annotations

import collections
from pathlib import Path

import numpy as np

from models.skeleton import Skeleton
from study.annotation_table import AnnotationTable, read_table
from study.audit import Check, Fault, joint_names, told

CROWD = "crowd region"
NO_LABELS = "person without labelled joints"
NO_AREA = "person without area"
CLIPPED = "box clipped to the picture"
OUTSIDE = "joint a little outside the picture"
OTHER_COUNT = "num_keypoints that is not the number of labelled joints"
AT_ORIGIN = "labelled joint at 0, 0"
TWICE = "person annotated twice"
OTHER_NAMES = "joints of other names"
SAME_PICTURE = "picture under several ids"
NO_CROWD_INDEX = "picture without crowdIndex"


def notes(annotations: Path, skeleton: Skeleton) -> dict[str, int]:
    """How many annotations are people, and how many there are of each kind of note."""
    table = read_table(annotations, skeleton)
    kinds = {kind: int(np.count_nonzero(is_noted)) for kind, is_noted, _ in _note_checks(table)}
    return {"people": int(table.is_used.sum()), **kinds}


def find_notes(annotations: Path, skeleton: Skeleton) -> list[Fault]:
    """What official readers skip or mend, and what else is odd: warnings, one an annotation."""
    table = read_table(annotations, skeleton)
    found = told(table, _note_checks(table), np.ones(len(table.ids), bool), is_warning=True)
    return _file_notes(table, skeleton) + found


def _note_checks(table: AnnotationTable) -> list[Check]:
    outside = table.joints_outside().max(axis=1, initial=0)
    start, size = table.boxes[:, :2], table.boxes[:, 2:]
    is_cut = ((start < 0) | (start + size > table.image_sizes[:, ::-1])).any(axis=1)
    labelled = table.keypoints[:, :, 2] > 0  # (N, K)
    counts = labelled.sum(axis=1)
    is_read = np.isfinite(table.keypoints).all(axis=(1, 2))
    at_origin = labelled & (table.keypoints[:, :, :2] == 0).all(axis=2)
    is_other_count = (table.num_keypoints >= 0) & (table.num_keypoints != counts) & is_read
    return [
        (CROWD, table.is_crowd, lambda _: "official readers skip it"),
        (NO_LABELS, ~table.is_labelled & ~table.is_crowd, lambda _: "official readers skip it"),
        (
            NO_AREA,
            table.is_labelled & ~table.is_crowd & ~table.is_used,
            lambda _: "official readers skip it",
        ),
        (CLIPPED, is_cut & table.is_used, lambda i: f"its box is {table.boxes[i].tolist()}"),
        (OUTSIDE, (outside > 0) & table.is_used, lambda i: f"by {outside[i]:g} px"),
        (
            OTHER_COUNT,
            is_other_count,
            lambda i: f"it is {table.num_keypoints[i]}, {counts[i]} are labelled",
        ),
        (
            AT_ORIGIN,
            at_origin.any(axis=1) & table.is_used,
            lambda i: f"{at_origin[i].sum()} joints; visibility 0 would leave them unlabelled",
        ),
        (TWICE, _is_repeated(table), lambda _: "same picture, box and joints as another"),
    ]


def _is_repeated(table: AnnotationTable) -> np.ndarray:
    """Whether a used person has the picture, box and joints of one before, (N,)."""
    rows = np.flatnonzero(table.is_used)
    firsts: dict[int, int] = {}  # by hash: a note may be wrong once in 2 ** 64 pairs
    is_repeated = np.zeros(len(table.ids), bool)
    for row in rows.tolist():
        parts = (table.image_ids[row], table.boxes[row], table.keypoints[row])
        key = hash(b"".join(part.tobytes() for part in parts))
        is_repeated[row] = firsts.setdefault(key, row) != row
    return is_repeated


def _file_notes(table: AnnotationTable, skeleton: Skeleton) -> list[Fault]:
    """What is odd about the file or its pictures rather than about a person."""
    found: list[tuple[str, str]] = []
    names = joint_names(table)
    if names and sorted(names) != sorted(skeleton.joints) and len(names) == skeleton.num_joints:
        pairs = zip(names, skeleton.joints, strict=True)
        other = ", ".join(f"{a} for {b}" for a, b in pairs if a != b)
        found.append((OTHER_NAMES, f"taken to be the joints of {skeleton.name}: {other}"))
    used = np.unique(table.image_rows[table.is_used & (table.image_rows >= 0)]).tolist()
    by_name = collections.Counter(table.image_names[row] for row in used)
    found += [
        (SAME_PICTURE, f"{name} stands there {count} times: it may be in train and in search")
        for name, count in by_name.items()
        if count > 1
    ]
    has_index = np.isfinite(table.crowd_indices[used])
    if has_index.any() and not has_index.all():
        count = int(np.count_nonzero(~has_index))
        found.append((NO_CROWD_INDEX, f"{count} of {len(used)}: none is in AP easy to hard"))
    return [Fault(kind, table.path, None, None, detail, True) for kind, detail in found]
