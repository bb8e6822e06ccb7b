"""Finalists on val, with labeled and with detected boxes: AP, poses, the last screen."""

from __future__ import annotations

import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from torch import Tensor, nn

from models.build import build_codec
from models.skeleton import COCO, SKELETONS
from search_spaces.space import load_space
from study.analysis.tables import show_finals
from study.cache.crop_store import CropStore, open_crop_store
from study.cache.prepare import PreparedData, prepare_data
from study.config.compose import compose, with_values
from study.config.derived import resolve
from study.config.schema import StudyConfig
from study.data.crops import apply_affine, plain_affines, transform_points
from study.metrics import average_precision
from study.search.controls import baseline_values
from study.storage import tables
from study.storage.checkpoint import Checkpoints
from study.storage.paths import teacher_epochs, trial_folder
from study.teachers.identity import teacher_folder
from study.teachers.make import build_task
from study.training.distill import DistillTask
from study.training.networks import build_distill_task, build_refine_task, build_refiner
from study.trial import teacher_spec
from study.validation import finalists
from study.validation.finalists import FinalTables, score_finalists

ROOT = Path(__file__).resolve().parents[3]
SPACE = load_space("smoke")


def truth_of(config: StudyConfig) -> dict[str, Any]:
    content = json.loads((Path(config.data.root) / config.data.val.annotations).read_text())
    assert isinstance(content, dict)
    return content


def with_boxes(config: StudyConfig, boxes: list[dict[str, Any]], **values: Any) -> StudyConfig:
    """Return the config with these boxes as detections; their file is next to the data."""
    name = f"boxes-{len(boxes)}.json"
    (Path(config.data.root) / name).write_text(json.dumps(boxes))
    return with_values(config, {"data.val.detections": name, **values})


def labeled_boxes(config: StudyConfig, shake: float = 0.0) -> list[dict[str, Any]]:
    """Return the labeled boxes with score 1, moved by up to ``shake`` of their size."""
    rng = np.random.RandomState(0)
    people = truth_of(config)["annotations"]
    moves = rng.uniform(-shake, shake, (len(people), 4))
    boxes = np.array([person["bbox"] for person in people])
    boxes = boxes + moves * boxes[:, [2, 3, 2, 3]]
    return [
        {"image_id": p["image_id"], "category_id": 1, "bbox": box.tolist(), "score": 1.0}
        for p, box in zip(people, boxes, strict=True)
    ]


def with_random_head(task: DistillTask) -> DistillTask:
    """Randomize the head of the task's student."""
    nn.init.normal_(task.student.final_layer.weight, std=1.0)  # type: ignore[union-attr,arg-type]
    return task


def prepared(config: StudyConfig) -> PreparedData:
    return prepare_data(
        config.data, resolve(config), lambda name: lambda done, total: None, lambda text: None
    )


@pytest.fixture(scope="module")
def config(
    mini_config: StudyConfig, easy: str, tmp_path_factory: pytest.TempPathFactory
) -> StudyConfig:
    """Settings with wide sigmas: untrained networks score some AP."""
    storage = tmp_path_factory.mktemp("storage")
    values = {"storage": str(storage), "data.root": str(storage / "drawn")}
    return with_values(mini_config, {**values, "data.skeleton": easy, "data.num_val_images": 8})


