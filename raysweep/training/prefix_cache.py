"""Cache of training states, shared by runs whose first epochs are the same.

Each state has a key. The key after an epoch is a hash of the key before it and of the epoch's
settings. If the settings of two runs agree up to some epoch, the runs therefore have the same key
and the same weights after that epoch. Examples: all GAIRAT runs during their burn-in, FAT runs
until their tau differ, and a run that is repeated with more epochs.

Random numbers depend only on (seed, epoch, example), so a run that starts from a cached state is
bit-identical to one that trained all epochs. This holds for one kind of machine and one version of
raysweep; both are part of the keys.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from raysweep.errors import DamagedFileError
from raysweep.lazy_modules import torch
from raysweep.leases import make_lease
from raysweep.spec import JsonDict, SpecError, json_digest
from raysweep.stores import META_FILE, Location, StorePath, open_path
from raysweep.training import checkpoint
from raysweep.training.checkpoint import TrainingCheckpoint
from raysweep.training.config import TrainingConfig
from raysweep.training.metric_history import EpochMetrics

logger = logging.getLogger(__name__)

PREFIX_CACHE_FOLDER = ".prefixes"
_POLL_SECONDS, _BUCKET_POLL_SECONDS = 0.2, 1.0
# A state that another process has been writing for this number of seconds is left from a crash.
_UNFINISHED_MIN_AGE = 3600.0


def prefix_keys(
    config: TrainingConfig,
    data_fingerprint: str,
    n_workers: int = 1,
    device: torch.device | None = None,
) -> list[str]:
    """Compute the keys of a run's states.

    Args:
        config: Config of the run.
        data_fingerprint: Fingerprint of its training data.
        n_workers: Number of workers that train it together.
        device: Device on which it is trained; by default the CPU.

    Returns:
        `config.epochs` + 1 keys, of the states after 0, 1, ..., `config.epochs` epochs.
    """
    device = device or torch.device("cpu")
    data = config.data.to_stored_dict()
    environment = checkpoint.describe_environment()
    versions = [str(environment[name]) for name in ("raysweep", "torch", "device")]
    start = {
        "data": data_fingerprint,
        "split": _without_keys(data, dropped_keys=("data_dir", "download", "name")),
        "model": config.model.to_json_dict(),
        "validation": config.validation.to_stored_dict(),
        "compute": config.compute.resolve(device).to_json_dict(),
        "machine": [*versions, device.type, torch.get_num_threads(), n_workers],
    }
    keys = [json_digest(start)]
    for epoch in range(config.epochs):
        epoch_settings = _without_keys(
            config.resolve_at(epoch).to_json_dict(),
            dropped_keys=("data", "model", "validation", "compute", "epochs", "collapse_after"),
        )
        method = _without_keys(epoch_settings["method"], dropped_keys=("name",))
        if config.optim.lr_per_step:
            # The value at the start of the epoch says nothing about its steps.
            epoch_settings["optim"]["lr"] = [config.optim.to_json_dict()["lr"], epoch]
        keys.append(json_digest([keys[-1], epoch_settings | {"method": method}]))
    return keys


class PrefixCache:
    """A folder of states by key, shared by runs and sweeps.

    A state is a copy of a checkpoint, made of hard links if the file system has them. When the
    folder exceeds its limit, the least recently used states are evicted; in a bucket, the oldest.

    Attributes:
        path: The folder.
        max_bytes: Size limit of all states together.
    """

    def __init__(self, path: Location, max_bytes: int = 20 * 2**30) -> None:
        self.path = open_path(path)
        self.max_bytes = max_bytes

    def find_state(self, key: str) -> StorePath | None:
        """Find a state and set its time of last use; delete it if it is damaged.

        Args:
            key: Key of the state (see `prefix_keys`).

        Returns:
            The state's folder; None if it is missing or was damaged.
        """
        state = self.path / key
        if state.fetch_checkpoint() is None:
            return None
        try:
            checkpoint.read_checkpoint(state)
        except (SpecError, DamagedFileError) as error:
            logger.warning(
                "deleted damaged state %s of the prefix cache: %s", key, error, extra={"key": key}
            )
            state.delete_folder()
            return None
        state.store.mark_used(state.key)
        return state

    def reuse_state(
        self,
        key: str,
        path: Location,
        config: TrainingConfig,
        history: list[EpochMetrics] | None = None,
    ) -> TrainingCheckpoint | None:
        """Use a state as a checkpoint of a run (see `checkpoint.reuse_checkpoint`).

        Args:
            key: Key of the state.
            path: Checkpoint folder to write.
            config: Config of the run that reuses the state.
            history: Metrics of this run's earlier epochs; by default those in the state.

        Returns:
            The checkpoint; None if the state is missing, or another process evicted it meanwhile.
        """
        state = self.find_state(key)
        if state is None:
            return None
        try:
            return checkpoint.reuse_checkpoint(path, state, config, history)
        except (SpecError, DamagedFileError, FileNotFoundError) as error:
            # Another process evicted the state between the check and the copy.
            logger.info("state %s vanished from the prefix cache: %s", key, error)
            return None

    def find_stored_positions(self, keys: list[str]) -> list[int]:
        """Find the keys that have a state.

        Args:
            keys: Keys of a run's states (see `prefix_keys`).

        Returns:
            Indices in `keys`, descending.
        """
        stored_keys = set(self.path.list_folders_containing())
        return [index for index in reversed(range(len(keys))) if keys[index] in stored_keys]

    def store_state(self, key: str, checkpoint_path: Location) -> None:
        """Store a checkpoint as a state, unless the state exists, and evict others if necessary.

        Args:
            key: Key of the state.
            checkpoint_path: Folder of the checkpoint, in the same store.
        """
        if self.find_stored_positions([key]) and self.find_state(key) is not None:
            return
        source = open_path(checkpoint_path)
        meta = (source / META_FILE).read_bytes()
        # Another process may store the same state first.
        with (self.path / key).write_checkpoint(copy_from=source, overwrite=False) as partial:
            (partial / META_FILE).write_bytes(meta)
        self._evict_oldest_states()

    @contextmanager
    def acquire_training_lease(
        self, key: str, epoch: int | None = None, before_wait: Callable[[], None] | None = None
    ) -> Iterator[bool]:
        """Context manager that holds the lease for training one state; waits while others hold it.

        Args:
            key: Key of the state.
            epoch: Epoch after which the run has this state, for the log.
            before_wait: Called once before the first wait, if another run holds the lease.

        Yields:
            True if the caller must train the state; False if the state exists, because another run
            has trained it.
        """
        poll_seconds = _POLL_SECONDS if self.path.local_path else _BUCKET_POLL_SECONDS
        lease = make_lease(self.path, key)
        started_at = time.monotonic()
        is_waiting = False
        while not lease.try_acquire():
            if self.find_state(key) is not None:
                _log_end_of_wait(key, started_at, must_train=False)
                yield False
                return
            if not is_waiting:
                if before_wait is not None:
                    before_wait()
                logger.info(
                    "waiting: %s trains %s",
                    lease.describe_holder() or "another run",
                    f"state {key}" if epoch is None else f"epoch {epoch}, state {key}",
                    extra={"key": key, "epoch": epoch},
                )
            is_waiting = True
            time.sleep(poll_seconds)
        try:
            must_train = self.find_state(key) is None
            if is_waiting:
                _log_end_of_wait(key, started_at, must_train)
            yield must_train
        finally:
            if lease.is_lost:
                logger.warning(
                    "lost the lease of state %s, which another run may have trained again",
                    key,
                    extra={"key": key, "event": "lease_lost", "is_shown_elsewhere": True},
                )
            lease.release()

    def _evict_oldest_states(self) -> None:
        """Delete states, the oldest first, until the cache is within its limit."""
        self.path.delete_unfinished(_UNFINISHED_MIN_AGE)
        store = self.path.store
        states = store.list_checkpoints(self.path.key)
        total_bytes = sum(state.size for state in states)
        for state in sorted(states, key=lambda state: state.last_used):
            if total_bytes <= self.max_bytes:
                return
            key = state.key.rpartition("/")[2]
            logger.info(
                "evicted state %s of %d bytes: the prefix cache of %d bytes exceeds %d",
                key,
                state.size,
                total_bytes,
                self.max_bytes,
                extra={"key": key},
            )
            store.delete_folder(state.key)
            total_bytes -= state.size


def _log_end_of_wait(key: str, started_at: float, must_train: bool) -> None:
    """Log why a run waits no longer for the run that trains a state."""
    seconds = round(time.monotonic() - started_at, 1)
    facts = {"key": key, "seconds": seconds, "event": "lease_wait_end", "is_shown_elsewhere": True}
    if must_train:
        logger.warning(
            "took over the lease of state %s after %s s: its holder died or gave up before it "
            "had stored the state",
            key,
            seconds,
            extra=facts,
        )
    else:
        logger.info(
            "another run has trained state %s, after %s s of waiting", key, seconds, extra=facts
        )


def _without_keys(values: JsonDict, dropped_keys: tuple[str, ...]) -> JsonDict:
    """Return a copy of `values` without some keys."""
    return {key: value for key, value in values.items() if key not in dropped_keys}
