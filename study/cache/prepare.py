"""Preparation of a study's data: audit, split into train, search and val, and stored crops."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from study.cache.crop_bucket import check_bucket, cut_locally, fetch_store
from study.cache.crop_parts import choose_form
from study.cache.crop_store import Cut, StoreSpec, make_crop_store, store_folder
from study.cache.study_people import Meter, StudyPeople, read_study_people
from study.config.derived import Resolved
from study.config.schema import DataConfig
from study.data.annotations import read_table
from study.data.crops import stored_size
from study.data.own_skeletons import identity_of
from study.data.people import has_ground_truth, write_ground_truth
from study.data.synthetic.dataset import draw_dataset
from study.errors import InputError
from study.storage.files import fingerprint, is_full_disk
from study.storage.locks import check_file_system


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
    skeleton: str = ""
    """Fingerprint of a skeleton of the user's own; empty for one that is built in."""
    url: str | None = None
    """Object store that holds the crop stores, by their folders' names; None without one."""

    @property
    def crops(self) -> tuple[str, str, str]:
        """Crop stores of train, search and val."""
        return self.train, self.search, self.val

    @property
    def fingerprint(self) -> str:
        """Fingerprint of data and skeleton, from the stores' names, which are fingerprints."""
        paths = (*self.crops, self.search_truth, self.val_truth, *self.teacher_crops)
        own = (self.skeleton,) if self.skeleton else ()
        return fingerprint(*(Path(path).name for path in paths), *own)

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
        notify("checking the bucket of data.store ...")
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
        if not has_ground_truth(truth.file):
            table = read_table(truth.annotations, resolved.skeleton, data.category)
            write_ground_truth(table, truth.images, truth.file, leave_out=truth.left_out)
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
    check_file_system(crops, "data.store, or storage")


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
        skeleton=identity_of(resolved.skeleton),
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
