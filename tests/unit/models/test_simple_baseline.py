"""SimpleBaseline: its depths, its pyramid, its input, and IGP-GCN on top."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.build import build_codec
from models.igp_gcn import IgpGcn
from models.refined_pose import RefinedPose
from models.simple_baseline import SimpleBaseline
from models.skeleton import COCO, CROWDPOSE, Skeleton


def network(joints: int = 5) -> SimpleBaseline:
    torch.manual_seed(0)
    return SimpleBaseline(joints, 18).eval()


def crops(batch: int, height: int, width: int) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def test_r18_has_the_parameters_of_the_official_code() -> None:
    """Counted once: its PoseResNet with ``resnet_spec[18]``, commit 6f69e46."""
    with torch.device("meta"):
        model = SimpleBaseline(17, 18)
    assert sum(parameter.numel() for parameter in model.parameters()) == 15_376_721


def test_pyramid_is_the_three_deconvolutions_outputs() -> None:
    model, people = network(), crops(2, 96, 64)
    with torch.no_grad():
        heatmaps, pyramid, *_ = model(people)
        x = model.maxpool(model.relu(model.bn1(model.conv1(people))))
        for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
            x = layer(x)
        for step, features in enumerate(pyramid):
            x = model.deconv_layers[3 * step : 3 * step + 3](x)
            assert torch.equal(features, x)
            assert features.shape == (2, 256, 6 * 2**step, 4 * 2**step)
        assert torch.equal(model.final_layer(x), heatmaps)
    assert model.pyramid_channels == (256, 256, 256)


def test_input_is_bgr_with_imagenets_mean_in_rgb_order() -> None:
    red = torch.tensor([255.0, 0.0, 0.0]).view(1, 3, 1, 1)
    normalized = network().pixels.normalize(red).flatten()
    expected = [(0 - 0.485) / 0.229, (0 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    assert normalized.tolist() == pytest.approx(expected, rel=1e-5)


def test_every_parameter_learns_from_the_heatmaps() -> None:
    model = network().train()
    model(crops(4, 64, 96)).heatmaps.square().sum().backward()
    silent = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]
    assert not silent


@pytest.mark.parametrize("skeleton", [COCO, CROWDPOSE])
def test_igp_gcn_refines_its_pose_and_the_gradient_reaches_the_first_layer(
    skeleton: Skeleton,
) -> None:
    student = network(skeleton.num_joints)
    refiner = IgpGcn(skeleton, student.pyramid_channels, width=8, depth=1)
    for level in range(3):  # an untrained refiner moves nothing
        torch.nn.init.normal_(refiner.get_parameter(f"levels.{level}.head.weight"))
    model = RefinedPose(student, build_codec("msra", (256, 192), 2.0), refiner).eval()
    people = 127.0 + 60 * crops(1, 256, 192)
    keypoints_crop, scores = model(people)
    assert keypoints_crop.shape == (1, skeleton.num_joints, 2)
    levels = refiner(student.predict(people).pyramid, keypoints_crop, scores, (256, 192))
    torch.stack(levels).sum().backward()
    for name, parameter in (*refiner.named_parameters(), ("conv1", student.conv1.weight)):
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert student.conv1.weight.grad is not None and student.conv1.weight.grad.any()
