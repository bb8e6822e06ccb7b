"""How efficient the search is: ``python tests/benchmarks/search.py``, replayed on recorded curves.

Every Parquet file in ``curves/`` (``record_curves.py``) is a table of real trainings. A searcher
proposes values in the space that was recorded; in their place the most alike recorded
configuration that it has not had yet is trained, by reading its curve, and the searcher is told
that configuration's values for its proposal. How much two differ is a sum over the parameters: 1
for another choice (or for a parameter that only one of both has), the distance between the bounds
for a number, each times the share in which the parameter decides what AP the recorded
configurations have (a forest's impurity importance). Else a proposal would often be exchanged for
one of another learning rate, since its many parameters that matter little are nearer: with
--plain, all count alike. An epoch is the unit of cost, those of pruned trials and of controls
included.

A search has reached its target once (best - ap) / (best - median) <= 0.05, ap being the best that
any report of it had; best and median are those of all recorded configurations. It is censored at
64 full budgets. What is compared, from the same seeds:

* random: ``search.sampler=random search.pruner=none``, without controls;
* stock: Ray's OptunaSearch and ASHAScheduler as they come, but ASHA's max_t is the budget;
* ours: what a study does (``StageSearch``), its controls included. KEY=VALUE changes its settings;
* joint, only where --only asks for it: the same, but with Optuna's TPE over all parameters at once
  (``multivariate`` and ``group``).
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

import numpy as np
import optuna
import pyarrow.parquet as pq
from numpy.typing import NDArray
from optuna.distributions import CategoricalDistribution
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search.optuna import OptunaSearch
from record_curves import SETTINGS
from rich.console import Console
from rich.table import Table
from sklearn.ensemble import ExtraTreesRegressor

from search_spaces.space import Parameter, SearchSpace, load_space, place_in
from study.config.compose import compose, flatten, to_plain, with_values
from study.config.schema import StudyConfig
from study.search.controls import BASELINE, DEFAULTS, baseline_values
from study.search.stage import StageSearch

SHORTFALL = 0.05
"""The share of the way from the median to the best that a search may lack at its target."""
BUDGETS = 64
"""Full budgets after which a search that has not reached its target is censored."""


class Recorded:
    """Configurations that were trained to the end, and their curves.

    Attributes:
        values: what each configuration had, by config path.
        curves: AP after each epoch, 0 to 1, (configurations, epochs); 0 once it had diverged.
        target: the AP that a search is to reach.
        shares: in which each parameter decides how much two configurations differ; they sum to 1.
    """

    def __init__(self, file: Path, space: SearchSpace, *, plain: bool = False) -> None:
        rows = pq.read_table(file).to_pylist()
        self.name, self.space = file.stem, space
        self.values = [
            {path: row[path] for path in space.paths if row[path] is not None} for row in rows
        ]
        self.budget = max(len(row["curve"]) for row in rows)
        lacking = [[0.0] * (self.budget - len(row["curve"])) for row in rows]
        self.curves = np.array(
            [row["curve"] + zeros for row, zeros in zip(rows, lacking, strict=True)]
        )
        aps = self.curves.max(axis=1)
        self.best, self.median = float(aps.max()), float(np.median(aps))
        self.target = self.best - SHORTFALL * (self.best - self.median)
        self.places = np.array([self._place(values) for values in self.values])
        number = len(space.parameters)
        self.shares = np.full(number, 1 / number) if plain else self._importances(aps)

    def _importances(self, aps: NDArray[Any]) -> NDArray[Any]:
        """Of each parameter, the impurity that it takes from the ranks of AP in a forest."""
        columns, owners = [], []
        for parameter, places in zip(self.space.parameters, self.places.T, strict=True):
            kinds = [places]
            if isinstance(parameter.distribution, CategoricalDistribution):
                kinds = [
                    places == 2 * index for index in range(len(parameter.distribution.choices))
                ]
            columns += [np.nan_to_num(column.astype(float), nan=-0.5) for column in kinds]
            owners += [parameter.path] * len(kinds)
        forest = ExtraTreesRegressor(500, max_features=0.6, bootstrap=True, random_state=0)
        forest.fit(np.stack(columns, axis=1), aps.argsort().argsort())
        found = forest.feature_importances_
        return np.array([found[np.array(owners) == path].sum() for path in self.space.paths])

    def _place(self, values: Mapping[str, Any]) -> list[float]:
        """A number for every parameter: NaN where there is none, a choice's index times 2."""
        return [
            _place_of(parameter, values.get(parameter.path)) for parameter in self.space.parameters
        ]

    def most_alike(self, values: Mapping[str, Any], had: Sequence[int]) -> int:
        """The index of the configuration that is trained in place of these values."""
        apart = np.abs(self.places - np.array(self._place(values)))
        both_lack = np.isnan(self.places) & np.isnan(self._place(values))
        apart = np.where(both_lack, 0.0, np.nan_to_num(np.minimum(apart, 1.0), nan=1.0))
        distance = apart @ self.shares
        distance[list(had)] = np.inf
        return int(distance.argmin())

    def reached_by(self) -> list[tuple[int, int]]:
        """The configurations that reach the target, and the epoch in which they do."""
        reach = self.curves >= self.target
        return [(int(i), int(reach[i].argmax()) + 1) for i in np.flatnonzero(reach.any(axis=1))]


