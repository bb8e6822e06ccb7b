"""Select the trial to export, of a finished or unfinished study, and load its checkpoint."""

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
from study.config.study_paths import with_typed_paths
from study.config.typed_paths import needs_root
from study.data.own_skeletons import kept_skeletons
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
    """The trial to export, and its best epoch: of both stages, or of stage 2."""

    trial: dict[str, Any]
    """Row of ``trials``."""
    report: dict[str, Any]
    """Row of ``reports`` of the epoch."""
    config: StudyConfig
    """The study's settings with the trial's values."""
    resolved: Resolved
    checkpoint: Checkpoint

    @property
    def values(self) -> dict[str, Any]:
        """Parameters of the trial by config path, without those that had no effect on it."""
        values = trial_values(self.config, self.trial)
        skipped = () if self.config.refine.epochs else ("refine.",)
        return {path: value for path, value in values.items() if not path.startswith(skipped)}

    def load(self) -> RefinedPose:
        """Build the estimator that the trial's AP was measured with.

        Raises:
            InputError: the checkpoint's weights don't fit the trial.
        """
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
                f"got a file that does not fit ({reason}...); it was changed, or written by "
                "another version of this project: restore it, or use that version"
            ) from None


def relocate(config: StudyConfig, folder: Path) -> StudyConfig:
    """Return the settings of a study with the paths of today, after it was moved or copied.

    ``student.init`` becomes random: weights come from checkpoints, so its file is not needed.

    Args:
        folder: the study's, where it is now.

    Raises:
        InputError: the folder of the data is missing.
    """
    config = with_typed_paths(config)
    storage, root = folder.resolve().parent, Path(config.data.root)
    if root.is_relative_to(config.storage):
        root = storage / root.relative_to(config.storage)
    is_drawn = config.data.kind == "drawn" and root.is_absolute()
    if needs_root(config.data) and not root.is_dir() and not is_drawn:
        raise InputError(
            f"an export must be checked on the data of the study, got data.root={root}, which "
            "is not a folder; restore the data, or change to the folder that the study was run in"
        )
    values = {"storage": str(storage), "data.root": str(root), "student.init": RANDOM}
    return with_values(config, values)


def select_trial(
    folder: Path, config: StudyConfig, number: int | None, *, is_refined: bool = False
) -> SelectedTrial:
    """Select a trial, by default the winner, and its best epoch.

    Args:
        config: the study's settings.
        number: the trial.
        is_refined: select the best epoch of stage 2, even if stage 1 was better; the default
            trial is then that of the best refined student.

    Raises:
        InputError: the trial is unknown, failed, or lacks the checkpoint; or no complete trial
            satisfies the constraints.
    """
    trials, reports = read_trials(folder), read_reports(folder)
    rows = {row["trial"]: row for row in trials.to_pylist()}
    if number is None:
        role = BEST_REFINED if is_refined else WINNER
        winner = finalists(trials, reports, confirmed_winner(folder)).get(role)
        if winner is None:
            raise InputError(
                f"{folder} must have a complete trial that satisfies search.constraints"
                f"{', with stage 2' if is_refined else ''}, got none; wait for one, or name a "
                "pruned one with --trial N"
            )
        number = int(winner["trial"])
    if number not in rows:
        raise InputError(
            f"--trial must be one of the study's finished trials, {_ranges(sorted(rows))}, "
            f"got --trial {number}"
        )
    row, others = rows[number], "choose another with --trial N"
    if row["state"] == "FAIL":
        reason = (row["error"] or "no reason was recorded").strip().splitlines()[-1]
        raise InputError(f"trial {number} failed and can't be exported ({reason}); {others}")
    if row["best_epoch"] is None:
        raise InputError(f"trial {number} ended before its first epoch; {others}")
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
            f"the checkpoint of trial {number} is missing from {path}; {others}"
        ) from None
    resolved = resolve(config, kept_skeletons(folder))
    return SelectedTrial(row, report, trial_config(config, row), resolved, checkpoint)


def _ranges(numbers: Sequence[int]) -> str:
    """Sorted numbers as ranges: 0 to 7, 9."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1].append(number)
        else:
            ranges.append([number])
    return ", ".join(f"{each[0]} to {each[-1]}" if each[1:] else str(each[0]) for each in ranges)
