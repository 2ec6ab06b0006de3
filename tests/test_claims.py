"""Claims on a shared state: live processes keep theirs on any machine; those of dead processes are
taken over.
"""

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pyarrow import fs
from torch import nn

from raysweep import leases, storage
from raysweep.leases import BucketLease, FileLease, LeaseHeartbeat, make_lease
from raysweep.training import checkpoint
from raysweep.training.config import build_training_config
from raysweep.training.prefix_cache import PrefixCache

HERE = socket.gethostname()
# Above the largest process number of Linux.
NOBODY = 2**22 + 1
ME = os.getpid()


def write_claim(path: Path, owner: str, age: float) -> Path:
    """Write a claim's file whose owner last gave a sign of life `age` seconds ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(owner)
    then = time.time() - age
    os.utime(path, (then, then))
    return path


@pytest.mark.parametrize(
    ("owner", "age", "taken"),
    [
        ("elsewhere 123", 0, False),
        ("elsewhere 123", 10, False),
        ("elsewhere 123", 40, True),
        ("elsewhere 123", -3600, False),
        ("elsewhere NOBODY", 0, False),
        ("elsewhere ME", 40, True),
        ("HERE ME", 0, False),
        ("HERE ME", 40, True),
        ("HERE PARENT", 10, False),
        ("HERE NOBODY", 0, True),
        ("HERE 1", 0, False),
        ("", 0, False),
        ("", 40, True),
        ("HERE", 0, False),
    ],
)
def test_only_the_claim_of_a_dead_process_is_taken_over(
    owner: str, age: float, taken: bool, tmp_path: Path
) -> None:
    """A process is dead if this machine no longer has it, or if its heartbeat is older than half a
    minute.
    """
    words = {"HERE": HERE, "ME": ME, "PARENT": os.getppid(), "NOBODY": NOBODY}
    owner = " ".join(str(words.get(word, word)) for word in owner.split())
    file = write_claim(tmp_path / "key.claim", owner, age)
    assert FileLease(file).try_acquire() is taken
    assert file.read_text() == (f"{HERE} {ME}" if taken else owner)
    assert time.time() - file.stat().st_mtime == pytest.approx(0 if taken else age, abs=15)


def test_a_process_of_another_user_counts_as_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(process: int, number: int) -> None:
        assert (process, number) == (NOBODY, 0)
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    assert not FileLease(write_claim(tmp_path / "key.claim", f"{HERE} {NOBODY}", 0)).try_acquire()


def test_a_claim_that_cannot_be_read_is_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / "key.claim").mkdir()
    assert not FileLease(tmp_path / "key.claim").try_acquire()
    assert (tmp_path / "key.claim").is_dir()


def test_one_holder_keeps_a_claim_until_it_is_released(tmp_path: Path) -> None:
    first, second = make_lease(tmp_path, "key"), make_lease(tmp_path, "key")
    assert first.try_acquire() and not second.try_acquire() and not first.try_acquire()
    assert make_lease(tmp_path, "other").try_acquire(), "another state is another claim"
    assert (tmp_path / "key.claim").read_text() == f"{HERE} {ME}"
    first.release()
    assert not (tmp_path / "key.claim").exists()
    first.release()
    assert second.try_acquire()


def test_a_heartbeat_is_a_sign_of_life(tmp_path: Path) -> None:
    file = write_claim(tmp_path / "key.claim", "elsewhere 123", 3600)
    FileLease(file).renew()
    assert file.read_text() == "elsewhere 123"
    assert not FileLease(file).try_acquire()


def test_heartbeats_end_with_their_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "_RENEWAL_INTERVAL", 0.001)
    held, file = make_lease(tmp_path, "key"), tmp_path / "key.claim"
    assert held.try_acquire()
    give_up = time.monotonic() + 60
    with pytest.raises(ZeroDivisionError), LeaseHeartbeat(held):
        for _ in range(2):
            write_claim(file, f"{HERE} {ME}", 3600)
            while time.time() - file.stat().st_mtime > 1800:
                assert time.monotonic() < give_up
                os.sched_yield()
        raise ZeroDivisionError
    assert not file.exists()


class TestTraining:
    @pytest.fixture
    def prefixes(self, tmp_path: Path) -> PrefixCache:
        """A store with one state, `there`."""
        model = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        path = tmp_path / "run" / "epoch-0001"
        saved = checkpoint.save_checkpoint(
            path, build_training_config("standard"), model, optimizer, [{"epoch": 1.0}], "data"
        )
        store = PrefixCache(tmp_path / "prefixes")
        store.store_state("there", saved.path)
        return store

    def test_a_state_that_exists_is_not_trained(self, prefixes: PrefixCache) -> None:
        with prefixes.acquire_training_lease("there") as ours:
            assert not ours
        with prefixes.acquire_training_lease("missing") as ours:
            assert ours and (prefixes.path / "missing.claim").exists()
        assert [path.name for path in prefixes.path.iterdir()] == ["there"]

    def test_the_claim_of_another_process_is_not_touched_if_the_state_exists(
        self, prefixes: PrefixCache
    ) -> None:
        file = write_claim(prefixes.path / "there.claim", "elsewhere 123", 0)
        with prefixes.acquire_training_lease("there") as ours:
            assert not ours
        assert file.read_text() == "elsewhere 123"

    def test_a_claim_is_released_also_after_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(ZeroDivisionError), PrefixCache(tmp_path).acquire_training_lease("key"):
            raise ZeroDivisionError
        assert not list(tmp_path.iterdir())


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of claims in a bucket that is a folder of this machine; its local copy is another
    folder.
    """
    remote = tmp_path / "remote"
    monkeypatch.setenv("RAYSWEEP_CACHE", str(tmp_path / "copies"))
    files = fs.SubTreeFileSystem(str(remote), fs.LocalFileSystem(use_mmap=False))
    monkeypatch.setattr(storage, "_open_file_system", lambda store, bucket: (files, bucket))
    claims = remote / "b" / "sweep" / ".claims" / "key"
    claims.mkdir(parents=True)
    return claims


