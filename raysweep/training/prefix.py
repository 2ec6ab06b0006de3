"""Shared prefixes: the settings of each epoch form a hash chain that names the state after it.

Two runs whose settings agree in every epoch up to e have the same weights after e, however they differ later: all
GAIRAT runs during their burn-in, FAT runs until their tau differ, the same settings with more epochs. Random numbers
belong to (seed, epoch, example), so a run that starts from a stored state is bit-identical to one that trained it (on
one kind of machine, with one version of raysweep, which the chain names too).
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
from raysweep.spec import Json, SpecError, digest
from raysweep.training import checkpoint
from raysweep.training.checkpoint import Checkpoint
from raysweep.training.claim import Heart, claim_on
from raysweep.training.config import RunConfig

PREFIXES = ".prefixes"
_POLL, _BUCKET_POLL = 0.2, 1.0


def chain(config: RunConfig, data_fingerprint: str, workers: int = 1, device: torch.device | None = None) -> list[str]:
    """Keys of the states after 0, 1, ..., epochs epochs on a kind of device, by default the CPU."""
    device = device or torch.device("cpu")
    start = {
        "data": data_fingerprint,
        "split": _decides(config.data.json_dict(), drop=("data_dir", "download", "name")),
        "model": config.model.json_dict(),
        "validation": config.validation.json_dict(),
        "compute": config.compute.on(device).json_dict(),
        "machine": [
            str(checkpoint.environment()[name]) for name in ("raysweep", "torch", "device")
        ] + [device.type, torch.get_num_threads(), workers],
    }  # fmt: skip
    keys = [digest(start)]
    for epoch in range(config.epochs):
        settings = config.at(epoch).json_dict()
        now = _decides(settings, drop=("data", "model", "validation", "compute", "epochs", "collapse_after"))
        now["method"] = _decides(now["method"], drop=("name",))
        keys.append(digest([keys[-1], now]))
    return keys


class Prefixes:
    """A folder of states by key, which runs and sweeps share; the least recently used go when it outgrows `limit`.

    limit: bytes. States are links to the checkpoints of the run that trained them where the file system has links,
    copies in a bucket, where the oldest go first.
    """

    def __init__(self, path: Path, limit: int = 20 * 2**30) -> None:
        self.path = path
        self.limit = limit

    def __reduce__(self) -> Any:
        # Each machine has its own copy of a bucket.
        return _prefixes_at, (storage.name(self.path), self.limit)

    def get(self, key: str) -> Path | None:
        """The state's folder; None if there is none, or if it is damaged, and then it goes."""
        state = self.path / key
        if not storage.pull(state):
            return None
        try:
            checkpoint.check(state)
            os.utime(state)
        except (SpecError, OSError):
            storage.drop(state)
            shutil.rmtree(state, ignore_errors=True)
            return None
        return state

    def adopt(
        self, key: str, path: Path, config: RunConfig, history: list[dict[str, float]] | None = None
    ) -> Checkpoint | None:
        """The state as a run's checkpoint at `path` (see `checkpoint.adopt`); None if there is none (any more)."""
        if (state := self.get(key)) is not None:
            with suppress(SpecError, FileNotFoundError):  # it has just outgrown another run's limit
                return checkpoint.adopt(path, state, config, history)
        return None

    def stored(self, keys: list[str]) -> list[int]:
        """Positions of the keys that are there, descending."""
        known = set(storage.folders(self.path))
        return [number for number in range(len(keys) - 1, -1, -1) if keys[number] in known]

    def put(self, key: str, saved: Path) -> None:
        """Keep the state in the checkpoint folder `saved` under `key`."""
        if self.stored([key]) and self.get(key) is not None:
            return
        if storage.is_copy(self.path):
            # Not through a folder here: a run of this machine that waits for the state and does not find it in the
            # bucket yet would delete the folder before it is pushed.
            storage.copy_folder(saved, self.path / key)
        else:
            self._link(key, saved)
        self._collect()

    def _link(self, key: str, saved: Path) -> None:
        partial = self.path / f".{key}.{os.getpid()}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for file in saved.iterdir():
            checkpoint.link(file, partial / file.name)
        with suppress(OSError):  # another run was faster
            partial.replace(self.path / key)
        shutil.rmtree(partial, ignore_errors=True)

    @contextmanager
    def training(self, key: str) -> Iterator[bool]:
        """Claim the right to train the state `key`; False if it came to exist while another run had the claim.

        A claim whose owner died (its process is gone, or its heartbeat stopped) is taken over.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        claim = claim_on(self.path, key)
        while not claim.taken():
            if self.get(key) is not None:
                yield False
                return
            time.sleep(_BUCKET_POLL if storage.is_copy(self.path) else _POLL)
        with Heart(claim):
            yield self.get(key) is None

    def _collect(self) -> None:
        states = _in_bucket(self.path) if storage.is_copy(self.path) else _in_folder(self.path)
        size = sum(bytes_ for _, bytes_, _ in states)
        for _, bytes_, state in sorted(states):
            if size <= self.limit:
                return
            storage.drop(state)
            # First out of sight, so that nobody finds half a state.
            gone = state.with_name(f".{state.name}.{os.getpid()}")
            with suppress(OSError):
                state.replace(gone)
            shutil.rmtree(gone, ignore_errors=True)
            size -= bytes_


def _prefixes_at(where: str, limit: int) -> Prefixes:
    return Prefixes(storage.at(where), limit)


def _in_folder(path: Path) -> list[tuple[float, int, Path]]:
    """(last use, bytes, folder) of each state, and of what a crash left half stored."""
    states = []
    for state in path.iterdir():
        with suppress(OSError):
            if state.is_dir():
                states.append((state.stat().st_mtime, sum(f.stat().st_size for f in state.iterdir()), state))
    return states


def _in_bucket(path: Path) -> list[tuple[float, int, Path]]:
    """The same, with the time when the state was stored."""
    states: dict[Path, tuple[float, int]] = {}
    for entry in storage.listing(path):
        if entry.path.parent.parent == path:
            stored, size = states.get(entry.path.parent, (0.0, 0))
            states[entry.path.parent] = max(stored, entry.changed), size + entry.size
    return [(stored, size, state) for state, (stored, size) in states.items()]


def _decides(settings: Json, drop: tuple[str, ...]) -> Json:
    return {key: value for key, value in settings.items() if key not in drop}
