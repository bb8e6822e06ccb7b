"""Ray Tune prints nothing of its own, and ends no trial that has tries left."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import pytest
import ray
from ray.tune.progress_reporter import TrialProgressCallback

from study.launch.tune_adapter import OwnerSearcher, Retries, SilentProgress


def end_without_result(callback: TrialProgressCallback) -> None:
    trial = Mock(last_result={})
    callback.on_trial_complete(1, [trial], trial)


def test_tune_prints_nothing_when_a_trial_ends_without_a_result(
    capsys: pytest.CaptureFixture[str],
) -> None:
    end_without_result(TrialProgressCallback())
    assert "completed. Last result:" in capsys.readouterr().out
    end_without_result(SilentProgress())
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("retries", [0, 1, 2])
def test_trial_fails_only_after_all_its_tries(
    retries: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "get", lambda answer: answer)
    owner, counted, max_failures = Mock(), Retries(), 2
    owner.suggest.remote.return_value = {"number": 7, "values": {}, "parent": None}
    searcher = OwnerSearcher(owner, tmp_path, max_failures, counted)
    searcher.suggest("tune_id")
    for _ in range(retries):
        counted.on_trial_recover(1, [], Mock(trial_id="tune_id"))
    searcher.on_trial_complete("tune_id", error=True)
    has_failed = retries == max_failures
    assert searcher.num_handed_back == (not has_failed)
    called = owner.fail if has_failed else owner.hand_back
    assert [call.args[0] for call in called.remote.call_args_list] == [7]
    assert (owner.fail.remote.called, owner.hand_back.remote.called) == (
        has_failed,
        not has_failed,
    )
