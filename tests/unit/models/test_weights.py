"""Files of weights: wrapped or not they load completely, or are refused with a clear message."""

from __future__ import annotations

import functools
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models.build import build_codec, build_model
from models.skeleton import COCO, CROWDPOSE, Skeleton
from models.weights import load_weights, read_weights

Changes = dict[str, Tensor | None]
SUFFIXES = [".safetensors", ".pth", ".pt"]


def tiny(skeleton: Skeleton, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return build_model("mobile_net", "tiny", skeleton)


@functools.cache
def weights_of(skeleton: Skeleton) -> dict[str, Tensor]:
    """Return a tiny network's weights from seed 5, shared by tests that only read them."""
    return dict(tiny(skeleton, seed=5).state_dict())


def saved(path: Path, skeleton: Skeleton, changes: Changes | None = None) -> Path:
    """Write them to a file; ``changes`` replace or remove keys."""
    changed = {**weights_of(skeleton), **(changes or {})}
    weights = {name: value for name, value in changed.items() if value is not None}
    if path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path)
    return path


def refusal(path: Path) -> str:
    """Return the message that refuses this file, after which the network must be unchanged."""
    model = tiny(COCO, seed=6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=path.name) as error:
        load_weights(model, path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return str(error.value)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_loaded_weights_equal_the_files(suffix: str, tmp_path: Path) -> None:
    path = saved(tmp_path / f"weights{suffix}", COCO)
    model = tiny(COCO, seed=6)
    assert load_weights(model, path) == []
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights_of(COCO)[name]), name


WRAPPED: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "state_dict": lambda weights: {"epoch": 210, "model": "pose_net", "state_dict": weights},
    "model": lambda weights: {"model": weights, "optimizer": {"state": {}}},
    "parallel": lambda weights: {f"module.{name}": value for name, value in weights.items()},
    "both": lambda weights: {"state_dict": WRAPPED["parallel"](weights)},
    "uncounted": lambda weights: {
        name: value for name, value in weights.items() if "num_batches_tracked" not in name
    },
}


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("wrapping", sorted(WRAPPED))
def test_training_checkpoints_load_their_weights(
    wrapping: str, is_zip: bool, tmp_path: Path
) -> None:
    content = WRAPPED[wrapping](weights_of(COCO))
    path = tmp_path / "checkpoint.pth"
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    model = tiny(COCO, seed=6)
    assert load_weights(model, path) == []
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights_of(COCO)[name]), name


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_other_joint_count_leaves_only_the_head_random(suffix: str, tmp_path: Path) -> None:
    path = saved(tmp_path / f"weights{suffix}", COCO)
    model = tiny(CROWDPOSE, seed=6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    left = load_weights(model, path)
    assert sorted(left) == ["final_layer.bias", "final_layer.weight"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, (before if name in left else weights_of(COCO))[name]), name


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"stem.0.weight": None}, "stem.0.weight: not in the file"),
        (
            {"stem.0.weight": torch.zeros(1)},
            "stem.0.weight: (1,) in the file, (16, 3, 3, 3) in the model",
        ),
        ({"backbone.weight": torch.zeros(1)}, "backbone.weight: not in the model"),
        ({"final_layer.weight": None}, "final_layer.weight: not in the file"),
        (
            {"final_layer.weight": torch.zeros(17, 9, 1, 1)},
            "final_layer.weight: (17, 9, 1, 1) in the file, (17, 32, 1, 1) in the model",
        ),
    ],
)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_mismatched_weights_are_refused_by_name_and_none_is_loaded(
    suffix: str, changes: Changes, expected: str, tmp_path: Path
) -> None:
    message = refusal(saved(tmp_path / f"weights{suffix}", COCO, changes))
    assert f"1 differ, the first are [{expected}]; change the model's name and size" in message


def test_another_width_is_refused_with_the_first_keys_only(tmp_path: Path) -> None:
    with torch.device("meta"):
        other = build_model("hrnet", "w32", COCO).state_dict()
        model = build_model("hrnet", "w18", COCO)
    path = tmp_path / "w32.pth"
    torch.save({name: torch.zeros(()).expand(value.shape) for name, value in other.items()}, path)
    with pytest.raises(ValueError, match=r"w32\.pth must hold this model's weights") as error:
        load_weights(model, path)
    message = str(error.value)
    assert (
        "the first are [transition1.0.0.weight: (32, 256, 3, 3) in the file, "
        "(18, 256, 3, 3) in the model, transition1.0.1.weight: (32,)" in message
    )
    assert "; change the model's name and size, or the file" in message
    assert len(message) < 600


