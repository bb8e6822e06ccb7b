"""Composition of the settings: files, overrides, and messages for what is refused."""

from __future__ import annotations

import re
import typing
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from search_spaces import space
from study.config.compose import (
    compose,
    config_paths,
    flatten,
    from_plain,
    group_names,
    to_plain,
    value_at,
    with_values,
)
from study.config.schema import RENAMED, StudyConfig
from study.errors import InputError

ROOT = Path(__file__).resolve().parents[3]
CONF = ROOT / "study" / "config"
GROUPS = sorted(file.stem for file in (CONF / "data").glob("*.yaml"))
SPACES = sorted(file.stem for file in (ROOT / "search_spaces").glob("*.yaml"))


@pytest.fixture(scope="module")
def config() -> StudyConfig:
    return compose()


def refused(*overrides: str) -> str:
    """Return the error message for these overrides."""
    with pytest.raises(InputError) as error:
        compose(overrides)
    return str(error.value)


def schema_paths(kind: Any = StudyConfig, prefix: str = "") -> list[str]:
    types = typing.get_type_hints(kind)
    paths: list[str] = []
    for field in fields(kind):
        path = f"{prefix}{field.name}"
        child = types[field.name]
        paths += schema_paths(child, f"{path}.") if is_dataclass(child) else [path]
    return paths


def test_folder_holds_only_the_study_and_its_data_groups() -> None:
    assert [file.name for file in CONF.glob("*.yaml")] == ["study.yaml"]
    assert group_names("data") == GROUPS
    assert {"drawn", "coco", "crowdpose"} <= set(GROUPS)


@pytest.mark.parametrize("group", GROUPS)
def test_every_data_group_is_composed_and_checked(group: str) -> None:
    config = compose([f"data={group}"])
    kind = group.removesuffix("_full")
    assert config.data.kind == kind
    assert config.name == (f"{group}-joint-joint" if kind == group else group)
    assert config_paths(config) == schema_paths()


def test_official_file_names_are_the_defaults() -> None:
    coco, crowdpose = compose(["data=coco"]).data, compose(["data=crowdpose"]).data
    assert coco.val.annotations == "annotations/person_keypoints_val2017.json"
    assert (coco.train.images, coco.val.images) == ("train2017", "val2017")
    assert crowdpose.train.annotations == "json/crowdpose_train.json"
    assert (coco.skeleton, crowdpose.skeleton) == ("coco", "crowdpose")


def test_schema_has_no_value_that_the_yaml_does_not_set(config: StudyConfig) -> None:
    written = flatten(OmegaConf.to_container(OmegaConf.load(CONF / "study.yaml")))  # type: ignore[arg-type]
    drawn = flatten(OmegaConf.to_container(OmegaConf.load(CONF / "data" / "drawn.yaml")))  # type: ignore[arg-type]
    set_paths = {*written, *drawn}
    assert [path for path in config_paths(config) if path not in set_paths] == []


@pytest.mark.parametrize("group", ["coco", "crowdpose", "drawn"])
@pytest.mark.parametrize("name", SPACES)
def test_every_space_fits_the_settings_of_every_data_group(name: str, group: str) -> None:
    config = compose([f"data={group}", f"search_space={name}"])
    loaded = space.load_space(name)
    space.check_space(loaded, partial(value_at, config), config_paths(config))
    for parameter in loaded.parameters:
        for value in parameter.probes():
            assert value_at(with_values(config, {parameter.path: value}), parameter.path) == value


def test_overrides_change_what_they_name_and_nothing_else(config: StudyConfig) -> None:
    changed = compose(["distill.optimizer.lr=1e-4", "data.input_size=[64,32]", "refine.gate=no"])
    old, new = flatten(to_plain(config)), flatten(to_plain(changed))
    assert {path: new[path] for path in new if new[path] != old[path]} == {
        "distill.optimizer.lr": 0.0001,
        "data.input_size": [64, 32],
        "refine.gate": False,
    }


def test_refine_takes_its_augmentation_from_distill_unless_it_is_set() -> None:
    assert compose(["distill.augment.flip=0"]).refine.augment.flip == 0
    config = compose(["distill.augment.flip=0", "refine.augment.flip=0.25"])
    assert (config.distill.augment.flip, config.refine.augment.flip) == (0, 0.25)


def test_study_is_named_for_data_plan_and_space() -> None:
    assert compose(["data=coco", "search_space=refine"]).name == "coco-joint-refine"
    assert compose(["search_space=/some/where/mine.yaml"]).name == "drawn-joint-mine"
    assert compose(["search_space=/some/where/mine.yaml", "name=other"]).name == "other"


