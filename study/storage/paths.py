"""Every path of a study's folder, and of the cache that studies under one ``storage`` share.

<storage>/<study>/
  study.yaml              settings, command, versions, fingerprints
  optuna.journal          the Optuna study
  results/                Parquet, a folder per table; files are written whole
    trials/ reports/        a file per trial, and the teacher's reports
    final/ final_joints/ final_curves/
    confirm/ confirmed/     a file per confirming run, and the verdicts
    audit/                  train.parquet, val.parquet, overlap.parquet
    keypoints_<role>.json   a finalist's poses on val, as COCO results
  trials/<number>/        error.log, hang-<rank>.log
    epoch-<n>/              a checkpoint: model.safetensors, optimizer.pt, state.json
  confirm/<trial>-<run>/  epoch-<n>/, hang-<rank>.log, keypoints.json, result.json
  plots/ export/          written by analyze.py and by export.py
  tensorboard/<number>/   with log=[tensorboard]
  mlflow.db mlflow_artifacts/     with log=[mlflow]
  .lock                   locked by the driver
  .ray/                   while the study runs
<storage>/cache/
  drawn-<seed>-<images of train>-<images of val>/
  crops-<hash>/           people.arrow, part-<n>.arrow
  truth-<hash>.json       annotations that a split is scored against
  training-<hash>/        of a teacher: epochs/epoch-<n>/
  teacher-<hash>/         targets.arrow, target_error.json, teacher.json
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from study.config.schema import MLFLOW, TENSORBOARD

WEIGHTS, OPTIMIZER, STATE = "model.safetensors", "optimizer.pt", "state.json"
"""The files of a checkpoint."""
TARGETS = "targets.arrow"
"""The teacher's targets, in its folder."""
_EPOCH_FOLDER = re.compile(r"epoch-(\d+)")


def settings_file(study_folder: Path) -> Path:
    """``study.yaml``: settings, command, versions and fingerprints."""
    return study_folder / "study.yaml"


def journal_file(study_folder: Path) -> Path:
    """``optuna.journal``: the Optuna study."""
    return study_folder / "optuna.journal"


def lock_file(folder: Path) -> Path:
    """Lock file of the driver that works in this folder, a study's or a teacher's."""
    return folder / ".lock"


def ray_storage(study_folder: Path) -> Path:
    """Folder of Ray Train's and Ray Tune's own files; exists while the study runs."""
    return study_folder / ".ray"


def results_folder(study_folder: Path) -> Path:
    """Folder of the tables, the audit and the finalists' poses."""
    return study_folder / "results"


def table_folder(study_folder: Path, table: str) -> Path:
    """Folder of a table's Parquet files."""
    return results_folder(study_folder) / table


def audit_folder(study_folder: Path) -> Path:
    """Folder of the audit's Parquet files."""
    return results_folder(study_folder) / "audit"


def finalist_keypoints_file(study_folder: Path, role: str) -> Path:
    """Poses of a finalist on val, as COCO results."""
    return results_folder(study_folder) / f"keypoints_{role}.json"


def trial_folder(study_folder: Path, number: int) -> Path:
    """Folder of a trial's checkpoints and logs."""
    return study_folder / "trials" / str(number)


def epoch_folder(folder: Path, epoch: int) -> Path:
    """Folder of one checkpoint of a trial, a confirming run or the teacher."""
    return folder / f"epoch-{epoch:03d}"


def epoch_folders(folder: Path) -> Iterator[tuple[int, Path]]:
    """Yield the epochs that have a checkpoint, in no order; none if the folder is missing."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if match := _EPOCH_FOLDER.fullmatch(path.name):
            yield int(match.group(1)), path


def error_log(folder: Path) -> Path:
    """Tracebacks of a trial, appended."""
    return folder / "error.log"


def stall_log(folder: Path, rank: int) -> Path:
    """File that a worker dumps its stack to if its trial stalls."""
    return folder / f"hang-{rank}.log"


def stall_logs(folder: Path) -> list[Path]:
    """Existing stack dumps of a trial, by name."""
    return sorted(folder.glob("hang-*.log"))


def run_folder(study_folder: Path, trial: int, run: int) -> Path:
    """Folder of a confirming run."""
    return study_folder / "confirm" / f"{trial}-{run}"


def run_result_file(folder: Path) -> Path:
    """Result of a confirming run; exists once the run is over."""
    return folder / "result.json"


def run_keypoints_file(folder: Path) -> Path:
    """Poses of a confirming run on val, as COCO results."""
    return folder / "keypoints.json"


def plots_folder(study_folder: Path) -> Path:
    """Folder that ``analyze.py`` writes to."""
    return study_folder / "plots"


def export_folder(study_folder: Path) -> Path:
    """Folder that ``export.py`` writes to."""
    return study_folder / "export"


def tensorboard_folder(study_folder: Path) -> Path:
    """Folder of event files, a subfolder per trial."""
    return study_folder / TENSORBOARD


def mlflow_file(study_folder: Path) -> Path:
    """MLflow's database, unless MLFLOW_TRACKING_URI names another."""
    return study_folder / f"{MLFLOW}.db"


def mlflow_artifacts_folder(study_folder: Path) -> Path:
    """Folder that MLflow expects for artifacts."""
    return study_folder / f"{MLFLOW}_artifacts"


def teacher_epochs(folder: Path) -> Path:
    """Folder of the checkpoints of the teacher's training."""
    return folder / "epochs"


def teacher_record_file(folder: Path) -> Path:
    """Record of a finished teacher; exists once its targets are stored."""
    return folder / "teacher.json"


def target_error_file(folder: Path) -> Path:
    """Error and size of the stored targets."""
    return folder / "target_error.json"


def cached_crops(cache: Path, fingerprint: str) -> Path:
    """Folder of a crop store."""
    return cache / f"crops-{fingerprint}"


def cached_truth(cache: Path, fingerprint: str) -> Path:
    """COCO file of the annotations that a split is scored against."""
    return cache / f"truth-{fingerprint}.json"


def cached_teacher(cache: Path, fingerprint: str) -> Path:
    """Folder of a teacher's targets; teachers of earlier versions have their checkpoints there."""
    return cache / f"teacher-{fingerprint}"


def cached_training(cache: Path, fingerprint: str) -> Path:
    """Folder of the checkpoints of a teacher's training."""
    return cache / f"training-{fingerprint}"
