"""HRNet and SimpleBaseline are the official networks: keys, shapes, cost, outputs, file format."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.build import build_model
from models.pose_features import PoseNetwork
from models.skeleton import COCO
from models.weights import load_weights

NETWORKS = {
    "pose_hrnet_w32_256x192": ("hrnet", "w32"),
    "pose_hrnet_w48_256x192": ("hrnet", "w48"),
    "pose_hrnet_w48_384x288": ("hrnet", "w48"),
    "pose_resnet50_256x192": ("simple_baseline", "r50"),
    "pose_resnet101_256x192": ("simple_baseline", "r101"),
    "pose_resnet152_256x192": ("simple_baseline", "r152"),
}


@pytest.fixture(scope="module")
def manifests(shared: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        (shared / "reference" / "checkpoint" / "key_manifests.json").read_text()
    )
    assert set(found) == set(NETWORKS)
    return found


def shapes_alone(name: str) -> PoseNetwork:
    """Build the network on the meta device, without memory for its weights."""
    with torch.device("meta"):
        return build_model(*NETWORKS[name], COCO)


@functools.cache
def shared_shapes(name: str) -> PoseNetwork:
    """Build the same once, for tests that don't change it."""
    return shapes_alone(name)


def fill(network: nn.Module, gamma: tuple[float, float]) -> None:
    """Fill in the reference's weights, seeded by each key's place in the sorted list of keys."""
    for place, (key, value) in enumerate(sorted(network.state_dict().items())):
        rng, shape = np.random.RandomState(place), tuple(value.shape)
        if key.endswith("num_batches_tracked"):
            drawn = np.zeros(shape)
        elif key.endswith("running_var"):
            drawn = rng.uniform(0.5, 1.5, shape)
        elif key.endswith("weight") and len(shape) == 1:
            drawn = rng.uniform(*gamma, shape)
        elif key.endswith("weight"):
            drawn = rng.uniform(-1, 1, shape) * np.sqrt(3 / np.prod(shape[1:]))
        else:
            drawn = rng.uniform(-0.1, 0.1, shape)
        value.copy_(torch.from_numpy(np.asarray(drawn)))


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_keys_and_shapes_equal_the_official_ones_in_order(
    name: str, manifests: dict[str, Any]
) -> None:
    model, manifest = shared_shapes(name), manifests[name]
    found = [
        [key, list(value.shape), str(value.dtype).removeprefix("torch.")]
        for key, value in model.state_dict().items()
    ]
    assert found == manifest["keys"]
    assert sum(value.numel() for value in model.parameters()) == manifest["n_parameters"]


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_multiply_adds_equal_the_official_ones(name: str, manifests: dict[str, Any]) -> None:
    model, manifest = shared_shapes(name).eval(), manifests[name]
    counts = []

    def count(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        cells = inputs[0] if isinstance(layer, nn.ConvTranspose2d) else output
        counts.append(layer.get_parameter("weight").numel() * cells[0, 0].numel())

    hooks = [
        layer.register_forward_hook(count)
        for layer in model.modules()
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)
    ]
    heatmaps = model(torch.zeros(1, 3, *manifest["input_hw"], device="meta")).heatmaps
    for hook in hooks:
        hook.remove()
    assert list(heatmaps.shape) == manifest["output_shape"]
    assert sum(counts) == manifest["conv_macs"]


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("pose_hrnet_w32_256x192", 1e-4),
        ("pose_resnet50_256x192", 1e-4),
        pytest.param("pose_hrnet_w48_256x192", 1e-4, marks=pytest.mark.slow),
        pytest.param("pose_resnet101_256x192", 1e-4, marks=pytest.mark.slow),
        pytest.param("pose_resnet152_256x192", 1e-3, marks=pytest.mark.slow),
    ],
)
def test_outputs_with_fixed_weights_equal_the_official_ones(
    name: str, tolerance: float, manifests: dict[str, Any], shared: Path
) -> None:
    model = shapes_alone(name).to_empty(device="cpu").eval()
    fill(model, manifests[name]["gamma_range"])
    crops = np.random.RandomState(7).uniform(-1, 1, (1, 3, 256, 192)).astype(np.float32)
    with torch.inference_mode():
        heatmaps = model(torch.from_numpy(crops)).heatmaps
    expected = np.load(shared / "reference" / "checkpoint" / f"output_{name}.npz")["output"]
    np.testing.assert_allclose(heatmaps.numpy(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["pose_hrnet_w32_256x192", "pose_resnet50_256x192"])
def test_file_with_the_official_keys_loads_completely(
    name: str, manifests: dict[str, Any], tmp_path: Path
) -> None:
    weights = {
        f"module.{key}": torch.full((), 3, dtype=getattr(torch, dtype)).expand(shape)
        for key, shape, dtype in manifests[name]["keys"]
    }
    path = tmp_path / "model_best.pth"
    torch.save(weights, path, _use_new_zipfile_serialization=False)  # the format of 2019
    model = shapes_alone(name).to_empty(device="cpu")
    assert load_weights(model, path) == []
    assert all((value == 3).all() for value in model.state_dict().values())
