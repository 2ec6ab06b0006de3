"""A trial on several workers: Ray Train's group within the trial, which itself only waits and
passes reports on.
"""

import time
from collections.abc import Mapping
from pathlib import Path
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

from raysweep import storage
from raysweep.data.dataset_cache import CachedDataset
from raysweep.spec import SpecError
from raysweep.sweep.resources import DRIVER_CPUS
from raysweep.training.callbacks import FunctionCallback
from raysweep.training.checkpoint import RunDirectory, TrainingCheckpoint
from raysweep.training.config import TrainingConfig
from raysweep.training.failure_reports import (
    FAILURE_KEY,
    clear_failure_report,
    failure_report,
    load_failure_report,
    save_failure_report,
)
from raysweep.training.prefix_cache import PrefixCache
from raysweep.training.trainer import TrainingFailed, train_model

_MAX_GROUP_RETRIES = 3
_PLACEMENT_GROUP_FILE = "placement-group"


def train_on_workers(
    config: TrainingConfig,
    run_path: Path,
    n_workers: int,
    worker_resources: dict[str, float],
    prefix_cache: PrefixCache | None = None,
    cached_dataset: CachedDataset | None = None,
) -> None:
    """One trial in the folder `path` on `workers` processes that hold `each` of Ray's resources.

    A worker that dies costs the epoch that it was in: Ray Train starts the group again, and `fit`
    goes on from the folder's last checkpoint.
    """
    remove_placement_group(load_placement_group(run_path))
    clear_failure_report(run_path)
    try:
        # Reports that an earlier driver or group did not get through; those that did change
        # nothing.
        for metrics in RunDirectory(run_path).read_history():
            tune.report(metrics)
        _build_torch_trainer(
            config, run_path, n_workers, worker_resources, prefix_cache, cached_dataset
        ).fit()
    except SpecError as error:
        tune.report({FAILURE_KEY: str(error), "epoch": 0})


