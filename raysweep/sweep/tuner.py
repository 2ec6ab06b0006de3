"""Run a sweep on Ray Tune.

Optuna proposes the params of each trial, ASHA stops weak trials, and the ledger records them.
"""

import logging
import math
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from raysweep.bounded_files import adopt_unpacked_limit, read_unpacked_limit
from raysweep.code_files import adopt_code_files, list_code_files
from raysweep.data import load_data
from raysweep.data.dataset_cache import CachedDataset
from raysweep.errors import InfrastructureError, RaysweepError, is_infrastructure_error
from raysweep.file_privacy import adopt_umask, private_files, read_umask
from raysweep.logs import log_to_folder, log_trial
from raysweep.spec import SpecError
from raysweep.stores import StorePath, StoreUnavailable
from raysweep.sweep.asha import AshaScheduler
from raysweep.sweep.base_run_search import BaseRunSearcher
from raysweep.sweep.cluster import connect_to_cluster, node_capacities
from raysweep.sweep.epoch_counts import count_epochs
from raysweep.sweep.finalist_attacks import attack_finalists
from raysweep.sweep.ledger import Ledger, find_run_config
from raysweep.sweep.multi_worker_trial import ReleaseWorkersCallback, train_on_workers
from raysweep.sweep.node_probe import find_node_problems, require_visible
from raysweep.sweep.optuna_search import LedgerSearcher
from raysweep.sweep.preemption import (
    PreemptibleMixin,
    defer_sigterm,
    exit_preempted,
    termination_requested,
)
from raysweep.sweep.ray_internals import (
    add_mixin,
    check_ray_internals,
    keep_credentials_here,
)
from raysweep.sweep.ray_map import RayMap
from raysweep.sweep.repeat_search import RepeatSearcher
from raysweep.sweep.resources import Resources
from raysweep.sweep.search_space import SearchSpace
from raysweep.sweep.trial import Trial
from raysweep.sweep.tune_callbacks import (
    MAX_TRIAL_RETRIES,
    Budget,
    BudgetStopper,
    LedgerCallback,
    SweepEndReason,
    SweepListener,
)
from raysweep.termination_signals import is_main_thread
from raysweep.training.checkpoint import TrainingCheckpoint, describe_environment
from raysweep.training.config import TrainingConfig
from raysweep.training.epoch_progress import EpochProgressWriter, ProgressCallback
from raysweep.training.failure_reports import FAILURE_KEY, describe_bug, failure_report
from raysweep.training.metric_history import EpochMetrics
from raysweep.training.mid_epoch_checkpoint import TrainingInterrupted
from raysweep.training.prefix_cache import PREFIX_CACHE_FOLDER, PrefixCache
from raysweep.training.resource_use import measure_resource_use
from raysweep.training.trainer import train_model

logger = logging.getLogger(__name__)


def run_sweep(
    ledger: Ledger,
    listeners: Sequence[SweepListener],
    resources: Resources | None = None,
    address: str | None = None,
    budget: Budget | None = None,
    fingerprint: str | None = None,
    extended_space: SearchSpace | None = None,
    retry_failed: bool = False,
    may_download: bool = False,
) -> SweepEndReason:
    """Run the trials of a sweep that have not ended, as far as the budget allows.

    When all have ended, the best ones are repeated with other seeds (see `SearchSpace.repeat`), and
    then AutoAttack attacks the best of them, the finalists. Trials that the
    surroundings ended (disk, memory, lost processes) run again.

    Args:
        ledger: The sweep.
        listeners: Objects that are notified of the sweep's events.
        resources: What one trial holds; by default one CPU, and one GPU if the cluster has any.
        address: Ray cluster, `auto` or `host:port`; see `connect_to_cluster`.
        budget: What this call may spend; unlimited by default.
        fingerprint: Fingerprint of the data, to avoid computing it again.
        extended_space: Search space with which the sweep continues, see `Ledger.extend_space`.
        retry_failed: Whether all other failed trials run again, too.
        may_download: Whether the nodes of the cluster may download data that they lack. What the
            sweep says of it does not count: it may come from anybody.

    Returns:
        Why the call ended.

    Raises:
        SpecError: If the sweep cannot run with these settings. In that case nothing was written.
        InfrastructureError: If there is no cluster, or its nodes cannot run the trials; nothing was
            written. Or the sweep's folder can no longer be written.
        SweepFailed: If several trials failed with errors in the code, or no trial could start.
    """
    with private_files(), log_to_folder(ledger.path):
        try:
            return _run_logged_sweep(
                ledger,
                listeners,
                resources or Resources(),
                address,
                budget or Budget(),
                fingerprint,
                extended_space,
                retry_failed,
                may_download,
            )
        except Exception as error:
            logger.error(
                "sweep %s ends with an error: %s",
                ledger.name,
                error,
                exc_info=error,
                extra={"event": "sweep_error", "is_shown_elsewhere": True},
            )
            raise


