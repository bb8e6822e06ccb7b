"""Before anything is trained: the data audited, the people split, their crops stored once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.skeleton import Skeleton
from study.cache.crop_bucket import check_bucket, cut_locally, fetch_store
from study.cache.crop_parts import choose_form
from study.cache.crop_store import Cut, make_crop_store, store_folder
from study.config.derived import Resolved
from study.config.schema import DataConfig, SplitConfig
from study.data.annotations import ImageTable, read_table
from study.data.audit import (
    audit,
    check_image_folder,
    describe,
    faulty_ids,
    find_notes,
    require_few_faults,
    write_audit,
)
from study.data.coco_results import read_detections
from study.data.crops import stored_size
from study.data.people import People, build_people, overlap, split_people, write_ground_truth
from study.data.synthetic.dataset import draw_dataset
from study.errors import InputError
from study.storage.files import fingerprint, hash_file, is_full_disk
from study.storage.paths import cached_truth

Meter = Callable[[str], Callable[[int, int], None]]
"""Gives a progress bar of this name, to be called with (done, total)."""


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """Where a study's prepared data lie; paths, so that it travels to any worker."""

    train: str
    """Crop store of the people to train on."""
    search: str
    """Crop store of the people that trials are scored on."""
    val: str
    """Crop store of the official validation people, or of those that a detector found."""
    search_truth: str
    """COCO-format ground truth of ``search``."""
    val_truth: str
    num_people: tuple[int, int, int]
    """Train, search, val."""
    teacher_crops: tuple[str, str, str]
    """Crop stores of the same people, in the same order, as the teacher sees them: those above
    unless its input size is another one."""
    url: str | None = None
    """Object store that has the crop stores, by their folders' names."""

    @property
    def crops(self) -> tuple[str, str, str]:
        return self.train, self.search, self.val

    @property
    def fingerprint(self) -> str:
        """Of all that was prepared: the stores' own names are fingerprints."""
        paths = (*self.crops, self.search_truth, self.val_truth, *self.teacher_crops)
        return fingerprint(*(Path(path).name for path in paths))

    def here(self) -> PreparedData:
        """The same data where this node reads them; crops are brought from the object store."""
        if self.url is None:
            return self
        stores = (*self.crops, *self.teacher_crops)
        found = {path: str(fetch_store(self.url, Path(path))) for path in stores}
        train, search, val = self.teacher_crops
        return dataclasses.replace(
            self,
            train=found[self.train],
            search=found[self.search],
            val=found[self.val],
            teacher_crops=(found[train], found[search], found[val]),
        )

    def for_teacher(self) -> PreparedData:
        """The same people in the teacher's crops."""
        train, search, val = self.teacher_crops
        return dataclasses.replace(self, train=train, search=search, val=val)


class Truth(NamedTuple):
    """A ground-truth file, and what is in it."""

    file: Path
    annotations: Path
    images: NDArray[np.int64]
    left_out: frozenset[int]


@dataclasses.dataclass(frozen=True)
class StudyPeople:
    """Who is trained on, who trials and who finalists are scored on."""

    train: People
    search: People
    val: People
    """Those labeled."""
    found: People
    """Those a detector found; ``val`` itself where none was asked."""
    val_image_ids: NDArray[np.int64]
    """Image ids to evaluate: those with people, or, with a detector's boxes, all images of the
    file (a detector may find false positives anywhere)."""
    left_out: frozenset[int]
    """Faulty annotations, by id."""
    left_out_of_val: frozenset[int]

    @property
    def cropped(self) -> tuple[People, People, People]:
        """Those to train on, to score trials on and to score finalists on, as crops."""
        return self.train, self.search, self.found

    def search_truth(self, cache: Path) -> Truth:
        return _truth_of(self.search, np.unique(self.search.image_ids), self.left_out, cache)

    def val_truth(self, cache: Path) -> Truth:
        return _truth_of(self.val, self.val_image_ids, self.left_out_of_val, cache)


def prepare_data(
    data: DataConfig,
    resolved: Resolved,
    meter: Meter,
    notify: Callable[[str], None],
    cut: Cut = cut_locally,
    audit_folder: Path | None = None,
) -> PreparedData:
    """The study's people, checked, split and stored; what is there already is used again.

    Args:
        cut: makes parts of crop stores.
        audit_folder: where all that is wrong or odd is listed in Parquet; nowhere if None.

    Raises:
        InputError: the data have faults; names the files and annotations.
    """
    if resolved.crops_url is not None:
        check_bucket(resolved.crops_url)
    _require_folder(resolved.crops_folder)
    if data.kind == "drawn":
        draw_dataset(
            Path(data.root),
            seed=data.seed,
            num_train_images=data.num_train_images,
            num_val_images=data.num_val_images,
            progress=meter("drawing people"),
        )
    people = read_study_people(data, resolved.skeleton, meter, notify, audit_folder)
    planned = planned_data(people, data.crops, resolved)
    stores = [("", resolved.input_size, planned.crops)]
    if planned.teacher_crops != planned.crops:
        stores.append((" for the teacher", resolved.teacher_input_size, planned.teacher_crops))
    for seen_by, size, folders in stores:
        parts = zip(("train", "search", "val"), people.cropped, folders, strict=True)
        for part, crops_of, folder in parts:
            name = f"{part}{seen_by}"
            make_crop_store(
                crops_of,
                size,
                resolved.crops_folder,
                meter(f"cropping {name}"),
                form=form_of(people, data.crops, size),
                url=resolved.crops_url,
                cut=cut,
                notify=notify,
                name=name,
                folder=Path(folder),
            )
    for truth in (people.search_truth(resolved.cache), people.val_truth(resolved.cache)):
        if not truth.file.exists():
            write_ground_truth(
                truth.annotations, truth.images, truth.file, leave_out=truth.left_out
            )
    return planned


