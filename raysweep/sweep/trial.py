"""State of a sweep's trial, of a base run or of a repeat, as trial.json holds it."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from statistics import fmean
from typing import Annotated, Any, Literal

from pydantic import Field

from raysweep.spec import JsonDict
from raysweep.stored_data import (
    Count,
    Metrics,
    check_stored_types,
    make_damaged_file_error,
    parse_stored_json,
    require_stored_types,
)
from raysweep.stores import StorePath
from raysweep.sweep.finalist_result import FinalistResult
from raysweep.sweep.search_space import Params
from raysweep.training.example_verdicts import ExampleVerdicts
from raysweep.training.metric_history import EpochMetrics
from raysweep.training.selection import (
    EpochRank,
    SelectionRule,
    add_margin,
    average_epochs,
    rank_epoch,
)
from raysweep.training.validation import is_robust_objective

RunKind = Literal["trial", "base run", "repeat"]
"""A trial; a training of the base method beside it (see `SearchSpace.base_runs`); or a training of
a trial's settings with another seed (see `SearchSpace.repeat`)."""
_FOLDERS: Mapping[RunKind, str] = {"trial": "trials", "base run": "base", "repeat": "repeats"}
RUN_FOLDERS = tuple(_FOLDERS.values())
"""Folders of a sweep that hold a folder for each run."""
_FOLDER_NAME = re.compile(r"[0-9]+(-seed-[0-9]+)?")

TrialStatus = Literal["running", "finished", "stopped", "failed"]
# Field of a trial -> its key in trial.json, where the two differ.
_STORED_KEYS = {"params": "settings", "trained_epochs": "trained"}


