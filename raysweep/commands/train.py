"""`raysweep train`: run one training run in this process."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysweep.commands.options import (
    CommandParsers,
    add_code_option,
    add_command,
    add_json_option,
    add_location_options,
    add_override_options,
    add_verbose_option,
)

if TYPE_CHECKING:
    from raysweep.code_files import CodeFile
    from raysweep.data import DatasetSplits
    from raysweep.stores import StorePath
    from raysweep.tracking import RunRecorder, Tracker
    from raysweep.training.checkpoint import TrainingCheckpoint
    from raysweep.training.config import TrainingConfig
    from raysweep.training.metric_history import EpochMetrics
    from raysweep.training.trainer import TrainingFailed, TrainingResult

logger = logging.getLogger(__name__)

SUMMARY = "train one model, in this process"
DESCRIPTION = (
    "Trains one model and validates it after each epoch. The last and the best checkpoint go to "
    "runs/NAME, metrics and plots to MLflow. After Ctrl-C or a kill, run the same command "
    "to resume."
)
EXAMPLES = (
    "raysweep train gairat --set epochs=10",
    "raysweep train gairat --plan",
    "raysweep train lrat-table1 --data-dir DIR --name row",
)


@dataclass(frozen=True)
class TrainRequest:
    """What the user asked `raysweep train` or the function `raysweep.train` to do.

    Attributes:
        method: Name of a method or preset, or a YAML file of settings.
        name: Name of the run's folder; None for the method and the digest of the settings.
        overrides: {dotted path: value} of `--set`, `--data-dir` and `--code`.
        code: The file of `--code`; or None.
        out: Folder of `runs` and `mlflow.db`.
        storage: Folder or URI of checkpoints; None for `runs` in `out`.
        as_json: Whether to print JSON on stdout.
        plan_only: Whether to print what would be trained and to train nothing.
    """

    method: str
    name: str | None
    overrides: dict[str, Any]
    code: CodeFile | None
    out: Path
    storage: str | None
    as_json: bool
    plan_only: bool

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> TrainRequest:
        """Convert parsed arguments. Raises SpecError if `--set` or `--code` cannot be read."""
        from raysweep.code_files import open_code_file
        from raysweep.commands.common import parse_overrides

        code = None if args.code is None else open_code_file(args.code)
        return cls(
            method=args.method,
            name=args.name,
            overrides=parse_overrides(args.set, args.data_dir, code),
            code=code,
            out=args.out,
            storage=args.storage,
            as_json=args.json,
            plan_only=args.plan,
        )


def add_parser(parsers: CommandParsers) -> None:
    """Add the arguments of `raysweep train` to the command line."""
    parser = add_command(
        parsers, "train", run_command, summary=SUMMARY, description=DESCRIPTION, examples=EXAMPLES
    )
    parser.add_argument(
        "method",
        metavar="METHOD",
        help="a method or preset of `raysweep list`, or a YAML file of settings",
    )
    parser.add_argument(
        "--name",
        help="name of the run's folder (default: the method and the digest of the settings)",
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help="print what would be trained, and for about how long; train nothing",
    )
    add_override_options(parser)
    add_code_option(parser)
    add_location_options(parser)
    add_json_option(parser)
    add_verbose_option(parser)


@dataclass(frozen=True)
class EndedTraining:
    """A training run that has ended.

    Attributes:
        config: Its config.
        run_folder: Its folder.
        tracker: MLflow client with its records.
        result: Its checkpoints.
        advice: Notes on conspicuous metrics.
    """

    config: TrainingConfig
    run_folder: StorePath
    tracker: Tracker
    result: TrainingResult
    advice: list[str]


def run_command(args: argparse.Namespace) -> None:
    """Run `raysweep train`."""
    request = TrainRequest.from_args(args)
    if request.plan_only:
        _plan_training(request)
    else:
        _print_training_result(request, run_train_request(request))


def _plan_training(request: TrainRequest) -> None:
    """Check everything that the training needs, and print what would be trained."""
    from raysweep.commands.common import check_code
    from raysweep.data import load_data

    config, name = _choose_config(request)
    dataset = load_data(config.data)
    check_code(request.code, [config.model])
    _print_plan(request, config, dataset, name)


def run_train_request(request: TrainRequest) -> EndedTraining:
    """Train a model or resume its training, and print its progress but not its result.

    Args:
        request: What the user asked for, other than a plan.

    Raises:
        RaysweepError: A setting is wrong, and nothing was started; or the training failed, or was
            interrupted.
    """
    from raysweep.commands.common import (
        check_code,
        make_writable_folder,
        open_tracker,
        print_warnings,
        resolve_runs_folder,
    )
    from raysweep.data import load_data
    from raysweep.errors import InfrastructureError
    from raysweep.logs import discard_log, log_to_folder
    from raysweep.spec import SpecError
    from raysweep.stores import StoreUnavailable
    from raysweep.training.checkpoint import RunDirectory
    from raysweep.unrecorded_folders import UNRECORDED_FILE, clear_unrecorded

    config, name = _choose_config(request)
    # A wrong setting is reported before anything imports PyTorch.
    from raysweep.leases import hold_folder_lease
    from raysweep.training.trainer import check_resumable
    from raysweep.training.training_summary import list_data_warnings

    dataset = load_data(config.data)
    out = make_writable_folder(request.out)
    run_folder = resolve_runs_folder(request.out, request.storage) / name
    with hold_folder_lease(run_folder) as run_folder:
        if (run_folder / "sweep.json").is_file():
            raise SpecError(f"{run_folder} holds a sweep: choose another --name")
        checkpoint = RunDirectory(run_folder).read_last_checkpoint()
        if checkpoint is not None:
            # Check this before the tracker reopens an MLflow run that may have other settings.
            check_resumable(checkpoint, config, dataset.fingerprint)
        # Code with another SHA-256 than the recorded one has been refused by now.
        check_code(request.code, [config.model])
        print_warnings([*config.list_warnings(), *list_data_warnings(config, dataset)])
        tracker = open_tracker(out)
        is_new = not _list_run_files(run_folder)
        with log_to_folder(run_folder):
            try:
                return _train_tracked(config, dataset, tracker, run_folder)
            except StoreUnavailable:
                raise
            except (SpecError, InfrastructureError):
                if is_new and _list_run_files(run_folder) <= {"run.json", UNRECORDED_FILE}:
                    discard_log(run_folder)
                    clear_unrecorded(run_folder)
                    (run_folder / "run.json").delete()
                raise


def _list_run_files(run_folder: StorePath) -> set[str]:
    """Return the names of the files and folders in a run's folder, without its lock and logs."""
    names = {file.key[len(run_folder.key) + 1 :].split("/")[0] for file in run_folder.list_files()}
    return {name for name in names if not name.startswith((".", "lock", "log."))}


