"""Several objectives, constraints and costs: the winner and the Pareto front."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import nn

from search_spaces.space import load_space
from study.analysis.tables import show_finals
from study.analyze import main
from study.cache.prepare import PreparedData
from study.config.compose import compose, with_values
from study.config.derived import resolve
from study.config.schema import StudyConfig
from study.display import Display
from study.errors import InputError
from study.launch import trials as launch_trials
from study.launch.context import StudyContext
from study.launch.trials import TrialJob
from study.search.objectives import pareto_front, violations
from study.search.owner import StudyOwner
from study.storage.tables import read_trials, write_final, write_trial
from study.training.networks import build_distill_task, build_refiner, measure_costs
from study.validation.finalists import finalists, front_of
from study.workers import Workers

BASICS = ("name=study", "distill.epochs=1", "refine.epochs=1", "search.pruner=none")
COSTS = ({"latency_ms": 1.0, "parameters": 900}, {"latency_ms": 2.0, "parameters": 1000})


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def start(folder: Path, *overrides: str, session: str = "a") -> StudyOwner:
    (folder / "study").mkdir(exist_ok=True)
    config = compose([f"storage={folder}", "search_space=smoke", *BASICS, *overrides])
    return StudyOwner(
        str(folder / "study"), config, resolve(config), load_space("smoke").to_json(), session
    )


def run_trial(owner: StudyOwner, name: str, aps: list[float], costs: dict[str, float]) -> int:
    number = int(owner.suggest(name)["number"])
    owner.report_costs(number, costs)
    for epoch, ap in enumerate(aps, 1):
        owner.report(number, {"stage": "distill", "epoch": epoch, "seconds": 1.0, "val_ap": ap})
    return number


def row_of(number: int, ap: float | None, latency: float, **changes: Any) -> dict[str, Any]:
    row = {"trial": number, "state": "COMPLETE", "objective": ap, "latency_ms": latency}
    return {**row, "parameters": 1000, "feasible": True, "control": None, **changes}


def test_front_holds_the_trials_that_no_other_dominates() -> None:
    rows = [
        row_of(0, 0.30, 5.0),
        row_of(1, 0.20, 3.0),
        row_of(2, 0.25, 4.0),
        row_of(3, 0.25, 4.5),  # slower than 2, no better
        row_of(4, 0.19, 3.0),  # as fast as 1, worse
        row_of(5, 0.20, 3.0),  # equal to 1: neither dominates the other
        row_of(6, 0.90, 1.0, state="PRUNED"),
        row_of(7, 0.90, 1.0, feasible=False),
        row_of(8, None, 1.0, state="FAIL"),
        row_of(9, 0.90, 1.0) | {"latency_ms": None},
    ]
    assert [row["trial"] for row in pareto_front(rows, ["latency_ms"])] == [0, 2, 1, 5]
    assert [row["trial"] for row in pareto_front(rows[:6], [])] == [0]


def test_violation_is_the_relative_excess_over_the_limit() -> None:
    limits = {"latency_ms": 20.0, "parameters": None}
    assert violations(limits, {"latency_ms": 25.0, "parameters": 9e9}) == {"latency_ms": 0.25}
    assert violations(limits, {"latency_ms": 20.0})["latency_ms"] == 0


def test_several_objectives_reach_the_optuna_study_and_the_table(tmp_path: Path) -> None:
    owner = start(tmp_path, "search.objectives=[ap,latency_ms,parameters]")
    number = run_trial(owner, "t0", [0.2, 0.1], COSTS[0])
    assert owner.stages[0].frozen(number).values == [0.2, 1.0, 900.0]
    assert owner.stages[0].frozen(number).intermediate_values == {1: 0.2, 2: 0.1}
    (row,) = read_trials(owner.folder).to_pylist()
    assert row["objectives"] == "ap,latency_ms,parameters"
    assert (row["objective"], row["latency_ms"], row["parameters"]) == (None, 1.0, 900)
    assert owner.status()["best"] == {"trial": 0, "ap": 0.2}


def test_costs_recorded_first_stay_after_a_restart(tmp_path: Path) -> None:
    limit = "search.constraints.latency_ms=1.5"
    owner = start(tmp_path, limit)
    owner.report_costs(owner.suggest("t0")["number"], COSTS[0])
    again = start(tmp_path, limit, session="b")
    again.report_costs(again.suggest("t0")["number"], COSTS[1])
    assert again.stages[0].frozen(0).constraints == {"latency_ms": pytest.approx(1.0 / 1.5 - 1)}
    assert again.stages[0].frozen(0).user_attrs["latency_ms"] == 1.0


class LocalActor:
    """An owner in this process with the interface of a Ray actor."""

    def __init__(self, owner: StudyOwner) -> None:
        self.owner = owner

    def __getattr__(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(remote=getattr(self.owner, name))


def test_costs_of_a_resumed_trial_are_not_measured_again(
    tmp_path: Path,
    mini_config: StudyConfig,
    mini_data: PreparedData,
    workers: Workers,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured = iter(COSTS)
    monkeypatch.setattr(launch_trials, "measure_costs", lambda *_: next(measured))
    monkeypatch.setattr(launch_trials.ray, "get", lambda answer: answer)
    context = StudyContext(
        mini_config, resolve(mini_config), mini_data, str(tmp_path), "", "owner"
    )
    for session in ("a", "b"):
        owner = start(tmp_path, session=session)
        suggestion = owner.suggest("t0")
        assert suggestion is not None and suggestion["number"] == 0
        monkeypatch.setattr(
            launch_trials.ray, "get_actor", lambda name, owner=owner: LocalActor(owner)
        )
        job = TrialJob(context, suggestion)
        job.open_record(is_first=True).start(job.trial(), workers)
    assert owner.stages[0].frozen(0).user_attrs["latency_ms"] == 1.0
    assert next(measured) == COSTS[1]


def test_infeasible_trial_is_never_the_best(tmp_path: Path) -> None:
    owner = start(tmp_path, "search.constraints.latency_ms=1.5")
    run_trial(owner, "t0", [0.2, 0.2], COSTS[0])
    run_trial(owner, "t1", [0.9, 0.9], COSTS[1])
    assert owner.status()["best"] == {"trial": 0, "ap": 0.2}
    assert [row["feasible"] for row in read_trials(owner.folder).to_pylist()] == [True, False]


def test_pruned_trial_of_several_objectives_keeps_values_that_tpe_can_read(tmp_path: Path) -> None:
    """One trial is complete, so that TPE must rank the pruned ones."""
    settings = ["search.pruner=successive_halving", "search.min_epochs=1"]
    settings += ["search.objectives=[ap,latency_ms]", "search.startup_trials=2"]
    owner = start(tmp_path, *settings, "search.constraints.latency_ms=1.5")
    for index in range(14):
        aps = [0.5 - 0.03 * index] * 2
        run_trial(owner, f"t{index}", aps, COSTS[0] if index else COSTS[1])
    pruned = [t for t in owner.stages[0].trials() if t.state.name == "PRUNED"]
    assert len(pruned) > 8 and all(t.values == [t.intermediate_values[1], 1.0] for t in pruned)


def tables(*rows: dict[str, Any]) -> tuple[pa.Table, pa.Table]:
    reports = [
        {"trial": row["trial"], "stage": "distill", "epoch": 1, "val_ap": row["objective"]}
        for row in rows
    ]
    return pa.Table.from_pylist(list(rows)), pa.Table.from_pylist(reports)


def test_winner_is_the_best_feasible_trial_of_the_front() -> None:
    objectives = {"objectives": "ap,latency_ms"}
    trials, reports = tables(
        row_of(0, 0.30, 2.0, control="baseline", feasible=False, **objectives),
        row_of(1, 0.25, 2.0, **objectives),
        row_of(2, 0.25, 1.0, **objectives),
        row_of(3, 0.40, 9.0, feasible=False, **objectives),
    )
    found = finalists(trials, reports)
    assert {role: row["trial"] for role, row in found.items()} == {
        "baseline": 0,
        "best_distilled": 1,
        "winner": 2,
    }
    assert [row["trial"] for row in front_of(trials)] == [2]


def test_no_trial_wins_if_none_is_feasible() -> None:
    trials, reports = tables(row_of(0, 0.3, 2.0, control="baseline", feasible=False))
    assert list(finalists(trials, reports)) == ["baseline"]


@pytest.fixture
def two_trials(tmp_path: Path) -> Path:
    """A study of two trials; the better one is infeasible."""
    owner = start(
        tmp_path, "search.objectives=[ap,latency_ms]", "search.constraints.parameters=950"
    )
    for index, costs in enumerate(COSTS):
        number = run_trial(owner, f"t{index}", [0.1 + index / 10] * 2, costs)
        row = owner._trial_row(number, [])
        row |= {"objective": 0.1 + index / 10, "best_epoch": 2, "best_stage": "distill"}
        write_trial(owner.folder, row, [], owner.space)
    return owner.folder


def final_of(folder: Path, *roles: str) -> None:
    rows = [
        {"role": role, "trial": 0, "stage": "distill", "epoch": 2, "checkpoint": "c", "ap": 0.1}
        for role in roles
    ]
    write_final(folder, rows, load_space("smoke"))


def test_last_screen_lists_the_front(two_trials: Path, capsys: pytest.CaptureFixture[str]) -> None:
    final_of(two_trials, "winner")
    show_finals(two_trials, Display("plain").console)
    text = capsys.readouterr().out
    assert "Pareto front of AP on the search slice and latency_ms:" in text
    assert "  trial 0: AP 10.0, 1 ms a crop, 900 parameters" in text
    assert "trial 1:" not in text and "winner: trial 0" in text


def test_last_screen_reports_that_no_trial_is_feasible(
    two_trials: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    final_of(two_trials, "baseline")
    show_finals(two_trials, Display("plain").console)
    text = capsys.readouterr().out
    assert "no winner: no complete trial satisfies search.constraints" in text
    assert "export.py" not in text


def test_analysis_prints_and_plots_the_front(
    two_trials: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(two_trials)])
    text = capsys.readouterr().out
    assert "Pareto front of AP, ms a crop" in text
    assert "0 (baseline) | 10.0 |         1 |        900" in text
    image = two_trials / "plots" / "pareto_front.png"
    assert image.is_file() and image.read_bytes()[:4] == b"\x89PNG"


def test_costs_are_of_the_last_stages_estimator(mini_config: StudyConfig) -> None:
    device = torch.device("cpu")

    def count(*networks: nn.Module) -> int:
        return sum(p.numel() for network in networks for p in network.parameters())

    alone = with_values(mini_config, {"refine.epochs": 0})
    both = with_values(mini_config, {"refine.epochs": 1})
    student = build_distill_task(
        alone.student, alone.distill, alone.trial, resolve(alone), seed=0
    ).student
    refiner = build_refiner(both.refine, resolve(both).skeleton, student.pyramid_channels)
    state = torch.random.get_rng_state()
    costs = [
        measure_costs(config.student, config.refine, config.trial, resolve(config), device)
        for config in (alone, both)
    ]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [c["parameters"] for c in costs] == [count(student), count(student, refiner)]
    assert 0 < costs[0]["latency_ms"] < costs[1]["latency_ms"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["search.objectives=[]"], "search.objectives must be ap, then any of latency_ms"),
        (["search.objectives=[latency_ms,ap]"], "try [ap,latency_ms]"),
        (["search.objectives=[ap,flops]"], "got search.objectives=[ap,flops]"),
        (["search.objectives=[ap,ap]"], "each once"),
        (["search.constraints.latency_ms=0"], "search.constraints.latency_ms must be null or"),
        (["search.sampler=cmaes", "search.objectives=[ap,parameters]"], "supports one objective"),
        (["search.sampler=cmaes", "search.constraints.parameters=9"], "no constraints"),
        (["search.sampler=tpee"], "did you mean tpe?"),
        (["search.pruner=halving"], "search.pruner must be one of successive_halving, hyperband"),
        (["search.percentile=101"], "search.percentile must lie within 0 and 100"),
    ],
)
def test_impossible_searches_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match="impossible settings") as error:
        compose(overrides)
    assert message in str(error.value)