@dataclass(frozen=True)
class Trial:
    """State of one trial, base run or repeat.

    Attributes:
        number: Number in the sweep, from 0. Base runs have numbers of their own; a repeat has that
            of its trial.
        params: Values of the searched parameters by dotted path.
        state: `running` also means that the trial has not ended and can be resumed; `stopped` means
            stopped early by the scheduler.
        epoch: Last reported epoch, from 1; 0 before the first.
        latest: Metrics of the last reported epoch.
        best: Metrics of the best epoch by the (first) objective (see `selection.rank_epoch`); empty
            before the first value.
        curve: Pairs [epoch, objective], one for each epoch that measured the objective.
        trained_epochs: Number of epochs that this trial trained itself. It reused the others.
        seconds: Wall seconds that the trial held its resources, retries included.
        retries: How often the trial lost its process and was started again.
        reason: Why the trial failed or, until its next epoch, why it was started again.
        burn_in: Number of first epochs in which an instance weight is still 1. None if an earlier
            version of raysweep wrote the trial, for which all epochs count equally.
        best_in_burn_in: Metrics of the best epoch within the burn-in; empty if there is none.
        is_infrastructure_failure: Whether the trial failed because of its surroundings: disk,
            memory or lost processes. False if an earlier version of raysweep wrote the trial.
        finalist: Result of AutoAttack on the best epoch, for one of the best trials of a sweep that
            has ended; else None.
        verdicts: Which validation examples the best epoch gets right; None until the trial ends,
            and if an earlier version of raysweep trained the epoch.
        averages: {objective: score}. The score is the best mean of the objective over
            `SearchSpace.score_epochs` consecutive epochs, plus `SearchSpace.margin_factor` times
            the `robust_margin` of the best epoch. Empty if the score is the objective of the best
            epoch, and before the first epoch after the burn-in.
        rung_verdicts: Which validation examples the epoch of ASHA's first rung gets right; None
            before it, within the burn-in, and if an earlier version of raysweep trained the epoch.
        rung_values: {epoch of a rung, as text: value that ASHA compared there}, if this is the
            objective plus the margin; empty if it is the objective alone, which is in `curve`.
        guessing_epochs: Validated epochs whose natural accuracy is no better than chance. They do
            not count in the score: where one class is frequent, a model that always answers it
            looks robust.
        kind: What it is; known from its folder, not stored in trial.json.
        repeats: For a trial its repeats that count in the ranking (see `plan_repeats`). They have
            files of their own.
    """

    number: int
    params: Params
    state: TrialStatus = "running"
    epoch: int = 0
    latest: EpochMetrics = field(default_factory=dict)
    best: EpochMetrics = field(default_factory=dict)
    curve: list[list[float]] = field(default_factory=list)
    trained_epochs: int = 0
    seconds: float = 0.0
    retries: int = 0
    reason: str = ""
    burn_in: int | None = None
    best_in_burn_in: EpochMetrics = field(default_factory=dict)
    is_infrastructure_failure: bool = False
    finalist: FinalistResult | None = None
    verdicts: ExampleVerdicts | None = None
    averages: EpochMetrics = field(default_factory=dict)
    rung_verdicts: ExampleVerdicts | None = None
    rung_values: dict[str, float] = field(default_factory=dict)
    guessing_epochs: list[int] = field(default_factory=list)
    kind: RunKind = "trial"
    repeats: "tuple[Trial, ...]" = ()

    @classmethod
    def from_tune_config(cls, config: Mapping[str, Any]) -> "Trial":
        """Return the run, before its first epoch, that `to_tune_config` described."""
        return cls(config["number"], config["params"], kind=config.get("kind", "trial"))

    def to_tune_config(self) -> JsonDict:
        """Return the config with which Tune trains the run: its number and params, and its kind if
        it is no trial.
        """
        kind = {} if self.kind == "trial" else {"kind": self.kind}
        return {"number": self.number, "params": self.params, **kind}

    @property
    def folder(self) -> str:
        """Its folder in that of the sweep, such as `trials/0003` or `repeats/0003-seed-1`."""
        return f"{_FOLDERS[self.kind]}/{self._folder_name}"

    @property
    def _folder_name(self) -> str:
        """Last part of `folder`."""
        seed = f"-seed-{self.params.get('seed')}" if self.kind == "repeat" else ""
        return f"{self.number:04d}{seed}"

    @property
    def key(self) -> str:
        """Name that is unique in the sweep: `0003`, `base-0000` or, for a repeat, `0003-seed-1`."""
        return _find_key(self.kind, self._folder_name)

    @property
    def title(self) -> str:
        """Its name in messages: `trial 0003`, `base run 0000` or `trial 0003 seed 1`."""
        if self.kind == "repeat":
            return f"trial {self.number:04d} seed {self.params.get('seed')}"
        return f"{self.kind} {self.number:04d}"

    @property
    def trainings(self) -> "tuple[Trial, ...]":
        """This trial and its repeats: the trainings of its settings that count."""
        return (self, *self.repeats)

    def describe_state(self, is_interrupted: bool) -> str:
        """Return the state for displays.

        Args:
            is_interrupted: Whether no process works on the sweep; see `Ledger.is_interrupted`.

        Returns:
            The state, but "interrupted" for a trial that has not ended and that nobody trains.
        """
        return "interrupted" if is_interrupted and self.state == "running" else self.state

    def to_stored_dict(self) -> JsonDict:
        """Return what trial.json holds."""
        values = asdict(replace(self, repeats=()))
        if not self.is_infrastructure_failure:
            del values["is_infrastructure_failure"]
        for name in ("averages", "rung_values", "guessing_epochs"):
            if not values[name]:
                del values[name]
        if self.finalist is None:
            del values["finalist"]
        else:
            values["finalist"] = self.finalist.to_stored_dict()
        del values["kind"], values["repeats"]
        for name in _VERDICT_FIELDS:
            verdicts = getattr(self, name)
            del values[name]
            if verdicts is not None:
                values[name] = verdicts.to_stored_dict()
        return {_STORED_KEYS.get(name, name): value for name, value in values.items()}

    def runs_again(self, retry_failed: bool) -> bool:
        """Return whether `--resume` runs this trial again although it has failed.

        Args:
            retry_failed: Whether trials that failed by their settings or the code run again, too.
        """
        return self.state == "failed" and (retry_failed or self.is_infrastructure_failure)

    def as_running(self) -> "Trial":
        """Return this ended trial as one that runs again, from its last checkpoint."""
        return replace(self, state="running", reason="", is_infrastructure_failure=False)

    def score(self, metric: str) -> float:
        """Return what the trial is ranked by: its score in `averages` if the sweep has one for this
        metric; otherwise the metric of the best epoch.

        Args:
            metric: Name of an objective or of another metric.

        Returns:
            The value, or its mean over the seeds if there are several; -inf if it has not been
            measured.
        """
        if metric not in self.averages:
            return self.best_epoch_value(metric)
        return fmean(training.averages.get(metric, float("-inf")) for training in self.trainings)

    def best_epoch_value(self, metric: str) -> float:
        """Return a metric of the best epoch, or its mean over the seeds if there are several; -inf
        if it has not been measured.
        """
        return fmean(training.best.get(metric, float("-inf")) for training in self.trainings)

    @property
    def robust_under_autoattack(self) -> float | None:
        """Accuracy of the best epoch under AutoAttack, in [0, 1], or its mean over the seeds if
        there are several; None if it is not known of one of them.
        """
        results = [training._own_autoattack for training in self.trainings]
        known = [result for result in results if result is not None]
        return fmean(known) if len(known) == len(results) else None

    @property
    def _own_autoattack(self) -> float | None:
        """Accuracy of this training's best epoch under AutoAttack; None if it is not known."""
        if self.finalist is None or self.finalist.epoch != self.best.get("epoch"):
            return None
        return self.finalist.robust

    @property
    def best_verdicts(self) -> ExampleVerdicts | None:
        """Which validation examples the best epoch gets right; None if it is not known."""
        if self.verdicts is None or self.verdicts.epoch != self.best.get("epoch"):
            return None
        return self.verdicts

    @property
    def autoattack_verdicts(self) -> ExampleVerdicts | None:
        """Which validation examples survive AutoAttack on the best epoch; None if not known."""
        if self.finalist is None or self._own_autoattack is None:
            return None
        return self.finalist.verdicts

    def final_value(self, metric: str) -> float:
        """Return a metric of the best epoch; the accuracy under AutoAttack in its place if it is an
        accuracy under attacks and AutoAttack has attacked the epoch.

        Args:
            metric: Name of an objective.

        Returns:
            The value, or its mean over the seeds if there are several; -inf if it has not been
            measured.
        """
        robust = self.robust_under_autoattack
        if robust is None or not is_robust_objective(metric):
            return self.best_epoch_value(metric)
        return robust

    def corrected_score(self, metric: str) -> float:
        """Return the score, lowered by as much as AutoAttack lowers the metric of the best epoch.

        This is `score` - (`best_epoch_value` - accuracy of the best epoch under AutoAttack), and
        has the smaller noise of a mean over epochs. If the score is the metric of the best epoch,
        the result is the accuracy under AutoAttack.

        Args:
            metric: Name of an objective.

        Returns:
            The value, with repeats from the means over the seeds; `score` if there is no result of
            AutoAttack, or if the metric is not an accuracy under attacks.
        """
        robust = self.robust_under_autoattack
        if robust is None or not is_robust_objective(metric):
            return self.score(metric)
        return robust + (self.score(metric) - self.best_epoch_value(metric))

    def find_corrected_score(self, metric: str) -> float | None:
        """Return `corrected_score`; None if AutoAttack has not attacked the best epoch of each seed
        of this trial, if the metric is not an accuracy under attacks, and for other runs.
        """
        if self.kind != "trial" or self.robust_under_autoattack is None:
            return None
        return self.corrected_score(metric) if is_robust_objective(metric) else None

    def with_epoch(self, epoch_metrics: EpochMetrics, rule: SelectionRule) -> "Trial":
        """Return this trial after one more epoch.

        Args:
            epoch_metrics: Metrics of the epoch; `epoch` is its number, `shared` is present if the
                epoch was reused from another trial.
            rule: Which epochs can be the best.

        Returns:
            The updated trial; this same object if the epoch was reported before.
        """
        epoch = int(epoch_metrics["epoch"])
        if epoch <= self.epoch:
            return self
        curve, guessing_epochs = self.curve, self.guessing_epochs
        value = epoch_metrics.get(rule.objective)
        if value is not None:
            curve = [*curve, [epoch, value]]
            if not rank_epoch(epoch_metrics, rule).is_above_chance:
                guessing_epochs = [*guessing_epochs, epoch]
        updated = self._with_candidate(epoch_metrics, rule)
        updated = replace(
            updated,
            epoch=epoch,
            latest=epoch_metrics,
            curve=curve,
            guessing_epochs=guessing_epochs,
            trained_epochs=self.trained_epochs + ("shared" not in epoch_metrics),
            reason="",
        )
        return updated.with_score(rule)

    def with_score(self, rule: SelectionRule) -> "Trial":
        """Return this trial and its repeats with the score that a rule gives them."""
        is_best_epoch_alone = rule.score_epochs == 1 and not rule.margin_factor
        counted = [point for point in self.curve if int(point[0]) not in self.guessing_epochs]
        means = [] if is_best_epoch_alone else average_epochs(counted, rule)
        averages = {rule.objective: add_margin(max(means), self.best, rule)} if means else {}
        repeats = tuple(run.with_score(rule) for run in self.repeats)
        return replace(self, averages=averages, repeats=repeats)

    def with_rule(self, rule: SelectionRule) -> "Trial":
        """Return this trial with its burn-in, for a trial that will report more epochs.

        Args:
            rule: Rule of the trial's config.

        Returns:
            The trial. If an earlier version wrote it, its best epoch is chosen anew from the two
            that have checkpoints, the recorded best and the last.
        """
        if self.burn_in is not None:
            return self
        trial = replace(self, burn_in=rule.burn_in, best={})
        for metrics in sorted([self.best, self.latest], key=lambda row: row.get("epoch", 0)):
            trial = trial._with_candidate(metrics, rule)
        return trial

    def rank_best_epoch(self, rule: SelectionRule) -> EpochRank:
        """Return the rank of the best epoch, by the rule of the version that chose it.

        Args:
            rule: Rule of the trial's config.
        """
        if self.burn_in is None:
            rule = SelectionRule(rule.objective)
        return rank_epoch(self.best, rule)

    def _with_candidate(self, metrics: EpochMetrics, rule: SelectionRule) -> "Trial":
        """Return this trial with the epoch as the best one or the best of its burn-in if it is."""
        if rule.objective not in metrics:
            return self
        trial, value = self, metrics[rule.objective]
        if not self.best or rank_epoch(metrics, rule) > rank_epoch(self.best, rule):
            trial = replace(trial, best=metrics)
        best_before = self.best_in_burn_in.get(rule.objective, float("-inf"))
        if metrics["epoch"] <= rule.burn_in and value > best_before:
            trial = replace(trial, best_in_burn_in=metrics)
        return trial


