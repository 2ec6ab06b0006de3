"""Sweeps that stages run: shared by tune, train and promote."""

import logging
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from raysweep.data import DataSpec
from raysweep.errors import DamagedFileError
from raysweep.formatting import format_count
from raysweep.leases import hold_folder_lease
from raysweep.pipeline.artifact import Candidate, CheckpointKind
from raysweep.pipeline.facts import SweepSummary, TrialSummary
from raysweep.pipeline.stage import StageContext, StageFailed
from raysweep.result_loading import describe_guessing
from raysweep.spec import JsonDict, SpecError, json_digest
from raysweep.stores import StorePath
from raysweep.sweep.conclusions import describe_conclusions
from raysweep.sweep.epoch_counts import count_epochs
from raysweep.sweep.ledger import Ledger, delete_if_refused
from raysweep.sweep.search_space import (
    DEFAULT_BASE_RUNS,
    DEFAULT_FINALISTS,
    DEFAULT_SCORE_EPOCHS,
    SearchSpace,
)
from raysweep.sweep.trial import Trial
from raysweep.sweep.warm_start import WarmStart, collect_warm_start, save_warm_start
from raysweep.terminal import SweepDisplay
from raysweep.tracking import SweepTracker
from raysweep.training import checkpoint
from raysweep.training.config import TrainingConfig, build_training_config
from raysweep.training.dataset_defaults import DATASET_DEFAULTS, UNCHANGED_SINCE_0_1
from raysweep.training.selection import SelectionRule, rank_epoch
from raysweep.training.training_summary import list_data_warnings

if TYPE_CHECKING:
    from raysweep.sweep.resources import Resources
    from raysweep.sweep.tune_callbacks import SweepEndReason

logger = logging.getLogger(__name__)


def build_seed_grid(method: Any, overrides: dict[str, Any], seeds: tuple[int, ...]) -> SearchSpace:
    """Build a search space with one training run for each seed.

    A sweep distributes, resumes and tracks the runs, and trains equal prefixes only once.

    Args:
        method: Name or settings of the training method.
        overrides: Training settings by dotted path.
        seeds: Seeds of the runs.

    Returns:
        A grid whose only searched setting is `seed`.

    Raises:
        SpecError: If the settings are not valid.
    """
    space = SearchSpace.from_data(
        {
            "method": method,
            "metric": build_training_config(method, overrides).validation.objective,
            "base": overrides,
            "trials": len(seeds),
            "sampler": {"kind": "grid"},
            "scheduler": {"kind": "none"},
            "space": {"seed": {"categorical": list(seeds)}},
        }
    )
    space = space.with_dataset_defaults()
    if problems := space.find_problems():
        raise SpecError(problems)
    return space


def drop_data_location(space: SearchSpace) -> JsonDict:
    """Return the content of a search space that is part of a stage's digest.

    The location of the data is left out: the digest has the fingerprint of the data instead. The
    attacks of the default objective are left out too, so that what an earlier version has finished
    is not run again; a sweep that it has begun keeps its own.

    Args:
        space: The search space.

    Returns:
        The space without `finalists`, `base_runs` and `score_epochs` where they have their
        defaults; with a digest of the data set's defaults, if these are other ones than in 0.1.
    """
    location_keys = ("data.data_dir", "data.download")
    base = {key: value for key, value in space.base.items() if key not in location_keys}
    content = _with_former_objective(space).replace(base=base).to_stored_dict()
    # A stage that ended before there were these settings stays valid.
    for name, default in (
        ("finalists", DEFAULT_FINALISTS),
        ("base_runs", DEFAULT_BASE_RUNS),
        ("score_epochs", DEFAULT_SCORE_EPOCHS),
    ):
        if content.get(name) == default:
            del content[name]
    dataset_name = str(space.base.get("data.name", DataSpec().name))
    if dataset_name not in UNCHANGED_SINCE_0_1:
        content["dataset_defaults"] = json_digest(DATASET_DEFAULTS[dataset_name])
    return content


def _with_former_objective(space: SearchSpace) -> SearchSpace:
    """Return a space with the default objective of 0.1; itself if it sets the new attacks."""
    try:
        return space.replace(dataset_defaults=None).with_dataset_defaults(former_objective=True)
    except SpecError:
        return space


def describe_training(config: TrainingConfig) -> str:
    """Describe a training run in a few words: method, network, data set and epochs."""
    epochs = format_count(config.epochs, "epoch")
    return f"{config.method.name}, {config.model.name} on {config.data.name}, {epochs}"


