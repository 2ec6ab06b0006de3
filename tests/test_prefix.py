"""Shared prefixes: named by what decides them, bit-identical to training from scratch, never
trained twice.
"""

import json
import os
import shutil
import threading
import time
from pathlib import Path

import forked_processes
import pytest
import torch
from conftest import tiny
from safetensors.torch import load_file

from raysweep.data import load_data
from raysweep.leases import FolderLease
from raysweep.stores import folder_store
from raysweep.training import checkpoint
from raysweep.training.callbacks import FunctionCallback
from raysweep.training.config import TrainingConfig
from raysweep.training.prefix_cache import PrefixCache, prefix_keys
from raysweep.training.trainer import train_model

LAM, BURN_IN = "method__terms__pgd__weight__lam", "method__terms__pgd__weight__burn_in"


def keys(method: str, **changes) -> list[str]:
    return prefix_keys(tiny(method, **changes), "data")


def count_shared_epochs(one: list[str], two: list[str]) -> int:
    """Epochs after which both have the same state."""
    return sum(a == b for a, b in zip(one, two, strict=False)) - 1


def test_the_chain_parts_where_the_effective_settings_part() -> None:
    base = {"epochs": 6, BURN_IN: 4}
    assert (
        count_shared_epochs(
            keys("gairat", **base, **{LAM: -1.0}), keys("gairat", **base, **{LAM: 2.0})
        )
        == 4
    )
    assert (
        count_shared_epochs(
            keys("gairat", epochs=6, **{BURN_IN: 4}), keys("gairat", epochs=6, **{BURN_IN: 2})
        )
        == 2
    )
    assert count_shared_epochs(keys("at", epochs=6), keys("gairat", **base)) == 4, (
        "a burn-in is adversarial training"
    )
    assert count_shared_epochs(keys("at", epochs=6), keys("at", epochs=3)) == 3
    assert count_shared_epochs(keys("at", seed=0), keys("at", seed=1)) == 0
    taus = [{"kind": "piecewise", "boundaries": [2, 4], "values": [0, t, 6]} for t in (3, 4)]
    fat = [keys("fat", epochs=6, method__attacks__pgd__tau=tau) for tau in taus]
    assert count_shared_epochs(*fat) == 2
    assert count_shared_epochs(keys("at", batch_size=32), keys("at", batch_size=16)) == 0
    lr = [{"kind": "piecewise", "boundaries": [3], "values": [0.1, v]} for v in (0.01, 0.02)]
    assert (
        count_shared_epochs(
            keys("at", epochs=6, optim__lr=lr[0]), keys("at", epochs=6, optim__lr=lr[1])
        )
        == 3
    )


def test_what_does_not_decide_the_weights_does_not_part_the_chain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert keys("at") == keys("at", data__name="digits", data__data_dir="/elsewhere")
    assert prefix_keys(tiny("at"), "data") != prefix_keys(tiny("at"), "other data")
    assert prefix_keys(tiny("at"), "data") != prefix_keys(tiny("at"), "data", n_workers=2)
    before = keys("at")
    monkeypatch.setattr(
        checkpoint, "describe_environment", lambda: {"raysweep": "0", "torch": "2", "device": "cpu"}
    )
    assert not set(before) & set(keys("at")), "another version may train otherwise"


CASES = {
    "gairat burn-in": [("gairat", {"epochs": 3, BURN_IN: 2, LAM: lam}) for lam in (-1.0, 1.0)],
    "at then gairat": [("at", {"epochs": 3}), ("gairat", {"epochs": 3, BURN_IN: 2, LAM: 0.0})],
    "fat tau": [
        (
            "fat",
            {
                "epochs": 3,
                "method__attacks__pgd__tau": {
                    "kind": "piecewise",
                    "boundaries": [2],
                    "values": [0, t],
                },
            },
        )
        for t in (1, 2)
    ],
    "more epochs": [("at", {"epochs": 2}), ("at", {"epochs": 3})],
}


