"""The files of an ONNX model are found in its graph: weights beside it, wherever they are used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from models.skeleton import COCO
from study.config.compose import with_values
from study.config.schema import StudyConfig
from study.errors import InputError
from study.teachers.identity import weights_of
from study.teachers.onnx_files import onnx_files
from study.teachers.onnx_model import open_onnx

SIZE = (64, 64)


def save(folder: Path, seed: int, location: str | None = "model.onnx.data") -> Path:
    """Write a network of one layer, whose weights are in ``location``, or in the graph itself."""
    weight = np.random.RandomState(seed).randn(17, 3, 8, 8).astype(np.float32)
    maps = {"strides": [4, 4], "pads": [2, 2, 2, 2]}
    graph = helper.make_graph(
        [helper.make_node("Conv", ["crops", "weight"], ["maps"], **maps)],
        "pose",
        [helper.make_tensor_value_info("crops", TensorProto.FLOAT, ["batch", 3, *SIZE])],
        [helper.make_tensor_value_info("maps", TensorProto.FLOAT, ["batch", 17, 16, 16])],
        [numpy_helper.from_array(weight, "weight")],
    )
    opset = [helper.make_opsetid("", 18)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=9)
    file = folder / "model.onnx"
    if location is None:
        onnx.save_model(model, file)
        return file
    (folder / location).parent.mkdir(exist_ok=True)
    for old in (file, folder / location):
        old.unlink(missing_ok=True)
    onnx.save_model(model, file, save_as_external_data=True, location=location, size_threshold=0)
    return file


def tensor_beside(name: str) -> TensorProto:
    """Return a tensor whose numbers are in the file ``name``."""
    tensor = numpy_helper.from_array(np.zeros(1, np.float32), name)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", name), ("offset", "0"), ("length", "4")):
        tensor.external_data.add(key=key, value=value)
    return tensor


@pytest.mark.parametrize("location", ["model.onnx.data", "weights/of the model"])
def test_weights_beside_a_model_are_part_of_it(
    location: str, mini_config: StudyConfig, tmp_path: Path
) -> None:
    file = save(tmp_path, 1, location)
    values = {"teacher.name": "onnx", "teacher.init": str(file), "teacher.epochs": 0}
    teacher = with_values(mini_config, values).teacher
    assert onnx_files(file) == [file, tmp_path / location]
    graph, before = file.read_bytes(), weights_of(teacher)
    assert weights_of(teacher) == before
    save(tmp_path, 2, location)
    assert file.read_bytes() == graph and weights_of(teacher) != before


def test_model_without_files_beside_it_is_one_file(tmp_path: Path) -> None:
    file = save(tmp_path, 1, location=None)
    (tmp_path / "model.onnx.data").write_text("of another model")
    assert onnx_files(file) == [file]


@pytest.mark.parametrize("content", [b"", b"no model", b"\x3a\xff\xff\xff\xff\x0f", b"\x3a"])
def test_broken_model_is_listed_alone(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    assert onnx_files(tmp_path / "model.onnx") == [tmp_path / "model.onnx"]


def test_weights_within_nodes_branches_and_functions_are_found(tmp_path: Path) -> None:
    constant = helper.make_node("Constant", [], ["a"], value=tensor_beside("constant"))
    inner = helper.make_graph(
        [helper.make_node("Identity", ["b"], ["c"])], "then", [], [], [tensor_beside("branch")]
    )
    branch = helper.make_node("If", ["a"], ["d"], then_branch=inner, else_branch=inner)
    sparse = onnx.SparseTensorProto(
        values=tensor_beside("sparse"), indices=tensor_beside("places"), dims=[1]
    )
    graph = helper.make_graph([constant, branch], "g", [], [], [], sparse_initializer=[sparse])
    own = helper.make_node("Constant", [], ["e"], value=tensor_beside("function"))
    opset = [helper.make_opsetid("", 18)]
    function = helper.make_function("mine", "f", [], ["e"], [own], opset)
    model = helper.make_model(graph, functions=[function], opset_imports=opset)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    names = {file.name for file in onnx_files(tmp_path / "model.onnx")[1:]}
    assert names == {"constant", "branch", "sparse", "places", "function"}


def test_missing_weights_are_refused_by_their_name(tmp_path: Path) -> None:
    file = save(tmp_path, 1, "model.onnx.data")
    open_onnx(file, COCO, SIZE, "imagenet")
    (tmp_path / "model.onnx.data").unlink()
    with pytest.raises(
        InputError, match=r"keeps weights in model\.onnx\.data beside it, got no such"
    ):
        open_onnx(file, COCO, SIZE, "imagenet")
