"""Run trials under Ray Tune: a searcher that forwards to the study's owner, a silent reporter."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.progress_reporter import TrialProgressCallback
from ray.tune.search import Searcher

from study.display import Display, epochs_done, trials_line, trials_panel
from study.interrupts import raise_if_interrupted
from study.launch.context import StudyContext
from study.launch.jobs import HEAD_SHARE
from study.launch.ray_train import interruptible, release_placement_group
from study.launch.trials import inline_trial, job_name, train_trial
from study.storage.paths import ray_storage


class Retries(tune.Callback):
    """Counts how often Tune started each trial again."""

    def __init__(self) -> None:
        self.of: Counter[str] = Counter()

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.of[trial.trial_id] += 1


class OwnerSearcher(Searcher):
    """Tune's search algorithm: gets trials from the owner and reports lost ones to it."""

    def __init__(
        self, owner: Any, study_folder: Path, max_failures: int, retries: Retries
    ) -> None:
        super().__init__(metric="val_ap", mode="max")
        self.owner = owner
        self.study_folder = study_folder
        self.max_failures = max_failures
        self.retries = retries
        self.numbers: dict[str, int] = {}
        self.num_handed_back = 0

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        suggestion: dict[str, Any] | None = ray.get(self.owner.suggest.remote(trial_id))
        if suggestion is None:
            return str(Searcher.FINISHED)
        self.numbers[trial_id] = suggestion["number"]
        return suggestion

    def on_trial_complete(
        self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False
    ) -> None:
        if not error:
            return
        number = self.numbers[trial_id]
        release_placement_group(self.study_folder, job_name(number))
        if self.retries.of[trial_id] < self.max_failures:
            # The node or process of an earlier trial, which Tune was to reuse, died meanwhile.
            # Tune counts that death twice, and ends the trial although it has tries left.
            self.num_handed_back += 1
            ray.get(self.owner.hand_back.remote(number))
        else:
            reason = "its process died in every try, without an error message"
            ray.get(self.owner.fail.remote(number, reason))

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the study's own files are durable."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: the study's own files are durable."""


class SilentProgress(TrialProgressCallback):
    """Silences Tune's progress reporter, which prints even at verbose=0."""

    def _print(self, msg: str) -> None:
        pass


def run_trials(
    context: StudyContext, owner: Any, num_trials: int, concurrent: int, display: Display
) -> int:
    """Run trials under Ray Tune, ``concurrent`` at once, with the live table of trials.

    Returns:
        Number of trials that did not end because Tune handed them back; the next call resumes
        them.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed.
    """
    settings = context.config.trial
    before = {"epochs_before": epochs_done(ray.get(owner.status.remote()))}
    if context.resolved.launcher == "inline":
        resources = {"cpu": settings.cpus, "gpu": settings.gpus}
        trainable = tune.with_resources(partial(inline_trial, context=context), resources)
    else:
        resources = {"cpu": 0, **HEAD_SHARE}
        trainable = tune.with_resources(partial(train_trial, context=context), resources)
    retries = Retries()
    searcher = OwnerSearcher(owner, Path(context.folder), settings.max_failures, retries)
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            num_samples=num_trials,
            search_alg=searcher,
            max_concurrent_trials=concurrent,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=f"tune-{uuid.uuid4().hex[:12]}",
            storage_path=str(ray_storage(Path(context.folder))),
            verbose=0,
            callbacks=[SilentProgress(), retries],
            failure_config=tune.FailureConfig(max_failures=settings.max_failures),
        ),
    )
    watching = display.watching(
        lambda: ray.get(owner.status.remote()) | before,
        trials_panel,
        trials_line,
    )
    with interruptible(), watching:
        tuner.fit()
        raise_if_interrupted()
    return searcher.num_handed_back