def _place_of(parameter: Parameter, value: Any) -> float:
    if value is None:
        return float("nan")
    if isinstance(parameter.distribution, CategoricalDistribution):
        return 2.0 * parameter.distribution.choices.index(value)
    return place_in(parameter.distribution, value)


class Searcher(Protocol):
    """What proposes values and ends trials early; trials are known by their numbers, from 0."""

    def propose(self) -> tuple[int, Mapping[str, Any]]:
        """A new trial, and its values by config path."""
        ...

    def told(self, number: int, values: Mapping[str, Any]) -> None:
        """The trial has these values instead."""
        ...

    def report(self, number: int, epoch: int, ap: float) -> bool:
        """Records an epoch; returns whether the trial is over."""
        ...


class Ours:
    """The search of a study of plan joint, without Ray and in memory."""

    def __init__(self, recorded: Recorded, overrides: Sequence[str], seed: int, controls: bool):
        self.config = with_values(config_of(recorded.name, *overrides), {"seed": seed})
        known: dict[str, dict[str, Any]] = {}
        if controls:
            epochs = self.config.distill.epochs + self.config.refine.epochs
            known = {BASELINE: baseline_values(epochs), DEFAULTS: {}}
        self.search = StageSearch(
            optuna.create_study(direction="maximize"),
            self.config,
            recorded.space,
            controls=known,
            fixed={},
        )

    def propose(self) -> tuple[int, Mapping[str, Any]]:
        number = self.search.new_trial()
        self.search.suggestion(number)
        return number, self.search.frozen(number).params

    def told(self, number: int, values: Mapping[str, Any]) -> None:
        exchange(self.search.study, number, self.search.space, values)

    def report(self, number: int, epoch: int, ap: float) -> bool:
        state = self.search.record(number, {"epoch": epoch, "val_ap": ap})
        if state is not None:
            self.search.end_trial(number, state)
        return state is not None


class Joint(Ours):
    """The same search with Optuna's joint TPE."""

    def __init__(self, recorded: Recorded, overrides: Sequence[str], seed: int) -> None:
        super().__init__(recorded, overrides, seed, controls=True)
        settings: dict[str, Any] = {"multivariate": True, "group": True}
        settings["n_startup_trials"] = self.config.search.startup_trials

        def sampler(number: int) -> optuna.samplers.BaseSampler:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                return optuna.samplers.TPESampler(seed=1000 * seed + number, **settings)

        self.search._sampler = sampler  # type: ignore[method-assign]


class Stock:
    """OptunaSearch and ASHAScheduler, called as Tune calls them."""

    class Trial(NamedTuple):
        """What ASHA knows of a trial."""

        trial_id: str

    def __init__(self, recorded: Recorded, seed: int, **asha: Any) -> None:
        defaults = flatten(to_plain(config_of(recorded.name)))
        self.space = recorded.space

        def define(trial: Any) -> None:
            recorded.space.suggest(trial, defaults)

        self.search = OptunaSearch(define, metric="ap", mode="max", seed=seed)
        self.scheduler = ASHAScheduler(metric="ap", mode="max", max_t=recorded.budget, **asha)
        self.count = 0

    def propose(self) -> tuple[int, Mapping[str, Any]]:
        number, self.count = self.count, self.count + 1
        values = self.search.suggest(str(number))
        assert values is not None
        self.scheduler.on_trial_add(None, self.Trial(str(number)))
        return number, values

    def told(self, number: int, values: Mapping[str, Any]) -> None:
        exchange(self.search._ot_study, number, self.space, values)

    def report(self, number: int, epoch: int, ap: float) -> bool:
        trial, result = self.Trial(str(number)), {"training_iteration": epoch, "ap": ap}
        is_over = self.scheduler.on_trial_result(None, trial, result) == TrialScheduler.STOP
        if is_over:
            self.search.on_trial_complete(trial.trial_id, result)
        else:
            self.search.on_trial_result(trial.trial_id, result)
        return is_over


