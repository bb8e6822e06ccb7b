"""Teachers of every kind predict in pixels of their crop, for the joints of the data."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from torch import Tensor, nn

from models.build import build_model
from models.pose_features import IMAGENET
from models.skeleton import COCO, CROWDPOSE, SKELETONS, Skeleton
from study.config import checks
from study.config.compose import compose, with_values
from study.config.derived import resolve
from study.config.schema import StudyConfig
from study.errors import InputError
from study.teachers.adapters import (
    HeatmapTeacher,
    TeacherOfOtherJoints,
    TeacherSpec,
    TeacherTargets,
    check_teacher,
    open_network,
    open_teacher,
)
from study.trial import teacher_spec

CPU = torch.device("cpu")
JOINTS = torch.tensor([[22.0, 50.0], [41.0, 30.0], [33.0, 71.0], [22.0, 50.0], [41.0, 30.0]])
"""The five joints in the crop of ``spots``; the last two lie on the first two."""


def spec_of(config: StudyConfig) -> TeacherSpec:
    return teacher_spec(config, resolve(config))


def check(config: StudyConfig) -> None:
    check_teacher(config.teacher, resolve(config))


@pytest.fixture
def config(five: Skeleton, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StudyConfig:
    """A study of five joints whose students see (64, 64) and whose teachers (96, 64)."""
    monkeypatch.setitem(SKELETONS, "five", five)
    monkeypatch.setattr(checks, "SKELETONS", ("five", "coco"))
    return compose(
        [
            "data=coco",
            "data.skeleton=five",
            "data.input_size=[64,64]",
            "teacher.input_size=[96,64]",
            "teacher.pixels=unit",
        ]
    )


def spots() -> Tensor:
    """Return a crop (1, 3, 96, 64) with a wide red, green and blue spot at different joints."""
    rows, columns = torch.meshgrid(torch.arange(96), torch.arange(64), indexing="ij")
    squared = [(columns - x) ** 2 + (rows - y) ** 2 for x, y in JOINTS[:3]]
    return 255 * torch.exp(-torch.stack(squared) / (2 * 8.0**2))[None]


def write_onnx(
    path: Path,
    *,
    joints: int = 5,
    stride: int = 4,
    simcc: bool = False,
    crops: Sequence[Any] = ("batch", 3, 96, 64),
    swap: bool = False,
) -> Path:
    """Write a network that finds joint j by color j % 3, at every ``stride``-th pixel."""
    weight = np.zeros((joints, 3, 1, 1), np.float32)
    weight[np.arange(joints), np.arange(joints) % 3] = 1
    constants = [numpy_helper.from_array(weight, "weight")]
    nodes = [helper.make_node("Conv", ["crops", "weight"], ["maps"], strides=[stride] * 2)]
    outputs = ["maps"]
    if simcc:  # two bins a pixel
        constants.append(numpy_helper.from_array(np.array([1, 1, 2], np.float32), "scales"))
        outputs = ["columns", "rows"]
        for name, axis in (("columns", 2), ("rows", 3)):
            constants.append(numpy_helper.from_array(np.array([axis]), f"{name}_axis"))
            nodes += [
                helper.make_node(
                    "ReduceMax", ["maps", f"{name}_axis"], [f"{name}_line"], keepdims=0
                ),
                helper.make_node(
                    "Resize",
                    [f"{name}_line", "", "scales"],
                    [name],
                    mode="nearest",
                    coordinate_transformation_mode="asymmetric",
                    nearest_mode="floor",
                ),
            ]
    graph = helper.make_graph(
        nodes,
        "pose",
        [helper.make_tensor_value_info("crops", TensorProto.FLOAT, crops)],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
            for name in (outputs[::-1] if swap else outputs)
        ],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, path)
    return path


def with_onnx(config: StudyConfig, path: Path, **changes: Any) -> StudyConfig:
    named = {f"teacher.{key}": value for key, value in changes.items()}
    values = {"teacher.name": "onnx", "teacher.init": str(path), "teacher.epochs": 0}
    return with_values(config, {**values, **named})


@pytest.mark.parametrize("simcc", [False, True])
@pytest.mark.parametrize("batch", ["batch", 1])
def test_onnx_network_finds_the_joints_in_its_crop(
    simcc: bool, batch: int | str, config: StudyConfig, tmp_path: Path
) -> None:
    crops = (batch, 3, 96, 64)
    file = write_onnx(tmp_path / "m.onnx", simcc=simcc, stride=1 if simcc else 4, crops=crops)
    teacher = open_teacher(spec_of(with_onnx(config, file)), CPU)
    targets = teacher.predict_targets(torch.cat([spots(), spots().flip(-1)]))
    assert targets.modes_crop.shape == (2, 5, 3, 4) and targets.relation is None
    assert targets.known.tolist() == [[1] * 5] * 2
    modes = targets.modes_crop[:, :, 0]
    torch.testing.assert_close(modes[0, :, :2], JOINTS, atol=0.05, rtol=0)
    mirrored = torch.stack([63 - JOINTS[:, 0], JOINTS[:, 1]], dim=1)
    torch.testing.assert_close(modes[1, :, :2], mirrored, atol=0.05, rtol=0)
    torch.testing.assert_close(modes[..., 2], torch.ones(2, 5), atol=0.02, rtol=0)
    assert (targets.modes_crop[:, :, 1:, 2] == 0).all()
    keypoints, scores = teacher(spots())
    torch.testing.assert_close(keypoints[0], JOINTS, atol=0.05, rtol=0)
    assert (scores > 0.9).all()


def test_heatmaps_are_decoded_with_the_models_own_stride(
    config: StudyConfig, tmp_path: Path
) -> None:
    file = write_onnx(tmp_path / "m.onnx", stride=8)
    teacher = open_teacher(spec_of(with_onnx(config, file)), CPU)
    modes = teacher.predict_targets(spots()).modes_crop[0, :, 0]
    # the decoder's blur costs part of a pixel on so small a map; a wrong stride, half of the place
    torch.testing.assert_close(modes[:, :2], JOINTS, atol=1.5, rtol=0)


def test_pixels_are_normalized_by_the_setting(config: StudyConfig, tmp_path: Path) -> None:
    file = write_onnx(tmp_path / "m.onnx", stride=1, simcc=True)
    heights = {}
    for pixels in ("unit", "imagenet"):
        teacher = open_teacher(spec_of(with_onnx(config, file, pixels=pixels)), CPU)
        heights[pixels] = teacher(spots() / 4)[1][0, 0]
    assert heights["unit"] == pytest.approx(0.25)
    red = (255 / 4 - IMAGENET.mean[0]) / IMAGENET.std[0]
    assert red < 0 and heights["imagenet"] == 0  # below the mean, cut to 0..1


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"joints": 3}, r"must have 5 joints \(five\), got .*\(1, 3, 24, 16\).*skeleton"),
        ({"crops": ("b", 3, 64, 64)}, r"takes crops of \[64, 64\].*teacher.input_size=\[64,64\]"),
        ({"crops": (8, 3, 96, 64)}, "one crop at a time or any number, got .*free batch"),
        ({"crops": ("b", 4, 96, 64)}, r"must take one input, float crops \(B, 3, h, w\)"),
        ({"simcc": True, "stride": 1, "swap": True}, "columns per pixel as rows, columns first"),
    ],
)
def test_onnx_file_that_does_not_fit_is_refused(
    made: dict[str, Any], message: str, config: StudyConfig, tmp_path: Path
) -> None:
    file = write_onnx(tmp_path / "m.onnx", **made)
    with pytest.raises(InputError, match=message):
        check(with_onnx(config, file))


def test_other_outputs_and_other_files_are_refused(config: StudyConfig, tmp_path: Path) -> None:
    file = write_onnx(tmp_path / "m.onnx", stride=1, simcc=True)
    model = onnx.load(file)
    model.graph.output.pop()
    onnx.save(model, file)
    with pytest.raises(InputError, match=r"heatmaps \(B, K, H, W\), or SimCC's .*got \[\(1, 5,"):
        check(with_onnx(config, file))
    file.write_text("no model")
    with pytest.raises(InputError, match="ONNX file that onnxruntime opens"):
        check(with_onnx(config, file))
    with pytest.raises(InputError, match=r"got teacher.init=.*gone\.onnx"):
        check(with_onnx(config, tmp_path / "gone.onnx"))


@pytest.mark.parametrize(
    ("name", "library"), [("onnx", "onnxruntime"), ("vitpose", "transformers")]
)
def test_missing_library_is_named_with_its_extra(
    name: str, library: str, config: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    contents = {"model_type": "vitpose", "backbone_config": {"model_type": "vitpose_backbone"}}
    (tmp_path / "config.json").write_text(json.dumps(contents))
    changed = with_onnx(config, tmp_path, name=name)
    with pytest.raises(InputError, match=rf"{library}, which is not installed; pip .*\[{name}\]"):
        check(changed)


class Numbering:
    """Teacher that finds joint j at (j, 10 j), with a height of 0.5."""

    def predict_targets(self, crops: Tensor) -> TeacherTargets:
        keypoints, _ = self(crops)
        modes = torch.ones(len(crops), 17, 3, 4)
        modes[:, :, 0, :2] = keypoints
        numbers = torch.arange(17.0)
        relation = 100 * numbers[:, None] + numbers
        return TeacherTargets(
            modes, torch.ones(len(crops), 17), relation.expand(len(crops), 17, 17)
        )

    def __call__(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        numbers = torch.arange(17.0)
        keypoints = torch.stack([numbers, 10 * numbers], dim=1)
        return keypoints.expand(len(crops), 17, 2), torch.full((len(crops), 17), 0.5)


def test_coco_teacher_has_targets_for_the_twelve_joints_of_crowdpose() -> None:
    teacher = TeacherOfOtherJoints(Numbering(), COCO, CROWDPOSE)
    targets = teacher.predict_targets(torch.zeros(2, 3, 8, 8))
    assert targets.known.tolist() == [[1] * 12 + [0, 0]] * 2  # head and neck are CrowdPose's alone
    wrist, ankle = CROWDPOSE.joints.index("left_wrist"), CROWDPOSE.joints.index("right_ankle")
    coco_wrist, coco_ankle = COCO.joints.index("left_wrist"), COCO.joints.index("right_ankle")
    assert targets.modes_crop[1, wrist, 0].tolist() == [coco_wrist, 10 * coco_wrist, 1, 1]
    assert targets.relation is not None
    assert targets.relation[1, wrist, ankle] == 100 * coco_wrist + coco_ankle
    assert (targets.relation[:, 12:] == 0).all() and (targets.relation[:, :, 12:] == 0).all()
    keypoints, scores = teacher(torch.zeros(2, 3, 8, 8))
    assert keypoints[0, ankle].tolist() == [coco_ankle, 10 * coco_ankle]
    assert (keypoints[:, 12:] == 0).all() and (scores[:, 12:] == 0).all()
    assert (scores[:, :12] == 0.5).all()


def test_built_in_network_may_have_other_joints_than_the_data(
    mini_config: StudyConfig, tmp_path: Path
) -> None:
    init = tmp_path / "weights.safetensors"
    save_file(build_model("mobile_net", "tiny", CROWDPOSE).state_dict(), init)
    values = {"teacher.init": str(init), "teacher.skeleton": "crowdpose", "teacher.epochs": 0}
    settings = with_values(mini_config, values)
    network, _, trained = open_network(spec_of(settings))
    assert "final_layer.weight" in trained  # as many joints as the file's head has
    assert network.state_dict()["final_layer.weight"].shape[0] == 14
    targets = open_teacher(spec_of(settings), CPU).predict_targets(torch.zeros(1, 3, 64, 64))
    assert targets.modes_crop.shape == (1, 17, 3, 4)
    assert targets.known[0].sum() == 12 and targets.known[0, 0] == 0  # CrowdPose has no nose


def test_network_predicts_its_decoded_pose_and_its_relation(
    mini_config: StudyConfig,
) -> None:
    network, codec, _ = open_network(spec_of(mini_config))
    nn.init.normal_(network.final_layer.weight, std=1.0)  # type: ignore[union-attr,arg-type]
    teacher = HeatmapTeacher(network.eval(), codec)
    crops = 255 * torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        targets = teacher.predict_targets(crops)
        keypoints, _ = codec.decode(network.predict(crops).heatmaps)
        scored, _ = teacher(crops)
    assert torch.equal(scored, keypoints)
    has_peak = targets.modes_crop[:, :, 0, 2] > 0
    assert has_peak.any()
    torch.testing.assert_close(targets.modes_crop[:, :, 0, :2][has_peak], keypoints[has_peak])
    assert targets.relation is not None
    torch.testing.assert_close(targets.relation.diagonal(dim1=1, dim2=2), torch.ones(2, 17))


def test_folder_without_a_vitpose_is_refused(config: StudyConfig, tmp_path: Path) -> None:
    changed = with_onnx(config, tmp_path, name="vitpose")
    with pytest.raises(InputError, match=r"folder with ViTPose's config\.json"):
        check(changed)
    backbone = {"model_type": "timm_backbone"}
    contents = {"model_type": "vitpose", "backbone_config": backbone}
    (tmp_path / "config.json").write_text(json.dumps(contents))
    with pytest.raises(InputError, match="own backbone, got vitpose on timm_backbone"):
        check(changed)
