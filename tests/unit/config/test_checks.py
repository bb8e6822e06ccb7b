"""Limits of the settings: each rule at its edge and one step beyond it."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from study.config import checks, schema
from study.config.compose import compose, flatten, to_plain, value_at, with_values
from study.config.schema import StudyConfig
from study.errors import InputError

UNCHANGED_MOVENET = {
    "teacher.size": "thunder",
    "teacher.epochs": 0,
    "teacher.init": "movenet.json",
    "teacher.flip_test": False,
}


@pytest.fixture(scope="module")
def config() -> StudyConfig:
    return compose()


FOREIGN: dict[str, dict[str, Any]] = {
    schema.VITPOSE: {"teacher.init": "folder"},
    schema.ONNX: {"teacher.init": "file.onnx", "teacher.epochs": 0},
    schema.PREDICTIONS: {"teacher.init": "poses.json", "teacher.epochs": 0},
}
"""Settings that a teacher of another library needs, by its name."""


def faults_of(config: StudyConfig, values: dict[str, Any]) -> list[str]:
    return checks.faults({**flatten(to_plain(config)), **values})


def fault_of(config: StudyConfig, values: dict[str, Any]) -> str:
    """Return the only fault of the settings with these values."""
    found = faults_of(config, values)
    assert len(found) == 1, found
    return found[0]


@pytest.mark.parametrize("path", sorted(checks.CHOICES))
def test_each_choice_is_accepted_and_another_word_is_refused(
    config: StudyConfig, path: str
) -> None:
    for choice in checks.CHOICES[path]:
        sizes = schema.SIZES.get(choice, ("",))  # a network has sizes of its own
        fitting = {path.replace(".name", ".size"): sizes[0]} if path.endswith(".name") else {}
        fitting |= FOREIGN.get(choice, UNCHANGED_MOVENET if choice == schema.MOVENET else {})
        assert faults_of(config, {path: choice, **fitting}) == []
    fault = fault_of(config, {path: "smthing"})
    assert fault.startswith(f"{path} must be one of {', '.join(checks.CHOICES[path])}, got {path}")


@pytest.mark.parametrize("path", sorted(checks.AT_LEAST))
def test_each_lower_bound_is_accepted_and_less_is_refused(config: StudyConfig, path: str) -> None:
    low = checks.AT_LEAST[path]
    is_whole = isinstance(value_at(config, path), int)
    weights = {"teacher.init": "weights.safetensors"}
    assert faults_of(config, {**weights, path: low}) == []
    less = low - 1 if is_whole else low - 1e-9
    assert fault_of(config, {**weights, path: less}).startswith(f"{path} must be at least {low:g}")


@pytest.mark.parametrize("path", sorted(checks.POSITIVE))
def test_each_positive_number_may_be_small_but_not_zero(config: StudyConfig, path: str) -> None:
    assert faults_of(config, {path: 1e-12}) == []
    assert fault_of(config, {path: 0.0}) == f"{path} must be above 0, got {path}=0.0"


@pytest.mark.parametrize("path", sorted(checks.WITHIN))
def test_each_range_includes_both_ends_and_nothing_outside(config: StudyConfig, path: str) -> None:
    low, high = checks.WITHIN[path]
    for value in (low, high):
        assert faults_of(config, {path: value}) == []
    for value in (low - 1, high + 1):
        assert fault_of(config, {path: value}).startswith(f"{path} must lie within {low:g} and ")


def test_each_number_must_be_finite(config: StudyConfig) -> None:
    flat = flatten(to_plain(config))
    numbers = [path for path, value in flat.items() if type(value) is float]
    assert "distill.optimizer.lr" in numbers
    for path in numbers:
        assert fault_of(config, {path: float("nan")}).startswith(f"{path} must be a finite number")
        found = faults_of(config, {path: float("inf")})
        assert f"{path} must be a finite number, got {path}=inf" in found


def test_choices_equal_what_the_builders_support() -> None:
    from models.build import MODELS
    from models.codecs.codec import CODECS
    from models.skeleton import SKELETONS
    from study.teachers.onnx_model import PIXELS

    assert set(checks.CHOICES["teacher.pixels"]) == set(PIXELS)
    assert set(checks.SKELETONS) == set(SKELETONS)
    for role in ("teacher", "student"):
        others = set(FOREIGN) if role == "teacher" else set()
        assert set(checks.CHOICES[f"{role}.name"]) == set(MODELS) | others
        movenet = {schema.MOVENET} if role == "teacher" else set()
        assert set(checks.CHOICES[f"{role}.codec"]) == {*CODECS, *movenet}
    sizes = {name: tuple(sizes) for name, (_, sizes) in MODELS.items()}
    assert sizes == schema.SIZES


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_size_must_be_one_of_its_network(config: StudyConfig, role: str) -> None:
    for name, sizes in schema.SIZES.items():
        for size in sizes:
            assert faults_of(config, {f"{role}.name": name, f"{role}.size": size}) == []
    fault = fault_of(config, {f"{role}.name": "hrnet", f"{role}.size": "r50"})
    assert fault == (
        f"{role}.size must be one of w18_small, w18, w32, w48 for {role}.name=hrnet, "
        f"got {role}.size=r50"
    )


def test_parts_of_a_mix_are_structure_kinds(config: StudyConfig) -> None:
    assert tuple(dataclasses.asdict(config.distill.structure.mix)) == schema.MIX
    assert set(schema.MIX) < set(checks.CHOICES["distill.structure.kind"])


def test_every_bound_belongs_to_a_setting_of_its_type(config: StudyConfig) -> None:
    flat = flatten(to_plain(config))
    for path, choices in checks.CHOICES.items():
        assert flat[path] in choices
    for path in (*checks.AT_LEAST, *checks.POSITIVE, *checks.WITHIN):
        assert type(flat[path]) in (int, float)


def test_every_number_has_a_bound(config: StudyConfig) -> None:
    numbers = {
        path for path, value in flatten(to_plain(config)).items() if type(value) in (int, float)
    }
    bounded = {*checks.AT_LEAST, *checks.POSITIVE, *checks.WITHIN, "data.search_fraction"}
    assert numbers - bounded == {"seed"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data.search_fraction": 0.0}, "data.search_fraction must lie between 0 and 1"),
        ({"data.search_fraction": 1.0}, "data.search_fraction must lie between 0 and 1"),
        ({"data.input_size": [128, 100]}, "two multiples of 32, .* got .*=[128, 100]"),
        ({"data.input_size": [0, 96]}, "two multiples of 32"),
        ({"data.input_size": [128, 96, 64]}, "two multiples of 32"),
        ({"data.input_size": [128]}, "two multiples of 32"),
        (
            {"trial.launcher": "inline", "trial.num_workers": 2},
            "inline runs one worker .* got trial.num_workers=2; change to trial.launcher=train",
        ),
        (
            {
                "distill.structure.kind": "mix",
                **{f"distill.structure.mix.{part}": 0.0 for part in schema.MIX},
            },
            "a mix must have a part, got distill.structure.mix.pairwise=0, .*kind=none",
        ),
        (
            {"teacher.codec": "movenet"},
            "decodes an unchanged MoveNet, got .*size=teacher, .*epochs",
        ),
        (
            {**UNCHANGED_MOVENET, "teacher.codec": "movenet", "teacher.flip_test": True},
            "movenet has no flip test, .*got teacher.flip_test=true; set teacher.flip_test=false",
        ),
        (
            {**UNCHANGED_MOVENET, "teacher.codec": "movenet", "teacher.epochs": 1},
            "teacher.epochs=1; set .* lightning, thunder and teacher.epochs=0, or change",
        ),
        ({"teacher.epochs": 0}, "a teacher must be trained or loaded, got teacher.epochs=0"),
        ({"teacher.name": "vitpose"}, "vitpose is read from a folder .*got teacher.init=random"),
        (
            {**FOREIGN["onnx"], "teacher.name": "onnx", "teacher.init": "random"},
            "onnx is read from a file, got teacher.init=random; set teacher.init",
        ),
        (
            {**FOREIGN["onnx"], "teacher.name": "onnx", "teacher.epochs": 3},
            "onnx can't be trained, got teacher.epochs=3; set .*epochs=0",
        ),
        (
            {**FOREIGN["predictions"], "teacher.name": "predictions", "teacher.epochs": 1},
            "predictions can't be trained, got teacher.epochs=1",
        ),
        (
            {
                **FOREIGN["onnx"],
                "teacher.name": "onnx",
                "distill.structure.kind": "relation",
            },
            "relation compares features, .* teacher.name=onnx has none, .*search_space=poses",
        ),
        (
            {"teacher.skeleton": "cocoo"},
            "teacher.skeleton must be null, coco or crowdpose, or .* did you mean coco?",
        ),
        ({"teacher.skeleton": "from_data"}, "teacher.skeleton must be null"),
        ({"data.skeleton": "from_dat"}, "data.skeleton must be .* did you mean from_data?"),
        ({"data.kind": "drawn", "data.skeleton": "from_data"}, "data=drawn draws .*joints"),
        (
            {"teacher.skeleton": "crowdpose", "teacher.epochs": 2},
            "data's joints alone, got teacher.skeleton=crowdpose, data.skeleton=coco and "
            "teacher.epochs=2; set teacher.epochs=0",
        ),
        ({"teacher.input_size": [256, 100]}, "teacher.input_size must be null or two .*100"),
        ({"refine.width": 10}, "refine.width must be a multiple of 4, got refine.width=10; .* 8 "),
        ({"teacher.input_size": [256]}, "teacher.input_size must be null or two"),
        ({"name": "a/b"}, "name must be a folder's name: .*got name='a/b'"),
        ({"name": ""}, "name must be a folder's name"),
        ({"name": ".."}, "name must be a folder's name"),
        ({"name": ".hidden"}, "name must be a folder's name"),
        ({"name": "a b"}, "name must be a folder's name"),
        ({"name": "cache"}, "name must not be cache"),
        ({"log": ["wandb"]}, "log must name any of tensorboard, mlflow, .*got log=[wandb]"),
        ({"log": ["mlflow", "mlflow"]}, "each once, got log=[mlflow,mlflow]"),
        ({"storage": "s3://bucket/x"}, "storage must be a folder .*mount the bucket"),
        ({"data.root": "s3://bucket/coco"}, "data.root must be a path of this machine.*mount"),
        ({"teacher.init": "file:///w.pth"}, "teacher.init must be a path of .* without ://"),
        ({"data.val.images": "gs://b/val"}, "data.val.images must be a path of this machine"),
        ({"search.warm_start": ["s3://b/s"]}, "search.warm_start must be .* got .*=s3://b/s;"),
        ({"data.root": ""}, "data.root must be the folder .*, which is empty; set it"),
    ],
)
def test_error_for_impossible_values_states_the_rule(
    config: StudyConfig, values: dict[str, Any], message: str
) -> None:
    assert re.search(message.replace("[", r"\["), fault_of(config, values))
    with pytest.raises(InputError, match=r"^impossible settings:\n  "):
        with_values(config, values)


def test_storage_in_a_bucket_is_one_fault_though_the_drawn_people_are_in_it() -> None:
    with pytest.raises(InputError) as error:
        compose(["storage=s3://bucket/x"])
    assert str(error.value).count("must be") == 1


def test_root_may_be_empty_if_all_paths_of_the_data_are_absolute(config: StudyConfig) -> None:
    splits = ("data.train.annotations", "data.train.images", "data.val.annotations")
    absolute = {setting: "/x" for setting in (*splits, "data.val.images")}
    assert faults_of(config, {"data.root": "", **absolute}) == []


def test_teacher_of_other_joints_and_another_size_may_be_used_untrained(
    config: StudyConfig,
) -> None:
    untrained = {"teacher.init": "weights.safetensors", "teacher.epochs": 0}
    form = {"teacher.skeleton": "crowdpose", "teacher.input_size": [256, 256]}
    assert faults_of(config, {**untrained, **form}) == []
    same = {"teacher.skeleton": "coco", "teacher.epochs": 3}
    assert faults_of(config, same) == []


@pytest.mark.parametrize("name", ["vitpose", "mobile_net"])
def test_teacher_with_features_may_have_a_relation_loss(config: StudyConfig, name: str) -> None:
    values = {**FOREIGN.get(name, {}), "teacher.name": name, "distill.structure.kind": "relation"}
    assert faults_of(config, values) == []
