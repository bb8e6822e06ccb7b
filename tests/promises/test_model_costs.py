"""The costs that tests/benchmarks/models.py counts, and the folded networks that it times."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from models.build import build_model
from models.igp_gcn import SemGraphConv
from models.skeleton import COCO, Skeleton

FILE = Path(__file__).resolve().parents[1] / "benchmarks" / "models.py"


@pytest.fixture
def costs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark as a module."""
    spec = importlib.util.spec_from_file_location("model_costs", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", [*sys.path, str(FILE.parent)])
    monkeypatch.setitem(sys.modules, "model_costs", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "size", "official"),
    [
        ("simple_baseline", "r50", "pose_resnet50_256x192"),
        ("hrnet", "w32", "pose_hrnet_w32_256x192"),
    ],
)
def test_costs_are_those_of_the_official_networks(
    name: str, size: str, official: str, costs: ModuleType, shared: Path
) -> None:
    file = shared / "reference" / "checkpoint" / "key_manifests.json"
    manifest = json.loads(file.read_text())[official]
    found = costs.network_costs(lambda: build_model(name, size, COCO))
    assert found == (manifest["n_parameters"], manifest["conv_macs"])


def test_graph_convolution_costs_its_products(costs: ModuleType, five: Skeleton) -> None:
    """By hand: two matrices over channels per joint, and one product over joints."""
    layer, people = SemGraphConv(6, 8, five.adjacency()), 3
    products = 2 * 5 * 6 * 8 + 5 * 5 * 8
    assert costs.multiply_adds(lambda: layer(torch.zeros(people, 5, 6))) == people * products


@pytest.mark.parametrize(("name", "size"), [("simple_baseline", "r18"), ("mobile_net", "tiny")])
def test_folded_networks_have_equal_outputs(name: str, size: str, costs: ModuleType) -> None:
    torch.manual_seed(0)
    network = build_model(name, size, COCO).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.8, 1.2)
            nn.init.uniform_(module.running_mean, -0.1, 0.1)  # type: ignore[arg-type]
    crops = torch.randn(1, 3, 64, 32)
    with torch.inference_mode():
        before = network(crops).heatmaps
    costs.fold_batch_norms(network)
    with torch.inference_mode():
        after = network(crops).heatmaps
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    torch.testing.assert_close(after, before, atol=1e-5 * float(before.abs().max()), rtol=1e-4)
