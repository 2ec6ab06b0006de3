"""Compare sweeps, trials and training runs with each other, on the same validation examples.

`compare` can also be imported from `raysweep`.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from raysweep.argument_types import check_argument_type
from raysweep.evaluation.paired_statistics import (
    PairedDifference,
    compare_groups,
    estimate_training_variance,
)
from raysweep.formatting import format_count, shorten_value
from raysweep.result_loading import load_training_run
from raysweep.run_lookup import FoundRun, find_run, list_runs
from raysweep.spec import JsonDict, SpecError, describe_unknown_name, flatten_spec
from raysweep.stores import StorePath, open_path
from raysweep.sweep.base_comparison import compare_with_base
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.run_verdicts import stack_verdicts
from raysweep.sweep.spread_summary import select_comparable_runs
from raysweep.sweep.trial import Trial
from raysweep.training.checkpoint import RunDirectory
from raysweep.training.config import TrainingConfig
from raysweep.training.example_verdicts import ExampleVerdicts
from raysweep.training.metric_history import EpochMetrics
from raysweep.user_folders import expand_home

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pandas as pd
    from matplotlib.figure import Figure

    FloatArray = npt.NDArray[np.float64]

_MIN_RUNS = 2


@dataclass(frozen=True)
class ComparedRun:
    """One of the compared models: a training run, a trial, or the best trial of a sweep.

    Attributes:
        name: What the user called it, such as `g1`.
        label: Its method and what it is, such as `gairat, trial 0003`.
        path: Folder of the run.
        config: Its config.
        metrics: Metrics of its best epoch; of a repeated trial the objective is the mean over its
            seeds.
        n_choices: Number of trials of which it is the best; 1 for a run that the user named.
        verdicts: Which validation examples its best epoch gets right by the objective.
        scores: 1.0 for each validation example that counts as correct by the objective, else 0.0,
            with a row for each seed of a repeated trial, (M, N).
        autoattack_scores: The same under AutoAttack; None if it did not attack all seeds.
        data_fingerprint: Fingerprint of its data.
        sweep: The sweep that the user named; None for a trial or training run.
    """

    name: str
    label: str
    path: StorePath
    config: TrainingConfig
    metrics: EpochMetrics
    n_choices: int
    verdicts: ExampleVerdicts
    scores: FloatArray
    autoattack_scores: FloatArray | None
    data_fingerprint: str
    sweep: Ledger | None

    @property
    def title(self) -> str:
        """Its name and label, for messages."""
        return f"{self.name} ({self.label})"

    @property
    def robust_under_autoattack(self) -> float | None:
        """Accuracy under AutoAttack on the validation images, in [0, 1]; None if unknown."""
        scores = self.autoattack_scores
        return None if scores is None else float(scores.mean())


@dataclass(frozen=True)
class RunPair:
    """Difference between two of the compared models, or between a sweep's best and its base method.

    Attributes:
        first: Title of the first model.
        second: Title of the second model.
        attack: What decided which examples are correct: "AutoAttack", or the name of the objective.
        n_examples: Number of validation examples.
        difference: Accuracy of the first minus that of the second, with its interval.
        n_comparisons: Number of intervals that hold together with 95% confidence (Bonferroni). It
            grows with the number of trials from which the best one was chosen.
    """

    first: str
    second: str
    attack: str
    n_examples: int
    difference: PairedDifference
    n_comparisons: int

    @property
    def verdict(self) -> str:
        """How the first compares with the second: "better", "worse" or "cannot tell"."""
        return self.difference.verdict

    def describe(self) -> str:
        """Say in a line whether the difference is real, with its interval."""
        pair = self.difference
        conclusion = {
            "better": f"{self.first} beats {self.second}",
            "worse": f"{self.second} beats {self.first}",
            "cannot tell": f"{self.first} and {self.second} cannot be told apart",
        }
        chosen = f", one of {self.n_comparisons} comparisons" if self.n_comparisons > 1 else ""
        return (
            f"{conclusion[self.verdict]}: the first minus the second is {pair.difference:+.3f} by "
            f"{self.attack} on the same {self.n_examples} validation images (95% interval"
            f"{chosen}: {pair.low:+.3f} to {pair.high:+.3f})"
        )


@dataclass(frozen=True)
class BaseRow:
    """The base method of a compared sweep: the mean of its runs.

    Attributes:
        name: Name of the sweep.
        label: The base method and the number of its seeds.
        metrics: Means of the metrics of the best epochs.
        robust_under_autoattack: Mean accuracy under AutoAttack, in [0, 1]; None if unknown.
    """

    name: str
    label: str
    metrics: EpochMetrics
    robust_under_autoattack: float | None

    @property
    def title(self) -> str:
        """The sweep and the base method, for messages."""
        return f"{self.name} ({self.label})"


@dataclass(frozen=True)
class RunComparison:
    """Several models, measured on the same validation examples.

    Attributes:
        runs: The models that the user named, in this order.
        base_rows: The base method of each sweep among them that has base runs.
        pairs: Each pair of the models, and after them each sweep's best beside its base method.
        has_training_variance: Whether the intervals allow for the randomness of training, which
            repeated trials and the base runs of the sweeps show if there are two seeds; else for
            the choice of the examples only.
    """

    runs: tuple[ComparedRun, ...]
    base_rows: tuple[BaseRow, ...]
    pairs: tuple[RunPair, ...]
    has_training_variance: bool

    @property
    def objective(self) -> str:
        """Metric of the comparison, an accuracy."""
        return self.runs[0].verdicts.metric

    @property
    def rows(self) -> tuple[ComparedRun | BaseRow, ...]:
        """The models, and after them the base methods."""
        return (*self.runs, *self.base_rows)

    @property
    def table(self) -> pd.DataFrame:
        """The models as a table.

        Returns:
            One row for each model and base method, with its title as index `run` and the columns
            `trials` (number from which it was chosen), `epoch` (its best one; of base methods the
            mean), `clean`, the objective, and `autoattack` (accuracies in [0, 1] on the validation
            images; None if unknown).
        """
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "trials": row.n_choices if isinstance(row, ComparedRun) else None,
                    "epoch": row.metrics.get("epoch"),
                    "clean": row.metrics.get("clean"),
                    self.objective: row.metrics.get(self.objective),
                    "autoattack": row.robust_under_autoattack,
                }
                for row in self.rows
            ],
            index=pd.Index([row.title for row in self.rows], name="run"),
        )

    def describe(self) -> list[str]:
        """Say of each pair whether the difference is real, a line each, and what is left out."""
        lines = [pair.describe() for pair in self.pairs]
        if not self.has_training_variance:
            lines.append(
                "the intervals leave out the randomness of training: no trial here is repeated, "
                "and no sweep has base runs with two seeds"
            )
        return lines

    def to_json_dict(self) -> JsonDict:
        """Return plain data for `--json`."""
        return {
            "objective": self.objective,
            "runs": [
                {
                    "run": run.name,
                    "label": run.label,
                    "path": str(run.path),
                    "trials": run.n_choices,
                    "best": {name: v for name, v in run.metrics.items() if "/" not in name},
                    "autoattack": run.robust_under_autoattack,
                }
                for run in self.runs
            ],
            "base": [
                {
                    "run": row.name,
                    "label": row.label,
                    "best": {name: v for name, v in row.metrics.items() if "/" not in name},
                    "autoattack": row.robust_under_autoattack,
                }
                for row in self.base_rows
            ],
            "pairs": [
                {
                    "first": pair.first,
                    "second": pair.second,
                    "attack": pair.attack,
                    "examples": pair.n_examples,
                    "difference": pair.difference.difference,
                    "interval": [pair.difference.low, pair.difference.high],
                    "comparisons": pair.n_comparisons,
                    "verdict": pair.verdict,
                }
                for pair in self.pairs
            ],
            "has_training_variance": self.has_training_variance,
        }

    def plot(self) -> Figure:
        """Draw the objective of each model over epochs, and the differences with their intervals.

        Returns:
            The figure of matplotlib.

        Raises:
            DamagedFileError: A checkpoint is damaged.
        """
        from raysweep.comparison_plots import PlottedRun, plot_run_comparison

        histories = {
            run.title: PlottedRun(run.config, RunDirectory(run.path).read_history())
            for run in self.runs
        }
        differences = {f"{pair.first}\n- {pair.second}": pair.difference for pair in self.pairs}
        return plot_run_comparison(histories, ("clean", self.objective), differences)


def compare(
    *names: str | Path, out: str | Path = ".", storage: str | Path | None = None
) -> RunComparison:
    """Compare sweeps, trials and training runs on the same validation examples.

    Args:
        names: Two or more, as `raysweep show` takes them: a sweep (its best trial is compared),
            `SWEEP/0003`, a training run, or the folder or URI of one of them.
        out: Folder of `runs`.
        storage: Folder or URI of sweeps; None for `runs` in `out`.

    Returns:
        The models, their paired differences with intervals, and the base methods of the sweeps.

    Raises:
        SpecError: There is no such run, it has no result yet, or the runs have different data,
            threat models, validation examples or objectives. One line.
        DamagedFileError: A file of a run is damaged.
        InfrastructureError: A bucket does not answer.
    """
    for name in names:
        check_argument_type("compare", name, (str, Path), "a name or a folder")
    check_argument_type("out", out, (str, Path), "a path")
    if storage is not None:
        check_argument_type("storage", storage, (str, Path), "a path")
    runs_folder = open_path(expand_home(out) / "runs" if storage is None else storage)
    texts = [str(name) for name in names]
    if len(texts) < _MIN_RUNS or len(set(texts)) < len(texts):
        given = " ".join(map(shorten_value, texts)) or "without names"
        raise SpecError(
            f"compare {given}: name two or more different sweeps, trials or training runs"
        )
    runs = [_load_run(name, runs_folder) for name in texts]
    for first, second in itertools.combinations(runs, 2):
        if _resolve_folder(first.path) == _resolve_folder(second.path):
            raise SpecError(
                f"compare {first.name} {second.name}: both are {first.path}; name different ones"
            )
    groups = [run.scores for run in runs]
    groups += [scores for run in runs if (scores := _stack_base_runs(run.sweep)) is not None]
    training_variance = estimate_training_variance(groups)
    combinations = list(itertools.combinations(runs, 2))
    pairs = [_compare_pair(*two, len(combinations), training_variance) for two in combinations]
    base_rows = []
    for run in runs:
        if run.sweep is not None and (row := _average_base_runs(run.sweep)) is not None:
            base_rows.append(row)
            pairs += _compare_with_base_row(run, row)
    has_training_variance = any(len(scores) > 1 for scores in groups)
    return RunComparison(tuple(runs), tuple(base_rows), tuple(pairs), has_training_variance)


def _resolve_folder(path: StorePath) -> str:
    """Return the same text for all names of a folder."""
    return str(path if path.local_path is None else path.local_path.resolve())


def _load_run(name: str, runs_folder: StorePath) -> ComparedRun:
    """Load what a name means. Raises SpecError if there is no such run, or it has no result."""
    found = find_run(name, runs_folder)
    if found is None:
        names = [run.path.name for run in list_runs(runs_folder)]
        raise SpecError(describe_unknown_name("sweep, trial or training run", name, names))
    if found.ledger is None:
        return _load_training_run(name, found.path)
    return _load_trial(name, found, found.ledger)


def _load_training_run(name: str, path: StorePath) -> ComparedRun:
    """Load a run of `raysweep train`."""
    run = load_training_run(path)
    verdicts = None
    if run.config is not None:
        verdicts = RunDirectory(path).read_verdicts(int(run.best["epoch"]))
    if run.config is None or verdicts is None:
        raise _make_missing_verdicts_error(name, has_result=run.config is not None)
    return ComparedRun(
        name=name,
        label=f"{run.config.method.name}, training run",
        path=path,
        config=run.config,
        metrics=run.best,
        n_choices=1,
        verdicts=verdicts,
        scores=verdicts.mask.astype(float)[None],
        autoattack_scores=None,
        data_fingerprint=_read_fingerprint(path),
        sweep=None,
    )


def _load_trial(name: str, found: FoundRun, ledger: Ledger) -> ComparedRun:
    """Load a trial, base run or repeat, or the best trial of a sweep."""
    if found.run_kind is None:
        if len(ledger.space.objectives) > 1:
            raise SpecError(
                f"compare {name}: the sweep has several objectives; name one of its trials, such "
                f"as {name}/0000"
            )
        trials = select_comparable_runs(ledger, ledger.rank_trials())
        if not trials:
            raise SpecError(f"compare {name}: no trial has ended with a result yet")
        trial, n_choices = trials[0], len(trials)
    else:
        (trial,) = (run for run in ledger.load_all_runs() if run.key == found.run_key)
        n_choices = 1
    verdicts = trial.best_verdicts
    if verdicts is None:
        raise _make_missing_verdicts_error(name, has_result=trial.state != "running")
    config = ledger.find_config(trial)
    scores = stack_verdicts(trial.trainings)
    if scores is None:
        # Its seeds were measured on different examples.
        trial = replace(trial, repeats=())
        scores = verdicts.mask.astype(float)[None]
    seeds = f", {len(scores)} seeds" if len(scores) > 1 else ""
    objective = verdicts.metric
    return ComparedRun(
        name=name,
        label=f"{config.method.name}, {trial.title}{seeds}",
        path=ledger.run_path(trial),
        config=config,
        metrics={**trial.best, objective: trial.best_epoch_value(objective)},
        n_choices=n_choices,
        verdicts=verdicts,
        scores=scores,
        autoattack_scores=stack_verdicts(trial.trainings, is_autoattack=True),
        data_fingerprint=_read_fingerprint(ledger.run_path(trial)),
        sweep=ledger if found.run_kind is None else None,
    )


def _make_missing_verdicts_error(name: str, *, has_result: bool) -> SpecError:
    """Make the error for a run of which it is not known which examples it gets right."""
    reason = "it has not ended with a result yet"
    if has_result:
        reason = "an earlier version of raysweep trained it, which did not record single examples"
    return SpecError(f"compare {name}: {reason}")


def _read_fingerprint(run_path: StorePath) -> str:
    """Return the fingerprint of the data of a run that has a checkpoint."""
    meta = RunDirectory(run_path).read_last_meta()
    return "" if meta is None else str(meta.get("data_fingerprint", ""))


def _require_comparable(first: ComparedRun, other: ComparedRun) -> None:
    """Raise SpecError unless both runs were measured in the same way on the same examples."""
    names = f"compare {first.name} {other.name}"
    if first.data_fingerprint != other.data_fingerprint:
        data = [f"{run.config.data.name} ({run.data_fingerprint})" for run in (first, other)]
        raise SpecError(f"{names}: they have different data: {data[0]} and {data[1]}")
    threats = [run.config.validation.threat for run in (first, other)]
    models = [run.config.validation.find_threat_model() for run in (first, other)]
    if models[0] != models[1]:
        raise SpecError(
            f"{names}: they have different threat models: {threats[0]} and {threats[1]}"
        )
    if _find_common_scores(first, other) is not None:
        return
    if first.verdicts.examples != other.verdicts.examples:
        raise SpecError(
            f"{names}: they were validated on different images: set data.val_size, "
            "data.split_seed and validation.size alike"
        )
    if first.verdicts.metric != other.verdicts.metric:
        metrics = f"{first.verdicts.metric} and {other.verdicts.metric}"
        raise SpecError(f"{names}: they have different objectives: {metrics}")
    settings = [_flatten_attacks(run.config) for run in (first, other)]
    path = next(
        path
        for path in dict.fromkeys([*settings[0], *settings[1]])
        if settings[0].get(path) != settings[1].get(path)
    )
    values = " and ".join(str(setting.get(path, "nothing")) for setting in settings)
    raise SpecError(
        f"{names}: they were validated by different attacks: validation.{path} = {values}"
    )


def _flatten_attacks(config: TrainingConfig) -> dict[str, object]:
    """Return {path: value} of the attacks that decide the objective."""
    settings = flatten_spec(config.validation)
    return {
        path: value for path, value in settings.items() if path.startswith(("attacks.", "finish."))
    }


def _find_common_scores(
    first: ComparedRun, second: ComparedRun
) -> tuple[FloatArray, FloatArray, bool] | None:
    """Return the scores of both runs, and whether they are those under AutoAttack.

    They are if both runs have them, else those of the objective. None if the runs were not measured
    on the same examples by the same attacks.
    """
    if first.verdicts.examples != second.verdicts.examples:
        return None
    scores = first.autoattack_scores, second.autoattack_scores
    if scores[0] is not None and scores[1] is not None and scores[0].shape[1] == scores[1].shape[1]:
        return scores[0], scores[1], True
    is_same_measure = first.verdicts.is_comparable(second.verdicts)
    if is_same_measure and _flatten_attacks(first.config) == _flatten_attacks(second.config):
        return first.scores, second.scores, False
    return None


def _compare_pair(
    first: ComparedRun, second: ComparedRun, n_pairs: int, training_variance: float
) -> RunPair:
    """Compare two runs on their common examples. Raises SpecError if there are none."""
    _require_comparable(first, second)
    common = _find_common_scores(first, second)
    assert common is not None
    first_scores, second_scores, is_autoattack = common
    # Each best trial was chosen: the pair is one of all pairs of the trials of both sweeps.
    n_comparisons = n_pairs * first.n_choices * second.n_choices
    return RunPair(
        first.title,
        second.title,
        "AutoAttack" if is_autoattack else first.verdicts.metric,
        first.verdicts.n_examples,
        compare_groups(first_scores, second_scores, n_comparisons, training_variance),
        n_comparisons,
    )


def _stack_base_runs(ledger: Ledger | None) -> FloatArray | None:
    """Return the scores of a sweep's base runs, (M, N); None if there are none."""
    runs = [] if ledger is None else select_comparable_runs(ledger, ledger.load_base_runs())
    return stack_verdicts(runs) if runs else None


