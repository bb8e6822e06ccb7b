"""The trial of a finished or unfinished study that is to be exported, found and loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from models.refined_pose import RefinedPose
from study.config.compose import with_values
from study.config.derived import Resolved, resolve
from study.config.schema import RANDOM, StudyConfig
from study.errors import InputError
from study.search.controls import trial_config, trial_values
from study.storage.checkpoint import Checkpoint, Checkpoints, best_row
from study.storage.paths import trial_folder
from study.storage.tables import read_reports, read_trials
from study.training.networks import load_estimator
from study.training.refine import RefineTask
from study.validation.confirm_table import WINNER, confirmed_winner
from study.validation.finalists import BEST_REFINED, finalists


@dataclass(frozen=True)
class SelectedTrial:
    """The trial to export, and its best epoch, of both stages or of stage 2."""

    trial: dict[str, Any]
    """Its row of ``trials``."""
    report: dict[str, Any]
    """The row of ``reports`` of that epoch."""
    config: StudyConfig
    """The study's settings with the trial's values in place."""
    resolved: Resolved
    checkpoint: Checkpoint

    @property
    def values(self) -> dict[str, Any]:
        """What the trial was to try, by config path, without what had no effect on it."""
        values = trial_values(self.config, self.trial)
        skipped = () if self.config.refine.epochs else ("refine.",)
        return {path: value for path, value in values.items() if not path.startswith(skipped)}

    def load(self) -> RefinedPose:
        """The estimator that the trial's AP was measured on."""
        config = self.config
        try:
            return load_estimator(
                self.checkpoint,
                config.student,
                config.distill,
                config.refine,
                config.trial,
                self.resolved,
            )
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"{self.checkpoint.folder} must hold the weights of trial {self.trial['trial']}, "
                f"got a file that does not fit it ({reason}...); was it changed, or written by "
                "another version of this project?"
            ) from None


def relocate(config: StudyConfig, folder: Path) -> StudyConfig:
    """The settings of a study as it lies now: seen from any folder, wherever it was moved to.

    The student's weights come from checkpoints, so that those it began with are not asked for.
    """
    storage, root = folder.resolve().parent, Path(config.data.root)
    if root.is_relative_to(config.storage):
        root = storage / root.relative_to(config.storage)
    if not root.is_dir() and (config.data.kind != "drawn" or not root.is_absolute()):
        raise InputError(
            f"the data of the study must be there to prove the export, got data.root={root}, "
            "which is no folder seen from here; put them back, or change to the folder that the "
            "study was run in"
        )
    values = {"storage": str(storage), "data.root": str(root), "student.init": RANDOM}
    return with_values(config, values)


def select_trial(
    folder: Path, config: StudyConfig, number: int | None, *, is_refined: bool = False
) -> SelectedTrial:
    """The trial of that number, by default the winner among those that came to their end.

    Args:
        is_refined: its best epoch of stage 2, though stage 1 may have a better one; by default
            that of the best refined student.

    Raises:
        InputError: it is unknown, failed, or has no checkpoint, or none of stage 2.
    """
    trials, reports = read_trials(folder), read_reports(folder)
    rows = {row["trial"]: row for row in trials.to_pylist()}
    if number is None:
        role = BEST_REFINED if is_refined else WINNER
        winner = finalists(trials, reports, confirmed_winner(folder)).get(role)
        if winner is None:
            raise InputError(
                f"a trial of {folder} must have come to its end to be exported, and keep to "
                f"search.constraints{', with stage 2' if is_refined else ''}, got none yet; wait "
                "for one, or name a pruned one by --trial N"
            )
        number = int(winner["trial"])
    if number not in rows:
        raise InputError(
            f"--trial must be one of the study's finished trials, {_listed(sorted(rows))}, "
            f"got --trial {number}"
        )
    row, others = rows[number], "choose another by --trial N"
    if row["state"] == "FAIL":
        reason = (row["error"] or "no reason was recorded").strip().splitlines()[-1]
        raise InputError(f"trial {number} failed and can't be exported ({reason}); {others}")
    if row["best_epoch"] is None:
        raise InputError(f"trial {number} ended before its first epoch did; {others}")
    own = [report for report in reports.to_pylist() if report["trial"] == number]
    report = next(report for report in own if report["epoch"] == row["best_epoch"])
    if is_refined:
        refined = [report for report in own if report["stage"] == RefineTask.name]
        if not refined:
            raise InputError(f"trial {number} has no epoch of stage 2; {others}, or no --refined")
        report = best_row(refined)
    checkpoints = Checkpoints(trial_folder(folder, number))
    try:
        checkpoint = checkpoints.at(report["epoch"])
    except (OSError, ValueError):
        path = checkpoints.path(report["epoch"])
        raise InputError(
            f"the checkpoint of trial {number} is gone from {path}; {others}"
        ) from None
    return SelectedTrial(row, report, trial_config(config, row), resolve(config), checkpoint)


def _listed(numbers: Sequence[int]) -> str:
    """The numbers, runs of them shortened: 0 to 7, 9."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]} to {run[-1]}" if run[1:] else str(run[0]) for run in runs)
