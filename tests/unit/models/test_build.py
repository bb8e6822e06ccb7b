"""Models and codecs by name, and networks with weights from the files in the settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from models.build import MODELS, build_codec, build_model, exported_skeleton, load_export
from models.codecs.codec import CODECS
from models.igp_gcn import IgpGcn
from models.pose_features import IMAGENET, PoseNetwork
from models.refined_pose import RefinedPose
from models.skeleton import COCO, CROWDPOSE, SKELETONS, Skeleton
from study.config.compose import with_values
from study.config.derived import resolve
from study.config.schema import StudyConfig
from study.errors import InputError
from study.teachers.adapters import check_weights
from study.training.networks import build_network
from study.trial import teacher_spec


def saved(path: Path, skeleton: Skeleton) -> Path:
    """Write a tiny network's weights."""
    save_file(build_model("mobile_net", "tiny", skeleton).state_dict(), path)
    return path


NETWORKS = [(name, size) for name, (_, sizes) in MODELS.items() for size in sizes]


@pytest.mark.parametrize(("name", "size"), NETWORKS)
def test_every_model_has_one_heatmap_per_joint_and_a_pyramid_at_strides_16_8_4(
    name: str, size: str
) -> None:
    with torch.device("meta"):  # shapes only
        model = build_model(name, size, CROWDPOSE).eval()
    for height, width in ((256, 192), (384, 288)):
        heatmaps, pyramid, *_ = model(torch.zeros(2, 3, height, width, device="meta"))
        assert heatmaps.shape == (2, CROWDPOSE.num_joints, height // 4, width // 4)
        assert [tuple(features.shape) for features in pyramid] == [
            (2, channels, height // stride, width // stride)
            for channels, stride in zip(model.pyramid_channels, (16, 8, 4), strict=True)
        ]


@pytest.mark.parametrize(("name", "size"), [("hrnet", "w18"), ("simple_baseline", "r18")])
def test_export_of_an_official_network_has_equal_outputs(
    name: str, size: str, tmp_path: Path
) -> None:
    info = {
        "skeleton": "crowdpose",
        "input_size": [64, 64],
        "student": {"name": name, "size": size},
        "codec": {"name": "msra", "sigma": 2.0},
        "refiner": {"levels": 3, "depth": 1, "width": 8, "dropout": 0.0, "gate": True},
    }
    torch.manual_seed(1)
    student = build_model(name, size, CROWDPOSE)
    torch.nn.init.normal_(student.get_parameter("final_layer.weight"))
    refiner = IgpGcn(CROWDPOSE, student.pyramid_channels, width=8, depth=1)
    torch.nn.init.normal_(refiner.get_parameter("levels.0.head.weight"), std=0.1)
    model = RefinedPose(student, build_codec("msra", (64, 64), 2.0), refiner).eval()
    (tmp_path / "config.json").write_text(json.dumps(info))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    loaded, _ = load_export(tmp_path)
    with torch.inference_mode():
        crops = 255 * torch.rand(2, 3, 64, 64)
        (expected, scores), (found, found_scores) = model(crops), loaded(crops)
    assert torch.equal(found, expected) and torch.equal(found_scores, scores)


@pytest.mark.parametrize("name", sorted(CODECS))
def test_heatmaps_have_a_quarter_of_the_input_size(name: str) -> None:
    codec = build_codec(name, (96, 64), sigma=1.5)
    assert isinstance(codec, CODECS[name])
    assert (codec.input_size, codec.heatmap_size, codec.sigma) == ((96, 64), (24, 16), 1.5)


def test_normalization_maps_imagenets_mean_to_0() -> None:
    mean = torch.tensor([123.675, 116.28, 103.53]).view(1, 3, 1, 1)
    assert IMAGENET.normalize(mean.expand(2, 3, 4, 5)).abs().max() < 1e-6
    one = IMAGENET.normalize(torch.full((1, 3, 1, 1), 255.0)).flatten()
    expected = [(255 - 123.675) / 58.395, (255 - 116.28) / 57.12, (255 - 103.53) / 57.375]
    assert one.tolist() == pytest.approx(expected)


def test_export_without_pairs_and_sigmas_has_the_built_in_skeleton() -> None:
    assert exported_skeleton({"skeleton": "crowdpose"}) is CROWDPOSE
    info = {
        "skeleton": "horse",
        "joints": ["nose", "left_ear", "right_ear"],
        "edges": [[0, 1], [0, 2]],
        "flip_pairs": [[1, 2]],
        "oks_sigmas": [0.03, 0.04, 0.04],
    }
    assert exported_skeleton(info) == Skeleton(
        name="horse",
        joints=("nose", "left_ear", "right_ear"),
        edges=((0, 1), (0, 2)),
        flip_pairs=((1, 2),),
        oks_sigmas=(0.03, 0.04, 0.04),
        upper_body=(),
    )


def build(config: StudyConfig, seed: int = 0) -> tuple[PoseNetwork, frozenset[str]]:
    """Build the student of these settings."""
    codec = build_codec(config.student.codec, (64, 64), config.student.sigma)
    skeleton = SKELETONS[config.data.skeleton]
    return build_network(config.student, config.trial, codec, skeleton, seed)


def test_network_from_a_file_lists_its_trained_parameters(
    mini_config: StudyConfig, tmp_path: Path
) -> None:
    path = saved(tmp_path / "weights.safetensors", CROWDPOSE)
    network, trained = build(with_values(mini_config, {"student.init": str(path)}))
    names = {name for name, _ in network.named_parameters()}
    assert names - trained == {"final_layer.weight", "final_layer.bias"} and trained < names
    network, trained = build(mini_config)
    assert trained == frozenset()


def test_random_layers_next_to_trained_ones_are_reported_once(
    mini_config: StudyConfig, tmp_path: Path
) -> None:
    same = saved(tmp_path / "same.safetensors", COCO)
    other = saved(tmp_path / "other.safetensors", CROWDPOSE)
    messages: list[str] = []
    check_weights(
        teacher_spec(mini_config, resolve(mini_config)), mini_config.student, messages.append
    )
    changed = with_values(mini_config, {"teacher.init": str(same)})
    check_weights(teacher_spec(changed, resolve(changed)), changed.student, messages.append)
    assert messages == []
    values = {
        "teacher.init": str(other),
        "student.init": str(same),
        "distill.structure.kind": "none",
    }
    changed = with_values(mini_config, values)
    check_weights(teacher_spec(changed, resolve(changed)), changed.student, messages.append)
    assert messages == [
        "teacher.init has another joint count than coco (17 joints); "
        "random: final_layer.weight, final_layer.bias"
    ]


def test_untrained_teacher_must_have_all_weights(mini_config: StudyConfig, tmp_path: Path) -> None:
    other = saved(tmp_path / "other.safetensors", CROWDPOSE)
    values = {"teacher.init": str(other), "teacher.epochs": 0}
    with pytest.raises(
        InputError,
        match=r"teacher.epochs=0, and teacher.init has another joint count than coco "
        r"\(17 joints\); random: final_layer.weight, final_layer.bias; set teacher.skeleton",
    ):
        changed = with_values(mini_config, values)
        check_weights(teacher_spec(changed, resolve(changed)), changed.student, print)
    changed = with_values(mini_config, {**values, "teacher.skeleton": "crowdpose"})
    check_weights(teacher_spec(changed, resolve(changed)), changed.student, print)


def test_bins_missing_in_the_file_are_reported_as_random(
    mini_config: StudyConfig, tmp_path: Path
) -> None:
    init = str(saved(tmp_path / "same.safetensors", COCO))
    messages: list[str] = []
    values = {"student.init": init, "student.codec": "simcc", "distill.structure.kind": "none"}
    changed = with_values(mini_config, values)
    check_weights(teacher_spec(changed, resolve(changed)), changed.student, messages.append)
    layers = (
        f"simcc_head.{layer}.{kind}"
        for layer in ("joints", "x", "y")
        for kind in ("weight", "bias")
    )
    assert messages == [
        "student.init has no head for the bins of codec simcc at this crop size; "
        f"random: {', '.join(layers)}"
    ]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"distill.structure.weight": 0.1}, "distill.structure.weight=0.1 "),
        ({"distill.structure.kind": "mix"}, "distill.structure.mix.* together=0.1 "),
        ({"distill.structure.weight": 0.01}, None),
        ({"distill.structure.kind": "none"}, None),
        ({"distill.weights": "learned"}, None),
    ],
)
def test_structure_loss_that_harms_trained_students_gets_a_warning(
    values: dict[str, Any], expected: str | None, mini_config: StudyConfig, tmp_path: Path
) -> None:
    messages: list[str] = []
    changed = with_values(mini_config, values)
    check_weights(teacher_spec(changed, resolve(changed)), changed.student, messages.append)
    assert messages == []
    init = str(saved(tmp_path / "weights.safetensors", COCO))
    changed = with_values(mini_config, {**values, "student.init": init})
    check_weights(teacher_spec(changed, resolve(changed)), changed.student, messages.append)
    assert [expected in line for line in messages if expected] == [True] * (expected is not None)
    assert len(messages) == (expected is not None)


def test_seed_determines_the_random_weights(mini_config: StudyConfig) -> None:
    first, second, other = (build(mini_config, seed)[0].state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not torch.equal(first["stem.0.weight"], other["stem.0.weight"])


def test_mismatched_weights_are_an_input_error(mini_config: StudyConfig, tmp_path: Path) -> None:
    config = with_values(mini_config, {"student.init": str(tmp_path / "nowhere.safetensors")})
    with pytest.raises(InputError, match=r"nowhere\.safetensors"):
        build(config)
    with pytest.raises(InputError, match=r"nowhere\.safetensors"):
        check_weights(teacher_spec(config, resolve(config)), config.student, print)
