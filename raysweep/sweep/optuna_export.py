"""Copy a sweep's ended trials to an Optuna storage, for optuna-dashboard and Optuna's analyses."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import optuna
from optuna.trial import FrozenTrial
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from raysweep.errors import InfrastructureError
from raysweep.record_queue import RecordQueue, RecordStoreUnavailable
from raysweep.spec import SpecError
from raysweep.stores.folder_store import find_sqlite_file, hold_file_lock
from raysweep.sweep.ledger import Ledger, Trial
from raysweep.sweep.optuna_study import TRIAL_NUMBER_ATTRIBUTE, to_frozen_trial
from raysweep.training.metric_history import EpochMetrics
from raysweep.uri_passwords import fill_in_passwords

# Seconds in which another process may create or upgrade a database.
_MIGRATION_TIMEOUT = 600.0


class OptunaExporter:
    """Sweep listener that keeps an Optuna study equal to the ledger.

    raysweep only writes the study: no sweep reads it.

    Args:
        storage_url: SQLAlchemy URL of the database, for example `sqlite:///optuna.db`.

    Raises:
        SpecError: If the URL is malformed, in one line.
        InfrastructureError: If the database cannot be opened, in one line.
    """

    def __init__(self, storage_url: str) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        full_url = fill_in_passwords(storage_url, "--optuna")
        self._records = RecordQueue(f"--optuna {storage_url}")
        # Two processes that create a database at once fail in its migrations.
        database = find_sqlite_file(storage_url)
        if database is not None and not database.parent.is_dir():
            database = None
        lock = hold_file_lock(database, _MIGRATION_TIMEOUT) if database else nullcontext()
        try:
            with lock:
                self._storage = optuna.storages.RDBStorage(full_url)
        except (SQLAlchemyError, ImportError, ValueError) as error:
            reason = str(getattr(error, "orig", None) or error).splitlines()[0]
            is_malformed = isinstance(error, ArgumentError | ValueError)
            raise (SpecError if is_malformed else InfrastructureError)(
                f"--optuna {storage_url}: {reason}; expected for example sqlite:///optuna.db"
            ) from error

    def on_sweep_start(self, ledger: Ledger, concurrency: int) -> None:
        """Open the sweep's study, and rebuild it if it differs from the ledger."""
        self._space = ledger.space
        self._study_name = f"{ledger.name}-{ledger.key[:8]}"
        self._records.write(lambda: self._open_and_rebuild_study(ledger))

    def on_trial_update(self, trial: Trial, epoch_metrics: EpochMetrics | None) -> None:
        """Add a trial that has ended."""
        if trial.state != "running":
            self._records.write(lambda: self._add_trial(trial))

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
        """Add a trial that has ended."""
        with _translate_errors():
            self._study.add_trial(to_frozen_trial(self._space, trial))

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
        if sorted(map(_trial_identity, trials)) == sorted(map(_trial_identity, exported)):
            return
        optuna.delete_study(study_name=self._study_name, storage=self._storage)
        self._open_study()
        self._study.add_trials(trials)


@contextmanager
def _translate_errors() -> Iterator[None]:
    """Raise RecordStoreUnavailable in place of errors of the database."""
    try:
        yield
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError, OSError) as error:
        reason = str(getattr(error, "orig", None) or error).splitlines()[0]
        raise RecordStoreUnavailable(f"--optuna: {reason}") from error


def _trial_identity(frozen_trial: FrozenTrial) -> tuple[int, str, str]:
    """Return what makes two exported trials equal: number, values and params."""
    return (
        frozen_trial.user_attrs[TRIAL_NUMBER_ATTRIBUTE],
        str(frozen_trial.values),
        str(frozen_trial.params),
    )
