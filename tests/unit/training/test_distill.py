"""Stage 1: its terms, their weights, and the learning rates of the layers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models.build import build_model
from models.codecs.codec import Dark
from models.pose_features import PoseFeatures, PoseNetwork
from models.skeleton import Skeleton
from study.config.compose import with_values
from study.config.derived import resolve
from study.config.schema import (
    AugmentConfig,
    DistillConfig,
    HeatmapTermConfig,
    MixConfig,
    OptimizerConfig,
    StructureTermConfig,
    StudyConfig,
)
from study.training.batches import Batch
from study.training.distill import DistillTask, confident_joints
from study.training.losses import Term, joint_relation
from study.training.networks import build_distill_task

CODEC = Dark(input_size=(96, 64), heatmap_size=(24, 16))
OPTIMIZER = OptimizerConfig(1e-3, 1e-4, warmup_fraction=0.05, pretrained_factor=0.1)
SETTINGS = DistillConfig(
    epochs=4,
    batch_size=4,
    optimizer=OPTIMIZER,
    heatmap=HeatmapTermConfig("mse", 0.5, tau=0.1),
    structure=StructureTermConfig("pairwise", 0.2, MixConfig(0.1, 0.2, 0.3, 0.4)),
    weights="fixed",
    schedule="constant",
    normalize="initial",
    diagnose=False,
    augment=AugmentConfig(0, 0, 0, 0, 0, 0, 0),
)
STRUCTURES = ["pairwise", "bone", "angle", "relation"]


class Painter(PoseNetwork):
    """A student whose heatmaps and features are its parameters."""

    def __init__(self, heatmaps: Tensor) -> None:
        super().__init__()
        self.heatmaps = nn.Parameter(heatmaps.clone())
        generator = torch.Generator().manual_seed(6)
        features = torch.rand(len(heatmaps), 7, 24, 16, generator=generator)
        self.features = nn.Parameter(features)

    def forward(self, crops: Tensor) -> PoseFeatures:
        return PoseFeatures(self.heatmaps, (self.features,))


def task_of(
    five: Skeleton, student: PoseNetwork, heatmap: str = "mse", structure: str = "pairwise"
) -> DistillTask:
    settings = dataclasses.replace(
        SETTINGS,
        heatmap=dataclasses.replace(SETTINGS.heatmap, kind=heatmap),
        structure=dataclasses.replace(SETTINGS.structure, kind=structure),
    )
    return DistillTask(student, CODEC, five, settings)  # type: ignore[arg-type]


@pytest.fixture
def batch() -> Batch:
    """Three people; the teacher has one mode a joint, a few pixels off the truth."""
    generator = torch.Generator().manual_seed(1)
    keypoints = torch.rand(3, 5, 2, generator=generator) * torch.tensor([40.0, 70.0]) + 12
    modes = torch.zeros(3, 5, 3, 4)
    modes[..., 0, :2] = keypoints + 4 * torch.rand(3, 5, 2, generator=generator)
    modes[..., 0, 2] = 0.5 + 0.5 * torch.rand(3, 5, generator=generator)
    modes[..., 3] = 1
    visibility = torch.full((3, 5), 2)
    visibility[0, 3] = 0
    return Batch(
        crops=torch.zeros(3, 3, 96, 64),
        keypoints_crop=keypoints,
        visibility=visibility,
        areas_crop=torch.full((3,), 2000.0),
        neighbor_crop=keypoints,
        neighbor_visibility=torch.zeros(3, 5),
        teacher_modes=modes,
        teacher_mask=torch.ones(3, 5),
        teacher_relation=torch.eye(5).expand(3, 5, 5),
    )


def modes_of(batch: Batch) -> Tensor:
    assert batch.teacher_modes is not None
    return batch.teacher_modes


def like_the_teacher(batch: Batch) -> tuple[Painter, Batch]:
    """Return a student with the teacher's heatmaps; the teacher has the student's relation."""
    student = Painter(CODEC.render(modes_of(batch)))
    relation = joint_relation(student.heatmaps, student.features).detach()
    return student, dataclasses.replace(batch, teacher_relation=relation)


def unlike_the_teacher() -> Painter:
    generator = torch.Generator().manual_seed(9)
    return Painter(torch.rand(3, 5, 24, 16, generator=generator))


def mean(term: Term) -> float:
    return (term.sum / term.count).item()


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("heatmap", ["mse", "kl"])
def test_student_that_equals_the_teacher_has_no_teacher_loss(
    heatmap: str, structure: str, five: Skeleton, batch: Batch
) -> None:
    student, batch = like_the_teacher(batch)
    terms = task_of(five, student, heatmap, structure)(batch)
    assert list(terms) == ["truth", "heatmap", "structure"]
    assert mean(terms["heatmap"]) == pytest.approx(0, abs=1e-6)
    assert mean(terms["structure"]) == pytest.approx(0, abs=1e-9)
    assert mean(terms["truth"]) > 1e-4


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("heatmap", ["mse", "kl"])
def test_every_kind_has_a_gradient_on_five_joints_and_a_high_crop(
    heatmap: str, structure: str, five: Skeleton, batch: Batch
) -> None:
    student = unlike_the_teacher()
    terms = task_of(five, student, heatmap, structure)(batch)
    for name in ("heatmap", "structure"):
        (gradient,) = torch.autograd.grad(
            mean_of(terms[name]), student.heatmaps, retain_graph=True
        )
        assert mean(terms[name]) > 0 and gradient.abs().sum() > 0 and gradient.isfinite().all()


def mean_of(term: Term) -> Tensor:
    return term.sum / term.count


def test_student_that_equals_the_truth_has_no_truth_loss(five: Skeleton, batch: Batch) -> None:
    targets, _ = CODEC.encode(batch.keypoints_crop, batch.visibility)
    assert mean(task_of(five, Painter(targets))(batch)["truth"]) == 0


def test_unlabeled_joint_adds_no_truth_loss_but_a_heatmap_loss(
    five: Skeleton, batch: Batch
) -> None:
    student = unlike_the_teacher()
    terms = task_of(five, student)(batch)
    (truth,) = torch.autograd.grad(terms["truth"].sum, student.heatmaps, retain_graph=True)
    (imitation,) = torch.autograd.grad(terms["heatmap"].sum, student.heatmaps)
    assert (truth[0, 3] == 0).all() and (truth[0, 2] != 0).any()
    assert (imitation[0, 3] != 0).any()


@pytest.mark.parametrize(
    ("heatmap", "structure", "names"),
    [
        ("none", "none", ["truth"]),
        ("mse", "none", ["truth", "heatmap"]),
        ("none", "bone", ["truth", "structure"]),
    ],
)
def test_kind_none_removes_the_term(
    heatmap: str, structure: str, names: list[str], five: Skeleton, batch: Batch
) -> None:
    task = task_of(five, unlike_the_teacher(), heatmap, structure)
    assert list(task(batch)) == names and task.term_names == names
    assert list(task.weights(0.0)) == names
    assert {name for name, _ in task.named_buffers()} == {f"scale_{name}" for name in names}


def test_the_baseline_needs_no_teacher(five: Skeleton, batch: Batch) -> None:
    alone = dataclasses.replace(
        batch, teacher_modes=None, teacher_mask=None, teacher_relation=None
    )
    assert list(task_of(five, unlike_the_teacher(), "none", "none")(alone)) == ["truth"]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_joint_with_two_rival_modes_adds_no_structure_loss(
    structure: str, five: Skeleton, batch: Batch
) -> None:
    modes = modes_of(batch).clone()
    modes[:, 1, 1, 2] = 0.6 * modes[:, 1, 0, 2]  # a second peak, more than half as high
    modes[:, 1, 1, :2] = 8.0
    assert_no_structure_from_joint_1(
        structure, five, dataclasses.replace(batch, teacher_modes=modes)
    )


@pytest.mark.parametrize("structure", STRUCTURES)
def test_joint_outside_the_crop_adds_no_structure_loss(
    structure: str, five: Skeleton, batch: Batch
) -> None:
    modes = modes_of(batch).clone()
    modes[:, 1, 0, 1] = torch.tensor([-1.0, 96.0, 140.0])  # y of a crop that is 96 px high
    assert_no_structure_from_joint_1(
        structure, five, dataclasses.replace(batch, teacher_modes=modes)
    )


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("heatmap", ["mse", "kl"])
def test_masked_joint_adds_nothing_to_any_teacher_term(
    heatmap: str, structure: str, five: Skeleton, batch: Batch
) -> None:
    assert batch.teacher_mask is not None
    mask = batch.teacher_mask.clone()
    mask[:, 1] = 0
    batch = dataclasses.replace(batch, teacher_mask=mask)
    assert_no_structure_from_joint_1(structure, five, batch)
    student = unlike_the_teacher()
    term = task_of(five, student, heatmap)(batch)["heatmap"]
    (gradient,) = torch.autograd.grad(term.sum, student.heatmaps)
    assert (gradient[:, 1] == 0).all() and (gradient[:, 0] != 0).any()
    modes = modes_of(batch).clone()
    modes[:, 1] = torch.tensor([7.0, 9.0, 0.8, 1.0])
    other = dataclasses.replace(batch, teacher_modes=modes)
    assert task_of(five, student, heatmap)(other)["heatmap"] == term


@pytest.mark.parametrize("structure", ["pairwise", "bone"])
def test_structure_on_points_needs_no_relation(
    structure: str, five: Skeleton, batch: Batch
) -> None:
    without_relation = dataclasses.replace(batch, teacher_relation=None)
    task = task_of(five, unlike_the_teacher(), structure=structure)
    assert mean(task(without_relation)["structure"]) == mean(task(batch)["structure"]) > 0


def assert_no_structure_from_joint_1(structure: str, five: Skeleton, batch: Batch) -> None:
    student = unlike_the_teacher()
    term = task_of(five, student, structure=structure)(batch)["structure"]
    (gradient,) = torch.autograd.grad(term.sum, student.heatmaps)
    assert (gradient[:, 1] == 0).all()
    for joint in (0, 2, 3, 4):
        assert (joint == 3 and structure in ("bone", "angle")) or (gradient[:, joint] != 0).any()


def test_confidence_by_hand() -> None:
    modes = torch.zeros(1, 5, 2, 4)
    modes[0, :, 0, :2] = torch.tensor([[0.0, 0], [63.9, 95.9], [64, 50], [30, 30], [30, 30]])
    modes[0, :, 0, 2] = torch.tensor([0.8, 1.3, 0.9, 0.8, 0.0])
    modes[0, :, 1, 2] = torch.tensor([0.39, 0.0, 0.0, 0.4, 0.0])
    # below half; above 1 counts as 1; outside; half; no mode at all
    expected = torch.tensor([[0.8, 1.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(confident_joints(modes, (96, 64)), expected)
    one_mode = torch.tensor([[0.8, 1.0, 0.0, 0.8, 0.0]])
    torch.testing.assert_close(confident_joints(modes[:, :, :1], (96, 64)), one_mode)


def test_scaled_terms_start_at_their_weights(five: Skeleton, batch: Batch) -> None:
    task = task_of(five, unlike_the_teacher())
    means = {name: mean(term) for name, term in task(batch).items()}
    task.set_scales(means, None)
    weights = task.weights(0.0)
    start = {name: weights[name] * value for name, value in means.items()}
    assert start == pytest.approx({"truth": 1.0, "heatmap": 0.5, "structure": 0.2})


def test_scale_of_a_pretrained_student_is_at_least_a_thousandth_of_a_random_ones(
    five: Skeleton,
) -> None:
    task = task_of(five, unlike_the_teacher())
    means = {"truth": 0.02, "heatmap": 1e-7, "structure": 0.0}
    task.set_scales(means, {"truth": 0.05, "heatmap": 0.04, "structure": 3.0})
    scales = {name: float(task.scale(name)) for name in means}
    assert scales == pytest.approx({"truth": 0.02, "heatmap": 4e-5, "structure": 3e-3})


def test_term_that_starts_at_zero_keeps_its_scale(five: Skeleton) -> None:
    task = task_of(five, unlike_the_teacher(), structure="none")
    task.set_scales({"truth": 2.0, "heatmap": 0.0}, None)
    assert float(task.scale("heatmap")) == 1.0


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        ("constant", [1, 1, 1, 1]),
        ("linear", [1, 0.75, 0.5, 0]),
        ("ramp", [0, 0.25, 0.5, 1]),
    ],
)
def test_the_teachers_share_follows_the_schedule_and_the_truth_stays(
    schedule: str, shares: list[float], five: Skeleton
) -> None:
    task = task_of(five, unlike_the_teacher())
    task.settings = dataclasses.replace(SETTINGS, schedule=schedule)
    for progress, share in zip([0.0, 0.25, 0.5, 1.0], shares, strict=True):
        expected = {"truth": 1.0, "heatmap": 0.5 * share, "structure": 0.2 * share}
        assert task.weights(progress) == pytest.approx(expected)


def test_mix_has_its_kinds_with_separate_weights_and_scales(five: Skeleton, batch: Batch) -> None:
    student = unlike_the_teacher()
    task = task_of(five, student, structure="mix")
    terms = task(batch)
    names = ["truth", "heatmap", *(f"structure_{kind}" for kind in STRUCTURES)]
    assert list(terms) == names == task.term_names
    for kind in STRUCTURES:
        alone = task_of(five, student, structure=kind)(batch)["structure"]
        assert mean(terms[f"structure_{kind}"]) == mean(alone) > 0
    means = {name: mean(term) for name, term in terms.items()}
    task.set_scales(means, None)
    weights = task.weights(0.0)
    start = [weights[f"structure_{kind}"] * means[f"structure_{kind}"] for kind in STRUCTURES]
    assert start == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_weight_of_zero_leaves_a_part_out_of_the_mix(five: Skeleton, batch: Batch) -> None:
    task = task_of(five, unlike_the_teacher(), structure="mix")
    mix = MixConfig(0.0, 0.7, 0.0, 0.2)
    structure = StructureTermConfig("mix", 5.0, mix)
    settings = dataclasses.replace(SETTINGS, structure=structure)
    task = DistillTask(task.student, CODEC, five, settings)  # type: ignore[arg-type]
    names = ["truth", "heatmap", "structure_bone", "structure_relation"]
    assert list(task(batch)) == names
    assert task.weights(0.0) == {"truth": 1.0, "heatmap": 0.5, names[2]: 0.7, names[3]: 0.2}


def test_scales_are_kept_in_the_state_dict(five: Skeleton) -> None:
    task, other = (task_of(five, unlike_the_teacher()) for _ in range(2))
    task.set_scales({"truth": 2.0, "heatmap": 3.0, "structure": 4.0}, None)
    other.load_state_dict(task.state_dict())
    assert other.weights(0.0) == task.weights(0.0)


def rates(task: DistillTask) -> dict[str, Any]:
    """Return the learning rate of each parameter of the student, by name."""
    names = {id(parameter): name for name, parameter in task.student.named_parameters()}
    groups: list[dict[str, Any]] = task.parameter_groups(OPTIMIZER)
    assert sum(len(group["params"]) for group in groups) == len(names)
    return {names[id(p)]: group["lr"] for group in groups for p in group["params"]}


def distill_task(config: StudyConfig) -> DistillTask:
    return build_distill_task(
        config.student, config.distill, config.trial, resolve(config), seed=0
    )


def test_a_random_student_learns_at_the_full_rate(mini_config: StudyConfig) -> None:
    task = distill_task(mini_config)
    assert not task.is_pretrained and set(rates(task).values()) == {1e-3}


@pytest.mark.parametrize(("joints", "head_rate"), [(17, 1e-4), (14, 1e-3)])
def test_pretrained_layers_learn_at_a_tenth_and_a_new_head_at_the_full_rate(
    joints: int, head_rate: float, mini_config: StudyConfig, tmp_path: Path, five: Skeleton
) -> None:
    skeleton = dataclasses.replace(
        five,
        joints=tuple(map(str, range(joints))),
        oks_sigmas=(0.1,) * joints,
    )
    init = tmp_path / "weights.safetensors"
    save_file(build_model("mobile_net", "tiny", skeleton).state_dict(), init)
    changed = with_values(mini_config, {"student.init": str(init)})
    task = distill_task(changed)
    found = rates(task)
    expected = {name: head_rate if name.startswith("final_layer.") else 1e-4 for name in found}
    assert task.is_pretrained and found == pytest.approx(expected)