def _run_logged_sweep(
    ledger: Ledger,
    listeners: Sequence[SweepListener],
    resources: Resources,
    address: str | None,
    budget: Budget,
    fingerprint: str | None,
    extended_space: SearchSpace | None,
    retry_failed: bool,
    may_download: bool,
) -> SweepEndReason:
    """Run a sweep whose log is open; the arguments are those of `run_sweep`."""
    started_at = time.monotonic()
    space = extended_space or ledger.space
    config = space.trial_config({})
    if space == ledger.space and not ledger.has_work_left(retry_failed):
        # Listeners may lack what a killed driver could not tell them.
        with _notify_listeners(listeners, ledger, concurrency=0):
            pass
        logger.info("all trials of sweep %s have ended already", ledger.name)
        return "done"
    for network in space.list_networks():
        network.find_factory()
    data_spec = config.data.replace(download=may_download)
    dataset = CachedDataset(data_spec, fingerprint or load_data(data_spec).fingerprint)
    check_ray_internals("sweep")
    with connect_to_cluster(address) as cluster:
        if problems := find_node_problems(ledger.path, dataset):
            raise InfrastructureError(problems)
        resources = resources.resolve(cluster)
        if math.isfinite(budget.gpu_seconds) and not resources.n_gpus:
            raise SpecError("--max-gpu-hours: the trials hold no GPU; use --max-time")
        concurrency = resources.max_concurrent_trials(cluster, node_capacities())
        if extended_space is not None:
            ledger.extend_space(extended_space)
        _restart_failed_trials(ledger, retry_failed)
        _log_sweep_start(ledger, resources, concurrency, budget, dataset.fingerprint)
        with _notify_listeners(listeners, ledger, concurrency):
            ledger_callback = LedgerCallback(
                ledger, config.epochs, listeners, resources.n_gpus, budget
            )
            _run_rounds(ledger, dataset, ledger_callback, resources, concurrency)
            with suppress(KeyboardInterrupt):
                mapper = RayMap(resources.cpus, resources.n_gpus)
                attack_finalists(ledger, dataset, ledger_callback, listeners, mapper)
    end_reason: SweepEndReason = "budget" if ledger_callback.limit_reached else "interrupted"
    if ledger.has_ended():
        end_reason = "done"
    _log_sweep_end(ledger, end_reason, time.monotonic() - started_at)
    if ledger_callback.lacks_disk_space and end_reason != "done":
        raise InfrastructureError(
            f"{ledger.path}: its disk has less free space than disk_reserve_gib = "
            f"{ledger.space.disk_reserve_gib:g}: the sweep has stopped; make space and resume it"
        )
    return end_reason


@contextmanager
def _notify_listeners(
    listeners: Sequence[SweepListener], ledger: Ledger, concurrency: int
) -> Iterator[None]:
    """Tell the listeners of the start of the sweep and, after this block, how it ended."""
    for listener in listeners:
        listener.on_sweep_start(ledger, concurrency)
    try:
        yield
    except BaseException as error:
        for listener in listeners:
            listener.on_sweep_end(ledger, error)
        raise
    for listener in listeners:
        listener.on_sweep_end(ledger)


