"""`raysweep tune`: run a sweep."""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysweep.commands.options import (
    CommandParsers,
    add_address_option,
    add_code_option,
    add_command,
    add_json_option,
    add_location_options,
    add_override_options,
    add_verbose_option,
    parse_duration,
    parse_non_negative,
    parse_path,
    parse_positive_int,
)

if TYPE_CHECKING:
    from raysweep.code_files import CodeFile
    from raysweep.data import DatasetSplits
    from raysweep.stores import StorePath
    from raysweep.sweep.ledger import Ledger
    from raysweep.sweep.resources import Resources
    from raysweep.sweep.search_space import SearchSpace
    from raysweep.sweep.tune_callbacks import Budget, SweepEndReason, SweepListener
    from raysweep.sweep.warm_start import WarmStart
    from raysweep.tracking import Tracker

SUMMARY = "run a sweep: Ray Tune runs trials, Optuna proposes settings, MLflow records them"
DESCRIPTION = (
    "Searches the search space of a method. Optuna proposes settings, Ray runs the trials in "
    "parallel (on this machine, unless --address names a cluster), ASHA stops the poor ones, and "
    "MLflow records all of them. --resume resumes a sweep after Ctrl-C, kill -9 or a reboot; "
    "with more --trials or --set epochs= it extends a finished sweep."
)
EXAMPLES = (
    "raysweep tune lrat --plan",
    "raysweep tune gairat --trials 30 --name g1",
    "raysweep tune gairat --resume g1 --trials 60",
)


