"""Shared prefixes: the settings of each epoch form a hash chain that names the state after it.

Two runs whose settings agree in every epoch up to e have the same weights after e, however they differ later: all
GAIRAT runs during their burn-in, FAT runs until their tau differ, the same settings with more epochs. Random numbers
belong to (seed, epoch, example), so a run that starts from a stored state is bit-identical to one that trained it (on
one kind of machine, which the chain names too).
"""

import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from raysweep.spec import Json, SpecError, digest
from raysweep.training import checkpoint
from raysweep.training.config import RunConfig

PREFIXES = ".prefixes"
_BEAT, _STALE, _POLL = 5.0, 30.0, 0.2


def chain(config: RunConfig, data_fingerprint: str, workers: int = 1) -> list[str]:
    """Keys of the states after 0, 1, ..., epochs epochs."""
    start = {
        "data": data_fingerprint,
        "split": _decides(config.data.json_dict(), drop=("data_dir", "download", "name")),
        "model": config.model.json_dict(),
        "validation": config.validation.json_dict(),
        "machine": [
            str(checkpoint.environment()[name]) for name in ("torch", "device")
        ] + [torch.get_num_threads(), workers],
    }  # fmt: skip
    keys = [digest(start)]
    for epoch in range(config.epochs):
        settings = config.at(epoch).json_dict()
        now = _decides(settings, drop=("data", "model", "validation", "epochs", "collapse_after"))
        now["method"] = _decides(now["method"], drop=("name",))
        keys.append(digest([keys[-1], now]))
    return keys


class Prefixes:
    """A folder of states by key, which runs and sweeps share; the least recently used go when it outgrows `limit`.

    limit: bytes. States are links to the checkpoints of the run that trained them where the file system has links.
    """

    def __init__(self, path: Path, limit: int = 20 * 2**30) -> None:
        self.path = path
        self.limit = limit

    def get(self, key: str) -> Path | None:
        """The state's folder; None if there is none, or if it is damaged, and then it goes."""
        state = self.path / key
        if not (state / checkpoint.META).exists():
            return None
        try:
            checkpoint.read(state)
            os.utime(state)
        except (SpecError, OSError):
            shutil.rmtree(state, ignore_errors=True)
            return None
        return state

    def put(self, key: str, saved: Path) -> None:
        """Keep the state in the checkpoint folder `saved` under `key`."""
        if self.get(key) is not None:
            return
        partial = self.path / f".{key}.{os.getpid()}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for file in saved.iterdir():
            checkpoint.link(file, partial / file.name)
        with suppress(OSError):  # another run was faster
            partial.replace(self.path / key)
        shutil.rmtree(partial, ignore_errors=True)
        self._collect()

    @contextmanager
    def training(self, key: str) -> Iterator[bool]:
        """Claim the right to train the state `key`; False if it came to exist while another run had the claim.

        A claim whose owner died (its process is gone, or its heartbeat stopped) is taken over.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        claim = self.path / f"{key}.claim"
        while not _claimed(claim):
            if self.get(key) is not None:
                yield False
                return
            time.sleep(_POLL)
        beating = threading.Event()
        threading.Thread(target=_beat, args=(claim, beating), daemon=True).start()
        try:
            yield self.get(key) is None
        finally:
            beating.set()
            claim.unlink(missing_ok=True)

    def _collect(self) -> None:
        states = []
        for state in self.path.iterdir():
            with suppress(OSError):
                if state.is_dir() and not state.name.startswith("."):
                    states.append((state.stat().st_mtime, sum(f.stat().st_size for f in state.iterdir()), state))
        size = sum(bytes_ for _, bytes_, _ in states)
        for _, bytes_, state in sorted(states):
            if size <= self.limit:
                return
            # First out of sight, so that nobody finds half a state.
            gone = state.with_name(f".{state.name}.{os.getpid()}")
            with suppress(OSError):
                state.replace(gone)
            shutil.rmtree(gone, ignore_errors=True)
            size -= bytes_


def _decides(settings: Json, drop: tuple[str, ...]) -> Json:
    return {key: value for key, value in settings.items() if key not in drop}


def _claimed(claim: Path) -> bool:
    """Whether this process now holds the claim."""
    if _dead(claim):
        claim.unlink(missing_ok=True)
    try:
        descriptor = os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "w") as file:
        file.write(f"{socket.gethostname()} {os.getpid()}")
    return True


def _dead(claim: Path) -> bool:
    try:
        owner = claim.read_text().split()
        age = time.time() - claim.stat().st_mtime
    except OSError:
        return False
    if len(owner) == 2 and owner[0] == socket.gethostname():
        with suppress(PermissionError):
            try:
                os.kill(int(owner[1]), 0)
            except ProcessLookupError:
                return True
    return age > _STALE


def _beat(claim: Path, stop: threading.Event) -> None:
    while not stop.wait(_BEAT):
        with suppress(OSError):
            os.utime(claim)