def _restart_failed_trials(ledger: Ledger, retry_failed: bool) -> None:
    """Set the failed trials to running that run again, and log their numbers."""
    restarted_trials = ledger.restart_failed_trials(retry_failed)
    if restarted_trials:
        numbers = ", ".join(trial.key for trial in restarted_trials)
        logger.info("failed trials run again: %s", numbers)


def _log_sweep_start(
    ledger: Ledger, resources: Resources, concurrency: int, budget: Budget, fingerprint: str
) -> None:
    """Log what the sweep has already and what it will run on."""
    trials, space = ledger.load_trials(), ledger.space
    counts = dict(Counter(trial.state for trial in trials))
    found = ", ".join(f"{count} {state}" for state, count in counts.items())
    config = space.trial_config({})
    logger.info(
        "sweep %s %s: %s of %d trials exist (%s); %d run at once",
        ledger.name,
        "resumes" if trials else "starts",
        len(trials) or "none",
        space.n_trials,
        found or "nothing was trained",
        concurrency,
        extra={
            "event": "sweep_start",
            "sweep_key": ledger.key,
            "states": counts,
            "space_digest": space.digest(),
            "config_digest": config.digest(),
            "data_fingerprint": fingerprint,
            "git_revision": describe_environment()["git_revision"],
            "objectives": list(space.objectives),
            "max_epochs": config.epochs,
            "trial_resources": resources.trial_resources,
            "workers": resources.workers,
            "budget": _finite_limits(budget),
            "space": space.to_json_dict(),
            "asha_rungs": space.scheduler.rungs(config.epochs),
        },
    )
    for trial in ledger.load_all_runs():
        if trial.state != "running":
            continue
        logger.info(
            "%s has not ended: its last reported epoch is %d, a later checkpoint may "
            "exist; it has lost its process %d times",
            trial.title,
            trial.epoch,
            trial.retries,
            extra={"trial": trial.number, "epoch": trial.epoch, "state": trial.state},
        )


def _finite_limits(budget: Budget) -> dict[str, float]:
    """Return the limits of a budget that has any."""
    return {name: limit for name, limit in vars(budget).items() if math.isfinite(limit)}


def _log_sweep_end(ledger: Ledger, end_reason: SweepEndReason, seconds: float) -> None:
    """Log how many trials ended in which way."""
    trials = ledger.load_trials()
    counts = dict(Counter(trial.state for trial in trials))
    ranked = ledger.rank_trials()
    best = ""
    if ranked:
        objective = ledger.space.objectives[0]
        score = f"{ledger.space.score_name} {ranked[0].score(objective):.4f}"
        best = f"; best: trial {ranked[0].number:04d}, {score}"
        if ranked[0].robust_under_autoattack is not None:
            best += f", under AutoAttack {ranked[0].robust_under_autoattack:.4f}"
    unreported = ""
    if end_reason != "done":
        unreported = "; epochs that trials saved after their last reports are found when it resumes"
    logger.info(
        "sweep %s ends (%s) after %.1f s: %s of %d trials; %s%s%s",
        ledger.name,
        {"done": "all trials have ended", "budget": "its budget is spent"}.get(
            end_reason, "interrupted"
        ),
        seconds,
        ", ".join(f"{count} {state}" for state, count in counts.items()) or "no trial",
        ledger.space.n_trials,
        count_epochs(ledger.load_all_runs()),
        best,
        unreported,
        extra={
            "event": "sweep_end",
            "reason": end_reason,
            "states": counts,
            "seconds": round(seconds, 1),
            "epochs": {trial.number: trial.epoch for trial in trials},
            "best_trial": ranked[0].number if ranked else None,
        },
    )


