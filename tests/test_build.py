"""From names to models and codecs, and from files to weights that fit or are refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from models.build import MODELS, build_codec, build_model, load_weights
from models.candidates import ROUNDS, LimbMessages
from models.codec import CODECS
from models.mobile_net import SIZES
from models.pose_features import IMAGENET
from models.skeleton import COCO, CROWDPOSE, Skeleton
from study.config import InputError, StudyConfig, value_at, with_values
from study.training import build_network, build_refiner


def saved(path: Path, skeleton: Skeleton, changes: dict[str, Tensor | None] | None = None) -> Path:
    """A file of a tiny network's weights, seed 5; ``changes`` replace keys or remove them."""
    torch.manual_seed(5)
    weights = build_model("mobile_net", "tiny", skeleton).state_dict()
    for name, value in (changes or {}).items():
        if value is None:
            del weights[name]
        else:
            weights[name] = value
    save_file(weights, path)
    return path


def test_every_name_and_size_builds_with_a_heatmap_a_joint(five: Skeleton) -> None:
    for name in MODELS:
        for size in SIZES:
            model = build_model(name, size, five).eval()
            with torch.no_grad():
                assert model(torch.zeros(1, 3, 32, 64)).heatmaps.shape == (1, 5, 8, 16)


@pytest.mark.parametrize("name", sorted(CODECS))
def test_a_codecs_heatmaps_are_a_quarter_of_the_input(name: str) -> None:
    codec = build_codec(name, (96, 64), sigma=1.5)
    assert isinstance(codec, CODECS[name])
    assert (codec.input_size, codec.heatmap_size, codec.sigma) == ((96, 64), (24, 16), 1.5)


def test_normalised_crops_have_imagenets_mean_at_0() -> None:
    mean = torch.tensor([123.675, 116.28, 103.53]).view(1, 3, 1, 1)
    assert not IMAGENET.normalise(mean.expand(2, 3, 4, 5)).any()
    one = IMAGENET.normalise(torch.full((1, 3, 1, 1), 255.0)).flatten()
    expected = [(255 - 123.675) / 58.395, (255 - 116.28) / 57.12, (255 - 103.53) / 57.375]
    assert one.tolist() == pytest.approx(expected)


def test_loaded_weights_are_the_files(tmp_path: Path) -> None:
    path = saved(tmp_path / "weights.safetensors", COCO)
    torch.manual_seed(5)
    expected = build_model("mobile_net", "tiny", COCO).state_dict()
    torch.manual_seed(6)
    model = build_model("mobile_net", "tiny", COCO)
    assert load_weights(model, path) == []
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_another_joint_count_leaves_the_head_alone_at_random_and_says_so(tmp_path: Path) -> None:
    path = saved(tmp_path / "weights.safetensors", COCO)
    torch.manual_seed(6)
    model = build_model("mobile_net", "tiny", CROWDPOSE)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dropped = load_weights(model, path)
    assert sorted(dropped) == ["final_layer.bias", "final_layer.weight"]
    torch.manual_seed(5)
    loaded = build_model("mobile_net", "tiny", COCO).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, (before if name in dropped else loaded)[name]), name


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"stem.0.weight": None}, "stem.0.weight"),
        ({"stem.0.weight": torch.zeros(1)}, "stem.0.weight"),
        ({"backbone.weight": torch.zeros(1)}, "backbone.weight"),
        ({"final_layer.weight": None}, "final_layer.weight"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name_and_nothing_is_loaded(
    changes: dict[str, Tensor | None], named: str, tmp_path: Path
) -> None:
    path = saved(tmp_path / "weights.safetensors", COCO, changes)
    torch.manual_seed(6)
    model = build_model("mobile_net", "tiny", COCO)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"weights\.safetensors.*1 differ") as error:
        load_weights(model, path)
    assert named in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_head_of_another_width_is_refused(tmp_path: Path) -> None:
    changes: dict[str, Tensor | None] = {"final_layer.weight": torch.zeros(17, 9, 1, 1)}
    path = saved(tmp_path / "weights.safetensors", COCO, changes)
    with pytest.raises(ValueError, match=r"final_layer\.weight"):
        load_weights(build_model("mobile_net", "tiny", COCO), path)


def test_another_size_is_refused_with_the_first_keys_only(tmp_path: Path) -> None:
    path = saved(tmp_path / "weights.safetensors", COCO)
    with pytest.raises(ValueError, match=r"the first are \[.*\]; change the model") as error:
        load_weights(build_model("mobile_net", "teacher", COCO), path)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("content", [None, b"", b"no weights at all"])
def test_a_file_without_weights_is_refused_by_name(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"weights\.safetensors must be a safetensors file"):
        load_weights(build_model("mobile_net", "tiny", COCO), path)


def test_a_network_from_weights_tells_what_is_trained(
    mini_config: StudyConfig, tmp_path: Path
) -> None:
    path = saved(tmp_path / "weights.safetensors", CROWDPOSE)
    model = dataclasses.replace(mini_config.student, init=str(path))
    network, trained = build_network(model, mini_config, seed=0)
    names = {name for name, _ in network.named_parameters()}
    assert names - trained == {"final_layer.weight", "final_layer.bias"} and trained < names
    network, trained = build_network(mini_config.student, mini_config, seed=0)
    assert trained == frozenset()


def test_a_seed_decides_the_random_weights(mini_config: StudyConfig) -> None:
    first, second, other = (
        build_network(mini_config.student, mini_config, seed)[0].state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not torch.equal(first["stem.0.weight"], other["stem.0.weight"])


def test_weights_that_do_not_fit_are_the_users_to_mend(
    mini_config: StudyConfig, tmp_path: Path
) -> None:
    config = with_values(mini_config, {"student.init": str(tmp_path / "nowhere.safetensors")})
    with pytest.raises(InputError, match=r"nowhere\.safetensors"):
        build_network(config.student, config, seed=0)


@pytest.mark.parametrize(
    ("path", "value", "found"),
    [
        ("levels", 2, lambda refiner: len(refiner.levels)),
        ("depth", 5, lambda refiner: len(refiner.levels[0].blocks)),
        ("width", 24, lambda refiner: refiner.levels[0].head.in_features),
        ("dropout", 0.3, lambda refiner: refiner.levels[0].enter.dropout.p),
        ("gate", False, lambda refiner: refiner.levels[0].gate is not None),
        ("candidates", 3, lambda refiner: refiner.num_candidates),
    ],
)
def test_each_setting_reaches_the_refiner(
    path: str, value: object, found: Callable[[Any], object], mini_config: StudyConfig
) -> None:
    assert value_at(mini_config, f"refine.{path}") != value
    config = with_values(mini_config, {f"refine.{path}": value})
    assert found(build_refiner(config, (7, 6, 5))) == value


@pytest.mark.parametrize("candidates", [2, 3])
@pytest.mark.parametrize("levels", [1, 3])
def test_settings_reach_the_chooser(
    candidates: int, levels: int, mini_config: StudyConfig
) -> None:
    values = {"refine.candidates": candidates, "refine.levels": levels, "refine.dropout": 0.3}
    refiner = build_refiner(with_values(mini_config, values), (7, 6, 5))
    assert refiner.chooser is not None
    assert refiner.chooser.project.in_features == 5
    assert refiner.chooser.head.in_features == mini_config.refine.width
    rounds = [part for part in refiner.chooser.modules() if isinstance(part, LimbMessages)]
    assert [part.dropout.p for part in rounds] == [0.3] * ROUNDS
