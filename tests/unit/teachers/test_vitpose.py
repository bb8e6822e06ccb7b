"""ViTPose as a teacher predicts what the library's model does, in the crop's frame."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.codecs.gaussian import Udp
from models.pose_features import IMAGENET
from models.skeleton import COCO
from study.cache.prepare import PreparedData, prepare_data
from study.cache.teacher_store import open_teacher_store
from study.config.compose import with_values
from study.config.derived import resolve
from study.config.schema import StudyConfig
from study.errors import InputError
from study.storage.paths import TARGETS
from study.teachers.adapters import TeacherSpec, check_teacher, open_teacher
from study.teachers.identity import teacher_folder, training_folder
from study.teachers.make import make_teacher
from study.teachers.vitpose import VitPose
from study.training.losses import joint_relation
from study.trial import teacher_spec
from study.workers import Workers

ROOT = Path(__file__).resolve().parents[3]
SIZE = (96, 64)
CPU = torch.device("cpu")
pytestmark = pytest.mark.slow  # the library alone takes seconds to load


def spec_of(config: StudyConfig) -> TeacherSpec:
    return teacher_spec(config, resolve(config))


def check(config: StudyConfig) -> None:
    check_teacher(config.teacher, resolve(config))


@pytest.fixture(scope="module", params=["simple", "classic", "experts"])
def saved(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Any]:
    """A small random ViTPose as its library saves it, and the model itself."""
    transformers = pytest.importorskip("transformers")
    backbone = transformers.VitPoseBackboneConfig(
        image_size=list(SIZE),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        out_indices=[2],
        num_experts=2 if request.param == "experts" else 1,
        part_features=4,
    )
    settings = transformers.VitPoseConfig(
        backbone_config=backbone,
        num_labels=17,
        initializer_range=0.2,
        use_simple_decoder=request.param != "classic",
    )
    torch.manual_seed(0)
    model = transformers.VitPoseForPoseEstimation(settings).eval()
    folder = tmp_path_factory.mktemp(request.param)
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        model.save_pretrained(folder)
    return folder, model


@pytest.fixture
def config(saved: tuple[Path, Any], mini_config: StudyConfig) -> StudyConfig:
    return with_values(
        mini_config,
        {
            "teacher.name": "vitpose",
            "teacher.init": str(saved[0]),
            "teacher.epochs": 0,
            "teacher.input_size": list(SIZE),
            "teacher.sigma": 2.0,
        },
    )


@pytest.fixture
def crops() -> Tensor:
    return 255 * torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def no_gradient() -> Iterator[None]:
    with torch.no_grad():
        yield


def library_heatmaps(model: Any, crops: Tensor, **more: Any) -> Tensor:
    """Return heatmaps of the library's model, called as in its own examples."""
    if model.config.backbone_config.num_experts > 1:
        more["dataset_index"] = torch.zeros(len(crops), dtype=torch.long)
    heatmaps = model(pixel_values=IMAGENET.normalize(crops), **more).heatmaps
    assert isinstance(heatmaps, Tensor)
    return heatmaps


def assert_equal_maps(found: Tensor, expected: Tensor) -> None:
    """Check that maps are equal up to rounding, which another memory format changes."""
    torch.testing.assert_close(found, expected, atol=5e-6 * float(expected.abs().max()), rtol=0)


def test_heatmaps_are_those_of_the_model_called_directly(
    saved: tuple[Path, Any], crops: Tensor
) -> None:
    network = VitPose(saved[0], COCO, SIZE).eval()
    heatmaps = network.predict(crops).heatmaps
    assert heatmaps.shape == (2, 17, 24, 16) and heatmaps.std() > 1e-3
    assert_equal_maps(heatmaps, library_heatmaps(saved[1], crops))


def test_flip_swaps_the_joints_that_the_library_swaps(
    saved: tuple[Path, Any], crops: Tensor
) -> None:
    network = VitPose(saved[0], COCO, SIZE).eval()
    mirrored = network.predict(crops.flip(-1)).heatmaps
    back = mirrored[:, list(COCO.flip_order)].flip(-1)
    theirs = library_heatmaps(saved[1], crops.flip(-1), flip_pairs=torch.tensor(COCO.flip_pairs))
    assert_equal_maps(back, theirs)


