"""The owner of the Optuna study, without Ray: its answers and the files it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from search_spaces.space import load_space
from study.config.compose import compose
from study.config.derived import resolve
from study.config.schema import StudyConfig
from study.search.owner import BASELINE, DEFAULTS, StudyOwner
from study.storage.checkpoint import Checkpoints, Row
from study.storage.paths import trial_folder
from study.storage.tables import read_reports, read_trials

EPOCHS = 3


@pytest.fixture
def config(tmp_path: Path) -> StudyConfig:
    return compose(
        [
            f"storage={tmp_path}",
            "name=study",
            "search_space=joint",
            "distill.epochs=2",
            "refine.epochs=1",
            "search.min_epochs=1",
            "search.startup_trials=3",
        ]
    )


def start(config: StudyConfig, session: str) -> StudyOwner:
    folder = Path(config.storage) / "study"
    folder.mkdir(exist_ok=True)
    space = load_space(config.search_space).to_json()
    return StudyOwner(str(folder), config, resolve(config), space, session)


def row_of(epoch: int, ap: float) -> Row:
    return {
        "stage": "distill" if epoch < EPOCHS else "refine",
        "epoch": epoch,
        "step": epoch,
        "seconds": 1.5 * epoch,
        "val_ap": ap,
    }


def train(owner: StudyOwner, number: int, aps: list[float], first: int = 1) -> list[bool]:
    """Save and report epochs as a trial does, until an answer says stop; return the answers."""
    checkpoints = Checkpoints(trial_folder(owner.folder, number))
    last = checkpoints.last()
    rows: list[Row] = list(last.rows) if last else []
    answers = []
    for epoch, ap in enumerate(aps, first):
        rows.append(row_of(epoch, ap))
        checkpoints.save({"w": torch.zeros(1)}, {}, rows)
        answers.append(owner.report(number, rows[-1]))
        if answers[-1]:
            break
    return answers


def trial_rows(owner: StudyOwner) -> dict[int, dict[str, Any]]:
    return {row["trial"]: row for row in read_trials(owner.folder).to_pylist()}


def test_first_two_trials_are_the_controls(config: StudyConfig) -> None:
    owner = start(config, "a")
    baseline, defaults = owner.suggest("t0"), owner.suggest("t1")
    assert baseline["values"]["distill.heatmap.kind"] == "none"
    assert baseline["values"]["distill.structure.kind"] == "none"
    assert baseline["values"]["distill.epochs"] == EPOCHS
    assert baseline["values"]["refine.epochs"] == 0
    assert defaults["values"]["distill.heatmap.kind"] == config.distill.heatmap.kind
    assert defaults["values"]["refine.depth"] == config.refine.depth


def test_restart_keeps_both_controls(config: StudyConfig) -> None:
    owner = start(config, "a")
    controls = [trial.user_attrs["control"] for trial in owner.stages[0].trials()]
    start(config, "b")
    assert [t.user_attrs["control"] for t in start(config, "c").stages[0].trials()] == controls
    assert controls == [BASELINE, DEFAULTS]


def test_repeated_request_gets_the_same_trial(config: StudyConfig) -> None:
    owner = start(config, "a")
    assert owner.suggest("t0") == owner.suggest("t0")
    assert owner.suggest("t1")["number"] == 1


def test_trial_completes_at_its_budget_with_its_best_epoch(config: StudyConfig) -> None:
    owner = start(config, "a")
    number = owner.suggest("t0")["number"]
    assert train(owner, number, [0.1, 0.4, 0.3]) == [False, False, True]
    row = trial_rows(owner)[number]
    assert (row["state"], row["objective"], row["best_epoch"]) == ("COMPLETE", 0.4, 2)
    assert row["checkpoint"] == "trials/0/epoch-002"
    assert (owner.folder / row["checkpoint"] / "model.safetensors").is_file()
    assert owner.stages[0].frozen(number).value == 0.4


def test_repeated_report_of_an_epoch_is_ignored(config: StudyConfig) -> None:
    owner = start(config, "a")
    number = owner.suggest("t0")["number"]
    train(owner, number, [0.1])
    assert not owner.report(number, row_of(1, 0.9))
    assert owner.stages[0].frozen(number).intermediate_values == {1: 0.1}


def test_report_of_a_finished_trial_is_answered_with_stop(config: StudyConfig) -> None:
    owner = start(config, "a")
    number = owner.suggest("t0")["number"]
    train(owner, number, [0.1, 0.2, 0.3])
    assert owner.report(number, row_of(3, 0.3))
    assert len(read_reports(owner.folder)) == EPOCHS


def test_bad_trial_is_pruned_but_controls_are_not(config: StudyConfig) -> None:
    owner = start(config, "a")
    assert train(owner, owner.suggest("t0")["number"], [0.5, 0.6, 0.7]) == [False, False, True]
    assert train(owner, owner.suggest("t1")["number"], [0.0, 0.0, 0.0]) == [False, False, True]
    for index in range(2, 5):
        number = owner.suggest(f"t{index}")["number"]
        answers = train(owner, number, [0.3 - 0.1 * index, 0.0, 0.0])
    row = trial_rows(owner)[number]
    assert answers == [True]
    assert (row["state"], row["epochs"]) == ("PRUNED", 1)
    assert row["objective"] == pytest.approx(-0.1)


def test_failed_trial_has_a_row_with_its_error(config: StudyConfig) -> None:
    owner = start(config, "a")
    number = owner.suggest("t0")["number"]
    owner.record_error(number, "RuntimeError: boom")
    owner.fail(number, "gave up")
    owner.fail(number, "gave up again")
    row = trial_rows(owner)[number]
    assert (row["state"], row["error"], row["objective"]) == ("FAIL", "RuntimeError: boom", None)


def test_halted_study_suggests_and_fails_no_trial_until_it_is_resumed(
    config: StudyConfig,
) -> None:
    owner = start(config, "a")
    suggestion = owner.suggest("t0")
    assert owner.halt_reason() is None
    owner.halt("the disk is full")
    owner.halt("the disk is still full")
    assert owner.halt_reason() == "the disk is full"
    owner.fail(suggestion["number"], "it could not be saved")
    assert owner.suggest("t1") is None
    again = start(config, "b")
    assert (again.halt_reason(), again.num_finished()) == (None, 0)
    assert again.suggest("t0") == suggestion


def test_orphaned_trial_is_resumed_with_its_number_and_values(config: StudyConfig) -> None:
    owner = start(config, "a")
    for index in range(3):
        suggestion = owner.suggest(f"t{index}")
        train(owner, suggestion["number"], [0.1] if index == 2 else [0.1, 0.2, 0.3])
    again = start(config, "b")
    assert again.num_finished() == 2
    assert again.suggest("t0") == suggestion
    assert again.suggest("t1")["number"] == 3
    assert train(again, suggestion["number"], [0.2, 0.3], first=2)[-1]
    assert trial_rows(again)[2]["epochs"] == EPOCHS


def test_restarted_owner_leaves_running_trials_of_its_session_alone(config: StudyConfig) -> None:
    owner = start(config, "a")
    owner.suggest("t0")
    assert start(config, "a").orphaned == []
    assert start(config, "b").orphaned == [0]


def test_trial_that_is_handed_back_is_suggested_next_even_by_a_restarted_owner(
    config: StudyConfig,
) -> None:
    owner = start(config, "a")
    lost, other = owner.suggest("t0"), owner.suggest("t1")
    for _ in range(2):  # as after a lost answer
        owner.hand_back(lost["number"])
    restarted = start(config, "a")
    for each in (owner, restarted):
        assert each.suggest("t2") == lost
    assert owner.suggest("t3")["number"] == other["number"] + 1


def test_trial_that_has_ended_is_not_suggested_again(config: StudyConfig) -> None:
    owner = start(config, "a")
    number = owner.suggest("t0")["number"]
    train(owner, number, [0.1, 0.2, 0.3])
    owner.hand_back(number)
    assert owner.suggest("t1")["number"] == number + 1


def test_kill_before_the_requester_is_stored_loses_no_trial(config: StudyConfig) -> None:
    owner = start(config, "a")
    owner.stages[0].new_trial()
    again = start(config, "a")
    assert again.orphaned == [0]
    assert again.suggest("t0")["number"] == 0


def test_trial_that_ended_but_was_not_written_is_written_at_the_next_start(
    config: StudyConfig,
) -> None:
    owner = start(config, "a")
    number = owner.suggest("t0")["number"]
    train(owner, number, [0.1, 0.2, 0.3])
    for part in (owner.folder / "results").rglob("*.parquet"):
        part.unlink()
    again = start(config, "b")
    assert trial_rows(again)[number]["objective"] == 0.3
    assert len(read_reports(again.folder)) == EPOCHS


def test_restarts_do_not_change_suggestions(config: StudyConfig) -> None:
    """A single owner and one owner per trial suggest the same, also once TPE has a model."""
    aps = [[0.1 * (1 + (3 * n) % 5), 0.2, 0.3] for n in range(8)]
    whole = start(config, "a")
    suggestions = []
    for number, curve in enumerate(aps):
        suggestions.append(whole.suggest(f"t{number}"))
        train(whole, number, curve)
    broken = compose([f"storage={config.storage}/again", *_same(config)])
    Path(broken.storage).mkdir()
    for number, curve in enumerate(aps):
        owner = start(broken, f"session {number}")
        assert owner.suggest("t") == suggestions[number]
        train(owner, number, curve)
    drawn = {suggestion["values"]["distill.optimizer.lr"] for suggestion in suggestions[2:]}
    assert len(drawn) == len(aps) - 2


def _same(config: StudyConfig) -> list[str]:
    return [
        "name=study",
        "distill.epochs=2",
        "refine.epochs=1",
        "search.min_epochs=1",
        "search.startup_trials=3",
    ]


def test_weight_is_not_searched_if_its_kind_is_none(config: StudyConfig) -> None:
    owner = start(config, "a")
    for index in range(12):
        values = owner.suggest(f"t{index}")["values"]
        for term in ("heatmap", "structure"):
            is_searched = f"distill.{term}.weight" in values
            assert is_searched == (values[f"distill.{term}.kind"] != "none")


def test_status_has_states_running_trials_best_baseline_and_stages(config: StudyConfig) -> None:
    owner = start(config, "a")
    train(owner, owner.suggest("t0")["number"], [0.1, 0.2, 0.3])
    train(owner, owner.suggest("t1")["number"], [0.4])
    status = owner.status()
    assert status["states"] == {"COMPLETE": 1, "PRUNED": 0, "FAIL": 0}
    assert status["running"] == [{"trial": 1, "epoch": 1, "budget": EPOCHS, "ap": 0.4}]
    assert status["best"] == {"trial": 0, "ap": 0.3}
    assert status["baseline"] == 0.3
    (stage,) = status["stages"]
    assert (stage["trials"], stage["epochs"]) == (config.search.trials, 4)
    # The second control has 2 epochs left; half of the other trials pass each of rungs 1 and 2.
    assert stage["left"] == 2 + (config.search.trials - 2) * (1 + 1 / 2 + 1 / 4)


def test_updates_are_of_started_trials_except_the_given_ones(config: StudyConfig) -> None:
    owner = start(config, "a")
    train(owner, owner.suggest("t0")["number"], [0.1, 0.2, 0.3])
    train(owner, owner.suggest("t1")["number"], [0.4])
    updates = {trial["trial"]: (trial, rows) for trial, rows in owner.updates_since(set())}
    assert {n: (trial["state"], len(rows)) for n, (trial, rows) in updates.items()} == {
        0: ("COMPLETE", 3),
        1: ("RUNNING", 1),
    }
    assert updates[0][0]["control"] == BASELINE
    assert [trial["trial"] for trial, _ in owner.updates_since({0})] == [1]


def test_trial_whose_checkpoint_is_deleted_meanwhile_is_in_the_next_updates(
    config: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = start(config, "a")
    train(owner, owner.suggest("t0")["number"], [0.1])

    def gone(self: Checkpoints) -> None:
        raise FileNotFoundError("epoch-001/state.json")

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "last", gone)
        assert owner.updates_since(set()) == []
    assert len(owner.updates_since(set())) == 1