def _average_base_runs(ledger: Ledger) -> BaseRow | None:
    """Return the means of a sweep's base runs that have a result; None if there are none."""
    runs = select_comparable_runs(ledger, ledger.load_base_runs())
    if not runs:
        return None
    names = set.intersection(*(set(run.best) for run in runs))
    metrics = {name: statistics.fmean(run.best[name] for run in runs) for name in sorted(names)}
    return BaseRow(
        ledger.name,
        f"base {ledger.space.base_method_name}, {format_count(len(runs), 'seed')}",
        metrics,
        _average_autoattack(runs),
    )


def _average_autoattack(runs: Sequence[Trial]) -> float | None:
    """Return the mean accuracy under AutoAttack; None unless it attacked all runs."""
    values = [run.robust_under_autoattack for run in runs]
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None


def _compare_with_base_row(run: ComparedRun, row: BaseRow) -> list[RunPair]:
    """Compare the best trial of a sweep with its base method, as the end of the sweep does."""
    comparison = None if run.sweep is None else compare_with_base(run.sweep)
    if comparison is None:
        return []
    attack = "AutoAttack" if comparison.is_autoattack else run.verdicts.metric
    return [
        RunPair(
            run.title,
            row.title,
            attack,
            comparison.n_examples,
            comparison.difference,
            comparison.n_compared,
        )
    ]