@pytest.mark.parametrize("case", CASES)
def test_a_shared_prefix_gives_the_same_weights_bit_for_bit(case, tmp_path) -> None:
    prefixes = PrefixCache(tmp_path / "prefixes")
    for number, (method, changes) in enumerate(CASES[case]):
        config = tiny(method, **changes)
        rows = []
        with_store = train_model(
            config,
            tmp_path / f"shared{number}",
            FunctionCallback(lambda m, c, rows=rows: rows.append(m)),
            prefix_cache=prefixes,
        )
        alone = train_model(config, tmp_path / f"alone{number}")
        one, two = (
            load_file(f.last_checkpoint.local_folder / "weights.safetensors")
            for f in (with_store, alone)
        )
        assert all(torch.equal(one[name], two[name]) for name in one)
        assert [row["epoch"] for row in rows] == list(range(1, config.epochs + 1))
        assert [row["robust_worst"] for row in rows] == [
            row["robust_worst"] for row in alone.last_checkpoint.history
        ]
        assert with_store.best_checkpoint.epoch == alone.best_checkpoint.epoch
        trained = [row for row in rows if not row.get("shared")]
        assert len(trained) == config.epochs if number == 0 else len(trained) == config.epochs - 2


def test_the_second_run_of_the_same_settings_trains_nothing(tmp_path) -> None:
    prefixes = PrefixCache(tmp_path / "prefixes")
    train_model(tiny("at"), tmp_path / "one", prefix_cache=prefixes)
    rows = []
    train_model(
        tiny("at"),
        tmp_path / "two",
        FunctionCallback(lambda m, c: rows.append(m)),
        prefix_cache=prefixes,
    )
    assert [row["shared"] for row in rows] == [1.0, 1.0]


def train_beside_another(config: TrainingConfig, root: Path, name: str) -> None:
    """What each of two processes does: train, and write the reported rows to NAME.json."""
    torch.set_num_threads(1)
    rows: list[dict[str, float]] = []
    train_model(
        config,
        root / name,
        FunctionCallback(lambda metrics, saved: rows.append(metrics)),
        prefix_cache=PrefixCache(root / "prefixes"),
    )
    (root / f"{name}.json").write_text(json.dumps(rows))


def test_two_runs_at_once_train_a_common_prefix_once(tmp_path) -> None:
    configs = [tiny("gairat", epochs=5, **{BURN_IN: 4, LAM: lam}) for lam in (-1.0, 1.0)]
    processes = [
        forked_processes.start_function(train_beside_another, config, tmp_path, str(number))
        for number, config in enumerate(configs)
    ]
    assert [process.wait() for process in processes] == [0, 0]
    rows = [json.loads((tmp_path / f"{number}.json").read_text()) for number in range(2)]
    trained = sum(not row.get("shared") for part in rows for row in part)
    assert trained == 4 + 1 + 1
    assert [row["robust_worst"] for row in rows[0][:4]] == [
        row["robust_worst"] for row in rows[1][:4]
    ]


def die_with_a_claim(folder: Path) -> None:
    with PrefixCache(folder).acquire_training_lease("key") as ours:
        assert ours
        os._exit(0)


def test_a_dead_owners_claim_is_taken_over(tmp_path) -> None:
    assert forked_processes.start_function(die_with_a_claim, tmp_path).wait() == 0
    assert (tmp_path / "key.claim").exists()
    with PrefixCache(tmp_path).acquire_training_lease("key") as ours:
        assert ours
    assert not (tmp_path / "key.claim").exists()


def record_answers(patch: pytest.MonkeyPatch, claim: type) -> list[bool]:
    """A list of what `try_acquire` of this class of claims has answered from now on, in order."""
    try_acquire, answers = claim.try_acquire, []

    def answer(self) -> bool:
        answers.append(try_acquire(self))
        return answers[-1]

    patch.setattr(claim, "try_acquire", answer)
    return answers


