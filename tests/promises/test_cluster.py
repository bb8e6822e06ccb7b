"""The cluster file passes Ray's own check, and the documented commands are valid."""

from __future__ import annotations

import copy
import re
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from study.config.compose import compose

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster" / "cluster.yaml"
READMES = [ROOT / "README.md", ROOT / "cluster" / "README.md"]
Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def cluster() -> dict[str, Any]:
    content = yaml.safe_load(CLUSTER.read_text())
    assert isinstance(content, dict)
    return content


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """Complete and check the config as ``ray up`` does before it requests machines."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    complete: dict[str, Any] = prepare_config(copy.deepcopy(config))
    validate_config(complete)
    return complete


def typed_commands() -> list[str]:
    """Return every command line in the READMEs' shell blocks that begins with ``ray``."""
    blocks = [re.findall(r"```sh\n(.*?)```", file.read_text(), re.DOTALL) for file in READMES]
    lines = [line.strip() for file in blocks for block in file for line in block.splitlines()]
    return [line for line in lines if line.startswith("ray ")]


def parsed(command: str) -> dict[str, Any]:
    """Parse a command as Ray's command line does."""
    from ray.scripts.scripts import cli

    _, name, *arguments = shlex.split(command)
    context = cli.commands[name].make_context(name, arguments)
    return dict(context.params)


def test_cluster_file_passes_rays_own_check(cluster: dict[str, Any]) -> None:
    complete = prepared(cluster)
    assert complete["head_node_type"] == "head"
    assert complete["available_node_types"]["gpu_worker"]["max_workers"] > 0


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.update(max_worker=4),
        lambda config: config.update(max_workers="many"),
        lambda config: config.update(head_node_type="heat"),
        lambda config: config["provider"].pop("type"),
        lambda config: config["docker"].update(imag="x"),
        lambda config: config["available_node_types"]["head"].pop("node_config"),
        lambda config: config["available_node_types"]["head"]["resources"].update(CPU=-1),
        lambda config: config["available_node_types"]["gpu_worker"].update(min_workers=99),
    ],
)
def test_broken_cluster_file_does_not_pass(cluster: dict[str, Any], change: Change) -> None:
    change(cluster)
    with pytest.raises((jsonschema.ValidationError, ValueError, KeyError)):
        prepared(cluster)


def test_mounted_paths_are_in_the_checkout(cluster: dict[str, Any]) -> None:
    assert [path for path in cluster["file_mounts"].values() if not (ROOT / path).exists()] == []


def test_mounted_paths_suffice_for_an_installation(cluster: dict[str, Any]) -> None:
    mounted = set(cluster["file_mounts"].values())
    assert mounted == {"models", "search_spaces", "study", "pyproject.toml", "README.md"}
    targets = {Path(target).parent.as_posix() for target in cluster["file_mounts"]}
    assert targets == {"~/pose-study"}
    assert "pip install -q -e ~/pose-study" in cluster["setup_commands"]


def test_head_runs_no_trial_and_joins_the_cluster(cluster: dict[str, Any]) -> None:
    assert cluster["available_node_types"]["head"]["resources"] == {"CPU": 0}
    assert any("RAY_ADDRESS=auto" in command for command in cluster["head_setup_commands"])


def test_workers_are_started_on_demand(cluster: dict[str, Any]) -> None:
    worker = cluster["available_node_types"]["gpu_worker"]
    assert worker["min_workers"] == 0
    assert worker["max_workers"] <= cluster["max_workers"]


def test_every_node_mounts_the_shared_folder(cluster: dict[str, Any]) -> None:
    assert any("mount -t nfs4" in command for command in cluster["initialization_commands"])
    assert "--volume=/shared:/shared" in cluster["docker"]["run_options"]
    for command in typed_commands():
        if command.startswith("ray submit"):
            config = compose(parsed(command)["script_args"])
            assert Path(config.storage).is_relative_to("/shared")
            assert Path(config.data.root).is_relative_to("/shared")


def test_images_have_supported_versions_of_ray_and_python(cluster: dict[str, Any]) -> None:
    for role in ("head_image", "worker_image"):
        ray, python = re.findall(r"ray:([\d.]+)-py(\d+)-", cluster["docker"][role])[0]
        assert tuple(map(int, ray.split("."))) >= (2, 60)
        assert int(python) >= 311
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert any(re.match(r"ray\[.*\]>=2\.60,", line) for line in project["dependencies"])
    assert project["requires-python"] == ">=3.11"


def test_every_documented_ray_command_is_valid() -> None:
    commands = typed_commands()
    assert {command.split()[1] for command in commands} >= {"up", "submit", "exec", "down"}
    for command in commands:
        assert (ROOT / parsed(command)["cluster_config_file"]) == CLUSTER


def test_documented_submit_passes_settings_to_the_script() -> None:
    commands = [command for command in typed_commands() if command.startswith("ray submit")]
    assert len(commands) >= len(READMES)
    for command in commands:
        meant = parsed(command)
        assert meant["script"] == "study/tune.py"
        config = compose(meant["script_args"])
        assert (config.data.kind, config.trial.gpus) == ("coco", 1.0)
