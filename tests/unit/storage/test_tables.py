"""Parquet: one schema for all parts, whole parts or none, no row twice."""

from __future__ import annotations

import datetime
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from search_spaces.space import load_space
from study.errors import InputError
from study.storage import tables

SPACE = load_space("joint")
STARTED = datetime.datetime(2025, 3, 1, 12, 30, tzinfo=datetime.UTC)


def trial_row(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "study": "s",
        "trial": number,
        "state": "COMPLETE",
        "objective": 0.25,
        "started": STARTED,
        "params.refine.depth": 3,
        "params.distill.optimizer.lr": 0.001,
        "params.distill.heatmap.kind": "mse",
        **changes,
    }


def report_rows(number: int | None, epochs: int) -> list[dict[str, Any]]:
    return [
        {"study": "s", "trial": number, "stage": "distill", "epoch": epoch, "val_ap": epoch / 100}
        for epoch in range(1, epochs + 1)
    ]


def test_written_trial_is_read(tmp_path: Path) -> None:
    tables.write_trial(tmp_path, trial_row(7), report_rows(7, 2), SPACE)
    (row,) = tables.read_trials(tmp_path).to_pylist()
    assert {name: value for name, value in row.items() if value is not None} == trial_row(7)
    reports = tables.read_reports(tmp_path).to_pylist()
    assert [(row["trial"], row["epoch"], row["val_ap"]) for row in reports] == [
        (7, 1, 0.01),
        (7, 2, 0.02),
    ]
    assert reports[0]["loss.structure"] is None
    assert tables.space_of(tables.read_trials(tmp_path)) == SPACE
    assert tables.space_of(tables.read_reports(tmp_path)) == SPACE


def test_all_parts_have_one_schema_with_types_of_the_space(tmp_path: Path) -> None:
    bare = {"study": "s", "trial": 1, "state": "FAIL", "error": "loss is NaN"}
    tables.write_trial(tmp_path, trial_row(0), report_rows(0, 1), SPACE)
    tables.write_trial(tmp_path, bare, [], SPACE)
    for table in ("trials", "reports"):
        parts = sorted((tmp_path / "results" / table).iterdir())
        assert [part.name for part in parts] == ["00000.parquet", "00001.parquet"]
        first, second = (pq.read_schema(part) for part in parts)
        assert first.equals(second, check_metadata=True)
    trials = pq.read_schema(tmp_path / "results/trials/00001.parquet")
    assert trials.field("params.refine.depth").type == pa.int64()
    assert trials.field("params.distill.optimizer.lr").type == pa.float64()
    assert trials.field("params.distill.heatmap.kind").type == pa.string()
    assert trials.field("started").type == pa.timestamp("ms", tz="UTC")


def test_every_column_has_a_description(tmp_path: Path) -> None:
    tables.write_trial(tmp_path, trial_row(0), report_rows(0, 1), SPACE)
    for field in tables.read_trials(tmp_path).schema:
        assert field.metadata[b"description"], field.name


def test_an_unlisted_column_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"columns of trials must be listed.*got params\.nope"):
        tables.write_trial(tmp_path, {**trial_row(0), "params.nope": 1}, [], SPACE)
    assert tables.written_trials(tmp_path) == set()


def test_trials_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (100_000, 2, 11):
        tables.write_trial(tmp_path, trial_row(number), report_rows(number, 2), SPACE)
    assert tables.read_trials(tmp_path)["trial"].to_pylist() == [2, 11, 100_000]
    reports = tables.read_reports(tmp_path)
    assert reports["trial"].to_pylist() == [2, 2, 11, 11, 100_000, 100_000]
    assert tables.written_trials(tmp_path) == {2, 11, 100_000}


def test_the_final_part_replaces_the_running_one(tmp_path: Path) -> None:
    tables.write_running(tmp_path, 3, report_rows(3, 1), SPACE)
    tables.write_running(tmp_path, 3, report_rows(3, 2), SPACE)
    assert tables.read_reports(tmp_path).num_rows == 2
    assert tables.written_trials(tmp_path) == set()
    tables.write_trial(tmp_path, trial_row(3), report_rows(3, 3), SPACE)
    assert [part.name for part in (tmp_path / "results/reports").iterdir()] == ["00003.parquet"]
    assert tables.read_reports(tmp_path).num_rows == 3


def test_row_counts_once_though_a_kill_left_both_parts(tmp_path: Path) -> None:
    tables.write_trial(tmp_path, trial_row(3), report_rows(3, 3), SPACE)
    tables.write_running(tmp_path, 3, report_rows(3, 2), SPACE)
    tables.write_running(tmp_path, 4, report_rows(4, 1), SPACE)
    assert tables.read_reports(tmp_path)["trial"].to_pylist() == [3, 3, 3, 4]
    tables.remove_leftovers(tmp_path)
    left = sorted(part.name for part in (tmp_path / "results/reports").iterdir())
    assert left == ["00003.parquet", "00004.running.parquet"]


def test_writing_a_trial_again_doubles_nothing(tmp_path: Path) -> None:
    for objective in (0.1, 0.2):
        row = trial_row(0, objective=objective)
        tables.write_trial(tmp_path, row, report_rows(0, 2), SPACE)
    assert tables.read_trials(tmp_path)["objective"].to_pylist() == [0.2]
    assert tables.read_reports(tmp_path).num_rows == 2


