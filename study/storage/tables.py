"""The evidence of a study: Parquet tables, their only writer and their only reader.

Under ``<study>/results/`` lie ``reports`` (a row per report), ``trials`` (a row per trial),
``final`` (a row per model scored on the official validation set; ``final_joints`` and
``final_curves`` have a row per model and joint or OKS threshold). Each is a folder of parts with
one schema, which DuckDB and pandas read as it is. A part appears whole or not at all; a trial
counts as written once its part in ``trials`` is there, so that one is written last.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
"""Prefix of the column of a term's share in the length of the gradient."""
GRADIENT_COSINE = "gradient_cosine."
"""Prefix of the column of the cosine between a term's gradient and the truth's."""
PARAMS = "params."
"""Prefix of a parameter's column; its config path follows."""
VAL = "val_"
"""Prefix of what was measured on the slice held out of train."""
TableRow = Mapping[str, Any]
"""One row of a table, by column name."""


class Column(NamedTuple):
    """A column of a table: its name, its type and what it means."""

    name: str
    type: pa.DataType
    meaning: str


TEXT, WHOLE, REAL = pa.string(), pa.int64(), pa.float64()
AVERAGE_PRECISION = (
    Column("ap", REAL, "average precision over OKS 0.50 to 0.95, 0 to 1"),
    Column("ap50", REAL, "average precision at OKS 0.50"),
    Column("ap75", REAL, "average precision at OKS 0.75"),
    Column("ar", REAL, "average recall over OKS 0.50 to 0.95"),
    Column("ar50", REAL, "recall at OKS 0.50"),
    Column("ar75", REAL, "recall at OKS 0.75"),
    Column("ap_m", REAL, "average precision of people of middling area; COCO's figures alone"),
    Column("ap_l", REAL, "average precision of large people; COCO's figures alone"),
    Column("ar_m", REAL, "average recall of people of middling area; COCO's figures alone"),
    Column("ar_l", REAL, "average recall of large people; COCO's figures alone"),
    Column("ap_easy", REAL, "average precision at a low crowdIndex; CrowdPose's figures alone"),
    Column("ap_medium", REAL, "average precision at a middling crowdIndex; CrowdPose's alone"),
    Column("ap_hard", REAL, "average precision at a high crowdIndex; CrowdPose's alone"),
)
TERMS = {
    "truth": "term of the ground truth; either stage",
    "truth_heatmap": "term of the ground truth's heatmaps, of a student with bins; distill",
    "heatmap": "term of the teacher's heatmaps; distill",
    "bins": "term of the teacher's pose in bins; distill",
    "structure": "term of the joints' structure, of one kind; distill",
    "structure_pairwise": "distances of every two joints, in a mix; distill",
    "structure_bone": "limbs as vectors, in a mix; distill",
    "structure_angle": "angles between limbs, in a mix; distill",
    "structure_relation": "joints' likeness in the features, in a mix; distill",
    "teacher": "term of the teacher's final pose; refine",
}
"""The terms of the stages' losses, each with columns of its own in the reports."""
REPORTS = (
    Column("study", TEXT, "name of the study"),
    Column("trial", WHOLE, "number of the trial; null for the teacher's training"),
    Column("parent_trial", WHOLE, "trial whose student this one starts from; null where none"),
    Column("stage", TEXT, "teacher, distill or refine"),
    Column("epoch", WHOLE, "passes over the data so far, counted over both stages, from 1"),
    Column("step", WHOLE, "optimizer steps so far, counted over both stages"),
    Column("seconds", REAL, "training time since the trial's start"),
    Column("images_per_s", REAL, "crops trained on per second in this epoch"),
    Column("lr", REAL, "highest learning rate of any layer at the end of the epoch"),
    Column("loss", REAL, "sum over the terms of loss.<term> times weight.<term>"),
    *(
        Column(prefix + term, REAL, f"{figure} the {meaning}")
        for prefix, figure in (
            (LOSS, "mean over the epoch, unweighted, of"),
            (WEIGHT, "at the epoch's end, the factor in the loss of"),
            (GRADIENT_SHARE, "share of the weighted terms' summed gradient norms that has"),
            (GRADIENT_COSINE, "cosine with the truth's gradient, 0 where one vanishes, of"),
        )
        for term, meaning in TERMS.items()
    ),
    *(
        Column(VAL + name, type_, f"{meaning}; on the slice held out of train")
        for name, type_, meaning in AVERAGE_PRECISION
    ),
)
TRIALS = (
    Column("study", TEXT, "name of the study"),
    Column("trial", WHOLE, "number of the trial"),
    Column("parent_trial", WHOLE, "trial whose student this one starts from; null where none"),
    Column("control", TEXT, "baseline or defaults for a known config; null for a searched one"),
    Column("state", TEXT, "COMPLETE, PRUNED or FAIL, as in Optuna"),
    Column("error", TEXT, "why it failed; null unless FAIL"),
    Column("seed", WHOLE, "seed that everything random in the trial is drawn from"),
    Column("objective", REAL, "the best epoch's val_ap, 0 to 1; null where none was reached"),
    Column("best_epoch", WHOLE, "the epoch that got it"),
    Column("best_stage", TEXT, "the stage of that epoch: distill or refine"),
    Column("epochs", WHOLE, "epochs trained, over both stages"),
    Column("objectives", TEXT, "what the search was to reach: ap, maybe latency_ms, parameters"),
    Column("latency_ms", REAL, "for one crop, batch norms folded; on a CPU of one thread, ms"),
    Column("parameters", WHOLE, "numbers learned that the estimator of the last stage has"),
    Column("feasible", pa.bool_(), "whether it keeps to search.constraints, if there are any"),
    Column("checkpoint", TEXT, "that epoch's checkpoint, relative to the study's folder"),
    Column("launcher", TEXT, "inline or train"),
    Column("started", pa.timestamp("ms", tz="UTC"), "when the trial was first started"),
    Column("duration_s", REAL, "from its start to its end, in seconds"),
    Column("gpu_s", REAL, "duration times the GPUs it held"),
    Column("node", TEXT, "host that it ended on"),
)
FINALIST = (
    Column("study", TEXT, "name of the study"),
    Column("role", TEXT, "teacher, baseline, best_distilled, best_refined or winner"),
    Column("trial", WHOLE, "number of the trial; null for the teacher"),
    Column("stage", TEXT, "the stage of the checkpoint: teacher, distill or refine"),
    Column("epoch", WHOLE, "the epoch of the checkpoint, counted over both stages"),
    Column("split", TEXT, "what it was scored on: val"),
)
"""Whose figures a row has, in each of the final tables."""
FINAL = (
    *FINALIST,
    Column("num_people", WHOLE, "boxes that people were looked for in"),
    Column("detections", TEXT, "the file of those boxes; null for those of the ground truth"),
    Column("checkpoint", TEXT, "what was scored, relative to the study's folder"),
    Column("keypoints", TEXT, "its poses as COCO results, relative to the study's folder"),
    *AVERAGE_PRECISION,
)
JOINTS, CURVES = "final_joints", "final_curves"
FINALS = {
    "final": FINAL,
    JOINTS: (
        *FINALIST,
        Column("joint", TEXT, "name of the joint"),
        Column("ap", REAL, "average precision by the OKS of that joint alone"),
    ),
    CURVES: (
        *FINALIST,
        Column("oks", REAL, "the OKS from which on a pose is right: 0.50, 0.55 .. 0.95"),
        Column("ap", REAL, "average precision at that OKS; their mean is the ap of final"),
    ),
}
"""The tables of the finalists, by name."""
VALUE_TYPES = {float: REAL, int: WHOLE, str: TEXT, bool: pa.bool_()}


