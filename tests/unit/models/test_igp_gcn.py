"""The graph layers against OPEC-Net's, and the refiner on a 5-joint skeleton."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from models.igp_gcn import IgpGcn, NodeAttention, ResGraphBlock, SemGraphConv
from models.pose_features import sample_features
from models.skeleton import Skeleton

STICK_MAN = Skeleton(
    name="stick_man",
    joints=("head", "left_hand", "right_hand", "left_foot", "right_foot"),
    edges=((0, 1), (0, 2), (0, 3), (0, 4)),
    flip_pairs=((1, 2), (3, 4)),
    oks_sigmas=(0.03, 0.06, 0.06, 0.09, 0.09),
    upper_body=(0, 1, 2),
)
CROP = (96, 64)
CHANNELS = (7, 6, 5)
STRIDES = (16, 8, 4)


@pytest.fixture(scope="module")
def layers(shared: Path) -> dict[str, Tensor]:
    with np.load(shared / "reference/igp_gcn/graph_layers.npz") as arrays:
        return {name: torch.tensor(arrays[name]) for name in arrays.files}


def state(layers: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the weights under a prefix, without inputs and outputs."""
    names = [name.removeprefix(prefix) for name in layers if name.startswith(prefix)]
    parts = ("W", "e", "bias", "gconv", "bn.", "attention.", "squeeze.")
    return {name: layers[prefix + name] for name in names if name.startswith(parts)}


