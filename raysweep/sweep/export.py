"""A sweep's ended trials in an Optuna storage, for optuna-dashboard and Optuna's own analyses."""

import optuna
from optuna.trial import FrozenTrial
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from raysweep.spec import SpecError
from raysweep.sweep.ledger import Ledger, Trial
from raysweep.sweep.study import NUMBER, frozen


class StudyExport:
    """A listener that keeps a study equal to the ledger. It is only written: no sweep depends on it.

    Raises SpecError in one line if there is no such database.
    """

    def __init__(self, url: str) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        shown = "--optuna"
        try:
            shown = f"--optuna {masked(url)}"
            self._storage = optuna.storages.RDBStorage(url)
        except (SQLAlchemyError, ImportError, ValueError) as error:
            reason = str(getattr(error, "orig", None) or error).splitlines()[0]
            raise SpecError(f"{shown}: {reason}; expected for example sqlite:///optuna.db") from None

    def started(self, ledger: Ledger, concurrent: int) -> None:
        self._space = ledger.space
        self._name = f"{ledger.name}-{ledger.key[:8]}"
        self._open()
        self._rebuild_if_other(ledger)

    def trial_changed(self, trial: Trial, metrics: dict[str, float] | None) -> None:
        if trial.state != "running":
            self._study.add_trial(frozen(self._space, trial))

    def ended(self, ledger: Ledger) -> None:
        self._rebuild_if_other(ledger)

    def _open(self) -> None:
        self._study = optuna.create_study(
            study_name=self._name,
            storage=self._storage,
            directions=["maximize"] * len(self._space.objectives),
            load_if_exists=True,
        )

    def _rebuild_if_other(self, ledger: Ledger) -> None:
        """After a crash, or where a trial that had ended went on: what a study has is never changed in Optuna."""
        trials = [frozen(self._space, trial) for trial in ledger.trials() if trial.state != "running"]
        if sorted(map(_known, trials)) == sorted(map(_known, self._study.get_trials(deepcopy=False))):
            return
        optuna.delete_study(study_name=self._name, storage=self._storage)
        self._open()
        self._study.add_trials(trials)


def masked(url: str) -> str:
    """A database's URL without its password."""
    return str(make_url(url).render_as_string(hide_password=True))


def _known(trial: FrozenTrial) -> tuple[int, str, str]:
    return trial.user_attrs[NUMBER], str(trial.values), str(trial.params)
