"""What a sweep knows, in JSON beside its checkpoints: a killed driver starts again from this alone."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Literal
from uuid import uuid4

from raysweep import storage
from raysweep.files import write_whole
from raysweep.spec import SpecError
from raysweep.sweep.growth import check_growth
from raysweep.sweep.space import SearchSpace, Settings

State = Literal["running", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class Trial:
    """One trial. epoch: last reported; best: the metrics of its best epoch; curve: [epoch, objective] for each epoch.

    trained: epochs that were not taken over from another trial; seconds: held by the trial, retries included; retries:
    how often it lost its process and went on; reason: why it failed or, until its next epoch, started again.
    """

    number: int
    settings: Settings
    state: State = "running"
    epoch: int = 0
    latest: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    curve: list[list[float]] = field(default_factory=list)
    trained: int = 0
    seconds: float = 0.0
    retries: int = 0
    reason: str = ""

    def score(self, metric: str) -> float:
        """The objective of the best epoch; -inf before the first."""
        return self.best.get(metric, float("-inf"))

    def reported(self, metrics: dict[str, float], metric: str) -> "Trial":
        """This trial after one more epoch."""
        epoch = int(metrics["epoch"])
        if epoch <= self.epoch:
            return self
        value = metrics.get(metric)
        return replace(
            self,
            epoch=epoch,
            latest=metrics,
            best=metrics if value is not None and value > self.score(metric) else self.best,
            curve=self.curve if value is None else [*self.curve, [epoch, value]],
            trained=self.trained + ("shared" not in metrics),
            reason="",
        )


class Ledger:
    """The folder of one sweep: `sweep.json`, and for each trial `trials/NNNN/` with `trial.json` and its checkpoints.

    key: names this sweep among all, whatever its folder is called.
    """

    def __init__(self, path: Path, space: SearchSpace, key: str) -> None:
        self.path = path
        self.name = path.name
        self.space = space
        self.key = key

    @classmethod
    def create(cls, path: Path, space: SearchSpace) -> "Ledger":
        """A new sweep's folder. Raises SpecError if there is anything in it already, or if it cannot be written."""
        if storage.pull_file(path / "sweep.json"):
            raise SpecError(
                f"there is a sweep in {storage.name(path)}: go on with `--resume {path.name}`, or choose another --name"
            )
        inside = (file.relative_to(path).parts[0] for file in storage.files(path))
        if any(name != "lock" and not name.startswith(".") for name in inside):
            raise SpecError(f"{storage.name(path)} holds something else than a sweep: choose another --name")
        ledger = cls(path, space.rooted(), uuid4().hex)
        try:
            (path / "trials").mkdir(parents=True, exist_ok=True)
            ledger._write_space()
        except OSError as error:
            raise SpecError(f"{storage.name(path)} cannot be written: {error.strerror or error}") from None
        return ledger

    @classmethod
    def open(cls, path: Path) -> "Ledger":
        """An existing sweep. Raises SpecError if there is none, or if it is damaged."""
        storage.pull_file(path / "sweep.json")
        storage.pull_files(path, "trial.json")
        try:
            data = storage.read_json(path / "sweep.json", ("key", "space"))
        except OSError:
            known = storage.folders(path.parent, "sweep.json")
            raise SpecError(
                f"no sweep in {storage.name(path)}; there {'is ' + ', '.join(known) if known else 'is none'}"
            ) from None
        return cls(path, SearchSpace.load(data["space"], str(path / "sweep.json")), data["key"])

    def discard(self) -> None:
        """Take back a sweep that was refused before its first trial: what `create` made, and nothing else."""
        if not self.trials():
            storage.drop_file(self.path / "sweep.json")
            (self.path / "sweep.json").unlink(missing_ok=True)
            with suppress(OSError):  # not empty
                (self.path / "trials").rmdir()
                self.path.rmdir()

    def extend(self, space: SearchSpace) -> None:
        """Go on as `space`: finished trials that it gives more epochs are running again, from their last checkpoints.

        Raises SpecError for what would make it another sweep (see `sweep.growth`).
        """
        trials = self.trials()
        check_growth(self.space, space, {trial.number: trial.settings for trial in trials})
        self.space = space.rooted()
        self._write_space()
        for trial in trials:
            if trial.state == "finished" and trial.epoch < space.config(trial.settings).epochs:
                self.write(replace(trial, state="running"))

    def run_path(self, number: int) -> Path:
        return self.path / "trials" / f"{number:04d}"

    def write(self, trial: Trial) -> None:
        folder = self.run_path(trial.number)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "trial.json", json.dumps(asdict(trial), indent=1))
        storage.push(folder / "trial.json")

    def trials(self) -> list[Trial]:
        """All trials that were ever started, by number. Raises SpecError for a damaged one."""
        names = [field.name for field in fields(Trial)]
        files = sorted(self.path.glob("trials/*/trial.json"))
        return [Trial(**{name: data[name] for name in names}) for data in (storage.read_json(f, names) for f in files)]

    def ranked(self) -> list[Trial]:
        """Trials that reported the (first) objective, best first; those whose masking gap is too large come last."""
        metric = self.space.objectives[0]
        scored = [trial for trial in self.trials() if metric in trial.best]
        return sorted(scored, key=lambda trial: (self.masks(trial), -trial.score(metric), trial.number))

    def masks(self, trial: Trial) -> bool:
        """Whether the trial breaks the space's `max_masking_gap`."""
        limit = self.space.max_masking_gap
        return limit is not None and trial.best.get("masking_gap", 0.0) > limit

    def front(self, objectives: Sequence[str] = ()) -> list[Trial]:
        """The Pareto front: trials within the masking gap that no other beats in one metric without losing in another.

        objectives: metrics of the trials' best epochs, by default the space's.
        """
        metrics = objectives or self.space.objectives
        fit = [trial for trial in self.ranked() if not self.masks(trial)]
        points = {trial.number: [trial.score(metric) for metric in metrics] for trial in fit}
        return [trial for trial in fit if not _beaten(points, trial.number)]

    def checkpoint(self, trial: Trial) -> Path:
        """The trial's best checkpoint."""
        return self.run_path(trial.number) / f"epoch-{int(trial.best['epoch']):04d}"

    def _write_space(self) -> None:
        write_whole(self.path / "sweep.json", json.dumps({"key": self.key, "space": self.space.json_dict()}, indent=1))
        storage.push(self.path / "sweep.json")


def _beaten(points: dict[int, list[float]], number: int) -> bool:
    mine = points[number]
    return any(other != mine and all(a >= b for a, b in zip(other, mine, strict=True)) for other in points.values())