def _run_rounds(
    ledger: Ledger,
    dataset: CachedDataset,
    ledger_callback: LedgerCallback,
    resources: Resources,
    concurrency: int,
) -> None:
    """Run Tune, again if trials could not start, until all trials and base runs have ended and then
    the repeats of the best, or until it must stop.
    """

    def run_round(searcher: Searcher, n_trials: int) -> None:
        logger.info("waiting for Ray to start the processes of trials")
        with _restore_signal_handlers(), keep_credentials_here():
            _build_tuner(
                ledger, dataset, ledger_callback, resources, concurrency, searcher, n_trials
            ).fit()
        ledger_callback.require_round_progress()

    try:
        while n_left := _count_runs_left(ledger):
            if not ledger_callback.start_round_if_needed():
                return
            run_round(BaseRunSearcher(ledger, LedgerSearcher(ledger)), n_left)
        tried_keys: set[str] = set()
        while waiting := ledger.find_waiting_repeats():
            keys = {run.key for run in waiting}
            if not keys & tried_keys:
                if ledger_callback.update_limit_reached():
                    return
                ledger_callback.reset_round_count()
            if not ledger_callback.start_round_if_needed():
                return
            tried_keys |= keys
            numbers = ", ".join(sorted(keys))
            logger.info("the best trials get another seed: %s", numbers, extra={"event": "repeat"})
            run_round(RepeatSearcher(ledger.space.objectives[0], waiting), len(waiting))
    except tune.TuneError as error:
        # Tune wraps the errors of the ledger's writes.
        ledger_error = error.__context__
        if ledger_error is not None and (
            isinstance(ledger_error, RaysweepError) or is_infrastructure_error(ledger_error)
        ):
            raise ledger_error from ledger_error.__cause__
        raise


def _count_runs_left(ledger: Ledger) -> int:
    """Return the number of trials and base runs that have not ended."""
    trials = ledger.load_trials()
    n_running = sum(trial.state == "running" for trial in trials)
    n_trials_left = n_running + max(0, ledger.count_needed_trials() - len(trials))
    return n_trials_left + ledger.count_base_runs_left()


@contextmanager
def _restore_signal_handlers() -> Iterator[None]:
    """Restore the signal handlers after this block.

    Tune does not restore them: after a sweep without Ctrl-C, the next Ctrl-C would do nothing.
    """
    if not is_main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _build_tuner(
    ledger: Ledger,
    dataset: CachedDataset,
    ledger_callback: LedgerCallback,
    resources: Resources,
    concurrency: int,
    searcher: Searcher,
    n_trials: int,
) -> tune.Tuner:
    """Build Tune's tuner for `n_trials` trials of a searcher."""
    _silence_ray()
    trainable = _make_trainable(ledger, dataset, resources)
    return tune.Tuner(
        tune.with_resources(trainable, resources.trial_resources),
        tune_config=tune.TuneConfig(
            num_samples=n_trials,
            max_concurrent_trials=concurrency,
            search_alg=searcher,
            scheduler=_build_scheduler(ledger, ledger.space.trial_config({}).epochs),
            # A trial that waits for its workers does not notice that it must stop. Its process must
            # end, and the workers end with it.
            reuse_actors=resources.workers == 1,
        ),
        run_config=tune.RunConfig(
            name="ray",
            # Temporary files of Tune: no sweep is resumed from them.
            storage_path=str(ledger.path.working_path),
            verbose=0,
            progress_reporter=_SilentReporter(),
            failure_config=tune.FailureConfig(max_failures=MAX_TRIAL_RETRIES),
            stop=BudgetStopper(ledger_callback),
            callbacks=[ledger_callback, ReleaseWorkersCallback(ledger.path)],
        ),
    )


class _SilentReporter(tune.ProgressReporter):
    """Shows no progress. Tune's own reporter for notebooks clears the output of the cell."""

    def should_report(self, trials: list[Any], done: bool = False) -> bool:
        """Return that there is never anything to report."""
        return False

    def report(self, trials: list[Any], done: bool, *sys_info: str) -> None:
        """Report nothing."""


