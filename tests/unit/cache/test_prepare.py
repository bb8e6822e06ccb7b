"""Preparation of the data: people are split, audited and stored once, or refused."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from models.skeleton import CROWDPOSE, SKELETONS, Skeleton
from study.cache import crop_parts, crop_store, study_people
from study.cache.crop_store import open_crop_store
from study.cache.prepare import PreparedData, prepare_data
from study.cache.study_people import draw_people
from study.config import checks
from study.config.compose import compose, with_values
from study.config.derived import resolve
from study.config.schema import StudyConfig
from study.data.annotations import AnnotationTable, read_table
from study.data.crops import apply_affine, invert_affine
from study.data.people import People, build_people, split_people
from study.errors import InputError
from study.metrics import average_precision, to_detections

VAL_FROM = 1000
"""Offset of the ids in five_data's val."""


@pytest.fixture
def config(
    five: Skeleton, five_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> StudyConfig:
    """A study of the five-joint people, in a folder that the test may change."""
    monkeypatch.setitem(SKELETONS, "five", five)
    monkeypatch.setattr(checks, "SKELETONS", ("five",))
    return compose(
        [
            "data=coco",
            f"data.root={five_data}",
            f"storage={tmp_path / 'studies'}",
            "data.skeleton=five",
            "data.input_size=[96,64]",
            "data.search_fraction=0.3",
            "data.train.annotations=five.json",
            "data.train.images=images",
            "data.val.annotations=val.json",
            "data.val.images=others",
        ]
    )


def prepare(config: StudyConfig) -> tuple[PreparedData, list[str]]:
    """Prepare the data of a study; also return the printed lines."""
    messages: list[str] = []
    folder = Path(config.storage) / config.name / "results/audit"
    return prepare_data(
        config.data,
        resolve(config),
        lambda name: lambda done, total: None,
        messages.append,
        audit_folder=folder,
    ), messages


def spoil(config: StudyConfig, file: str = "five.json", **changes: Any) -> int:
    """Change the first annotation of the file and return its id."""
    path = Path(config.data.root) / file
    content = json.loads(path.read_text())
    content["annotations"][0].update(changes)
    path.write_text(json.dumps(content))
    return int(content["annotations"][0]["id"])


def images_of(truth: str) -> set[int]:
    return {image["id"] for image in json.loads(Path(truth).read_text())["images"]}


def test_search_people_are_not_trained_on_and_no_person_is_lost(config: StudyConfig) -> None:
    data, _ = prepare(config)
    train, search = open_crop_store(Path(data.train)), open_crop_store(Path(data.search))
    assert data.num_people == (len(train), len(search), 13)
    assert len(train) + len(search) == 13 and len(search) > 0
    assert not set(train.image_ids) & set(search.image_ids)
    assert images_of(data.search_truth) == set(search.image_ids.tolist())
    assert len(images_of(data.val_truth)) == 8


def test_search_people_of_lspet_crowd_share_no_image_and_no_person(
    shared: Path, tmp_path: Path
) -> None:
    annotations = shared / "data/lspet_crowd/annotations/lspet_crowd_train.json"
    if not annotations.is_file():
        pytest.skip(f"{annotations} is missing: it lists who is in which image")
    table = read_table(annotations, CROWDPOSE)
    people = build_people(table, annotations.parent.parent / "images/train")
    assert people.has_source
    train, search = (people.take(rows) for rows in split_people(people, 0.1, seed=0))
    assert not set(train.image_ids) & set(search.image_ids)
    assert not set(train.source_ids) & set(search.source_ids)
    assert len(search) > 200 and len(train) > 2000


def test_second_study_reuses_the_stores(config: StudyConfig) -> None:
    first, _ = prepare(config)
    files = sorted(Path(first.train).parent.iterdir())
    times = [file.stat().st_mtime_ns for file in files]
    second, _ = prepare(with_values(config, {"name": "second", "distill.epochs": 7}))
    assert second == first and second.fingerprint == first.fingerprint
    assert sorted(Path(first.train).parent.iterdir()) == files
    assert [file.stat().st_mtime_ns for file in files] == times


@pytest.mark.parametrize(
    "changes",
    [
        {"data.seed": 1},
        {"data.search_fraction": 0.5},
        {"data.input_size": [64, 96]},
        {"data.max_people": 9},
    ],
)
def test_settings_that_change_the_people_change_the_fingerprint(
    changes: dict[str, Any], config: StudyConfig
) -> None:
    first, _ = prepare(config)
    second, _ = prepare(with_values(config, changes))
    assert second.fingerprint != first.fingerprint and second.train != first.train


def test_max_people_takes_whole_images_up_to_the_limit(
    config: StudyConfig, five_people: People
) -> None:
    data, _ = prepare(with_values(config, {"data.max_people": 9}))
    assert 7 <= data.num_people[0] + data.num_people[1] <= 9 and data.num_people[2] == 13
    drawn = draw_people(five_people, 9, seed=4)
    for image in np.unique(drawn.image_ids):
        assert (drawn.image_ids == image).sum() == (five_people.image_ids == image).sum()
    again, other = draw_people(five_people, 9, seed=4), draw_people(five_people, 9, seed=5)
    assert np.array_equal(drawn.annotation_ids, again.annotation_ids)
    assert not np.array_equal(drawn.annotation_ids, other.annotation_ids)


def test_max_people_below_every_image_is_refused(five_people: People) -> None:
    with pytest.raises(InputError, match=r"data\.max_people.*raise it"):
        draw_people(five_people.take(np.array([0, 1])), 1, seed=0)


def test_missing_folder_is_named(config: StudyConfig, tmp_path: Path) -> None:
    gone = str(tmp_path / "no-such-folder")
    with pytest.raises(InputError, match=r"data\.root=.*no-such-folder.*set data\.root"):
        prepare(with_values(config, {"data.root": gone}))


def test_folder_of_the_data_is_not_needed_if_all_paths_are_absolute(config: StudyConfig) -> None:
    before, _ = prepare(config)
    for split in (config.data.train, config.data.val):
        split.annotations = str(Path(config.data.root, split.annotations))
        split.images = str(Path(config.data.root, split.images))
    config.data.root = "/no/such/folder"
    assert prepare(config)[0] == before


def test_faults_above_the_share_stop_the_study_and_name_the_annotation(
    config: StudyConfig,
) -> None:
    number = spoil(config, bbox=[10, 20, 0, 70])
    with pytest.raises(InputError, match=rf"five\.json.*{number}"):
        prepare(with_values(config, {"data.max_bad_fraction": 0.05}))
    assert not list(Path(config.storage).rglob("*.arrow"))


def test_faults_below_the_share_are_left_out_of_training_and_of_the_truth(
    config: StudyConfig,
) -> None:
    number = spoil(config, bbox=[10, 20, 0, 70])
    spoil(config, "val.json", bbox=[10, 20, 0, 70])
    data, messages = prepare(with_values(config, {"data.max_bad_fraction": 0.1}))
    assert sum(data.num_people[:2]) == data.num_people[2] == 12
    assert str(number) in "\n".join(messages)
    faulty = {number, VAL_FROM + number}
    stores = [open_crop_store(Path(path)) for path in (data.train, data.search, data.val)]
    assert all(not faulty & set(store.annotation_ids.tolist()) for store in stores)
    truth = json.loads(Path(data.val_truth).read_text())
    numbers = {annotation["id"] - VAL_FROM for annotation in truth["annotations"]}
    assert number not in numbers and number + 1 in numbers  # the next person is kept


def test_people_in_both_train_and_val_stop_the_study(config: StudyConfig) -> None:
    with pytest.raises(InputError, match=r"got 13 of 13:\n  person of train who is in val: 13"):
        prepare(with_values(config, {"data.val.images": "images"}))
    folder = Path(config.storage) / config.name / "results/audit"
    rows = pq.read_table(folder / "overlap.parquet").to_pylist()
    assert len(rows) == 13 and all(row["is_fault"] for row in rows)
    assert not list(Path(config.storage).rglob("*.arrow"))


def test_few_people_in_both_train_and_val_are_left_out_of_train(config: StudyConfig) -> None:
    first = spoil(config)
    spoil(config, "val.json", id=first)
    data, messages = prepare(with_values(config, {"data.max_bad_fraction": 0.1}))
    assert (sum(data.num_people[:2]), data.num_people[2]) == (12, 13)
    stores = [open_crop_store(Path(path)) for path in (data.train, data.search, data.val)]
    assert [first in store.annotation_ids for store in stores] == [False, False, True]
    truth = json.loads(Path(data.search_truth).read_text())
    assert first not in {annotation["id"] for annotation in truth["annotations"]}
    (line,) = [line for line in messages if "person of train who is in val: 1" in line]
    assert f"five.json, annotation {first}: the same person is in " in line


def test_detected_boxes_are_used_for_val_alone(config: StudyConfig) -> None:
    labeled, _ = prepare(config)
    boxes = [
        {"image_id": image, "category_id": 1, "bbox": [20, 20, 50, 60], "score": score}
        for image, score in ((1, 0.5), (4, 0.6), (4, 0.05))
    ]
    (Path(config.data.root) / "boxes.json").write_text(json.dumps(boxes))
    values = {"data.val.detections": "boxes.json", "data.val.detection_threshold": 0.1}
    found, messages = prepare(with_values(config, values))
    assert (found.train, found.search) == (labeled.train, labeled.search)
    store = open_crop_store(Path(found.val))
    assert store.image_ids.tolist() == [1, 4]
    assert store.box_scores is not None and store.box_scores.tolist() == [0.5, 0.6]
    assert len(images_of(found.val_truth)) == 8  # people without a detected box are missed
    assert "2 boxes in 2 images of val from boxes.json" in messages


def test_annotation_file_is_read_once_and_once_more_to_write_its_truth(
    config: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    boxes = [{"image_id": 1, "category_id": 1, "bbox": [20, 20, 50, 60], "score": 0.5}]
    (Path(config.data.root) / "boxes.json").write_text(json.dumps(boxes))
    config = with_values(config, {"data.val.detections": "boxes.json"})
    read: list[str] = []
    opened = Path.open

    def counted(path: Path, mode: str = "r", **options: Any) -> Any:
        if mode == "r" and path.name in ("five.json", "val.json"):
            read.append(path.name)
        return opened(path, mode, **options)

    monkeypatch.setattr(Path, "open", counted)
    prepare(config)
    assert sorted(read) == ["five.json", "five.json", "val.json", "val.json"]


def test_annotations_leave_memory_before_the_next_file_is_read(
    config: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables: list[weakref.ref[AnnotationTable]] = []

    def watched(annotations: Path, *options: Any) -> AnnotationTable:
        gc.collect()
        assert [table() for table in tables] == [None] * len(tables)
        table = read_table(annotations, *options)
        tables.append(weakref.ref(table))
        return table

    monkeypatch.setattr(study_people, "read_table", watched)
    data, _ = prepare(config)
    gc.collect()
    assert len(tables) == 2 and [table() for table in tables] == [None, None]
    assert data.num_people[2] == 13


def test_fingerprint_of_each_part_is_computed_once(
    config: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    fingerprinted: list[People] = []
    fingerprint = crop_store._people_fingerprint

    def counted(people: People, *settings: Any) -> str:
        fingerprinted.append(people)
        return fingerprint(people, *settings)

    monkeypatch.setattr(crop_store, "_people_fingerprint", counted)
    prepare(config)
    assert len(fingerprinted) == 3


def test_broken_file_of_boxes_stops_the_study_before_a_crop_is_cut(config: StudyConfig) -> None:
    (Path(config.data.root) / "boxes.json").write_text('[{"image_id": 1}]')
    with pytest.raises(InputError, match=r"boxes\.json, entry 0 \(from 0\): .*fix or remove it"):
        prepare(with_values(config, {"data.val.detections": "boxes.json"}))
    assert not list(Path(config.storage).rglob("*.arrow"))


def test_synthetic_study_draws_its_images(
    mini_config: StudyConfig, mini_data: PreparedData
) -> None:
    assert Path(mini_config.data.root).is_dir()
    train, search, val = mini_data.num_people
    assert train > search > 0 and val > 0
    assert len(images_of(mini_data.search_truth)) == 6  # a quarter of 24


def test_folder_of_crops_that_cannot_be_created_is_refused_first(
    config: StudyConfig, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("a file, no folder")
    elsewhere = with_values(config, {"data.store": str(tmp_path / "file" / "crops")})
    with pytest.raises(
        InputError, match=r"must be possible to create.*file/crops .*change data\.store"
    ):
        prepare(elsewhere)


def test_folder_for_crops_changes_the_place_and_not_the_data(
    config: StudyConfig, tmp_path: Path
) -> None:
    data, _ = prepare(with_values(config, {"data.store": str(tmp_path / "crops")}))
    names = sorted(Path(path).name for path in (data.train, data.search, data.val))
    assert sorted(path.name for path in (tmp_path / "crops").iterdir()) == names
    assert not list(Path(config.storage).rglob("crops-*"))
    assert prepare(config)[0].fingerprint == data.fingerprint


def test_size_of_all_three_stores_together_chooses_the_form(
    config: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, messages = prepare(config)
    assert sum(line.startswith("cropping ") for line in messages) == 3
    monkeypatch.setattr(crop_parts, "RAW_BYTES", 26 * 144 * 96 * 3 - 1)
    coded, messages = prepare(config)
    assert coded.fingerprint != raw.fingerprint
    assert all(" as jpeg (raw " in line for line in messages if line.startswith("cropping "))
    forced, _ = prepare(with_values(config, {"data.crops": "jpeg"}))
    assert forced == coded


def test_progress_of_every_step_is_reported(config: StudyConfig) -> None:
    reported: dict[str, tuple[int, int]] = {}

    def meter(name: str) -> Any:
        return lambda done, total: reported.update({name: (done, total)})

    prepare_data(config.data, resolve(config), meter, lambda text: None)
    assert {"cropping train", "cropping search", "cropping val"} <= reported.keys()
    assert all(done == total for done, total in reported.values())


def test_evaluation_follows_the_kind_of_data(config: StudyConfig) -> None:
    resolved = resolve(config)
    assert resolved.evaluation == "coco"
    crowd = with_values(config, {"data.kind": "crowdpose"})
    assert resolve(crowd).evaluation == "crowdpose"
    assert resolved.input_size == (96, 64)
    assert resolved.skeleton.name == "five"


def test_study_lists_its_audit_in_its_folder(config: StudyConfig) -> None:
    number = spoil(config, bbox=[10, 20, 0, 70])
    folder = Path(config.storage) / config.name / "results/audit"
    with pytest.raises(InputError, match="box of zero size"):
        prepare(config)
    (row,) = [row for row in pq.read_table(folder).to_pylist() if row["is_fault"]]
    assert (row["kind"], row["annotation_id"]) == ("box of zero size", number)
    _, messages = prepare(with_values(config, {"data.max_bad_fraction": 0.1}))
    assert f"five.json: faults 1, notes 0, listed in {folder / 'train.parquet'}" in messages
    assert f"val.json: faults 0, notes 0, listed in {folder / 'val.parquet'}" in messages
    assert sorted(file.stem for file in folder.iterdir()) == ["overlap", "train", "val"]


def retell(file: Path) -> None:
    """Give the same people other names and another order of joints, and other categories."""
    document = json.loads(file.read_text())
    order, names = (3, 0, 4, 2, 1), ("LFoot", "Head top", "foot right", "RIGHT-HAND", "left Hand")
    for record in document["annotations"]:
        joints = np.reshape(record["keypoints"], (5, 3))
        record.update(category_id=2, keypoints=joints[list(order)].ravel().tolist())
    number = len(document["annotations"])
    for place, image in enumerate(document["images"] * 3):  # boxes of cars, where joints may be
        car = {"id": number + place, "image_id": image["id"], "category_id": place % 3 + 4}
        document["annotations"].insert(0, {**car, "bbox": [0, 0, 120, 100], "area": 12000})
    document["categories"] = [
        {"id": 0, "name": "person"},
        *({"id": 4 + kind, "name": f"car {kind}"} for kind in range(3)),
        {"id": 2, "name": "my project", "keypoints": names, "skeleton": [[1, 2]]},
    ]
    file.write_text(json.dumps(document))


def test_joints_in_another_order_and_category_change_no_crop_and_no_ap(
    config: StudyConfig, five: Skeleton, tmp_path: Path
) -> None:
    plain, _ = prepare(config)
    for name in ("five.json", "val.json"):
        retell(Path(config.data.root) / name)
    retold, messages = prepare(with_values(config, {"storage": str(tmp_path / "others")}))
    assert not {Path(path).name for path in plain.crops} & {Path(p).name for p in retold.crops}
    for one, other in zip(plain.crops, retold.crops, strict=True):
        stores = open_crop_store(Path(one)), open_crop_store(Path(other))
        first, second = (vars(store) for store in stores)
        arrays = [name for name, value in first.items() if isinstance(value, np.ndarray)]
        assert {"keypoints_stored", "visibility", "neighbors", "image_ids"} <= {*arrays}
        for name in arrays:
            np.testing.assert_array_equal(first[name], second[name], err_msg=name)
        rows = np.arange(len(stores[0]))
        crops = zip(stores[0].crops(rows), stores[1].crops(rows), strict=True)
        assert all((a == b).all() for a, b in crops)
    store = open_crop_store(Path(plain.val))
    stored_to_image = invert_affine(store.image_to_stored)
    pose = apply_affine(store.keypoints_stored.astype(float), stored_to_image)
    pose += np.random.RandomState(0).normal(0, 4, pose.shape)
    ones = np.ones(pose.shape[:2])
    poses = to_detections(pose, ones, store.image_ids, ones[:, 0])
    wrong = {**poses[0], "keypoints": [5.0, 5.0, 1.0] * 5, "score": 2.0}  # in a car, on nobody
    figures = [
        average_precision(Path(data.val_truth), [*poses, wrong], five, "coco")
        for data in (plain, retold)
    ]
    np.testing.assert_equal(figures[0], figures[1])
    assert 0.1 < figures[0]["ap"] < 0.9
    (read,) = [m for m in messages if m.startswith("note: val.json: joints in another order")]
    assert read.endswith("from LFoot, Head top, foot right, RIGHT-HAND, left Hand")
    left_out = "note: five.json: annotations of another category, 8 of car 0, 8 of car 1, 8 of"
    assert any(message.startswith(left_out) for message in messages)


@pytest.mark.parametrize(("named", "unnamed"), [("five", "val"), ("val", "five")])
def test_file_without_names_beside_one_in_another_order_is_refused(
    config: StudyConfig, named: str, unnamed: str
) -> None:
    for name in ("five", "val"):
        retell(Path(config.data.root) / f"{name}.json")
    file = Path(config.data.root) / f"{unnamed}.json"
    document = json.loads(file.read_text())
    del document["categories"][-1]["keypoints"]
    file.write_text(json.dumps(document))
    match = rf"both files must name .*skeleton=five, got names in {named}\.json alone; .*{unnamed}"
    with pytest.raises(InputError, match=match):
        prepare(config)


def test_category_that_is_chosen_changes_people_and_fingerprint(config: StudyConfig) -> None:
    for name in ("five.json", "val.json"):
        file = Path(config.data.root) / name
        document = json.loads(file.read_text())
        (category,) = document["categories"]
        document["categories"].append({**category, "id": 2, "name": "other"})
        for record in document["annotations"][::2]:
            record["category_id"] = 2
        file.write_text(json.dumps(document))
    chosen = {
        name: prepare(with_values(config, {"data.category": name}))[0]
        for name in ("person", "other")
    }
    assert [data.num_people[2] for data in chosen.values()] == [6, 7]
    parts = [{*data.crops, data.search_truth, data.val_truth} for data in chosen.values()]
    assert not parts[0] & parts[1]
    default, _ = prepare(config)
    assert default.fingerprint == chosen["person"].fingerprint