_VERDICT_FIELDS = ("verdicts", "rung_verdicts")
# Fields of a trial that trial.json of earlier versions lacks.
_LATER_FIELDS = {
    *("burn_in", "best_in_burn_in", "is_infrastructure_failure", "finalist", "verdicts"),
    *("averages", "rung_verdicts", "rung_values", "guessing_epochs"),
}
_CurvePoint = Annotated[list[float], Field(min_length=2, max_length=2)]
_TRIAL_TYPES: dict[str, Any] = {
    **{"number": Count, "params": dict[str, Any], "state": TrialStatus, "epoch": Count},
    **{"latest": Metrics, "best": Metrics, "curve": list[_CurvePoint]},
    **{"trained_epochs": Count, "seconds": float, "retries": Count, "reason": str},
    **{"burn_in": Count | None, "best_in_burn_in": Metrics, "is_infrastructure_failure": bool},
    **{"finalist": dict[str, Any] | None, "verdicts": dict[str, Any] | None},
    **{"averages": Metrics, "rung_verdicts": dict[str, Any] | None, "rung_values": Metrics},
    **{"guessing_epochs": list[Count]},
}

_FINALIST_TYPES: dict[str, Any] = {
    **{"epoch": Count, "robust": float | None, "n_examples": Count, "eps": float, "norm": str},
    **{"seconds": float, "error": str},
}
_OPTIONAL_FINALIST_TYPES: dict[str, Any] = {"verdicts": dict[str, Any] | None}


