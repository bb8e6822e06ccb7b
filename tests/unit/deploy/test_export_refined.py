"""Exports of stage 2: selected by name, and checked with the poses that its trial started from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from models.build import load_export
from search_spaces.space import SearchSpace
from study.cache.crop_store import open_crop_store
from study.cache.prepare import PreparedData
from study.config.compose import to_plain, with_values
from study.config.derived import resolve
from study.config.schema import JITTER, StudyConfig
from study.data.crops import apply_affine, invert_affine
from study.export import main
from study.storage.checkpoint import Checkpoints
from study.storage.paths import trial_folder
from study.storage.tables import write_trial
from study.training.networks import build_distill_task, build_refine_task, build_refiner
from study.training.training_data import TrainingData
from study.workers import Workers

SPACE = SearchSpace("made_up", "What is refined?", ())
REFINED, PLAIN = 0, 1


def truth_file(data: PreparedData, file: Path) -> Path:
    """The truth of the search slice, as another method's results."""
    store = open_crop_store(Path(data.search))
    image = apply_affine(store.keypoints_stored, invert_affine(store.image_to_stored))
    entries = [
        {
            "image_id": int(store.image_ids[row]),
            "category_id": 1,
            "score": 0.5,
            "annotation_id": int(store.annotation_ids[row]),
            "keypoints": [value for x, y in pose.tolist() for value in (x, y, 0.5)],
        }
        for row, pose in enumerate(image)
    ]
    file.write_text(json.dumps(entries))
    return file


def made(
    config: StudyConfig, data: PreparedData, folder: Path, workers: Workers, shake: float
) -> tuple[Path, float, float]:
    """Make a study with the trials REFINED (both stages) and PLAIN; return folder and both APs.

    Args:
        shake: spread of the refiner's random heads; with 0 it moves no joint.
    """
    torch.manual_seed(1)
    training_data = TrainingData.open(data, resolve(config), workers, None)
    distilled = build_distill_task(
        config.student, config.distill, config.trial, resolve(config), seed=1
    )
    torch.nn.init.normal_(distilled.student.final_layer.weight, std=0.1)  # type: ignore[arg-type]
    refiner = build_refiner(
        config.refine, resolve(config).skeleton, distilled.student.pyramid_channels
    )
    for level in refiner.levels:
        torch.nn.init.normal_(level.head.weight, std=shake)  # type: ignore[union-attr,arg-type]
    refined = build_refine_task(config.refine, distilled, refiner)
    aps = []
    for number, tasks in ((REFINED, (distilled, refined)), (PLAIN, (distilled,))):
        rows: list[dict[str, Any]] = []
        for epoch, task in enumerate(tasks, start=1):
            starts = training_data.starts(config.refine.start) if task is refined else None
            scores = training_data.score(task.estimator().eval(), starts)
            row = {"study": "made", "trial": number, "stage": task.name, "epoch": epoch}
            rows.append({**row, **{f"val_{name}": value for name, value in scores.items()}})
            Checkpoints(trial_folder(folder, number)).save(task.state_dict(), {}, rows)
        best = max(rows, key=lambda row: (row["val_ap"], -row["epoch"]))
        trial = {"study": "made", "trial": number, "control": None, "state": "COMPLETE", "seed": 7}
        trial |= {"best_epoch": best["epoch"], "objective": best["val_ap"], "node": "here"}
        write_trial(folder, {**trial, "gpu_s": 0.0}, rows, SPACE)
        aps += [row["val_ap"] for row in rows]
    settings: dict[str, Any] = {"config": to_plain(config), "git_commit": None, "versions": {}}
    settings["data_fingerprint"] = data.fingerprint
    OmegaConf.save(OmegaConf.create(settings), folder / "study.yaml")
    return folder, aps[0], aps[1]


def config_of(mini: StudyConfig, easy: str, folder: Path, start: str) -> StudyConfig:
    values = {"data.skeleton": easy, "name": folder.name, "refine.start": start}
    return with_values(mini, values)


@pytest.fixture
def folder(mini_config: StudyConfig, tmp_path: Path) -> Path:
    """A study's folder, next to the data that all studies of a storage share."""
    made = Path(mini_config.storage) / tmp_path.name
    made.mkdir()
    return made


def exported(study: Path, *options: str) -> dict[str, Any]:
    main([str(study), *options])
    info: dict[str, Any] = json.loads((study / "export" / "config.json").read_text())
    return info


def refusal(study: Path, *options: str) -> str:
    with pytest.raises(SystemExit) as raised:
        main([str(study), *options])
    return str(raised.value.code)


def test_refined_exports_stage_two_though_stage_one_is_better(
    mini_config: StudyConfig,
    mini_data: PreparedData,
    easy: str,
    folder: Path,
    workers: Workers,
) -> None:
    config = config_of(mini_config, easy, folder, JITTER)
    study, plain_ap, refined_ap = made(config, mini_data, folder, workers, shake=1.0)
    assert plain_ap > refined_ap
    info = exported(study)
    assert info["source"]["stage"] == "distill" and info["refiner"] is None
    info = exported(study, "--refined")
    assert (info["source"]["trial"], info["source"]["epoch"]) == (REFINED, 2)
    assert info["search"]["ap"] == refined_ap and info["refiner"]["mirror_pairs"] is True
    assert load_export(study / "export")[0].refiner is not None
    assert "trial 1 has no epoch of stage 2; choose another with --trial N, or no --refined" in (
        refusal(study, "--refined", "--trial", str(PLAIN))
    )


def test_export_of_given_poses_is_checked_from_their_file(
    mini_config: StudyConfig,
    mini_data: PreparedData,
    easy: str,
    folder: Path,
    workers: Workers,
    tmp_path: Path,
) -> None:
    file = truth_file(mini_data, tmp_path / "poses.json")
    config = config_of(mini_config, easy, folder, str(file))
    study, plain_ap, refined_ap = made(config, mini_data, folder, workers, shake=0.0)
    assert refined_ap > 0.99 > plain_ap  # the refiner does not move the true joints
    info = exported(study)
    assert info["source"]["stage"] == "refine" and info["search"]["ap"] == refined_ap
    file.unlink()
    assert (
        f"refine.start must be a JSON list of COCO keypoint results, got refine.start={file}"
        in (refusal(study))
    )