def exchange(
    study: optuna.Study, number: int, space: SearchSpace, values: Mapping[str, Any]
) -> None:
    """The running trial has these values, as if they had been suggested."""
    trial = study.get_trials(deepcopy=False)[number]  # the storage's own, since it is in memory
    trial.params = dict(values)
    trial.distributions = {p.path: p.distribution for p in space.parameters if p.path in values}


@functools.cache
def config_of(name: str, *overrides: str) -> StudyConfig:
    """What a study on the data of these curves would be set to."""
    ungiven = ("storage=nowhere", "data.root=nowhere", "teacher.init=nowhere")
    return compose([*SETTINGS[name], *ungiven, *overrides])


def epochs_to_target(recorded: Recorded, searcher: Searcher, concurrent: int) -> tuple[int, int]:
    """The epochs trained until the target was reached, and the trials begun by then.

    As many trials at once as there are to be, each an epoch in turn. ``BUDGETS`` full budgets
    where the target is not reached in them, or all configurations were had.
    """
    limit = BUDGETS * recorded.budget
    had: list[int] = []
    running: list[tuple[int, int, int]] = []  # number, configuration, epochs
    for spent in range(1, limit + 1):
        if len(running) < concurrent and len(had) < len(recorded.values):
            number, values = searcher.propose()
            had.append(recorded.most_alike(values, had))
            searcher.told(number, recorded.values[had[-1]])
            running.append((number, had[-1], 0))
        if not running:
            break
        number, index, epochs = running.pop(0)
        ap = float(recorded.curves[index, epochs])
        if ap >= recorded.target:
            return spent, len(had)
        if not searcher.report(number, epochs + 1, ap):
            running.append((number, index, epochs + 1))
    return limit, len(had)


def compare(
    recorded: Recorded,
    searchers: Mapping[str, Callable[[int], Searcher]],
    seeds: range,
    at_once: int,
) -> Table:
    limit = BUDGETS * recorded.budget
    table = Table(
        title=f"{recorded.name}: epochs until {recorded.target:.3f} AP, {len(seeds)} seeds"
    )
    for heading in (
        "",
        "median",
        "quartiles",
        "censored",
        "trials",
        "to random",
        "to stock",
        "CPU s",
    ):
        table.add_column(heading, justify="right" if heading else "left")
    medians: dict[str, float] = {}
    for name, new in searchers.items():
        start = time.process_time()
        found = [epochs_to_target(recorded, new(seed), at_once) for seed in seeds]
        epochs, trials = zip(*found, strict=True)
        medians[name] = statistics.median(epochs)
        low, _, high = statistics.quantiles(epochs, n=4)
        table.add_row(
            name,
            f"{medians[name]:.0f}",
            f"{low:.0f} to {high:.0f}",
            f"{sum(count == limit for count in epochs)}",
            f"{statistics.median(trials):.0f}",
            *(_ratio(medians, name, other) for other in ("random", "stock")),
            f"{time.process_time() - start:.1f}",
        )
    return table


def _ratio(medians: Mapping[str, float], name: str, other: str) -> str:
    return f"{medians[name] / medians[other]:.2f}" if other in medians else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description="Replay searches on recorded curves.")
    parser.add_argument("--curves", action="append", help="a name (default: all there are)")
    parser.add_argument("--seeds", type=int, default=100, help="how many (default 100)")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--concurrent", type=int, default=1, help="trials at once (default 1)")
    parser.add_argument(
        "--plain", action="store_true", help="all parameters count alike in what is most alike"
    )
    parser.add_argument("--only", action="append", choices=["random", "stock", "ours", "joint"])
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="for ours, as of tune.py")
    options = parser.parse_intermixed_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    names = options.curves or sorted(file.stem for file in (HERE / "curves").glob("*.parquet"))
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    for name in names:
        space = load_space(config_of(name).search_space)
        recorded = Recorded(HERE / "curves" / f"{name}.parquet", space, plain=options.plain)
        reached = ", ".join(
            f"{number} in epoch {epoch}" for number, epoch in recorded.reached_by()
        )
        print(
            f"{name}: {len(recorded.values)} configurations of {recorded.budget} epochs, AP: "
            f"best {recorded.best:.3f}, median {recorded.median:.3f}; "
            f"the target is reached by {reached}"
        )
        searchers: dict[str, Callable[[int], Searcher]] = {
            "random": functools.partial(
                Ours, recorded, ["search.sampler=random", "search.pruner=none"], controls=False
            ),
            "stock": functools.partial(Stock, recorded),
            "ours": functools.partial(Ours, recorded, options.settings, controls=True),
            "joint": functools.partial(Joint, recorded, options.settings),
        }
        chosen = {key: searchers[key] for key in options.only or ("random", "stock", "ours")}
        Console(width=100).print(compare(recorded, chosen, seeds, options.concurrent))


if __name__ == "__main__":
    main()
