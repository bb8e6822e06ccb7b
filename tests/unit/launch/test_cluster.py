"""Number of trials that fit: shares of CPUs and GPUs, each worker on one node."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import ray

from study.config.compose import compose, with_values
from study.config.schema import TrialConfig
from study.errors import InputError
from study.launch.cluster import check_trial_fits, num_trials_that_fit

CONFIG = compose()


def trial(**settings: Any) -> TrialConfig:
    return dataclasses.replace(CONFIG.trial, **settings)


@pytest.mark.parametrize(
    ("settings", "nodes", "expected"),
    [
        ({"cpus": 1.0}, [{"CPU": 2.0}], 2),
        ({"cpus": 0.5}, [{"CPU": 2.0}], 4),
        ({"cpus": 0.1}, [{"CPU": 1.0}], 10),  # 1 // 0.1 is 9
        ({"cpus": 0.3}, [{"CPU": 1.0}], 3),
        ({"cpus": 1.0, "gpus": 0.5}, [{"CPU": 16.0, "GPU": 2.0}], 4),
        ({"cpus": 1.0, "gpus": 0.4}, [{"CPU": 16.0, "GPU": 3.0}], 6),  # not 7: two on each
        ({"cpus": 4.0, "gpus": 0.25}, [{"CPU": 10.0, "GPU": 1.0}], 2),  # its CPUs run out first
        ({"cpus": 3.0}, [{"CPU": 4.0}] * 3, 3),  # not 4: one on each node
        ({"cpus": 1.0, "gpus": 2.0}, [{"CPU": 8.0, "GPU": 3.0}, {"CPU": 8.0, "GPU": 2.0}], 2),
        ({"cpus": 1.0, "num_workers": 3}, [{"CPU": 4.0}, {"CPU": 4.0}], 2),
        ({"cpus": 1.0, "gpus": 1.0}, [{"CPU": 4.0}], 0),
    ],
)
def test_number_of_trials_that_fit(
    settings: dict[str, Any], nodes: list[dict[str, float]], expected: int
) -> None:
    assert num_trials_that_fit(nodes, trial(**settings)) == expected


def test_trial_that_fits_nowhere_is_refused() -> None:
    with pytest.raises(InputError, match=r"1 workers of 3 CPUs .* 4 CPUs and 0 GPUs on 2 nodes"):
        check_trial_fits([{"CPU": 2.0}, {"CPU": 2.0}], trial(cpus=3.0))


def test_more_than_one_gpu_must_be_a_whole_number() -> None:
    assert compose(["trial.gpus=0.5"]).trial.gpus == 0.5
    with pytest.raises(InputError, match=r"got trial\.gpus=1\.5; change to trial\.gpus=2"):
        compose(["trial.gpus=1.5"])


def test_concurrent_trials_are_limited_by_the_setting_and_by_the_cluster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from study.launch.cluster import num_concurrent_trials

    alive = {"Alive": True, "Resources": {"CPU": 2.0, "GPU": 1.0, "memory": 1e9}}
    monkeypatch.setattr(ray, "nodes", lambda: [alive, {**alive, "Alive": False}])
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    shared = {"trial.cpus": 0.5, "trial.gpus": 0.25}
    configs = [with_values(CONFIG, {**shared, "search.concurrent": n}) for n in (0, 3, 9)]
    rooms = [num_concurrent_trials(config.search, config.trial) for config in configs]
    assert rooms == [4, 3, 4]
