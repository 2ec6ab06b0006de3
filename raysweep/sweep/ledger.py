"""What a sweep knows, in JSON beside its checkpoints: a killed driver starts again from this alone."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Literal
from uuid import uuid4

from raysweep import storage
from raysweep.atomic_files import atomic_write_text
from raysweep.pareto import pareto_front_indices
from raysweep.spec import JsonDict, SpecError
from raysweep.sweep.extension_checks import check_extension
from raysweep.sweep.search_space import Params, SearchSpace

TrialStatus = Literal["running", "finished", "stopped", "failed"]
# Field of a trial -> its key in trial.json, where the two differ.
_STORED_KEYS = {"params": "settings", "trained_epochs": "trained"}


@dataclass(frozen=True)
class Trial:
    """One trial. epoch: last reported; best: the metrics of its best epoch; curve: [epoch,
    objective] for each epoch.

    trained: epochs that were not taken over from another trial; seconds: held by the trial, retries
    included; retries: how often it lost its process and went on; reason: why it failed or, until
    its next epoch, started again.
    """

    number: int
    params: Params
    state: TrialStatus = "running"
    epoch: int = 0
    latest: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    curve: list[list[float]] = field(default_factory=list)
    trained_epochs: int = 0
    seconds: float = 0.0
    retries: int = 0
    reason: str = ""

    def to_stored_dict(self) -> JsonDict:
        """Return what trial.json holds."""
        return {_STORED_KEYS.get(name, name): value for name, value in asdict(self).items()}

    def score(self, metric: str) -> float:
        """The objective of the best epoch; -inf before the first."""
        return self.best.get(metric, float("-inf"))

    def with_epoch(self, epoch_metrics: dict[str, float], objective: str) -> "Trial":
        """This trial after one more epoch."""
        epoch = int(epoch_metrics["epoch"])
        if epoch <= self.epoch:
            return self
        value = epoch_metrics.get(objective)
        return replace(
            self,
            epoch=epoch,
            latest=epoch_metrics,
            best=epoch_metrics
            if value is not None and value > self.score(objective)
            else self.best,
            curve=self.curve if value is None else [*self.curve, [epoch, value]],
            trained_epochs=self.trained_epochs + ("shared" not in epoch_metrics),
            reason="",
        )


class Ledger:
    """The folder of one sweep: `sweep.json`, and for each trial `trials/NNNN/` with `trial.json`
    and its checkpoints.

    key: names this sweep among all, whatever its folder is called.
    """

    def __init__(self, path: Path, space: SearchSpace, key: str) -> None:
        self.path = path
        self.name = path.name
        self.space = space
        self.key = key

    @classmethod
    def create(cls, path: Path, space: SearchSpace) -> "Ledger":
        """A new sweep's folder. Raises SpecError if there is anything in it already, or if it
        cannot be written.
        """
        if storage.pull_file(path / "sweep.json"):
            raise SpecError(
                f"there is a sweep in {storage.uri_of(path)}: go on with `--resume {path.name}`, or choose another --name"
            )
        inside = (file.relative_to(path).parts[0] for file in storage.iter_files(path))
        if any(name != "lock" and not name.startswith(".") for name in inside):
            raise SpecError(
                f"{storage.uri_of(path)} holds something else than a sweep: choose another --name"
            )
        ledger = cls(path, space.with_absolute_paths(), uuid4().hex)
        try:
            (path / "trials").mkdir(parents=True, exist_ok=True)
            ledger._save_space()
        except OSError as error:
            raise SpecError(
                f"{storage.uri_of(path)} cannot be written: {error.strerror or error}"
            ) from None
        return ledger

    @classmethod
    def open(cls, path: Path) -> "Ledger":
        """An existing sweep. Raises SpecError if there is none, or if it is damaged."""
        storage.pull_file(path / "sweep.json")
        storage.pull_files(path, "trial.json")
        try:
            data = storage.read_json(path / "sweep.json", ("key", "space"))
        except OSError:
            known = storage.list_folders_containing(path.parent, "sweep.json")
            raise SpecError(
                f"no sweep in {storage.uri_of(path)}; there {'is ' + ', '.join(known) if known else 'is none'}"
            ) from None
        return cls(
            path,
            SearchSpace.from_data(data["space"], str(path / "sweep.json"), stored=True),
            data["key"],
        )

    def delete_if_empty(self) -> None:
        """Take back a sweep that was refused before its first trial: what `create` made, and
        nothing else.
        """
        if not self.load_trials():
            storage.delete_remote_file(self.path / "sweep.json")
            (self.path / "sweep.json").unlink(missing_ok=True)
            with suppress(OSError):  # not empty
                (self.path / "trials").rmdir()
                self.path.rmdir()

    def extend_space(self, new_space: SearchSpace) -> None:
        """Go on as `space`: finished trials that it gives more epochs are running again, from their
        last checkpoints.

        Raises SpecError for what would make it another sweep (see `sweep.growth`).
        """
        trials = self.load_trials()
        check_extension(self.space, new_space, {trial.number: trial.params for trial in trials})
        self.space = new_space.with_absolute_paths()
        self._save_space()
        for trial in trials:
            if (
                trial.state == "finished"
                and trial.epoch < new_space.trial_config(trial.params).epochs
            ):
                self.save_trial(replace(trial, state="running"))

    def trial_path(self, trial_number: int) -> Path:
        return self.path / "trials" / f"{trial_number:04d}"

    def save_trial(self, trial: Trial) -> None:
        folder = self.trial_path(trial.number)
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write_text(folder / "trial.json", json.dumps(trial.to_stored_dict(), indent=1))
        storage.push_to_bucket(folder / "trial.json")

    def load_trials(self) -> list[Trial]:
        """All trials that were ever started, by number. Raises SpecError for a damaged one."""
        keys = {field.name: _STORED_KEYS.get(field.name, field.name) for field in fields(Trial)}
        trials = []
        for file in sorted(self.path.glob("trials/*/trial.json")):
            data = storage.read_json(file, keys.values())
            trials.append(Trial(**{name: data[key] for name, key in keys.items()}))
        return trials

    def rank_trials(self) -> list[Trial]:
        """Trials that reported the (first) objective, best first; those whose masking gap is too
        large come last.
        """
        metric = self.space.objectives[0]
        scored = [trial for trial in self.load_trials() if metric in trial.best]
        return sorted(
            scored,
            key=lambda trial: (self.exceeds_masking_gap(trial), -trial.score(metric), trial.number),
        )

    def exceeds_masking_gap(self, trial: Trial) -> bool:
        """Whether the trial breaks the space's `max_masking_gap`."""
        limit = self.space.max_masking_gap
        return limit is not None and trial.best.get("masking_gap", 0.0) > limit

    def pareto_front(self, objectives: Sequence[str] = ()) -> list[Trial]:
        """The Pareto front: trials within the masking gap that no other beats in one metric without
        losing in another.

        objectives: metrics of the trials' best epochs, by default the space's.
        """
        metrics = objectives or self.space.objectives
        feasible = [trial for trial in self.rank_trials() if not self.exceeds_masking_gap(trial)]
        points = [[trial.score(metric) for metric in metrics] for trial in feasible]
        return [feasible[index] for index in pareto_front_indices(points)]

    def best_checkpoint_path(self, trial: Trial) -> Path:
        """The trial's best checkpoint."""
        return self.trial_path(trial.number) / f"epoch-{int(trial.best['epoch']):04d}"

    def _save_space(self) -> None:
        atomic_write_text(
            self.path / "sweep.json",
            json.dumps({"key": self.key, "space": self.space.to_stored_dict()}, indent=1),
        )
        storage.push_to_bucket(self.path / "sweep.json")
