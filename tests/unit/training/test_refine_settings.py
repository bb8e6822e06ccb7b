"""Settings reach the refiner, and an untrained refiner changes no AP."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from models.candidates import ROUNDS, LimbMessages
from models.refined_pose import RefinedPose
from models.skeleton import COCO, SKELETONS
from study.cache.crop_store import open_crop_store
from study.cache.prepare import PreparedData
from study.config.compose import value_at, with_values
from study.config.derived import resolve
from study.config.schema import StudyConfig
from study.training.evaluation import evaluate, predict_crops
from study.training.networks import build_distill_task, build_refiner
from study.workers import Workers


@pytest.mark.parametrize(
    ("path", "value", "found"),
    [
        ("levels", 2, lambda refiner: len(refiner.levels)),
        ("depth", 5, lambda refiner: len(refiner.levels[0].blocks)),
        ("width", 24, lambda refiner: refiner.levels[0].head.in_features),
        ("dropout", 0.3, lambda refiner: refiner.levels[0].enter.dropout.p),
        ("gate", False, lambda refiner: refiner.levels[0].gate is not None),
        ("candidates", 3, lambda refiner: refiner.num_candidates),
    ],
)
def test_each_setting_reaches_the_refiner(
    path: str, value: object, found: Callable[[Any], object], mini_config: StudyConfig
) -> None:
    assert value_at(mini_config, f"refine.{path}") != value
    config = with_values(mini_config, {f"refine.{path}": value})
    assert found(build_refiner(config.refine, resolve(config).skeleton, (7, 6, 5))) == value


@pytest.mark.parametrize("candidates", [2, 3])
@pytest.mark.parametrize("levels", [1, 3])
def test_settings_reach_the_chooser(
    candidates: int, levels: int, mini_config: StudyConfig
) -> None:
    values = {"refine.candidates": candidates, "refine.levels": levels, "refine.dropout": 0.3}
    changed = with_values(mini_config, values)
    refiner = build_refiner(changed.refine, resolve(changed).skeleton, (7, 6, 5))
    assert refiner.chooser is not None
    assert refiner.chooser.project.in_features == 5
    assert refiner.chooser.head.in_features == mini_config.refine.width
    rounds = [part for part in refiner.chooser.modules() if isinstance(part, LimbMessages)]
    assert [part.dropout.p for part in rounds] == [0.3] * ROUNDS


@pytest.mark.parametrize(("levels", "candidates"), [(1, 1), (2, 2), (3, 1), (3, 3)])
def test_untrained_refiner_changes_no_ap(
    levels: int,
    candidates: int,
    mini_config: StudyConfig,
    mini_data: PreparedData,
    easy: str,
    workers: Workers,
) -> None:
    store = open_crop_store(Path(mini_data.search))
    task = build_distill_task(
        mini_config.student, mini_config.distill, mini_config.trial, resolve(mini_config), seed=3
    )
    nn.init.normal_(task.student.final_layer.weight, std=1.0)
    config = dataclasses.replace(
        mini_config,
        refine=dataclasses.replace(mini_config.refine, levels=levels, candidates=candidates),
    )
    refiner = build_refiner(config.refine, resolve(config).skeleton, task.student.pyramid_channels)
    truth, skeleton = Path(mini_data.search_truth), SKELETONS[easy]
    estimators = [RefinedPose(task.student, task.codec, part).eval() for part in (None, refiner)]
    plain, refined = (
        evaluate(estimator, store, truth, skeleton, "coco", workers) for estimator in estimators
    )
    assert refined == plain and 0 < plain["ap"] < 1
    poses = [predict_crops(estimator, store, COCO, workers)[0] for estimator in estimators]
    assert (poses[0] == poses[1]).all()