def claim_in_bucket() -> BucketLease:
    held = make_lease(storage.local_path("gs://b/sweep"), "key")
    assert isinstance(held, BucketLease)
    return held


class TestBucket:
    def test_the_first_holds_it_until_it_is_released(self, bucket: Path) -> None:
        first, second = claim_in_bucket(), claim_in_bucket()
        assert first.try_acquire() and first.try_acquire()
        (file,) = bucket.iterdir()
        assert file.name.split()[1:] == [HERE, str(ME)]
        assert not second.try_acquire() and list(bucket.iterdir()) == [file]
        first.release()
        assert not list(bucket.iterdir())
        assert second.try_acquire()

    @pytest.mark.parametrize("began", ["1.000000", "9999999999.000000"])
    def test_a_live_owner_on_another_machine_keeps_it(self, began: str, bucket: Path) -> None:
        (bucket / f"{began} elsewhere {NOBODY}").touch()
        held = claim_in_bucket()
        assert not held.try_acquire() and not held.try_acquire()
        assert [file.name for file in bucket.iterdir()] == [f"{began} elsewhere {NOBODY}"]

    def test_dead_processes_of_this_machine_lose_it(self, bucket: Path) -> None:
        (bucket / f"1.000000 {HERE} {NOBODY}").touch()
        assert claim_in_bucket().try_acquire()
        (file,) = bucket.iterdir()
        assert file.name.endswith(f"{HERE} {ME}")

    def test_a_claim_without_new_heartbeats_is_taken_over(
        self, bucket: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Measured on this machine's clock, from when it first saw the last heartbeat."""
        clock = [1000.0]
        monkeypatch.setattr(leases.time, "monotonic", lambda: clock[0])
        other = write_claim(bucket / "1.000000 elsewhere 77", "", 10_000)
        held = claim_in_bucket()
        assert not held.try_acquire() and held.live_holder() == "", (
            "a single heartbeat may be from a process that has died"
        )
        clock[0] += 25
        write_claim(other, "", 9_000)
        assert not held.try_acquire() and held.live_holder() == "process 77 on elsewhere"
        clock[0] += 25
        assert not held.try_acquire(), "25 seconds after its last heartbeat"
        clock[0] += 10
        assert held.try_acquire()
        assert not other.exists()

    @pytest.mark.parametrize(
        ("other", "withdraws", "mine"),
        [
            ("1.000000 elsewhere 77", False, False),
            ("9999999999.0 elsewhere 77", True, True),
            ("9999999999.0 elsewhere 77", False, False),
        ],
        ids=["earlier", "later, and withdraws", "later, but it had looked before this one came"],
    )
    def test_of_two_at_once_one_holds_it(
        self, other: str, withdraws: bool, mine: bool, bucket: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        held, slept = claim_in_bucket(), []
        beat = held.renew

        def beat_and_end() -> None:
            (bucket / other).touch()
            beat()

        def sleep(seconds: float) -> None:
            slept.append(seconds)
            if withdraws and len(slept) == 3:
                (bucket / other).unlink()

        held.renew = beat_and_end  # type: ignore[method-assign]
        monkeypatch.setattr(leases.time, "sleep", sleep)
        assert held.try_acquire() is mine
        names = [file.name for file in bucket.iterdir()]
        assert (names == [other]) != mine and len(names) == 1
        assert sum(slept) < 2