@dataclass(frozen=True)
class TuneRequest:
    """What the user asked `raysweep tune` or the function `raysweep.tune` to do.

    Attributes:
        method: Name of the method; None if the space or the resumed sweep names it.
        space_file: YAML file of the search space; None for the built-in one of the method.
        trials: Number of trials; None for the number in the space.
        max_seconds: Wall time after which the sweep ends; None for no limit.
        max_gpu_hours: GPU hours that trials may hold before the sweep ends; None for no limit.
        name: Name of a new sweep; None for the method and the time.
        resume: Name of the sweep to resume or extend; None to start one.
        plan_only: Whether to print what would run and to run nothing.
        address: Ray cluster, `auto` or `host:port`; None for $RAY_ADDRESS or this machine.
        cpus_per_trial: Logical CPUs that each trial holds.
        gpus_per_trial: GPUs that each trial holds; None for one per worker, if there are any.
        workers: Number of processes that share a trial.
        optuna_url: Optuna storage to which trials are also written; None to write to none.
        retry_failed: Whether `resume` runs all failed trials again.
        overrides: {dotted path: value} of `--set`, `--data-dir` and `--code`.
        code: The file of `--code`; or None.
        out: Folder of `runs` and `mlflow.db`.
        storage: Folder or URI of sweeps; None for `runs` in `out`.
        as_json: Whether to print JSON on stdout.
        warm_start: Names or folders of earlier sweeps whose results a new one begins with.
    """

    method: str | None
    space_file: Path | None
    trials: int | None
    max_seconds: float | None
    max_gpu_hours: float | None
    name: str | None
    resume: str | None
    plan_only: bool
    address: str | None
    cpus_per_trial: float
    gpus_per_trial: float | None
    workers: int
    optuna_url: str | None
    overrides: dict[str, Any]
    code: CodeFile | None
    out: Path
    storage: str | None
    as_json: bool
    retry_failed: bool = False
    warm_start: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raise SpecError if a part of the request has no effect."""
        from raysweep.spec import SpecError

        if self.retry_failed and not self.resume:
            raise SpecError("--retry-failed: names no sweep; add --resume NAME")
        if self.warm_start and self.resume:
            raise SpecError(
                "--warm-start: only a new sweep can begin with earlier results; leave it out, or "
                "start a new sweep"
            )

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> TuneRequest:
        """Convert parsed arguments. Raises SpecError if one is malformed or has no effect."""
        from raysweep.code_files import open_code_file
        from raysweep.commands.common import parse_overrides
        from raysweep.sweep.search_space import resolve_space_path

        code = None if args.code is None else open_code_file(args.code)
        return cls(
            method=args.method,
            space_file=None if args.space is None else resolve_space_path(args.space),
            trials=args.trials,
            max_seconds=args.max_time,
            max_gpu_hours=args.max_gpu_hours,
            name=args.name,
            resume=args.resume,
            plan_only=args.plan,
            address=args.address,
            cpus_per_trial=args.cpus_per_trial,
            gpus_per_trial=args.gpus_per_trial,
            workers=args.workers,
            optuna_url=args.optuna,
            overrides=parse_overrides(args.set, args.data_dir, code),
            code=code,
            out=args.out,
            storage=args.storage,
            as_json=args.json,
            retry_failed=args.retry_failed,
            warm_start=tuple(args.warm_start),
        )


def add_parser(parsers: CommandParsers) -> None:
    """Add the arguments of `raysweep tune` to the command line."""
    parser = add_command(
        parsers, "tune", run_command, summary=SUMMARY, description=DESCRIPTION, examples=EXAMPLES
    )
    _add_search_options(parser)
    _add_resource_options(parser)
    add_override_options(parser)
    add_code_option(parser)
    add_location_options(parser)
    add_json_option(parser)
    add_verbose_option(parser)


def _add_search_options(parser: argparse.ArgumentParser) -> None:
    """Add what is searched, for how long and under which name."""
    parser.add_argument(
        "method",
        nargs="?",
        metavar="METHOD",
        help="a method of `raysweep list`; not needed with --space or --resume",
    )
    parser.add_argument(
        "--space",
        type=parse_path,
        metavar="FILE",
        help="search space: a YAML file or a name of `raysweep list` (default: the method's own)",
    )
    parser.add_argument(
        "--trials",
        type=parse_positive_int,
        metavar="N",
        help="number of trials (default: that of the space)",
    )
    parser.add_argument(
        "--max-trials",
        type=parse_positive_int,
        dest="trials",
        metavar="N",
        help="the same as --trials",
    )
    parser.add_argument(
        "--max-time",
        type=parse_duration,
        metavar="T",
        help="end after a time such as 90s, 30m or 2h; --resume runs the rest",
    )
    parser.add_argument(
        "--max-gpu-hours",
        type=parse_non_negative,
        metavar="H",
        help="end when the trials have held GPUs for H hours",
    )
    names = parser.add_mutually_exclusive_group()
    names.add_argument("--name", help="name of the sweep (default: the method and the time)")
    names.add_argument(
        "--resume",
        metavar="NAME",
        help="resume a sweep; --trials, --set epochs= and --space extend it; trials that ended for "
        "lack of disk, memory or processes run again",
    )
    parser.add_argument(
        "--retry-failed",
        action="store_true",
        help="with --resume: run all failed trials again, also those that failed by their settings",
    )
    parser.add_argument(
        "--warm-start",
        nargs="+",
        default=[],
        metavar="SWEEP",
        help="begin with what earlier sweeps found: their results on the same data, and their best "
        "settings, which are tried first",
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help="print what would run, on which resources and for how long; run nothing",
    )


def _add_resource_options(parser: argparse.ArgumentParser) -> None:
    """Add the cluster, what a trial holds of it, and the Optuna storage."""
    add_address_option(parser)
    parser.add_argument(
        "--cpus-per-trial",
        type=parse_non_negative,
        default=1.0,
        metavar="N",
        help="logical CPUs that each trial holds (default: 1)",
    )
    parser.add_argument(
        "--gpus-per-trial",
        type=parse_non_negative,
        metavar="N",
        help="GPUs that each trial holds, may be a fraction (default: one per worker, if there are "
        "any)",
    )
    parser.add_argument(
        "--optuna",
        metavar="URL",
        help="also write the trials to this Optuna storage: sqlite:///optuna.db or journal.log",
    )
    parser.add_argument(
        "--workers",
        type=parse_positive_int,
        default=1,
        metavar="N",
        help="processes that share a trial (default: 1)",
    )


@dataclass(frozen=True)
class _PreparedSweep:
    """A sweep whose settings and data have been checked.

    Attributes:
        runs_folder: Folder of all sweeps.
        sweep_folder: Folder of this one.
        space: Its search space.
        dataset: Its data.
        resources: What a trial holds.
        resumed_ledger: The sweep to resume, as it is; or None.
        is_finished: Whether it has nothing left to run.
        export_listeners: Listeners that write its trials to the storage of --optuna; empty without
            this option, and for a plan.
        warm_start: Results of earlier sweeps with which it begins; or None.
    """

    runs_folder: StorePath
    sweep_folder: StorePath
    space: SearchSpace
    dataset: DatasetSplits
    resources: Resources
    resumed_ledger: Ledger | None
    is_finished: bool
    export_listeners: list[SweepListener]
    warm_start: WarmStart | None


@dataclass(frozen=True)
class EndedSweep:
    """A sweep after a call of `run_sweep`.

    Attributes:
        ledger: The sweep.
        tracker: MLflow client with its records.
        end_reason: Why the call ended.
    """

    ledger: Ledger
    tracker: Tracker
    end_reason: SweepEndReason


def run_command(args: argparse.Namespace) -> None:
    """Run `raysweep tune`."""
    from raysweep.commands._sweep_result_output import print_sweep_result, report_sweep_end

    request = TuneRequest.from_args(args)
    if request.plan_only:
        with _prepare_sweep(request) as prepared:
            _print_plan(request, prepared)
        return
    ended = run_tune_request(request)
    print_sweep_result(request, ended.ledger, ended.tracker)
    report_sweep_end(request, ended.ledger, ended.end_reason)


def run_tune_request(request: TuneRequest) -> EndedSweep:
    """Run or resume a sweep, and print its progress but not its result.

    Args:
        request: What the user asked for, other than a plan.

    Raises:
        RaysweepError: See `run_sweep`; or a setting is wrong, and nothing was started.
    """
    with _prepare_sweep(request) as prepared:
        return _run_prepared_sweep(request, prepared)


@contextmanager
def _prepare_sweep(request: TuneRequest) -> Iterator[_PreparedSweep]:
    """Check everything that the sweep needs, before it starts; its cluster starts meanwhile."""
    from raysweep.commands.common import check_plain_name, resolve_runs_folder
    from raysweep.data import DataSpec
    from raysweep.sweep.cluster_start import prepare_cluster
    from raysweep.sweep.ledger import Ledger, check_folder_is_free

    runs_folder = resolve_runs_folder(
        request.out, request.storage, for_writing=not request.plan_only
    )
    resumed_ledger = None
    if request.resume:
        resumed_ledger = Ledger.open(runs_folder / check_plain_name(request.resume, "--resume"))
    space = _load_checked_space(request, resumed_ledger)
    resources = _make_resources(request)
    sweep_folder = runs_folder / _choose_sweep_name(request, space)
    if not request.plan_only and resumed_ledger is None:
        check_folder_is_free(sweep_folder)
    earlier_ledgers = _find_warm_start_ledgers(request, runs_folder)
    is_finished = (
        resumed_ledger is not None
        and resumed_ledger.space == space
        and not resumed_ledger.has_work_left(request.retry_failed)
    )
    data_spec = space.trial_config({}).data
    # The default data set is a file of scikit-learn: it needs no folder and cannot be missing.
    needs_no_folder = data_spec.name == DataSpec().name
    dataset = None
    if data_spec.data_dir is None and not needs_no_folder:
        # This raises SpecError if the folder is missing, before anything is made or started.
        dataset = _load_dataset(request, space, resumed_ledger)
    may_lack_data = dataset is None and not needs_no_folder
    export_listeners = [] if may_lack_data else _make_outputs(request)
    needs_workers = not request.plan_only and not is_finished
    # Ray takes seconds to start, in which this process imports libraries and reads the data.
    with prepare_cluster(request.address) if needs_workers else nullcontext() as cluster_start:
        if may_lack_data:
            dataset = _load_dataset(request, space, resumed_ledger)
            export_listeners = _make_outputs(request)
        if cluster_start is not None:
            cluster_start.begin()
        if dataset is None:
            dataset = _load_dataset(request, space, resumed_ledger)
        warm_start = _collect_warm_start(space, dataset, earlier_ledgers)
        if warm_start is not None:
            space = warm_start.add_points(space)
        yield _PreparedSweep(
            runs_folder,
            sweep_folder,
            space,
            dataset,
            resources,
            resumed_ledger,
            is_finished,
            export_listeners,
            warm_start,
        )


def _find_warm_start_ledgers(request: TuneRequest, runs_folder: StorePath) -> list[Ledger]:
    """Return the sweeps of --warm-start. Raises SpecError for a name that is no sweep."""
    from raysweep.run_lookup import find_run
    from raysweep.spec import SpecError

    ledgers = []
    for name in request.warm_start:
        run = find_run(name, runs_folder)
        if run is None or run.ledger is None or run.run_kind is not None:
            raise SpecError(f"--warm-start {name}: there is no sweep of this name in {runs_folder}")
        ledgers.append(run.ledger)
    return ledgers


def _collect_warm_start(
    space: SearchSpace, dataset: DatasetSplits, earlier_ledgers: Sequence[Ledger]
) -> WarmStart | None:
    """Collect results of the sweeps of --warm-start, and print how many; None without any.

    Raises SpecError for a sweep without a usable result.
    """
    from raysweep.sweep.warm_start import collect_warm_start

    if not earlier_ledgers:
        return None
    warm_start = collect_warm_start(space, dataset.fingerprint, earlier_ledgers)
    print(warm_start.describe(), file=sys.stderr)
    return warm_start


def _print_plan(request: TuneRequest, prepared: _PreparedSweep) -> None:
    """Print what the sweep would run."""
    from raysweep.commands._sweep_plan_output import print_sweep_plan
    from raysweep.sweep.plan import plan_sweep

    space, resumed_ledger = prepared.space, prepared.resumed_ledger
    trials = [
        trial.as_running() if trial.runs_again(request.retry_failed) else trial
        for trial in (resumed_ledger.load_all_runs() if resumed_ledger else [])
    ]
    if resumed_ledger is not None and not resumed_ledger.is_extended_by(space):
        n_started = sum(trial.kind == "trial" for trial in trials)
        if resumed_ledger.load_early_end() and n_started:
            space = space.replace(trials=n_started)
        if trials and not resumed_ledger.has_work_left(request.retry_failed):
            # Fewer repeats were needed than there may be.
            space = space.replace(repeat=0)
    plan = plan_sweep(space, prepared.dataset, prepared.resources, request.address, trials)
    print_sweep_plan(plan, request.as_json, prepared.runs_folder.local_path)


def _check_disk_space(folder: StorePath, space: SearchSpace, dataset: DatasetSplits) -> None:
    """Warn if the disk may be too small for all trials, also those that the sweep already has.

    Raises:
        InfrastructureError: The disk lacks its reserve.
    """
    from raysweep.commands.common import print_warnings
    from raysweep.disk_space import describe_missing_space
    from raysweep.errors import InfrastructureError
    from raysweep.sweep.plan import estimate_prefix_bytes, estimate_trial_bytes

    if folder.local_path is None:
        return
    reserve = space.disk_reserve_gib
    if line := describe_missing_space(folder.local_path, 0, reserve):
        raise InfrastructureError(line)
    n_runs = space.count_all_runs()
    config = space.trial_config({})
    needed_bytes = n_runs * estimate_trial_bytes(config, dataset)
    needed_bytes += estimate_prefix_bytes(space, n_runs * config.epochs, dataset)
    if line := describe_missing_space(folder.local_path, needed_bytes, reserve):
        print_warnings([f"{line}; the sweep stops there, and --resume continues it"])


def _run_prepared_sweep(request: TuneRequest, prepared: _PreparedSweep) -> EndedSweep:
    """Run or resume the sweep."""
    from raysweep.commands.common import print_warnings
    from raysweep.errors import WorkFailed
    from raysweep.leases import hold_folder_lease
    from raysweep.sweep.ledger import Ledger, delete_if_refused
    from raysweep.sweep.warm_start import save_warm_start
    from raysweep.terminal import SweepDisplay, create_progress_console
    from raysweep.tracking import SweepTracker, Tracker, tracking_uri

    space, dataset = prepared.space, prepared.dataset
    is_finished, warm_start = prepared.is_finished, prepared.warm_start
    out = request.out.resolve()
    sweep_folder = prepared.sweep_folder
    _check_disk_space(sweep_folder, space, dataset)
    tracker = Tracker(tracking_uri(out), out / "mlruns")
    display = SweepDisplay(create_progress_console())
    listeners: list[SweepListener] = [
        SweepTracker(tracker, dataset),
        display,
        *prepared.export_listeners,
    ]
    start_of_ray = _describe_start_of_ray(request.address)
    with hold_folder_lease(sweep_folder) as held_folder:
        is_new = not request.resume
        ledger = Ledger.create(held_folder, space) if is_new else Ledger.open(held_folder)
        if not is_finished:
            display.announce(start_of_ray)
        with delete_if_refused(ledger) if is_new else nullcontext():
            if warm_start is not None:
                save_warm_start(warm_start, ledger.path)
            # Importing Ray takes seconds, in which the tracker connects to MLflow in its thread.
            from raysweep.sweep.space_warnings import list_space_warnings
            from raysweep.sweep.tuner import run_sweep
            from raysweep.training.training_summary import list_data_warnings

            if not is_finished:
                data_warnings = list_data_warnings(space.trial_config({}), dataset)
                print_warnings([*list_space_warnings(space), *data_warnings])
                # `run_sweep` starts Ray, writes the extended space and restarts trials: MLflow must
                # answer before that.
                tracker.require_working_store()
            try:
                end_reason = run_sweep(
                    ledger,
                    listeners,
                    prepared.resources,
                    request.address,
                    _make_budget(request),
                    dataset.fingerprint,
                    None if is_new else space,
                    request.retry_failed,
                    _may_download(request, space),
                )
            except WorkFailed as error:
                raise error.with_prefix("the sweep failed: ") from error
    return EndedSweep(ledger, tracker, end_reason)


def _choose_sweep_name(request: TuneRequest, space: SearchSpace) -> str:
    """Return the name of the sweep's folder. Raises SpecError if it is not allowed."""
    from raysweep.commands.common import check_plain_name

    if request.resume:
        return request.resume
    method = space.trial_config({}).method.name
    name = request.name or f"{method}-{time.strftime('%Y%m%d-%H%M%S')}"
    return check_plain_name(name, "--name")