def test_modes_are_the_peaks_of_the_maps_in_crop_pixels(
    saved: tuple[Path, Any], config: StudyConfig, crops: Tensor
) -> None:
    targets = open_teacher(spec_of(config), CPU).predict_targets(crops)
    maps = library_heatmaps(saved[1], crops)
    expected, heights = Udp(SIZE, (24, 16), 2.0).decode(maps)
    found = targets.modes_crop[:, :, 0]
    has_peak = heights > 0
    assert has_peak.any()
    torch.testing.assert_close(found[..., :2][has_peak], expected[has_peak], atol=0.02, rtol=0)
    cells = maps.flatten(2).argmax(-1)[has_peak]
    # from the first cell on the first pixel to the last cell on the last pixel
    pixels = torch.stack([cells % 16 * 63 / 15, cells // 16 * 95 / 23], dim=-1)
    assert (found[..., :2][has_peak] - pixels).abs().max() < 2 * 64 / 15


def test_relations_are_computed_from_the_features_of_the_last_layer(
    saved: tuple[Path, Any], config: StudyConfig, crops: Tensor
) -> None:
    targets = open_teacher(spec_of(config), CPU).predict_targets(crops)
    out = VitPose(saved[0], COCO, SIZE).eval().predict(crops)
    (features,) = out.pyramid
    assert features.shape[-2:] == (24, 16)
    again = saved[1].head.conv(features)
    assert_equal_maps(again, out.heatmaps)
    assert targets.relation is not None
    torch.testing.assert_close(targets.relation, joint_relation(out.heatmaps, features))


def test_another_number_of_joints_or_another_size_is_refused(config: StudyConfig) -> None:
    with pytest.raises(InputError, match=r"must have 14 joints \(crowdpose\), got .* 17"):
        check(with_values(config, {"teacher.skeleton": "crowdpose"}))
    with pytest.raises(InputError, match=r"takes crops of \[96, 64\].*input_size=\[96,64\]"):
        check(with_values(config, {"teacher.input_size": None}))


def test_missing_weights_are_refused(
    saved: tuple[Path, Any], config: StudyConfig, tmp_path: Path
) -> None:
    weights = load_file(saved[0] / "model.safetensors")
    weights.pop("head.conv.bias")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((saved[0] / "config.json").read_bytes())
    with pytest.raises(InputError, match=r"all weights .*'head\.conv\.bias'"):
        open_teacher(spec_of(with_values(config, {"teacher.init": str(tmp_path)})), CPU)


def test_all_people_have_targets_with_and_without_training(
    config: StudyConfig, workers: Workers
) -> None:
    for epochs in (0, 1):
        changed = with_values(config, {"teacher.epochs": epochs})
        data: PreparedData = prepare_data(
            changed.data, resolve(changed), lambda name: lambda done, total: None, print
        )
        with torch.enable_grad():
            make_teacher(
                spec_of(changed),
                changed.student,
                data,
                workers,
                lambda row: False,
            )
        folder = teacher_folder(spec_of(changed), data)
        rows = json.loads((folder / "teacher.json").read_text())["rows"]
        targets = open_teacher_store(folder / TARGETS)
        assert [row["epoch"] for row in rows] == [epochs] and "val_ap" in rows[0]
        assert len(targets) == data.num_people[0] and targets.known.all()
        assert targets.relation is not None
        training = training_folder(spec_of(changed), data)
        assert (training / "epochs").exists() == bool(epochs)  # given weights are not copied


def test_no_image_library_is_loaded() -> None:
    script = (
        "import sys\nfrom study.teachers.vitpose import _library\n"
        "_library().VitPoseForPoseEstimation\n"
        "print(*{name.split('.')[0] for name in sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "transformers" in done.stdout.split()
    assert set(done.stdout.split()) & {"torchvision", "timm"} == set()
    assert done.stderr == ""


def test_other_weights_in_the_folder_make_another_teacher(
    saved: tuple[Path, Any], config: StudyConfig, mini_data: PreparedData, tmp_path: Path
) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((saved[0] / name).read_bytes())
    moved = with_values(config, {"teacher.init": str(tmp_path)})
    assert teacher_folder(spec_of(moved), mini_data) == teacher_folder(spec_of(config), mini_data)
    weights = load_file(tmp_path / "model.safetensors")
    weights["head.conv.bias"] = weights["head.conv.bias"] + 1
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert teacher_folder(spec_of(moved), mini_data) != teacher_folder(spec_of(config), mini_data)
