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

from omegaconf import OmegaConf

from study.config import MAY_CHANGE, InputError, flatten, to_plain
from study.prepare import StudyData
from study.schema import StudyConfig
from study.settings import SETTINGS, read_settings
from study.teacher import teacher_folder


def check_settings(config: StudyConfig, folder: Path) -> None:
    """Returns if the folder is new or its study was made with these settings.

    Raises:
        InputError: shows the settings that differ.
    """
    file = folder / SETTINGS
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


def write_settings(config: StudyConfig, folder: Path, data: StudyData) -> None:
    """Writes ``study.yaml``.

    Raises:
        InputError: the data are not those that the study was made with.
    """
    file = folder / SETTINGS
    if file.exists():
        known = read_settings(folder)["data_fingerprint"]
        if known != data.fingerprint:
            raise InputError(
                f"the data of the study in {folder} have changed since it was begun "
                f"(fingerprint {known}, now {data.fingerprint}); give the new data a study of "
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
        "data_fingerprint": data.fingerprint,
        "teacher": teacher_folder(config, data).name,
    }
    aside = folder / f".{SETTINGS}"
    OmegaConf.save(OmegaConf.create(dict(content)), aside)
    aside.replace(file)


def _git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
