"""raysweep train"""

import json
import math
import sys
from argparse import Namespace
from pathlib import Path

from rich.console import Console

from raysweep import storage
from raysweep.commands import (
    check_plain_name,
    format_ui_command,
    make_writable_folder,
    open_tracker,
    parse_overrides,
    resolve_runs_folder,
)
from raysweep.data import Dataset, load_data
from raysweep.formatting import format_count
from raysweep.leases import hold_folder_lease
from raysweep.spec import SpecError
from raysweep.terminal import format_accuracies, training_progress_bar
from raysweep.tracking import Tracker, training_run_tags
from raysweep.training.advice import advise_on_training
from raysweep.training.callbacks import FunctionCallback
from raysweep.training.checkpoint import RunDirectory, TrainingCheckpoint
from raysweep.training.config import TrainingConfig
from raysweep.training.failure_reports import BUG_TRACEBACK_KEY, FAILURE_KEY, failure_report
from raysweep.training.mid_epoch_checkpoint import TrainingInterrupted, catch_termination_signals
from raysweep.training.prefix_cache import PREFIX_CACHE_FOLDER, PrefixCache
from raysweep.training.presets import resolve_training_config
from raysweep.training.trainer import TrainingResult, check_resumable, train_model


def run_command(args: Namespace) -> int:
    config = resolve_training_config(args.method, parse_overrides(args))
    name = (
        check_plain_name(args.name, "--name")
        if args.name
        else f"{config.method.name}-{config.digest()[:8]}"
    )
    data = load_data(config.data)
    for line in config.list_warnings():
        print(f"raysweep: warning: {line}", file=sys.stderr)
    out, path = make_writable_folder(args.out), resolve_runs_folder(args) / name
    with hold_folder_lease(path):
        if storage.pull_file(path / "sweep.json"):
            raise SpecError(f"{storage.uri_of(path)} holds a sweep: choose another --name")
        if (last := RunDirectory(path).read_last_checkpoint()) is not None:
            # Before the tracker reopens what may be another run.
            check_resumable(last, config, data.fingerprint)
        return _train_tracked(args, config, data, open_tracker(out), path)


def _train_tracked(
    args: Namespace, config: TrainingConfig, dataset: Dataset, tracker: Tracker, run_folder: Path
) -> int:
    """Train and tell; however that ends, the run in MLflow is closed."""
    tags = training_run_tags(RunDirectory(run_folder))
    known = tracker.find_run(tags)
    reported = tracker.get_last_epoch(known) if known else 0
    run_id = tracker.get_or_create_run(run_folder.name, tags)
    try:
        tracker.log_config(run_id, config, dataset.fingerprint)
        fitted = _fit_model(config, dataset, tracker, run_id, run_folder, reported)
        advice = _log_training_result(config, tracker, run_id, fitted)
    except TrainingInterrupted as reason:
        tracker.end_run(run_id, "KILLED")
        print(f"raysweep: {reason}; the same command goes on from there", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        tracker.end_run(run_id, "KILLED")
        raise
    except (SpecError, storage.BucketUnavailable):
        tracker.end_run(run_id, "FAILED")
        raise
    except Exception as error:
        why = failure_report(error, config, run_folder, is_sweep_trial=False)
        more = (
            f"; its traceback is in {storage.uri_of(run_folder / 'error.txt')}"
            if BUG_TRACEBACK_KEY in why
            else ""
        )
        print(f"raysweep: training failed: {why[FAILURE_KEY]}{more}", file=sys.stderr)
        tracker.end_run(run_id, "FAILED")
        return 1
    return _print_training_result(args, config, tracker, fitted, advice)


def _fit_model(
    config: TrainingConfig,
    dataset: Dataset,
    tracker: Tracker,
    run_id: str,
    run_folder: Path,
    n_reported_epochs: int,
) -> TrainingResult:
    def report(metrics: dict[str, float], checkpoint: TrainingCheckpoint) -> None:
        epoch, loss = int(metrics["epoch"]), metrics["train/loss"]
        print(
            f"epoch {epoch}/{config.epochs} loss {loss:.3f} {format_accuracies(metrics)}",
            file=sys.stderr,
        )
        tracker.log_metrics(run_id, metrics, epoch)

    what, steps = (
        f"{config.method.name} on {config.data.name}",
        math.ceil(len(dataset.train) / config.batch_size),
    )
    print(
        f"{what}: {format_count(config.epochs, 'epoch')} of {format_count(steps, 'step')}, in {storage.uri_of(run_folder)}",
        file=sys.stderr,
    )
    store = PrefixCache(run_folder.parent / PREFIX_CACHE_FOLDER)
    with (
        catch_termination_signals() as told,
        training_progress_bar(Console(stderr=True), config.epochs, steps) as bar,
    ):
        return train_model(
            config,
            run_folder,
            FunctionCallback(report, on_step_end=bar, should_interrupt=told),
            data=dataset,
            prefix_cache=store,
            n_reported_epochs=n_reported_epochs,
        )


def _log_training_result(
    config: TrainingConfig, tracker: Tracker, run_id: str, training_result: TrainingResult
) -> list[str]:
    """What MLflow keeps of a run that has ended; the advice in it."""
    tracker.log_best(run_id, training_result.best_checkpoint.last_metrics)
    tracker.log_folder(run_id, training_result.best_checkpoint.path, "checkpoint")
    tracker.log_training_plots(
        run_id, training_result.last_checkpoint.path.parent, training_result.last_checkpoint.history
    )
    advice = advise_on_training(config, training_result.last_checkpoint.history)
    tracker.set_description(run_id, advice)
    tracker.end_run(run_id, "FINISHED")
    return advice


def _print_training_result(
    args: Namespace,
    config: TrainingConfig,
    tracker: Tracker,
    training_result: TrainingResult,
    advice: list[str],
) -> int:
    best = {k: v for k, v in training_result.best_checkpoint.last_metrics.items() if "/" not in k}
    where = storage.uri_of(training_result.best_checkpoint.path)
    if args.json:
        facts = {
            "checkpoint": where,
            "epoch": training_result.best_checkpoint.epoch,
            "metrics": best,
            "advice": advice,
        }
        print(json.dumps(facts, indent=1))
        return 0
    objective = config.validation.objective
    print(
        f"best epoch {training_result.best_checkpoint.epoch} by {objective}: {best[objective]:.3f}\n  {where}"
    )
    for line in advice:
        print(f"note: {line}")
    if tracker.uri:
        print(f"compare with\n  {format_ui_command(tracker.uri)}")
    return 0
