"""An export: the trial's own estimator in files that stand alone, or nothing at all."""

from __future__ import annotations

import json
import pickle
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from omegaconf import OmegaConf
from optuna.distributions import CategoricalDistribution, IntDistribution
from safetensors.torch import load_file, save_file

from models.build import load_export
from models.codecs.crop_frame import CropFrame
from models.skeleton import COCO
from search_spaces.space import Parameter, SearchSpace
from study import export
from study.cache.crop_store import open_crop_store
from study.cache.prepare import PreparedData
from study.config.compose import from_plain, to_plain, with_values
from study.config.derived import resolve
from study.config.schema import StudyConfig
from study.deploy.select_trial import relocate, select_trial
from study.display import Display
from study.export import export_study, main
from study.search.controls import trial_config
from study.storage.checkpoint import Checkpoint, Checkpoints
from study.storage.paths import trial_folder
from study.storage.study_file import read_settings
from study.storage.tables import write_final, write_trial
from study.training.batches import plain_batch
from study.training.evaluation import evaluate, predict_crops
from study.training.networks import build_distill_task, build_refiner, load_estimator
from study.training.refine import RefineTask
from study.workers import Workers

DEPTHS = Parameter("refine.depth", IntDistribution(1, 6), "scientific")
CODECS = Parameter("student.codec", CategoricalDistribution(("dark", "simcc")), "scientific")
FLIPS = Parameter("student.flip_test", CategoricalDistribution((False, True)), "scientific")
SPACE = SearchSpace("made_up", "How deep?", (DEPTHS, CODECS, FLIPS))
WINNER, BASELINE, FAILED, PRUNED, GONE, BINS = 1, 0, 2, 3, 4, 5
DEPTH = 1
FILES = {"README.md", "config.json", "model.safetensors"}


def score(config: StudyConfig, checkpoint: Checkpoint, data: PreparedData) -> float:
    """AP on the search slice, as a trial measures it."""
    estimator, workers = (
        load_estimator(
            checkpoint,
            config.student,
            config.distill,
            config.refine,
            config.trial,
            resolve(config),
        ),
        Workers(torch.device("cpu")),
    )
    store, truth = open_crop_store(Path(data.search)), Path(data.search_truth)
    return evaluate(estimator, store, truth, resolve(config).skeleton, "coco", workers)["ap"]


def add_trial(
    folder: Path, config: StudyConfig, data: PreparedData, number: int, **changes: Any
) -> float:
    """Add a trial of one epoch with random weights; return its AP."""
    row: dict[str, Any] = {"study": "made", "trial": number, "control": None, "state": "COMPLETE"}
    row |= {"seed": 7, "best_epoch": 1, "gpu_s": 0.0, "node": "here", **changes}
    config = trial_config(config, row)
    task: Any = build_distill_task(
        config.student, config.distill, config.trial, resolve(config), seed=number
    )
    # All other trials predict one corner, so that the winner has the highest AP.
    spread = 0.1 if number in (WINNER, PRUNED) else 0.0
    torch.nn.init.normal_(task.student.final_layer.weight, std=spread)
    if number == WINNER:
        refiner = build_refiner(
            config.refine, resolve(config).skeleton, task.student.pyramid_channels
        )
        task = RefineTask(task.student, task.codec, refiner, task.skeleton, config.refine)
        for parameter in refiner.parameters():  # or it moves no joint
            torch.nn.init.normal_(parameter, std=0.02)
    report = {"study": "made", "trial": number, "stage": task.name, "epoch": 1, "val_ap": 0.0}
    checkpoints = Checkpoints(trial_folder(folder, number))
    checkpoint = checkpoints.save(task.state_dict(), {}, [report])
    ap = score(config, checkpoint, data)
    report["val_ap"] = row["objective"] = ap
    shutil.rmtree(checkpoint.folder)
    checkpoints.save(task.state_dict(), {}, [report])
    write_trial(folder, row, [report], SPACE)
    return ap


