"""The Parquet tables of a study: their columns, their only writer, their only reader.

``<study>/results/`` has a folder per table: ``reports`` (a row per epoch), ``trials`` (a row per
trial), ``final`` (a row per model scored on the official validation set), ``final_joints`` and
``final_curves`` (a row per model and joint, or OKS threshold). A folder's files share one schema,
so DuckDB and pandas read the folder as one table. A file appears whole or not at all. Of a
trial's two files the one in ``trials`` is written last: once it exists, the trial is recorded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from search_spaces.space import SearchSpace
from study.errors import InputError
from study.storage import failpoints
from study.storage.files import atomic_path, sync
from study.storage.paths import results_folder, table_folder

SCHEMA_VERSION = 4
"""Raised whenever a column changes its meaning, its type or its name."""
VERSION_KEY = b"pose_study.schema_version"
SPACE_KEY = b"pose_study.search_space"
LOSS = "loss."
"""Prefix of a loss term's column."""
WEIGHT = "weight."
"""Prefix of the column of a term's factor in the loss."""
GRADIENT_SHARE = "gradient_share."
"""Prefix of the column of a term's share in the gradient norms."""
GRADIENT_COSINE = "gradient_cosine."
"""Prefix of the column of the cosine between a term's gradient and the ground truth's."""
PARAMS = "params."
"""Prefix of a parameter's column; its config path follows."""
VAL = "val_"
"""Prefix of a figure measured on the search slice, which is held out of train."""
TableRow = Mapping[str, Any]
"""One row of a table, by column name."""


class Column(NamedTuple):
    """A column of a table: its name, its type, and its meaning with unit and range."""

    name: str
    type: pa.DataType
    meaning: str


TEXT, WHOLE, REAL = pa.string(), pa.int64(), pa.float64()
AVERAGE_PRECISION = (
    Column("ap", REAL, "average precision over OKS 0.50 to 0.95, 0 to 1"),
    Column("ap50", REAL, "average precision at OKS 0.50, 0 to 1"),
    Column("ap75", REAL, "average precision at OKS 0.75, 0 to 1"),
    Column("ar", REAL, "average recall over OKS 0.50 to 0.95, 0 to 1"),
    Column("ar50", REAL, "recall at OKS 0.50, 0 to 1"),
    Column("ar75", REAL, "recall at OKS 0.75, 0 to 1"),
    Column("ap_m", REAL, "average precision of people of medium area, 0 to 1; COCO's rules only"),
    Column("ap_l", REAL, "average precision of people of large area, 0 to 1; COCO's rules only"),
    Column("ar_m", REAL, "average recall of people of medium area, 0 to 1; COCO's rules only"),
    Column("ar_l", REAL, "average recall of people of large area, 0 to 1; COCO's rules only"),
    Column(
        "ap_easy",
        REAL,
        "average precision in images of crowdIndex below 0.2, 0 to 1; CrowdPose's rules only",
    ),
    Column(
        "ap_medium",
        REAL,
        "average precision in images of crowdIndex 0.2 to 0.8, 0 to 1; CrowdPose's rules only",
    ),
    Column(
        "ap_hard",
        REAL,
        "average precision in images of crowdIndex 0.8 or more, 0 to 1; CrowdPose's rules only",
    ),
)
"""The official figures, named as in COCO; null where the ground truth has no such person."""
TERMS = {
    "truth": "ground-truth term (both stages)",
    "truth_heatmap": "ground-truth heatmap term of a student with bins (distill)",
    "heatmap": "teacher's heatmap term (distill)",
    "bins": "teacher's term of a student with bins (distill)",
    "structure": "structure term, of a single kind (distill)",
    "structure_pairwise": "structure term of distances between joints, in a mix (distill)",
    "structure_bone": "structure term of limb vectors, in a mix (distill)",
    "structure_angle": "structure term of angles between limbs, in a mix (distill)",
    "structure_relation": "structure term of feature similarity of joints, in a mix (distill)",
    "teacher": "teacher's term of the refined pose (refine)",
}
"""The terms of both stages' losses; each has four columns in the reports."""