def test_another_network_is_refused_with_keys_of_each_kind(tmp_path: Path) -> None:
    path = tmp_path / "resnet.pth"
    with torch.device("meta"):
        other = build_model("simple_baseline", "r18", COCO).state_dict()
    torch.save({name: torch.zeros(()).expand(value.shape) for name, value in other.items()}, path)
    message = refusal(path)
    assert "stem.0.weight: not in the file" in message
    assert "conv1.weight: not in the model" in message
    assert "final_layer.weight: (17, 256, 1, 1) in the file" in message
    assert len(message) < 900


@pytest.mark.parametrize("content", [None, b"", b"no weights at all", b"PK\x05\x06" + bytes(18)])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".txt"])
def test_file_without_weights_is_refused_by_name(
    suffix: str, content: bytes | None, tmp_path: Path
) -> None:
    path = tmp_path / f"weights{suffix}"
    if content is not None:
        path.write_bytes(content)
    message = refusal(path)
    assert "must be a" in message and "safetensors" in message
    assert "weights_only" not in message  # torch's advice would run the file's code


class Burglar:
    """Creates a folder when unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("is_zip", [True, False])
def test_pickled_code_is_named_and_not_run(is_zip: bool, tmp_path: Path) -> None:
    path, broken_in = tmp_path / "weights.pth", tmp_path / "broken_in"
    content = {**weights_of(COCO), "burglar": Burglar(broken_in)}
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    message = refusal(path)
    assert "got pickled code (posix.mkdir), which is not run" in message
    assert "torch.save(state_dict, ...)" in message
    path.write_bytes(pickle.dumps(Burglar(broken_in)))
    assert "must" in refusal(path)
    assert not broken_in.exists()


def test_pickled_network_or_numpy_number_is_named(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(nn.Linear(1, 1), path)
    assert "pickled code (torch.nn.modules.linear.Linear)" in refusal(path)
    torch.save({"state_dict": weights_of(COCO), "perf": np.float64(0.7)}, path)
    assert "pickled code (numpy" in refusal(path)


@pytest.mark.parametrize(
    ("content", "held"),
    [
        ([torch.zeros(1)], "got a list;"),
        ({}, "got a dict;"),
        ({"epoch": 3, "best": 0.7}, "got a dict of epoch, best;"),
        ({"state_dict": {"epoch": 3}}, "got a dict of epoch;"),
    ],
)
def test_message_names_the_content_of_another_file(
    content: Any, held: str, tmp_path: Path
) -> None:
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"must hold tensors by name, .* under state_dict or mod"):
        read_weights(path)
    assert held in refusal(path)


@pytest.mark.parametrize("own_size", [(96, 64), (64, 64)])
@pytest.mark.parametrize("loaded_has_bins", [True, False])
def test_simcc_head_is_loaded_if_it_matches_and_random_if_not(
    own_size: tuple[int, int], loaded_has_bins: bool, tmp_path: Path
) -> None:
    codec = build_codec("simcc", (96, 64), 2.0) if loaded_has_bins else None
    torch.manual_seed(5)
    source = build_model("mobile_net", "tiny", COCO, codec)
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    torch.manual_seed(6)
    model = build_model("mobile_net", "tiny", COCO, build_codec("simcc", own_size, 2.0))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dropped = load_weights(model, tmp_path / "weights.safetensors")
    layers = ("joints", "x", "y") if not loaded_has_bins else ("x", "y")
    expected = [f"simcc_head.{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    if loaded_has_bins:  # a crop of another size has another number of cells, and of bins below
        expected = (
            [] if own_size == (96, 64) else [n for n in expected if n != "simcc_head.x.bias"]
        )
    assert sorted(dropped) == sorted(expected)
    loaded = source.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, (before if name in dropped else loaded)[name]), name


def test_network_without_bins_ignores_the_files_simcc_head(tmp_path: Path) -> None:
    source = build_model("mobile_net", "tiny", COCO, build_codec("simcc", (96, 64), 2.0))
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    model = build_model("mobile_net", "tiny", COCO)
    assert load_weights(model, tmp_path / "weights.safetensors") == []
    assert torch.equal(model.state_dict()["stem.0.weight"], source.state_dict()["stem.0.weight"])
