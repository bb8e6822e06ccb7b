"""Does the search need fewer epochs than others? ``python tests/benchmarks/search.py``

Searches are replayed on recorded trainings: each Parquet file in ``curves/`` (made by
``record_curves.py``) is a table of configurations and their learning curves. A searcher proposes
values; the most similar recorded configuration that it has not had yet is "trained" in their place
by reading its curve, and the searcher gets that configuration's values as if it had proposed them.

The distance of two configurations is a weighted sum over the parameters: 1 for different choices
(or for a parameter that only one of them has), the distance relative to the bounds for a number.
The weights are the parameters' importances for AP (a forest's impurity importance): with equal
weights (--plain) a proposal is often replaced by one with another learning rate, because the many
unimportant parameters are more similar. The cost is counted in epochs, including those of pruned
trials and of controls.

A search has reached its target when (best - ap) / (best - median) <= 0.05, where ap is its best
report, and best and median are of all recorded configurations. It is censored at 64 full budgets.
Compared, from the same seeds:

* random: ``search.sampler=random search.pruner=none``, without controls;
* stock: Ray's OptunaSearch and ASHAScheduler with their defaults, but the budget as max_t;
* ours: the search of a study (``StageSearch``) with controls; KEY=VALUE changes its settings;
* joint, only with --only: the same, but with Optuna's TPE over all parameters at once
  (``multivariate`` and ``group``).
"""

from __future__ import annotations

import functools
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import optuna
import pyarrow.parquet as pq
from benchmark import new_parser, new_table
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

CURVES = Path(__file__).resolve().parent / "curves"
SHORTFALL = 0.05
"""Distance of the target from the best AP, relative to that of the median."""
BUDGETS = 64
"""Full budgets after which a search that has not reached its target is censored."""


class Recorded:
    """Configurations that were trained to the end, and their curves.

    Attributes:
        values: each configuration's values by config path.
        curves: AP after each epoch, 0 to 1, (configurations, epochs); 0 after divergence.
        target: the AP to reach.
        shares: each parameter's weight in the distance of two configurations; they sum to 1.
    """

    def __init__(self, file: Path, space: SearchSpace, *, plain: bool = False) -> None:
        rows = pq.read_table(file).to_pylist()
        self.name, self.space = file.stem, space
        self.values = [
            {path: row[path] for path in space.paths if row[path] is not None} for row in rows
        ]
        self.budget = max(len(row["curve"]) for row in rows)
        padding = [[0.0] * (self.budget - len(row["curve"])) for row in rows]
        self.curves = np.array(
            [row["curve"] + zeros for row, zeros in zip(rows, padding, strict=True)]
        )
        aps = self.curves.max(axis=1)
        self.best, self.median = float(aps.max()), float(np.median(aps))
        self.target = self.best - SHORTFALL * (self.best - self.median)
        self.places = np.array([self._place(values) for values in self.values])
        number = len(space.parameters)
        self.shares = np.full(number, 1 / number) if plain else self._importances(aps)

    def _importances(self, aps: NDArray[Any]) -> NDArray[Any]:
        """Each parameter's impurity importance in a forest that predicts the ranks of AP."""
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
        importances = forest.feature_importances_
        return np.array([importances[np.array(owners) == path].sum() for path in self.space.paths])

    def _place(self, values: Mapping[str, Any]) -> list[float]:
        """Map the values to a number each: NaN for a missing one, twice the index of a choice."""
        return [
            _place_of(parameter, values.get(parameter.path)) for parameter in self.space.parameters
        ]

    def most_similar(self, values: Mapping[str, Any], used: Sequence[int]) -> int:
        """Return the index of the configuration most similar to the values, except ``used``."""
        difference = np.abs(self.places - np.array(self._place(values)))
        both_lack = np.isnan(self.places) & np.isnan(self._place(values))
        difference = np.where(both_lack, 0.0, np.nan_to_num(np.minimum(difference, 1.0), nan=1.0))
        distance = difference @ self.shares
        distance[list(used)] = np.inf
        return int(distance.argmin())

    def reached_by(self) -> list[tuple[int, int]]:
        """List the configurations that reach the target, and their epochs at that point."""
        reaches = self.curves >= self.target
        indices = np.flatnonzero(reaches.any(axis=1))
        return [(int(i), int(reaches[i].argmax()) + 1) for i in indices]


def _place_of(parameter: Parameter, value: Any) -> float:
    if value is None:
        return float("nan")
    if isinstance(parameter.distribution, CategoricalDistribution):
        return 2.0 * parameter.distribution.choices.index(value)
    return place_in(parameter.distribution, value)


class Searcher(Protocol):
    """Proposes values and prunes trials, which have numbers from 0."""

    def propose(self) -> tuple[int, Mapping[str, Any]]:
        """Start a trial; return its number and its values by config path."""
        ...

    def replace_values(self, number: int, values: Mapping[str, Any]) -> None:
        """Replace the trial's values."""
        ...

    def report(self, number: int, epoch: int, ap: float) -> bool:
        """Record an epoch; return whether the trial is over."""
        ...


