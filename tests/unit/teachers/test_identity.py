"""A teacher is made once for all studies with the same targets, and again for all others."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from models.build import build_model
from models.skeleton import COCO
from study.cache.prepare import PreparedData
from study.cache.teacher_store import open_teacher_store
from study.config.compose import with_values
from study.config.derived import resolve
from study.config.schema import StudyConfig
from study.driver import _contents
from study.errors import InputError
from study.storage.checkpoint import Row
from study.storage.paths import TARGETS, cached_teacher, teacher_epochs
from study.teachers.adapters import TeacherSpec
from study.teachers.identity import (
    _earlier_name,
    file_contents,
    teacher_folder,
    training_folder,
    weights_of,
)
from study.teachers.make import best_of, make_teacher
from study.trial import teacher_spec
from study.workers import Workers

Values = dict[str, Any]
SHIFT_PX = 0.05
"""Largest difference of places that are computed by other roundings, stored-crop pixels."""
UNTRAINED: Values = {"teacher.epochs": 0, "teacher.views": 1}
VIEWS: Values = {"teacher.epochs": 0, "teacher.views": 2}
TRAINED: Values = {"teacher.epochs": 1, "teacher.views": 1}


@pytest.fixture(scope="module")
def init(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a tiny network that depend on nothing but this seed."""
    file = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    torch.manual_seed(11)
    save_file(build_model("mobile_net", "tiny", COCO).state_dict(), file)
    return file


def spec_of(config: StudyConfig, cache: Path | None = None) -> TeacherSpec:
    resolved = resolve(config)
    if cache is not None:
        resolved = dataclasses.replace(resolved, cache=cache)
    return teacher_spec(config, resolved)


def targets_made(
    config: StudyConfig, data: PreparedData, workers: Workers, cache: Path
) -> NDArray[np.float32]:
    """Make the teacher in an empty cache; return its targets."""

    def report(row: Row) -> bool:
        return False

    spec = spec_of(config, cache)
    make_teacher(spec, config.student, data, workers, report)
    return open_teacher_store(teacher_folder(spec, data) / TARGETS).modes_stored()


class Made:
    """Teachers of the mini study, each made once for this module."""

    def __init__(self, config: StudyConfig, data: PreparedData, init: Path, root: Path) -> None:
        self.config = with_values(config, {"teacher.init": str(init)})
        self.data, self.root = data, root
        self.known: dict[str, NDArray[np.float32]] = {}

    def folder(self, values: Values) -> str:
        return teacher_folder(spec_of(with_values(self.config, values)), self.data).name

    def targets(self, values: Values, workers: Workers) -> NDArray[np.float32]:
        key = json.dumps(values, sort_keys=True)
        if key not in self.known:
            cache = self.root / str(len(self.known))
            config = with_values(self.config, values)
            self.known[key] = targets_made(config, self.data, workers, cache)
        return self.known[key]


