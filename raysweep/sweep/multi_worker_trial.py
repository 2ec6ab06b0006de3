"""Train a trial on several workers, with a worker group of Ray Train inside the trial.

The trial's own process only waits for the group and passes its reports to Tune.
"""

import logging
import time
from collections.abc import Mapping
from typing import Any

import ray.train
import ray.train.torch
from ray import tune
from ray.tune.experiment import Trial as RayTrial
from ray.tune.integration.ray_train import TuneReportCallback
from ray.util.placement_group import (
    PlacementGroup,
    get_current_placement_group,
    placement_group_table,
)

from raysweep.bounded_files import adopt_unpacked_limit, read_unpacked_limit
from raysweep.code_files import adopt_code_files, list_code_files
from raysweep.data import load_data
from raysweep.data.dataset_cache import CachedDataset
from raysweep.errors import RaysweepError
from raysweep.file_privacy import adopt_umask, read_umask
from raysweep.logs import log_trial
from raysweep.stores import StorePath, StoreUnavailable
from raysweep.sweep.group_preemption import GroupInterruption, GroupPreemptionWatch, relay_sigterm
from raysweep.sweep.preemption import exit_preempted, termination_requested
from raysweep.sweep.ray_environment import ray_environment
from raysweep.sweep.ray_internals import skip_unused_group_processes
from raysweep.sweep.resources import DRIVER_CPUS
from raysweep.sweep.trial import Trial
from raysweep.training.checkpoint import RunDirectory, TrainingCheckpoint
from raysweep.training.config import TrainingConfig
from raysweep.training.epoch_progress import EpochProgressWriter, ProgressCallback
from raysweep.training.failure_reports import (
    FAILURE_KEY,
    clear_failure_report,
    failure_report,
    load_failure_report,
    save_failure_report,
)
from raysweep.training.mid_epoch_checkpoint import TrainingInterrupted
from raysweep.training.prefix_cache import PrefixCache
from raysweep.training.resource_use import measure_resource_use
from raysweep.training.trainer import TrainingFailed, train_model

logger = logging.getLogger(__name__)

_MAX_GROUP_RETRIES = 3
_PLACEMENT_GROUP_FILE = "placement-group"


def train_on_workers(
    config: TrainingConfig,
    run_path: StorePath,
    n_workers: int,
    worker_resources: dict[str, float],
    prefix_cache: PrefixCache | None = None,
    cached_dataset: CachedDataset | None = None,
) -> None:
    """Train a trial on a group of workers, and report its epochs to Tune.

    When a worker dies, Ray Train starts the group again and training resumes from the last
    checkpoint in the folder: only the current epoch is lost. When a node is drained or this process
    receives SIGTERM, the workers save the current epoch first, so that nothing is lost.

    Args:
        config: The trial's training config.
        run_path: The trial's folder.
        n_workers: Number of processes.
        worker_resources: What each worker holds, in Ray's logical units.
        prefix_cache: States that runs share; None to train all epochs.
        cached_dataset: The data; None to let each worker load them itself.
    """
    with log_trial(run_path, role="group"):
        _fit_group(config, run_path, n_workers, worker_resources, prefix_cache, cached_dataset)


def _fit_group(
    config: TrainingConfig,
    run_path: StorePath,
    n_workers: int,
    worker_resources: dict[str, float],
    prefix_cache: PrefixCache | None,
    cached_dataset: CachedDataset | None,
) -> None:
    """Train on a group of workers; the log is open, the arguments are those of the caller."""
    remove_placement_group(load_placement_group(run_path))
    clear_failure_report(run_path)
    logger.info("starting a group of %d workers", n_workers, extra={"each": worker_resources})
    try:
        # An earlier driver or group may have died before it passed on its last reports. Tune's
        # callbacks ignore those that they have received before.
        for metrics in RunDirectory(run_path).read_history():
            tune.report(metrics)
        with relay_sigterm(run_path), ray_environment(), skip_unused_group_processes():
            while True:
                trainer = _build_torch_trainer(
                    config, run_path, n_workers, worker_resources, prefix_cache, cached_dataset
                )
                interruption = trainer.fit().return_value
                if interruption is None:
                    break
                _exit_if_preempted(interruption)
    except StoreUnavailable:
        raise
    except RaysweepError as error:
        logger.error("the workers cannot start: %s", error, exc_info=error)
        tune.report({**failure_report(error, config, run_path), "epoch": 0})