def write_trial(
    study_folder: Path,
    trial_row: TableRow,
    report_rows: Sequence[TableRow],
    space: SearchSpace,
) -> None:
    """The finished trial and all its reports are on disk, in place of its running part.

    Writing the same trial again replaces it. Absent keys become null; parameters are keyed
    ``params.<config path>``.
    """
    name = _part_name(trial_row["trial"])
    reports = table_folder(study_folder, "reports")
    write_part(reports / f"{name}.parquet", REPORTS, report_rows, space)
    trial_columns = (*TRIALS, *_parameter_columns(space))
    trials = table_folder(study_folder, "trials")
    write_part(trials / f"{name}.parquet", trial_columns, [trial_row], space)
    (reports / f"{name}.running.parquet").unlink(missing_ok=True)


def write_running(
    study_folder: Path,
    trial: int,
    report_rows: Sequence[TableRow],
    space: SearchSpace,
) -> None:
    """All reports so far of a running trial are on disk, in place of its last such part."""
    file = table_folder(study_folder, "reports") / f"{_part_name(trial)}.running.parquet"
    write_part(file, REPORTS, report_rows, space)


def write_teacher(study_folder: Path, report_rows: Sequence[TableRow], space: SearchSpace) -> None:
    """The reports of the teacher's training are on disk, in place of any earlier ones."""
    file = table_folder(study_folder, "reports") / "teacher.parquet"
    write_part(file, REPORTS, report_rows, space)


