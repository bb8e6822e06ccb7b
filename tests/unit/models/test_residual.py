"""Residual blocks: shapes, the shortcut, and the first outputs of the last layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models.residual import BasicBlock, Block, Bottleneck, heatmap_layer, residual_blocks


@pytest.mark.parametrize(("block", "outputs"), [(BasicBlock, 8), (Bottleneck, 32)])
def test_the_first_block_of_a_row_has_the_stride_and_the_projection(
    block: Block, outputs: int
) -> None:
    blocks = residual_blocks(block, inputs=6, width=8, count=3, stride=2)
    assert blocks(torch.rand(2, 6, 16, 12)).shape == (2, outputs, 8, 6)
    shortcuts = [type(each.downsample) for each in blocks]
    assert shortcuts == [nn.Sequential, nn.Identity, nn.Identity]


@pytest.mark.parametrize(("block", "inputs"), [(BasicBlock, 8), (Bottleneck, 32)])
def test_a_block_without_residual_passes_its_input_on(block: Block, inputs: int) -> None:
    layer = block(inputs, 8).eval()
    last = layer.bn2 if isinstance(layer, BasicBlock) else layer.bn3
    nn.init.zeros_(last.weight)
    features = torch.rand(1, inputs, 4, 4)
    torch.testing.assert_close(layer(features), features)


def test_the_heatmap_layer_starts_near_zero() -> None:
    torch.manual_seed(0)
    maps = heatmap_layer(inputs=16, num_joints=5)(torch.rand(2, 16, 8, 6))
    assert maps.shape == (2, 5, 8, 6)
    assert 0 < maps.abs().max() < 0.02
