"""A sweep's ended trials in an Optuna storage, for optuna-dashboard and Optuna's own analyses."""

import optuna
from optuna.trial import FrozenTrial
from sqlalchemy.exc import SQLAlchemyError

from raysweep.formatting import redact_secrets
from raysweep.spec import SpecError
from raysweep.sweep.ledger import Ledger, Trial
from raysweep.sweep.optuna_study import TRIAL_NUMBER_ATTRIBUTE, to_frozen_trial


class OptunaExporter:
    """A listener that keeps a study equal to the ledger. It is only written: no sweep depends on
    it.

    Raises SpecError in one line if there is no such database.
    """

    def __init__(self, storage_url: str) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        shown = "--optuna"
        try:
            shown = f"--optuna {redact_secrets(storage_url)}"
            self._storage = optuna.storages.RDBStorage(storage_url)
        except (SQLAlchemyError, ImportError, ValueError) as error:
            reason = str(getattr(error, "orig", None) or error).splitlines()[0]
            raise SpecError(
                f"{shown}: {reason}; expected for example sqlite:///optuna.db"
            ) from None

    def on_sweep_start(self, ledger: Ledger, concurrency: int) -> None:
        self._space = ledger.space
        self._study_name = f"{ledger.name}-{ledger.key[:8]}"
        self._open_study()
        self._rebuild_outdated_study(ledger)

    def on_trial_update(self, trial: Trial, epoch_metrics: dict[str, float] | None) -> None:
        if trial.state != "running":
            self._study.add_trial(to_frozen_trial(self._space, trial))

    def on_sweep_end(self, ledger: Ledger) -> None:
        self._rebuild_outdated_study(ledger)

    def _open_study(self) -> None:
        self._study = optuna.create_study(
            study_name=self._study_name,
            storage=self._storage,
            directions=["maximize"] * len(self._space.objectives),
            load_if_exists=True,
        )

    def _rebuild_outdated_study(self, ledger: Ledger) -> None:
        """After a crash, or where a trial that had ended went on: what a study has is never changed
        in Optuna.
        """
        trials = [
            to_frozen_trial(self._space, trial)
            for trial in ledger.load_trials()
            if trial.state != "running"
        ]
        if sorted(map(_trial_identity, trials)) == sorted(
            map(_trial_identity, self._study.get_trials(deepcopy=False))
        ):
            return
        optuna.delete_study(study_name=self._study_name, storage=self._storage)
        self._open_study()
        self._study.add_trials(trials)


def _trial_identity(frozen_trial: FrozenTrial) -> tuple[int, str, str]:
    return (
        frozen_trial.user_attrs[TRIAL_NUMBER_ATTRIBUTE],
        str(frozen_trial.values),
        str(frozen_trial.params),
    )
