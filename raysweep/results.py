"""What a notebook asks for: models, sweeps and reports of the past, as nn.Module and pandas."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from raysweep import storage
from raysweep.spec import JsonDict, SpecError
from raysweep.sweep.epoch_counts import count_epochs
from raysweep.sweep.ledger import Ledger, Trial
from raysweep.sweep.search_space import param_labels
from raysweep.training.advice import advise_on_training
from raysweep.training.checkpoint import RunDirectory
from raysweep.training.model_loading import load_checkpoint_target

if TYPE_CHECKING:
    import pandas as pd


def load(path: str | Path, *, data_dir: str | Path | None = None) -> nn.Module:
    """The network of a checkpoint's folder or URI, or of a run's best epoch, in eval mode: [0, 1]
    images to logits.

    data_dir: where the data of its training are now, if they have moved. Raises SpecError in one
    line.
    """
    changes = {} if data_dir is None else {"data_dir": str(Path(data_dir).expanduser().resolve())}
    return load_checkpoint_target(storage.local_path(str(path)), changes).model


def load_sweep(path: str | Path) -> "Sweep":
    """A sweep, finished or not, by its folder (`runs/NAME`) or URI. Raises SpecError in one line if
    there is none.
    """
    return Sweep(Ledger.open(storage.local_path(str(path))))


def load_report(path: str | Path) -> "pd.DataFrame":
    """Examples of an evaluation, one a row, by its folder or Parquet file; its summary is in
    `attrs`.
    """
    import json

    import pyarrow.parquet as pq

    file = Path(path).expanduser()
    file = file / "examples.parquet" if file.is_dir() else file
    try:
        table = pq.read_table(file)
        summary = json.loads((table.schema.metadata or {})[b"raysweep.evaluation"])
    except (OSError, ValueError, KeyError):
        raise SpecError(
            f"{path}: not an evaluation of raysweep: give its folder or its examples.parquet"
        ) from None
    frame: pd.DataFrame = table.to_pandas()
    frame.attrs = summary
    return frame


@dataclass(frozen=True)
class Sweep:
    """A sweep's trials and epochs as tables."""

    ledger: Ledger

    @property
    def trials(self) -> "pd.DataFrame":
        """One row a trial, best first: its state, searched settings by their short names, metrics
        of its best epoch.
        """
        import pandas as pd

        trials = {
            trial.number: trial
            for trial in [*self.ledger.rank_trials(), *self.ledger.load_trials()]
        }
        return pd.DataFrame(
            [self._trial_row(trial) for trial in trials.values()],
            index=pd.Index(list(trials), name="trial"),
        )

    @property
    def epochs(self) -> "pd.DataFrame":
        """One row a trial and epoch, with every metric that was recorded."""
        import pandas as pd

        numbers = [trial.number for trial in self.ledger.load_trials()]
        rows = [
            (n, row)
            for n in numbers
            for row in RunDirectory(self.ledger.trial_path(n)).read_history()
        ]
        index = pd.MultiIndex.from_arrays(
            [[n for n, _ in rows], [int(r["epoch"]) for _, r in rows]]
        )
        return pd.DataFrame([row for _, row in rows], index=index.set_names(["trial", "epoch"]))

    @property
    def best(self) -> Path:
        """The checkpoint that a pipeline would promote. Raises SpecError if no trial has one yet."""
        ranked = self.ledger.rank_trials()
        if not ranked:
            raise SpecError(
                f"{self.ledger.path}: no trial has reported {self.ledger.space.objectives[0]} yet"
            )
        return self.ledger.best_checkpoint_path(ranked[0])

    def advice(self, trial: int) -> list[str]:
        """What the numbers of a trial say, in words."""
        return advise_on_trial(self.ledger, trial)

    def _trial_row(self, trial: Trial) -> dict[str, Any]:
        short = param_labels(list(self.ledger.space.space))
        return {
            "state": trial.state,
            **{short[path]: trial.params.get(path) for path in self.ledger.space.space},
            **{name: value for name, value in trial.best.items() if "/" not in name},
            "epochs": trial.epoch,
            "trained": trial.trained_epochs,
            "seconds": trial.seconds,
            "reason": trial.reason,
        }


def advise_on_trial(ledger: Ledger, trial_number: int) -> list[str]:
    """Advice on a trial of a sweep; none before its first epoch."""
    last = RunDirectory(ledger.trial_path(trial_number)).read_last_checkpoint()
    return advise_on_training(last.config, last.history) if last else []


def describe_masking(ledger: Ledger) -> list[str]:
    """Which trial PGD alone would have chosen and at what cost, and which trials hide behind it, in
    words.
    """
    judged = [
        trial
        for trial in ledger.rank_trials()
        if "pgd" in trial.best and "robust_worst" in trial.best
    ]
    masked = [trial for trial in judged if ledger.exceeds_masking_gap(trial)]
    honest = [trial.score("robust_worst") for trial in judged if trial not in masked]
    lines = []
    if honest:
        by_pgd = max(judged, key=lambda trial: trial.score("pgd"))
        if (cost := max(honest) - by_pgd.score("robust_worst")) > 0:
            lines.append(
                f"PGD would have chosen trial {by_pgd.number:04d}, at a cost of {cost:.3f} in robust worst"
            )
    if masked:
        numbers = ", ".join(f"{trial.number:04d}" for trial in masked)
        lines.append(
            f"masking gap over {ledger.space.max_masking_gap}: trials {numbers} are ranked last"
        )
    return lines


def sweep_to_json(ledger: Ledger) -> JsonDict:
    """A sweep as plain data, for `--json`: all its trials, best first, and where their best
    checkpoints are.
    """
    ranked, trials = ledger.rank_trials(), ledger.load_trials()
    epochs = count_epochs(trials)
    return {
        "sweep": ledger.name,
        "path": storage.uri_of(ledger.path),
        "space": ledger.space.to_stored_dict(),
        "epochs": {
            "asked": epochs.completed,
            "trained": epochs.trained,
            "saved": epochs.reused,
        },
        "front": [trial.number for trial in ledger.pareto_front()],
        "advice": advise_on_trial(ledger, ranked[0].number) if ranked else [],
        "trials": [
            trial_to_json(ledger, t) for t in {t.number: t for t in [*ranked, *trials]}.values()
        ],
    }


def trial_to_json(ledger: Ledger, trial: Trial) -> JsonDict:
    """A trial as plain data; its checkpoint is null before its first epoch."""
    checkpoint = storage.uri_of(ledger.best_checkpoint_path(trial)) if trial.best else None
    return trial.to_stored_dict() | {
        "checkpoint": checkpoint,
        "masks": ledger.exceeds_masking_gap(trial),
    }