def _choose_config(request: TrainRequest) -> tuple[TrainingConfig, str]:
    """Return the config and the name of the run; a run of an earlier version keeps its defaults."""
    from raysweep.commands.common import check_plain_name, resolve_runs_folder
    from raysweep.training.checkpoint import RunDirectory
    from raysweep.training.presets import resolve_training_config

    if request.name:
        check_plain_name(request.name, "--name")

    def choose_name(config: TrainingConfig) -> str:
        return request.name or f"{config.method.name}-{config.digest()[:8]}"

    config = resolve_training_config(request.method, request.overrides)
    if request.storage is None and not (request.out / "runs").is_dir():
        return config, choose_name(config)
    runs_folder = resolve_runs_folder(request.out, request.storage, for_writing=False)
    for former in _build_former_configs(request):
        if former != config:
            saved = RunDirectory(runs_folder / choose_name(former)).read_last_checkpoint()
            if saved is not None and saved.config.replace(epochs=former.epochs) == former:
                return former, choose_name(former)
    return config, choose_name(config)


def _build_former_configs(request: TrainRequest) -> Iterator[TrainingConfig]:
    """Yield the configs that earlier versions gave the settings: 0.1, and the objective of 0.1."""
    from raysweep.spec import SpecError
    from raysweep.training.default_objective import FORMER_OBJECTIVE
    from raysweep.training.presets import resolve_training_config

    rules: tuple[tuple[bool, Mapping[str, Any]], ...] = ((True, {}), (False, FORMER_OBJECTIVE))
    for as_in_0_1, overrides in rules:
        try:
            yield resolve_training_config(
                request.method, {**overrides, **request.overrides}, as_in_0_1=as_in_0_1
            )
        except SpecError as error:
            logger.debug("with the defaults of an earlier version settings are wrong: %s", error)


