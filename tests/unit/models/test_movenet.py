"""MoveNet against the original: weights, raw heads, decoding, and head rows by joint."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models.build import build_codec, build_model
from models.codecs.crop_frame import CropFrame
from models.codecs.movenet import MoveNet
from models.mobile_net import SIZES, MobileNet
from models.movenet_weights import load_movenet, read_tensors
from models.pose_features import MOVENET, PersonMaps, PoseFeatures
from models.skeleton import COCO, CROWDPOSE, Skeleton
from models.weights import load_weights
from study.cache.prepare import PreparedData
from study.cache.teacher_store import open_teacher_store
from study.config.compose import StudyConfig, with_values
from study.config.derived import resolve
from study.data.annotations import read_table
from study.data.crops import apply_affine, image_to_crop_affine, invert_affine, read_image, warp
from study.data.people import People, build_people
from study.metrics import average_precision, to_detections
from study.storage.paths import TARGETS
from study.teachers.identity import teacher_folder
from study.teachers.make import make_teacher
from study.training.networks import build_distill_task
from study.trial import teacher_spec
from study.workers import Workers

SIDES = {"lightning": 192, "thunder": 256}
CONSTANT = "ConstantFolding/StatefulPartitionedCall/truediv_2_recip"
CELL = "StatefulPartitionedCall/Reshape_13"


@dataclasses.dataclass(frozen=True)
class Case:
    """A MoveNet with its published weights, and its output for the reference's crops."""

    size: str
    path: Path
    side: int
    reference: dict[str, np.ndarray]
    logits: Tensor
    features: PoseFeatures

    @property
    def codec(self) -> MoveNet:
        codec = build_codec("movenet", (self.side, self.side), sigma=2.0)
        assert isinstance(codec, MoveNet)
        return codec


@pytest.fixture(scope="module")
def folder(shared: Path) -> Path:
    return shared / "pretrained" / "movenet"


@pytest.fixture(scope="module", params=sorted(SIDES))
def case(request: pytest.FixtureRequest, folder: Path) -> Case:
    size, side = request.param, SIDES[request.param]
    path = folder / f"movenet-{size}.json"
    reference = dict(np.load(folder / f"reference_{size}.npz"))
    network = whole(size, path)
    logits: list[Tensor] = []
    network.final_layer.register_forward_hook(lambda module, inputs, out: logits.append(out))
    with torch.no_grad():
        features = network.predict(
            torch.from_numpy(reference["crops"]).permute(0, 3, 1, 2).float()
        )
    return Case(size, path, side, reference, logits[0], features)


def whole(size: str, path: Path) -> MobileNet:
    """Build the network with all heads, in eval mode."""
    codec = build_codec("movenet", (64, 64), sigma=2.0)
    network = build_model("mobile_net", size, COCO, codec)
    assert isinstance(network, MobileNet)
    assert load_movenet(network, path, COCO) == []
    return network.eval()


def light(skeleton: Skeleton, path: Path) -> tuple[MobileNet, list[str]]:
    """Build a lightning with only the heatmap head; return it and its random parameters."""
    torch.manual_seed(0)
    network = build_model("mobile_net", "lightning", skeleton)
    assert isinstance(network, MobileNet)
    return network.eval(), load_movenet(network, path, skeleton)