def _exit_if_preempted(interruption: GroupInterruption) -> None:
    """Exit this process if it must leave its node, so that Tune starts the trial elsewhere."""
    own_node = ray.get_runtime_context().get_node_id()
    if termination_requested() or own_node in interruption.preempted_nodes:
        exit_preempted()
    logger.warning("a node is taken away: the group starts again elsewhere")


def load_placement_group(run_path: StorePath) -> PlacementGroup | None:
    """Return the placement group of the last workers that trained in a folder.

    Args:
        run_path: The trial's folder.

    Returns:
        The group, which may have been removed since; None if no worker saved one.
    """
    try:
        group_id = (run_path / _PLACEMENT_GROUP_FILE).read_text()
        return PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group_id)))
    except (OSError, ValueError):
        return None


def remove_placement_group(group: PlacementGroup | None) -> None:
    """Free the placement group of a trial that has ended, unless that was done before."""
    if is_placement_group_active(group):
        ray.util.remove_placement_group(group)


def is_placement_group_active(group: PlacementGroup | None) -> bool:
    """Return whether a placement group still holds resources, or waits for them."""
    return group is not None and placement_group_table(group).get("state") not in (None, "REMOVED")


class ReleaseWorkersCallback(tune.Callback):
    """Free the workers of trials that were stopped (ray-project/ray #54305).

    The callback waits first: a Train controller that is still alive would treat the end of its
    workers as a failure and start new ones.

    Args:
        sweep_path: Folder of the sweep.
        grace_seconds: Seconds to wait after the end of a trial.
    """

    def __init__(self, sweep_path: StorePath, grace_seconds: float = 5.0) -> None:
        self._sweep_path = sweep_path
        self._grace_seconds = grace_seconds
        self._pending_removals: list[tuple[float, PlacementGroup]] = []

    def on_trial_complete(
        self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any
    ) -> None:
        """Schedule the removal of the trial's placement group."""
        run = Trial.from_tune_config(trial.config)
        group = load_placement_group(self._sweep_path / run.folder)
        if group is not None:
            self._pending_removals.append((time.monotonic() + self._grace_seconds, group))

    on_trial_error = on_trial_complete

    def on_step_end(self, iteration: int, trials: list[RayTrial], **info: Any) -> None:
        """Remove the placement groups whose grace period is over."""
        while self._pending_removals and self._pending_removals[0][0] <= time.monotonic():
            remove_placement_group(self._pending_removals.pop(0)[1])

    def on_experiment_end(self, trials: list[RayTrial], **info: Any) -> None:
        """Wait until all scheduled placement groups are removed."""
        while any(is_placement_group_active(group) for _, group in self._pending_removals):
            time.sleep(0.1)
            self.on_step_end(0, trials)


