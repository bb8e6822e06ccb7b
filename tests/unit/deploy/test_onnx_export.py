"""An estimator as ONNX: onnxruntime finds what torch finds, for any number of crops."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from models.build import build_codec, build_model
from models.igp_gcn import IgpGcn
from models.refined_pose import RefinedPose
from models.skeleton import Skeleton
from study.deploy import onnx_export
from study.deploy.onnx_export import OPSET, check_onnx, require_onnx, write_onnx
from study.errors import InputError

SIZE = (96, 64)


def estimator_of(skeleton: Skeleton, codec: str, candidates: int) -> RefinedPose:
    """An estimator in which every part moves joints."""
    torch.manual_seed(0)
    student = build_model("mobile_net", "tiny", skeleton)
    nn.init.normal_(student.final_layer.weight, std=0.3)  # type: ignore[arg-type]
    refiner = IgpGcn(skeleton, student.pyramid_channels, width=8, depth=1, candidates=candidates)
    for name, parameter in refiner.named_parameters():
        if name.endswith("head.weight"):
            nn.init.normal_(parameter, std=1.0 if "chooser" in name else 0.02)
    return RefinedPose(student, build_codec(codec, SIZE, 2.0), refiner).eval()


def crops_of(count: int) -> Tensor:
    return torch.rand(count, 3, *SIZE, generator=torch.Generator().manual_seed(1)) * 255


@pytest.fixture(scope="module")
def written(five: Skeleton, tmp_path_factory: pytest.TempPathFactory) -> tuple[RefinedPose, Path]:
    """An estimator and its file; test_export.py has one of the other codec."""
    estimator = estimator_of(five, "msra", candidates=3)
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    write_onnx(estimator, path, five)
    return estimator, path


@pytest.mark.slow
def test_onnxruntime_finds_what_torch_finds(
    written: tuple[RefinedPose, Path], five: Skeleton
) -> None:
    estimator, path = written
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    start, _ = estimator.codec.decode(estimator.student.predict(crops_of(33)).heatmaps)
    for crops in (crops_of(33), crops_of(1)):
        names = ["keypoints_crop", "scores"]
        keypoints, scores = session.run(names, {"crops": crops.numpy()})
        with torch.no_grad():
            expected_keypoints, expected_scores = estimator(crops)
        torch.testing.assert_close(torch.tensor(keypoints), expected_keypoints, atol=1e-2, rtol=0)
        torch.testing.assert_close(torch.tensor(scores), expected_scores, atol=1e-4, rtol=0)
    moved = (start[:1] - expected_keypoints).abs().max()
    assert moved > 0.1  # else the refiner could be missing
    assert list(path.parent.iterdir()) == [path]  # the weights are in it
    content = onnx.load(path)
    assert [(entry.domain, entry.version) for entry in content.opset_import] == [("", OPSET)]
    onnx.checker.check_model(content)
    metadata = {entry.key: json.loads(entry.value) for entry in content.metadata_props}
    assert metadata["joints"] == list(five.joints)
    assert metadata["edges"] == [list(edge) for edge in five.edges]


@pytest.mark.slow
def test_a_file_of_other_weights_is_refused(
    written: tuple[RefinedPose, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    estimator, path = written
    shift_px, score_shift = check_onnx(estimator, path, crops_of(9))
    assert shift_px < 1e-2 and score_shift < 1e-4
    other = copy.deepcopy(estimator)
    assert other.refiner is not None
    nn.init.constant_(other.refiner.get_parameter("levels.2.head.bias"), 1e-3)  # of 96 px
    with pytest.raises(InputError, match=r"model.onnx must agree .* got 0.0\d+ px"):
        check_onnx(other, path, crops_of(9))
    monkeypatch.setattr(onnx_export, "TIE", 1e9)  # all peaks tie
    assert check_onnx(other, path, crops_of(9))[0] == 0
    assert other.student.final_layer.bias is not None
    nn.init.constant_(other.student.final_layer.bias, 1.0)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"got .* px and 1"):
        check_onnx(other, path, crops_of(9))


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_with_the_way_to_get_it(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_onnx()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"--onnx needs .*{package}.*pip install"):
        require_onnx()
