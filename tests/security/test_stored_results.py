"""A user's own results of attacks are believed again, everywhere; those of others are said."""

import logging
import multiprocessing
import pickle
import stat
from pathlib import Path

import numpy as np
import pytest
from forged_shards import CASCADE, N_BROKEN, as_another_user, evaluate_in
from ladder_network import LadderNetwork, ladder_images
from test_two_users import ATTACKER, VICTIM, act_as, machine, needs_root

from raysweep.evaluation import Shard, ShardRunner
from raysweep.evaluation.result_signatures import (
    KEY_FILE,
    _load_user_key,
    derive_evaluation_key,
    sign_arrays,
)

__all__ = ["machine"]


def refuse_attacks(run_shard, shards):
    assert all(shard.attack is None for shard in shards), "attacked again"
    return [run_shard(shard) for shard in shards]


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of the user's key, which is new."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    _load_user_key.cache_clear()
    yield tmp_path / "state/raysweep"
    _load_user_key.cache_clear()


def test_own_results_are_believed_in_a_later_process(state: Path, tmp_path: Path) -> None:
    first = evaluate_in(tmp_path / "a")
    _load_user_key.cache_clear()
    again = evaluate_in(tmp_path / "a", map=refuse_attacks)
    assert again.broken_by.tolist() == first.broken_by.tolist()
    assert stat.S_IMODE((state / KEY_FILE).stat().st_mode) == 0o600
    assert stat.S_IMODE(state.stat().st_mode) == 0o700


def test_results_of_nodes_without_the_users_key_are_believed(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node gets the runner as a pickle, and has a home folder of its own."""

    def run_elsewhere(run_shard, shards):
        sent = pickle.dumps(run_shard)
        assert (state / KEY_FILE).read_bytes() not in sent, "nodes need the evaluation's key only"
        with as_another_user():
            return [pickle.loads(sent)(shard) for shard in shards]

    evaluate_in(tmp_path / "a", map=run_elsewhere)
    evaluate_in(tmp_path / "a", map=refuse_attacks)


def test_foreign_results_are_said_and_their_adversarial_examples_used(
    state: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with as_another_user():
        first = evaluate_in(tmp_path)
    attacked: list[int] = []

    def record(run_shard, shards):
        for shard in shards:
            attacked.extend(shard.positions.tolist() if shard.attack else [])
        return [run_shard(shard) for shard in shards]

    with caplog.at_level(logging.WARNING, "raysweep"):
        again = evaluate_in(tmp_path, map=record)
    assert again.broken_by.tolist() == first.broken_by.tolist()
    assert sorted(attacked) == np.flatnonzero(first.robust).tolist()
    (line,) = [record.getMessage() for record in caplog.records]
    assert f"{N_BROKEN} adversarial examples are verified" in line
    assert "the other 3 examples are attacked again" in line
    caplog.clear()
    evaluate_in(tmp_path, map=refuse_attacks)
    assert not caplog.records, "they are stored as one's own now"


def test_a_key_that_others_could_read_is_replaced(
    state: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    evaluate_in(tmp_path / "a")
    before = (state / KEY_FILE).read_bytes()
    (state / KEY_FILE).chmod(0o644)
    _load_user_key.cache_clear()
    with pytest.raises(AssertionError, match="attacked again"):
        evaluate_in(tmp_path / "a", map=refuse_attacks)
    assert (state / KEY_FILE).read_bytes() != before
    assert "is replaced by a new key" in caplog.text


@pytest.mark.parametrize("place", ["file", "folder"])
def test_without_a_place_for_the_key_an_evaluation_goes_on(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "state").touch()
    if place == "folder":
        monkeypatch.delenv("XDG_STATE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", lambda: tmp_path / "state")
    else:
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    _load_user_key.cache_clear()
    evaluate_in(tmp_path / "a")
    evaluate_in(tmp_path / "a", map=refuse_attacks)
    assert caplog.text.count("are signed for this process only") == 1
    _load_user_key.cache_clear()


@needs_root
def test_nobody_else_reads_or_replaces_the_key(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    _load_user_key.cache_clear()
    key = act_as(VICTIM, lambda: derive_evaluation_key("e"))
    assert key == act_as(VICTIM, lambda: derive_evaluation_key("e"))
    file = machine / "home/.local/state/raysweep" / KEY_FILE
    assert file.stat().st_uid == VICTIM
    for action in (file.read_bytes, file.unlink, lambda: file.rename(machine / "mine")):
        assert isinstance(act_as(ATTACKER, action), PermissionError)


def test_processes_that_start_at_once_agree_on_a_key(state: Path) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [
        context.Process(target=lambda: queue.put(derive_evaluation_key("e"))) for _ in range(8)
    ]
    for process in processes:
        process.start()
    assert len({queue.get() for _ in processes}) == 1
    for process in processes:
        process.join()
    assert [path.name for path in state.iterdir()] == [KEY_FILE]


def test_signatures_depend_on_everything_that_a_file_says() -> None:
    arrays = {"a": np.arange(4), "b": np.zeros((2, 2), np.float32)}
    others = [
        {"a": np.arange(4), "c": arrays["b"]},
        {"a": np.arange(4).reshape(2, 2), "b": arrays["b"]},
        {"a": np.arange(4, dtype=np.uint64), "b": arrays["b"]},
        {"a": np.arange(4)[::-1], "b": arrays["b"]},
        {"a": np.arange(4)},
    ]
    signed = sign_arrays(b"key", "file", arrays)
    assert sign_arrays(b"key", "file", dict(reversed(arrays.items()))) == signed
    signatures = [sign_arrays(b"key", "file", other) for other in others]
    signatures += [sign_arrays(b"key2", "file", arrays), sign_arrays(b"key", "fil", arrays)]
    assert len({signed, *signatures}) == 1 + len(signatures)


def test_a_runner_that_stores_nothing_needs_no_key(state: Path) -> None:
    x, y = ladder_images([0.1], [1])
    runner = ShardRunner(LadderNetwork(), x.numpy(), y.numpy(), np.arange(1))
    (attack,) = CASCADE.attacks.values()
    pickle.loads(pickle.dumps(runner))(Shard("a", attack, np.arange(1)))
    assert not state.exists()