def test_value_in_quotes_may_hold_any_character(config: StudyConfig) -> None:
    assert compose(["data.root='/a=b, (c) [d]'"]).data.root == "/a=b, (c) [d]"


def test_settings_survive_a_round_trip_through_yaml(config: StudyConfig, tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    OmegaConf.save(OmegaConf.create(to_plain(config)), file)
    plain = OmegaConf.to_container(OmegaConf.load(file))
    assert isinstance(plain, dict)
    again = from_plain({str(key): value for key, value in plain.items()})
    assert again == config
    assert from_plain(to_plain(again)) == again


def test_changed_settings_leave_the_old_ones_as_they_are(config: StudyConfig) -> None:
    before = to_plain(config)
    changed = with_values(config, {"refine.depth": 5, "distill.optimizer.lr": 0.5})
    assert (changed.refine.depth, changed.distill.optimizer.lr) == (5, 0.5)
    assert to_plain(config) == before
    assert with_values(changed, {"refine.depth": 2, "distill.optimizer.lr": 1e-3}) == with_values(
        config, {"refine.depth": 2, "distill.optimizer.lr": 1e-3}
    )


def test_every_path_has_its_value(config: StudyConfig) -> None:
    flat = flatten(to_plain(config))
    assert {path: value_at(config, path) for path in flat} == flat


@pytest.mark.parametrize("path", ["nothing", "refine.nothing", "refine", "seed.x", "seed."])
def test_value_at_a_path_without_a_setting_raises_key_error(
    config: StudyConfig, path: str
) -> None:
    with pytest.raises(KeyError, match=re.escape(path)):
        value_at(config, path)


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("distil.optimizer.lr=1", "did you mean distill.optimizer.lr?"),
        ("distill.optimizer.lt=1", "did you mean distill.optimizer.lr?"),
        ("trials=9", "did you mean search.trials or confirm.trials?"),
        ("tau=9", "did you mean distill.heatmap.tau?"),
        ("lr=9", "did you mean teacher.optimizer.lr or distill.optimizer.lr or refine.optim"),
        ("qwerty=9", "--cfg lists all settings"),
        ("hydra.run.dir=/tmp", "--cfg lists all settings"),
        ("seed.x=9", "did you mean"),
    ],
)
def test_unknown_override_is_named_with_the_closest(override: str, hint: str) -> None:
    message = refused("refine.depth=3", override)
    assert message.startswith(f"unknown setting {override.partition('=')[0]}; {hint}")
    assert "\n" not in message


@pytest.mark.parametrize(
    "override",
    [
        "refine.depth",
        "=3",
        "",
        "a b=3",
        "refine.depth==3",
        "+refine.depth=3",
        "++refine.depth=3",
        "~refine.depth",
        "~data",
        "data@other=coco",
    ],
)
def test_malformed_override_is_quoted_in_the_message(override: str) -> None:
    message = refused(override)
    assert message.startswith(f"a setting must be written key=value, got {override!r}; ")
    assert "\n" not in message


@pytest.mark.parametrize("override", ["refine.depth=1,2", "seed=range(1,3)", "data=coco,drawn"])
def test_several_values_are_refused_with_a_hint_at_search_spaces(override: str) -> None:
    assert re.match(r"[\w.]+ must have one value, got .*search_space", refused(override))


@pytest.mark.parametrize("value", ["cocoo", "null", "3", "../../etc", "study"])
def test_unknown_data_group_is_refused_with_the_known_ones(value: str) -> None:
    message = refused(f"data={value}")
    assert message.startswith(f"data must be one of {', '.join(GROUPS)}, got data=")
    assert ("did you mean coco?" in message) == (value == "cocoo")


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("distill.epochs=many", "a whole number: Value 'many'"),
        ("distill.epochs=1.5", "a whole number: Value '1.5'"),
        ("search.trials=true", "a whole number: Value 'True'"),
        ("distill.optimizer.lr=fast", "a number: Value 'fast'"),
        ("distill.optimizer.lr=[1]", r"a number: Value '\[1\]'"),
        ("distill.optimizer.lr=null", "a number: got null"),
        ("search.constraints.latency_ms=fast", "a number, or null: Value 'fast'"),
        ("data.store=[a]", "text, or null: "),
        ("refine.gate=maybe", "true or false: Value 'maybe'"),
        ("student.init=null", "text: got null"),
        ("data.input_size=128", r"two whole numbers, \[height,width\]: "),
        ("data.input_size=[a,b]", r"two whole numbers, \[height,width\]: Value 'a'"),
    ],
)
def test_wrong_type_names_the_setting(override: str, wanted: str) -> None:
    message = refused(override)
    assert re.match(rf"{override.partition('=')[0]} must be {wanted}", message)
    assert "\n" not in message


