"""Known trials of older studies: which are added, which are left out, and why."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import optuna
import pytest
from omegaconf import OmegaConf

from search_spaces.space import SearchSpace, load_space
from study.config.compose import compose, to_plain
from study.config.derived import resolve
from study.config.schema import StudyConfig
from study.errors import InputError
from study.search.owner import StudyOwner
from study.search.warm_start import WARM_FROM, check_warm_start
from study.storage.paths import settings_file
from study.storage.tables import read_trials, write_trial

BASICS = ("distill.epochs=2", "refine.epochs=1", "search_space=smoke", "search.startup_trials=2")
LR, WEIGHT, DEPTH = "distill.optimizer.lr", "distill.structure.weight", "refine.depth"
VALUES = {LR: 2e-3, WEIGHT: 0.5, DEPTH: 3}
BEGUN = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
CURVE = (0.1, 0.3, 0.2)


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def write_settings(folder: Path, config: StudyConfig, data: str = "d", teacher: str = "t") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = {"config": to_plain(config), "data_fingerprint": data, "teacher": teacher}
    OmegaConf.save(OmegaConf.create(content), settings_file(folder))


def older_study(
    folder: Path, *rows: dict[str, Any], space: SearchSpace | None = None, overrides: Any = ()
) -> Path:
    """Write a study of these trials, each a change to a complete one of VALUES and CURVE."""
    write_settings(folder, compose([*BASICS, "name=older", *overrides]))
    for number, changes in enumerate(rows):
        values = changes.pop("values", VALUES)
        curve = changes.pop("curve", CURVE)
        row = {"study": "older", "trial": number, "state": "COMPLETE", "started": BEGUN}
        row |= {"objective": max(curve, default=None), "latency_ms": 2.0, "parameters": 1000}
        row |= {f"params.{path}": value for path, value in values.items()}
        reports = [
            {"trial": number, "epoch": epoch, "val_ap": ap} for epoch, ap in enumerate(curve, 1)
        ]
        write_trial(folder, {**row, **changes}, reports, space or load_space("smoke"))
    return folder


def start(folder: Path, older: list[Path], *overrides: str, session: str = "a") -> StudyOwner:
    named = f"search.warm_start=[{','.join(map(str, older))}]"
    config = compose([*BASICS, f"storage={folder}", "name=new", named, *overrides])
    write_settings(folder / "new", config)
    space = load_space(config.search_space).to_json()
    return StudyOwner(str(folder / "new"), config, resolve(config), space, session)


def known(owner: StudyOwner) -> list[Any]:
    trials = owner.stages[0].study.get_trials(deepcopy=False)
    return [trial for trial in trials if WARM_FROM in trial.user_attrs]


def run_trial(owner: StudyOwner, name: str) -> int:
    number = int(owner.suggest(name)["number"])
    owner.report_costs(number, {"latency_ms": 3.0, "parameters": 2000})
    for epoch in (1, 2, 3):
        owner.report(number, {"stage": "distill", "epoch": epoch, "seconds": 1.0, "val_ap": 0.1})
    return number


def test_known_trials_are_added_with_their_curves_and_values(tmp_path: Path) -> None:
    pruned = {"state": "PRUNED", "curve": (0.2, 0.1)}
    older = older_study(tmp_path / "older", {"control": "defaults"}, pruned)
    complete, stopped = known(start(tmp_path, [older]))
    assert (complete.params, complete.value) == (VALUES, 0.3)
    assert complete.intermediate_values == {1: 0.1, 2: 0.3, 3: 0.2}
    assert (stopped.state.name, stopped.value) == ("PRUNED", 0.1)
    assert complete.user_attrs[WARM_FROM].startswith("older/0 begun 2026-01-02 03:04:05")


def test_known_trials_are_not_trials_of_the_study(tmp_path: Path) -> None:
    """They change no number, count, table or best trial."""
    older = older_study(tmp_path / "older", {"curve": (0.9, 0.9, 0.9)}, {})
    owner = start(tmp_path, [older])
    numbers = [run_trial(owner, f"t{index}") for index in range(3)]
    assert numbers == [0, 1, 2] and owner.num_finished() == 3
    assert read_trials(owner.folder)["trial"].to_pylist() == [0, 1, 2]
    assert owner.status()["best"] == {"trial": 0, "ap": 0.1}
    assert [owner.stages[0].frozen(number).number for number in numbers] == [2, 3, 4]
    assert owner.stages[0].frozen(0).user_attrs["control"] == "baseline"


def test_restarts_repeat_no_known_trial_and_change_no_suggestion(tmp_path: Path) -> None:
    rows = [{"values": {**VALUES, DEPTH: depth}} for depth in (2, 4, 6)]
    older = older_study(tmp_path / "older", *rows)
    found = []
    for name in ("whole", "interrupted"):
        folder = tmp_path / name
        owner = start(folder, [older])
        suggestions = []
        for index in range(4):
            if name == "interrupted":
                owner = start(folder, [older], session=f"s{index}")
            suggestions.append(owner.suggest(f"t{index}"))
            run_trial(owner, f"t{index}")
        found.append(suggestions)
        assert len(known(owner)) == 3
    assert found[0] == found[1]


def test_kill_while_known_trials_are_added_loses_and_repeats_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = older_study(tmp_path / "older", {}, {}, {})
    add, added = optuna.Study.add_trial, list[Any]()

    def add_two(study: Any, trial: Any) -> None:
        if len(added) == 2:
            raise KeyboardInterrupt
        added.append(trial)
        add(study, trial)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("optuna.Study.add_trial", add_two)
        start(tmp_path, [older])
    owner = start(tmp_path, [older], session="b")
    origins = [trial.user_attrs[WARM_FROM].split()[0] for trial in known(owner)]
    assert origins == ["older/0", "older/1", "older/2"]


def test_later_trials_of_an_older_study_are_not_added(tmp_path: Path) -> None:
    older = older_study(tmp_path / "older", {})
    start(tmp_path, [older])
    older_study(tmp_path / "older", {}, {})
    assert len(known(start(tmp_path, [older], session="b"))) == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"control": "baseline"}, "the baseline is outside every search space"),
        ({"state": "FAIL", "curve": ()}, "it failed"),
        ({"state": "PRUNED", "curve": ()}, "it ended before its first epoch"),
        ({"latency_ms": None}, "its latency_ms was not measured"),
        ({"values": {**VALUES, LR: 0.5}}, f"{LR}=0.5 is outside the search space"),
        ({"values": {**VALUES, DEPTH: 7}}, f"{DEPTH}=7 is outside the search space"),
    ],
)
def test_trial_that_does_not_fit_is_listed_with_its_reason(
    change: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    older = older_study(tmp_path / "older", {}, change)
    owner = start(tmp_path, [older], "search.objectives=[ap,latency_ms]")
    assert owner.messages() == [
        f"warm start: 1 trials of {older} are known",
        f"warm start: trial 1 of {older} left out: {reason}",
    ]
    assert known(owner)[0].values == [0.3, 2.0]


def test_parameter_that_is_fixed_here_is_dropped_if_its_value_is_equal(tmp_path: Path) -> None:
    wide = load_space("joint")
    values = {**VALUES, "refine.levels": 3}
    rows = [{"values": values}, {"values": {**values, "refine.levels": 2}}]
    older = older_study(tmp_path / "older", *rows, space=wide)
    owner = start(tmp_path, [older])
    (trial,) = known(owner)
    assert trial.params == VALUES
    assert owner.messages()[1].endswith(
        "trial 1 of " + f"{older} left out: refine.levels is 2 there and 3 here"
    )


def test_parameter_that_was_fixed_there_has_the_value_of_its_setting(tmp_path: Path) -> None:
    older = older_study(
        tmp_path / "older", {"values": {LR: 2e-3, WEIGHT: 0.5}}, overrides=["refine.depth=5"]
    )
    (trial,) = known(start(tmp_path, [older]))
    assert trial.params == {**VALUES, DEPTH: 5}


def test_trial_with_other_settings_does_not_fit(tmp_path: Path) -> None:
    older = older_study(tmp_path / "older", {}, {}, overrides=["student.size=small"])
    owner = start(tmp_path, [older])
    assert known(owner) == []
    assert owner.messages()[1] == (
        f"warm start: trial 0, 1 of {older} left out: student.size is small there and tiny here"
    )


def test_known_trials_have_constraints(tmp_path: Path) -> None:
    older = older_study(tmp_path / "older", {})
    (trial,) = known(start(tmp_path, [older], "search.constraints.latency_ms=1"))
    assert trial.constraints == {"latency_ms": 1.0}


@pytest.mark.parametrize(("data", "teacher"), [("other", "t"), ("d", "other")])
def test_study_with_other_data_or_another_teacher_is_refused(
    data: str, teacher: str, tmp_path: Path
) -> None:
    older = older_study(tmp_path / "older", {})
    config = compose([*BASICS, f"search.warm_start=[{older}]"])
    check_warm_start(config.search.warm_start, tmp_path / "new", "d", ["t", "u"])
    name = "data" if data == "other" else "teacher"
    with pytest.raises(InputError, match=f"with another {name} .*here other"):
        check_warm_start(config.search.warm_start, tmp_path / "new", data, [teacher])


def test_folder_without_a_study_is_refused_before_the_study_begins(tmp_path: Path) -> None:
    config = compose([*BASICS, f"search.warm_start=[{tmp_path}/nothing]"])
    with pytest.raises(InputError, match="must be a study's folder"):
        check_warm_start(config.search.warm_start, tmp_path / "new", "d", ["t", "u"])
    write_settings(tmp_path / "new", config)
    check_warm_start(config.search.warm_start, tmp_path / "new", "d", ["t", "u"])
