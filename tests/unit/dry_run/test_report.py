"""``plan_only=true``: the report of a study that is not run, and no files left behind."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
from omegaconf import OmegaConf

from study.cache.prepare import PreparedData, planned_data, prepare_data
from study.cache.study_people import read_study_people
from study.config.compose import compose, to_plain, with_values
from study.config.derived import resolve
from study.config.schema import StudyConfig
from study.driver import load_checked_space
from study.dry_run import cost
from study.dry_run.cost import (
    Counts,
    Pace,
    count_confirm_runs,
    pace_lines,
    search_warnings,
    time_lines,
    trial_lines,
)
from study.dry_run.report import show_plan
from study.dry_run.timing import Speeds
from study.errors import InputError
from study.search.forecast import StageEpochs, TrialGroup, trial_groups
from study.storage.paths import settings_file
from study.storage.tables import write_trial
from study.teachers.identity import teacher_folder
from study.trial import teacher_spec


def silent(_: str) -> Any:
    return lambda *_: None


def groups_of(config: StudyConfig) -> list[list[TrialGroup]]:
    epochs = StageEpochs(config.distill.epochs, config.refine.epochs)
    return trial_groups(config.plan, config.search.trials, epochs)


def warnings_of(config: StudyConfig) -> list[str]:
    groups = groups_of(config)
    return list(search_warnings(config.search, config.confirm, config.plan, groups, concurrent=2))


def test_planned_data_are_those_prepared(
    mini_config: StudyConfig, mini_data: PreparedData
) -> None:
    people = read_study_people(
        mini_config.data, resolve(mini_config).skeleton, silent, silent("notify")
    )
    assert planned_data(people, mini_config.data.crops, resolve(mini_config)) == mini_data


def test_planned_data_of_a_teacher_that_sees_other_crops(
    mini_config: StudyConfig, mini_data: PreparedData
) -> None:
    config = with_values(mini_config, {"teacher.input_size": [96, 96]})
    prepared = prepare_data(config.data, resolve(config), silent, silent("notify"))
    people = read_study_people(config.data, resolve(config).skeleton, silent, silent("notify"))
    assert planned_data(people, config.data.crops, resolve(config)) == prepared != mini_data


@pytest.mark.parametrize(
    ("pruner", "line"),
    [
        ("successive_halving", "epochs: at most 24, about 15 with pruner=successive_halving"),
        ("none", "epochs: at most 24, about 24 with pruner=none"),
        ("median", "epochs: at most 24; how many pruner=median saves can't be predicted"),
    ],
)
def test_plan_predicts_epochs_by_the_pruners_rule_alone(pruner: str, line: str) -> None:
    """2 controls of 3 epochs; 6 other trials of 1 + 1/4 + 1/4."""
    overrides = ["search.trials=8", "distill.epochs=2", "refine.epochs=1", "search.min_epochs=1"]
    config = compose([*overrides, "search.reduction_factor=4", f"search.pruner={pruner}"])
    *_, epochs = trial_lines(config.search, groups_of(config), 0, 2, is_staged=False)
    assert epochs == line


@pytest.mark.parametrize(
    ("people", "before", "hours"),
    [
        (8, 0.0, ["trials: about 6 s"]),  # 2 controls of 3 epochs of a step
        (8, 0.5, ["refine: 4 s to train the swap resolver", "trials: about 14 s"]),
        (6_000, 0.01, ["refine: 50 s to train the swap resolver"]),  # of 5,000 people at most
    ],
)
def test_time_of_trials_includes_training_the_swap_resolver(
    people: int, before: float, hours: list[str], tmp_path: Path
) -> None:
    overrides = ["search.trials=2", "distill.epochs=2", "refine.epochs=1", "confirm.trials=0"]
    config = compose([*overrides, f"storage={tmp_path}", "refine.start=jitter"])
    speeds = Speeds("cpu", {"distill": 1.0, "refine": 1.0}, {"distill": 0.0, "refine": 0.0}, {})
    speeds.before["refine"] = before
    counts = Counts(train=people, search=0, val=0, boxes=0, is_estimate=False)
    pace = Pace.of(speeds, counts, config.teacher, config.distill, config.refine, is_made=False)
    batch_sizes = {"distill": config.distill.batch_size, "refine": config.refine.batch_size}
    epochs = StageEpochs(config.distill.epochs, config.refine.epochs)
    runs = count_confirm_runs(config.confirm, config.search.trials, tmp_path, finished=0)
    lines = [
        *pace_lines(speeds, batch_sizes, pace),
        *time_lines(pace, config.search, groups_of(config), epochs, runs, concurrent=1),
    ]
    for line in hours:
        assert [line for shown in lines if shown.startswith(line)] == [line]
    assert any("swap resolver" in line for line in lines) == bool(before)


@pytest.mark.parametrize(
    ("overrides", "warning"),
    [
        (["search.concurrent=500"], "search.concurrent=500, but only 2 trials fit"),
        (["confirm.trials=9"], "confirm.trials=9, but there are 7 trials apart from the baseline"),
        (["plan=staged", "plan.parents=4", "search.startup_trials=2"], "there are 3 students"),
        (["search.min_epochs=6"], "none has more than 6 epochs, and search.min_epochs=6; lower"),
        (["search.startup_trials=8"], "sampler=tpe will learn nothing: .* first 8 .* has 8; "),
        (["search.sampler=nsga2", "search.population=8"], "nsga2 .* lower search.population"),
        (
            ["search.pruner=median", "search.sampler=random", "search.startup_trials=8"],
            "pruner=median waits for 8 finished trials, and the largest search has 8; raise",
        ),
        (
            ["plan=staged"],
            "first 6 trials .* largest search has 4; .* lower search.startup_trials",
        ),
    ],
)
def test_plan_warns_of_settings_that_cannot_take_effect(
    overrides: list[str], warning: str
) -> None:
    """The study has 8 trials of at most 6 epochs, staged 4 students and 4 refiners."""
    assert warnings_of(compose()) == []
    (line,) = warnings_of(compose(overrides))
    assert line.startswith("warning: ") and re.search(warning, line)


def test_finished_search_counts_only_trials_that_can_be_confirmed(
    mini_config: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine of the ten trials may be pruned."""
    confirm = with_values(mini_config, {"confirm.trials": 2}).confirm

    def lines(finished: int) -> list[str]:
        runs = count_confirm_runs(confirm, 10, tmp_path, finished)
        return list(cost.confirm_lines(confirm, runs, budget=4))

    monkeypatch.setattr(cost, "chosen_trials", lambda *_: [{"trial": 1}, {"trial": 0}])
    (before,), (after,) = lines(9), lines(10)
    assert before.startswith("9 runs, 0 of them finished: the best 2 trials")
    assert after.startswith("6 runs, 0 of them finished: the best trial and")
    monkeypatch.setattr(cost, "chosen_trials", lambda *_: [])
    (baseline,) = lines(10)
    assert baseline.startswith("0 runs, 0 of them finished: the best 0 trials")