def _describe_start_of_ray(address: str | None) -> str:
    """Return the line about what the command waits for first, which takes up to half a minute.

    Raises SpecError for a malformed address.
    """
    from raysweep.sweep.ray_address import split_address

    source = "--address" if address else "RAY_ADDRESS"
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if address == "local":
        return "starting Ray on this machine ..."
    if address != "auto":
        split_address(address, source)
    return f"joining the Ray cluster at {address} ..."


def _make_outputs(request: TuneRequest) -> list[SweepListener]:
    """Create the folder of --out, and return the listener that writes trials to an Optuna storage,
    if one was asked for; nothing is made for a plan.
    """
    from raysweep.commands.common import make_writable_folder

    if request.plan_only:
        return []
    make_writable_folder(request.out)
    if request.optuna_url is None:
        return []
    from raysweep.sweep.optuna_export import OptunaExporter

    return [OptunaExporter(request.optuna_url)]


def _make_resources(request: TuneRequest) -> Resources:
    """Return what a trial holds. Raises SpecError if workers cannot share it."""
    from raysweep.sweep.resources import Resources

    return Resources(request.cpus_per_trial, request.gpus_per_trial, request.workers)


def _make_budget(request: TuneRequest) -> Budget:
    """Return the limits of this run of the sweep, in seconds."""
    from raysweep.sweep.tune_callbacks import Budget

    wall_seconds = request.max_seconds or math.inf
    if request.max_gpu_hours is None:
        return Budget(wall_seconds)
    return Budget(wall_seconds, 3600 * request.max_gpu_hours)


