"""Ray Tune prints nothing of its own."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
from ray.tune.progress_reporter import TrialProgressCallback

from study.launch.tune_adapter import SilentProgress


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
