"""A trial that raises and one with a NaN loss fail with their reasons; the study continues."""

from __future__ import annotations

from pathlib import Path

import pytest
from study_command import LAUNCHERS, LIMIT_S, TRAIN, has_epoch, kill_actor, run, start, wait_until

from study.storage.tables import read_final, read_trials

pytestmark = pytest.mark.slow

SPACE = """
question: Does a trial that fails end alone?
parameters:
  student.init: {{choices: [random, {broken}], role: nuisance}}
  distill.optimizer.lr: {{choices: [0.001, 1.0e+30], role: nuisance}}
"""
SEED = 5
"""With this seed the first trial after the controls gets NaN, the second broken weights."""


@pytest.mark.parametrize("launcher", list(LAUNCHERS))
def test_trial_that_raises_and_trial_with_nan_fail_alone(launcher: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"these are no weights")
    space = tmp_path / "fails.yaml"
    space.write_text(SPACE.format(broken=broken))
    run(
        tmp_path,
        launcher,
        *LAUNCHERS[launcher],
        f"search_space={space}",
        "search.trials=4",
        "search.sampler=random",
        f"seed={SEED}",
        "distill.optimizer.lr=0.001",
        "distill.epochs=1",
        "refine.epochs=1",
        "confirm.trials=0",
        "trial.max_failures=1",
    )
    trials = read_trials(tmp_path / launcher).to_pylist()
    assert [trial["state"] for trial in trials] == ["COMPLETE", "COMPLETE", "FAIL", "FAIL"]
    assert "the loss must be finite, got " in trials[2]["error"]
    assert trials[3]["error"].startswith("InputError: ") and str(broken) in trials[3]["error"]
    assert read_final(tmp_path / launcher).num_rows


def test_trial_that_tune_gives_up_on_holds_no_resources(tmp_path: Path) -> None:
    """It takes the whole machine: the next would wait forever if any of it stayed held."""
    driver = start(tmp_path, "train", *TRAIN, "trial.max_failures=0", "search.trials=2")
    assert wait_until(lambda: has_epoch(tmp_path / "train/trials/0"), driver)
    kill_actor(driver, "ImplicitFunc")
    output, _ = driver.communicate(timeout=LIMIT_S)
    assert driver.returncode == 0, output
    killed, after = read_trials(tmp_path / "train").to_pylist()
    assert killed["state"] == "FAIL" and "died in every try" in killed["error"]
    assert after["state"] == "COMPLETE"