def _load_checked_space(request: TuneRequest, resumed_ledger: Ledger | None) -> SearchSpace:
    """Load and check the search space, before anything starts.

    Args:
        request: What the user asked for.
        resumed_ledger: The sweep to resume, or None.

    Raises:
        SpecError: The method or a setting is wrong or missing.
    """
    from raysweep.commands.common import check_code
    from raysweep.spec import SpecError
    from raysweep.sweep.search_space import load_space
    from raysweep.training.config import method_by_name

    if resumed_ledger is not None:
        space = _extend_resumed_space(request, resumed_ledger)
    elif request.method is None and request.space_file is None:
        raise SpecError(
            "METHOD is missing: name one of `raysweep list`, or give --space FILE or --resume NAME"
            + ("; it stands before --warm-start" if request.warm_start else "")
        )
    else:
        if request.method is not None and request.space_file is None:
            method_by_name(request.method)
        space = load_space(request.method or "", request.overrides, request.space_file)
    if request.trials:
        space = space.with_sweep_settings({"trials": request.trials})
    check_code(request.code, space.list_networks())
    return space


def _load_dataset(
    request: TuneRequest, space: SearchSpace, resumed_ledger: Ledger | None
) -> DatasetSplits:
    """Load the data set of a sweep.

    Raises:
        SpecError: It is wrong or missing, or not that of the sweep to resume.
    """
    from raysweep.data import load_data

    data_spec = space.trial_config({}).data.replace(download=_may_download(request, space))
    dataset = load_data(data_spec)
    if resumed_ledger is not None:
        resumed_ledger.check_same_data(dataset.fingerprint)
    return dataset


