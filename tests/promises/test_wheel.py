"""The wheel holds every module and every YAML file, and nothing else; the script runs with it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("models", "search_spaces", "study")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to build from: setuptools leaves files of older builds where it builds."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    for package in PACKAGES:
        skipped = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, source / package, ignore=skipped)
    return source


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", target, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = target.glob("*.whl")
    return built


def test_wheel_holds_every_module_and_every_setting(wheel: Path, source: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    wanted = {
        file.relative_to(source).as_posix()
        for package in PACKAGES
        for suffix in ("py", "yaml")
        for file in (source / package).rglob(f"*.{suffix}")
    }
    assert {
        "study/config/study.yaml",
        "study/config/data/coco.yaml",
        "search_spaces/joint.yaml",
        "search_spaces/poses.yaml",
    } <= names
    assert names == wanted


def test_script_alone_runs_with_the_wheel(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    settings = site / "study" / "config" / "study.yaml"
    settings.write_text(settings.read_text().replace("\nseed: 0\n", "\nseed: 4713\n"))
    shutil.copy(ROOT / "study" / "tune.py", tmp_path)
    done = subprocess.run(
        [sys.executable, "tune.py", "--cfg", "data=coco"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert yaml.safe_load(done.stdout)["seed"] == 4713