def run_stage_sweep(
    context: StageContext,
    sweep_folder: StorePath,
    space: SearchSpace,
    cpus: float,
    gpus: float | None,
    max_hours: float | None = None,
    earlier_sweep_folders: Sequence[StorePath] = (),
) -> Ledger:
    """Run a sweep to its end or its time limit; resume it if it exists.

    Args:
        context: Folders and services.
        sweep_folder: Folder of the sweep.
        space: Search space of a new sweep.
        cpus: CPU cores of a trial.
        gpus: GPUs of a trial; None for one if the cluster has any.
        max_hours: Time limit in hours; None for no limit.
        earlier_sweep_folders: Sweeps whose results a new one begins with, the latest first.

    Returns:
        The ledger of the sweep.

    Raises:
        StageFailed: If no trial has a result.
        KeyboardInterrupt: If the sweep was interrupted.
    """
    from raysweep.sweep.resources import Resources

    with hold_folder_lease(sweep_folder) as held_folder:
        is_new = not (held_folder / "sweep.json").is_file()
        if is_new:
            ledger = _create_sweep(context, held_folder, space, earlier_sweep_folders)
        else:
            ledger = Ledger.open(held_folder)
        end_reason: SweepEndReason = "done"
        n_ended = ledger.count_ended_trials()
        has_work_left = ledger.has_work_left()
        logger.info(
            "sweep %s: %d of %d trials have ended already%s",
            sweep_folder.name,
            n_ended,
            space.n_trials,
            "" if has_work_left else ": its results are taken as they are",
            extra={"sweep": sweep_folder.name},
        )
        with delete_if_refused(ledger) if is_new else nullcontext():
            if has_work_left:
                context.connect_cluster()
            if has_work_left or context.has_missing_records:
                config = space.trial_config({})
                end_reason = _run_trials(context, ledger, config, Resources(cpus, gpus), max_hours)
    if end_reason == "interrupted":
        raise KeyboardInterrupt
    if ledger.find_best_trial() is None:
        reasons = [trial.reason for trial in ledger.load_trials() if trial.reason]
        reason = reasons[0] if reasons else "none reported the objective"
        raise StageFailed(f"no trial of {sweep_folder.name} has a result: {reason}")
    for line in [*describe_conclusions(ledger), *describe_guessing(ledger)]:
        context.print_line(f"{sweep_folder.name}: {line}")
    return ledger


def _run_trials(
    context: StageContext,
    ledger: Ledger,
    config: TrainingConfig,
    resources: "Resources",
    max_hours: float | None,
) -> "SweepEndReason":
    """Run what is left of a sweep, and write its records; return why it ended."""
    from raysweep.sweep.tune_callbacks import Budget, SweepFailed, SweepListener
    from raysweep.sweep.tuner import run_sweep

    dataset = context.get_dataset(config.data)
    for line in list_data_warnings(config, dataset):
        logger.warning("sweep %s: %s", ledger.name, line)
    listeners: list[SweepListener] = [
        SweepTracker(context.tracker, dataset, context.records),
        SweepDisplay(context.console),
    ]
    try:
        return run_sweep(
            ledger,
            listeners,
            resources,
            context.address,
            Budget(math.inf if max_hours is None else 3600 * max_hours),
            dataset.fingerprint,
            may_download=config.data.download,
        )
    except SweepFailed as error:
        raise StageFailed(error.problems) from error


def _create_sweep(
    context: StageContext,
    folder: StorePath,
    space: SearchSpace,
    earlier_sweep_folders: Sequence[StorePath],
) -> Ledger:
    """Create a sweep that begins with what earlier ones found, as far as they have results."""
    fingerprint = ""
    if earlier_sweep_folders:
        fingerprint = context.get_dataset(space.trial_config({}).data).fingerprint
    warm_start = WarmStart()
    for earlier_folder in earlier_sweep_folders:
        try:
            found = collect_warm_start(space, fingerprint, [Ledger.open(earlier_folder)])
        except (SpecError, DamagedFileError) as error:
            logger.info("no warm start from %s: %s", earlier_folder, error)
            continue
        # Each night tries the best settings of the night before again, so those of the latest night
        # are the best of all.
        points = warm_start.points or found.points
        warm_start = WarmStart((*warm_start.results, *found.results), points)
    if not warm_start.points:
        return Ledger.create(folder, space)
    context.print_line(f"{folder.name}: {warm_start.describe()}")
    ledger = Ledger.create(folder, warm_start.add_points(space))
    with delete_if_refused(ledger):
        save_warm_start(warm_start, ledger.path)
    return ledger