def _may_download(request: TuneRequest, space: SearchSpace) -> bool:
    """Return whether the user allows downloads of data, here and on the nodes.

    A sweep that is resumed may come from a stranger, so its own setting does not count:
    `--set data.download=true` must allow it again.
    """
    is_set_by_user = not request.resume or "data.download" in request.overrides
    return is_set_by_user and space.trial_config({}).data.download


def _extend_resumed_space(request: TuneRequest, ledger: Ledger) -> SearchSpace:
    """Return the space of a sweep, extended by `--set` (epochs) and `--space` (ranges, trials).

    Raises:
        SpecError: The request changes a setting that all trials of the sweep share.
    """
    from raysweep.spec import SpecError, merge_overrides
    from raysweep.sweep.extension_checks import check_extension
    from raysweep.sweep.search_space import load_space, split_sweep_settings
    from raysweep.sweep.warm_start import load_warm_start

    space = ledger.space
    method = space.trial_config({}).method.name
    if request.method not in (None, method):
        raise SpecError(
            f"--resume {request.resume}: is a sweep of {method!r}, not of {request.method!r}"
        )
    if request.space_file:
        _check_same_base(request.space_file, request.overrides, ledger.space)
        overrides = merge_overrides(
            _list_fixed_settings(ledger.space, request.space_file), request.overrides
        )
        space = load_space(method, overrides, request.space_file)
        space = space.replace(
            trials=max(ledger.space.n_trials, space.n_trials),
            dataset_defaults=ledger.space.dataset_defaults,
            **_list_kept_settings(ledger.space, request),
        )
        # The file does not know what earlier sweeps have found.
        space = load_warm_start(ledger.path).add_points(space)
    elif request.overrides:
        of_sweep, of_training = split_sweep_settings(request.overrides)
        space = ledger.space.with_overrides(of_training).with_sweep_settings(of_sweep)
    params = {trial.number: trial.params for trial in ledger.load_trials()}
    check_extension(ledger.space, space, params)
    return space


