"""Progress of a study: a live table on a terminal, plain lines anywhere else."""

from __future__ import annotations

import io
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

POLL_S = 0.5
"""Seconds between two polls of the status."""
PLAIN_EVERY_S = 15.0
"""Longest time between two plain lines, in seconds."""

PREDICTED = "predicted"
"""In the status of a teacher: (predicted, in all), crops whose targets it predicts."""

Resources = dict[str, tuple[float, float]]
"""(in use, in all) by the resource's name."""


def escape_unprintable() -> None:
    """Escape what the terminal's encoding lacks, such as names in another script.

    Without this, printing such a name ends the command.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def clock(seconds: float) -> str:
    """Format seconds as 1:02 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def percent(ap: float | None) -> str:
    """Format an AP of 0..1 in points (x100)."""
    return "-" if ap is None else f"{100 * ap:.1f}"


def heading(figure: str) -> str:
    """Format a figure's column as a heading: AP50, AP(M), AP(easy)."""
    name, _, group = figure.partition("_")
    if not group:
        return name.upper()
    return f"{name.upper()}({group.upper() if len(group) == 1 else group})"


def remaining(status: dict[str, Any], elapsed: float) -> str | None:
    """Estimate the time until the last trial ends, from the epochs per second of this session.

    Returns:
        "about 1:02", "at most 1:02" while the pruner is unpredictable, or None before the first
        epoch.
    """
    epochs = epochs_done(status) - status["epochs_before"]
    if epochs == 0 or elapsed <= 0:
        return None
    seconds = sum(stage["left"] for stage in status["stages"]) * elapsed / epochs
    is_bound = any(stage["is_bound"] and stage["left"] for stage in status["stages"])
    return f"{'at most' if is_bound else 'about'} {clock(seconds)}"


def epochs_done(status: dict[str, Any]) -> int:
    """Return the epochs trained so far, over all trials."""
    return sum(stage["epochs"] for stage in status["stages"])


def in_use(resources: Resources) -> str:
    """Format the CPUs and GPUs in use and in all."""
    return ", ".join(f"{name}s {used:.3g}/{total:g}" for name, (used, total) in resources.items())


class Display:
    """Shows the steps of a study and then its trials.

    Args:
        mode: live, plain, none, or auto: live on a terminal, plain otherwise.
        resources: called at each poll of the status.
    """

    def __init__(self, mode: str, resources: Callable[[], Resources] = dict) -> None:
        self.console = Console(highlight=False, soft_wrap=True, quiet=mode == "none")
        if mode == "auto":
            mode = "live" if self.console.is_terminal else "plain"
        self.mode = mode
        self.resources = resources
        self.started = time.monotonic()

    def notify(self, text: str) -> None:
        """Print one line, with the time since the start."""
        self.console.print(f"[{clock(time.monotonic() - self.started)}] {text}", markup=False)

    @contextmanager
    def meters(self) -> Iterator[Callable[[str], Callable[[int, int], None]]]:
        """Yield a factory of progress bars; without a terminal, a full bar prints one line."""
        if self.mode != "live":
            yield self._plain_meter
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, TimeRemainingColumn(), console=self.console) as bars:

            def meter(name: str) -> Callable[[int, int], None]:
                task = bars.add_task(name, total=None, visible=False)
                return lambda done, total: bars.update(
                    task, completed=done, total=total, visible=True
                )

            yield meter

    def _plain_meter(self, name: str) -> Callable[[int, int], None]:
        def update(done: int, total: int) -> None:
            if done == total:
                self.notify(f"{name}: {total}")

        return update

    @contextmanager
    def watching(
        self,
        poll: Callable[[], dict[str, Any]],
        render: Callable[[dict[str, Any], float], Any],
        line: Callable[[dict[str, Any], float], str],
    ) -> Iterator[None]:
        """Show the status that ``poll`` returns, with ``resources`` added, until the block ends.

        Args:
            render: renders a status and the seconds since the block began for a terminal.
            line: formats the same as one plain line. It is printed when a trial ends, and at
                least every PLAIN_EVERY_S seconds.
        """
        if self.mode == "none":
            yield
            return
        over = threading.Event()
        watch = self._watch_live if self.mode == "live" else self._watch_plain
        view = render if self.mode == "live" else line

        def poll_with_resources() -> dict[str, Any]:
            return {**poll(), "resources": self.resources()}

        thread = threading.Thread(
            target=watch, args=(poll_with_resources, view, over), daemon=True
        )
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(timeout=10)

    def _watch_live(
        self,
        poll: Callable[[], dict[str, Any]],
        render: Callable[[dict[str, Any], float], Any],
        over: threading.Event,
    ) -> None:
        started = time.monotonic()
        with Live(console=self.console, refresh_per_second=4, transient=True) as live:
            while not over.wait(POLL_S):
                try:
                    live.update(render(poll(), time.monotonic() - started))
                except Exception:
                    return  # the owner is gone with its Ray: the study itself reports why

    def _watch_plain(
        self,
        poll: Callable[[], dict[str, Any]],
        line: Callable[[dict[str, Any], float], str],
        over: threading.Event,
    ) -> None:
        started = time.monotonic()
        printed_at, printed_ended = started, -1
        while not over.wait(POLL_S):
            try:
                status = poll()
            except Exception:
                return  # as in _watch_live
            now = time.monotonic()
            ended = sum(status["states"].values())
            if ended != printed_ended or now - printed_at >= PLAIN_EVERY_S:
                printed_at, printed_ended = now, ended
                self.notify(line(status, now - started))


