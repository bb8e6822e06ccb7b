"""Search spaces: their YAML files, the values of a trial, and the messages for errors."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FixedTrial, TrialState

from search_spaces.space import (
    Parameter,
    SearchSpace,
    SpaceError,
    check_space,
    known_names,
    load_space,
)
from study.config.compose import compose, flatten, to_plain

ROOT = Path(__file__).resolve().parents[3]
DEFAULTS = flatten(to_plain(compose()))
KNOWN = {
    **DEFAULTS,
    "distill.heatmap.kind": "mse",
    "distill.heatmap.tau": 0.1,
    "refine.depth": 2,
    "refine.width": 64,
    "refine.loss": "oks",
    "refine.teacher_weight": 1.0,
}
BASELINE = {**DEFAULTS, "distill.heatmap.kind": "none", "distill.structure.kind": "none"}


def written(folder: Path, parameters: str, question: str = "Why?") -> str:
    file = folder / "mine.yaml"
    lines = "".join(f"  {line}\n" for line in parameters.splitlines())
    file.write_text(f"question: {question}\nparameters:\n{lines}")
    return str(file)


@pytest.mark.parametrize("name", known_names())
def test_every_space_fits_the_config_and_accepts_the_known_configs(name: str) -> None:
    space = load_space(name)
    assert space.name == name
    assert space.question.endswith((".", "?"))
    check_space(space, DEFAULTS.__getitem__, DEFAULTS)
    for config in (DEFAULTS, BASELINE):
        values = space.values_in(config)
        sampled = space.suggest(FixedTrial(values), config)
        assert sampled == values == {path: config[path] for path in values}
        accepted = [p.accepts(values[p.path]) for p in space.parameters if p.path in values]
        assert all(accepted)


@pytest.mark.parametrize("name", known_names())
def test_every_space_survives_json(name: str) -> None:
    assert SearchSpace.from_json(load_space(name).to_json()) == load_space(name)


def test_shared_paths_have_equal_ranges_in_all_spaces() -> None:
    ranges: dict[str, Any] = {}
    for name in ("distill", "refine", *known_names()):
        for parameter in load_space(name).parameters:
            found, known = parameter.distribution, ranges.get(parameter.path)
            if name in ("joint", "staged") and isinstance(known, CategoricalDistribution):
                kept = [c for c in known.choices if c in found.choices]
                assert kept == list(found.choices), parameter.path
            else:
                assert found == ranges.setdefault(parameter.path, found), parameter.path


def test_parts_of_a_mix_have_separate_weights() -> None:
    space = load_space("distill")
    single, mix = (
        set(space.values_in({**DEFAULTS, "distill.structure.kind": kind}))
        for kind in ("angle", "mix")
    )
    assert single - mix == {"distill.structure.weight"}
    parts = dataclasses.asdict(compose().distill.structure.mix)
    assert mix - single == {f"distill.structure.mix.{part}" for part in parts}


def test_no_comment_repeats_a_bound() -> None:
    for name in known_names():
        text = (ROOT / "search_spaces" / f"{name}.yaml").read_text()
        comments = re.findall(r"#(.*)", text)
        assert not [comment for comment in comments if re.search(r"\d\.\d|\de-?\d", comment)]


def test_scientific_notation_is_a_number(tmp_path: Path) -> None:
    name = written(tmp_path, "a.lr: {low: 1e-5, high: 1e-2, log: true, role: nuisance}")
    assert load_space(name).parameters == (
        Parameter("a.lr", FloatDistribution(0.00001, 0.01, log=True), "nuisance"),
    )
    assert load_space(name).name == "mine"


def test_bounds_and_choices_become_distributions(tmp_path: Path) -> None:
    space = load_space(
        written(
            tmp_path,
            "a: {low: 1, high: 7, step: 3, role: scientific}\n"
            "b: {low: 0, high: 0.6, step: 0.2, role: nuisance}\n"
            "c: {choices: [x, y], role: scientific}\n"
            "d: {choices: [true, false], role: scientific, when: {c: [y], other: [1, 2]}}",
        )
    )
    a, b, c, d = space.parameters
    assert a.distribution == IntDistribution(1, 7, step=3)
    assert b.distribution == FloatDistribution(0.0, 0.6, step=0.2)
    assert c.distribution == CategoricalDistribution(("x", "y"))
    assert d.when == {"c": ("y",), "other": (1, 2)}
    assert [p.value_type() for p in space.parameters] == [int, float, str, bool]
    assert [p.extremes() for p in space.parameters] == [
        (1, 7),
        (0.0, 0.6),
        ("x", "y"),
        (True, False),
    ]
    assert [p.probes() for p in (a, b, c)] == [(1, 4, 7), (0.0, 0.2, 0.6), ("x", "y")]


@pytest.mark.parametrize(
    ("distribution", "inside", "outside"),
    [
        (IntDistribution(1, 7, step=3), [1, 4, 7], [0, 2, 8, "4", True, None]),
        (FloatDistribution(0.0, 0.6, step=0.2), [0.0, 0.2, 0.6, 0], [0.3, 0.8, float("nan")]),
        (FloatDistribution(1e-4, 1e-2, log=True), [1e-4, 3e-3, 1e-2], [0.0, 0.02]),
        (CategoricalDistribution(("a", "b")), ["a", "b"], ["c", 0, None]),
        (CategoricalDistribution((True, False)), [True, False], [1, 0, "true"]),
    ],
)
def test_parameter_accepts_the_values_that_a_trial_can_have(
    distribution: Any, inside: list[Any], outside: list[Any]
) -> None:
    parameter = Parameter("a.b", distribution, "scientific")
    assert [value for value in inside if not parameter.accepts(value)] == []
    assert [value for value in outside if parameter.accepts(value)] == []


def test_weight_is_sampled_only_if_its_kind_is_not_none() -> None:
    space = load_space("distill")
    sampled = {
        kind: set(space.values_in({**DEFAULTS, "distill.heatmap.kind": kind}))
        for kind in ("none", "mse", "kl")
    }
    assert sampled["mse"] - sampled["none"] == {"distill.heatmap.weight"}
    assert sampled["kl"] - sampled["mse"] == {"distill.heatmap.tau"}
    assert "distill.structure.weight" not in space.values_in(BASELINE)


def test_inactive_parameter_leaves_no_trace_in_the_trial() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.enqueue_trial(
        {"distill.heatmap.kind": "none", "distill.structure.kind": "bone"}, skip_if_exists=True
    )
    trial = study.ask()
    values = load_space("distill").suggest(trial, {})
    assert values == trial.params
    assert list(values) == [
        "distill.heatmap.kind",
        "distill.structure.kind",
        "distill.structure.weight",
        "distill.schedule",
        "distill.optimizer.lr",
    ]
    assert 0.01 <= values["distill.structure.weight"] <= 10.0
    study.tell(trial, 0.0)
    assert study.trials[0].state == TrialState.COMPLETE


def test_condition_outside_the_space_is_read_from_the_config() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    space = load_space("smoke")
    assert "distill.structure.weight" in space.suggest(study.ask(), DEFAULTS)
    assert "distill.structure.weight" not in space.suggest(study.ask(), BASELINE)
    with pytest.raises(KeyError, match=r"distill\.structure\.kind"):
        space.suggest(study.ask(), {})


def test_condition_on_an_inactive_parameter_does_not_hold(tmp_path: Path) -> None:
    space = load_space(
        written(
            tmp_path,
            "a: {choices: [x, y], role: scientific}\n"
            "b: {choices: [x, y], role: scientific, when: {a: [y]}}\n"
            "c: {choices: [x, y], role: scientific, when: {b: [x]}}",
        )
    )
    assert space.values_in({"a": "x", "b": "x", "c": "x"}) == {"a": "x"}
    assert space.values_in({"a": "y", "b": "x", "c": "x"}) == {"a": "y", "b": "x", "c": "x"}


def test_unknown_space_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SpaceError, match="distill, joint, poses, refine, smoke") as error:
        load_space("jont")
    assert "did you mean 'joint'?" in str(error.value)
    with pytest.raises(SpaceError, match=r"existing YAML file, got 'no/such\.yaml'"):
        load_space("no/such.yaml")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{low: 2.0, high: 1.0, role: nuisance}", "low <= high must hold, got low=2.0, high=1.0"),
        ("{low: 0.0, high: 1.0, log: true, role: nuisance}", "low > 0 must hold on a log scale"),
        ("{low: .nan, high: 1.0, role: nuisance}", "low must be a finite number, got nan"),
        ("{low: 1.0, high: .inf, role: nuisance}", "high must be a finite number, got inf"),
        ("{low: one, high: 1.0, role: nuisance}", "low must be a finite number, got 'one'"),
        ("{low: true, high: 1.0, role: nuisance}", "low must be a finite number, got True"),
        ("{low: 1.0, role: nuisance}", "high must be a finite number, got None"),
        ("{low: 1.0, high: 2.0, log: 3, role: nuisance}", "log must be true or false, got 3"),
        ("{low: 1, high: 5, step: 0.5, role: nuisance}", "step must be a whole number"),
        ("{low: 1, high: 5, step: 0, role: nuisance}", "step must be a number above 0"),
        ("{low: 1, high: 6, step: 2, role: nuisance}", "whole steps must lead from low to high"),
        ("{low: 1, high: 5, step: 2, log: true, role: nuisance}", "a log scale has no step"),
        ("{role: nuisance}", "either choices or low and high, got neither"),
        ("{low: 1, high: 2, choices: [1], role: nuisance}", "low and high, got both"),
        ("{low: 1, high: 2}", "role must be scientific or nuisance, got None"),
        ("{low: 1, high: 2, role: fixed}", "role must be scientific or nuisance, got 'fixed'"),
        ("{low: 1, hihg: 2, role: nuisance}", "got 'hihg'; did you mean 'high'?"),
        ("{choices: [], role: nuisance}", "choices must be a list of values"),
        ("{choices: [1, x], role: nuisance}", "choices must be all words"),
        ("{choices: [null], role: nuisance}", "choices must be all words"),
        ("{choices: [x, x], role: nuisance}", "choices must differ from one another"),
        ("{choices: [x], role: nuisance, when: [b]}", "when must map config paths"),
        ("{choices: [x], role: nuisance, when: {b: y}}", "when: b must list the values"),
        ("3", "must map low, high, log, step, choices, role, when to values, got 3"),
    ],
)
def test_wrong_entry_is_refused_by_file_and_key(tmp_path: Path, entry: str, message: str) -> None:
    name = written(tmp_path, f"a.lr: {entry}")
    with pytest.raises(SpaceError, match=re.escape(message)) as error:
        load_space(name)
    assert str(error.value).startswith(f"{name}: a.lr: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("question: [", "must be YAML"),
        ("a: 1\na: 2", "must be YAML"),
        ("[1, 2]", "must be a mapping of question and parameters"),
        ("", "question must be the question to answer, got None"),
        ("question: Why?", "parameters must map config paths to bounds, got None"),
        ("question: Why?\nparameters: {}", "parameters must map config paths to bounds"),
        ("question: Why?\nparams: {}", "only question and parameters, got 'params' too"),
    ],
)
def test_file_without_a_space_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(SpaceError, match=message) as error:
        load_space(str(file))
    assert str(error.value).startswith(str(file))


def test_condition_on_a_later_parameter_is_refused(tmp_path: Path) -> None:
    late = "a: {choices: [x], role: nuisance, when: {b: [y]}}\nb: {choices: [y], role: scientific}"
    with pytest.raises(SpaceError, match="a parameter that comes earlier, got 'b'; move it up"):
        load_space(written(tmp_path, late))


def test_condition_on_an_impossible_value_is_refused(tmp_path: Path) -> None:
    never = (
        "b: {choices: [y], role: scientific}\na: {choices: [x], role: nuisance, when: {b: [z]}}"
    )
    with pytest.raises(SpaceError, match=r"values that it can have, got 'z'.*choose from \[y\]"):
        load_space(written(tmp_path, never))


def test_unknown_config_path_is_refused_with_the_closest(tmp_path: Path) -> None:
    name = written(tmp_path, "distil.optimizer.lr: {low: 1e-4, high: 1e-2, role: nuisance}")
    with pytest.raises(SpaceError, match=r"did you mean 'distill\.optimizer\.lr'\?"):
        check_space(load_space(name), DEFAULTS.__getitem__, DEFAULTS)
    with pytest.raises(SpaceError, match=r"got 'distil\.optimizer\.lr'$"):
        check_space(load_space(name), DEFAULTS.__getitem__)


def test_condition_on_an_unknown_config_path_is_refused(tmp_path: Path) -> None:
    name = written(
        tmp_path, "refine.depth: {low: 1, high: 3, role: scientific, when: {refine.kind: [a]}}"
    )
    with pytest.raises(SpaceError, match=r"mine: refine\.depth: .*got 'refine\.kind'"):
        check_space(load_space(name), DEFAULTS.__getitem__, DEFAULTS)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("refine.depth: {low: 3, high: 5, role: scientific}", r"got 2, which is not in 3 to 5"),
        ("refine.width: {low: 32, high: 96, step: 64, role: nuisance}", "32 to 96 in steps of 64"),
        ("refine.loss: {choices: [smooth_l1], role: scientific}", r"not in \[smooth_l1\]"),
    ],
)
def test_config_value_outside_the_space_is_refused(
    tmp_path: Path, entry: str, message: str
) -> None:
    name = written(tmp_path, entry)
    with pytest.raises(SpaceError, match=message) as error:
        check_space(load_space(name), KNOWN.__getitem__)
    assert "widen the space, or change the value (refine." in str(error.value)


def test_value_of_an_inactive_parameter_may_be_outside(tmp_path: Path) -> None:
    name = written(
        tmp_path,
        "distill.heatmap.tau: {low: 1.0, high: 2.0, role: nuisance, "
        "when: {distill.heatmap.kind: [kl]}}",
    )
    check_space(load_space(name), KNOWN.__getitem__)
    with pytest.raises(SpaceError, match=r"got 0\.1, which is not in 1\.0 to 2\.0"):
        check_space(load_space(name), {**KNOWN, "distill.heatmap.kind": "kl"}.__getitem__)


@pytest.mark.parametrize(
    ("entry", "advice"),
    [
        ("refine.teacher_weight: {low: 1, high: 2, role: nuisance}", "with a decimal point"),
        ("refine.depth: {low: 1.0, high: 3.0, role: nuisance}", "as whole numbers"),
        ("refine.loss: {low: 1.0, high: 3.0, role: nuisance}", "give values of that type"),
        ("refine.depth: {choices: ['2'], role: nuisance}", "give values of that type"),
    ],
)
def test_values_of_another_type_than_the_config_are_refused(
    tmp_path: Path, entry: str, advice: str
) -> None:
    with pytest.raises(SpaceError, match=advice):
        check_space(load_space(written(tmp_path, entry)), KNOWN.__getitem__)


def test_spaces_import_no_model_no_ray_and_no_study() -> None:
    script = (
        "import sys, search_spaces.space\n"
        "print([name for name in ('torch', 'ray', 'models', 'study') if name in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"