@pytest.fixture(scope="module")
def made(mini_config: StudyConfig, mini_data: PreparedData, easy: str) -> Path:
    """A study's folder with a trial of each kind; none was trained."""
    values = {"refine.candidates": 2, "refine.student": "finetuned"}
    config = with_values(mini_config, {"data.skeleton": easy, "name": "made", **values})
    folder = Path(config.storage) / "made"
    folder.mkdir()
    versions = {"python": "3.11", "torch": "2.11"}
    settings: dict[str, Any] = {"config": to_plain(config), "git_commit": None}
    settings |= {"versions": versions, "data_fingerprint": mini_data.fingerprint}
    OmegaConf.save(OmegaConf.create(settings), folder / "study.yaml")
    torch.manual_seed(0)
    fates: dict[int, dict[str, Any]] = {
        WINNER: {"params.refine.depth": DEPTH},
        BASELINE: {"control": "baseline"},
        PRUNED: {"state": "PRUNED"},
        GONE: {},
        BINS: {
            "state": "PRUNED",
            "params.student.codec": "simcc",
            "params.student.flip_test": True,
        },
    }
    figures = {n: add_trial(folder, config, mini_data, n, **fate) for n, fate in fates.items()}
    assert figures[WINNER] > max(figures[BASELINE], figures[GONE], 0.05)
    shutil.rmtree(trial_folder(folder, GONE))
    failed = {"trial": FAILED, "control": None, "state": "FAIL", "error": "Traceback\nno memory"}
    write_trial(folder, failed, [], SPACE)
    final = {"role": "winner", "trial": WINNER, "stage": "refine", "epoch": 1, "num_people": 3}
    write_final(folder, [{**final, "ap": 0.125}], SPACE)
    return folder


@pytest.fixture
def study(made: Path) -> Iterator[Path]:
    """A copy of the study to change, next to the data that all studies of a storage share."""
    copy = made.with_name("copy")
    shutil.copytree(made, copy)
    yield copy
    shutil.rmtree(copy)


def run(study: Path, trial: int | None = None) -> dict[str, Any]:
    """Export quietly and return the content of ``config.json``."""
    target = export_study(study, trial, Display("none"))
    assert target == study / "export"
    content = json.loads((target / "config.json").read_text())
    assert isinstance(content, dict)
    return content


