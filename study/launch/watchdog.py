"""Ends a process whose trial hangs, whatever it hangs in, so that its CPUs and GPUs are free.

The watch is a thread of faulthandler's own, in C: it needs neither Python's lock nor the hanging
thread's good will, notes where each thread stands, and exits. What it wrote tells the next try of
the trial, and the owner of the study, that another try would only hang again.
"""

from __future__ import annotations

import contextlib
import faulthandler
from collections.abc import Callable, Iterator
from pathlib import Path

from study.storage.paths import stall_log, stall_logs


@contextlib.contextmanager
def exit_on_stall(folder: Path, rank: int, timeout_s: float) -> Iterator[Callable[[], None]]:
    """Within, this process exits once ``timeout_s`` seconds pass without a call of what is given.

    Args:
        folder: the trial's, where each worker notes where it stood.
        timeout_s: 0 = it may take any time.
    """
    if not timeout_s:
        yield lambda: None
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = stall_log(folder, rank)
    with file.open("w") as log:

        def heartbeat() -> None:
            faulthandler.dump_traceback_later(timeout_s, file=log, exit=True)

        heartbeat()
        try:
            yield heartbeat
        finally:
            faulthandler.cancel_dump_traceback_later()
    file.unlink(missing_ok=True)


def stall_reason(folder: Path) -> str | None:
    """That a trial hung, and where to read where; None if none did."""
    for file in stall_logs(folder):
        if file.stat().st_size:
            first = file.read_text().splitlines()[0]  # Timeout (0:01:00)!
            waited = first.partition("(")[2].partition(")")[0]
            return (
                f"it hung: no epoch ended within trial.timeout_s ({waited}); {file.name} in its "
                "folder says where it stood"
            )
    return None