def _term_columns() -> Iterator[Column]:
    for term, name in TERMS.items():
        yield Column(LOSS + term, REAL, f"mean of the {name} over the epoch, before its weight")
    for term, name in TERMS.items():
        yield Column(WEIGHT + term, REAL, f"factor of the {name} in the loss, at the epoch's end")
    for term, name in TERMS.items():
        meaning = f"share of the {name} in the weighted gradients' norms, 0 to 1"
        yield Column(GRADIENT_SHARE + term, REAL, f"{meaning}; with distill.diagnose")
    for term, name in TERMS.items():
        meaning = f"cosine of the gradient of the {name} with that of truth, -1 to 1"
        yield Column(GRADIENT_COSINE + term, REAL, f"{meaning}; with distill.diagnose")


def _val_columns() -> Iterator[Column]:
    for name, type_, meaning in AVERAGE_PRECISION:
        yield Column(VAL + name, type_, f"{meaning}; on the search slice, held out of train")


REPORTS = (
    Column("study", TEXT, "name of the study"),
    Column("trial", WHOLE, "number of the trial; null for the teacher's training"),
    Column(
        "parent_trial",
        WHOLE,
        "number of the trial whose student this one refines; null if it trains its own",
    ),
    Column("stage", TEXT, "teacher, distill or refine"),
    Column("epoch", WHOLE, "epochs trained so far, counted over both stages, from 1"),
    Column("step", WHOLE, "optimizer steps so far, counted over both stages"),
    Column("seconds", REAL, "training and evaluation of the trial so far, s; pauses don't count"),
    Column("images_per_s", REAL, "crops trained on per second in this epoch, by all workers"),
    Column("lr", REAL, "learning rate at the epoch's end, the highest of all parameter groups"),
    Column("loss", REAL, "sum over the terms of loss.<term> times weight.<term>"),
    *_term_columns(),
    *_val_columns(),
)
TRIALS = (
    Column("study", TEXT, "name of the study"),
    Column("trial", WHOLE, "number of the trial"),
    Column(
        "parent_trial",
        WHOLE,
        "number of the trial whose student this one refines; null if it trains its own",
    ),
    Column("control", TEXT, "baseline or defaults; null for a configuration that was searched"),
    Column("state", TEXT, "COMPLETE, PRUNED or FAIL, as in Optuna"),
    Column("error", TEXT, "reason of the failure; null unless FAIL"),
    Column("seed", WHOLE, "seed of all random numbers of the trial"),
    Column("objective", REAL, "val_ap of the best epoch, 0 to 1; null if no epoch ended"),
    Column("best_epoch", WHOLE, "epoch with the highest val_ap, the first of equals"),
    Column("best_stage", TEXT, "stage of that epoch: distill or refine"),
    Column("epochs", WHOLE, "epochs trained, over both stages"),
    Column("objectives", TEXT, "objectives of the search: ap, and maybe latency_ms, parameters"),
    Column(
        "latency_ms",
        REAL,
        "median time of the estimator for one crop, ms, batch norms folded; on a CPU, one thread",
    ),
    Column("parameters", WHOLE, "number of parameters of the estimator after the last stage"),
    Column("feasible", pa.bool_(), "whether the trial satisfies search.constraints"),
    Column("checkpoint", TEXT, "checkpoint of the best epoch, relative to the study's folder"),
    Column("launcher", TEXT, "inline or train"),
    Column("started", pa.timestamp("ms", tz="UTC"), "time of the trial's first start"),
    Column("duration_s", REAL, "training and evaluation of the trial, s; pauses don't count"),
    Column("gpu_s", REAL, "duration_s times the GPUs of the trial"),
    Column("node", TEXT, "host of the process that recorded the trial"),
)
FINALIST = (
    Column("study", TEXT, "name of the study"),
    Column("role", TEXT, "teacher, baseline, best_distilled, best_refined or winner"),
    Column("trial", WHOLE, "number of the trial; null for the teacher"),
    Column("stage", TEXT, "stage of the checkpoint: teacher, distill or refine"),
    Column("epoch", WHOLE, "epoch of the checkpoint, counted over both stages"),
    Column("split", TEXT, "split that was scored: val"),
)
"""The model that a row of the final tables is about."""
FINAL = (
    *FINALIST,
    Column("num_people", WHOLE, "number of boxes that a pose was estimated in"),
    Column("detections", TEXT, "file of those boxes; null for annotated boxes"),
    Column("checkpoint", TEXT, "checkpoint that was scored, relative to the study's folder"),
    Column("keypoints", TEXT, "file of its poses as COCO results, relative to the study's folder"),
    *AVERAGE_PRECISION,
)
JOINTS, CURVES = "final_joints", "final_curves"
FINALS = {
    "final": FINAL,
    JOINTS: (
        *FINALIST,
        Column("joint", TEXT, "name of the joint"),
        Column("ap", REAL, "average precision with the OKS of that joint alone, 0 to 1"),
    ),
    CURVES: (
        *FINALIST,
        Column("oks", REAL, "OKS threshold: 0.50, 0.55 .. 0.95"),
        Column("ap", REAL, "average precision at that threshold, 0 to 1; final has their mean"),
    ),
}
"""The columns of the finalists' tables, by table."""
VALUE_TYPES = {float: REAL, int: WHOLE, str: TEXT, bool: pa.bool_()}


