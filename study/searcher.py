"""What Tune sees of a study: a searcher that only asks the study's owner, and a silent display."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray.tune.progress_reporter import TrialProgressCallback
from ray.tune.search import Searcher

from study.launch import free_what_was_held, job_of_trial


class OwnerSearcher(Searcher):
    """What Tune sees of the study: suggestions, and an ear for trials that Tune gave up on."""

    def __init__(self, owner: Any, study_folder: Path) -> None:
        super().__init__(metric="val_ap", mode="max")
        self.owner = owner
        self.study_folder = study_folder
        self.numbers: dict[str, int] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        suggestion: dict[str, Any] | None = ray.get(self.owner.ask.remote(trial_id))
        if suggestion is None:
            return str(Searcher.FINISHED)
        self.numbers[trial_id] = suggestion["number"]
        return suggestion

    def on_trial_complete(
        self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False
    ) -> None:
        if error:
            number = self.numbers[trial_id]
            free_what_was_held(self.study_folder, job_of_trial(number))
            reason = "its process died again and again, without a word"
            ray.get(self.owner.fail.remote(number, reason))

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study itself is durable."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the study itself is durable."""


class SilentProgress(TrialProgressCallback):
    """Takes the place of Tune's own, which tells at any verbosity of trials without a result."""

    def _print(self, msg: str) -> None:
        """Nothing: the study has a display of its own."""