def _print_plan(
    request: TrainRequest, config: TrainingConfig, dataset: DatasetSplits, name: str
) -> None:
    """Print what would be trained, in which folder and for about how long."""
    import joblib
    import torch

    from raysweep.commands.common import resolve_runs_folder
    from raysweep.disk_space import describe_needed_space, find_free_bytes
    from raysweep.formatting import format_count, format_duration
    from raysweep.sweep.epoch_timing import estimate_epoch_seconds
    from raysweep.sweep.plan import estimate_trial_bytes
    from raysweep.sweep.resources import Resources
    from raysweep.training.training_summary import (
        UNKNOWN_TIME,
        count_per_class,
        list_data_warnings,
        summarize_training,
        wrap_plan_line,
    )

    folder = resolve_runs_folder(request.out, request.storage, for_writing=False) / name
    resources = Resources(cpus=joblib.cpu_count(), gpus=float(torch.cuda.is_available()))
    epoch_seconds = estimate_epoch_seconds(config, dataset, resources)
    checkpoint_bytes, disk = estimate_trial_bytes(config, dataset), folder.local_path
    warnings = [*config.list_warnings(), *list_data_warnings(config, dataset)]
    validated = config.validation.select_split(dataset)
    if request.as_json:
        plan = {
            "folder": str(folder),
            "config": config.to_json_dict(),
            "image_shape": list(dataset.train.x.shape[1:]),
            "train_examples_per_class": count_per_class(dataset.train, dataset.classes),
            "validation_examples_per_class": count_per_class(validated, dataset.classes),
            "seconds_per_epoch": None if epoch_seconds is None else round(epoch_seconds, 2),
            "checkpoint_bytes": checkpoint_bytes,
            "free_bytes": None if disk is None else find_free_bytes(disk),
            "warnings": warnings,
        }
        print(json.dumps(plan, indent=1))
        return
    epochs = format_count(config.epochs, "epoch")
    duration = UNKNOWN_TIME
    if epoch_seconds is not None:
        duration = (
            f"one epoch with validation takes about {epoch_seconds:.1f} s, all {epochs} "
            f"{format_duration(epoch_seconds * config.epochs)}, estimated from a few steps"
        )
    lines = [
        f"{config.method.name} on {config.data.name}, {epochs}, in {folder}",
        *summarize_training(config, dataset),
        *(f"warning: {line}" for line in warnings),
        duration,
        describe_needed_space(checkpoint_bytes, disk),
    ]
    for line in lines:
        print("\n".join(wrap_plan_line(line)))


def _train_tracked(
    config: TrainingConfig, dataset: DatasetSplits, tracker: Tracker, run_folder: StorePath
) -> EndedTraining:
    """Train, and close the MLflow run however training ends."""
    from raysweep.bucket_lease import LeaseLost
    from raysweep.errors import (
        RaysweepError,
        get_first_line,
        is_infrastructure_error,
        is_interruption,
    )
    from raysweep.tracking import RunRecorder, training_run_tags
    from raysweep.training.checkpoint import RunDirectory
    from raysweep.training.failure_reports import (
        FAILURE_KEY,
        clear_failure_report,
        failure_report,
    )
    from raysweep.training.trainer import TrainingFailed

    clear_failure_report(run_folder)
    tags = training_run_tags(RunDirectory(run_folder))
    run = RunRecorder(tracker, run_folder.name, tags, run_folder)
    n_reported_epochs = run.count_logged_epochs()
    try:
        run.open(config, dataset)
        result = _fit_model(config, dataset, run, run_folder, n_reported_epochs)
        advice = run.log_result(config, result.best_checkpoint, result.last_checkpoint, dataset)
    except KeyboardInterrupt:
        run.end("KILLED")
        raise
    except LeaseLost:
        # Another process writes the run now.
        run.discard()
        raise
    except RaysweepError as error:
        run.end("KILLED" if is_interruption(error) else "FAILED")
        if isinstance(error, TrainingFailed):
            _save_reason(run_folder, get_first_line(error))
            raise error.with_prefix("training failed: ") from error
        raise
    except Exception as error:
        if is_infrastructure_error(error):
            run.end("KILLED" if is_interruption(error) else "FAILED")
            raise
        report = failure_report(error, config, run_folder, is_sweep_trial=False)
        run.end("FAILED")
        _save_reason(run_folder, report[FAILURE_KEY])
        raise _make_training_error(report, run_folder) from error
    finally:
        run.finish()
    return EndedTraining(config, run_folder, tracker, result, advice)


