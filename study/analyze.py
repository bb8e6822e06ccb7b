"""Print and plot the results of a study: ``python study/analyze.py studies/NAME``.

All of it comes from the Parquet files under ``STUDY/results``, so that a running study, or one
copied from another machine, can be analyzed too. AP is stored as 0 to 1 and shown as 0 to 100.
"""

import os
import signal
import sys

HERE = os.path.dirname(os.path.realpath(__file__))
if os.path.isfile(os.path.join(HERE, "__init__.py")):
    # Inside a checkout: its root on the path in place of study/, whose file names would shadow
    # others.
    sys.path[0] = os.path.dirname(HERE)
import study  # noqa: F401  (checks the working folder before torch is imported)

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while the packages load

import argparse
import collections
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import rich.box
from optuna.distributions import CategoricalDistribution
from rich.console import Console, RenderableType
from rich.table import Table

from search_spaces.space import SearchSpace, place_in
from study.analysis.importance import MIN_TRIALS, beyond_chance, importance
from study.analysis.tables import final_table, front_table, joint_table
from study.config.typed_paths import typed_path
from study.display import escape_unprintable, percent
from study.errors import InputError
from study.interrupts import ends_in_one_line
from study.search.controls import BASELINE, DEFAULTS
from study.search.objectives import may_win
from study.search.staged import PARENT
from study.storage.paths import plots_folder
from study.storage.tables import (
    CURVES,
    JOINTS,
    PARAMS,
    TableRow,
    read_final,
    read_reports,
    read_trials,
    space_of,
)
from study.validation.confirm_table import confirm_table, read_verdicts, verdict_sentence

NEAR_A_BOUND = 0.05
"""Distance from a bound that is reported: share of the range, or of that of its logarithm."""
PLAIN_WIDTH = 120
"""Width of the output in a file or a pipe, characters."""
EXPLANATION = """\
prints, from the Parquet files under STUDY/results:
  the number of trials in each state, and the reason of each failure
  the best trials and their parameters
  the gain of the search over the two controls (baseline, defaults), in points of AP
  the finalists on the official validation set, also joint by joint (once the study has ended)
  the Pareto front: trials that no other trial beats in both AP and cost
  the importance of each parameter, and best values near a bound of their range

saves in STUDY/plots:
  learning_curves.png        AP by epoch, a curve per trial
  parallel_coordinates.png   parameters and AP, a line per trial
  pareto_front.png           AP over latency and over the number of parameters
  oks_curves.png             AP of the finalists by OKS threshold (once the study has ended)
  joint_ap.png               AP of the finalists by joint (once the study has ended)

A study that is still running can be analyzed, too. AP is shown as 0 to 100.

examples:
  python study/analyze.py studies/drawn-joint-joint
  python study/analyze.py studies/drawn-joint-joint --top 10
"""


@dataclasses.dataclass(frozen=True)
class Evidence:
    """The tables of a study, as rows."""

    trials: list[TableRow]
    reports: list[TableRow]
    final: list[TableRow]
    joints: list[TableRow]
    """AP by finalist and joint; empty until the study has ended, as are ``final``, ``curves``."""
    curves: list[TableRow]
    space: SearchSpace
    verdicts: Sequence[TableRow] = ()
    """Configurations that were trained again, the winner first; empty if none was."""

    def ranked(self) -> list[TableRow]:
        """Return the complete trials that satisfy the constraints, the best first."""
        done = [row for row in self.trials if may_win(row)]
        return sorted(done, key=lambda row: (-row["objective"], row["trial"]))

    def has_infeasible(self) -> bool:
        """Return whether any trial violates the constraints."""
        return any(row.get("feasible") is False for row in self.trials)

    def control(self, name: str) -> TableRow | None:
        """Return the best trial of a control: baseline or defaults; None before it has ended."""
        runs = [row for row in self.trials if row["control"] == name]
        return max(runs, key=lambda row: row["objective"] or 0.0, default=None)


