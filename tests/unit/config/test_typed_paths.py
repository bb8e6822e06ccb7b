"""Paths mean what people type: home folders, any letters, and one spelling of an accent."""

from __future__ import annotations

import argparse
import unicodedata
from pathlib import Path

import pytest

from study.config.compose import compose, value_at
from study.config.study_paths import check_paths, with_absolute_paths, with_typed_paths
from study.config.typed_paths import FROM_HERE, IN_ROOT, needs_root, typed_path
from study.errors import InputError

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def value_for(setting: str) -> str:
    """Return a path in the home folder that this setting accepts."""
    is_yaml = setting.endswith(("skeleton", "search_space"))
    return "~/x" + (".yaml" if is_yaml else ".json" if setting == "refine.start" else "")


@pytest.mark.parametrize("setting", [*FROM_HERE, *IN_ROOT])
def test_home_folder_is_found_in_every_path(setting: str, home: Path) -> None:
    value = value_for(setting)
    untrained = ["teacher.epochs=0", "teacher.init=weights"]
    config = compose(["data=coco", *untrained, f"{setting}={value}"])
    assert value_at(config, setting) == value  # study.yaml keeps what was typed
    expected = str(home / value[2:])
    assert value_at(with_absolute_paths(config), setting) == expected
    assert value_at(with_typed_paths(config), setting) == expected


def test_home_folder_is_found_in_a_list(home: Path) -> None:
    config = with_absolute_paths(compose(["search.warm_start=[~/a, ~/b c]"]))
    assert config.search.warm_start == [f"{home}/a", f"{home}/b c"]


def test_words_and_addresses_are_no_paths() -> None:
    words = ["teacher.init=random", "student.init=random", "refine.start=jitter"]
    address = "data.store=s3://bucket/x"
    config = with_absolute_paths(compose([*words, address, "search_space=joint"]))
    assert (config.teacher.init, config.student.init) == ("random", "random")
    assert (config.refine.start, config.data.store) == ("jitter", "s3://bucket/x")
    assert (config.search_space, config.data.skeleton) == ("joint", "coco")
    assert config.data.val.detections is None


@pytest.mark.parametrize(
    "path", ["/data/caf\u00e9", "/my data/x", "/a=b", "/x (1)/[y]", "/it's", "/\u4eba", "/a&b!"]
)
def test_path_of_any_letters_needs_no_quotes(path: str) -> None:
    assert compose(["data=coco", f"data.root={path}"]).data.root == path
    quoted = "'" + path.replace("'", "\\'") + "'"
    assert compose(["data=coco", f"data.root={quoted}"]).data.root == path


def test_other_settings_keep_the_rules_of_their_values() -> None:
    with pytest.raises(InputError, match="must be written key=value"):
        compose(["teacher.codec=a=b"])


@pytest.mark.parametrize(
    ("typed", "on_disk"), [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED), (COMPOSED, COMPOSED)]
)
def test_accent_in_either_spelling_is_found(typed: str, on_disk: str, tmp_path: Path) -> None:
    file = tmp_path / on_disk / "annotations" / f"{on_disk}.json"
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    inside = f"data.train.annotations=annotations/{typed}.json"
    config = compose(["data=coco", f"data.root={tmp_path / typed}", inside])
    absolute = with_absolute_paths(config)
    assert absolute.data.root == str(tmp_path / on_disk)
    assert absolute.data.train.annotations == f"annotations/{on_disk}.json"
    notes: list[str] = []
    check_paths(config, absolute, notes.append)
    named = [note.partition("=")[0] for note in notes]
    assert named == ([] if typed == on_disk else ["data.root", "data.train.annotations"])
    assert typed_path(str(tmp_path / typed)) == tmp_path / on_disk


def test_two_files_that_differ_in_spelling_alone_stay_two(tmp_path: Path) -> None:
    for name in (COMPOSED, DECOMPOSED):
        (tmp_path / name).mkdir()
    assert typed_path(str(tmp_path / COMPOSED)) == tmp_path / COMPOSED
    assert typed_path(str(tmp_path / DECOMPOSED)) == tmp_path / DECOMPOSED


@pytest.mark.parametrize(
    "override",
    [
        r"data.root=C:\data\coco",
        r"data.train.annotations=annotations\train.json",
        r"teacher.init=..\weights\teacher.pth",
        r"storage=D:\studies",
    ],
)
def test_path_of_windows_is_refused_by_its_setting(override: str) -> None:
    config = compose(["data=coco", override])
    with pytest.raises(InputError) as refused:
        check_paths(config, with_absolute_paths(config), print)
    setting = override.partition("=")[0]
    assert str(refused.value) == (
        f"{setting} must be a path of this machine, with / between folders, got {override}, "
        "which is written for Windows; change it to the path here"
    )


def test_file_whose_name_has_a_backslash_is_used(tmp_path: Path) -> None:
    (tmp_path / "a\\b").mkdir()
    config = compose(["data=coco", f"data.root='{tmp_path}/a\\b'"])
    absolute = with_absolute_paths(config)
    check_paths(config, absolute, print)
    assert absolute.data.root == f"{tmp_path}/a\\b"


def test_folder_of_the_data_is_needed_for_relative_paths_alone() -> None:
    absolute = [f"{setting}=/x/{setting}" for setting in IN_ROOT]
    assert not needs_root(with_absolute_paths(compose(["data=coco", *absolute])).data)
    assert not needs_root(with_absolute_paths(compose(["data=coco", *absolute[:4]])).data)
    for setting in IN_ROOT:
        one = [*absolute, f"{setting}=relative"]
        assert needs_root(with_absolute_paths(compose(["data=coco", *one])).data)


def test_unknown_home_is_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert typed_path("~nobody-of-this-name/x") == Path("~nobody-of-this-name/x")


@pytest.mark.parametrize("command", ["analyze", "dataset", "export", "predict"])
def test_commands_find_the_home_folder(
    command: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds: list[object] = []
    add_argument = argparse.ArgumentParser.add_argument

    def noted(parser: argparse.ArgumentParser, *names: str, **options: object) -> object:
        kinds.append(options.get("type"))
        return add_argument(parser, *names, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(argparse.ArgumentParser, "add_argument", noted)
    module = __import__(f"study.{command}", fromlist=["main"])
    with pytest.raises(SystemExit):
        module.main(["--help"])
    assert typed_path in kinds and Path not in kinds
    assert typed_path("~/x") == home / "x"
