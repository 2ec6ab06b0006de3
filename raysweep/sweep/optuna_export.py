"""Copy a sweep's ended trials to an Optuna storage, for optuna-dashboard and Optuna's analyses."""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import optuna
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import FrozenTrial
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from raysweep.errors import InfrastructureError
from raysweep.record_queue import RecordQueue, RecordStoreUnavailable
from raysweep.spec import SpecError
from raysweep.stores.folder_store import find_sqlite_file, hold_file_lock
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.optuna_study import EXPORTED_ATTRIBUTES, TRIAL_NUMBER_ATTRIBUTE, to_frozen_trial
from raysweep.sweep.trial import Trial
from raysweep.training.metric_history import EpochMetrics
from raysweep.uri_passwords import fill_in_passwords

logger = logging.getLogger(__name__)

JOURNAL_SUFFIXES = (".log", ".journal")
"""Suffixes of the paths that `--optuna` treats as journal files."""

# Longest first line of a journal that is read: the name of a study is in it.
_MAX_JOURNAL_LINE = 100_000
# Seconds in which another process may create or upgrade a database.
_MIGRATION_TIMEOUT = 600.0
_TrialIdentity = tuple[int, str, str, str, str, str]


class OptunaExporter:
    """Sweep listener that keeps an Optuna study equal to the ledger.

    raysweep only writes the study: no sweep reads it.

    Args:
        storage_url: SQLAlchemy URL of the database, for example `sqlite:///optuna.db`, or the path
            of a journal file, which ends in `.log` or `.journal`.

    Raises:
        SpecError: If the URL is malformed, in one line.
        InfrastructureError: If the database cannot be opened, in one line.
    """

    def __init__(self, storage_url: str) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        full_url = fill_in_passwords(storage_url, "--optuna")
        self._records = RecordQueue("--optuna", storage_url)
        # Identities of the trials that the study has.
        self._exported: set[_TrialIdentity] = set()
        is_journal = "://" not in full_url and Path(full_url).suffix.lower() in JOURNAL_SUFFIXES
        try:
            self._storage = _open_journal(full_url) if is_journal else _open_database(full_url)
        except (SQLAlchemyError, ImportError, ValueError, OSError) as error:
            reason = str(getattr(error, "orig", None) or error).splitlines()[0]
            is_malformed = isinstance(error, ArgumentError | ValueError)
            raise (SpecError if is_malformed else InfrastructureError)(
                f"--optuna {storage_url}: {reason}; expected for example sqlite:///optuna.db or "
                "journal.log"
            ) from error

    def on_sweep_start(self, ledger: Ledger, concurrency: int) -> None:
        """Open the sweep's study, and rebuild it if it differs from the ledger."""
        self._ledger = ledger
        self._space = ledger.space
        self._study_name = self._first_study_name = f"{ledger.name}-{ledger.key[:8]}"
        self._n_studies = 1
        self._records.write(lambda: self._open_and_rebuild_study(ledger))

    def on_trial_update(self, trial: Trial, epoch_metrics: EpochMetrics | None) -> None:
        """Add a trial that has ended."""
        if trial.state != "running":
            self._records.write(lambda: self._add_trial(trial))

    def on_base_run_update(self, run: Trial, epoch_metrics: EpochMetrics | None) -> None:
        """Nothing to write: a base run has no searched settings."""

    def on_repeat_update(self, run: Trial, epoch_metrics: EpochMetrics | None) -> None:
        """Nothing to write yet: `on_sweep_end` writes the mean over the seeds of a trial."""

    def on_finalist_update(self, trial: Trial, n_left: int) -> None:
        """Nothing to write: Optuna is told the values by which the sampler proposed settings."""

    def on_sweep_end(self, ledger: Ledger, error: BaseException | None = None) -> None:
        """Rebuild the study if it differs from the ledger."""
        self._records.write(lambda: self._open_and_rebuild_study(ledger))
        self._records.finish(f"; `raysweep tune --resume {ledger.name} --optuna URL` writes them")

    def _open_and_rebuild_study(self, ledger: Ledger) -> None:
        """Open the sweep's study, and rebuild it if it differs from the ledger."""
        with _translate_errors():
            self._open_study()
            self._rebuild_outdated_study(ledger)

    def _add_trial(self, trial: Trial) -> None:
        """Add a trial that has ended, unless the study was rebuilt when it had."""
        exported = to_frozen_trial(self._space, trial)
        if _trial_identity(exported) in self._exported:
            return
        with _translate_errors():
            try:
                self._study.add_trial(exported)
                self._exported.add(_trial_identity(exported))
            except KeyError:
                logger.info(
                    "somebody deleted the Optuna study %s: it is written anew", self._study_name
                )
                self._open_study()
                self._rebuild_outdated_study(self._ledger)

    def _open_study(self) -> None:
        """Load the study, or create it."""
        self._study = optuna.create_study(
            study_name=self._study_name,
            storage=self._storage,
            directions=["maximize"] * len(self._space.objectives),
            load_if_exists=True,
        )

    def _rebuild_outdated_study(self, ledger: Ledger) -> None:
        """Replace the study if its trials differ from the ledger's ended trials.

        They do after a crash, or when an ended trial was resumed: Optuna cannot change trials of a
        study.
        """
        trials = [
            to_frozen_trial(self._space, trial)
            for trial in ledger.load_trials()
            if trial.state != "running"
        ]
        exported = self._study.get_trials(deepcopy=False)
        self._exported = set(map(_trial_identity, trials))
        if sorted(map(_trial_identity, trials)) == sorted(map(_trial_identity, exported)):
            return
        if _is_annotated(self._study, self._storage):
            self._leave_annotated_study()
            self._rebuild_outdated_study(ledger)
            return
        optuna.delete_study(study_name=self._study_name, storage=self._storage)
        self._open_study()
        self._study.add_trials(trials)

    def _leave_annotated_study(self) -> None:
        """Continue in another study, so that a person's notes on this one are kept."""
        former_name = self._study_name
        self._n_studies += 1
        self._study_name = f"{self._first_study_name}-copy-{self._n_studies}"
        logger.info(
            "the Optuna study %s has notes and differs from the sweep: it stays as it is, and %s "
            "holds the sweep's trials",
            former_name,
            self._study_name,
            extra={"event": "annotated_study", "study": self._study_name},
        )
        self._open_study()


