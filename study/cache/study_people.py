"""The people of a study: read, audited, and split into train, search and val."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.skeleton import Skeleton
from study.cache.detected_people import require_labeled
from study.config.schema import DataConfig, SplitConfig
from study.config.typed_paths import needs_root
from study.data.annotations import PERSON_ID, ImageTable, read_table
from study.data.audit import (
    audit,
    check_image_folder,
    describe,
    faulty_ids,
    require_few_faults,
    write_audit,
)
from study.data.audit_notes import find_notes, reading_notes
from study.data.categories import PersonCategory
from study.data.coco_results import read_detections
from study.data.people import People, build_people, overlap, split_people
from study.errors import InputError
from study.storage.files import fingerprint, hash_file
from study.storage.paths import cached_truth

Meter = Callable[[str], Callable[[int, int], None]]
"""Makes a progress bar of this name; the bar is called with (done, total)."""


class Truth(NamedTuple):
    """A COCO-format file of ground truth to write, and its content."""

    file: Path
    annotations: Path
    """File that the annotations are copied from."""
    images: NDArray[np.int64]
    """Ids of the images to copy."""
    left_out: frozenset[int]
    """Ids of annotations to leave out."""


@dataclasses.dataclass(frozen=True)
class StudyPeople:
    """The people of a study: to train on, to score trials on, to score finalists on."""

    train: People
    search: People
    val: People
    """The labeled people."""
    found: People
    """A detector's boxes; ``val`` itself without ``data.val.detections``."""
    val_image_ids: NDArray[np.int64]
    """Image ids to evaluate: those with people, or, with a detector's boxes, all images of the
    file (a detector may find false positives anywhere)."""
    left_out: frozenset[int]
    """Ids of faulty annotations."""
    left_out_of_val: frozenset[int]
    """Ids of faulty annotations of val."""
    category: PersonCategory
    """How the keypoints of train and search were read."""
    category_of_val: PersonCategory

    @property
    def cropped(self) -> tuple[People, People, People]:
        """The people of train, search and val whose crops are stored."""
        return self.train, self.search, self.found

    def search_truth(self, cache: Path) -> Truth:
        """Return the ground truth that trials are scored against."""
        images = np.unique(self.search.image_ids)
        return _truth_of(self.search, images, self.category, self.left_out, cache)

    def val_truth(self, cache: Path) -> Truth:
        """Return the ground truth that finalists are scored against."""
        category, left_out = self.category_of_val, self.left_out_of_val
        return _truth_of(self.val, self.val_image_ids, category, left_out, cache)


def read_study_people(
    data: DataConfig,
    skeleton: Skeleton,
    meter: Meter,
    notify: Callable[[str], None],
    audit_folder: Path | None = None,
) -> StudyPeople:
    """Audit and split the study's people; write nothing but the audit.

    Raises:
        InputError: the data have faults; the message names files and annotations.
    """
    if needs_root(data) and not Path(data.root).is_dir():
        raise InputError(
            f"data.root must be the folder of the data, got data.root={data.root}, which does not "
            "exist; set data.root to the folder of its annotations and images"
        )
    read = functools.partial(_read, data, skeleton, meter, notify, audit_folder)
    people, left_out, _, category = read(data.train)
    val, left_out_of_val, val_images, category_of_val = read(data.val)
    _require_both_names(data, category, category_of_val)
    in_both = overlap(people, val)
    if audit_folder is not None:
        write_audit(audit_folder / "overlap.parquet", in_both)
    require_few_faults(in_both, data.max_bad_fraction, len(people))
    if in_both:
        notify(f"warning: left out of train\n{describe(in_both)}")
        left_out |= faulty_ids(in_both)
        is_kept = ~np.isin(people.annotation_ids, list(left_out))
        people = people.take(np.flatnonzero(is_kept))
    if data.max_people:
        people = draw_people(people, data.max_people, data.seed)
    found = _detected(data, skeleton, val, val_images, category_of_val, notify)
    val_image_ids = np.unique(val.image_ids) if found is val else val_images.ids
    train_rows, search_rows = split_people(people, data.search_fraction, data.seed)
    return StudyPeople(
        train=people.take(train_rows),
        search=people.take(search_rows),
        val=val,
        found=found,
        val_image_ids=val_image_ids,
        left_out=left_out,
        left_out_of_val=left_out_of_val,
        category=category,
        category_of_val=category_of_val,
    )


