"""A sweep's ended trials in an Optuna storage, for optuna-dashboard and Optuna's own analyses."""

import optuna
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from raysweep.spec import SpecError
from raysweep.sweep.ledger import Ledger, Trial
from raysweep.sweep.space import SearchSpace

_NUMBER = "raysweep.number"


class StudyExport:
    """A listener that keeps a study equal to the ledger. It is only written: no sweep depends on it.

    Raises SpecError in one line if there is no such database.
    """

    def __init__(self, url: str) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        shown = "--optuna"
        try:
            shown = f"--optuna {make_url(url).render_as_string(hide_password=True)}"
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
            self._study.add_trial(ended_trial(self._space, trial))

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
        trials = [ended_trial(self._space, trial) for trial in ledger.trials() if trial.state != "running"]
        if sorted(map(_known, trials)) == sorted(map(_known, self._study.get_trials(deepcopy=False))):
            return
        optuna.delete_study(study_name=self._name, storage=self._storage)
        self._open()
        self._study.add_trials(trials)


def constraints(space: SearchSpace, best: dict[str, float]) -> dict[str, float]:
    """Optuna's convention: feasible when no value is above 0."""
    limit = space.max_masking_gap
    return {} if limit is None else {"masking_gap": best["masking_gap"] - limit}


def ended_trial(space: SearchSpace, trial: Trial) -> FrozenTrial:
    """A trial as Optuna knows it; one that failed or reported nothing has no value."""
    failed = trial.state == "failed" or not trial.best
    known = {path: space.space[path].optuna() for path in trial.settings if path in space.space}
    single = len(space.objectives) == 1
    return optuna.trial.create_trial(
        state=TrialState.FAIL if failed else TrialState.COMPLETE,
        values=None if failed else [trial.score(name) for name in space.objectives],
        params=space.params(trial.settings),
        distributions=known,
        constraints=None if failed else constraints(space, trial.best),
        intermediate_values={int(epoch): value for epoch, value in trial.curve} if single else None,
        user_attrs={_NUMBER: trial.number, "state": trial.state, **({"reason": trial.reason} if trial.reason else {})},
    )


def _known(trial: FrozenTrial) -> tuple[int, str, str]:
    return trial.user_attrs[_NUMBER], str(trial.values), str(trial.params)