def read_evidence(study_folder: Path) -> Evidence:
    """Read the tables of a study.

    Raises:
        InputError: the folder is no study, or has no finished trial.
    """
    trials = read_trials(study_folder)
    return Evidence(
        trials=trials.to_pylist(),
        reports=read_reports(study_folder).to_pylist(),
        final=read_final(study_folder).to_pylist(),
        joints=read_final(study_folder, JOINTS).to_pylist(),
        curves=read_final(study_folder, CURVES).to_pylist(),
        space=space_of(trials),
        verdicts=read_verdicts(study_folder),
    )


def near_bounds(best: TableRow, space: SearchSpace) -> list[str]:
    """Return a sentence for each parameter of this trial that is near a bound of its range."""
    found = []
    for parameter in space.parameters:
        value = best.get(PARAMS + parameter.path)
        if parameter.path == PARENT:  # a rank: better or more parents don't exist
            continue
        if value is None or isinstance(parameter.distribution, CategoricalDistribution):
            continue
        low, high = parameter.extremes()
        share = place_in(parameter.distribution, value)
        if low == high or NEAR_A_BOUND < share < 1 - NEAR_A_BOUND:
            continue
        side, bound = ("lower", low) if share < 0.5 else ("upper", high)
        found.append(
            f"{parameter.path}={value:g} lies near the {side} bound of its range, {bound:g}: "
            "the best value may be outside; widen the range if values outside are possible"
        )
    return found


def findings(evidence: Evidence, top: int, box: rich.box.Box) -> Iterator[RenderableType]:
    """Yield the lines and tables to print, in order.

    Args:
        top: number of trials to list.
    """
    yield from _overview(evidence)
    ranked = evidence.ranked()
    if not ranked:
        constraint = " satisfies search.constraints" if evidence.has_infeasible() else ""
        yield f"No complete trial{constraint or ' yet'}, so there is no best trial."
        return
    yield _best_table(ranked[:top], evidence.space, box)
    yield _gain_table(evidence, ranked[0], box)
    if evidence.final:
        yield final_table(evidence.final, box)
        if evidence.verdicts:
            yield confirm_table(evidence.verdicts, box)
            yield verdict_sentence(evidence.verdicts)
    else:
        yield "Figures on the official validation set: none yet; the study adds them at its end."
    if evidence.joints:
        yield joint_table(evidence.joints, box)
    front = front_table(evidence.trials, box)
    if front is not None:
        yield front
    yield from _importances(evidence, box)
    yield from near_bounds(ranked[0], evidence.space)


def _overview(evidence: Evidence) -> Iterator[str]:
    counts = collections.Counter(row["state"] for row in evidence.trials)
    states = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    running = {row["trial"] for row in evidence.reports if row["trial"] is not None}.difference(
        row["trial"] for row in evidence.trials
    )
    more = f"; {len(running)} more started" if running else ""
    yield f"{evidence.trials[0]['study']}: {len(evidence.trials)} trials ended: {states}{more}"
    yield f"Question: {evidence.space.question}"
    for row in evidence.trials:
        if row["state"] == "FAIL":
            reason = (row["error"] or "no reason was recorded").strip().splitlines()[-1]
            yield f"Trial {row['trial']} failed: {reason}"


def _best_table(best: Sequence[TableRow], space: SearchSpace, box: rich.box.Box) -> Table:
    title = "Best trials, by AP on the slice held out of train"
    table = Table(title=title, box=box, collapse_padding=True, pad_edge=False)
    table.add_column("trial", no_wrap=True)
    for row in best:
        control = f" ({row['control']})" if row["control"] else ""
        table.add_column(f"{row['trial']}{control}", justify="right", overflow="fold")
    table.add_row("AP", *(percent(row["objective"]) for row in best))
    for name in ("latency_ms", "parameters"):
        if any(row.get(name) is not None for row in best):
            table.add_row(name, *(_text(row.get(name)) for row in best))
    table.add_row("stage", *(_text(row["best_stage"]) for row in best))
    table.add_row("epoch", *(_text(row["best_epoch"]) for row in best))
    for path in space.paths:
        table.add_row(path, *(_text(row.get(PARAMS + path)) for row in best))
    return table