def draw_people(people: People, at_most: int, seed: int) -> People:
    """Keep the people of randomly drawn images, at most ``at_most`` people.

    Raises:
        InputError: ``at_most`` is smaller than the number of people in the first image drawn.
    """
    images, numbers = np.unique(people.image_ids, return_counts=True)
    order = np.random.RandomState(seed).permutation(len(images))
    fits = np.cumsum(numbers[order]) <= at_most
    chosen = images[order[fits]]
    if not len(chosen):
        raise InputError(
            f"data.max_people must leave at least one image, got data.max_people={at_most}; "
            "raise it, or set 0 to use all people"
        )
    return people.take(np.flatnonzero(np.isin(people.image_ids, chosen)))


def _read(
    data: DataConfig,
    skeleton: Skeleton,
    meter: Meter,
    notify: Callable[[str], None],
    audit_folder: Path | None,
    split: SplitConfig,
) -> tuple[People, frozenset[int], ImageTable, PersonCategory]:
    """Return a split's people, the annotations left out for their faults, images and category.

    The annotations themselves are dropped on return: they take much more memory.
    """
    annotations, images = Path(data.root, split.annotations), Path(data.root, split.images)
    if annotations.is_file():
        check_image_folder(images)  # before a file is read that may be large
    table = read_table(annotations, skeleton, data.category)
    for note in reading_notes(table):
        notify(f"note: {annotations.name}: {note.kind}, {note.detail}")
    faults = audit(table, images, progress=meter(f"checking {annotations.name}"))
    if audit_folder is not None:
        name = "train" if split is data.train else "val"
        listed = [*faults, *find_notes(table)]
        file = write_audit(audit_folder / f"{name}.parquet", listed)
        shown = file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file
        num_faults = sum(not fault.is_warning for fault in faults)
        odd = len(listed) - num_faults
        notify(f"{annotations.name}: faults {num_faults}, notes {odd}, listed in {shown}")
    require_few_faults(faults, data.max_bad_fraction, table.num_people)
    if faults:
        notify(f"warning: left out or kept with care\n{describe(faults)}")
    left_out = faulty_ids(faults)
    people = build_people(table, images, leave_out=left_out)
    return people, left_out, table.images, table.category


def _require_both_names(data: DataConfig, train: PersonCategory, val: PersonCategory) -> None:
    """Raise if the joints of one file are put in order by their names and the other has none."""
    files = ((train, data.train.annotations), (val, data.val.annotations))
    for (named, file), (unnamed, other) in (files, files[::-1]):
        if named.order is not None and not unnamed.joints:
            raise InputError(
                "both files must name their joints if one has them in another order than "
                f"data.skeleton={data.skeleton}, got names in {file} alone; add the names to the "
                f"category in {other}"
            )


def _detected(
    data: DataConfig,
    skeleton: Skeleton,
    val: People,
    images: ImageTable,
    category: PersonCategory,
    notify: Callable[[str], None],
) -> People:
    """Return the people of data.val.detections, or the labeled ones if it is not set."""
    split, root = data.val, Path(data.root)
    if split.detections is None:
        return val
    found = read_detections(
        root / split.detections,
        images,
        root / split.images,
        skeleton,
        split.detection_threshold,
        PERSON_ID if category.id is None else category.id,
    )
    require_labeled(found, val)
    num_images = len(np.unique(found.image_ids))
    notify(f"{len(found)} boxes in {num_images} images of val from {split.detections}")
    return found


def _truth_of(
    people: People,
    images: NDArray[np.int64],
    category: PersonCategory,
    left_out: frozenset[int],
    cache: Path,
) -> Truth:
    """Return the COCO-format file of these images, which need not exist."""
    content = hash_file(people.annotations)
    parts = (content, images.tolist(), sorted(left_out), *category.changes)
    file = cached_truth(cache, fingerprint(*parts))
    return Truth(file, people.annotations, images, left_out)