class Ours:
    """The search of a study with plan=joint, without Ray and in memory."""

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

    def replace_values(self, number: int, values: Mapping[str, Any]) -> None:
        set_values(self.search.study, number, self.search.space, values)

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
    """Ray's OptunaSearch and ASHAScheduler, called as Tune calls them."""

    class Trial(NamedTuple):
        """The part of a trial that ASHA uses."""

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

    def replace_values(self, number: int, values: Mapping[str, Any]) -> None:
        set_values(self.search._ot_study, number, self.space, values)

    def report(self, number: int, epoch: int, ap: float) -> bool:
        trial, result = self.Trial(str(number)), {"training_iteration": epoch, "ap": ap}
        is_over = self.scheduler.on_trial_result(None, trial, result) == TrialScheduler.STOP
        if is_over:
            self.search.on_trial_complete(trial.trial_id, result)
        else:
            self.search.on_trial_result(trial.trial_id, result)
        return is_over


def set_values(
    study: optuna.Study, number: int, space: SearchSpace, values: Mapping[str, Any]
) -> None:
    """Set a running trial's values, as if they had been suggested."""
    trial = study.get_trials(deepcopy=False)[number]  # the storage's own, since it is in memory
    trial.params = dict(values)
    trial.distributions = {p.path: p.distribution for p in space.parameters if p.path in values}


@functools.cache
def config_of(name: str, *overrides: str) -> StudyConfig:
    """Return the settings of a study on the data of these curves."""
    unused = ("storage=nowhere", "data.root=nowhere", "teacher.init=nowhere")
    return compose([*SETTINGS[name], *unused, *overrides])


def epochs_to_target(recorded: Recorded, searcher: Searcher, concurrent: int) -> tuple[int, int]:
    """Count the epochs until the target is reached, and the trials started by then.

    ``concurrent`` trials take turns, an epoch each. The epochs are ``BUDGETS`` full budgets if the
    target is not reached within them, or if no recorded configuration is left.
    """
    limit = BUDGETS * recorded.budget
    used: list[int] = []
    running: list[tuple[int, int, int]] = []  # number, configuration, epochs
    for spent in range(1, limit + 1):
        if len(running) < concurrent and len(used) < len(recorded.values):
            number, values = searcher.propose()
            used.append(recorded.most_similar(values, used))
            searcher.replace_values(number, recorded.values[used[-1]])
            running.append((number, used[-1], 0))
        if not running:
            break
        number, index, epochs = running.pop(0)
        ap = float(recorded.curves[index, epochs])
        if ap >= recorded.target:
            return spent, len(used)
        if not searcher.report(number, epochs + 1, ap):
            running.append((number, index, epochs + 1))
    return limit, len(used)


def compare(
    recorded: Recorded,
    searchers: Mapping[str, Callable[[int], Searcher]],
    seeds: range,
    concurrent: int,
) -> Table:
    """Run all searchers with all seeds and return the table of their epochs."""
    limit = BUDGETS * recorded.budget
    table: Table = new_table(
        f"{recorded.name}: epochs until {recorded.target:.3f} AP, {len(seeds)} seeds",
        "",
        "median",
        "quartiles",
        "censored",
        "trials",
        "to random",
        "to stock",
        "CPU s",
    )
    medians: dict[str, float] = {}
    for name, new in searchers.items():
        start = time.process_time()
        found = [epochs_to_target(recorded, new(seed), concurrent) for seed in seeds]
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
    parser = new_parser(__doc__)
    parser.add_argument("--curves", action="append", help="a name in curves/ (default: all)")
    parser.add_argument("--seeds", type=int, default=100, help="at least 2 (default 100)")
    parser.add_argument("--first-seed", type=int, default=0, help="default 0")
    parser.add_argument("--concurrent", type=int, default=1, help="trials at once (default 1)")
    parser.add_argument(
        "--plain", action="store_true", help="give all parameters equal weight in the distance"
    )
    parser.add_argument(
        "--only",
        action="append",
        choices=["random", "stock", "ours", "joint"],
        help="a searcher; may be repeated (default: all but joint)",
    )
    parser.add_argument(
        "settings", nargs="*", metavar="KEY=VALUE", help="settings of ours, as of tune.py"
    )
    options = parser.parse_intermixed_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    names = options.curves or sorted(file.stem for file in CURVES.glob("*.parquet"))
    seeds = range(options.first_seed, options.first_seed + max(2, options.seeds))
    for name in names:
        space = load_space(config_of(name).search_space)
        recorded = Recorded(CURVES / f"{name}.parquet", space, plain=options.plain)
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
        selected = {key: searchers[key] for key in options.only or ("random", "stock", "ours")}
        Console(width=100).print(compare(recorded, selected, seeds, options.concurrent))


if __name__ == "__main__":
    main()
