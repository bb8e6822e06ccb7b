"""What a study looks like while it runs: a live table on a terminal, plain lines anywhere else."""

from __future__ import annotations

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
PLAIN_EVERY_S = 15.0
"""Seconds between two plain lines when nothing ends."""

Resources = dict[str, tuple[float, float]]
"""How many there are in use of how many, by name."""


def clock(seconds: float) -> str:
    """Seconds as 1:02 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def percent(ap: float | None) -> str:
    """An AP of 0..1 as it is shown, in points."""
    return "-" if ap is None else f"{100 * ap:.1f}"


def remaining(status: dict[str, Any], elapsed: float) -> str | None:
    """How long until the last trial ends, by the pace of the epochs since the search (re)started.

    It is "about" so long, or "at most" while nobody can say what the pruner will leave.
    """
    epochs = epochs_done(status) - status["epochs_before"]
    if epochs == 0 or elapsed <= 0:
        return None
    seconds = sum(stage["left"] for stage in status["stages"]) * elapsed / epochs
    is_bound = any(stage["is_bound"] and stage["left"] for stage in status["stages"])
    return f"{'at most' if is_bound else 'about'} {clock(seconds)}"


def epochs_done(status: dict[str, Any]) -> int:
    """Epochs that trials have been trained for in all."""
    return sum(stage["epochs"] for stage in status["stages"])


def in_use(resources: Resources) -> str:
    """How many CPUs and GPUs are in use of how many."""
    return ", ".join(f"{name}s {used:.3g}/{all_:g}" for name, (used, all_) in resources.items())


class Display:
    """Shows the steps of a study and then its trials.

    Args:
        mode: live, plain, none, or auto: live on a terminal, else plain.
        resources: asked at each look at what runs.
    """

    def __init__(self, mode: str, resources: Callable[[], Resources] = dict) -> None:
        self.console = Console(highlight=False, soft_wrap=True, quiet=mode == "none")
        if mode == "auto":
            mode = "live" if self.console.is_terminal else "plain"
        self.mode = mode
        self.resources = resources
        self.started = time.monotonic()

    def notify(self, text: str) -> None:
        """One line, with the time since the start."""
        self.console.print(f"[{clock(time.monotonic() - self.started)}] {text}", markup=False)

    @contextmanager
    def meters(self) -> Iterator[Callable[[str], Callable[[int, int], None]]]:
        """Gives a maker of progress bars; without a terminal each says a line when it is done."""
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
        """Shows what ``poll`` tells, and the ``resources`` besides, until the block ends.

        Args:
            render: the live image of a status and the seconds since the block began.
            line: the same as one plain line; said when it changes but for its times, and at
                least every PLAIN_EVERY_S seconds.
        """
        if self.mode == "none":
            yield
            return
        over = threading.Event()
        watch = self._watch_live if self.mode == "live" else self._watch_plain
        view = render if self.mode == "live" else line

        def look() -> dict[str, Any]:
            return {**poll(), "resources": self.resources()}

        thread = threading.Thread(target=watch, args=(look, view, over), daemon=True)
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
        began = time.monotonic()
        with Live(console=self.console, refresh_per_second=4, transient=True) as live:
            while not over.wait(POLL_S):
                try:
                    live.update(render(poll(), time.monotonic() - began))
                except Exception:
                    return  # the owner is gone with its Ray: the study itself says why

    def _watch_plain(
        self,
        poll: Callable[[], dict[str, Any]],
        line: Callable[[dict[str, Any], float], str],
        over: threading.Event,
    ) -> None:
        began = time.monotonic()
        said_at, ended = began, -1
        while not over.wait(POLL_S):
            try:
                status = poll()
            except Exception:
                return
            now = time.monotonic()
            count = sum(status["states"].values())
            if count != ended or now - said_at >= PLAIN_EVERY_S:
                said_at, ended = now, count
                self.notify(line(status, now - began))


def trials_panel(status: dict[str, Any], elapsed: float) -> Panel:
    """Trials by state, the best and the baseline, the running ones, resources, the time left."""
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
    """The same in one line."""
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
    """How far the teacher's training is."""
    row = status["teacher"]
    done = row["epoch"] if row else 0
    asked, crops = row.get("asked", (0, None)) if row else (0, None)
    name = TextColumn("{task.description}")
    bar = Progress(name, BarColumn(bar_width=40), MofNCompleteColumn())
    bar.add_task("epochs", total=epochs, completed=done)
    bar.add_task("crops asked about", total=crops, completed=asked, visible=bool(asked))
    facts = Table.grid(padding=(0, 2))
    facts.add_row("AP", percent(row["val_ap"]) if row else "-")
    facts.add_row("in use", in_use(status["resources"]))
    facts.add_row("elapsed", clock(elapsed))
    left = elapsed * (epochs - done) / done if 0 < done < epochs else None
    facts.add_row("remaining", "-" if left is None else f"about {clock(left)}")
    title = "training the teacher" if done < epochs else "asking the teacher"
    return Panel(Group(bar, facts), title=title, expand=False)


def teacher_line(status: dict[str, Any], epochs: int, elapsed: float) -> str:
    """The same in one line."""
    row = status["teacher"]
    if row is None:
        return f"teacher: starting ({epochs} epochs)" if epochs else "teacher: starting"
    known = f"AP {percent(row['val_ap'])}"
    known = f"epoch {row['epoch']}/{epochs}, {known}" if epochs else f"{known} as it comes"
    asked = ", asked about {:,} of {:,} crops".format(*row["asked"]) if "asked" in row else ""
    return f"teacher: {known}{asked}"


def confirm_line(status: dict[str, Any], elapsed: float) -> str:
    """How many of the confirming runs are done, and how far the others are."""
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
    """The same with a bar."""
    bar = Progress(TextColumn("runs"), BarColumn(bar_width=40), MofNCompleteColumn())
    bar.add_task("runs", total=status["runs"], completed=status["states"]["COMPLETE"])
    running = Table("trial", "run", "epoch", box=None, padding=(0, 2))
    for run in status["running"]:
        running.add_row(*(str(run[key]) for key in ("trial", "run", "epoch")))
    facts = f"in use   {in_use(status['resources'])}\nelapsed  {clock(elapsed)}"
    return Panel(Group(bar, running, facts), title="is the winner real?", expand=False)
