"""Exit a process whose trial stalls, so that its CPUs and GPUs are released.

faulthandler's watchdog thread is written in C. It needs neither the GIL nor cooperation of the
stalled thread: it dumps the stack of each thread to a file and exits. From that file the next try
of the trial, and the owner of the study, know that the trial would stall again.
"""

from __future__ import annotations

import contextlib
import faulthandler
from collections.abc import Callable, Iterator
from pathlib import Path

from study.storage.paths import stall_log, stall_logs


@contextlib.contextmanager
def exit_on_stall(folder: Path, rank: int, timeout_s: float) -> Iterator[Callable[[], None]]:
    """Exit the process if the yielded heartbeat isn't called for ``timeout_s`` seconds.

    Args:
        folder: the trial's folder, where each worker dumps its stack.
        timeout_s: seconds; 0 = no limit.
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
    """Return why the trial stalled, with the file of its stack, or None."""
    for file in stall_logs(folder):
        if file.stat().st_size:
            first = file.read_text().splitlines()[0]  # Timeout (0:01:00)!
            waited = first.partition("(")[2].partition(")")[0]
            return (
                f"it stalled: no epoch ended within trial.timeout_s ({waited}); {file.name} in "
                "its folder has the stack"
            )
    return None