def trials_panel(status: dict[str, Any], elapsed: float) -> Panel:
    """Render trials by state, the best and the baseline, running trials and the time left."""
    left = remaining(status, elapsed)
    trials = sum(stage["trials"] for stage in status["stages"])
    bar = Progress(TextColumn("trials"), BarColumn(bar_width=40), MofNCompleteColumn())
    bar.add_task("trials", total=trials, completed=sum(status["states"].values()))
    states = "  ".join(f"{name.lower()} {number}" for name, number in status["states"].items())
    best = status["best"]
    facts = Table.grid(padding=(0, 2))
    facts.add_row("states", f"running {len(status['running'])}  {states}")
    facts.add_row("best AP", f"{percent(best['ap'])} (trial {best['trial']})" if best else "-")
    facts.add_row("baseline AP", percent(status["baseline"]))
    facts.add_row("in use", in_use(status["resources"]))
    facts.add_row("elapsed", clock(elapsed))
    facts.add_row("remaining", left or "-")
    running = Table("trial", "epoch", "AP", box=None, padding=(0, 2))
    for trial in status["running"]:
        epochs = f"{trial['epoch']}/{trial['budget']}"
        running.add_row(str(trial["trial"]), epochs, percent(trial["ap"]))
    return Panel(Group(bar, facts, running), title="searching", expand=False)


def trials_line(status: dict[str, Any], elapsed: float) -> str:
    """Format what ``trials_panel`` shows as one line."""
    left = remaining(status, elapsed)
    trials = sum(stage["trials"] for stage in status["stages"])
    best = status["best"]
    states = ", ".join(f"{name.lower()} {n}" for name, n in status["states"].items() if n)
    running = ", ".join(
        f"{trial['trial']} at {trial['epoch']}/{trial['budget']}" for trial in status["running"]
    )
    return (
        f"trials {sum(status['states'].values())}/{trials} ({states or 'none ended yet'})"
        f" | best AP {percent(best['ap'] if best else None)}"
        f" | baseline {percent(status['baseline'])}"
        f" | running: {running or 'none'}"
        f" | {in_use(status['resources'])}"
        f" | left {left or '?'}"
    )


def teacher_panel(status: dict[str, Any], epochs: int, elapsed: float) -> Panel:
    """Render the progress of the teacher's training and of the prediction of its targets."""
    row = status["teacher"]
    done = row["epoch"] if row else 0
    predicted, crops = row.get(PREDICTED, (0, None)) if row else (0, None)
    name = TextColumn("{task.description}")
    bar = Progress(name, BarColumn(bar_width=40), MofNCompleteColumn())
    bar.add_task("epochs", total=epochs, completed=done)
    bar.add_task("targets", total=crops, completed=predicted, visible=bool(predicted))
    facts = Table.grid(padding=(0, 2))
    facts.add_row("AP", percent(row["val_ap"]) if row else "-")
    facts.add_row("in use", in_use(status["resources"]))
    facts.add_row("elapsed", clock(elapsed))
    left = elapsed * (epochs - done) / done if 0 < done < epochs else None
    facts.add_row("remaining", "-" if left is None else f"about {clock(left)}")
    title = "training the teacher" if done < epochs else "predicting the teacher's targets"
    return Panel(Group(bar, facts), title=title, expand=False)


def teacher_line(status: dict[str, Any], epochs: int, elapsed: float) -> str:
    """Format what ``teacher_panel`` shows as one line."""
    row = status["teacher"]
    if row is None:
        return f"teacher: starting ({epochs} epochs)" if epochs else "teacher: starting"
    ap = percent(row["val_ap"])
    progress = (
        f"epoch {row['epoch']}/{epochs}, AP {ap}" if epochs else f"not trained here, AP {ap}"
    )
    if PREDICTED in row:
        predicted, crops = row[PREDICTED]
        progress += f", predicted targets of {predicted:,} of {crops:,} crops"
    return f"teacher: {progress}"


def confirm_line(status: dict[str, Any], elapsed: float) -> str:
    """Format how many confirming runs are done, and the epochs of those that run."""
    running = ", ".join(
        f"trial {run['trial']} run {run['run']} at epoch {run['epoch']}"
        for run in status["running"]
    )
    done = status["states"]["COMPLETE"]
    return (
        f"confirming: {done}/{status['runs']} runs done | running: {running or 'none'}"
        f" | {in_use(status['resources'])}"
    )


def confirm_panel(status: dict[str, Any], elapsed: float) -> Panel:
    """Render what ``confirm_line`` formats, with a bar."""
    bar = Progress(TextColumn("runs"), BarColumn(bar_width=40), MofNCompleteColumn())
    bar.add_task("runs", total=status["runs"], completed=status["states"]["COMPLETE"])
    running = Table("trial", "run", "epoch", box=None, padding=(0, 2))
    for run in status["running"]:
        running.add_row(*(str(run[key]) for key in ("trial", "run", "epoch")))
    facts = f"in use   {in_use(status['resources'])}\nelapsed  {clock(elapsed)}"
    return Panel(Group(bar, running, facts), title="confirming the winner", expand=False)