@pytest.fixture(scope="module")
def study(config: StudyConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of two trials with random networks."""
    folder = tmp_path_factory.mktemp("finals")
    for number, control in ((0, "baseline"), (1, "defaults")):
        own = with_values(
            config,
            baseline_values(config.distill.epochs + config.refine.epochs)
            if control == "baseline"
            else {},
        )
        distilled = with_random_head(
            build_distill_task(own.student, own.distill, own.trial, resolve(own), seed=number)
        )
        rows = [{"trial": number, "stage": "distill", "epoch": 1, "val_ap": 0.1 + number / 10}]
        checkpoints = Checkpoints(trial_folder(folder, number))
        checkpoints.save(distilled.state_dict(), {}, rows)
        if control == "defaults":
            refiner = build_refiner(
                config.refine, resolve(config).skeleton, distilled.student.pyramid_channels
            )
            refined = build_refine_task(config.refine, distilled, refiner)
            rows += [{"trial": number, "stage": "refine", "epoch": 2, "val_ap": 0.3}]
            checkpoints.save(refined.state_dict(), {}, rows)
        row = {"trial": number, "control": control, "state": "COMPLETE", "objective": 0.1}
        tables.write_trial(folder, row, rows, SPACE)
    return folder


def scored(config: StudyConfig, study: Path) -> tuple[FinalTables, PreparedData]:
    """Score the finalists of the study and a random teacher."""
    data = prepared(config)
    rows = [{"stage": "teacher", "epoch": 1, "val_ap": 0.4}]
    spec = teacher_spec(config, resolve(config))
    task = with_random_head(build_task(spec))
    Checkpoints(teacher_epochs(teacher_folder(spec, data))).save(task.state_dict(), {}, rows)
    return score_finalists(config, resolve(config), data, str(study)), data


@pytest.fixture(scope="module")
def on_labeled(config: StudyConfig, study: Path) -> tuple[FinalTables, PreparedData]:
    return scored(config, study)


def test_every_finalist_has_ap_joints_and_a_curve(
    on_labeled: tuple[FinalTables, PreparedData],
) -> None:
    tables, data = on_labeled
    roles = ["teacher", "baseline", "best_distilled", "best_refined", "winner"]
    assert [row["role"] for row in tables.final] == roles
    for row in tables.final:
        assert 0 < row["ap"] < 1 and row["num_people"] == data.num_people[2]
        curve = [point["ap"] for point in tables.curves if point["role"] == row["role"]]
        assert len(curve) == 10 and np.mean(curve) == pytest.approx(row["ap"], abs=1e-12)
        joints = {j["joint"]: j["ap"] for j in tables.joints if j["role"] == row["role"]}
        assert list(joints) == list(COCO.joints)
        assert all(ap is None or 0 <= ap <= 1 for ap in joints.values())
    winner = {**tables.final[-1], "role": "best_refined"}
    winner["keypoints"] = tables.final[-2]["keypoints"]
    assert winner == tables.final[-2]


def test_written_poses_reproduce_the_ap(
    on_labeled: tuple[FinalTables, PreparedData], study: Path, config: StudyConfig
) -> None:
    tables, data = on_labeled
    skeleton = SKELETONS[config.data.skeleton]
    for row in tables.final:
        poses = json.loads((study / row["keypoints"]).read_text())
        figures = average_precision(
            Path(data.val_truth), poses, skeleton, resolve(config).evaluation
        )
        assert figures["ap"] == row["ap"] and figures["ar"] == row["ar"]
    assert not list((study / "results").glob(".*"))


def test_labeled_boxes_as_detections_change_no_ap(
    on_labeled: tuple[FinalTables, PreparedData], study: Path, config: StudyConfig
) -> None:
    detected = with_boxes(config, labeled_boxes(config))
    tables, data = scored(detected, study)
    assert data.val != on_labeled[1].val and data.search == on_labeled[1].search
    for row, known in zip(tables.final, on_labeled[0].final, strict=True):
        assert row["detections"] == detected.data.val.detections and known["detections"] is None
        for name in ("ap", "ap50", "ar"):
            assert row[name] == pytest.approx(known[name], abs=1e-9)


class Oracle(nn.Module):
    """Predicts in each box the labeled keypoints of the nearest person."""

    def __init__(self, store: CropStore, truth: dict[str, Any]) -> None:
        super().__init__()
        self.frame = build_codec("dark", store.input_size, 2.0).frame
        people = truth["annotations"]
        boxes = np.array([person["bbox"] for person in people])
        middles = boxes[:, :2] + boxes[:, 2:] / 2
        own = store.boxes_image[:, :2] + store.boxes_image[:, 2:] / 2
        away = np.linalg.norm(own[:, None] - middles, axis=2)
        ids = np.array([person["image_id"] for person in people])
        away[store.image_ids[:, None] != ids] = np.inf
        seen = np.array([p["keypoints"] for p in people], float).reshape(len(people), -1, 3)
        stored = apply_affine(seen[away.argmin(axis=1), :, :2], store.image_to_stored)
        affine = plain_affines(len(stored), self.frame)
        self.predictions = transform_points(affine.new_tensor(stored), affine)
        self.shown = 0

    def forward(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        keypoints = self.predictions[self.shown : self.shown + len(crops)]
        self.shown += len(crops)
        return keypoints, keypoints.new_full(keypoints.shape[:2], 0.9)


def oracle_score(config: StudyConfig) -> finalists._Score:
    """Return the oracle's score on val."""
    data = prepared(config)
    oracle: Any = Oracle(open_crop_store(Path(data.val)), truth_of(config))
    nms = config.data.val.oks_nms
    return finalists._score(oracle, resolve(config), data, nms, oracle.predictions.device)


def test_keypoints_from_shaken_boxes_are_in_place(config: StudyConfig) -> None:
    narrow = with_values(config, {"data.skeleton": "coco"})
    boxes = labeled_boxes(narrow, shake=0.05)
    assert oracle_score(with_boxes(narrow, boxes)).figures["ap"] == pytest.approx(1)


def test_person_found_twice_counts_once(
    config: StudyConfig,
) -> None:
    narrow = with_values(config, {"data.skeleton": "coco"})
    boxes = labeled_boxes(narrow)
    twice = boxes + [{**box, "score": 0.6} for box in labeled_boxes(narrow, shake=0.02)]
    once, doubled = (
        oracle_score(with_boxes(narrow, boxes)),
        oracle_score(with_boxes(narrow, twice)),
    )
    assert len(doubled.poses) == len(once.poses) < doubled.num_people == len(twice)
    assert doubled.figures == pytest.approx(once.figures, nan_ok=True)
    all_kept = oracle_score(with_boxes(narrow, twice, **{"data.val.oks_nms": 1.0}))
    assert len(all_kept.poses) == len(twice)
    scores = {round(pose["score"], 6) for pose in all_kept.poses}
    assert scores == {0.9, 0.54}  # box score x mean joint score


def test_boxes_without_a_person_are_false_positives(config: StudyConfig) -> None:
    narrow = with_values(config, {"data.skeleton": "coco"})
    truth = truth_of(narrow)
    empty = dict(truth["images"][0], id=9999)
    truth["images"].append(empty)
    (Path(config.data.root) / "more.json").write_text(json.dumps(truth))
    more = with_values(narrow, {"data.val.annotations": "more.json"})
    boxes = labeled_boxes(more)
    alarm = {**boxes[0], "image_id": 9999, "score": 2.0}
    alarmed = with_boxes(more, [*boxes, alarm])
    data = prepared(alarmed)
    images = {image["id"] for image in json.loads(Path(data.val_truth).read_text())["images"]}
    store = open_crop_store(Path(data.val))
    assert 9999 in images and 9999 in store.image_ids
    assert len(store) == len(boxes) + 1
    assert (
        oracle_score(alarmed).figures["ap50"]
        < oracle_score(with_boxes(more, boxes)).figures["ap50"]
    )


@pytest.mark.parametrize(
    ("crowds", "heading", "winner"),
    [
        ({}, ["AP", "AP50", "AP75", "trial", "stage", "epoch"], "50.0 70.0 60.0 3 refine 2"),
        (
            {"ap_easy": 0.61, "ap_medium": 0.52, "ap_hard": 0.43},
            ["AP", "easy", "medium", "hard", "trial", "epoch"],
            "50.0 61.0 52.0 43.0 3 2",
        ),
    ],
)
def test_last_screen_fits_80_columns_and_has_the_ap_of_crowds(
    crowds: dict[str, float], heading: list[str], winner: str, tmp_path: Path
) -> None:
    tables.write_trial(tmp_path, {"trial": 3, "state": "COMPLETE"}, [], SPACE)
    row = {"trial": 3, "stage": "refine", "epoch": 2, "checkpoint": "trials/3", **crowds}
    row |= {"ap": 0.5, "ap50": 0.7, "ap75": 0.6}
    rows = [{**row, "role": role} for role in ("baseline", "winner")]
    tables.write_final(tmp_path, rows, SPACE)
    screen = io.StringIO()
    show_finals(tmp_path, Console(file=screen, width=80))
    lines = [re.findall(r"[\w.]+", line) for line in screen.getvalue().splitlines()[:7]]
    assert heading in lines and ["winner", *winner.split()] in lines
    assert "baseline student (no teacher)" in screen.getvalue()


def test_next_commands_can_be_pasted_whatever_the_folder_is_called(tmp_path: Path) -> None:
    folder = tmp_path / "my [/new] study's"
    tables.write_trial(folder, {"trial": 3, "state": "COMPLETE"}, [], SPACE)
    row = {"trial": 3, "stage": "refine", "epoch": 2, "checkpoint": "trials/3", "role": "winner"}
    tables.write_final(folder, [{**row, "ap": 0.5, "ap50": 0.7, "ap75": 0.6}], SPACE)
    screen = io.StringIO()
    show_finals(folder, Console(file=screen, width=80, soft_wrap=True))
    lines = screen.getvalue().splitlines()
    for label, script_name in (("look closer:", "analyze"), ("take it away:", "export")):
        (command,) = [line.removeprefix(label) for line in lines if line.startswith(label)]
        assert shlex.split(command) == ["python", f"study/{script_name}.py", str(folder)]
    assert f"winner: trial 3, {folder / 'trials/3'}" in lines


@pytest.mark.slow
def test_whole_study_scores_its_finalists_on_detected_boxes(tmp_path: Path) -> None:
    small = (
        "data=drawn",
        "data.num_train_images=24",
        "data.num_val_images=8",
        "data.root=drawn",
        "data.input_size=[64,64]",
        "data.search_fraction=0.25",
        "search_space=smoke",
        "teacher.size=tiny",
        "teacher.epochs=1",
        "distill.epochs=1",
        "refine.epochs=1",
        "refine.width=16",
        "search.trials=2",
        "trial.launcher=inline",
    )
    config = compose([*small, f"data.root={tmp_path / 'drawn'}", f"storage={tmp_path}"])
    prepared(config)
    boxes = with_boxes(config, labeled_boxes(config, shake=0.05)).data.val.detections
    overrides = (*small, "name=found", f"data.val.detections={boxes}")
    printed = script(tmp_path, "tune.py", *overrides)
    assert f"boxes in 8 images of val from {boxes}" in printed
    folder = tmp_path / "studies/found"
    final = tables.read_final(folder).to_pylist()
    assert len(final) == 5
    truth = Path(config.data.root) / config.data.val.annotations
    for row in final:
        assert row["detections"] == boxes
        poses = json.loads((folder / row["keypoints"]).read_text())
        figures = average_precision(truth, poses, COCO, "coco")
        assert figures["ap"] == row["ap"] and 0 <= row["ap"] < figures["ap50"] + 1e-9
    done = script(tmp_path, "analyze.py", "studies/found")
    assert "AP of each joint alone" in done and "oks_curves.png" in done


def script(home: Path, name: str, *arguments: str) -> str:
    """Run a script and return its output."""
    command = [sys.executable, str(ROOT / "study" / name), *arguments]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