def load_runs(sweep_path: StorePath, kind: RunKind) -> list[Trial]:
    """Load all runs of one kind that a sweep has ever started.

    Args:
        sweep_path: Folder of the sweep.
        kind: Which of them.

    Returns:
        The runs, ordered by number and seed.

    Raises:
        DamagedFileError: If a trial.json is damaged.
    """
    keys = {
        field.name: _STORED_KEYS.get(field.name, field.name)
        for field in fields(Trial)
        if field.name in _TRIAL_TYPES
    }
    types = {key: _TRIAL_TYPES[name] for name, key in keys.items()}
    required_types = {keys[name]: types[keys[name]] for name in keys.keys() - _LATER_FIELDS}
    runs = []
    for file, content in (sweep_path / _FOLDERS[kind]).read_matching("*/trial.json").items():
        data = parse_stored_json(content, str(file), required_types)
        check_stored_types(data, types, str(file))
        values = {name: data[key] for name, key in keys.items() if key in data}
        if values.get("finalist") is not None:
            source = f"{file} (finalist)"
            require_stored_types(values["finalist"], _FINALIST_TYPES, source)
            check_stored_types(values["finalist"], _OPTIONAL_FINALIST_TYPES, source)
            values["finalist"] = FinalistResult.from_stored_dict(values["finalist"], str(file))
        for name in _VERDICT_FIELDS:
            values[name] = ExampleVerdicts.from_stored_dict(values.get(name), f"{file} ({name})")
        run = Trial(**values, kind=kind)
        _check_run(run, file)
        runs.append(run)
    if kind == "repeat":
        runs.sort(key=lambda run: (run.number, int(run.params["seed"])))
    return runs


def identify_run_folder(folder: StorePath) -> tuple[RunKind, str] | None:
    """Return the kind and the key of the run whose folder this is; None for other folders.

    Args:
        folder: Any folder. Its sweep need not exist.
    """
    for kind, name in _FOLDERS.items():
        if folder.parent.name == name and _FOLDER_NAME.fullmatch(folder.name):
            return kind, _find_key(kind, folder.name)
    return None


def _find_key(kind: RunKind, folder_name: str) -> str:
    """Return the key of the run that has a folder of this name."""
    return f"base-{folder_name}" if kind == "base run" else folder_name


def _check_run(trial: Trial, file: StorePath) -> None:
    """Raise DamagedFileError for numbers that name no run or epoch."""
    if file.parent.name != trial.folder.rpartition("/")[2]:
        seed = f", seed = {trial.params.get('seed')}" if trial.kind == "repeat" else ""
        raise make_damaged_file_error(str(file), f"number = {trial.number}{seed}")
    for name, metrics in (("latest", trial.latest), ("best", trial.best)):
        epoch = metrics.get("epoch", 0)
        if metrics and not (float(epoch).is_integer() and 1 <= epoch <= 1e12):
            raise make_damaged_file_error(str(file), f"{name}.epoch = {epoch}")
