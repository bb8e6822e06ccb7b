"""What values a setting may have: each rule at its edge, and one step beyond it."""

from __future__ import annotations

import re
from typing import Any

import pytest

from study import limits
from study.config import InputError, StudyConfig, compose, flatten, to_plain, value_at, with_values

AS_IT_COMES = {"teacher.size": "thunder", "teacher.epochs": 0, "teacher.init": "movenet.json"}


@pytest.fixture(scope="module")
def config() -> StudyConfig:
    return compose()


def fault_of(config: StudyConfig, values: dict[str, Any]) -> str:
    """The one fault that these values make."""
    found = limits.faults({**flatten(to_plain(config)), **values})
    assert len(found) == 1, found
    return found[0]


@pytest.mark.parametrize("path", sorted(limits.CHOICES))
def test_each_choice_is_taken_and_another_word_is_refused(config: StudyConfig, path: str) -> None:
    flat = flatten(to_plain(config))
    for choice in limits.CHOICES[path]:
        as_it_comes = AS_IT_COMES if choice == limits.MOVENET else {}
        assert limits.faults({**flat, **as_it_comes, path: choice}) == []
    fault = fault_of(config, {path: "smthing"})
    assert fault.startswith(f"{path} must be one of {', '.join(limits.CHOICES[path])}, got {path}")


@pytest.mark.parametrize("path", sorted(limits.AT_LEAST))
def test_each_lower_bound_is_taken_and_less_is_refused(config: StudyConfig, path: str) -> None:
    low = limits.AT_LEAST[path]
    is_whole = isinstance(value_at(config, path), int)
    weights = {"teacher.init": "weights.safetensors"}
    assert limits.faults({**flatten(to_plain(config)), **weights, path: low}) == []
    less = low - 1 if is_whole else low - 1e-9
    assert fault_of(config, {**weights, path: less}).startswith(f"{path} must be at least {low:g}")


@pytest.mark.parametrize("path", sorted(limits.POSITIVE))
def test_each_positive_number_may_be_small_but_not_zero(config: StudyConfig, path: str) -> None:
    assert limits.faults({**flatten(to_plain(config)), path: 1e-12}) == []
    assert fault_of(config, {path: 0.0}) == f"{path} must be above 0, got {path}=0.0"


@pytest.mark.parametrize("path", sorted(limits.WITHIN))
def test_each_range_has_both_ends_and_nothing_outside(config: StudyConfig, path: str) -> None:
    low, high = limits.WITHIN[path]
    for value in (low, high):
        assert limits.faults({**flatten(to_plain(config)), path: value}) == []
    for value in (low - 1, high + 1):
        assert fault_of(config, {path: value}).startswith(f"{path} must lie within {low:g} and ")


def test_each_number_must_be_finite(config: StudyConfig) -> None:
    flat = flatten(to_plain(config))
    numbers = [path for path, value in flat.items() if type(value) is float]
    assert "distill.optimizer.lr" in numbers
    for path in numbers:
        assert fault_of(config, {path: float("nan")}).startswith(f"{path} must be a finite number")
        found = limits.faults({**flat, path: float("inf")})
        assert f"{path} must be a finite number, got {path}=inf" in found


def test_choices_are_what_the_builders_build() -> None:
    from models.build import MODELS
    from models.codec import CODECS
    from models.mobile_net import SIZES
    from models.skeleton import SKELETONS

    assert set(limits.CHOICES["data.skeleton"]) == set(SKELETONS)
    for role in ("teacher", "student"):
        assert set(limits.CHOICES[f"{role}.name"]) == set(MODELS)
        assert set(limits.CHOICES[f"{role}.size"]) == set(SIZES)
        movenet = {limits.MOVENET} if role == "teacher" else set()
        assert set(limits.CHOICES[f"{role}.codec"]) == {*CODECS, *movenet}


def test_every_bound_is_about_a_setting_of_its_type(config: StudyConfig) -> None:
    flat = flatten(to_plain(config))
    for path, choices in limits.CHOICES.items():
        assert flat[path] in choices
    for path in (*limits.AT_LEAST, *limits.POSITIVE, *limits.WITHIN):
        assert type(flat[path]) in (int, float)


def test_every_number_has_a_bound(config: StudyConfig) -> None:
    numbers = {
        path for path, value in flatten(to_plain(config)).items() if type(value) in (int, float)
    }
    bounded = {*limits.AT_LEAST, *limits.POSITIVE, *limits.WITHIN, "data.search_fraction"}
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
        ({"teacher.epochs": 0}, "a teacher must be trained or loaded, got teacher.epochs=0"),
        (
            {"teacher.codec": "movenet"},
            "reads a MoveNet as it comes, got .*size=teacher, .*epochs",
        ),
        (
            {**AS_IT_COMES, "teacher.codec": "movenet", "teacher.epochs": 1},
            "teacher.epochs=1; set .* lightning, thunder and teacher.epochs=0, or change",
        ),
        ({"name": "a/b"}, "name must be a folder's name: .*got name='a/b'"),
        ({"name": ""}, "name must be a folder's name"),
        ({"name": ".."}, "name must be a folder's name"),
        ({"name": ".hidden"}, "name must be a folder's name"),
        ({"name": "a b"}, "name must be a folder's name"),
        ({"name": "cache"}, "name must not be cache"),
        ({"storage": "s3://bucket/x"}, "storage must be a folder .*mount the bucket"),
    ],
)
def test_impossible_values_say_what_must_hold(
    config: StudyConfig, values: dict[str, Any], message: str
) -> None:
    assert re.search(message.replace("[", r"\["), fault_of(config, values))
    with pytest.raises(InputError, match=r"^impossible settings:\n  "):
        with_values(config, values)