@pytest.mark.parametrize("override", ["student=tiny", "distill=3", "data.train=here"])
def test_value_for_a_whole_section_names_the_section(override: str) -> None:
    assert refused(override).startswith(f"{override.partition('=')[0]}: ")


def test_part_of_a_section_may_be_set_at_once() -> None:
    config = compose(["distill.optimizer={lr: 0.5}", "data={root: here}"])
    assert (config.distill.optimizer.lr, config.data.root, config.data.kind) == (
        0.5,
        "here",
        "drawn",
    )
    assert refused("distill.optimizer={lt: 1}").startswith(
        "unknown setting distill.optimizer.lt; did you mean distill.optimizer.lr?"
    )


def test_message_for_a_missing_value_shows_how_to_set_it() -> None:
    assert refused("data.root=???") == "data.root must have a value, got none; add data.root=..."


def test_several_faults_are_listed_together() -> None:
    message = refused(
        "refine.levels=4", "distill.heatmap.kind=mze", "search.trials=0", "data.input_size=[3,4]"
    )
    assert [line.split()[0] for line in message.splitlines()] == [
        "impossible",
        "distill.heatmap.kind",
        "search.trials",
        "refine.levels",
        "data.input_size",
    ]
    assert "did you mean mse?" in message


@pytest.mark.parametrize(
    "values", [{"refine.dept": 1}, {"nothing": 1}, {"refine.depth": "deep"}, {"refine.depth": 9}]
)
def test_values_that_do_not_fit_the_schema_are_refused(
    config: StudyConfig, values: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match=re.escape(next(iter(values)))):
        with_values(config, values)


def test_settings_of_another_version_are_refused(config: StudyConfig) -> None:
    plain = to_plain(config)
    with pytest.raises(InputError, match=r"unknown setting old"):
        from_plain({**plain, "old": 1})
    del plain["refine"]["depth"]
    with pytest.raises(InputError, match=r"refine\.depth must have a value"):
        from_plain(plain)


@pytest.mark.parametrize(
    "override",
    [
        "name=${python:1}",
        "name=${eval:1+1}",
        "name=${hydra:runtime.cwd}",
        "name=${nothing.here}",
        "distill.epochs=${distill.epochs}",
    ],
)
def test_nothing_but_settings_can_be_interpolated(override: str) -> None:
    assert refused(override).startswith(f"{override.partition('=')[0]}: ")


def test_a_setting_may_be_taken_from_another() -> None:
    assert compose(["distill.epochs=${refine.epochs}", "refine.epochs=7"]).distill.epochs == 7


@pytest.mark.parametrize(
    "override",
    ["student._target_=os.system", "student={_target_: os.system}", "_target_=builtins.exit"],
)
def test_no_setting_names_code_to_run(override: str) -> None:
    assert refused(override).startswith("unknown setting ")


def test_composing_twice_gives_the_same(config: StudyConfig) -> None:
    assert compose() == config


@pytest.mark.parametrize(("old", "new"), list(RENAMED.items()))
def test_former_name_of_a_setting_is_accepted(old: str, new: str) -> None:
    value = another_value(new)
    changed = compose([f"{old}={value}"])
    assert changed == compose([f"{new}={value}"])
    assert value_at(changed, new) == value


@pytest.mark.parametrize(("old", "new"), list(RENAMED.items()))
def test_nested_settings_are_read_under_their_former_names(old: str, new: str) -> None:
    value = another_value(new)
    plain = to_plain(compose([f"{new}={value}"]))
    section = plain
    for name in new.split(".")[:-1]:
        section = section[name]
    section[old.rpartition(".")[2]] = section.pop(new.rpartition(".")[2])
    assert value_at(from_plain(plain), new) == value
    assert old.rpartition(".")[2] in section  # the argument is unchanged


def another_value(path: str) -> Any:
    """Return a possible value of this setting other than its default."""
    default = value_at(compose(), path)
    return default + 3 if isinstance(default, int) else default / 2


def test_setting_with_bytes_that_are_no_text_is_refused() -> None:
    match = r"must be UTF-8 text, got 'data\.root=/data/\\udcff'; rename"
    with pytest.raises(InputError, match=match):
        compose(["data.root=/data/\udcff"])
