"""Say what a study found: ``python study/analyze.py studies/NAME``.

Everything comes from the Parquet files under ``STUDY/results``, so a study that still runs, or
one copied from another machine, is read in the same way. AP is stored as 0 to 1 and shown as
0 to 100.
"""

import os
import sys

HERE = os.path.dirname(os.path.realpath(__file__))
if os.path.isfile(os.path.join(HERE, "__init__.py")):
    # Inside a checkout: its root on the path in place of study/, whose file names would shadow
    # others.
    sys.path[0] = os.path.dirname(HERE)

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
from study.errors import InputError
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
"""Nearer than this share of the range; on a log scale, of the range of logarithms."""
PLAIN_WIDTH = 120
EXPLANATION = """\
prints, from the Parquet files under STUDY/results alone:
  how many trials ended in which state, and why any failed
  the best trials with their parameters
  what the known configs got, and what the search gained over them
  the figures on the official validation set, once the study has ended, also joint by joint
  the Pareto front: the trials that no other one beats in AP and cost
  which parameters mattered, and which best values lie near a bound of their range
and saves, under STUDY/plots:
  learning_curves.png        AP by epoch of every trial
  parallel_coordinates.png   every trial's parameters and AP
  pareto_front.png           AP over latency and over parameters
  oks_curves.png             the finalists' AP by OKS threshold, once the study has ended
  joint_ap.png               the finalists' AP joint by joint, likewise

example:
  python study/analyze.py studies/drawn-joint-joint --top 10
"""


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What a study left in Parquet, as rows."""

    trials: list[TableRow]
    reports: list[TableRow]
    final: list[TableRow]
    joints: list[TableRow]
    """AP of each finalist and joint; empty until there are finalists, as ``curves``."""
    curves: list[TableRow]
    space: SearchSpace
    verdicts: Sequence[TableRow] = ()
    """The configurations that were trained again, the winner first; empty if none was."""

    def ranked(self) -> list[TableRow]:
        """The trials that ran to their end and keep to the constraints, the best first."""
        done = [row for row in self.trials if may_win(row)]
        return sorted(done, key=lambda row: (-row["objective"], row["trial"]))

    def constrained(self) -> bool:
        """Whether some trial does not keep to the constraints."""
        return any(row.get("feasible") is False for row in self.trials)

    def control(self, name: str) -> TableRow | None:
        """The known config of that name that got furthest, if it was tried."""
        tried = [row for row in self.trials if row["control"] == name]
        return max(tried, key=lambda row: row["objective"] or 0.0, default=None)


def read_evidence(study_folder: Path) -> Evidence:
    """Raises InputError where the folder is no study or has no finished trial."""
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
    """A sentence for each parameter whose value in this trial lies near a bound of its range."""
    found = []
    for parameter in space.parameters:
        value = best.get(PARAMS + parameter.path)
        if parameter.path == PARENT:  # a rank, of which there are no others
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
            "what is best may lie beyond it; widen the range if it can go on"
        )
    return found


def report(evidence: Evidence, top: int, box: rich.box.Box) -> Iterator[RenderableType]:
    """What to print, in order: lines and tables."""
    yield from _overview(evidence)
    ranked = evidence.ranked()
    if not ranked:
        yield (
            "No trial ran to its end"
            + (" and keeps to search.constraints" if evidence.constrained() else "")
            + ", so there is no best one yet."
        )
        return
    yield _best_table(ranked[:top], evidence.space, box)
    yield _gain_table(evidence, ranked[0], box)
    if evidence.final:
        yield final_table(evidence.final, box)
        if evidence.verdicts:
            yield confirm_table(evidence.verdicts, box)
            yield verdict_sentence(evidence.verdicts)
    else:
        yield "Figures on the official validation set: none yet; they come when the study ends."
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
    more = f"; {len(running)} more begun" if running else ""
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
    table.add_row("AP", *(_points(row["objective"]) for row in best))
    for name in ("latency_ms", "parameters"):
        if any(row.get(name) is not None for row in best):
            table.add_row(name, *(_text(row.get(name)) for row in best))
    table.add_row("stage", *(_text(row["best_stage"]) for row in best))
    table.add_row("epoch", *(_text(row["best_epoch"]) for row in best))
    for path in space.paths:
        table.add_row(path, *(_text(row.get(PARAMS + path)) for row in best))
    return table


def _gain_table(evidence: Evidence, best: TableRow, box: rich.box.Box) -> Table:
    table = Table(title="Gain over the known configs, in points of AP", box=box)
    for name in ("", "trial", "AP", "over baseline", "over defaults"):
        table.add_column(name, justify="right" if name else "left")
    controls = [evidence.control("baseline"), evidence.control("defaults")]
    for name, row in zip(("baseline", "defaults", "best"), (*controls, best), strict=True):
        if row is None:
            table.add_row(name, "-", "-", "-", "-")
            continue
        gains = [_gain(row, control) for control in controls]
        table.add_row(name, str(row["trial"]), _points(row["objective"]), *gains)
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
            "Importance of the parameters: cannot be told yet; it takes at least "
            f"{MIN_TRIALS} trials, complete or pruned, of different AP."
        )
        return
    roles = {parameter.path: parameter.role for parameter in evidence.space.parameters}
    table = Table(title="Importance: what sets the good trials apart", box=box)
    table.add_column("parameter", no_wrap=True)
    for name in ("role", "share", "", "more than chance"):
        table.add_column(name, justify="right" if name == "share" else "left")
    certain = beyond_chance(evidence.trials, evidence.space)
    for path, share in shares.items():
        bar, sure = "#" * round(20 * share), "yes" if path in certain else "not shown"
        table.add_row(path, roles[path], f"{100 * share:.0f} %", bar, sure)
    yield table
    if not certain:
        yield "No share is above what chance alone can make of so few trials: take them as hints."
    rare = [path for path in evidence.space.paths if path not in shares]
    if rare:
        yield f"Asked for in too few trials to tell the importance: {', '.join(rare)}"


def _points(ap: float | None) -> str:
    return "-" if ap is None else f"{100 * ap:.1f}"


def _text(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Say what a study found, and draw it.",
        epilog=EXPLANATION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", metavar="STUDY", type=Path, help="its folder: <storage>/<name>")
    parser.add_argument("--top", type=int, default=5, help="how many trials to list (default 5)")
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
    for part in report(evidence, options.top, box):
        console.print(part, soft_wrap=isinstance(part, str))
    for file in _draw(evidence, plots_folder(options.study)):
        console.print(f"Saved {file}", soft_wrap=True)


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


if __name__ == "__main__":
    main()
