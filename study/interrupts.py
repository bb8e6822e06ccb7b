"""End a command in one line: on Ctrl-C, SIGTERM of a batch system, SIGHUP of a closed terminal."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

AGAIN = "interrupted; run the same command again"
KILLS = (signal.SIGTERM, signal.SIGHUP)
SHOW_CURSOR = "\n\x1b[?25h"
"""Ends a live display that is cut off on a terminal."""
_at_kill: list[Callable[[], None]] = []
_seen: list[int] = []
"""Signals that the command got so far."""


@contextlib.contextmanager
def ends_in_one_line(hint: str = AGAIN) -> Iterator[None]:
    """Exit with the hint instead of a traceback: on Ctrl-C with status 1, on KILLS with 128 + n.

    A command whose output can't be written ends in one line, too.

    Ctrl-C is a KeyboardInterrupt in the block, which cleans up; one that is raised again with a
    text replaces the hint. KILLS end the process and its children at once: batch systems send
    them to Ray's processes too, and Ray itself exits its driver soon after them. A signal that the
    parent ignores, as ``nohup`` does, stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # as while the packages load
        signal.signal(signal.SIGINT, signal.default_int_handler)
    _seen.clear()
    try:
        with _signals_watched(hint), _unwritten_output_explained():
            yield
    except BaseException as error:
        if not isinstance(error, KeyboardInterrupt) and signal.SIGINT not in _seen:
            raise
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C adds no traceback
        sys.exit(str(error) if isinstance(error, KeyboardInterrupt) and error.args else hint)


def raise_if_interrupted() -> None:
    """Raise KeyboardInterrupt if Ctrl-C was pressed in this command and a library handled it."""
    if signal.SIGINT in _seen:
        raise KeyboardInterrupt


@contextlib.contextmanager
def _unwritten_output_explained() -> Iterator[None]:
    """Exit with one sentence if stdout can't be written: its disk is full, its reader has gone."""
    try:
        yield
        if sys.stdout:
            sys.stdout.flush()
    except (OSError, SystemExit) as error:
        fault = _fault_of_stdout(b"\n" if isinstance(error, OSError) else b"")
        if fault is None:
            raise
        # Python would write the rest once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        own = error.code if isinstance(error, SystemExit) else None
        more = f"\n{own}" if isinstance(own, str) else ""
        sys.exit(f"error: the output can't be written: {fault}; send it elsewhere{more}")


def _fault_of_stdout(probe: bytes) -> str | None:
    """Return why what was printed, and then the probe, can't be written; None if it can."""
    try:
        if sys.stdout:
            sys.stdout.flush()
            os.write(sys.stdout.fileno(), probe)
    except io.UnsupportedOperation:  # no file
        return None
    except OSError as error:
        return error.strerror
    return None


@contextlib.contextmanager
def run_if_killed(action: Callable[[], None]) -> Iterator[None]:
    """Run the action if KILLS end the process in the block, after all its children have ended."""
    _at_kill.append(action)
    try:
        yield
    finally:
        _at_kill.remove(action)


@contextlib.contextmanager
def _signals_watched(hint: str) -> Iterator[None]:
    """Exit on KILLS, and append every signal to ``_seen``."""
    before = {number: signal.getsignal(number) for number in KILLS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _leave_to_thread)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # Python's own handlers run only when the main thread is between two bytecodes, which it is
    # not while it waits for Ray. The number of a signal is written to this pipe at once.
    old_writer = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watch = threading.Thread(target=_watch_signals, args=(reader, hint), daemon=True)
    watch.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(old_writer)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writer)
        watch.join()
        os.close(reader)


def _leave_to_thread(number: int, frame: object) -> None:
    """Handle a signal whose number ``_watch_signals`` reads."""


def _watch_signals(reader: int, hint: str) -> None:
    while received := os.read(reader, 1):
        number = received[0]
        _seen.append(number)
        if number in KILLS:
            _exit_now(number, hint)


def _exit_now(number: int, hint: str) -> None:
    with contextlib.suppress(OSError):  # the terminal is closed
        if os.isatty(1):
            os.write(1, SHOW_CURSOR.encode())
        os.write(2, f"{hint}\n".encode())
        # Ray's C++ threads write about each process that ends before this one.
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
    kill_descendants(os.getpid())
    for action in list(_at_kill):
        with contextlib.suppress(Exception):
            action()
    os._exit(128 + number)


def kill_descendants(pid: int) -> None:
    """Kill all processes that a process has started, and those that they have.

    Ray's own would end seconds later, and hold their GPUs until then.
    """
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has ended
            for child in map(int, file.read_text().split()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGSTOP)
                    kill_descendants(child)
                    os.kill(child, signal.SIGKILL)
