"""Every path of a study's folder, and of the cache that studies of one ``storage`` share.

<storage>/<study>/
  study.yaml           settings, command, versions, fingerprints
  optuna.journal       the Optuna study
  results/             trials, reports, final tables and the audit, in Parquet
  trials/<number>/     epoch-<n>/ checkpoints, error.log
  .lock .ray/          while the study runs
<storage>/cache/       crops, teachers and drawn people, shared by all studies
  teacher-<hash>/      epochs/, targets.arrow, teacher.json
"""

from __future__ import annotations

import re
from pathlib import Path

from study.config.schema import SHARED_FOLDER, StudyConfig

AUDIT = "audit"
"""Folder under a study's ``results``."""
FOLDER = re.compile(r"epoch-(\d+)")
ERROR_LOG = "error.log"
RAY_FOLDER = ".ray"
"""In the study's folder while it runs: what Tune and Train keep of their own."""
SETTINGS = "study.yaml"
TARGETS = "targets.arrow"
EPOCHS = "epochs"
DONE = "teacher.json"
LOCK = ".lock"


def trial_folder(study_folder: Path, number: int) -> Path:
    """Where a trial's checkpoints lie."""
    return study_folder / "trials" / str(number)


def place_of_crops(config: StudyConfig) -> tuple[str | None, Path]:
    """The object store of the crops, if there is one, and the folder where they are read."""
    store = config.data.store
    if store is not None and "://" not in store:
        return None, Path(store)
    return store, cache_of(config)


def cache_of(config: StudyConfig) -> Path:
    """Folder of what the studies under one ``storage`` share."""
    return Path(config.storage) / SHARED_FOLDER
