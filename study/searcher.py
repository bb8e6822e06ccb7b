"""What Tune sees of a study: a searcher that only asks the study's owner, and a silent display."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray
from ray.tune.progress_reporter import TrialProgressCallback
from ray.tune.search import Searcher


class OwnerSearcher(Searcher):
    """What Tune sees of the study: suggestions, and an ear for trials that Tune gave up on."""

    def __init__(self, owner: Any) -> None:
        super().__init__(metric="val_ap", mode="max")
        self.owner = owner
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
            reason = "its process died again and again, without a word"
            ray.get(self.owner.fail.remote(self.numbers[trial_id], reason))

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study itself is durable."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the study itself is durable."""


class SilentProgress(TrialProgressCallback):
    """Takes the place of Tune's own, which tells at any verbosity of trials without a result."""

    def _print(self, msg: str) -> None:
        """Nothing: the study has a display of its own."""