def _gain_table(evidence: Evidence, best: TableRow, box: rich.box.Box) -> Table:
    table = Table(title="Gain over the controls, in points of AP", box=box)
    for name in ("", "trial", "AP", "over baseline", "over defaults"):
        table.add_column(name, justify="right" if name else "left")
    controls = [evidence.control(BASELINE), evidence.control(DEFAULTS)]
    for name, row in zip((BASELINE, DEFAULTS, "best"), (*controls, best), strict=True):
        if row is None:
            table.add_row(name, "-", "-", "-", "-")
            continue
        gains = [_gain(row, control) for control in controls]
        table.add_row(name, str(row["trial"]), percent(row["objective"]), *gains)
    return table


def _gain(row: TableRow, control: TableRow | None) -> str:
    if control is row:
        return ""
    if control is None or row["objective"] is None or control["objective"] is None:
        return "-"
    return f"{100 * (row['objective'] - control['objective']):+.1f}"


def _importances(evidence: Evidence, box: rich.box.Box) -> Iterator[RenderableType]:
    shares = importance(evidence.trials, evidence.space)
    if not shares:
        yield (
            "Importance of the parameters: not computed; it needs at least "
            f"{MIN_TRIALS} trials, complete or pruned, of different AP."
        )
        return
    roles = {parameter.path: parameter.role for parameter in evidence.space.parameters}
    table = Table(title="Importance: share of each parameter in whether a trial is good", box=box)
    table.add_column("parameter", no_wrap=True)
    for name in ("role", "share", "", "more than chance"):
        table.add_column(name, justify="right" if name == "share" else "left")
    certain = beyond_chance(evidence.trials, evidence.space)
    for path, share in shares.items():
        bar, sure = "#" * round(20 * share), "yes" if path in certain else "not shown"
        table.add_row(path, roles[path], f"{100 * share:.0f} %", bar, sure)
    yield table
    if not certain:
        yield "No share exceeds what chance gives in this number of trials: treat them as hints."
    rare = [path for path in evidence.space.paths if path not in shares]
    if rare:
        yield f"In too few trials to compute the importance: {', '.join(rare)}"


def _text(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _draw(evidence: Evidence, folder: Path) -> Iterator[Path]:
    from study.analysis.parallel_coordinates import draw_parallel_coordinates
    from study.analysis.plots import (
        draw_joint_bars,
        draw_learning_curves,
        draw_oks_curves,
        draw_pareto_front,
    )

    trials = evidence.trials
    yield draw_learning_curves(trials, evidence.reports, folder / "learning_curves.png")
    yield draw_parallel_coordinates(trials, evidence.space, folder / "parallel_coordinates.png")
    if any(row.get("latency_ms") for row in trials):
        yield draw_pareto_front(trials, folder / "pareto_front.png")
    if evidence.curves:
        yield draw_oks_curves(evidence.curves, folder / "oks_curves.png")
    if evidence.joints:
        yield draw_joint_bars(evidence.joints, folder / "joint_ap.png")


@ends_in_one_line()
def main(arguments: Sequence[str] | None = None) -> None:
    escape_unprintable()
    parser = argparse.ArgumentParser(
        description="Print and plot the results of a study.",
        epilog=EXPLANATION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "study", metavar="STUDY", type=typed_path, help="folder of the study: <storage>/<name>"
    )
    parser.add_argument(
        "--top", type=int, default=5, help="number of best trials to list (default 5)"
    )
    options = parser.parse_args(arguments)
    if options.top < 1:
        parser.error(f"--top must be at least 1, got {options.top}")
    try:
        evidence = read_evidence(options.study)
    except InputError as error:
        raise SystemExit(f"error: {error}") from error
    is_terminal = sys.stdout.isatty()
    console = Console(width=None if is_terminal else PLAIN_WIDTH, markup=False, highlight=False)
    box = rich.box.SIMPLE_HEAD if is_terminal else rich.box.MARKDOWN
    for part in findings(evidence, options.top, box):
        console.print(part, soft_wrap=isinstance(part, str))
    for file in _draw(evidence, plots_folder(options.study)):
        console.print(f"Saved {file}", soft_wrap=True)


if __name__ == "__main__":
    main()