def _require_folder(crops: Path) -> None:
    """The folder of the crops, made before anything that takes long."""
    try:
        crops.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if is_full_disk(error):
            raise
        raise InputError(
            "crops must have a folder that can be made (data.store, by default storage's cache), "
            f"got {crops} ({error.strerror}); change data.store or storage"
        ) from error


def planned_data(people: StudyPeople, crops: str, resolved: Resolved) -> PreparedData:
    """Return where ``prepare_data`` puts the stores of these people.

    Args:
        crops: as ``data.crops``.
    """

    def stores(size: tuple[int, int]) -> tuple[str, str, str]:
        form = form_of(people, crops, size)
        train, search, val = (
            str(store_folder(part, size, resolved.crops_folder, form)) for part in people.cropped
        )
        return train, search, val

    own = stores(resolved.input_size)
    is_same = resolved.teacher_input_size == resolved.input_size
    return PreparedData(
        *own,
        search_truth=str(people.search_truth(resolved.cache).file),
        val_truth=str(people.val_truth(resolved.cache).file),
        num_people=(len(people.train), len(people.search), len(people.val)),
        teacher_crops=own if is_same else stores(resolved.teacher_input_size),
        url=resolved.crops_url,
    )


def form_of(people: StudyPeople, crops: str, size: tuple[int, int]) -> str:
    """Return how the crops of this input size are stored: raw or jpeg."""
    return choose_form(crops, sum(map(len, people.cropped)), stored_size(size))


def read_study_people(
    data: DataConfig,
    skeleton: Skeleton,
    meter: Meter,
    notify: Callable[[str], None],
    audit_folder: Path | None = None,
) -> StudyPeople:
    """The study's people, checked and split; nothing is written but the audit.

    Raises:
        InputError: the data have faults; names the files and annotations.
    """
    if not Path(data.root).is_dir():
        raise InputError(
            f"data.root must be the folder of the data, got data.root={data.root}, which is not "
            "there; set data.root to where its annotations and images lie"
        )
    people, left_out, _ = _read(data, data.train, skeleton, meter, notify, audit_folder)
    val, left_out_of_val, val_images = _read(data, data.val, skeleton, meter, notify, audit_folder)
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
    found = _detected(data, skeleton, val, val_images, notify)
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
    )


def draw_people(people: People, at_most: int, seed: int) -> People:
    """The people of images drawn at random, as many as ``at_most`` people fill."""
    images, numbers = np.unique(people.image_ids, return_counts=True)
    order = np.random.RandomState(seed).permutation(len(images))
    fits = np.cumsum(numbers[order]) <= at_most
    chosen = images[order[fits]]
    if not len(chosen):
        raise InputError(
            f"data.max_people must leave at least one image, got data.max_people={at_most}; "
            "raise it, or 0 for all people"
        )
    return people.take(np.flatnonzero(np.isin(people.image_ids, chosen)))


def _read(
    data: DataConfig,
    split: SplitConfig,
    skeleton: Skeleton,
    meter: Meter,
    notify: Callable[[str], None],
    audit_folder: Path | None,
) -> tuple[People, frozenset[int], ImageTable]:
    """Return the people of a split, the annotations left out for their faults, and the images.

    The annotations themselves are dropped on return: they take much more memory.
    """
    annotations, images = Path(data.root, split.annotations), Path(data.root, split.images)
    if annotations.is_file():
        check_image_folder(images)  # before a file is read that may be large
    table = read_table(annotations, skeleton)
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
    return build_people(table, images, leave_out=left_out), left_out, table.images


def _detected(
    data: DataConfig,
    skeleton: Skeleton,
    val: People,
    images: ImageTable,
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
    )
    num_images = len(np.unique(found.image_ids))
    notify(f"{len(found)} boxes in {num_images} images of val from {split.detections}")
    return found


def _truth_of(
    people: People, images: NDArray[np.int64], left_out: frozenset[int], cache: Path
) -> Truth:
    """A COCO-format file of these images, which need not be there yet."""
    content = hash_file(people.annotations)
    file = cached_truth(cache, fingerprint(content, images.tolist(), sorted(left_out)))
    return Truth(file, people.annotations, images, left_out)