def _save_reason(run_folder: StorePath, reason: str) -> None:
    """Write why the run failed, for `show` and `list runs`."""
    from raysweep.errors import RaysweepError
    from raysweep.training.failure_reports import FAILURE_KEY, save_failure_report

    try:
        save_failure_report(run_folder, {FAILURE_KEY: reason})
    except (OSError, RaysweepError) as error:
        logger.warning("the reason of the failure cannot be written: %s", error)


def _make_training_error(report: dict[str, str], run_folder: StorePath) -> TrainingFailed:
    """Describe why training failed, and where the traceback is if raysweep is at fault."""
    from raysweep.training.failure_reports import BUG_TRACEBACK_KEY, FAILURE_KEY
    from raysweep.training.trainer import TrainingFailed

    traceback_hint = ""
    if BUG_TRACEBACK_KEY in report:
        traceback_hint = f"; its traceback is in {run_folder / 'error.txt'}"
    return TrainingFailed(f"training failed: {report[FAILURE_KEY]}{traceback_hint}")


def _fit_model(
    config: TrainingConfig,
    dataset: DatasetSplits,
    run: RunRecorder,
    run_folder: StorePath,
    n_reported_epochs: int,
) -> TrainingResult:
    """Train; print each epoch and log it to MLflow, apart from those reported before."""
    from raysweep.data import count_batches
    from raysweep.terminal import (
        create_progress_console,
        format_accuracies,
        training_progress_bar,
    )
    from raysweep.training.callbacks import FunctionCallback
    from raysweep.training.mid_epoch_checkpoint import catch_termination_signals
    from raysweep.training.prefix_cache import PREFIX_CACHE_FOLDER, PrefixCache
    from raysweep.training.resource_use import measure_resource_use
    from raysweep.training.trainer import train_model

    def report_epoch(metrics: EpochMetrics, checkpoint: TrainingCheckpoint) -> None:
        epoch, loss = int(metrics["epoch"]), metrics["train/loss"]
        accuracies = format_accuracies(metrics)
        print(f"epoch {epoch}/{config.epochs} loss {loss:.3f} {accuracies}", file=sys.stderr)
        run.log_epoch({**metrics, **measure_resource_use()})

    steps_per_epoch = count_batches(len(dataset.train), config.batch_size)
    _print_training_size(config, steps_per_epoch, run_folder)
    with (
        catch_termination_signals() as should_interrupt,
        training_progress_bar(
            create_progress_console(), config.epochs, steps_per_epoch
        ) as update_progress_bar,
    ):
        return train_model(
            config,
            run_folder,
            FunctionCallback(
                report_epoch, on_step_end=update_progress_bar, should_interrupt=should_interrupt
            ),
            data=dataset,
            prefix_cache=PrefixCache(run_folder.parent / PREFIX_CACHE_FOLDER),
            n_reported_epochs=n_reported_epochs,
        )


def _print_training_size(
    config: TrainingConfig, steps_per_epoch: int, run_folder: StorePath
) -> None:
    """Print what is trained, for how long and in which folder."""
    from raysweep.formatting import format_count

    epochs, steps = format_count(config.epochs, "epoch"), format_count(steps_per_epoch, "step")
    print(
        f"{config.method.name} on {config.data.name}: {epochs} of {steps}, in {run_folder}",
        file=sys.stderr,
    )


def _print_training_result(request: TrainRequest, ended: EndedTraining) -> None:
    """Print the best epoch with its checkpoint, the notes, and how to see the run in MLflow."""
    from raysweep.commands.common import format_ui_command

    best = ended.result.best_checkpoint
    metrics = {name: value for name, value in best.last_metrics.items() if "/" not in name}
    checkpoint = str(best.path)
    if request.as_json:
        summary = {
            "checkpoint": checkpoint,
            "epoch": best.epoch,
            "metrics": metrics,
            "advice": ended.advice,
        }
        print(json.dumps(summary, indent=1))
        return
    objective = ended.config.validation.objective
    print(f"best epoch {best.epoch} by {objective}: {metrics[objective]:.3f}\n  {checkpoint}")
    for line in ended.advice:
        print(f"note: {line}")
    if ended.tracker.uri:
        print(f"compare with\n  {format_ui_command(ended.tracker.uri)}")