def test_study_of_controls_alone_has_no_warning() -> None:
    config = compose(["search.trials=2", "confirm.trials=0"])
    assert warnings_of(config) == []


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: object, **__: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray, "init", start)


def plan_of(config: StudyConfig) -> list[str]:
    lines: list[str] = []
    show_plan(config, load_checked_space(config), Path(config.storage) / config.name, lines.append)
    return [line.strip() for line in lines]


def files_under(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.mark.slow
def test_plan_lists_what_exists_and_leaves_no_files(
    mini_config: StudyConfig, mini_data: PreparedData, no_ray: None
) -> None:
    before = files_under(Path(mini_config.storage))
    values = {"confirm.trials": 2, "search.trials": 10, "search.min_epochs": 1}
    lines = plan_of(with_values(mini_config, values))
    assert files_under(Path(mini_config.storage)) == before
    train, search, val = mini_data.num_people
    wanted = [
        f"{train:,} people to train on, {search:,} to score trials on, {val:,} in val",
        *(f"{name}: exists, will be reused" for name in ("train", "search", "val")),
        "epochs to train: 1 of 1; then it predicts targets for everyone, 2 views of each",
        # 2 controls of 4 epochs; 8 others of 1 + 1/2 + 1/4 + 1/4
        "epochs: at most 40, about 24 with pruner=successive_halving",
        "9 runs, 0 of them finished: the best 2 trials and the baseline, 3 seeds each, 36 epochs",
    ]
    assert [line for line in wanted if line not in lines] == []
    for stage in ("teacher", "distill", "refine"):
        starts = [line for line in lines if line.startswith(f"{stage}: ")]
        assert any("for a step of 16 people" in line for line in starts)


def test_plan_refuses_a_bucket_without_a_name(mini_config: StudyConfig) -> None:
    with pytest.raises(InputError, match=r"data\.store=s3://: "):
        plan_of(with_values(mini_config, {"data.store": "s3://"}))


@pytest.mark.slow
def test_plan_of_given_poses_includes_the_swap_resolver(
    mini_config: StudyConfig, mini_data: PreparedData, no_ray: None
) -> None:
    lines = plan_of(with_values(mini_config, {"refine.start": "jitter"}))
    assert any(line.startswith("refine: ") and "swap resolver" in line for line in lines)


@pytest.mark.slow
def test_plan_has_the_searchs_notes_and_the_trials_of_a_warm_start(
    mini_config: StudyConfig, mini_data: PreparedData, tmp_path: Path, no_ray: None
) -> None:
    older = tmp_path / "older"
    values = {"search.sampler": "gp", "search.warm_start": [str(older)], "name": "newer"}
    config = with_values(mini_config, values)
    row = {"study": "older", "trial": 0, "control": "baseline", "state": "COMPLETE"}
    write_trial(older, {**row, "objective": 0.5}, [], load_checked_space(config))
    teacher = teacher_folder(teacher_spec(config, resolve(config)), mini_data).name
    kept = {"config": to_plain(mini_config), "data_fingerprint": mini_data.fingerprint}
    OmegaConf.save(OmegaConf.create({**kept, "teacher": teacher}), settings_file(older))
    lines = plan_of(config)
    assert any("search.sampler=gp can't model what only some trials have" in x for x in lines)
    assert f"warm start: 0 trials of {older} are known" in lines
    reason = "the baseline is outside every search space"
    assert f"warm start: trial 0 of {older} left out: {reason}" in lines
    OmegaConf.save(OmegaConf.create({**kept, "teacher": "another"}), settings_file(older))
    with pytest.raises(InputError, match="with another teacher"):
        plan_of(config)


@pytest.mark.slow
def test_synthetic_data_are_not_drawn(
    mini_config: StudyConfig, tmp_path: Path, no_ray: None
) -> None:
    values = {"data.root": str(tmp_path / "drawn"), "storage": str(tmp_path / "studies")}
    lines = plan_of(with_values(mini_config, {**values, "data.num_train_images": 240}))
    assert list(tmp_path.iterdir()) == []
    assert f"to be drawn: 240 + 2 images in {tmp_path / 'drawn'}" in lines
    counts = next(line for line in lines if line.startswith("about ") and "to train on" in line)
    assert 150 < int(counts.split()[1]) < 500


@pytest.mark.slow
def test_command_plans_on_coco_and_exits_with_zero(
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
    assert "people to train on" in printed and "train: to be cut" in printed
    assert "in all: about" in printed and "a cluster differs" in printed
    assert list(tmp_path.iterdir()) == []
