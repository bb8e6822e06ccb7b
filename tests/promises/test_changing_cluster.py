"""A cluster that grows and shrinks during a study: trials use new nodes and survive lost ones."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster
from study_command import INLINE, LIMIT_S, evidence, has_epoch, run, start, wait_until

from study.storage.tables import read_reports, read_trials

pytestmark = pytest.mark.slow

SETTINGS = (
    *INLINE,
    "confirm.trials=0",
    "search.trials=4",
    "trial.cpus=1",
    "search.concurrent=2",
    "search.sampler=random",
    "search.pruner=none",
)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A cluster of a head alone, which runs no trial."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    yield cluster
    cluster.shutdown()


def test_trials_run_on_added_nodes_and_survive_removed_ones(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("RAY_ADDRESS", cluster.address)
        driver = start(tmp_path, "changing", *SETTINGS)
    first = cluster.add_node(num_cpus=1)
    trials = tmp_path / "changing" / "trials"
    assert wait_until(lambda: has_epoch(trials / "0"), driver)
    assert not (trials / "1").exists()  # one trial takes the only node
    cluster.add_node(num_cpus=1)
    assert wait_until(lambda: has_epoch(trials / "1"), driver)
    cluster.remove_node(first, allow_graceful=False)
    output, _ = driver.communicate(timeout=LIMIT_S)
    assert driver.returncode == 0, output
    rows = read_reports(tmp_path / "changing").to_pylist()
    assert set(Counter((row["trial"], row["epoch"]) for row in rows).values()) == {1}
    states = [row["state"] for row in read_trials(tmp_path / "changing").to_pylist()]
    assert states == ["COMPLETE"] * 4

    run(tmp_path, "steady", *SETTINGS, f"trial.cpus={(os.cpu_count() or 1) / 2}")
    assert evidence(tmp_path / "changing") == evidence(tmp_path / "steady")