def write_trial(
    study_folder: Path,
    trial_row: TableRow,
    report_rows: Sequence[TableRow],
    space: SearchSpace,
) -> None:
    """Write a finished trial and all its reports, in place of its running part.

    Writing the same trial again replaces it. Absent keys become null; parameters are keyed
    ``params.<config path>``.
    """
    number = trial_row["trial"]
    write_part(_part(study_folder, "reports", number), REPORTS, report_rows, space)
    columns = (*TRIALS, *_parameter_columns(space))
    write_part(_part(study_folder, "trials", number), columns, [trial_row], space)
    _running_part(study_folder, number).unlink(missing_ok=True)


def write_running(
    study_folder: Path,
    trial: int,
    report_rows: Sequence[TableRow],
    space: SearchSpace,
) -> None:
    """Write all reports so far of a running trial."""
    write_part(_running_part(study_folder, trial), REPORTS, report_rows, space)


def write_teacher(study_folder: Path, report_rows: Sequence[TableRow], space: SearchSpace) -> None:
    """Write the reports of the teacher's training."""
    file = table_folder(study_folder, "reports") / "teacher.parquet"
    write_part(file, REPORTS, report_rows, space)


def write_final(
    study_folder: Path,
    rows: Sequence[TableRow],
    space: SearchSpace,
    joints: Sequence[TableRow] = (),
    curves: Sequence[TableRow] = (),
) -> None:
    """Write the tables of ``FINALS``; ``final``, which ends a study, comes last."""
    for table, content in ((JOINTS, joints), (CURVES, curves), ("final", rows)):
        file = table_folder(study_folder, table) / "final.parquet"
        write_part(file, FINALS[table], content, space)


def remove_leftovers(study_folder: Path) -> None:
    """Remove what a kill may leave: temporary files, and running parts of finished trials.

    For the writer, when a study starts. ``read_reports`` skips both anyway; other programs count
    a trial twice while both its parts exist.
    """
    for temporary in results_folder(study_folder).glob("*/.*.parquet.*"):
        temporary.unlink()
    for running in table_folder(study_folder, "reports").glob("*.running.parquet"):
        if _finished(running).exists():
            running.unlink()


def written_trials(study_folder: Path) -> set[int]:
    """Return the numbers of the recorded trials; none if the folder is missing."""
    return {int(part.stem) for part in table_folder(study_folder, "trials").glob("*.parquet")}


def read_trials(study_folder: Path) -> pa.Table:
    """Return the finished trials by number: ``TRIALS`` and ``params.<config path>``.

    Raises:
        InputError: the folder is no study, has no finished trial, or is newer than this code.
    """
    parts = _parts(study_folder, "trials")
    if not parts:
        raise InputError(
            f"{study_folder} must hold a finished trial, got none yet; wait for the first to end, "
            "or run the study's command again if it was stopped"
        )
    return _read(parts).sort_by("trial")


def read_reports(study_folder: Path) -> pa.Table:
    """Return the reports of finished and running trials and of the teacher, each once.

    Ordered by trial and epoch, the teacher's last; no rows before the first report.
    """
    while True:
        parts = [
            part
            for part in _parts(study_folder, "reports")
            if _finished(part) == part or not _finished(part).exists()
        ]
        if not parts:
            return _schema(REPORTS, {}).empty_table()
        try:
            return _read(parts).sort_by([("trial", "ascending"), ("epoch", "ascending")])
        except FileNotFoundError:
            continue  # a trial ended since the folder was listed; its finished part exists


