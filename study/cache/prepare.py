"""Preparation of a study's data: audit, split into train, search and val, and stored crops."""

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
from study.cache.crop_store import Cut, StoreSpec, make_crop_store, store_folder
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
"""Makes a progress bar of this name; the bar is called with (done, total)."""


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """Paths of a study's prepared data; sent to any worker."""

    train: str
    """Crop store of the training people."""
    search: str
    """Crop store of the people that trials are scored on."""
    val: str
    """Crop store of the official validation people, or of a detector's boxes."""
    search_truth: str
    """COCO-format ground truth of ``search``."""
    val_truth: str
    """COCO-format ground truth of ``val``."""
    num_people: tuple[int, int, int]
    """People of train, search and val."""
    teacher_crops: tuple[str, str, str]
    """Crop stores of the same people, in the same order, in the teacher's input size; equal to
    those above if the sizes are equal."""
    url: str | None = None
    """Object store that holds the crop stores, by their folders' names; None without one."""

    @property
    def crops(self) -> tuple[str, str, str]:
        """Crop stores of train, search and val."""
        return self.train, self.search, self.val

    @property
    def fingerprint(self) -> str:
        """Fingerprint of all prepared data, from the stores' names, which are fingerprints."""
        paths = (*self.crops, self.search_truth, self.val_truth, *self.teacher_crops)
        return fingerprint(*(Path(path).name for path in paths))

    def here(self) -> PreparedData:
        """Return the same data by this node's paths; crops are downloaded if need be."""
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
        """Return the same people in crops of the teacher's input size."""
        train, search, val = self.teacher_crops
        return dataclasses.replace(self, train=train, search=search, val=val)


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

    @property
    def cropped(self) -> tuple[People, People, People]:
        """The people of train, search and val whose crops are stored."""
        return self.train, self.search, self.found

    def search_truth(self, cache: Path) -> Truth:
        """Return the ground truth that trials are scored against."""
        return _truth_of(self.search, np.unique(self.search.image_ids), self.left_out, cache)

    def val_truth(self, cache: Path) -> Truth:
        """Return the ground truth that finalists are scored against."""
        return _truth_of(self.val, self.val_image_ids, self.left_out_of_val, cache)


def prepare_data(
    data: DataConfig,
    resolved: Resolved,
    meter: Meter,
    notify: Callable[[str], None],
    cut: Cut = cut_locally,
    audit_folder: Path | None = None,
) -> PreparedData:
    """Audit and split the study's people, and store their crops; existing stores are used again.

    Args:
        cut: builds parts of crop stores.
        audit_folder: folder for Parquet tables of faults and notes; None writes none.

    Raises:
        InputError: the data have faults; the message names files and annotations.
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
        spec = store_spec(people, data.crops, size, resolved)
        parts = zip(("train", "search", "val"), people.cropped, folders, strict=True)
        for part, cropped, folder in parts:
            name = f"{part}{seen_by}"
            make_crop_store(
                cropped,
                spec,
                name=name,
                folder=Path(folder),
                cut=cut,
                progress=meter(f"cropping {name}"),
                notify=notify,
            )
    for truth in (people.search_truth(resolved.cache), people.val_truth(resolved.cache)):
        if not truth.file.exists():
            write_ground_truth(
                truth.annotations, truth.images, truth.file, leave_out=truth.left_out
            )
    return planned


def _require_folder(crops: Path) -> None:
    """Make the folder of the crops, before any step that takes long."""
    try:
        crops.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if is_full_disk(error):
            raise
        raise InputError(
            "the folder of the crops (data.store, by default storage's cache) must be possible to "
            f"create, got {crops} ({error.strerror}); change data.store or storage"
        ) from error


def planned_data(people: StudyPeople, crops: str, resolved: Resolved) -> PreparedData:
    """Return the paths at which ``prepare_data`` stores these people.

    Args:
        crops: as ``data.crops``.
    """

    def stores(size: tuple[int, int]) -> tuple[str, str, str]:
        spec = store_spec(people, crops, size, resolved)
        train, search, val = (str(store_folder(part, spec)) for part in people.cropped)
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


def store_spec(
    people: StudyPeople, crops: str, size: tuple[int, int], resolved: Resolved
) -> StoreSpec:
    """Return how and where crops of this input size are stored.

    Args:
        people: all people of the study; their number decides between raw and jpeg.
        crops: as ``data.crops``.
    """
    return StoreSpec(
        input_size=size,
        cache=resolved.crops_folder,
        form=choose_form(crops, sum(map(len, people.cropped)), stored_size(size)),
        url=resolved.crops_url,
    )


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
    if not Path(data.root).is_dir():
        raise InputError(
            f"data.root must be the folder of the data, got data.root={data.root}, which does not "
            "exist; set data.root to the folder of its annotations and images"
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
    """Return the COCO-format file of these images, which need not exist."""
    content = hash_file(people.annotations)
    file = cached_truth(cache, fingerprint(content, images.tolist(), sorted(left_out)))
    return Truth(file, people.annotations, images, left_out)