def make_candidate(
    context: StageContext,
    ledger: Ledger,
    trial: Trial,
    label: str,
    checkpoint_kind: CheckpointKind = "best",
    finalists: Collection[int] = (),
) -> Candidate:
    """Make a candidate from a checkpoint of a trial.

    Args:
        context: Folders and services.
        ledger: Ledger of the trial's sweep.
        trial: A trial with a result.
        label: Label of the candidate.
        checkpoint_kind: Whether to take the best or the last epoch.
        finalists: Numbers of the sweep's trials between which AutoAttack decides.

    Returns:
        The candidate, with the validation metrics of its epoch.
    """
    if checkpoint_kind == "best":
        path = ledger.best_checkpoint_path(trial)
    else:
        path = ledger.trial_path(trial.number) / f"epoch-{trial.epoch:04d}"
    saved = checkpoint.read_checkpoint(path)
    rule = SelectionRule(ledger.space.objectives[0])
    if trial.burn_in is not None:
        rule = SelectionRule.from_config(saved.config)
    rank = rank_epoch(saved.last_metrics, rule)
    is_finalist = checkpoint_kind == "best" and trial.number in finalists
    objective = ledger.space.objectives[0]
    score_rule = ledger.space.find_selection_rule(trial.params)
    # The last epoch need not lie in `validation.window`.
    is_sound = rank.is_after_burn_in and rank.is_above_chance
    return Candidate(
        label=label,
        method=saved.config.method.name,
        checkpoint=context.make_reference(path),
        checkpoint_kind=checkpoint_kind,
        seed=saved.config.seed,
        epoch=saved.epoch,
        epochs=saved.config.epochs,
        metrics={key: value for key, value in saved.last_metrics.items() if "/" not in key},
        params={key: value for key, value in trial.params.items() if key != "seed"},
        exceeds_masking_gap=ledger.exceeds_masking_gap(trial),
        is_ineligible=not (rank.is_eligible if checkpoint_kind == "best" else is_sound),
        objectives=ledger.space.objectives,
        selection_split=saved.config.validation.split,
        threat=saved.config.resolve_at(saved.epoch - 1).validation.threat,
        autoattack=trial.robust_under_autoattack if is_finalist else None,
        is_below_finalists=checkpoint_kind == "best" and bool(finalists) and not is_finalist,
        n_seeds=len(trial.trainings),
        mean_score=trial.best_epoch_value(objective) if trial.repeats else None,
        average=trial.score(objective) if checkpoint_kind == "best" and trial.averages else None,
        margin_factor=score_rule.margin_factor,
        score_epochs=score_rule.score_epochs,
    )


def iter_seed_candidates(
    context: StageContext, ledger: Ledger, label: str, checkpoint_kinds: tuple[CheckpointKind, ...]
) -> Iterator[Candidate]:
    """Yield the candidates of a sweep over seeds, in the order of its trials, without failed ones.

    Args:
        context: Folders and services.
        ledger: Ledger of the sweep.
        label: Label of all candidates.
        checkpoint_kinds: Checkpoints of each trial that become candidates.
    """
    succeeded = [trial for trial in ledger.rank_trials() if trial.state != "failed"]
    for trial in sorted(succeeded, key=lambda trial: trial.number):
        for checkpoint_kind in checkpoint_kinds:
            yield make_candidate(context, ledger, trial, label, checkpoint_kind)


def summarize_sweep(context: StageContext, ledger: Ledger) -> SweepSummary:
    """Summarize the cost and the trials of a sweep, for the report.

    Args:
        context: Folders and services.
        ledger: Ledger of the sweep.
    """
    trials = ledger.load_trials()
    runs = ledger.load_all_runs()
    epochs = count_epochs(runs)
    metric = ledger.space.objectives[0]
    return SweepSummary(
        path=context.make_reference(ledger.path),
        method=ledger.space.trial_config({}).method.name,
        metric=metric,
        epochs_completed=epochs.completed,
        epochs_trained=epochs.trained,
        seconds=sum(run.seconds for run in runs),
        trials=tuple(
            TrialSummary(
                number=t.number,
                state=t.state,
                params=t.params,
                score=t.score(metric) if metric in t.best else None,
                masking_gap=t.best.get("masking_gap"),
                reason=t.reason,
            )
            for t in trials
        ),
    )
