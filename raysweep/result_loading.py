"""Load models, sweeps and evaluations from a folder or URI, for notebooks and `--json`.

`load`, `load_sweep` and `load_report` can also be imported from `raysweep`.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from raysweep.argument_types import accept_scalars, check_argument_type
from raysweep.bounded_files import FileTooLarge, read_parquet_table
from raysweep.code_files import forget_code_afterwards, open_code_file, open_function_file
from raysweep.errors import DamagedFileError
from raysweep.formatting import format_count
from raysweep.leases import is_folder_in_use
from raysweep.run_lookup import (
    download_from_mlflow,
    find_best_checkpoint,
    find_checkpoint_folder,
    find_run,
    is_mlflow_reference,
    open_default_tracker,
)
from raysweep.spec import JsonDict, SpecError
from raysweep.stored_data import parse_stored_json
from raysweep.stores import Location, StorePath, open_path
from raysweep.sweep.base_comparison import BaseComparison, compare_with_base
from raysweep.sweep.epoch_counts import count_epochs
from raysweep.sweep.finalist_summary import summarize_finalists
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.repeat_summary import RepeatSummary, summarize_repeats
from raysweep.sweep.search_space import param_labels
from raysweep.sweep.spread_summary import SpreadSummary, summarize_spread
from raysweep.sweep.trial import Trial
from raysweep.sweep.trial_advice import advise_on_trial
from raysweep.training.checkpoint import RunDirectory
from raysweep.training.config import TrainingConfig
from raysweep.training.failure_reports import FAILURE_KEY, load_failure_report
from raysweep.training.metric_history import EpochMetrics
from raysweep.training.model_loading import load_checkpoint_target
from raysweep.training.selection import CHANCE_LIMIT_METRIC, find_best_epoch
from raysweep.user_folders import expand_home

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn


RunState = Literal["finished", "running", "interrupted", "failed"]


def load(
    path: str | Path,
    *,
    data_dir: str | Path | None = None,
    code: str | Path | Callable[..., nn.Module] | None = None,
) -> nn.Module:
    """Load a trained network.

    Args:
        path: What `raysweep eval` takes: a training run, a sweep (its best trial) or a trial of
            `./runs` by name; the folder or URI (s3://, gs://) of one of them or of a checkpoint;
            `models:/NAME@ALIAS` or `runs:/ID` of MLflow. Of a run the best epoch is loaded.
        data_dir: Folder of the training data, if it has changed since the training. The data must
            be readable: they decide the network's shape, and their fingerprint is compared with
            that of the training.
        code: File of your own with the network, or its function, if it is none of raysweep's. It
            must have the content with which the network was trained; no other file is imported.

    Returns:
        The network in eval mode, on the CPU. It maps images in [0, 1], (N, C, H, W), to logits,
        (N, classes).

    Raises:
        SpecError: There is no checkpoint, it is damaged, its data differ, its network is of another
            file than `code` or of none, or the bucket refuses access. One line.
        StoreUnavailable: The bucket does not answer.
        InfrastructureError: The MLflow store does not answer.
    """
    overrides = {} if data_dir is None else {"data_dir": str(expand_home(data_dir).resolve())}
    name, out = str(path), Path()
    with forget_code_afterwards():
        if callable(code):
            open_function_file(code)
        elif code is not None:
            open_code_file(expand_home(code))
        location: Location
        if is_mlflow_reference(name):
            _, location = download_from_mlflow(name, open_default_tracker(out), out)
        else:
            location = find_checkpoint_folder(name, open_path(out / "runs"))
        target = load_checkpoint_target(location, overrides)
    if code is not None and (target.config is None or target.config.model.code is None):
        raise SpecError(f"code = {code}: has no effect: {target.name} needs no code")
    return target.model


def load_sweep(path: Location) -> Sweep:
    """Open a sweep, finished or not.

    Args:
        path: A sweep of `./runs` by name, its folder, or its URI (s3://, gs://).

    Returns:
        The sweep. Each access to its properties reads its files again.

    Raises:
        SpecError: There is no sweep, its files are damaged, or the bucket refuses access. One line.
        StoreUnavailable: The bucket does not answer.
    """
    if isinstance(path, str) and not (open_path(path) / "sweep.json").is_file():
        found = find_run(path, open_path("runs"))
        if found is not None and found.ledger is not None:
            return Sweep(found.ledger)
    return Sweep(Ledger.open(path))


def load_report(path: str | Path) -> pd.DataFrame:
    """Load the examples of an evaluation that `raysweep eval` or `save_parquet` wrote.

    Args:
        path: Folder of the evaluation on this machine, or its `examples.parquet`.

    Returns:
        One row for each example with the columns of `RobustnessReport.columns`, such as `label`,
        `broken_by` (None for a robust example), `perturbation` and `queries`. `frame.attrs` is
        `RobustnessReport.summary`: accuracies, intervals, settings and warnings.

    Raises:
        SpecError: There is no such file, or it is not an evaluation of raysweep. One line.
        DamagedFileError: The file is damaged. One line.
    """
    file = expand_home(path)
    file = file / "examples.parquet" if file.is_dir() else file
    try:
        table = read_parquet_table(file)
        metadata = (table.schema.metadata or {})[b"raysweep.evaluation"]
        summary = parse_stored_json(metadata, str(file), {})
    except (OSError, ValueError, KeyError) as error:
        # A Parquet file of somebody else is valid, but lacks the key.
        is_damaged = isinstance(error, ValueError)
        problem = "not an evaluation of raysweep: give its folder or its examples.parquet"
        if isinstance(error, FileTooLarge):
            problem = str(error)
        raise (DamagedFileError if is_damaged else SpecError)(f"{path}: {problem}") from error
    frame: pd.DataFrame = table.to_pandas()
    frame.attrs = summary
    return frame


@dataclass(frozen=True, repr=False)
class Sweep:
    """Trials and epochs of a sweep as pandas tables.

    Attributes:
        ledger: Files of the sweep, for everything that is not in the tables.
    """

    ledger: Ledger

    def __repr__(self) -> str:
        """Return the name, how many trials have ended, and the best one, in a line."""
        ledger = self.ledger
        text = f"{ledger.count_ended_trials()} of {ledger.space.n_trials} trials ended"
        best = ledger.find_best_trial()
        if best is not None:
            score = best.score(ledger.space.objectives[0])
            text += f", best {best.title} with {ledger.space.score_name} {score:.3f}"
        return f"<Sweep {ledger.name}: {text}>"

    @property
    def trials(self) -> pd.DataFrame:
        """All trials, the best first. Trials without a value of the objective are last, by number.

        Returns:
            One row for each trial, with its number as index `trial`. The columns are:

            * `state`: "running", "finished", "stopped" (early), "failed", or "interrupted": it has
              not ended, and no process works on the sweep.
            * Each searched setting by its short name; None if the trial does not have it.
            * Metrics of the trial's best epoch, such as `epoch`, `clean`, `pgd`, `robust_worst`.
            * `before`: the objective at the best epoch before the instance weights acted; absent if
              no trial has such epochs.
            * `mean`: the mean over the seeds of a trial that was repeated, of its score if the
              sweep has such scores, else of the objective; and `seeds`, their number; absent if no
              trial was repeated.
            * `autoattack`: accuracy under AutoAttack on the validation images, of the trials that
              it attacked at the end of the sweep; and `corrected_score`, their scores lowered by
              as much as AutoAttack lowers the objective; absent if it attacked none.
            * `like_best`: "best" for the best trial, "yes" for one that cannot be told apart from
              it on the same validation images, or does better there, else ""; absent if trials
              cannot be compared.
            * `score`: the best mean of its objective over `SearchSpace.score_epochs` consecutive
              epochs, plus `SearchSpace.margin_factor` times the `robust_margin` of its best epoch;
              absent if the sweep ranks by the objective of the best epoch.
            * `choice`: what is wrong with the best epoch, such as "best before its weights acted";
              else "".
            * `epochs`: number of epochs that it has finished; `trained`: number of those that it
              trained itself and did not reuse.
            * `seconds`: wall time in seconds during which it occupied its resources.
            * `reason`: why it failed or was started again, else "".

        Raises:
            DamagedFileError: A trial's file is damaged.
        """
        import pandas as pd

        trials = _order_best_first(self.ledger.rank_trials(), self.ledger.load_trials())
        index = pd.Index([trial.number for trial in trials], name="trial")
        is_interrupted = self.ledger.is_interrupted()
        spread = summarize_spread(self.ledger)
        rows = [self._build_trial_row(trial, is_interrupted, spread) for trial in trials]
        table = pd.DataFrame(rows, index=index)
        if not any(trial.best_in_burn_in for trial in trials):
            table = table.drop(columns="before", errors="ignore")
        if not any(trial.repeats for trial in trials):
            table = table.drop(columns=["mean", "seeds"], errors="ignore")
        if all(trial.robust_under_autoattack is None for trial in trials):
            table = table.drop(columns=["autoattack", "corrected_score"], errors="ignore")
        return table

    @property
    def epochs(self) -> pd.DataFrame:
        """All epochs of all trials.

        Returns:
            One row for each epoch, with the index (`trial`, `epoch`) and a column for each metric.

        Raises:
            DamagedFileError: A trial's file or checkpoint is damaged.
        """
        import pandas as pd

        rows: list[dict[str, float]] = []
        trial_numbers: list[int] = []
        for trial in self.ledger.load_trials():
            history = RunDirectory(self.ledger.trial_path(trial.number)).read_history()
            rows.extend(history)
            trial_numbers.extend([trial.number] * len(history))
        epochs = [int(row["epoch"]) for row in rows]
        index = pd.MultiIndex.from_arrays([trial_numbers, epochs])
        return pd.DataFrame(rows, index=index.set_names(["trial", "epoch"]))

    @property
    def best(self) -> StorePath:
        """Checkpoint of the best epoch of the best trial.

        Returns:
            Its folder, which `load` accepts.

        Raises:
            SpecError: No trial has a value of the objective yet, or all that have one failed.
        """
        return find_best_checkpoint(self.ledger)

    @property
    def spread(self) -> SpreadSummary | None:
        """Which trials cannot be told apart from the best, and what the spread of all consists of.

        None if trials cannot be compared; see `spread_summary.summarize_spread`.

        Raises:
            DamagedFileError: A trial's file is damaged.
        """
        return summarize_spread(self.ledger)

    @property
    def repeats(self) -> RepeatSummary | None:
        """What further seeds show about the best trials; None if no trial was repeated.

        Raises:
            DamagedFileError: A trial's file is damaged.
        """
        return summarize_repeats(self.ledger)

    @property
    def base_comparison(self) -> BaseComparison | None:
        """Whether the best trial beats the base method, the method without instance weights.

        None if there is nothing to compare; see `base_comparison.compare_with_base`.

        Raises:
            DamagedFileError: A trial's file is damaged.
        """
        return compare_with_base(self.ledger)

    @property
    def state(self) -> RunState:
        """Whether all trials have ended, a process works on the others, or it was interrupted.

        Raises:
            DamagedFileError: A trial's file is damaged.
        """
        return find_sweep_state(self.ledger)

    @property
    def resume_command(self) -> str:
        """The command line that resumes an interrupted sweep; "" for others."""
        return format_resume_command(self.ledger) if self.ledger.is_interrupted() else ""

    @accept_scalars
    def advice(self, trial: int) -> list[str]:
        """Explain conspicuous metrics of a trial, such as symptoms of masked gradients.

        Args:
            trial: Number of the trial.

        Returns:
            Sentences; empty before the first epoch, or if no metric is conspicuous.

        Raises:
            SpecError: The trial's last checkpoint is damaged, or `trial` is not an int.
        """
        check_argument_type("trial", trial, (int,), "the number of a trial")
        return advise_on_trial(self.ledger, trial)

    def _build_trial_row(
        self, trial: Trial, is_interrupted: bool, spread: SpreadSummary | None
    ) -> dict[str, Any]:
        """Return a row of `trials`."""
        paths = list(self.ledger.space.space)
        labels, objective = param_labels(paths), self.ledger.space.objectives[0]
        has_score = self.ledger.space.has_score
        return {
            "state": trial.describe_state(is_interrupted),
            **{labels[path]: trial.params.get(path) for path in paths},
            **{name: value for name, value in trial.best.items() if "/" not in name},
            **({"score": trial.averages.get(objective)} if has_score else {}),
            "before": trial.best_in_burn_in.get(objective),
            "mean": trial.score(objective) if trial.repeats else None,
            "seeds": len(trial.trainings),
            "autoattack": trial.robust_under_autoattack,
            "corrected_score": trial.find_corrected_score(objective),
            **({} if spread is None else {"like_best": spread.describe_mark(trial)}),
            "choice": self.ledger.describe_choice(trial),
            "epochs": trial.epoch,
            "trained": trial.trained_epochs,
            "seconds": trial.seconds,
            "reason": trial.reason,
        }


def find_sweep_state(ledger: Ledger) -> RunState:
    """Return whether a sweep has finished; if not, whether a process works on it."""
    if ledger.has_ended():
        return "finished"
    return "interrupted" if ledger.is_interrupted() else "running"


def format_resume_command(ledger: Ledger) -> str:
    """Return the command line that resumes a sweep from this working directory."""
    words = ["raysweep", "tune", "--resume", ledger.name]
    folder = ledger.path.parent
    if folder.local_path is None or folder.name != "runs":
        words += ["--storage", str(folder)]
    elif folder.local_path.parent != Path.cwd():
        words += ["--out", str(folder.local_path.parent)]
    return shlex.join(words)


@dataclass(frozen=True, repr=False)
class TrainingRun:
    """What is known about a run of `raysweep train`.

    Attributes:
        name: Name of its folder.
        path: Its folder.
        state: "finished"; "running"; "failed"; or "interrupted", also by its surroundings.
        config: Its config; None before its first epoch.
        n_epochs: Number of epochs that it has finished.
        best: Metrics of its best epoch; empty before the first.
        checkpoint: Checkpoint of its best epoch; None before the first.
        reason: Why it failed, in one line; else "".
    """

    name: str
    path: StorePath
    state: RunState
    config: TrainingConfig | None = None
    n_epochs: int = 0
    best: EpochMetrics = field(default_factory=dict)
    checkpoint: StorePath | None = None
    reason: str = ""

    def __repr__(self) -> str:
        """Return the name, the state and the best epoch, in a line."""
        text = f"{self.state} after {format_count(self.n_epochs, 'epoch')}"
        if self.config is not None:
            objective = self.config.validation.objective
            value = self.best.get(objective, math.nan)
            text += f", best epoch {int(self.best['epoch'])} with {objective} {value:.3f}"
        return f"<TrainingRun {self.name}: {text}>"

    def to_json_dict(self) -> JsonDict:
        """Convert to plain data for `--json`."""
        return {
            "run": self.name,
            "path": str(self.path),
            "state": self.state,
            "reason": self.reason,
            "config": self.config.to_stored_dict() if self.config else None,
            "epochs": self.n_epochs,
            "best": {name: value for name, value in self.best.items() if "/" not in name},
            "checkpoint": str(self.checkpoint) if self.checkpoint else None,
        }


def load_training_run(path: Location) -> TrainingRun:
    """Read what is known about a training run. Weights are not read.

    Args:
        path: Its folder.

    Raises:
        DamagedFileError: Its last checkpoint is damaged.
    """
    directory = RunDirectory(path)
    meta = directory.read_last_meta()
    reason = ""
    state: RunState = "running"
    if not is_folder_in_use(directory.path):
        reason = load_failure_report(directory.path).get(FAILURE_KEY, "")
        state = "failed" if reason else "interrupted"
    if meta is None:
        return TrainingRun(directory.path.name, directory.path, state, reason=reason)
    config = TrainingConfig.from_data(meta["config"], str(directory.path), stored=True)
    history = meta["history"]
    best_epoch = find_best_epoch(config, history, directory.list_saved_epochs())
    if len(history) >= config.epochs:
        state, reason = "finished", ""
    return TrainingRun(
        directory.path.name,
        directory.path,
        state,
        config,
        len(history),
        {"epoch": best_epoch, **history[best_epoch - 1]},
        directory.epoch_path(best_epoch),
        reason,
    )


def describe_masking_effect_on_ranking(ledger: Ledger) -> list[str]:
    """Describe how a ranking by PGD alone would differ, because masked gradients mislead it.

    Only trials with values of both `pgd` and `robust_worst` are compared.

    Args:
        ledger: The sweep.

    Returns:
        Up to two lines: the trial that PGD alone would have chosen, and how much lower its
        `robust_worst` is than that of the first trial; the trials with a masking gap above the
        space's limit.
    """
    measured_trials = []
    for trial in ledger.rank_trials():
        has_both = "pgd" in trial.best and "robust_worst" in trial.best
        if has_both and trial.state != "failed":
            measured_trials.append(trial)
    masking_trials = [trial for trial in measured_trials if ledger.exceeds_masking_gap(trial)]
    ranks = {trial.number: ledger.rank_trial(trial) for trial in measured_trials}
    chosen = next((trial for trial in measured_trials if ranks[trial.number].is_eligible), None)
    lines = []
    if chosen is not None:
        sound_trials = [t for t in measured_trials if not ranks[t.number].has_ineligible_best]
        best_by_pgd = max(sound_trials, key=lambda trial: trial.best_epoch_value("pgd"))
        # Another trial than the chosen one may have the best single epoch.
        cost = chosen.best_epoch_value("robust_worst") - best_by_pgd.best_epoch_value(
            "robust_worst"
        )
        if cost > 0:
            lines.append(
                f"PGD would have chosen trial {best_by_pgd.number:04d}, "
                f"at a cost of {cost:.3f} in robust worst"
            )
    if masking_trials:
        numbers = ", ".join(f"{trial.number:04d}" for trial in masking_trials)
        lines.append(
            f"masking gap over {ledger.space.max_masking_gap}: trials {numbers} are ranked last"
        )
    return lines


def describe_guessing(ledger: Ledger) -> list[str]:
    """Say if no trial of a sweep is better than guessing, so that their order means nothing.

    Args:
        ledger: The sweep.

    Returns:
        One line; empty if a trial is better, or if none has a result.
    """
    trials = [trial for trial in ledger.rank_trials() if trial.state != "failed"]
    rows = [trial.best for trial in trials]
    is_guessing = [row.get("clean", 1.0) <= row.get(CHANCE_LIMIT_METRIC, -math.inf) for row in rows]
    if not rows or not all(is_guessing):
        return []
    clean = max(row["clean"] for row in rows)
    limit = max(row[CHANCE_LIMIT_METRIC] for row in rows)
    return [
        f"no trial is better than guessing: at most {clean:.3f} of natural images are right, and "
        f"guessing reaches {limit:.3f}; their order means nothing. Train for more epochs, or with "
        "another optim.lr"
    ]


def sweep_to_json(ledger: Ledger) -> JsonDict:
    """Convert a sweep to plain data for `--json`.

    Args:
        ledger: The sweep.

    Returns:
        Its name, location, space and state, and the command that resumes it, or None; epochs that
        the trials reported (`asked`), trained and reused (`saved`); the numbers of the Pareto
        front; the results of AutoAttack on the finalists (see `FinalistSummary`), or None; why it
        ended before its last trial ("told-apart", "flat"), or None (`ended_early`); which
        trials cannot be told apart (see `SpreadSummary`), or None; whether the best one beats the
        base method (see `BaseComparison`), or None, and the base runs; advice on the
        best trial; what further seeds show (see `RepeatSummary`), or None
        (`seeds`), and the repeats; all trials, best first, as from `trial_to_json`.
    """
    ranked_trials, trials = ledger.rank_trials(), ledger.load_trials()
    best_trial = ledger.find_best_trial()
    base_runs, repeats = ledger.load_base_runs(), ledger.load_repeats()
    epochs = count_epochs([*trials, *base_runs, *repeats])
    is_interrupted = ledger.is_interrupted()
    finalists, spread = summarize_finalists(ledger), summarize_spread(ledger)
    base, seeds = compare_with_base(ledger), summarize_repeats(ledger)
    return {
        "sweep": ledger.name,
        "path": str(ledger.path),
        "state": find_sweep_state(ledger),
        "resume": format_resume_command(ledger) if is_interrupted else None,
        "space": ledger.space.to_stored_dict(),
        "epochs": {
            "asked": epochs.completed,
            "trained": epochs.trained,
            "saved": epochs.reused,
        },
        "front": [trial.number for trial in ledger.unmasked_pareto_front()],
        "finalists": finalists.to_json_dict() if finalists else None,
        "ended_early": ledger.load_early_end(),
        "comparison": spread.to_json_dict() if spread else None,
        "base": base.to_json_dict() if base else None,
        "base_runs": [trial_to_json(ledger, run, is_interrupted) for run in base_runs],
        "seeds": seeds.to_json_dict() if seeds else None,
        "repeats": [trial_to_json(ledger, run, is_interrupted) for run in repeats],
        "advice": advise_on_trial(ledger, best_trial.number) if best_trial else [],
        "trials": [
            trial_to_json(ledger, trial, is_interrupted)
            for trial in _order_best_first(ranked_trials, trials)
        ],
    }


def trial_to_json(ledger: Ledger, trial: Trial, is_interrupted: bool) -> JsonDict:
    """Convert a trial to plain data for `--json`.

    Args:
        ledger: The sweep.
        trial: One of its trials.
        is_interrupted: Whether no process works on the sweep; see `Ledger.is_interrupted`.

    Returns:
        The content of its trial.json, with `state` as from `Trial.describe_state`; `seeds`, on how
        many of them its rank is based; `score`, by which it is ranked before AutoAttack;
        `corrected_score`, the score lowered by AutoAttack, by which finalists are ranked, or None;
        `checkpoint`, the location of its best checkpoint; `masks`, whether it exceeds the masking
        gap; and `choice`, what is wrong with its best epoch, or "". `score` and `checkpoint` are
        None before the first value of the objective.
    """
    checkpoint = str(ledger.best_checkpoint_path(trial)) if trial.best else None
    objective = ledger.space.objectives[0]
    return trial.to_stored_dict() | {
        "state": trial.describe_state(is_interrupted),
        "seeds": len(trial.trainings),
        "score": trial.score(objective) if objective in trial.best else None,
        "corrected_score": trial.find_corrected_score(objective),
        "checkpoint": checkpoint,
        "masks": ledger.exceeds_masking_gap(trial),
        "choice": ledger.describe_choice(trial),
    }


def _order_best_first(ranked_trials: list[Trial], trials: list[Trial]) -> list[Trial]:
    """Order `trials` as ranked; those without a value of the objective come last, by number."""
    trial_by_number = {trial.number: trial for trial in [*ranked_trials, *trials]}
    return list(trial_by_number.values())