def example(batch: int = 4, seed: int = 3) -> tuple[list[Tensor], Tensor, Tensor]:
    """Draw a pyramid, a pose and its scores."""
    torch.manual_seed(seed)
    pyramid = [
        torch.randn(batch, channels, CROP[0] // stride, CROP[1] // stride)
        for channels, stride in zip(CHANNELS, STRIDES, strict=True)
    ]
    keypoints = torch.rand(batch, 5, 2) * torch.tensor([CROP[1], CROP[0]])
    return pyramid, keypoints, torch.rand(batch, 5)


def refiner(**settings: Any) -> IgpGcn:
    torch.manual_seed(0)
    settings = {"width": 8, "depth": 1} | settings
    return IgpGcn(STICK_MAN, CHANNELS, **settings)


def moving(**settings: Any) -> IgpGcn:
    """Build a refiner with random heads, in eval mode."""
    model = refiner(**settings).eval()
    for name, parameter in model.named_parameters():
        if ".head." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_graph_convolution_equals_the_reference(layers: dict[str, Tensor]) -> None:
    layer = SemGraphConv(6, 8, layers["adj"])
    layer.load_state_dict(
        {name: layers[f"sem_{name}"] for name in ("W", "e", "bias")}, strict=True
    )
    nodes = layers["sem_in"].requires_grad_()
    out = layer(nodes)
    torch.testing.assert_close(out, layers["sem_out"], atol=1e-5, rtol=0)
    out.backward(layers["sem_upstream"])
    assert nodes.grad is not None
    torch.testing.assert_close(nodes.grad, layers["sem_grad_in"], atol=1e-5, rtol=0)
    for name, parameter in layer.named_parameters():
        expected = layers[f"sem_grad_{name}"]
        torch.testing.assert_close(parameter.grad, expected, atol=1e-5, rtol=1e-5)


def test_residual_block_equals_the_reference(layers: dict[str, Tensor]) -> None:
    block = ResGraphBlock(24, layers["adj"])
    weights = {k: v for k, v in state(layers, "res_").items() if not k.startswith("noimg_")}
    block.load_state_dict(weights, strict=True)
    nodes = torch.cat((layers["res_joint_features"].transpose(1, 2), layers["res_in"]), dim=2)
    torch.testing.assert_close(block.eval()(nodes), layers["res_out"], atol=1e-5, rtol=0)
    torch.testing.assert_close(block.train()(nodes), layers["res_out_train"], atol=1e-5, rtol=0)
    for name in ("running_mean", "running_var"):
        expected = layers[f"res_after_train_bn_{name}"]
        torch.testing.assert_close(getattr(block.bn, name), expected, atol=1e-5, rtol=0)


def test_residual_block_without_image_equals_the_reference(layers: dict[str, Tensor]) -> None:
    block = ResGraphBlock(16, layers["adj"]).eval()
    block.load_state_dict(state(layers, "res_noimg_"), strict=True)
    out = block(layers["res_in"])
    torch.testing.assert_close(out, layers["res_noimg_out"], atol=1e-5, rtol=0)


def test_node_attention_equals_the_reference(layers: dict[str, Tensor]) -> None:
    attention = NodeAttention(16, 12)
    attention.load_state_dict(state(layers, "att_"), strict=True)
    out = attention(layers["att_in"].transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(out, layers["att_out"], atol=1e-5, rtol=0)


def test_joint_depends_on_its_neighbors_only() -> None:
    torch.manual_seed(0)
    layer = SemGraphConv(3, 4, STICK_MAN.adjacency())
    nodes = torch.randn(1, 5, 3)
    changed = nodes.clone()
    changed[0, 1] += 1
    differs = (layer(changed) != layer(nodes)).any(dim=2)[0]
    assert differs.tolist() == [True, True, False, False, False]


@pytest.mark.parametrize("stride", [*STRIDES, 2, 1])
def test_keypoint_at_stride_times_i_reads_cell_i(stride: int) -> None:
    row, column = 1, 2 if stride == 16 else 5
    features = torch.zeros(1, 1, CROP[0] // stride, CROP[1] // stride)
    features[0, 0, row, column] = 1.0
    at = torch.tensor([[column, row], [column + 0.5, row], [column, row - 0.25], [row, column]])
    sampled = sample_features(features, stride * at[None].float(), CROP)[0, :, 0]
    torch.testing.assert_close(sampled, torch.tensor([1.0, 0.5, 0.75, 0.0]), atol=1e-5, rtol=0)


def test_cells_are_read_exactly_at_their_centers() -> None:
    features = torch.randn(2, 3, 6, 4)
    rows, columns = torch.meshgrid(torch.arange(6), torch.arange(4), indexing="ij")
    keypoints = 16.0 * torch.stack((columns, rows), dim=-1).view(1, 24, 2).expand(2, -1, -1)
    sampled = sample_features(features, keypoints, CROP)
    torch.testing.assert_close(sampled, features.flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-5)


def test_keypoint_beyond_the_map_reads_the_edge() -> None:
    features = torch.randn(1, 2, 6, 4)
    sampled = sample_features(features, torch.tensor([[[-50.0, 32.0], [64.0, 500.0]]]), CROP)
    expected = torch.stack((features[0, :, 2, 0], features[0, :, 5, 3]))[None]
    torch.testing.assert_close(sampled, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_sampling_equals_grid_sample_and_its_gradient(layout: torch.memory_format) -> None:
    """In double precision, so that grid_sample's rounding of coordinates doesn't matter."""
    torch.manual_seed(0)
    features = torch.randn(3, 4, 12, 8, dtype=torch.float64).to(memory_format=layout)
    keypoints = torch.rand(3, 50, 2, dtype=torch.float64) * torch.tensor([110, 150.0]) - 20
    crop, cells = keypoints.new_tensor(CROP[::-1]), keypoints.new_tensor((8, 12))
    upstream = torch.randn(3, 50, 4, dtype=torch.float64)
    found = []
    for read in (
        lambda maps: sample_features(maps, keypoints, CROP),
        lambda maps: torch.nn.functional.grid_sample(
            maps,
            (2 * keypoints / crop + 1 / cells - 1)[:, :, None],
            padding_mode="border",
            align_corners=False,
        )[..., 0].transpose(1, 2),
    ):
        maps = features.clone().requires_grad_()
        out = read(maps)
        out.backward(upstream)
        found.append((out.detach(), maps.grad))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-12, rtol=0)


class Counter(TorchDispatchMode):
    """Counts the calls of PyTorch's operators."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_sampling_loops_over_no_joint_and_no_person() -> None:
    """A loop over 17 joints takes ten times as long: tests/benchmarks/igp_gcn.py."""
    calls = []
    for people, joints in ((2, 1), (9, 17)):
        with Counter() as counter:
            sample_features(torch.rand(people, 5, 12, 8), torch.rand(people, joints, 2), (48, 32))
        calls.append(counter.calls)
    assert calls[0] == calls[1] > 0


def test_nan_keypoint_reads_nan() -> None:
    keypoints = torch.tensor([[[math.nan, 3.0], [math.inf, -math.inf], [4.0, 4.0]]])
    sampled = sample_features(torch.ones(1, 2, 24, 16), keypoints, CROP)
    assert sampled[0, 0].isnan().all()
    assert (sampled[0, 1:] == 1).all()


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("depth", [1, 2, 6])
def test_depth_and_width_set_blocks_and_channels_of_each_level(levels: int, depth: int) -> None:
    model = refiner(levels=levels, depth=depth, width=12)
    assert len(model.levels) == levels
    for level in model.levels:
        blocks = [part for part in level.modules() if isinstance(part, ResGraphBlock)]
        assert len(blocks) == depth
        assert {block.bn.num_features for block in blocks} == {12}


@pytest.mark.parametrize("depth", [1, 3, 6])
def test_every_block_affects_the_pose(depth: int) -> None:
    pyramid, keypoints, scores = example()
    model = moving(levels=1, depth=depth)
    expected = model(pyramid, keypoints, scores, CROP)[-1]
    for block in range(depth):
        weight = model.get_parameter(f"levels.0.blocks.{block}.gconv1.gconv.W")
        kept = weight.detach().clone()
        torch.nn.init.zeros_(weight)
        assert not torch.equal(model(pyramid, keypoints, scores, CROP)[-1], expected)
        weight.data.copy_(kept)
    assert torch.equal(model(pyramid, keypoints, scores, CROP)[-1], expected)


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("training", [True, False])
def test_untrained_refiner_moves_no_joint(levels: int, training: bool) -> None:
    pyramid, keypoints, scores = example()
    poses = refiner(levels=levels).train(training)(pyramid, keypoints, scores, CROP)
    assert len(poses) == levels
    assert all(torch.equal(pose, keypoints) for pose in poses)


@pytest.mark.parametrize("gate", [True, False])
def test_every_head_gets_a_gradient(gate: bool) -> None:
    pyramid, keypoints, scores = example()
    model = refiner(gate=gate)
    poses = model(pyramid, keypoints, scores, CROP)
    sum((pose - 30).square().mean() for pose in poses).backward()
    for name, parameter in model.named_parameters():
        if ".head." in name:
            assert parameter.grad is not None
            assert parameter.grad.abs().sum() > 0, name


def test_every_parameter_and_feature_gets_a_gradient_once_the_heads_move() -> None:
    pyramid, keypoints, scores = example()
    model = moving().train()
    for features in pyramid:
        features.requires_grad_()
    poses = model(pyramid, keypoints, scores, CROP)
    sum((pose - 30).square().mean() for pose in poses).backward()
    for name, tensor in [*model.named_parameters(), *((str(f.shape), f) for f in pyramid)]:
        assert tensor.grad is not None, name
        assert tensor.grad.isfinite().all()


def test_level_sends_no_gradient_to_the_level_before() -> None:
    pyramid, keypoints, scores = example()
    model = moving()
    model(pyramid, keypoints, scores, CROP)[-1].sum().backward()
    assert model.get_parameter("levels.0.head.weight").grad is None
    assert model.get_parameter("levels.0.project.weight").grad is not None


def test_fewer_levels_read_the_finest_maps() -> None:
    pyramid, keypoints, scores = example()
    model = moving(levels=2)
    expected = model(pyramid, keypoints, scores, CROP)[-1]
    coarse = [torch.full_like(pyramid[0], 9.0), *pyramid[1:]]
    assert torch.equal(model(coarse, keypoints, scores, CROP)[-1], expected)
    fine = [*pyramid[:2], torch.full_like(pyramid[2], 9.0)]
    assert not torch.equal(model(fine, keypoints, scores, CROP)[-1], expected)


def test_people_are_refined_independently() -> None:
    pyramid, keypoints, scores = example()
    order = torch.tensor([2, 0, 3, 1])
    model = moving()
    poses = model(pyramid, keypoints, scores, CROP)
    shuffled = model([f[order] for f in pyramid], keypoints[order], scores[order], CROP)
    for pose, other in zip(poses, shuffled, strict=True):
        torch.testing.assert_close(other, pose[order], atol=1e-4, rtol=0)
    alone = model([f[:1] for f in pyramid], keypoints[:1], scores[:1], CROP)
    torch.testing.assert_close(alone[-1], poses[-1][:1], atol=1e-4, rtol=0)


def test_crop_size_is_height_then_width() -> None:
    pyramid, keypoints, scores = example()
    model = moving()
    right = model(pyramid, keypoints, scores, CROP)[-1]
    assert not torch.allclose(model(pyramid, keypoints, scores, CROP[::-1])[-1], right, atol=1e-2)


def test_crop_twice_as_large_moves_joints_twice_as_far() -> None:
    pyramid, keypoints, scores = example()
    model = moving()
    small = model(pyramid, keypoints, scores, CROP)[-1]
    big = model(pyramid, 2 * keypoints, scores, (2 * CROP[0], 2 * CROP[1]))[-1]
    torch.testing.assert_close(big, 2 * small, atol=1e-3, rtol=0)


def test_closed_gate_moves_no_joint() -> None:
    pyramid, keypoints, scores = example()
    model = moving()
    for level in range(3):
        torch.nn.init.zeros_(model.get_parameter(f"levels.{level}.gate.weight"))
        torch.nn.init.constant_(model.get_parameter(f"levels.{level}.gate.bias"), -40.0)
    torch.testing.assert_close(model(pyramid, keypoints, scores, CROP)[-1], keypoints)


def test_refiner_without_gate_has_no_gate_parameters() -> None:
    assert any(".gate." in name for name in refiner().state_dict())
    assert not any(".gate." in name for name in refiner(gate=False).state_dict())


def test_dropout_acts_in_training_only() -> None:
    pyramid, keypoints, scores = example()
    model = moving(dropout=0.5)
    first, second = (model(pyramid, keypoints, scores, CROP)[-1] for _ in range(2))
    assert torch.equal(first, second)
    model.train()
    first, second = (model(pyramid, keypoints, scores, CROP)[-1] for _ in range(2))
    assert not torch.equal(first, second)


def test_training_follows_the_image_to_the_joint() -> None:
    """The maps hold the vector from each cell to a target that differs by person."""
    torch.manual_seed(0)
    batch = 16
    target = torch.rand(batch, 2) * torch.tensor([CROP[1], CROP[0]])
    pyramid = []
    for stride in STRIDES:
        rows, columns = torch.meshgrid(
            stride * torch.arange(CROP[0] // stride),
            stride * torch.arange(CROP[1] // stride),
            indexing="ij",
        )
        away = target[:, :, None, None] - torch.stack((columns, rows))[None]
        pyramid.append(away / CROP[0])
    keypoints = torch.rand(batch, 5, 2) * torch.tensor([CROP[1], CROP[0]])
    model = IgpGcn(STICK_MAN, (2, 2, 2), depth=1, width=16)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    errors = []
    for _ in range(40):
        poses = model(pyramid, keypoints, torch.ones(batch, 5), CROP)
        away_px = torch.stack([(pose - target[:, None]).abs().mean() for pose in poses])
        optimizer.zero_grad()
        away_px.sum().backward()
        optimizer.step()
        errors.append(away_px[-1].item())
    assert errors[-1] < errors[0] / 4


def test_state_of_a_refiner_loads_into_another() -> None:
    pyramid, keypoints, scores = example()
    model, other = moving(), refiner().eval()
    other.load_state_dict(model.state_dict(), strict=True)
    expected = model(pyramid, keypoints, scores, CROP)[-1]
    assert torch.equal(other(pyramid, keypoints, scores, CROP)[-1], expected)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"levels": 0}, r"levels must be 1 to 3.*levels=0.*refine.levels"),
        ({"levels": 4}, r"levels must be 1 to 3.*levels=4"),
        ({"depth": 0}, r"depth must be 1 to 6.*depth=0"),
        ({"depth": 7}, r"depth must be 1 to 6.*depth=7.*refine.depth"),
        ({"width": 10}, r"width must be a multiple of 4.*width=10.*refine.width"),
    ],
)
def test_impossible_shapes_are_refused(settings: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        refiner(**settings)
