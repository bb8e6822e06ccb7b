"""The light network: its shapes for any joints and crop, and the pixels that a cell covers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.mobile_net import SIZES, ConvNorm, MobileNet, SeparableConv


def network(size: str = "tiny", joints: int = 5) -> MobileNet:
    torch.manual_seed(0)
    return MobileNet(joints, SIZES[size]).eval()


def crops(batch: int, height: int, width: int) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("joints", [5, 17])
@pytest.mark.parametrize(("height", "width"), [(96, 64), (64, 128), (32, 32)])
@pytest.mark.parametrize("size", sorted(SIZES))
def test_heatmaps_are_a_quarter_and_the_pyramid_has_strides_16_8_4(
    size: str, height: int, width: int, joints: int
) -> None:
    model = network(size, joints)
    with torch.no_grad():
        heatmaps, pyramid, *others = model(crops(2, height, width))
    assert others == [None, None]
    assert heatmaps.shape == (2, joints, height // 4, width // 4)
    expected = [
        (2, channels, height // stride, width // stride)
        for channels, stride in zip(model.pyramid_channels, (16, 8, 4), strict=True)
    ]
    assert [tuple(features.shape) for features in pyramid] == expected
    assert model.pyramid_channels == SIZES[size].pyramid


def test_person_does_not_depend_on_the_rest_of_the_batch() -> None:
    model, people = network(), crops(3, 96, 64)
    with torch.no_grad():
        together, alone = model(people).heatmaps, model(people[1:2]).heatmaps
    torch.testing.assert_close(together[1:2], alone, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("size", ["tiny", "lightning"])
def test_new_network_predicts_nearly_zero(size: str) -> None:
    with torch.no_grad():
        assert network(size)(crops(2, 96, 64)).heatmaps.abs().max() < 0.05


@pytest.mark.parametrize("size", ["tiny", "lightning"])
def test_every_parameter_learns_from_the_heatmaps(size: str) -> None:
    model = network(size).train()
    model(crops(4, 64, 96)).heatmaps.square().sum().backward()
    silent = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]
    assert not silent


def test_memory_format_does_not_matter() -> None:
    model, people = network(), crops(2, 96, 64)
    with torch.no_grad():
        plain = model(people).heatmaps
        last = model.to(memory_format=torch.channels_last)(  # type: ignore[call-overload]
            people.contiguous(memory_format=torch.channels_last)
        ).heatmaps
    torch.testing.assert_close(plain, last, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("stride", [1, 2])
def test_cell_i_of_a_convolution_is_centered_on_pixel_stride_times_i(stride: int) -> None:
    layer = ConvNorm(1, 1, stride=stride).eval()
    with torch.no_grad():
        torch.nn.init.ones_(layer.get_parameter("0.weight"))
        image = torch.zeros(1, 1, 12, 16)
        image[0, 0, 6, 10] = 1.0
        out = layer(image)[0, 0]
    # The pixel affects the cells whose center is at most one pixel away.
    affected = {tuple(cell) for cell in out.nonzero().tolist()}
    assert affected == {
        (row, column)
        for row in range(12 // stride)
        for column in range(16 // stride)
        if abs(stride * row - 6) <= 1 and abs(stride * column - 10) <= 1
    }


def test_folded_convolution_pads_as_tensorflow() -> None:
    """On even sides: cell i of stride 2 covers pixels 2 i to 2 i + 2, the last one beyond."""
    layer = ConvNorm(1, 1, stride=2, folded=True)
    with torch.no_grad():
        layer.get_parameter("0.weight").fill_(1.0)
        layer.get_parameter("0.bias").fill_(0.5)
        rows = torch.arange(1.0, 5.0).view(1, 1, 4, 1) / 10  # 0.1 .. 0.4, one column and padding
        out = layer(rows.expand(1, 1, 4, 2))
    expected = [2 * (0.1 + 0.2 + 0.3) + 0.5, 2 * (0.3 + 0.4) + 0.5]
    assert out.flatten().tolist() == pytest.approx(expected)
    assert [name for name, _ in layer.named_parameters()] == ["0.weight", "0.bias"]


def test_separable_convolution_keeps_the_grid() -> None:
    layer = SeparableConv(2, 3).eval()
    assert layer(torch.zeros(1, 2, 7, 9)).shape == (1, 3, 7, 9)


def test_head_depends_on_the_pixels_around_its_own() -> None:
    """To within a cell, since upsampling shifts by parts of one."""
    model, height, width = network(joints=1), 128, 96
    people = crops(1, height, width).requires_grad_()
    torch.nn.init.ones_(model.final_layer.weight)
    for row, column in ((8, 6), (16, 12), (24, 18)):
        heatmap = model(people).heatmaps[0, 0, row, column]
        (gradient,) = torch.autograd.grad(heatmap, people)
        weight = gradient.abs().sum((0, 1))
        y = (weight.sum(1) * torch.arange(height)).sum() / weight.sum()
        x = (weight.sum(0) * torch.arange(width)).sum() / weight.sum()
        assert abs(float(y) - 4 * row) < 8 and abs(float(x) - 4 * column) < 8


def test_teacher_is_larger_than_tiny() -> None:
    def count(size: str) -> int:
        return sum(parameter.numel() for parameter in network(size).parameters())

    assert count("teacher") > count("tiny")


@pytest.mark.parametrize(
    ("size", "budget"), [("small", 300_000), ("medium", 1_000_000), ("large", 2_300_000)]
)
@pytest.mark.parametrize("joints", [14, 17])
def test_students_have_the_parameters_of_their_budgets(
    size: str, budget: int, joints: int
) -> None:
    model = network(size, joints)
    number = sum(parameter.numel() for parameter in model.parameters())
    assert number == pytest.approx(budget, rel=0.1)
    with torch.no_grad():
        output = model(crops(1, 256, 192))
    assert output.heatmaps.shape == (1, joints, 64, 48)
    assert [tuple(maps.shape[2:]) for maps in output.pyramid] == [(16, 12), (32, 24), (64, 48)]
