"""HRNet: its widths, its pyramid, IGP-GCN on top, and W18 as a light student."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.build import build_codec
from models.hrnet import SIZES, HRNet, Size
from models.igp_gcn import IgpGcn
from models.refined_pose import RefinedPose
from models.skeleton import COCO, CROWDPOSE, Skeleton
from study.cache.prepare import PreparedData
from study.config.compose import with_values
from study.config.derived import resolve
from study.config.schema import StudyConfig
from study.training.networks import build_distill_task
from study.training.training_data import TrainingData
from study.workers import Workers


def network(joints: int = 5, width: int = 4) -> HRNet:
    torch.manual_seed(0)
    return HRNet(joints, Size(width)).eval()


def crops(batch: int, height: int, width: int) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("size", "number"), [("w18", 9_318_215), ("w18_small", 3_616_675)])
def test_w18_has_the_parameters_of_the_official_code(size: str, number: int) -> None:
    """Counted once: its PoseHighResolutionNet at NUM_CHANNELS 18, 36, 72, 144, commit 6f69e46.

    For the small one at NUM_MODULES 1, 3, 2, NUM_BLOCKS 2, and the first two blocks of layer1.
    """
    with torch.device("meta"):
        model = HRNet(17, SIZES[size])
    assert sum(parameter.numel() for parameter in model.parameters()) == number


@pytest.mark.parametrize("width", [4, 6])
def test_width_is_that_of_the_finest_branch_and_doubles_downwards(width: int) -> None:
    model = network(width=width)
    with torch.no_grad():
        pyramid = model(crops(2, 96, 64)).pyramid
    assert model.pyramid_channels == (4 * width, 2 * width, width)
    shapes = [(2, 4 * width, 6, 4), (2, 2 * width, 12, 8), (2, width, 24, 16)]
    assert [tuple(features.shape) for features in pyramid] == shapes


def test_pyramid_has_the_branches_before_the_last_fusion_and_the_fused_map() -> None:
    model = network()
    outputs: dict[str, Tensor] = {}
    watched = ("stage4.2.branches.2", "stage4.2.branches.1", "stage4.2.fuse_layers.0")
    for name in watched:
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: outputs.update({name: output})
        )
    with torch.no_grad():
        heatmaps, pyramid, *_ = model(crops(2, 96, 64))
        assert torch.equal(model.final_layer(pyramid[2]), heatmaps)
    for features, name in zip(pyramid, watched, strict=True):
        assert torch.equal(features, outputs[name]), name


def test_every_parameter_learns_from_the_heatmaps() -> None:
    model = network().train()
    model(crops(4, 64, 96)).heatmaps.square().sum().backward()
    silent = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]
    assert not silent


def test_new_network_predicts_nearly_zero() -> None:
    model = network()
    with torch.no_grad():
        assert model(crops(2, 96, 64)).heatmaps.abs().max() < 0.05
    assert model.final_layer.bias is not None and not model.final_layer.bias.any()


@pytest.mark.parametrize(("skeleton", "crop_size"), [(COCO, (128, 96)), (CROWDPOSE, (192, 160))])
def test_igp_gcn_refines_its_pose_and_the_gradient_reaches_the_first_layer(
    skeleton: Skeleton, crop_size: tuple[int, int]
) -> None:
    student = network(skeleton.num_joints)
    refiner = IgpGcn(skeleton, student.pyramid_channels, width=8, depth=1)
    for level in range(3):  # an untrained refiner moves nothing
        torch.nn.init.normal_(refiner.get_parameter(f"levels.{level}.head.weight"))
    model = RefinedPose(student, build_codec("msra", crop_size, 2.0), refiner).eval()
    people = 127.0 + 60 * crops(1, *crop_size)
    keypoints_crop, scores = model(people)
    assert keypoints_crop.shape == (1, skeleton.num_joints, 2)
    levels = refiner(student.predict(people).pyramid, keypoints_crop, scores, crop_size)
    torch.stack(levels).sum().backward()
    for name, parameter in (*refiner.named_parameters(), ("conv1", student.conv1.weight)):
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert student.conv1.weight.grad is not None and student.conv1.weight.grad.any()


def test_w18_learns_as_a_student(
    mini_config: StudyConfig, mini_data: PreparedData, mini_targets: Path, workers: Workers
) -> None:
    values = {"student.name": "hrnet", "student.size": "w18", "distill.optimizer.lr": 1e-5}
    config = with_values(
        mini_config, values
    )  # a learning rate as low as at the start of the warm-up
    task = build_distill_task(
        config.student, config.distill, config.trial, resolve(config), seed=0
    ).train()
    data = TrainingData.open(mini_data, resolve(config), workers, mini_targets)
    augment, generator = config.distill.augment, torch.Generator().manual_seed(0)
    order = [torch.arange(4)]
    (batch,) = data.batches(augment, task.codec.frame, order, generator)
    assert batch.crops.shape == (4, 3, 64, 64)
    optimizer = torch.optim.AdamW(task.parameter_groups(config.distill.optimizer))
    history = []
    for _ in range(5):
        means = {name: term.sum / term.count for name, term in task(batch).items()}
        optimizer.zero_grad()
        torch.stack(list(means.values())).sum().backward()
        optimizer.step()
        history.append({name: mean.item() for name, mean in means.items()})
    assert set(history[0]) == {"truth", "heatmap", "structure"}
    for name in ("truth", "heatmap"):  # structure is noise while the heatmaps are flat
        assert history[-1][name] < history[0][name]