def refusal(study: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """Return the error that the script ends with; check that it leaves no files."""
    before = sorted(study.rglob("*")) if study.exists() else []
    with pytest.raises(SystemExit) as raised:
        main([str(study), *options])
    text = str(raised.value.code)
    assert text.startswith("error: ")
    assert (sorted(study.rglob("*")) if study.exists() else []) == before
    return text


def recorded(study: Path, number: int) -> float:
    return float(selected_of(study, number).trial["objective"])


def selected_of(study: Path, number: int | None) -> Any:
    config = relocate(from_plain(read_settings(study)["config"]), study)
    return select_trial(study, config, number)


@pytest.mark.parametrize("number", [WINNER, BASELINE, PRUNED, BINS])
def test_export_gets_the_ap_that_its_trial_recorded(
    study: Path, mini_data: PreparedData, number: int
) -> None:
    info = run(study, number)
    estimator, _ = load_export(study / "export")
    store, workers = open_crop_store(Path(mini_data.search)), Workers(torch.device("cpu"))
    skeleton = resolve(selected_of(study, number).config).skeleton
    figures = evaluate(estimator, store, Path(mini_data.search_truth), skeleton, "coco", workers)
    assert figures["ap"] == pytest.approx(recorded(study, number), abs=1e-6)
    assert info["search"]["ap"] == recorded(study, number)
    assert info["search"]["num_people"] == len(store)


@pytest.mark.parametrize("number", [WINNER, PRUNED, BINS])
def test_export_gives_the_keypoints_of_the_trials_estimator(
    study: Path, mini_data: PreparedData, number: int
) -> None:
    run(study, number)
    selected = selected_of(study, number)
    store, workers = open_crop_store(Path(mini_data.val)), Workers(torch.device("cpu"))
    found = [
        predict_crops(estimator, store, resolve(selected.config).skeleton, workers)
        for estimator in (load_export(study / "export")[0], selected.load())
    ]
    for exported, own in zip(*found, strict=True):
        np.testing.assert_allclose(exported, own, rtol=0, atol=1e-6)


def test_trial_in_bf16_is_checked_in_bf16_and_its_ap_in_fp32_is_printed(
    study: Path, mini_data: PreparedData, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = OmegaConf.load(study / "study.yaml")
    settings.config.trial.precision = "bf16"
    OmegaConf.save(settings, study / "study.yaml")
    selected = selected_of(study, WINNER)
    in_fp32, in_bf16 = (
        recorded(study, WINNER),
        score(selected.config, selected.checkpoint, mini_data),
    )
    crops = torch.rand(2, 3, *selected.config.data.input_size) * 255
    changed = with_values(selected.config, {"trial.precision": "fp32"})
    exact = load_estimator(
        selected.checkpoint,
        changed.student,
        changed.distill,
        changed.refine,
        changed.trial,
        resolve(changed),
    )
    rounded = selected.load()
    with torch.inference_mode():
        assert not torch.equal(rounded(crops)[1], exact(crops)[1])
    trial, report = (
        {**selected.trial, "objective": in_bf16},
        {**selected.report, "val_ap": in_bf16},
    )
    write_trial(study, trial, [report], SPACE)
    main([str(study)])
    out = " ".join(capsys.readouterr().out.split())
    assert f"its AP on the search slice is {100 * in_bf16:.1f}," in out
    expected = f"{100 * in_fp32:.1f} (difference {100 * (in_fp32 - in_bf16):+.2f} points)"
    assert f"computed in bf16; in fp32, as exports compute, AP is {expected}" in out
    assert load_export(study / "export")[0].student.precision == "fp32"


def test_winner_is_exported_unless_a_trial_is_named(study: Path) -> None:
    info = run(study)
    assert (info["source"]["trial"], info["source"]["stage"]) == (WINNER, "refine")
    assert info["refiner"]["depth"] == DEPTH
    assert info["refiner"]["candidates"] == 2
    assert info["refiner"]["mirror_pairs"] is False  # it learned from the student's own pose
    assert info["val"]["ap"] == 0.125
    info = run(study, BASELINE)
    assert (info["source"]["trial"], info["source"]["control"]) == (BASELINE, "baseline")
    assert info["refiner"] is None
    assert info["val"] is None


def test_best_complete_trial_is_exported_from_an_unfinished_study(study: Path) -> None:
    shutil.rmtree(study / "results" / "final")
    info = run(study)
    assert info["source"]["trial"] == WINNER
    assert info["val"] is None


def test_config_has_the_input_of_the_network(study: Path) -> None:
    info = run(study)
    assert info["skeleton"] == "easy"
    assert info["joints"][:2] == ["nose", "left_eye"] and [15, 13] not in info["edges"]
    assert [13, 15] in info["edges"]
    assert info["input_size"] == [64, 64]
    assert info["pixel_mean"] == [123.675, 116.28, 103.53] and info["pixel_order"] == "rgb"
    assert info["student"] == {"name": "mobile_net", "size": "tiny"}
    assert (info["box_centre"], info["crop_span"]) == ([32, 32], [64, 64])
    assert info["flip_test"] is False
    assert info["source"]["data_fingerprint"] == read_settings(study)["data_fingerprint"]


def test_export_holds_student_and_refiner_and_no_pickle(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(study)
    assert {path.name for path in (study / "export").iterdir()} == FILES
    tensors = load_file(study / "export" / "model.safetensors")
    assert {key.split(".")[0] for key in tensors} == {"student", "refiner"}

    def refuse(*args: object, **keywords: object) -> None:
        raise AssertionError("unpickled")

    for place in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(*place, refuse)
    load_export(study / "export")


@pytest.mark.slow
def test_onnx_is_written_beside_the_weights_and_agrees(
    study: Path, mini_data: PreparedData, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(study), "--onnx"])
    assert "model.onnx differs by at most " in capsys.readouterr().out
    target = study / "export"
    assert {path.name for path in target.iterdir()} == {*FILES, "model.onnx"}
    store = open_crop_store(Path(mini_data.val))
    frame, rows = CropFrame(store.input_size), torch.arange(len(store))
    crops = plain_batch(store, COCO, frame, rows, torch.device("cpu")).crops
    session = onnxruntime.InferenceSession(target / "model.onnx")
    found = session.run(["keypoints_crop", "scores"], {"crops": crops.contiguous().numpy()})
    with torch.no_grad():
        expected = load_export(target)[0](crops)
    np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=1e-2)
    np.testing.assert_allclose(found[1], expected[1], rtol=0, atol=1e-4)


def test_missing_onnx_packages_are_refused_first(
    study: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "--onnx needs onnx, onnxscript and onnxruntime" in refusal(study, capsys, "--onnx")


def test_card_shows_the_figures_and_code_that_runs(study: Path) -> None:
    run(study)
    card = (study / "export" / "README.md").read_text()
    assert f"| {100 * recorded(study, WINNER):.1f} |" in card
    assert "| validation | 3 | 12.5 |" in card
    assert f"`refine.depth={DEPTH}`" in card
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code
    names: dict[str, Any] = {"crops": torch.zeros(2, 3, 64, 64)}
    exec(code.group(1).replace('"EXPORT"', repr(str(study / "export"))), names)
    assert names["keypoints_crop"].shape == (2, 17, 2)


def test_bins_and_flip_test_go_with_the_export(study: Path) -> None:
    info = run(study, BINS)
    assert info["codec"]["name"] == "simcc" and info["flip_test"] is True
    tensors = load_file(study / "export" / "model.safetensors")
    assert tensors["student.simcc_head.x.weight"].shape == (128, 256)
    estimator, _ = load_export(study / "export")
    assert estimator.flip_order == COCO.flip_order
    card = (study / "export" / "README.md").read_text()
    assert "Each crop is predicted twice" in card and "51.2 wide and 51.2 high" in card


def test_card_leaves_out_parameters_without_effect(study: Path) -> None:
    run(study, BASELINE)
    card = (study / "export" / "README.md").read_text()
    assert "`distill.heatmap.kind=none`" in card and "refine.depth" not in card
    assert "has not been scored on the validation people" in card


def test_new_export_replaces_the_old_one_whole(study: Path) -> None:
    run(study, BASELINE)
    (study / "export" / "leftover").touch()
    assert run(study, WINNER)["source"]["trial"] == WINNER
    assert {path.name for path in (study / "export").iterdir()} == FILES
    assert list(study.glob(".export*")) == []


def test_old_export_stays_when_the_new_one_is_interrupted(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(study, BASELINE)

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "check_export", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(study, WINNER)
    source = json.loads((study / "export" / "config.json").read_text())["source"]
    assert source["trial"] == BASELINE
    assert list(study.glob(".export*")) == []


@pytest.mark.parametrize("change", ["noise", "nan"])
def test_changed_weights_are_refused(
    study: Path, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    file = trial_folder(study, WINNER) / "epoch-001" / "model.safetensors"
    tensors = load_file(file)
    head = tensors["student.final_layer.weight"]
    tensors["student.final_layer.weight"] = (
        torch.randn_like(head) if change == "noise" else head * torch.nan
    )
    save_file(tensors, file)
    error = refusal(study, capsys)
    expected = "recorded" if change == "noise" else "keypoints and scores must be finite"
    assert expected in error


def test_other_ap_than_recorded_is_refused_unless_tolerated(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    selected = selected_of(study, WINNER)
    report = {**selected.report, "val_ap": selected.report["val_ap"] + 0.001}
    write_trial(study, selected.trial, [report], SPACE)
    error = refusal(study, capsys)
    assert f"{report['val_ap']:.6f}" in error and "nothing was exported" in error
    main([str(study), "--tolerance", "0.01"])
    assert "exported trial 1 (refine, epoch 1)" in capsys.readouterr().out


def test_other_data_are_refused(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = OmegaConf.load(study / "study.yaml")
    settings.data_fingerprint = "0123456789abcdef"
    OmegaConf.save(settings, study / "study.yaml")
    assert "restore the data" in refusal(study, capsys)


def test_moved_study_is_exported(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its settings have the storage as a path relative to the folder that it was run in."""
    settings = OmegaConf.load(study / "study.yaml")
    root = Path(settings.config.data.root).relative_to(settings.config.storage)
    settings.config.storage = "some/where"
    settings.config.data.root = f"some/where/{root}"
    OmegaConf.save(settings, study / "study.yaml")
    monkeypatch.chdir(tmp_path)
    assert run(study)["source"]["trial"] == WINNER
    assert list(tmp_path.iterdir()) == []


def test_missing_data_are_named(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = OmegaConf.load(study / "study.yaml")
    settings.config.data.kind, settings.config.data.root = "coco", "data/coco"
    OmegaConf.save(settings, study / "study.yaml")
    error = refusal(study, capsys)
    assert "data.root=data/coco" in error and "folder that the study was run in" in error


def test_printed_command_can_be_pasted_whatever_the_folder_is_called(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = Path("my $study's/export")
    monkeypatch.setattr("study.export.export_study", lambda *_, **__: target)
    main([str(target.parent)])
    command = capsys.readouterr().out.removeprefix("try it: ")
    assert shlex.split(command)[:3] == ["python", "study/predict.py", str(target)]