def _build_torch_trainer(
    config: TrainingConfig,
    run_path: Path,
    n_workers: int,
    worker_resources: dict[str, float],
    prefix_cache: PrefixCache | None,
    cached_dataset: CachedDataset | None,
) -> "ray.train.torch.TorchTrainer":
    gpus, threads = (
        worker_resources.get("GPU", 0),
        max(1, int(round(worker_resources["CPU"] + DRIVER_CPUS, 3))),
    )
    return ray.train.torch.TorchTrainer(
        _run_worker,
        train_loop_config={
            "config": config.model_dump_json(),
            "path": storage.uri_of(run_path),
            "threads": threads,
            "prefixes": prefix_cache,
            "source": cached_dataset,
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=n_workers,
            use_gpu=gpus > 0,
            resources_per_worker={k: v for k, v in worker_resources.items() if v},
        ),
        # NCCL wants a device for each rank.
        torch_config=ray.train.torch.TorchConfig(backend="nccl" if gpus >= 1 else "gloo"),
        run_config=ray.train.RunConfig(
            name=f"workers-{run_path.name}",
            storage_path=str(run_path.parent.parent / "ray"),
            callbacks=[TuneReportCallback()],
            failure_config=ray.train.FailureConfig(max_failures=_MAX_GROUP_RETRIES),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )


def _run_worker(loop_config: dict[str, Any]) -> None:
    """What each worker runs."""
    from raysweep.training.distributed import WorkerLost

    config, path = (
        TrainingConfig.model_validate_json(loop_config["config"]),
        storage.local_path(loop_config["path"]),
    )
    try:
        _train_worker(config, path, loop_config)
    except TrainingFailed as error:
        # All workers at once.
        _report_metrics({FAILURE_KEY: str(error), "epoch": 0})
    except (WorkerLost, storage.BucketUnavailable):
        raise
    except Exception as error:
        # Perhaps this one's alone: the others wait for it, and only the end of the group frees
        # them.
        save_failure_report(path, failure_report(error, config, path))
        raise


def _train_worker(config: TrainingConfig, run_path: Path, loop_config: dict[str, Any]) -> None:
    """One worker's part of the training."""
    import torch

    from raysweep.training.distributed import DistributedWorkerGroup, broadcast_int

    torch.set_num_threads(loop_config["threads"])
    workers, device = DistributedWorkerGroup(), ray.train.torch.get_device()
    if workers.rank == 0:
        _save_placement_group(run_path)
    if broadcast_int(len(load_failure_report(run_path)), workers, device):
        # The last group ended by an error of this trial, and so would each after it.
        _report_metrics({**load_failure_report(run_path), "epoch": 0})
        return
    # A report waits for the next poll: when a group dies, its last two may not have got through.
    known = RunDirectory(run_path).read_history() if workers.rank == 0 else []
    missed = known[-2:]
    for number in range(broadcast_int(len(missed), workers, device)):
        _report_metrics(missed[number] if missed else {})
    data = loop_config["source"].load_shared(config.data) if loop_config["source"] else None
    train_model(
        config,
        run_path,
        FunctionCallback(_report_metrics),
        data=data,
        device=device,
        workers=workers,
        prefix_cache=loop_config["prefixes"],
    )


def _report_metrics(
    metrics: Mapping[str, float | str], checkpoint: TrainingCheckpoint | None = None
) -> None:
    """Ray Train's report, which waits for all workers."""
    from raysweep.training.distributed import collective_errors

    with collective_errors():
        ray.train.report(dict(metrics))


def _save_placement_group(run_path: Path) -> None:
    """Write down which placement group this worker lives in."""
    group = get_current_placement_group()
    assert group is not None
    run_path.mkdir(parents=True, exist_ok=True)
    (run_path / _PLACEMENT_GROUP_FILE).write_text(group.id.hex())
    storage.push_to_bucket(run_path / _PLACEMENT_GROUP_FILE)


def load_placement_group(run_path: Path) -> PlacementGroup | None:
    """The placement group of the workers that train, or trained last, in the folder `path`."""
    storage.pull_file(run_path / _PLACEMENT_GROUP_FILE)
    try:
        name = (run_path / _PLACEMENT_GROUP_FILE).read_text()
        return PlacementGroup(ray.PlacementGroupID(bytes.fromhex(name)))
    except (OSError, ValueError):
        return None


def remove_placement_group(group: PlacementGroup | None) -> None:
    """Free a placement group whose trial is over, if nobody has."""
    if is_placement_group_active(group):
        ray.util.remove_placement_group(group)


def is_placement_group_active(group: PlacementGroup | None) -> bool:
    return group is not None and placement_group_table(group).get("state") not in (None, "REMOVED")


class ReleaseWorkersCallback(tune.Callback):
    """Frees the workers of trials that were stopped (ray-project/ray #54305).

    Ray does so itself within a second or two where its dashboard runs. Not at once: a Train
    controller that is still alive would take the end of its workers for a failure and start new
    ones.
    """

    def __init__(self, trials_path: Path, grace_seconds: float = 5.0) -> None:
        self._trials_path = trials_path
        self._grace_seconds = grace_seconds
        self._pending_removals: list[tuple[float, PlacementGroup]] = []

    def on_trial_complete(
        self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any
    ) -> None:
        group = load_placement_group(self._trials_path / f"{trial.config['number']:04d}")
        if group is not None:
            self._pending_removals.append((time.monotonic() + self._grace_seconds, group))

    on_trial_error = on_trial_complete

    def on_step_end(self, iteration: int, trials: list[RayTrial], **info: Any) -> None:
        while self._pending_removals and self._pending_removals[0][0] <= time.monotonic():
            remove_placement_group(self._pending_removals.pop(0)[1])

    def on_experiment_end(self, trials: list[RayTrial], **info: Any) -> None:
        while any(is_placement_group_active(group) for _, group in self._pending_removals):
            time.sleep(0.1)
            self.on_step_end(0, trials)
