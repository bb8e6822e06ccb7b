"""Shared by the benchmarks: import path, parser, a study's data and teacher, tables. No command.

Importing it puts the checkout's root on the path, so that its packages win over installed ones.
The other imports are inside the functions: some benchmarks measure memory or start processes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from rich.table import Table

    from study.cache.prepare import PreparedData
    from study.config.derived import Resolved
    from study.config.schema import StudyConfig
    from study.workers import Workers

Row = dict[str, Any]


def new_parser(docstring: str | None) -> argparse.ArgumentParser:
    """Build a parser that is described by the question in a script's docstring."""
    question = (docstring or "").splitlines()[0].split(" ``")[0].rstrip(":")
    return argparse.ArgumentParser(description=question)


def new_table(title: str, *headings: str, num_left: int = 1) -> Table:
    """Build a table with its first ``num_left`` columns left-aligned, the others right-aligned."""
    from rich.table import Table

    table = Table(title=title)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number < num_left else "right")
    return table


def prepare_quietly(
    config: StudyConfig, resolved: Resolved, notify: Callable[[str], None] = print
) -> PreparedData:
    """Prepare the study's data without progress bars."""
    from study.cache.prepare import prepare_data

    return prepare_data(config.data, resolved, lambda _: lambda *_: None, notify)


def trained_teacher(
    config: StudyConfig,
    resolved: Resolved,
    data: PreparedData,
    workers: Workers,
    report: Callable[[Row], bool],
) -> Path:
    """Return the folder of the study's teacher; train it first if it is missing."""
    from study.teachers.identity import teacher_folder
    from study.teachers.make import is_ready, make_teacher
    from study.trial import teacher_spec

    spec = teacher_spec(config, resolved)
    folder = teacher_folder(spec, data)
    if not is_ready(folder):
        make_teacher(spec, config.student, data, workers, report)
    return folder


def print_row(row: Row) -> bool:
    """Print an epoch's AP, as a ``report`` that never stops the training."""
    print(f"  {row['stage']} epoch {row['epoch']}: AP {100 * row['val_ap']:.1f}", flush=True)
    return False


def ignore_row(row: Row) -> bool:
    """Ignore an epoch, as a ``report`` that never stops the training."""
    return False
