"""``plan_only=true``: what would be computed, said without computing or leaving anything."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import ray

from study.config import compose, with_values
from study.plan import show_plan
from study.plan_cost import expected_epochs, trial_groups
from study.prepare import StudyData, planned_data, prepare_data, read_study_people
from study.schema import StudyConfig


def silent(_: str) -> Any:
    return lambda *_: None


@pytest.mark.parametrize(
    ("settings", "shares"),
    [
        ({"min_epochs": 2, "reduction_factor": 2}, [1, 1, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25]),
        ({"min_epochs": 1, "reduction_factor": 4}, [1, *[0.25] * 3, *[0.0625] * 4]),
        ({"min_epochs": 9, "reduction_factor": 2}, [1] * 8),
        ({"pruner": "none"}, [1] * 8),
    ],
)
def test_each_rung_lets_its_share_pass(
    settings: dict[str, Any], shares: list[float], mini_config: StudyConfig
) -> None:
    assert expected_epochs(8, dataclasses.replace(mini_config.search, **settings)) == shares


@pytest.mark.parametrize(
    ("finished", "expected"),
    [
        (0, [(1, 7, 0), (0, 7, 0), (1, 5, 0), (3, 5, 0), (1, 0, 2), (4, 0, 2)]),
        (4, [(0, 7, 0), (0, 7, 0), (0, 5, 0), (1, 5, 0), (1, 0, 2), (4, 0, 2)]),
        (7, [(0, 7, 0), (0, 7, 0), (0, 5, 0), (0, 5, 0), (0, 0, 2), (3, 0, 2)]),
    ],
)
def test_staged_plan_trains_students_then_refiners(
    finished: int, expected: list[tuple[int, int, int]]
) -> None:
    config = compose(["plan=staged", "search.trials=10", "distill.epochs=5", "refine.epochs=2"])
    groups = trial_groups(config, finished)
    assert [group[:3] for group in groups] == expected
    assert [group.can_be_pruned for group in groups] == [False, True] * 3


def test_more_trials_after_the_hand_over_are_refiners() -> None:
    config = compose(["plan=staged", "search.trials=20", "distill.epochs=5", "refine.epochs=2"])
    groups = trial_groups(config, 8, handed_over=4)
    assert [group[:3] for group in groups if group.trials] == [(12, 0, 2)]


def test_planned_data_are_those_prepared(mini_config: StudyConfig, mini_data: StudyData) -> None:
    people = read_study_people(mini_config, silent, silent("say"))
    assert planned_data(mini_config, people) == mini_data


def test_planned_data_of_a_teacher_that_sees_other_crops(
    mini_config: StudyConfig, mini_data: StudyData
) -> None:
    config = with_values(mini_config, {"teacher.input_size": [96, 96]})
    prepared = prepare_data(config, silent, silent("say"))
    people = read_study_people(config, silent, silent("say"))
    assert planned_data(config, people) == prepared != mini_data


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: object, **__: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray, "init", start)


def plan_of(config: StudyConfig) -> list[str]:
    lines: list[str] = []
    show_plan(config, Path(config.storage) / config.name, lines.append)
    return [line.strip() for line in lines]


def files_under(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.mark.slow
def test_plan_says_what_is_there_and_leaves_nothing(
    mini_config: StudyConfig, mini_data: StudyData, no_ray: None
) -> None:
    before = files_under(Path(mini_config.storage))
    values = {"confirm.trials": 2, "search.trials": 10, "search.min_epochs": 1}
    lines = plan_of(with_values(mini_config, values))
    assert files_under(Path(mini_config.storage)) == before
    train, search, val = mini_data.num_people
    wanted = [
        f"{train:,} people to train on, {search:,} to score trials on, {val:,} in val",
        *(f"{name}: there already, is used again" for name in ("train", "search", "val")),
        "epochs to train: 1 of 1; then to be asked about everyone",
        # 2 controls of 4 epochs; 8 others of 1 + 1/2 + 1/4 + 1/4
        "epochs: at most 40, about 24 with pruner=successive_halving",
        "9 runs, 0 of them there already: the best 2 trials and the baseline, 3 seeds each, "
        "36 epochs",
    ]
    assert [line for line in wanted if line not in lines] == []
    for stage in ("teacher", "distill", "refine"):
        assert any(line.startswith(f"{stage}: ") and "a step of 16" in line for line in lines)


@pytest.mark.slow
def test_people_to_be_drawn_are_not_drawn(
    mini_config: StudyConfig, tmp_path: Path, no_ray: None
) -> None:
    values = {"data.root": str(tmp_path / "drawn"), "storage": str(tmp_path / "studies")}
    lines = plan_of(with_values(mini_config, {**values, "data.train_pictures": 240}))
    assert list(tmp_path.iterdir()) == []
    assert f"to be drawn: 240 + 2 pictures in {tmp_path / 'drawn'}" in lines
    counts = next(line for line in lines if line.startswith("about ") and "to train on" in line)
    assert 150 < int(counts.split()[1]) < 500


@pytest.mark.slow
def test_command_plans_on_coco_and_exits_well(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))  # the script changes it
    from study.tune import main

    monkeypatch.chdir(tmp_path)
    root = shared / "data" / "coco_tiny"
    settings = ["data=coco", f"data.root={root}", "data.input_size=[64,64]", "display=plain"]
    monkeypatch.setattr(sys, "argv", ["tune.py", *settings, "plan_only=true"])
    main()
    printed = capsys.readouterr().out
    assert "people to train on" in printed and "train: to be made" in printed
    assert "in all: about" in printed and "a cluster differs" in printed
    assert list(tmp_path.iterdir()) == []
