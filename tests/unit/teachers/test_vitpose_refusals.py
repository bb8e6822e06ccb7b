"""Folders that hold no usable ViTPose are refused before its library is loaded."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from models.skeleton import COCO
from study.errors import InputError
from study.teachers.vitpose import check_vitpose

SIZE = (96, 64)


def check(folder: Path, config: Any) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    check_vitpose(folder, COCO, SIZE)


def test_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json and safetensors, got teacher\.init="):
        check_vitpose(tmp_path, COCO, SIZE)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json and safetensors, got teacher\.init="):
        check_vitpose(tmp_path, COCO, SIZE)


def test_other_models_and_other_backbones_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # an import would fail
    with pytest.raises(InputError, match="got bert on None"):
        check(tmp_path, {"model_type": "bert"})
    with pytest.raises(InputError, match="got vitpose on resnet"):
        check(tmp_path, {"model_type": "vitpose", "backbone_config": {"model_type": "resnet"}})


def test_missing_library_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    config = {"model_type": "vitpose", "backbone_config": {"model_type": "vitpose_backbone"}}
    with pytest.raises(InputError, match=r"transformers, which is not installed.*\[vitpose\]"):
        check(tmp_path, config)
