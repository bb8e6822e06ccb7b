"""What Tune sees of a study: a searcher that only asks the study's owner, and a silent display."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.progress_reporter import TrialProgressCallback
from ray.tune.search import Searcher

from study.display import Display, epochs_done, trials_line, trials_panel
from study.launch.context import StudyContext
from study.launch.ray_train import job_of_trial, release_placement_group
from study.launch.trials import inline_trial, train_trial
from study.storage.paths import ray_storage

WORKERS_WAIT = {"cpu": 0, "node:__internal_head__": 0.001}
"""What the process of a trial under Ray Train takes while it waits: not nothing, and no CPU."""


class OwnerSearcher(Searcher):
    """What Tune sees of the study: suggestions, and an ear for trials that Tune gave up on."""

    def __init__(self, owner: Any, study_folder: Path) -> None:
        super().__init__(metric="val_ap", mode="max")
        self.owner = owner
        self.study_folder = study_folder
        self.numbers: dict[str, int] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        suggestion: dict[str, Any] | None = ray.get(self.owner.suggest.remote(trial_id))
        if suggestion is None:
            return str(Searcher.FINISHED)
        self.numbers[trial_id] = suggestion["number"]
        return suggestion

    def on_trial_complete(
        self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False
    ) -> None:
        if error:
            number = self.numbers[trial_id]
            release_placement_group(self.study_folder, job_of_trial(number))
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


def run_trials(
    plan: StudyContext, owner: Any, missing: int, concurrent: int, display: Display
) -> None:
    """Run missing trials under Ray Tune, with the live table of trials."""
    config = plan.config
    before = {"epochs_before": epochs_done(ray.get(owner.status.remote()))}
    if plan.resolved.launcher == "inline":
        resources = {"cpu": config.trial.cpus, "gpu": config.trial.gpus}
        trainable = tune.with_resources(partial(inline_trial, plan=plan), resources)
    else:
        trainable = tune.with_resources(partial(train_trial, plan=plan), WORKERS_WAIT)
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            num_samples=missing,
            search_alg=OwnerSearcher(owner, Path(plan.folder)),
            max_concurrent_trials=concurrent,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=f"tune-{uuid.uuid4().hex[:12]}",
            storage_path=str(ray_storage(Path(plan.folder))),
            verbose=0,
            callbacks=[SilentProgress()],
            failure_config=tune.FailureConfig(max_failures=config.trial.max_failures),
        ),
    )
    with display.watching(
        lambda: ray.get(owner.status.remote()) | before,
        trials_panel,
        trials_line,
    ):
        tuner.fit()