def read_final(study_folder: Path, table: str = "final") -> pa.Table:
    """Return a table of ``FINALS``; no rows until the study has ended."""
    return read_table(study_folder, table, FINALS[table])


def read_table(study_folder: Path, table: str, columns: Iterable[Column]) -> pa.Table:
    """Return all parts of a table as one; these columns and no rows if there is no part."""
    parts = _parts(study_folder, table)
    return _read(parts) if parts else _schema(columns, {}).empty_table()


def space_of(table: pa.Table) -> SearchSpace:
    """Return the search space that a table was written with."""
    return SearchSpace.from_json(table.schema.metadata[SPACE_KEY].decode())


def write_part(
    file: Path,
    columns: Iterable[Column],
    rows: Sequence[TableRow],
    space: SearchSpace,
) -> None:
    """Write one file of a table whole, in place of any earlier one.

    Raises:
        ValueError: a row has a key that is none of the columns.
    """
    metadata = {VERSION_KEY: str(SCHEMA_VERSION).encode(), SPACE_KEY: space.to_json().encode()}
    schema = _schema(columns, metadata)
    unknown = {name for row in rows for name in row}.difference(schema.names)
    if unknown:
        raise ValueError(
            f"columns of {file.parent.name} must be listed in study/storage/tables.py, got "
            f"{', '.join(sorted(unknown))}; add them there and raise SCHEMA_VERSION"
        )
    with atomic_path(file) as temporary:
        pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), temporary)
        failpoints.point(f"renaming {file.parent.name}")
    sync(file.parent)


def _part(study_folder: Path, table: str, trial: int) -> Path:
    return table_folder(study_folder, table) / f"{trial:05d}.parquet"


def _running_part(study_folder: Path, trial: int) -> Path:
    return table_folder(study_folder, "reports") / f"{trial:05d}.running.parquet"


def _finished(part: Path) -> Path:
    """The part that takes the place of a running one; any other part itself."""
    return part.with_name(part.name.replace(".running.", "."))


def _parameter_columns(space: SearchSpace) -> Iterator[Column]:
    for parameter in space.parameters:
        type_ = VALUE_TYPES[parameter.value_type()]
        meaning = f"{parameter.role} parameter; null in trials without it"
        yield Column(PARAMS + parameter.path, type_, meaning)


def _schema(columns: Iterable[Column], metadata: Mapping[bytes, bytes]) -> pa.Schema:
    fields = [
        pa.field(column.name, column.type, metadata={"description": column.meaning})
        for column in columns
    ]
    return pa.schema(fields, metadata=dict(metadata))


def _parts(study_folder: Path, table: str) -> list[Path]:
    if not results_folder(study_folder).is_dir():
        fault = "which has no results/" if study_folder.is_dir() else "which does not exist"
        raise InputError(
            f"a study must be named by its folder <storage>/<name>, got {study_folder}, {fault}; "
            "look for it under studies/, or under the storage= that it was run with"
        )
    return sorted(table_folder(study_folder, table).glob("*.parquet"))


def _read(parts: Iterable[Path]) -> pa.Table:
    tables = [_read_part(part) for part in parts]
    # Permissive, because an earlier version of the code may have written some of the parts.
    merged = pa.concat_tables(tables, promote_options="permissive")
    return merged.replace_schema_metadata(tables[-1].schema.metadata)


def _read_part(part: Path) -> pa.Table:
    try:
        table = pq.ParquetFile(part).read()
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{part} must be a Parquet file that a study wrote, got one that cannot be read "
            f"({error}); move it away, and run the study's command again"
        ) from error
    version = (table.schema.metadata or {}).get(VERSION_KEY)
    if version is None:
        raise InputError(f"{part} must have been written by a study, got another Parquet file")
    if int(version) > SCHEMA_VERSION:
        raise InputError(
            f"{part} must have schema version {SCHEMA_VERSION} or older, got {int(version)}: it "
            "was written by a newer version of this project; update this one"
        )
    return table
