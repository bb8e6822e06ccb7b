"""MoveNet's files: reading them, and the messages that refuse wrong ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.build import build_model
from models.movenet_weights import load_movenet, read_tensors, weight_files
from models.skeleton import COCO
from study.cache.prepare import PreparedData
from study.config.compose import StudyConfig, with_values
from study.config.derived import resolve
from study.errors import InputError
from study.teachers.adapters import open_network
from study.teachers.identity import teacher_folder
from study.trial import teacher_spec


@pytest.fixture(scope="module")
def folder(shared: Path) -> Path:
    return shared / "pretrained" / "movenet"


def copied(folder: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Copy a lightning's files and change the list of weights."""
    for suffix in ("json", "bin"):
        shutil.copyfile(
            folder / f"movenet-lightning.{suffix}", target / f"movenet-lightning.{suffix}"
        )
    path = target / "movenet-lightning.json"
    content = json.loads(path.read_text())
    change(content["weightsManifest"][0])
    path.write_text(json.dumps(content))
    return path


def rename(group: dict[str, Any]) -> None:
    (weight,) = (
        w for w in group["weights"] if w["name"].endswith("block_7_expand/Conv2D_weights")
    )
    weight["name"] = "somewhere/else"


def reshape(group: dict[str, Any]) -> None:
    (weight,) = (
        w for w in group["weights"] if w["name"].endswith("block_7_expand/Conv2D_weights")
    )
    weight["shape"] = weight["shape"][::-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename, r"2 tensors differ.*block_7_expand/Conv2D_weights must be.*no such tensor"),
        (rename, r"somewhere/else is unknown"),
        (reshape, r"1 tensors differ.*block_7_expand/Conv2D_weights must be \[384, 64, 1, 1\]"),
    ],
)
def test_tensor_that_is_missing_or_of_another_shape_is_named(
    change: Callable[[dict[str, Any]], None], message: str, folder: Path, tmp_path: Path
) -> None:
    path = copied(folder, tmp_path, change)
    with pytest.raises(ValueError, match=message):
        load_movenet(build_model("mobile_net", "lightning", COCO), path, COCO)


def small_file(target: Path, content: bytes | None, paths: tuple[str, ...] = ("a.bin",)) -> Path:
    """Write a .json for three float16 and two int32 numbers, and ``content`` as its .bin."""
    weights = [
        {
            "name": "halves",
            "shape": [3, 1],
            "dtype": "float32",
            "quantization": {"dtype": "float16", "original_dtype": "float32"},
        },
        {"name": "whole", "shape": [2], "dtype": "int32"},
    ]
    path = target / "a.json"
    path.write_text(json.dumps({"weightsManifest": [{"paths": paths, "weights": weights}]}))
    if content is not None:
        (target / "a.bin").write_bytes(content)
    return path


NUMBERS = np.array([0.5, -2, 65504], "<f2").tobytes() + np.array([7, -9], "<i4").tobytes()


def test_tensors_are_read_one_after_another(tmp_path: Path) -> None:
    path = small_file(tmp_path, NUMBERS)
    tensors = read_tensors(path)
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
        "halves": [[0.5], [-2.0], [65504.0]],
        "whole": [7, -9],
    }
    assert weight_files(path) == [path, tmp_path / "a.bin"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"must lie beside it in a\.bin, got no such file"),
        (NUMBERS[:-1], r"a\.bin must have 14 bytes according to a\.json, got 13; copy both"),
        (NUMBERS + b"\0", r"a\.bin must have 14 bytes according to a\.json, got 15"),
    ],
)
def test_missing_or_wrong_sized_bin_is_refused(
    content: bytes | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        read_tensors(small_file(tmp_path, content))


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"weightsManifest": [{"paths": []}]}'])
def test_another_json_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"a\.json must be the \.json of a MoveNet"):
        read_tensors(path)


def test_weights_are_read_only_from_the_folder_of_the_json(tmp_path: Path) -> None:
    path = small_file(tmp_path, NUMBERS, ("../a.bin",))
    with pytest.raises(ValueError, match=r"files beside it"):
        read_tensors(path)


def test_other_number_types_are_refused(tmp_path: Path) -> None:
    path = small_file(tmp_path, NUMBERS)
    path.write_text(path.read_text().replace('"dtype": "float16"', '"dtype": "uint8"'))
    with pytest.raises(ValueError, match=r"float16, float32, int32, got uint8 for halves"):
        read_tensors(path)


def test_unreadable_weights_are_an_input_error(
    mini_config: StudyConfig, mini_data: PreparedData, tmp_path: Path
) -> None:
    init = str(small_file(tmp_path, None))
    config = with_values(mini_config, {"teacher.size": "lightning", "teacher.init": init})
    with pytest.raises(InputError, match=r"a\.bin"):
        open_network(teacher_spec(config, resolve(config)))
    with pytest.raises(InputError, match=r"a\.bin"):
        teacher_folder(teacher_spec(config, resolve(config)), mini_data)


def test_changed_weights_make_another_teacher(
    mini_config: StudyConfig, mini_data: PreparedData, tmp_path: Path
) -> None:
    init = small_file(tmp_path, NUMBERS)
    config = with_values(mini_config, {"teacher.init": str(init)})
    before = teacher_folder(teacher_spec(config, resolve(config)), mini_data)
    assert teacher_folder(teacher_spec(config, resolve(config)), mini_data) == before
    (tmp_path / "a.bin").write_bytes(NUMBERS[::-1])
    assert teacher_folder(teacher_spec(config, resolve(config)), mini_data) != before