def test_readers_ignore_the_file_of_a_killed_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables.write_trial(tmp_path, trial_row(0), report_rows(0, 1), SPACE)

    def killed(source: Path, target: Path) -> None:
        raise KeyboardInterrupt(f"before {source} became {target}")

    monkeypatch.setattr(os, "replace", killed)
    monkeypatch.setattr(
        Path, "unlink", lambda path, missing_ok: None
    )  # a killed process cleans nothing up
    with pytest.raises(KeyboardInterrupt):
        tables.write_trial(tmp_path, trial_row(1), report_rows(1, 5), SPACE)
    monkeypatch.undo()
    reports = tmp_path / "results" / "reports"
    assert len(list(reports.iterdir())) == 2
    assert tables.read_reports(tmp_path).num_rows == 1
    assert pq.read_table(reports).num_rows == 1  # as pandas reads a folder
    assert len(list(reports.glob("*.parquet"))) == 1  # as DuckDB reads it
    tables.remove_leftovers(tmp_path)
    assert len(list(reports.iterdir())) == 1


def test_a_trial_counts_as_written_only_when_its_reports_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    replace = os.replace

    def noted(source: Path, target: Path) -> None:
        order.append(Path(target).parent.name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", noted)
    tables.write_trial(tmp_path, trial_row(0), report_rows(0, 1), SPACE)
    assert order == ["reports", "trials"]


def test_a_trial_that_ends_while_reports_are_read_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables.write_running(tmp_path, 0, report_rows(0, 1), SPACE)
    read_part = tables._read_part

    def ends_now(part: Path) -> pa.Table:
        if "running" in part.name:
            tables.write_trial(tmp_path, trial_row(0), report_rows(0, 2), SPACE)
        return read_part(part)

    monkeypatch.setattr(tables, "_read_part", ends_now)
    assert tables.read_reports(tmp_path)["epoch"].to_pylist() == [1, 2]


def test_the_teachers_reports_have_no_trial_and_come_last(tmp_path: Path) -> None:
    tables.write_teacher(tmp_path, report_rows(None, 2), SPACE)
    tables.write_trial(tmp_path, trial_row(0), report_rows(0, 1), SPACE)
    assert tables.read_reports(tmp_path)["trial"].to_pylist() == [0, None, None]


def test_final_figures_are_replaced_as_a_whole(tmp_path: Path) -> None:
    tables.write_trial(tmp_path, trial_row(0), [], SPACE)
    assert tables.read_final(tmp_path).num_rows == 0
    tables.write_final(tmp_path, [{"role": "teacher", "ap": 0.5}, {"role": "winner"}], SPACE)
    tables.write_final(tmp_path, [{"role": "teacher", "split": "val", "ap": 0.6}], SPACE)
    assert tables.read_final(tmp_path).select(["role", "split", "ap"]).to_pylist() == [
        {"role": "teacher", "split": "val", "ap": 0.6}
    ]


def test_the_table_that_ends_a_study_is_written_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    replace = os.replace

    def noted(source: Path, target: Path) -> None:
        order.append(Path(target).parent.name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", noted)
    joints, curves = [{"joint": "nose", "ap": 0.5}], [{"oks": 0.5, "ap": 0.75}]
    tables.write_final(tmp_path, [{"role": "winner"}], SPACE, joints, curves)
    assert sorted(order) == sorted(tables.FINALS) and order[-1] == "final"
    for table, row in ((tables.JOINTS, joints[0]), (tables.CURVES, curves[0])):
        (read,) = tables.read_final(tmp_path, table).to_pylist()
        assert {name: value for name, value in read.items() if value is not None} == row


def test_a_study_of_an_earlier_version_has_no_tables_of_joints(tmp_path: Path) -> None:
    tables.write_final(tmp_path, [{"role": "winner"}], SPACE)
    for table in (tables.JOINTS, tables.CURVES):
        (tmp_path / "results" / table / "final.parquet").unlink()
        assert tables.read_final(tmp_path, table).num_rows == 0


def test_folder_that_is_no_study_is_refused(tmp_path: Path) -> None:
    for reader in (tables.read_trials, tables.read_reports, tables.read_final):
        with pytest.raises(InputError, match="which does not exist; look for it under studies/"):
            reader(tmp_path / "nothing")
        with pytest.raises(InputError, match=r"which has no results/; look for it"):
            reader(tmp_path)
    assert tables.written_trials(tmp_path / "nothing") == set()


def test_a_study_without_a_finished_trial_is_refused(tmp_path: Path) -> None:
    tables.write_running(tmp_path, 0, report_rows(0, 1), SPACE)
    with pytest.raises(InputError, match="must hold a finished trial, got none yet; wait"):
        tables.read_trials(tmp_path)


def test_a_newer_schema_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "SCHEMA_VERSION", 9)
    tables.write_trial(tmp_path, trial_row(0), [], SPACE)
    monkeypatch.undo()
    with pytest.raises(InputError, match="got 9: it was written by a newer version"):
        tables.read_trials(tmp_path)


def test_foreign_part_is_refused_by_name(tmp_path: Path) -> None:
    tables.write_trial(tmp_path, trial_row(0), [], SPACE)
    part = tmp_path / "results/trials/00001.parquet"
    part.write_bytes(b"PAR1 cut off")
    with pytest.raises(InputError, match=r"00001\.parquet must be a Parquet file"):
        tables.read_trials(tmp_path)
    pq.write_table(pa.table({"trial": [1]}), part)
    with pytest.raises(InputError, match=r"00001\.parquet must have been written by a study"):
        tables.read_trials(tmp_path)