def _build_torch_trainer(
    config: TrainingConfig,
    run_path: StorePath,
    n_workers: int,
    worker_resources: dict[str, float],
    prefix_cache: PrefixCache | None,
    cached_dataset: CachedDataset | None,
) -> "ray.train.torch.TorchTrainer":
    """Build Ray Train's trainer; the arguments are those of `train_on_workers`."""
    gpus = worker_resources.get("GPU", 0)
    # The workers' share of the trial's CPUs, before the trial's own process took its part.
    cpus = round(worker_resources["CPU"] + DRIVER_CPUS, 3)
    return ray.train.torch.TorchTrainer(
        _run_worker,
        train_loop_config={
            "config": config.model_dump_json(),
            "path": run_path,
            "threads": max(1, int(cpus)),
            "prefixes": prefix_cache,
            "source": cached_dataset,
            "umask": read_umask(),
            "unpacked_limit": read_unpacked_limit(),
            "code_files": list_code_files(),
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=n_workers,
            use_gpu=gpus > 0,
            resources_per_worker={kind: n for kind, n in worker_resources.items() if n},
        ),
        # NCCL needs a GPU for each rank.
        torch_config=ray.train.torch.TorchConfig(backend="nccl" if gpus >= 1 else "gloo"),
        run_config=ray.train.RunConfig(
            name=f"workers-{run_path.name}",
            storage_path=str(run_path.parent.parent.working_path / "ray"),
            callbacks=[TuneReportCallback()],
            failure_config=ray.train.FailureConfig(max_failures=_MAX_GROUP_RETRIES),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )


def _run_worker(loop_config: dict[str, Any]) -> GroupInterruption | None:
    """Train as one worker of the group, and report failures (Ray Train's loop function).

    Returns:
        Why the group ended in the middle of an epoch; None if it did not.
    """
    adopt_umask(loop_config["umask"])
    adopt_unpacked_limit(loop_config["unpacked_limit"])
    adopt_code_files(loop_config["code_files"])
    config = TrainingConfig.model_validate_json(loop_config["config"])
    run_path = loop_config["path"]
    rank = ray.train.get_context().get_world_rank()
    with log_trial(run_path, rank=rank):
        return _train_worker_and_report(config, run_path, loop_config)


def _train_worker_and_report(
    config: TrainingConfig, run_path: StorePath, loop_config: dict[str, Any]
) -> GroupInterruption | None:
    """Train as one worker whose log is open, and report failures; returns as `_run_worker`."""
    from raysweep.training.distributed import WorkerLost

    try:
        return _train_worker(config, run_path, loop_config)
    except TrainingFailed as error:
        logger.error("training failed: %s", error, exc_info=error)
        # All workers fail together.
        _report_metrics({FAILURE_KEY: str(error), "epoch": 0})
        return None
    except (WorkerLost, StoreUnavailable) as error:
        logger.error("this worker ends, the group starts again: %s", error, exc_info=error)
        raise
    except Exception as error:
        # Perhaps only this worker failed. The others wait for it until the group ends, so it cannot
        # report with them: the next group reports what it saves here.
        save_failure_report(run_path, failure_report(error, config, run_path))
        raise


def _train_worker(
    config: TrainingConfig, run_path: StorePath, loop_config: dict[str, Any]
) -> GroupInterruption | None:
    """Train as one worker of the group; let errors pass. Returns as `_run_worker`."""
    import torch

    from raysweep.training.distributed import DistributedWorkerGroup, broadcast_int

    torch.set_num_threads(loop_config["threads"])
    workers, device = DistributedWorkerGroup(), ray.train.torch.get_device()
    if workers.rank == 0:
        _save_placement_group(run_path)
    if broadcast_int(len(load_failure_report(run_path)), workers, device):
        # An error of this trial ended the last group, and would end each later group too.
        _report_metrics({**load_failure_report(run_path), "epoch": 0})
        return None
    # Ray Train fetches a report with its next poll: of a group that died, the last two reports may
    # be lost.
    history = RunDirectory(run_path).read_history() if workers.rank == 0 else []
    last_rows = history[-2:]
    for index in range(broadcast_int(len(last_rows), workers, device)):
        _report_metrics(last_rows[index] if last_rows else {})
    cached_dataset = loop_config["source"]
    data = cached_dataset.load_shared(config.data) if cached_dataset else load_data(config.data)
    writer = None
    if workers.rank == 0:
        writer = EpochProgressWriter(run_path, data.count_train_batches(config.batch_size))
    watch = GroupPreemptionWatch(run_path, workers, device)
    try:
        train_model(
            config,
            run_path,
            ProgressCallback(writer, _report_metrics, watch.should_interrupt),
            data=data,
            device=device,
            workers=workers,
            prefix_cache=loop_config["prefixes"],
        )
    except TrainingInterrupted as error:
        logger.info("this worker ends, a group starts elsewhere: %s", error)
        return watch.interruption
    return None


def _report_metrics(
    metrics: Mapping[str, float | str], checkpoint: TrainingCheckpoint | None = None
) -> None:
    """Report to Ray Train, which waits until all workers have reported."""
    from raysweep.training.distributed import collective_errors

    with collective_errors():
        ray.train.report({**metrics, **measure_resource_use()})


def _save_placement_group(run_path: StorePath) -> None:
    """Write the id of this worker's placement group into the trial's folder."""
    group = get_current_placement_group()
    assert group is not None
    (run_path / _PLACEMENT_GROUP_FILE).write_text(group.id.hex())