def write_final(
    study_folder: Path,
    rows: Sequence[TableRow],
    space: SearchSpace,
    joints: Sequence[TableRow] = (),
    curves: Sequence[TableRow] = (),
) -> None:
    """The tables of ``FINALS`` are on disk, in place of any earlier ones; ``final`` comes last."""
    for table, content in ((JOINTS, joints), (CURVES, curves), ("final", rows)):
        file = table_folder(study_folder, table) / "final.parquet"
        write_part(file, FINALS[table], content, space)


def tidy(study_folder: Path) -> None:
    """What a kill may have left is gone: half-written files, running parts of finished trials.

    For the writer, at the start of a study. Readers skip both without it; other programs count a
    trial twice while both its parts are there.
    """
    results = results_folder(study_folder)
    for leftover in results.glob("*/.*.parquet.*"):
        leftover.unlink()
    for running in table_folder(study_folder, "reports").glob("*.running.parquet"):
        if _final_of(running).exists():
            running.unlink()


def written_trials(study_folder: Path) -> set[int]:
    """Numbers of the trials that are wholly on disk; empty where nothing is."""
    return {int(part.stem) for part in (table_folder(study_folder, "trials")).glob("*.parquet")}


def read_trials(study_folder: Path) -> pa.Table:
    """The finished trials by number, columns as in ``TRIALS`` and ``params.<config path>``.

    Raises:
        InputError: the folder is no study, or has no finished trial, or is newer than this code.
    """
    parts = _parts(study_folder, "trials")
    if not parts:
        raise InputError(
            f"{study_folder} must hold a finished trial, got none yet; wait for the first to end, "
            "or run the study's command again if it was stopped"
        )
    return _read(parts).sort_by("trial")


def read_reports(study_folder: Path) -> pa.Table:
    """The reports of finished and running trials and of the teacher, each once, as ``REPORTS``.

    In the order of trial and epoch, the teacher's last; without rows before the first report.
    """
    while True:
        parts = [
            part
            for part in _parts(study_folder, "reports")
            if _final_of(part) == part or not _final_of(part).exists()
        ]
        if not parts:
            return _schema(REPORTS, {}).empty_table()
        try:
            return _read(parts).sort_by([("trial", "ascending"), ("epoch", "ascending")])
        except FileNotFoundError:
            continue  # a trial ended since the folder was listed, and its final part is there


def read_final(study_folder: Path, table: str = "final") -> pa.Table:
    """A table of ``FINALS``: the figures on the validation set; no rows until they exist."""
    return read_table(study_folder, table, FINALS[table])


def read_table(study_folder: Path, table: str, columns: Iterable[Column]) -> pa.Table:
    """All parts of a table; no rows, but the columns, until there is one."""
    parts = _parts(study_folder, table)
    return _read(parts) if parts else _schema(columns, {}).empty_table()


def space_of(table: pa.Table) -> SearchSpace:
    """The search space that the table was written with."""
    return SearchSpace.from_json(table.schema.metadata[SPACE_KEY].decode())


def _part_name(trial: int) -> str:
    return f"{trial:05d}"


def _final_of(part: Path) -> Path:
    return part.with_name(part.name.replace(".running.", "."))


def _parameter_columns(space: SearchSpace) -> Iterable[Column]:
    for parameter in space.parameters:
        type_ = VALUE_TYPES[parameter.value_type()]
        meaning = f"{parameter.role} parameter; null where it was not asked for"
        yield Column(PARAMS + parameter.path, type_, meaning)


def _schema(columns: Iterable[Column], metadata: Mapping[bytes, bytes]) -> pa.Schema:
    fields = [
        pa.field(column.name, column.type, metadata={"description": column.meaning})
        for column in columns
    ]
    return pa.schema(fields, metadata=dict(metadata))


def write_part(
    file: Path,
    columns: Iterable[Column],
    rows: Sequence[TableRow],
    space: SearchSpace,
) -> None:
    """A part of a table is on disk, whole, in place of any earlier one."""
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


def _parts(study_folder: Path, table: str) -> list[Path]:
    results = results_folder(study_folder)
    if not results.is_dir():
        came = "which has no results/" if study_folder.is_dir() else "which does not exist"
        raise InputError(
            f"a study must be named by its folder <storage>/<name>, got {study_folder}, {came}; "
            "look for it under studies/, or under the storage= that it was run with"
        )
    return sorted((results / table).glob("*.parquet"))


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