@pytest.fixture(scope="module")
def made(
    mini_config: StudyConfig,
    mini_data: PreparedData,
    init: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Made:
    return Made(mini_config, mini_data, init, tmp_path_factory.mktemp("made"))


@pytest.mark.parametrize(
    ("base", "change"),
    [
        (UNTRAINED, {"teacher.flip_test": True}),
        (UNTRAINED, {"teacher.codec": "udp"}),
        (TRAINED, {"teacher.sigma": 4.0}),
        (UNTRAINED, {"trial.precision": "bf16"}),
        (VIEWS, {"teacher.views": 3}),
        (VIEWS, {"seed": 1}),
        (VIEWS, {"teacher.seed": 1}),
        (VIEWS, {"distill.augment.scale": 0.2}),
        (VIEWS, {"distill.augment.rotation": 9.0}),
        (VIEWS, {"distill.augment.half_body": 0.9}),
        (VIEWS, {"student.codec": "udp"}),
        (TRAINED, {"seed": 1}),
        (TRAINED, {"teacher.seed": 1}),
        (TRAINED, {"teacher.epochs": 2}),
        (TRAINED, {"teacher.batch_size": 8}),
        (TRAINED, {"teacher.optimizer.lr": 1e-2}),
        (TRAINED, {"distill.augment.color": 0.5}),
    ],
    ids=str,
)
def test_setting_that_changes_targets_makes_another_teacher(
    base: Values, change: Values, made: Made, workers: Workers
) -> None:
    assert with_values(made.config, base | change) != with_values(made.config, base)
    before, after = made.targets(base, workers), made.targets(base | change, workers)
    assert not np.array_equal(before, after)
    assert made.folder(base | change) != made.folder(base)


@pytest.mark.parametrize(
    ("base", "change"),
    [
        (UNTRAINED, {"seed": 1}),
        (UNTRAINED, {"teacher.seed": 1}),
        (UNTRAINED, {"teacher.batch_size": 3}),
        (UNTRAINED, {"teacher.optimizer.lr": 0.5}),
        (UNTRAINED, {"teacher.skeleton": "coco"}),
        (UNTRAINED, {"teacher.input_size": [64, 64]}),
        (UNTRAINED, {"teacher.mode": "online"}),
        (UNTRAINED, {"teacher.pixels": "unit"}),
        (UNTRAINED, {"trial.compile": "true"}),
        (UNTRAINED, {"trial.channels_last": "true"}),
        (UNTRAINED, {"distill.augment.rotation": 9.0, "distill.augment.flip": 0.1}),
        (UNTRAINED, {"student.codec": "udp"}),
        (VIEWS, {"distill.augment.color": 0.5, "distill.augment.flip": 0.1}),
        (VIEWS, {"student.codec": "dark", "student.sigma": 1.5}),
        (VIEWS | {"teacher.seed": 5}, {"seed": 1}),
        (TRAINED | {"teacher.seed": 5}, {"seed": 1}),
        (TRAINED, {"teacher.seed": 0}),
        (TRAINED, {"student.codec": "udp"}),
        (TRAINED, {"distill.optimizer.lr": 0.5, "distill.schedule": "linear"}),
    ],
    ids=str,
)
def test_setting_that_leaves_targets_keeps_the_teacher(
    base: Values, change: Values, made: Made, workers: Workers
) -> None:
    assert with_values(made.config, base | change) != with_values(made.config, base)
    before, after = made.targets(base, workers), made.targets(base | change, workers)
    np.testing.assert_allclose(before, after, atol=SHIFT_PX)
    assert made.folder(base | change) == made.folder(base)


def test_other_val_people_keep_the_teacher(made: Made) -> None:
    data, other = made.data, "/cache/other"
    theirs = dataclasses.replace(
        data,
        val=other,
        val_truth=other,
        num_people=(*data.num_people[:2], 1),
        teacher_crops=(*data.teacher_crops[:2], other),
    )
    for values in (UNTRAINED, VIEWS, TRAINED):
        spec = spec_of(with_values(made.config, values))
        assert teacher_folder(spec, theirs) == teacher_folder(spec, data)


def test_other_people_of_the_search_slice_change_a_trained_teacher_alone(made: Made) -> None:
    data, other = made.data, "/cache/other"
    crops = (data.teacher_crops[0], other, data.teacher_crops[2])
    theirs = dataclasses.replace(data, search=other, teacher_crops=crops)
    for values in (UNTRAINED, VIEWS, TRAINED):
        spec = spec_of(with_values(made.config, values))
        is_same = teacher_folder(spec, theirs) == teacher_folder(spec, data)
        assert is_same == (values is not TRAINED)


@pytest.mark.parametrize("field", ["train", "teacher_crops"])
def test_other_training_people_or_crops_make_another_teacher(field: str, made: Made) -> None:
    data, other = made.data, "/cache/other"
    value: Any = other if field == "train" else (other, *data.teacher_crops[1:])
    theirs = dataclasses.replace(data, **{field: value})
    for values in (UNTRAINED, VIEWS, TRAINED):
        spec = spec_of(with_values(made.config, values))
        assert teacher_folder(spec, theirs) != teacher_folder(spec, data)


def test_teachers_of_other_views_share_one_training(
    made: Made, workers: Workers, tmp_path: Path
) -> None:
    reported: list[int] = []

    def report(row: Row) -> bool:
        reported.append(row["epoch"])
        return False

    folders = []
    for values in (TRAINED, TRAINED | {"teacher.views": 2}):
        config = with_values(made.config, values)
        spec = spec_of(config, tmp_path)
        before = list(tmp_path.rglob("model.safetensors"))
        make_teacher(spec, config.student, made.data, workers, report)
        folders.append(teacher_folder(spec, made.data))
        training = training_folder(spec, made.data)
        assert best_of(folders[-1]).folder.parent == teacher_epochs(training)
        if before:  # the second teacher trains nothing
            assert list(tmp_path.rglob("model.safetensors")) == before
    assert folders[0] != folders[1]
    views = open_teacher_store(folders[1] / TARGETS).modes_stored()
    plain = open_teacher_store(folders[0] / TARGETS).modes_stored()
    assert np.array_equal(views[: len(plain)], plain)


def test_teacher_of_an_earlier_version_is_used_again(made: Made, tmp_path: Path) -> None:
    spec = spec_of(with_values(made.config, TRAINED), tmp_path)
    today = teacher_folder(spec, made.data)
    earlier = cached_teacher(tmp_path, _earlier_name(spec, made.data))
    earlier.mkdir()
    assert teacher_folder(spec, made.data) == earlier == training_folder(spec, made.data)
    today.mkdir()
    assert teacher_folder(spec, made.data) == today


def test_name_of_an_earlier_version_is_that_of_its_code(
    mini_config: StudyConfig, mini_data: PreparedData
) -> None:
    # Computed by the code of version 4 for paths and data of these names.
    data = PreparedData("a", "b", "c", "d", "e", (1, 2, 3), ("f", "g", "h"))
    spec = spec_of(with_values(mini_config, {"seed": 7}))
    assert _earlier_name(spec, data) == "4854acc96b743760"


def write(folder: Path, *names: str) -> None:
    """Write a file of each name; its content is its name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def test_every_file_of_a_folder_of_weights_counts(
    mini_config: StudyConfig, tmp_path: Path
) -> None:
    index = "model.safetensors.index.json"
    shards = ["model-1.safetensors", "model-2.safetensors", "more/model-3.safetensors"]
    write(tmp_path, "config.json", "README.md", "preprocessor_config.json", *shards)
    (tmp_path / index).write_text(json.dumps({"weight_map": dict(enumerate(shards))}))
    model = with_values(
        mini_config, {"teacher.name": "vitpose", "teacher.init": str(tmp_path)}
    ).teacher
    before = weights_of(model)
    assert len(before) == 5
    for name in ("config.json", *shards):
        (tmp_path / name).write_text("other")
        after = weights_of(model)
        assert after != before
        write(tmp_path, name)
    for name in ("README.md", "preprocessor_config.json"):
        (tmp_path / name).write_text("other")
    assert weights_of(model) == before
    (tmp_path / shards[2]).unlink()
    with pytest.raises(InputError, match=r"must be complete, got no file .*model-3\.safetensors"):
        weights_of(model)


def test_weights_behind_a_link_are_those_of_its_target(
    mini_config: StudyConfig, init: Path, tmp_path: Path
) -> None:
    (tmp_path / "blob-1").write_text("one")
    (tmp_path / "blob-2").write_text("two")
    link = tmp_path / "weights.safetensors"
    model = dataclasses.replace(mini_config.student, init=str(link))
    found = []
    for blob in ("blob-1", "blob-2", "blob-1"):
        link.unlink(missing_ok=True)
        link.symlink_to(blob)
        found.append(weights_of(model))
    assert found[0] == found[2] != found[1]


def test_files_of_all_settings_have_a_fingerprint(
    mini_config: StudyConfig, tmp_path: Path
) -> None:
    names = ("teacher", "student", "poses.json")
    write(tmp_path, *names)
    teacher, student, poses = (str(tmp_path / name) for name in names)
    assert file_contents(spec_of(mini_config), mini_config.student, mini_config.refine) == {}
    values = {"teacher.init": teacher, "student.init": student, "refine.start": poses}
    config = with_values(mini_config, values)

    def contents() -> dict[str, str]:
        return file_contents(spec_of(config), config.student, config.refine)

    before = contents()
    assert list(before) == list(values)
    for name, setting in zip(names, values, strict=True):
        (tmp_path / name).write_text("other")
        os.utime(tmp_path / name, (1, 1))
        after = contents()
        assert {key for key in before if after[key] != before[key]} == {setting}
        write(tmp_path, name)


def test_search_space_counts_without_its_comments(
    mini_config: StudyConfig, tmp_path: Path
) -> None:
    file = tmp_path / "mine.yaml"
    config = with_values(mini_config, {"search_space": str(file)})
    study: Any = SimpleNamespace(teacher=spec_of(config), config=config)
    found = []
    for text in ("a: 1", "# more\na:   1", "a: 2"):
        file.write_text(text)
        found.append(_contents(study))
    assert list(found[0]) == ["search_space"]
    assert found[0] == found[1] != found[2]
    study.config = with_values(config, {"search_space": "joint"})
    assert _contents(study) == {}
