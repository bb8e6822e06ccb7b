"""study.yaml: what is written, what is compared, and settings of older versions."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from study.config.compose import compose, from_plain
from study.config.schema import RENAMED
from study.errors import InputError
from study.storage.paths import settings_file
from study.storage.study_file import check_contents, check_settings, read_settings, write_settings

OLD_VALUES = {
    "data.num_train_images": 12,
    "data.num_val_images": 4,
    "distill.augment.color": 0.3,
    "refine.augment.color": 0.1,
}
"""A value for each renamed setting, by today's path."""
OVERRIDES = [f"{path}={value}" for path, value in OLD_VALUES.items()]


@pytest.fixture
def older(tmp_path: Path) -> Path:
    """A folder whose study.yaml has the former names of all renamed settings."""
    write_settings(compose(OVERRIDES), tmp_path, "data", "teacher-1", {})
    file = settings_file(tmp_path)
    text = file.read_text()
    for old, new in RENAMED.items():
        text = text.replace(f"{new.rpartition('.')[2]}:", f"{old.rpartition('.')[2]}:")
    file.write_text(text)
    return tmp_path


def test_written_settings_are_read_and_pass_the_check(tmp_path: Path) -> None:
    config = compose(["seed=7"])
    write_settings(config, tmp_path, "data", "teacher-1", {})
    content = read_settings(tmp_path)
    assert from_plain(content["config"]) == config
    assert content["data_fingerprint"] == "data"
    assert content["teacher"] == "teacher-1"
    assert set(content["versions"]) == {"python", "torch", "ray", "optuna", "numpy"}
    check_settings(config, tmp_path)


def test_only_study_yaml_is_left_in_the_folder(tmp_path: Path) -> None:
    for _ in range(2):
        write_settings(compose(), tmp_path, "data", "teacher-1", {})
    assert list(tmp_path.iterdir()) == [settings_file(tmp_path)]


def test_folder_without_a_study_passes_the_check(tmp_path: Path) -> None:
    check_settings(compose(), tmp_path)


def test_settings_that_may_change_pass_the_check(tmp_path: Path) -> None:
    write_settings(compose(), tmp_path, "data", "teacher-1", {})
    check_settings(compose(["search.trials=99", "trial.cpus=2", "display=plain"]), tmp_path)


def test_changed_settings_are_refused_by_name(tmp_path: Path) -> None:
    write_settings(compose(["seed=1"]), tmp_path, "data", "teacher-1", {})
    with pytest.raises(InputError, match="seed: 1 in the study, 2 now") as caught:
        check_settings(compose(["seed=2", "refine.width=16"]), tmp_path)
    assert "refine.width: " in str(caught.value)


def test_changed_data_are_refused(tmp_path: Path) -> None:
    write_settings(compose(), tmp_path, "before", "teacher-1", {})
    with pytest.raises(InputError, match="fingerprint before, now after"):
        write_settings(compose(), tmp_path, "after", "teacher-1", {})
    assert read_settings(tmp_path)["data_fingerprint"] == "before"


def test_changed_file_of_a_setting_is_refused(tmp_path: Path) -> None:
    contents = {"teacher.init": "1", "student.init": "2"}
    check_contents(tmp_path, contents)  # the study has not begun
    write_settings(compose(), tmp_path, "data", "teacher-1", contents)
    check_contents(tmp_path, contents)
    with pytest.raises(InputError, match=r"must not change, but that of student\.init has"):
        check_contents(tmp_path, contents | {"student.init": "3"})


def test_study_of_a_version_that_recorded_no_files_passes(tmp_path: Path) -> None:
    write_settings(compose(), tmp_path, "data", "teacher-1", {"teacher.init": "0"})
    with pytest.raises(InputError, match=r"teacher\.init"):
        check_contents(tmp_path, {"teacher.init": "1"})
    file = settings_file(tmp_path)
    content = OmegaConf.load(file)
    del content["files"]
    OmegaConf.save(content, file)
    check_contents(tmp_path, {"teacher.init": "1"})


def test_older_file_is_read_under_the_settings_names_of_today(older: Path) -> None:
    text = settings_file(older).read_text()
    assert "train_pictures: 12" in text and text.count("colour:") == 2
    assert "num_train_images" not in text and "color:" not in text
    config = from_plain(read_settings(older)["config"])
    assert config == compose(OVERRIDES)


def test_older_study_passes_the_check_and_refuses_another_value(older: Path) -> None:
    check_settings(compose(OVERRIDES), older)
    for path in OLD_VALUES:
        others = [text for text in OVERRIDES if not text.startswith(f"{path}=")]
        with pytest.raises(InputError, match=f"{path}: "):
            check_settings(compose(others), older)


@pytest.mark.parametrize("content", ["", "[1, 2]", "config: 3", "config: [", "\x00"])
def test_file_without_settings_is_refused(tmp_path: Path, content: str) -> None:
    settings_file(tmp_path).write_text(content)
    with pytest.raises(InputError, match=r"study\.yaml must hold the settings"):
        read_settings(tmp_path)


def test_folder_that_is_no_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must be a study's folder"):
        read_settings(tmp_path / "nowhere")


def test_command_and_commit_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["study/tune.py", "data.root='/my data'"])
    write_settings(compose(), tmp_path, "data", "teacher-1", {})
    content = OmegaConf.to_container(OmegaConf.load(settings_file(tmp_path)))
    assert isinstance(content, dict)
    assert content["command"] == """study/tune.py 'data.root='"'"'/my data'"'"''"""
    assert content["git_commit"] is None or len(content["git_commit"]) == 40
