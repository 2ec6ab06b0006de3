"""Shared prefixes: the settings of each epoch form a hash chain that names the state after it.

Two runs whose settings agree in every epoch up to e have the same weights after e, however they
differ later: all GAIRAT runs during their burn-in, FAT runs until their tau differ, the same
settings with more epochs. Random numbers belong to (seed, epoch, example), so a run that starts
from a stored state is bit-identical to one that trained it (on one kind of machine, with one
version of raysweep, which the chain names too).
"""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from raysweep import storage
from raysweep.leases import LeaseHeartbeat, make_lease
from raysweep.spec import JsonDict, SpecError, json_digest
from raysweep.training import checkpoint
from raysweep.training.checkpoint import TrainingCheckpoint
from raysweep.training.config import TrainingConfig

PREFIX_CACHE_FOLDER = ".prefixes"
_POLL_SECONDS, _BUCKET_POLL_SECONDS = 0.2, 1.0


def prefix_keys(
    config: TrainingConfig,
    data_fingerprint: str,
    n_workers: int = 1,
    device: torch.device | None = None,
) -> list[str]:
    """Keys of the states after 0, 1, ..., epochs epochs on a kind of device, by default the CPU."""
    device = device or torch.device("cpu")
    start = {
        "data": data_fingerprint,
        "split": _without_keys(config.data.to_json_dict(), dropped_keys=("data_dir", "download", "name")),
        "model": config.model.to_json_dict(),
        "validation": config.validation.to_json_dict(),
        "compute": config.compute.resolve(device).to_json_dict(),
        "machine": [
            str(checkpoint.describe_environment()[name]) for name in ("raysweep", "torch", "device")
        ] + [device.type, torch.get_num_threads(), n_workers],
    }  # fmt: skip
    keys = [json_digest(start)]
    for epoch in range(config.epochs):
        settings = config.resolve_at(epoch).to_json_dict()
        now = _without_keys(
            settings,
            dropped_keys=("data", "model", "validation", "compute", "epochs", "collapse_after"),
        )
        now["method"] = _without_keys(now["method"], dropped_keys=("name",))
        keys.append(json_digest([keys[-1], now]))
    return keys


class PrefixCache:
    """A folder of states by key, which runs and sweeps share; the least recently used go when it
    outgrows `limit`.

    limit: bytes. States are links to the checkpoints of the run that trained them where the file
    system has links, copies in a bucket, where the oldest go first.
    """

    def __init__(self, path: Path, max_bytes: int = 20 * 2**30) -> None:
        self.path = path
        self.max_bytes = max_bytes

    def __reduce__(self) -> Any:
        # Each machine has its own copy of a bucket.
        return _open_prefix_cache, (storage.uri_of(self.path), self.max_bytes)

    def find_state(self, key: str) -> Path | None:
        """The state's folder; None if there is none, or if it is damaged, and then it goes."""
        state = self.path / key
        if not storage.pull_checkpoint(state):
            return None
        try:
            checkpoint.read_local_checkpoint(state)
            os.utime(state)
        except (SpecError, OSError):
            storage.delete_remote(state)
            shutil.rmtree(state, ignore_errors=True)
            return None
        return state

    def reuse_state(
        self,
        key: str,
        path: Path,
        config: TrainingConfig,
        history: list[dict[str, float]] | None = None,
    ) -> TrainingCheckpoint | None:
        """The state as a run's checkpoint at `path` (see `checkpoint.adopt`); None if there is none
        (any more).
        """
        if (state := self.find_state(key)) is not None:
            with suppress(SpecError, FileNotFoundError):  # it has just outgrown another run's limit
                return checkpoint.reuse_checkpoint(path, state, config, history)
        return None

    def find_stored_positions(self, keys: list[str]) -> list[int]:
        """Positions of the keys that are there, descending."""
        known = set(storage.list_folders_containing(self.path))
        return [number for number in range(len(keys) - 1, -1, -1) if keys[number] in known]

    def store_state(self, key: str, checkpoint_path: Path) -> None:
        """Keep the state in the checkpoint folder `saved` under `key`."""
        if self.find_stored_positions([key]) and self.find_state(key) is not None:
            return
        if storage.is_bucket_copy(self.path):
            # Not through a folder here: a run of this machine that waits for the state and does not
            # find it in the bucket yet would delete the folder before it is pushed.
            storage.copy_folder(checkpoint_path, self.path / key)
        else:
            self._link(key, checkpoint_path)
        self._evict_oldest_states()

    def _link(self, key: str, saved: Path) -> None:
        partial = self.path / f".{key}.{os.getpid()}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for file in saved.iterdir():
            checkpoint.link_or_copy(file, partial / file.name)
        with suppress(OSError):  # another run was faster
            partial.replace(self.path / key)
        shutil.rmtree(partial, ignore_errors=True)

    @contextmanager
    def acquire_training_lease(self, key: str) -> Iterator[bool]:
        """Claim the right to train the state `key`; False if it came to exist while another run had
        the claim.

        A claim whose owner died (its process is gone, or its heartbeat stopped) is taken over.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        claim = make_lease(self.path, key)
        while not claim.try_acquire():
            if self.find_state(key) is not None:
                yield False
                return
            time.sleep(_BUCKET_POLL_SECONDS if storage.is_bucket_copy(self.path) else _POLL_SECONDS)
        with LeaseHeartbeat(claim):
            yield self.find_state(key) is None

    def _evict_oldest_states(self) -> None:
        states = (
            _list_bucket_states(self.path)
            if storage.is_bucket_copy(self.path)
            else _list_folder_states(self.path)
        )
        size = sum(bytes_ for _, bytes_, _ in states)
        for _, bytes_, state in sorted(states):
            if size <= self.max_bytes:
                return
            storage.delete_remote(state)
            # First out of sight, so that nobody finds half a state.
            gone = state.with_name(f".{state.name}.{os.getpid()}")
            with suppress(OSError):
                state.replace(gone)
            shutil.rmtree(gone, ignore_errors=True)
            size -= bytes_


def _open_prefix_cache(uri: str, max_bytes: int) -> PrefixCache:
    return PrefixCache(storage.local_path(uri), max_bytes)


def _list_folder_states(path: Path) -> list[tuple[float, int, Path]]:
    """(last use, bytes, folder) of each state, and of what a crash left half stored."""
    states = []
    for state in path.iterdir():
        with suppress(OSError):
            if state.is_dir():
                states.append(
                    (state.stat().st_mtime, sum(f.stat().st_size for f in state.iterdir()), state)
                )
    return states


def _list_bucket_states(path: Path) -> list[tuple[float, int, Path]]:
    """The same, with the time when the state was stored."""
    states: dict[Path, tuple[float, int]] = {}
    for entry in storage.list_remote_files(path):
        if entry.path.parent.parent == path:
            stored, size = states.get(entry.path.parent, (0.0, 0))
            states[entry.path.parent] = max(stored, entry.modified), size + entry.size
    return [(stored, size, state) for state, (stored, size) in states.items()]


def _without_keys(values: JsonDict, dropped_keys: tuple[str, ...]) -> JsonDict:
    return {key: value for key, value in values.items() if key not in dropped_keys}
