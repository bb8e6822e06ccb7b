"""Ctrl-C, SIGTERM and SIGHUP end a command in one line."""

from __future__ import annotations

import argparse
import importlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import study.config.compose
from study.interrupts import AGAIN, ends_in_one_line

ROOT = Path(__file__).resolve().parents[2]
HINT = "interrupted; come back"
BLOCK = f"""
import signal, sys, time
from study import interrupts
{{before}}
with interrupts.ends_in_one_line("{HINT}"):
    {{start}}
    try:
        print("ready", flush=True)
        {{wait}}
    finally:
        print("clean", flush=True)
"""
STATUS = {signal.SIGTERM: 143, signal.SIGHUP: 129}
BUSY = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"
"""Keeps the main thread in C for minutes, where it runs no handler."""


@pytest.fixture(autouse=True)
def default_handlers() -> Iterator[None]:
    """Handle signals as a terminal's commands do, even if the tests' parent ignores some."""
    defaults = {signal.SIGINT: signal.default_int_handler} | dict.fromkeys(STATUS, signal.SIG_DFL)
    before = {number: signal.signal(number, handler) for number, handler in defaults.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def stopped(
    *signals: int, before: str = "", start: str = "pass", wait: str = "time.sleep(60)"
) -> tuple[int, list[str], list[str]]:
    """Run a block, send it the signals; return its status and the lines of stdout and stderr."""
    process = subprocess.Popen(
        [sys.executable, "-c", BLOCK.format(before=before, start=start, wait=wait)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for number in signals:
        process.send_signal(number)
        time.sleep(0.05)
    output, errors = process.communicate(timeout=30)
    return process.returncode, output.splitlines(), errors.splitlines()


def test_ctrl_c_ends_a_command_with_its_hint_after_the_cleanup() -> None:
    assert stopped(signal.SIGINT) == (1, ["clean"], [HINT])


def test_ctrl_c_cleans_up_if_it_ended_the_process_while_the_packages_loaded() -> None:
    default = "signal.signal(signal.SIGINT, signal.SIG_DFL)"
    assert stopped(signal.SIGINT, before=default) == (1, ["clean"], [HINT])


def test_ctrl_c_that_a_library_handled_ends_a_command_later() -> None:
    library = "signal.signal(signal.SIGINT, lambda *_: None)"
    wait = "time.sleep(0.4); interrupts.raise_if_interrupted()"
    assert stopped(signal.SIGINT, start=library, wait=wait) == (1, ["clean"], [HINT])
    assert stopped(start=library, wait=wait) == (0, ["clean"], [])


@pytest.mark.parametrize("number", STATUS)
def test_other_signals_end_a_command_with_its_hint_at_once(number: int) -> None:
    assert stopped(number, number) == (STATUS[number], [], [HINT])


def test_two_signals_at_once_end_a_command_with_one_hint() -> None:
    status, output, errors = stopped(signal.SIGHUP, signal.SIGTERM)
    # The system runs the handler of the second one first if both wait for the process.
    assert status in STATUS.values()
    assert (output, errors) == ([], [HINT])


def test_sigterm_ends_a_command_whose_main_thread_is_busy() -> None:
    assert stopped(signal.SIGTERM, wait=BUSY) == (143, [], [HINT])


def test_sigterm_ends_all_processes_that_the_command_started() -> None:
    tree = "import subprocess; subprocess.Popen(['sh', '-c', 'sleep 60.25 & sleep 60.25'])"
    # Its stdout is the command's: it ends once all of them have ended.
    started = time.monotonic()
    assert stopped(signal.SIGTERM, start=tree) == (143, [], [HINT])
    assert time.monotonic() - started < 20


def test_ignored_signals_stay_ignored() -> None:
    """As ``nohup`` ignores SIGHUP, and a shell SIGINT of a command in the background."""
    ignored = "; ".join(
        f"signal.signal(signal.{name}, signal.SIG_IGN)" for name in ("SIGHUP", "SIGINT")
    )
    signals = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
    assert stopped(*signals, before=ignored) == (143, [], [HINT])


@pytest.mark.parametrize(
    "block", ["print('x')", "print('x' * 100_000)", "print('x'); sys.exit(0)"]
)
def test_output_to_a_full_disk_ends_a_command_in_one_line(block: str) -> None:
    code = f"import sys; from study import interrupts\nwith interrupts.ends_in_one_line(): {block}"
    command = [sys.executable, "-c", code]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 1
    wanted = "error: the output can't be written: No space left on device; send it elsewhere"
    assert ended.stderr.splitlines() == [wanted]


@pytest.mark.parametrize("command", ["analyze", "dataset", "export", "predict", "tune"])
def test_deleted_working_folder_ends_every_command_in_one_line(
    command: str, tmp_path: Path
) -> None:
    run = 'rmdir "$PWD" && exec "$@"'
    program = [sys.executable, str(ROOT / "study" / f"{command}.py")]
    ended = subprocess.run(
        ["sh", "-c", run, "sh", *program], cwd=tmp_path, capture_output=True, text=True
    )
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: the working folder must exist, but was deleted;")
    assert len(ended.stderr.splitlines()) == 1


def test_other_errors_of_files_and_exits_pass() -> None:
    with pytest.raises(FileNotFoundError), ends_in_one_line():
        raise FileNotFoundError
    with pytest.raises(SystemExit, match="7"), ends_in_one_line():
        sys.exit(7)


def test_errors_after_ctrl_c_are_not_shown() -> None:
    handler = "signal.signal(signal.SIGINT, lambda number, frame: 1 / 0)"
    assert stopped(signal.SIGINT, start=handler) == (1, ["clean"], [HINT])


def test_errors_without_a_signal_pass_and_the_handlers_are_restored() -> None:
    before = [signal.getsignal(number) for number in STATUS]
    with pytest.raises(ZeroDivisionError), ends_in_one_line():
        assert [signal.getsignal(number) for number in STATUS] != before
        _ = 1 / 0
    assert [signal.getsignal(number) for number in STATUS] == before


@pytest.mark.parametrize("command", ["analyze", "dataset", "export", "predict", "tune"])
def test_every_command_ends_in_one_line(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: object) -> None:
        signal.raise_signal(signal.SIGINT)

    main = importlib.import_module(f"study.{command}").main
    if command == "tune":
        monkeypatch.setattr(sys, "argv", ["tune.py"])
        monkeypatch.setattr(study.config.compose, "compose", interrupted)
    else:
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        signal.signal(signal.SIGINT, handler)
    assert ended.value.code in (AGAIN, f"{AGAIN} to resume")
    assert capsys.readouterr().out == ""
