"""Samplers and pruners by name: interruptions do not change their decisions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

from search_spaces.space import SearchSpace, load_space
from study.config.compose import compose
from study.config.derived import resolve
from study.config.schema import StudyConfig
from study.search.owner import StudyOwner
from study.search.samplers import build_sampler, sampler_messages

BASICS = ("name=study", "distill.epochs=3", "refine.epochs=1", "search.startup_trials=3")
TRIALS = 7
GP_TRIALS = 6
"""Three of them use the model; gp takes 0.2 s to fit one."""
SAMPLERS = ("tpe", "gp", "cmaes", "nsga2", "qmc", "random")
PRUNERS = ("successive_halving", "hyperband", "median", "percentile")
CHOICE = "distill.structure.kind"
WEIGHT = "distill.structure.weight"
RATE, SCHEDULE = "distill.optimizer.lr", "distill.schedule"

Suggestion = dict[str, Any]
Answers = list[bool]


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip fsync, which protects against power cuts only."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def config_in(folder: Path, *overrides: str) -> StudyConfig:
    folder.mkdir(exist_ok=True)
    return compose([f"storage={folder}", "search_space=smoke", *BASICS, *overrides])


def start(config: StudyConfig, session: str = "a") -> StudyOwner:
    folder = Path(config.storage) / "study"
    folder.mkdir(exist_ok=True)
    return StudyOwner(
        str(folder), config, resolve(config), load_space(config.search_space).to_json(), session
    )


def curve(values: dict[str, Any]) -> list[float]:
    """Return a rising curve of APs, highest at a learning rate of 3e-3."""
    best = 0.5 - 0.1 * abs(math.log10(values.get("distill.optimizer.lr", 1e-3) / 3e-3))
    return [best * share for share in (0.3, 0.6, 0.8, 1.0)]


def run_trial(owner: StudyOwner, index: int, aps: list[float] | None = None) -> Answers:
    suggestion = owner.suggest(f"t{index}")
    number = suggestion["number"]
    owner.report_costs(number, {"latency_ms": 2.0 + index % 3, "parameters": 1000 + index})
    answers: Answers = []
    for epoch, ap in enumerate(aps or curve(suggestion["values"]), 1):
        row = {"stage": "distill", "epoch": epoch, "seconds": 1.0, "val_ap": ap}
        answers.append(owner.report(number, row))
        if answers[-1]:
            break
    return answers


def search(config: StudyConfig, trials: int = TRIALS, *, interrupted: bool) -> list[Any]:
    """Return each trial's suggestion and answers; if interrupted, each trial has a new owner."""
    found: list[Any] = []
    owner = start(config)
    for index in range(trials):
        if interrupted:
            owner = start(config, f"session {index}")
        suggestion = owner.suggest(f"t{index}")
        found.append((suggestion, run_trial(owner, index)))
    return found


def needs(sampler: str) -> None:
    if sampler == "cmaes":
        pytest.importorskip("cmaes")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_suggests_the_same_after_restarts(sampler: str, tmp_path: Path) -> None:
    needs(sampler)
    settings = [f"search.sampler={sampler}", "search.pruner=none", "search.population=3"]
    whole, broken = (config_in(tmp_path / name, *settings) for name in ("whole", "broken"))
    trials = GP_TRIALS if sampler == "gp" else TRIALS
    found = search(whole, trials, interrupted=False)
    assert search(broken, trials, interrupted=True) == found
    numbers = [suggestion["number"] for suggestion, _ in found]
    rates = {suggestion["values"]["distill.optimizer.lr"] for suggestion, _ in found[2:]}
    assert numbers == list(range(trials)) and len(rates) > 2


@pytest.mark.parametrize("directions", [["maximize"], ["maximize", "minimize"]])
def test_tpe_models_a_weight_from_trials_of_the_same_kind(directions: list[str]) -> None:
    """The best weight is 0.05 for one kind and 5 for the other."""
    config, space = compose(["search.startup_trials=3"]), load_space("distill")
    study = optuna.create_study(directions=directions)
    rng = np.random.RandomState(0)
    best = {"pairwise": 0.05, "bone": 5.0}
    for number in range(60):
        values = {path: space_default(space, path) for path in (RATE, SCHEDULE)}
        kind, weight = list(best)[number % 2], float(10 ** rng.uniform(-2, 1))
        values |= {"distill.heatmap.kind": "none", CHOICE: kind, WEIGHT: weight}
        distributions = {p.path: p.distribution for p in space.parameters if p.path in values}
        loss = abs(math.log10(weight / best[kind]))
        reached = [-loss, 1.0][: len(directions)]
        study.add_trial(
            optuna.trial.create_trial(params=values, distributions=distributions, values=reached)
        )
    found: dict[str, list[float]] = {kind: [] for kind in best}
    for number in range(20):
        kind = list(best)[number % 2]
        study.sampler = build_sampler(config.search, config.seed, space, number, number)
        study.enqueue_trial({CHOICE: kind, "distill.heatmap.kind": "none"})
        trial = study.ask()
        found[kind].append(space.suggest(trial, {})[WEIGHT])
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
    for kind, weights in found.items():
        error = np.log10(np.array(weights) / best[kind])
        assert abs(np.median(error)) < 0.3, (kind, weights)


