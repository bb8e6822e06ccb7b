"""``study.yaml``: what a study is run with, held against what it was begun with."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from study.config.compose import MAY_CHANGE, flatten, to_plain, with_current_paths
from study.config.schema import StudyConfig
from study.errors import InputError
from study.storage.files import write_atomic
from study.storage.paths import settings_file


def check_settings(config: StudyConfig, folder: Path) -> None:
    """Returns if the folder is new or its study was made with these settings.

    Raises:
        InputError: shows the settings that differ.
    """
    file = settings_file(folder)
    if not file.exists():
        return
    old, new = flatten(read_settings(folder)["config"]), flatten(to_plain(config))
    differing = [
        f"  {path}: {old.get(path)} in the study, {new.get(path)} now"
        for path in sorted({*old, *new})
        if old.get(path) != new.get(path) and path not in MAY_CHANGE
    ]
    if differing:
        raise InputError(
            f"the study in {folder} was made with other settings:\n"
            + "\n".join(differing)
            + "\ngive this study a folder of its own by name=..., or use the old settings"
        )


def write_settings(config: StudyConfig, folder: Path, data_fingerprint: str, teacher: str) -> None:
    """Write ``study.yaml``.

    Args:
        teacher: name of the teacher's folder in the cache.

    Raises:
        InputError: the data are not those that the study was made with.
    """
    file = settings_file(folder)
    if file.exists():
        known = read_settings(folder)["data_fingerprint"]
        if known != data_fingerprint:
            raise InputError(
                f"the data of the study in {folder} have changed since it was begun "
                f"(fingerprint {known}, now {data_fingerprint}); give the new data a study of "
                "their own by name=..."
            )
    content: Mapping[str, Any] = {
        "config": to_plain(config),
        "command": shlex.join(sys.argv),
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("torch", "ray", "optuna", "numpy")},
        },
        "git_commit": _git_commit(),
        "data_fingerprint": data_fingerprint,
        "teacher": teacher,
    }
    write_atomic(file, OmegaConf.to_yaml(OmegaConf.create(dict(content))))


def _git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def read_settings(folder: Path) -> dict[str, Any]:
    """What ``study.yaml`` says.

    Raises:
        InputError: the folder is no study, or the file is not as a study wrote it.
    """
    file = settings_file(folder)
    try:
        content = OmegaConf.to_container(OmegaConf.load(file))
    except OSError:
        raise InputError(
            f"{folder} must be a study's folder, <storage>/<name>, with {file.name} in it"
        ) from None
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError):
        content = None
    if not isinstance(content, dict) or not isinstance(content.get("config"), dict):
        raise InputError(
            f"{file} must hold the settings that a study wrote there, got something "
            "else; put the file back as it was, or name another folder"
        )
    return {**content, "config": with_current_paths(content["config"])}