def _open_database(url: str) -> optuna.storages.BaseStorage:
    """Open a database, and create its tables if they are missing."""
    # Two processes that create a database at once fail in its migrations.
    database = find_sqlite_file(url)
    if database is not None and not database.parent.is_dir():
        database = None
    with hold_file_lock(database, _MIGRATION_TIMEOUT) if database else nullcontext():
        return optuna.storages.RDBStorage(url)


def _open_journal(path: str) -> optuna.storages.BaseStorage:
    """Open a journal file, and create it if it is missing.

    Raises ValueError for a file of another kind: Optuna would append to it.
    """
    # Optuna's lock is a link to this path: a relative one would lead elsewhere, and Optuna would
    # wait forever for a process that was killed with the lock.
    file = Path(path).absolute()
    if file.is_file() and file.stat().st_size:
        with file.open("rb") as opened:
            first_line = opened.readline(_MAX_JOURNAL_LINE)
        try:
            json.loads(first_line)["op_code"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError("it is no journal of Optuna; name another file") from error
    try:
        return optuna.storages.JournalStorage(_RepairingJournal(str(file)))
    except json.JSONDecodeError as error:
        raise ValueError("it is damaged; name another file") from error


class _RepairingJournal(JournalFileBackend):
    """Journal file that stays valid after a record was cut off, by a full disk or a crash.

    Optuna would append the next record to the part that was written, and could not read the file
    again.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._path = Path(path)
        self._repair()

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append records."""
        self._repair()
        super().append_logs(logs)

    def _repair(self) -> None:
        """Cut off the last record if it is not complete."""
        if self._has_whole_records():
            return
        lock = JournalFileSymlinkLock(str(self._path))
        lock.acquire()
        try:
            # Another process may have been writing until now.
            if not self._has_whole_records():
                content = self._path.read_bytes()
                os.truncate(self._path, content.rfind(b"\n") + 1)
                logger.warning("%s: its last record was cut off, and is removed", self._path)
        finally:
            lock.release()

    def _has_whole_records(self) -> bool:
        """Return whether the file is empty or ends with a newline."""
        with self._path.open("rb") as opened:
            if not opened.seek(0, os.SEEK_END):
                return True
            opened.seek(-1, os.SEEK_END)
            return opened.read(1) == b"\n"


def _is_annotated(study: optuna.Study, storage: optuna.storages.BaseStorage) -> bool:
    """Return whether a person or another program added attributes or trials.

    optuna-dashboard keeps notes and tags as attributes.
    """
    study_id = storage.get_study_id_from_name(study.study_name)
    if study.user_attrs or storage.get_study_system_attrs(study_id):
        return True
    return any(
        trial.user_attrs.keys() - EXPORTED_ATTRIBUTES
        or TRIAL_NUMBER_ATTRIBUTE not in trial.user_attrs
        or any(not key.startswith("constraints") for key in trial.system_attrs)
        for trial in study.get_trials(deepcopy=False)
    )


@contextmanager
def _translate_errors() -> Iterator[None]:
    """Raise RecordStoreUnavailable in place of errors of the database or the journal file."""
    try:
        yield
    # If somebody has changed or deleted a journal file, Optuna fails in any way.
    except Exception as error:
        reason = (str(getattr(error, "orig", None) or error) or repr(error)).splitlines()[0]
        raise RecordStoreUnavailable(f"--optuna: {reason}") from error


def _trial_identity(frozen_trial: FrozenTrial) -> _TrialIdentity:
    """Return what makes two exported trials equal: number, state, values, epochs, params and their
    distributions.

    A database accepts no trial whose choices differ from those of its other trials, as they do when
    a sweep gets more choices.
    """
    return (
        frozen_trial.user_attrs.get(TRIAL_NUMBER_ATTRIBUTE, -1),
        frozen_trial.state.name,
        str(frozen_trial.values),
        str(sorted(frozen_trial.intermediate_values.items())),
        str(sorted(frozen_trial.params.items())),
        str(sorted((path, repr(kind)) for path, kind in frozen_trial.distributions.items())),
    )