def _silence_ray() -> None:
    """Hide Ray's warnings and most of its log messages."""
    for name in ("ray.tune", "ray.train", "ray"):
        logging.getLogger(name).setLevel(logging.CRITICAL if name == "ray.tune" else logging.ERROR)
    warnings.filterwarnings("ignore", module=r"ray\b")


def _make_trainable(
    ledger: Ledger, dataset: CachedDataset, resources: Resources
) -> Callable[[dict[str, Any]], None]:
    """Return the function that Tune calls with the config of a trial: its number and params."""
    sweep_path, space = ledger.path, ledger.space
    umask, unpacked_limit, code_files = read_umask(), read_unpacked_limit(), list_code_files()

    def train_trial(trial_config: dict[str, Any]) -> None:
        adopt_umask(umask)
        adopt_unpacked_limit(unpacked_limit)
        adopt_code_files(code_files)
        run = Trial.from_tune_config(trial_config)
        try:
            config = find_run_config(space, run)
        except SpecError as error:
            # Each of its params is valid, but not all together.
            tune.report({FAILURE_KEY: str(error)})
            return
        except Exception as error:
            # Tune would start the trial again, and its process would seem to have died.
            tune.report(describe_bug(error))
            return
        run_path = sweep_path / run.folder
        prefix_cache = None
        if space.share_prefixes:
            prefix_cache = PrefixCache(
                sweep_path.parent / PREFIX_CACHE_FOLDER, max_bytes=int(space.prefix_gib * 2**30)
            )
        if resources.workers == 1:
            _train_trial(config, run_path, resources.cpus, prefix_cache, dataset)
        else:
            train_on_workers(
                config,
                run_path,
                resources.workers,
                resources.worker_resources,
                prefix_cache,
                dataset,
            )

    add_mixin(train_trial, PreemptibleMixin)
    return train_trial


def _build_scheduler(ledger: Ledger, max_epochs: int) -> TrialScheduler:
    """Return the scheduler that the search space names."""
    if ledger.space.scheduler.kind == "none":
        return FIFOScheduler()
    return AshaScheduler(ledger, max_epochs)


def _train_trial(
    config: TrainingConfig,
    run_path: StorePath,
    cpus: float,
    prefix_cache: PrefixCache | None,
    dataset: CachedDataset,
) -> None:
    """Train a trial in its own process and report to Tune, as `raysweep train` trains a run.

    An error of the params or of the code is reported as a result, so that Tune does not retry the
    trial. If the process dies, Tune starts the trial again.
    """
    import torch

    torch.set_num_threads(max(1, int(cpus)))

    def report_epoch(metrics: EpochMetrics, checkpoint: TrainingCheckpoint) -> None:
        tune.report({**metrics, **measure_resource_use()})

    try:
        require_visible(run_path.parent.parent)
    except StoreUnavailable:
        raise
    except Exception as error:
        tune.report(failure_report(error, config, run_path))
        return
    with log_trial(run_path):
        _train_and_report(config, run_path, report_epoch, prefix_cache, dataset)


def _train_and_report(
    config: TrainingConfig,
    run_path: StorePath,
    report_epoch: Callable[[EpochMetrics, TrainingCheckpoint], None],
    prefix_cache: PrefixCache | None,
    dataset: CachedDataset,
) -> None:
    """Train a trial whose log is open, and report its epochs or its failure."""
    try:
        with defer_sigterm():
            data = dataset.load_shared(config.data)
            writer = EpochProgressWriter(run_path, data.count_train_batches(config.batch_size))
            callback = ProgressCallback(writer, report_epoch, termination_requested)
            train_model(config, run_path, callback, data=data, prefix_cache=prefix_cache)
    except TrainingInterrupted:
        exit_preempted()
    except StoreUnavailable as error:
        logger.error("the trial starts again: %s", error, exc_info=error)
        raise
    except Exception as error:
        tune.report(failure_report(error, config, run_path))
