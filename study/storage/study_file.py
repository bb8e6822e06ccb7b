"""``study.yaml``: the settings of a study, compared when its command runs again."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from collections.abc import Collection, Mapping
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

FILES = "files"
"""Key of the fingerprints of the files that settings name."""
SKELETONS_KEY = "skeletons"
"""Key of the content of the skeletons that are not built in."""


def check_settings(config: StudyConfig, folder: Path, same: Collection[str] = ()) -> None:
    """Check that a study in this folder was started with these settings.

    Settings in ``MAY_CHANGE`` may differ; a folder without ``study.yaml`` passes.

    Args:
        same: settings that name a file of the same content, wherever it is now.

    Raises:
        InputError: another setting differs; the message lists all that do.
    """
    file = settings_file(folder)
    if not file.exists():
        return
    old, new = flatten(read_settings(folder)["config"]), flatten(to_plain(config))
    differing = [
        f"  {path}: {old.get(path)} in the study, {new.get(path)} now"
        for path in sorted({*old, *new})
        if old.get(path) != new.get(path) and path not in (*MAY_CHANGE, *same)
    ]
    if differing:
        raise InputError(
            f"the study in {folder} was started with other settings:\n"
            + "\n".join(differing)
            + "\ngive this study its own folder with name=..., or use the study's settings"
        )


def check_contents(folder: Path, contents: Mapping[str, str]) -> None:
    """Check that a study in this folder was started with these files.

    A folder without ``study.yaml``, or one of a version that did not record them, passes.

    Args:
        contents: fingerprints of the files that settings name, by the setting.

    Raises:
        InputError: a file has another content; the message names its setting.
    """
    if not settings_file(folder).exists():
        return
    known = read_settings(folder).get(FILES) or {}
    if changed := [
        setting for setting, found in contents.items() if known.get(setting, found) != found
    ]:
        raise InputError(
            f"the files of the study in {folder} must not change, but that of "
            f"{' and '.join(changed)} has since it was started; restore it, or start a study of "
            "the new one with name=..."
        )


def write_settings(
    config: StudyConfig,
    folder: Path,
    data_fingerprint: str,
    teacher: str,
    contents: Mapping[str, str],
    skeletons: Mapping[str, Any] | None = None,
) -> None:
    """Write ``study.yaml``: settings, command line, versions, Git commit, data and teacher.

    Args:
        data_fingerprint: fingerprint of the prepared data.
        teacher: name of the teacher's folder in the cache.
        contents: fingerprints of the files that settings name, by the setting.
        skeletons: content of the skeletons that are not built in, by setting.

    Raises:
        InputError: the study was started with other data.
    """
    file = settings_file(folder)
    if file.exists():
        known = read_settings(folder)["data_fingerprint"]
        if known != data_fingerprint:
            raise InputError(
                f"the data of the study in {folder} must not change, but have since it was "
                f"started (fingerprint {known}, now {data_fingerprint}); restore the data, or "
                "start a study of the new ones with name=..."
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
        FILES: dict(contents),
        SKELETONS_KEY: dict(skeletons or {}),
    }
    write_atomic(file, OmegaConf.to_yaml(OmegaConf.create(dict(content))))


def _git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def read_settings(folder: Path) -> dict[str, Any]:
    """Return the content of ``study.yaml``, settings of older versions under today's paths.

    Raises:
        InputError: the folder has no ``study.yaml``, or the file holds no settings.
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
            f"{file} must hold the settings that a study wrote, got other content; restore the "
            "file, or name another folder"
        )
    return {**content, "config": with_current_paths(content["config"])}
