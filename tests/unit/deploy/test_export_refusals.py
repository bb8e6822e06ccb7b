"""Refused exports: the message has the cause, and no file is written."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from search_spaces.space import SearchSpace
from study.cache.prepare import PreparedData
from study.config.compose import to_plain, with_values
from study.config.schema import StudyConfig
from study.export import main
from study.storage.checkpoint import Checkpoints
from study.storage.paths import trial_folder
from study.storage.tables import write_trial

SPACE = SearchSpace("made_up", "What is left?", ())
BASELINE, WINNER, FAILED, PRUNED, GONE = range(5)


@pytest.fixture
def study(mini_config: StudyConfig, mini_data: PreparedData, tmp_path: Path) -> Path:
    """A study's folder with a trial of each fate; of trial GONE nothing but its row is left."""
    folder = Path(mini_config.storage) / tmp_path.name
    folder.mkdir()
    config = with_values(mini_config, {"name": folder.name})
    settings: dict[str, Any] = {"config": to_plain(config), "git_commit": None, "versions": {}}
    settings["data_fingerprint"] = mini_data.fingerprint
    OmegaConf.save(OmegaConf.create(settings), folder / "study.yaml")
    states = {WINNER: "COMPLETE", BASELINE: "COMPLETE", PRUNED: "PRUNED", GONE: "COMPLETE"}
    for number, state in states.items():
        report = {"study": "made", "trial": number, "stage": "distill", "epoch": 1}
        report["val_ap"] = 0.5 if number == WINNER else 0.1
        row = {"study": "made", "trial": number, "control": None, "state": state, "seed": 7}
        row |= {"best_epoch": 1, "objective": report["val_ap"], "gpu_s": 0.0, "node": "here"}
        write_trial(folder, row, [report], SPACE)
        if number != GONE:
            checkpoints = Checkpoints(trial_folder(folder, number))
            checkpoints.save({"weight": torch.zeros(1)}, {}, [report])
    failed = {"trial": FAILED, "control": None, "state": "FAIL", "error": "Traceback\nno memory"}
    write_trial(folder, failed, [], SPACE)
    return folder


def refusal(study: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """The error that the script ends with; it leaves no file behind."""
    before = sorted(study.rglob("*")) if study.exists() else []
    with pytest.raises(SystemExit) as raised:
        main([str(study), *options])
    text = str(raised.value.code)
    assert text.startswith("error: ")
    assert (sorted(study.rglob("*")) if study.exists() else []) == before
    return text


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--trial", "9"], "finished trials, 0 to 4, got --trial 9"),
        (["--trial", str(FAILED)], "trial 2 failed and can't be exported (no memory)"),
        (["--trial", str(GONE)], "the checkpoint of trial 4 is missing from"),
    ],
)
def test_trial_without_weights_is_refused(
    study: Path, capsys: pytest.CaptureFixture[str], options: list[str], expected: str
) -> None:
    assert expected in refusal(study, capsys, *options)


def test_checkpoint_that_does_not_fit_is_named(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = trial_folder(study, WINNER) / "epoch-001" / "model.safetensors"
    file.write_bytes(b"no weights")
    assert f"{file.parent} must hold the weights of trial 1" in refusal(study, capsys)


def test_folder_that_is_no_study_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "must be a study's folder" in refusal(tmp_path / "nowhere", capsys)
    assert "must be a study's folder" in refusal(tmp_path, capsys)


def test_study_without_a_finished_trial_is_refused(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(study / "results" / "trials")
    assert "must hold a finished trial" in refusal(study, capsys)


def test_study_whose_trials_all_failed_or_were_pruned_has_no_winner(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (WINNER, BASELINE, GONE):
        (study / "results" / "trials" / f"{number:05d}.parquet").unlink()
    assert "name a pruned one with --trial N" in refusal(study, capsys)