def _list_kept_settings(space: SearchSpace, request: TuneRequest) -> dict[str, Any]:
    """Return the settings of a resumed sweep itself that neither its space file nor `--set` has."""
    from raysweep.sweep.extension_checks import KEPT_SWEEP_SETTINGS

    assert request.space_file is not None
    own_settings = _read_own_settings(space, request.space_file)
    return {
        name: getattr(space, name)
        for name in KEPT_SWEEP_SETTINGS
        if name not in own_settings and name not in request.overrides
    }


def _read_own_settings(space: SearchSpace, space_file: Path) -> dict[str, Any]:
    """Return the content of a space file, with its section for the data set of a resumed sweep."""
    from raysweep.sweep.search_space import read_space_settings

    return read_space_settings(space_file, space.base)


def _list_fixed_settings(space: SearchSpace, space_file: Path) -> dict[str, Any]:
    """Return the base settings of a resumed sweep that its space file does not have itself.

    A path with `*` in the base of a file gives way to the searched paths of the file; one of
    `--set` does not.
    """
    own_paths = set(_read_own_settings(space, space_file).get("base") or {})
    return {
        path: value for path, value in space.base.items() if not ("*" in path and path in own_paths)
    }


def _check_same_base(
    space_file: Path, overrides: dict[str, Any], resumed_space: SearchSpace
) -> None:
    """Raise SpecError if the base settings of a file differ from those of the resumed sweep."""
    from raysweep.spec import SpecError
    from raysweep.user_folders import expand_home
    from raysweep.yaml_files import read_yaml

    base = resumed_space.base
    for path, value in (read_yaml(space_file).get("base") or {}).items():
        # A sweep stores paths as absolute ones.
        equal_values = (value, str(expand_home(str(value)).resolve()))
        if path not in overrides and base.get(path, value) not in equal_values:
            raise SpecError(
                f"{space_file}: base.{path} = {value!r}: the sweep has {base[path]!r}; use --set"
            )