def test_raw_heads_equal_the_reference(case: Case) -> None:
    person = case.features.person
    assert person is not None
    heads = {
        "kpt_heatmap": case.logits,
        "center": person.center,
        "kpt_regress": person.regression,
        "kpt_offset": person.offsets,
    }
    for name, ours in heads.items():
        expected = torch.from_numpy(case.reference[f"head_{name}"])
        torch.testing.assert_close(ours[: len(expected)], expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(case.features.heatmaps, case.logits.sigmoid())


def test_decoding_equals_the_original_runtime(case: Case) -> None:
    places, scores = case.codec.decode_features(case.features)
    expected = torch.from_numpy(case.reference["tfjs_yxs"])
    torch.testing.assert_close(scores, expected[..., 2], atol=1e-4, rtol=0)
    expected_px = expected[..., [1, 0]] * case.side
    torch.testing.assert_close(places, expected_px, atol=0.05, rtol=0)
    # The remaining difference is the side of a cell, 1/48 or 1/64, in half precision.
    cell = float(read_tensors(case.path)[CELL].flat[0]) * case.side
    torch.testing.assert_close(places * (cell / 4), expected_px, atol=1e-3, rtol=0)


def test_stored_window_equals_the_formula_in_half_precision(case: Case) -> None:
    stored = read_tensors(case.path)[CONSTANT][..., 0].astype(np.float32)
    cells = np.arange(len(stored)) - len(stored) // 2
    formula = 1 / (np.hypot(cells[:, None], cells) + 1.8)
    np.testing.assert_allclose(stored, formula, rtol=2**-10)


def test_pixel_constants_are_those_of_the_files(case: Case) -> None:
    stored = read_tensors(case.path)
    scale = stored["StatefulPartitionedCall/truediv"].astype(np.float64).ravel()
    shift = float(stored["StatefulPartitionedCall/sub_1/y"])
    values = torch.tensor([0.0, 100.0, 255.0]).view(1, 3, 1, 1)
    expected = values.flatten().numpy() * scale - shift
    np.testing.assert_allclose(MOVENET.normalize(values).flatten(), expected, atol=1e-6)
    network = build_model("mobile_net", case.size, COCO)
    assert network.pixels == MOVENET


def test_network_to_fine_tune_has_only_the_heatmap_head(folder: Path) -> None:
    path = folder / "movenet-lightning.json"
    network, left = light(COCO, path)
    assert left == [] and network.person is None
    own, every = set(network.state_dict()), set(whole("lightning", path).state_dict())
    assert {key.split(".")[0] for key in every - own} == {"person"} and own < every
    crops = torch.rand(1, 3, 64, 96) * 255
    with torch.no_grad():
        features = network.predict(crops)
        assert torch.equal(features.heatmaps, whole("lightning", path).predict(crops).heatmaps)
    assert features.person is None
    assert [tuple(maps.shape[1:]) for maps in features.pyramid] == [
        (64, 4, 6),
        (32, 8, 12),
        (24, 16, 24),
    ]


def test_head_rows_go_to_joints_by_name_and_new_joints_start_from_neighbors(folder: Path) -> None:
    path = folder / "movenet-lightning.json"
    trained = light(COCO, path)[0].final_layer
    network, left = light(CROWDPOSE, path)
    assert left == []
    sources = {"head": "nose", "neck": "left_shoulder"}
    for row, joint in enumerate(CROWDPOSE.joints):
        source = COCO.joints.index(sources.get(joint, joint))
        for own, other in zip(network.final_layer.parameters(), trained.parameters(), strict=True):
            assert torch.equal(own[row], other[source]), joint


def test_joint_without_a_neighbor_stays_random_and_its_head_counts_as_new(folder: Path) -> None:
    path = folder / "movenet-lightning.json"
    dog = Skeleton("dog", ("nose", "tail"), ((0, 1),), (), (0.1, 0.1), (0,))
    network, left = light(dog, path)
    assert left == ["final_layer.weight", "final_layer.bias"]
    trained = light(COCO, path)[0].final_layer.weight
    torch.manual_seed(0)
    random = build_model("mobile_net", "lightning", dog)
    assert isinstance(random, MobileNet)
    assert torch.equal(network.final_layer.weight[0], trained[0])
    assert torch.equal(network.final_layer.weight[1], random.final_layer.weight[1])


def test_student_starts_entirely_from_movenet(folder: Path, mini_config: StudyConfig) -> None:
    init = str(folder / "movenet-lightning.json")
    config = with_values(mini_config, {"student.size": "lightning", "student.init": init})
    task = build_distill_task(
        config.student, config.distill, config.trial, resolve(config), seed=0
    )
    assert task.trained == {name for name, _ in task.student.named_parameters()}


def test_simcc_head_of_a_movenet_stays_random(folder: Path, mini_config: StudyConfig) -> None:
    init = str(folder / "movenet-lightning.json")
    values = {"student.size": "lightning", "student.init": init, "student.codec": "simcc"}
    changed = with_values(mini_config, values)
    task = build_distill_task(
        changed.student, changed.distill, changed.trial, resolve(changed), seed=0
    )
    new = {name for name, _ in task.student.named_parameters()} - task.trained
    assert new and all(name.startswith("simcc_head.") for name in new)
    trained = light(COCO, folder / "movenet-lightning.json")[0].stem[0].weight
    assert torch.equal(task.student.get_parameter("stem.0.weight"), trained)


def test_codec_movenet_refuses_other_joints(folder: Path) -> None:
    network = MobileNet(14, SIZES["lightning"], has_person_heads=True)
    with pytest.raises(
        ValueError, match=r"must have COCO's joints.*crowdpose.*teacher.skeleton=coco.*the codec"
    ):
        load_movenet(network, folder / "movenet-lightning.json", CROWDPOSE)


@pytest.mark.parametrize("size", ["tiny", "thunder"])
def test_another_network_is_refused(size: str, folder: Path) -> None:
    network = build_model("mobile_net", size, COCO)
    wanted = {
        "tiny": r"fits mobile_net of the sizes lightning",
        "thunder": r"tensors differ.*size",
    }
    with pytest.raises(ValueError, match=wanted[size]):
        load_movenet(network, folder / "movenet-lightning.json", COCO)


def random_features(joints: int, height: int, width: int) -> PoseFeatures:
    rng = torch.Generator().manual_seed(4)

    def maps(count: int, spread: float) -> Tensor:
        return torch.randn(2, count, height, width, generator=rng) * spread

    person = PersonMaps(maps(1, 2.0), maps(2 * joints, 4.0), maps(2 * joints, 0.3))
    return PoseFeatures(torch.sigmoid(maps(joints, 1.0)), (), person=person)


def test_decoding_equals_a_plain_loop_on_maps_that_are_not_square() -> None:
    joints, height, width = 5, 10, 7
    features = random_features(joints, height, width)
    assert features.person is not None
    places, scores = MoveNet((40, 28), (height, width)).decode_features(features)
    grid = [(row, column) for row in range(height) for column in range(width)]
    for b in range(2):
        center, regression, offsets = (maps[b].double().numpy() for maps in features.person)
        heatmaps = features.heatmaps[b].double().numpy()

        def central(cell: tuple[int, int], center: np.ndarray = center) -> float:
            away = np.hypot(cell[0] - height // 2, cell[1] - width // 2)
            return float(1 / (1 + np.exp(-center[0][cell])) / (away + 1.8))

        row, column = max(grid, key=central)
        for joint in range(joints):
            y = row + regression[2 * joint, row, column]
            x = column + regression[2 * joint + 1, row, column]
            heat = heatmaps[joint]
            best = max(grid, key=lambda c: heat[c] / (np.hypot(c[0] - y, c[1] - x) + 1.8))
            expected = [
                4 * (best[1] + offsets[2 * joint + 1][best]),
                4 * (best[0] + offsets[2 * joint][best]),
            ]
            assert places[b, joint].tolist() == pytest.approx(expected, abs=1e-4)
            assert float(scores[b, joint]) == pytest.approx(heat[best], abs=1e-6)


def two_peaks(expected: tuple[float, float]) -> PoseFeatures:
    """Build an output with peaks at (row, column) (5, 4), height 0.5, and (20, 12), height 0.8.

    The person's center is (12, 8); from there the joint is expected at ``expected``, (y, x).
    """
    rows, columns = torch.arange(24.0)[:, None], torch.arange(16.0)
    near = 0.5 * torch.exp(-((rows - 5) ** 2 + (columns - 4) ** 2) / 2)
    far = 0.8 * torch.exp(-((rows - 20) ** 2 + (columns - 12) ** 2) / 2)
    center = torch.full((1, 1, 24, 16), -5.0)
    center[0, 0, 12, 8] = 5.0
    regression = torch.tensor(expected).view(1, 2, 1, 1).expand(1, 2, 24, 16)
    offsets = torch.tensor([0.25, 0.75]).view(1, 2, 1, 1).expand(1, 2, 24, 16)
    return PoseFeatures(
        (near + far)[None, None], (), person=PersonMaps(center, regression, offsets)
    )


def test_expected_peak_is_the_first_mode_and_the_other_the_second() -> None:
    codec = MoveNet((96, 64), (24, 16), sigma=1.0)
    for expected, own, other in (
        ((-7.0, -4.0), (4.75, 5.25, 0.5), (12.5, 20.5, 0.8)),
        ((8.0, 4.0), (12.75, 20.25, 0.8), (4.5, 5.5, 0.5)),
    ):
        modes = codec.decode_feature_modes(two_peaks(expected), 3)[0, 0]
        assert torch.equal(modes[0, :2], codec.decode_features(two_peaks(expected))[0][0, 0])
        for mode, (x, y, height) in ((modes[0], own), (modes[1], other)):
            assert mode.tolist() == pytest.approx([4 * x, 4 * y, height, 1.0], abs=0.05)
        assert modes[2].tolist() == [0, 0, 0, 1]


def test_codec_movenet_refuses_heatmaps_without_person_heads() -> None:
    features = PoseFeatures(torch.rand(1, 5, 24, 16), ())
    with pytest.raises(ValueError, match=r"codec movenet must have a MoveNet with all its heads"):
        MoveNet((96, 64), (24, 16)).decode_features(features)


def test_safetensors_of_a_fine_tuned_movenet_load(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    network = light(COCO, folder / "movenet-lightning.json")[0]
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    again = build_model("mobile_net", "lightning", COCO)
    assert load_weights(again, tmp_path / "weights.safetensors") == []


@dataclasses.dataclass(frozen=True)
class CocoTiny:
    """coco_tiny's val, as this project reads it, crops it and evaluates on it."""

    truth: Path
    people: People
    images: list[np.ndarray]
    boxes: np.ndarray
    """xywh, unchanged from the file, since the reference's boxes are not clipped to the image."""

    def crops(self, side: int) -> tuple[np.ndarray, np.ndarray]:
        """Return all square crops, (N, S, S, 3), and the images' affines to them, (N, 2, 3)."""
        affines = image_to_crop_affine(self.boxes, CropFrame((side, side)))
        crops = [
            warp(image, affine, (side, side))
            for image, affine in zip(self.images, affines, strict=True)
        ]
        return np.stack(crops), affines


@pytest.fixture(scope="module")
def coco_tiny(shared: Path) -> CocoTiny:
    root = shared / "data" / "coco_tiny"
    truth = root / "annotations" / "person_keypoints_val2017.json"
    people = build_people(read_table(truth, COCO), root / "val2017")
    in_file = {a["id"]: a["bbox"] for a in json.loads(truth.read_text())["annotations"]}
    boxes = np.array([in_file[number] for number in people.annotation_ids], np.float64)
    return CocoTiny(truth, people, [read_image(path) for path in people.image_paths], boxes)


def test_crops_equal_the_reference(case: Case, coco_tiny: CocoTiny) -> None:
    places = [
        np.flatnonzero(coco_tiny.people.annotation_ids == number).item()
        for number in case.reference["annotation_ids"]
    ]
    ours = coco_tiny.crops(case.side)[0][places].astype(int)
    # OpenCV 4 and 5 differ by up to 5 gray levels; a shift of half a pixel is 2 in the mean.
    difference = np.abs(ours - case.reference["crops"])
    assert difference.mean() < 0.5 and difference.max() <= 8


@pytest.mark.slow
def test_ap_on_coco_equals_the_reference(case: Case, coco_tiny: CocoTiny, tmp_path: Path) -> None:
    """In points. The reference's ground truth has only the 58 people with keypoints.

    So a pose on a person without keypoints, or in a crowd, is a false positive there. The official
    evaluation of the unchanged file ignores such poses.
    """
    crops, affines = coco_tiny.crops(case.side)
    with torch.no_grad():
        features = whole(case.size, case.path).predict(
            torch.from_numpy(crops).movedim(3, 1).float()
        )
    keypoints, scores = (found.double().numpy() for found in case.codec.decode_features(features))
    keypoints_image = apply_affine(keypoints, invert_affine(affines))
    found = to_detections(keypoints_image, scores, coco_tiny.people.image_ids, np.ones(58))
    document = json.loads(coco_tiny.truth.read_text())
    labeled = [a for a in document["annotations"] if a["num_keypoints"]]
    alone = tmp_path / "alone.json"
    alone.write_text(json.dumps({**document, "annotations": labeled}))
    published = {"thunder": (55.0, 77.1, 62.3), "lightning": (40.7, 67.4, 42.7)}
    official = {"thunder": (57.5, 80.0, 64.9), "lightning": (42.9, 70.1, 46.1)}
    for truth, expected in ((alone, published), (coco_tiny.truth, official)):
        figures = average_precision(truth, found, COCO, "coco")
        points = [100 * figures[name] for name in ("ap", "ap50", "ap75")]
        assert points == pytest.approx(expected[case.size], abs=0.5)


@pytest.mark.slow
def test_untrained_movenet_teacher_uses_its_own_decoding(
    folder: Path, mini_config: StudyConfig, mini_data: PreparedData, workers: Workers
) -> None:
    values = {
        "teacher.size": "lightning",
        "teacher.codec": "movenet",
        "teacher.epochs": 0,
        "teacher.init": str(folder / "movenet-lightning.json"),
    }
    config = with_values(mini_config, values)
    rows: list[Any] = []
    make_teacher(
        teacher_spec(config, resolve(config)),
        config.student,
        mini_data,
        workers,
        lambda row: bool(rows.append(row)),
    )
    store = open_teacher_store(
        teacher_folder(teacher_spec(config, resolve(config)), mini_data) / TARGETS
    )
    modes = store.modes_stored()
    assert len(rows) == 1 and np.isfinite(modes).all()
    heights = modes[..., 2]
    assert (heights[..., 0] > 0).all() and (heights[..., 1] >= heights[..., 2]).all()
    # The official keypoint is not always the highest peak.
    assert (heights[..., 0] < heights[..., 1]).any()