def space_default(space: SearchSpace, path: str) -> Any:
    """Return a valid value of the parameter."""
    return next(p.extremes()[0] for p in space.parameters if p.path == path)


@pytest.mark.parametrize("pruner", PRUNERS)
def test_restarts_and_other_objectives_do_not_change_pruning(pruner: str, tmp_path: Path) -> None:
    settings = [f"search.pruner={pruner}", "search.min_epochs=1", "search.startup_trials=2"]
    settings += ["search.sampler=random"]
    whole, broken = (config_in(tmp_path / name, *settings) for name in ("whole", "broken"))
    several = config_in(tmp_path / "several", *settings, "search.objectives=[ap,parameters]")
    found = search(whole, 9, interrupted=False)
    assert search(broken, 9, interrupted=True) == found
    assert search(several, 9, interrupted=True) == found
    lengths = [len(answers) for _, answers in found]
    assert min(lengths) < 4 and lengths[:2] == [4, 4]


@pytest.mark.parametrize("pruner", PRUNERS)
def test_controls_are_never_pruned_and_no_trial_before_min_epochs(
    pruner: str, tmp_path: Path
) -> None:
    settings = ["search.min_epochs=2", "search.startup_trials=1", "search.reduction_factor=2"]
    owner = start(config_in(tmp_path, f"search.pruner={pruner}", *settings))
    assert run_trial(owner, 0, [0.5, 0.6, 0.7, 0.8]) == [False, False, False, True]
    assert run_trial(owner, 1, [0.0, 0.0, 0.0, 0.0]) == [False, False, False, True]
    lengths = [len(run_trial(owner, index, [0.1 / index] * 4)) for index in range(2, 6)]
    assert min(lengths) == 2


def test_baseline_has_no_weight_of_a_loss_that_it_lacks(tmp_path: Path) -> None:
    values = start(config_in(tmp_path)).suggest("t0")["values"]
    assert values[CHOICE] == "none" and "distill.structure.weight" not in values


@pytest.mark.parametrize(("pruner", "passing"), [("median", 0.3), ("percentile", 0.4)])
def test_median_keeps_the_better_half_and_percentile_its_share(
    pruner: str, passing: float, tmp_path: Path
) -> None:
    settings = ["search.min_epochs=1", "search.percentile=25", "search.startup_trials=5"]
    owner = start(config_in(tmp_path, f"search.pruner={pruner}", *settings))
    for index, known in enumerate((0.5, 0.4, 0.3, 0.2, 0.1)):
        assert len(run_trial(owner, index, [known] * 4)) == 4
    assert run_trial(owner, 5, [passing - 0.01] * 4) == [True]
    assert len(run_trial(owner, 6, [passing + 0.01] * 4)) == 4


def test_sobol_points_spread_over_all_parameters(tmp_path: Path) -> None:
    """Each 2^k-th of a range has one of the first 2^k points of a scrambled sequence."""
    config, space = config_in(tmp_path, "search.sampler=qmc"), load_space("joint")
    study = optuna.create_study()
    found = []
    for point in range(8):
        study.sampler = build_sampler(config.search, config.seed, space, point + 2, point)
        trial = study.ask()
        found.append(all_values(space, trial))
    for parameter in space.parameters:
        if getattr(parameter.distribution, "log", False):
            low, high = map(math.log, parameter.extremes())
            places = [(math.log(v[parameter.path]) - low) / (high - low) for v in found]
            assert sorted(int(8 * place) for place in places) == list(range(8))
    kinds = [values["distill.structure.kind"] for values in found]
    assert len(set(kinds)) > 3


def all_values(space: SearchSpace, trial: optuna.Trial) -> dict[str, Any]:
    return trial.study.sampler.sample_relative(
        trial.study,
        trial.study.trials[trial.number],
        {parameter.path: parameter.distribution for parameter in space.parameters},
    )


def test_message_lists_parameters_that_a_sampler_cannot_model(tmp_path: Path) -> None:
    config, space = config_in(tmp_path), load_space("joint")

    def messages(sampler: str) -> list[str]:
        config.search.sampler = sampler
        return [*sampler_messages(config.search.sampler, space)]

    assert [messages(sampler) for sampler in ("tpe", "qmc", "random")] == [[], [], []]
    (cmaes,), (gp,), (nsga2,) = messages("cmaes"), messages("gp"), messages("nsga2")
    assert CHOICE in cmaes and CHOICE not in gp and CHOICE not in nsga2
    assert all("distill.structure.weight" in line for line in (cmaes, gp, nsga2))
    assert "distill.optimizer.lr" not in cmaes