def wait_for_refusals(answers: list[bool], count: int, thread: threading.Thread) -> None:
    deadline = time.monotonic() + 600
    while answers.count(False) < count:
        assert thread.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)


def test_a_living_owners_claim_is_waited_for(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefixes, got = PrefixCache(tmp_path / "prefixes"), []
    answers = record_answers(monkeypatch, FolderLease)
    state = train_model(tiny("at", epochs=1), tmp_path / "run").last_checkpoint.local_folder

    def acquire_in_thread() -> None:
        with prefixes.acquire_training_lease("key") as ours:
            got.append(ours)

    with prefixes.acquire_training_lease("key") as ours:
        assert ours
        thread = threading.Thread(target=acquire_in_thread)
        thread.start()
        wait_for_refusals(answers, 3, thread)
        assert not got and thread.is_alive()
        prefixes.store_state("key", state)
    thread.join()
    assert got == [False]


def test_the_store_forgets_the_least_recently_used_when_it_is_full(tmp_path) -> None:
    state = train_model(tiny("at", epochs=1), tmp_path / "run").last_checkpoint.local_folder
    size = sum(file.stat().st_size for file in state.iterdir())
    prefixes = PrefixCache(tmp_path / "prefixes", max_bytes=int(2.5 * size))
    for key in ("a", "b"):
        prefixes.store_state(key, state)
        time.sleep(0.02)
    prefixes.find_state("a")
    prefixes.store_state("c", state)
    assert sorted(p.name for p in (tmp_path / "prefixes").iterdir()) == ["a", "c"]


def test_what_a_crash_left_half_stored_goes(tmp_path) -> None:
    state = train_model(tiny("at", epochs=1), tmp_path / "run").last_checkpoint.local_folder
    half = tmp_path / "prefixes" / ".a.123"
    half.mkdir(parents=True)
    (half / "weights.safetensors").write_bytes(b"half")
    new = tmp_path / "prefixes" / ".c.124"
    new.mkdir()
    two_hours_ago = time.time() - 7200
    os.utime(half, (two_hours_ago, two_hours_ago))
    PrefixCache(tmp_path / "prefixes").store_state("b", state)
    assert sorted(p.name for p in (tmp_path / "prefixes").iterdir()) == [".c.124", "b"]


def test_a_state_that_goes_while_it_is_taken_over_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run's store has just outgrown its limit."""
    prefixes, link = PrefixCache(tmp_path / "prefixes"), folder_store.link_or_copy
    train_model(tiny("at"), tmp_path / "one", prefix_cache=prefixes)

    def failing_link(source: Path, target: Path) -> None:
        if source.is_relative_to(prefixes.path.local_path):
            shutil.rmtree(source.parent)
        link(source, target)

    monkeypatch.setattr(folder_store, "link_or_copy", failing_link)
    rows: list[dict[str, float]] = []
    train_model(
        tiny("at"),
        tmp_path / "two",
        FunctionCallback(lambda m, c: rows.append(m)),
        prefix_cache=prefixes,
    )
    assert [row["epoch"] for row in rows] == [1, 2] and not any("shared" in row for row in rows)


def test_a_damaged_state_is_not_used_silently(tmp_path: Path) -> None:
    prefixes = PrefixCache(tmp_path / "prefixes")
    config = tiny("at", epochs=1)
    train_model(config, tmp_path / "one", prefix_cache=prefixes)
    (state,) = [p for p in (tmp_path / "prefixes").iterdir() if p.is_dir()]
    assert state.name == prefix_keys(config, load_data(config.data).fingerprint)[1]
    (state / "weights.safetensors").unlink()
    (state / "weights.safetensors").write_bytes(b"half")
    rows = []
    train_model(
        config,
        tmp_path / "two",
        FunctionCallback(lambda m, c: rows.append(m)),
        prefix_cache=prefixes,
    )
    assert not rows[0].get("shared")
