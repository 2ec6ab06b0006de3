"""A trial on several workers: Ray Train's group within the trial, which itself only waits and passes reports on."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
from ray import tune
from ray.tune.experiment import Trial as RayTrial
from ray.tune.integration.ray_train import TuneReportCallback
from ray.util.placement_group import PlacementGroup, get_current_placement_group, placement_group_table

from raysweep import storage
from raysweep.data.shared import Source
from raysweep.spec import SpecError
from raysweep.sweep.failures import FAILED, explain, forget, keep, kept
from raysweep.sweep.resources import DRIVER_CPUS
from raysweep.training.checkpoint import Checkpoint, Run
from raysweep.training.config import RunConfig
from raysweep.training.prefix import Prefixes
from raysweep.training.trainer import TrainingFailed, fit

_RETRIES = 3
_HELD = "placement-group"


def train_on_workers(
    config: RunConfig,
    path: Path,
    workers: int,
    each: dict[str, float],
    prefixes: Prefixes | None = None,
    source: Source | None = None,
) -> None:
    """One trial in the folder `path` on `workers` processes that hold `each` of Ray's resources.

    A worker that dies costs the epoch that it was in: Ray Train starts the group again, and `fit` goes on from the
    folder's last checkpoint.
    """
    release(held(path))
    forget(path)
    try:
        # Reports that an earlier driver or group did not get through; those that did change nothing.
        for metrics in Run(path).history():
            tune.report(metrics)
        _trainer(config, path, workers, each, prefixes, source).fit()
    except SpecError as error:
        tune.report({FAILED: str(error), "epoch": 0})


def _trainer(
    config: RunConfig,
    path: Path,
    workers: int,
    each: dict[str, float],
    prefixes: Prefixes | None,
    source: Source | None,
) -> "ray.train.torch.TorchTrainer":
    gpus, threads = each.get("GPU", 0), max(1, int(round(each["CPU"] + DRIVER_CPUS, 3)))
    return ray.train.torch.TorchTrainer(
        _work,
        train_loop_config={
            "config": config.model_dump_json(),
            "path": storage.name(path),
            "threads": threads,
            "prefixes": prefixes,
            "source": source,
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers, use_gpu=gpus > 0, resources_per_worker={k: v for k, v in each.items() if v}
        ),
        # NCCL wants a device for each rank.
        torch_config=ray.train.torch.TorchConfig(backend="nccl" if gpus >= 1 else "gloo"),
        run_config=ray.train.RunConfig(
            name=f"workers-{path.name}",
            storage_path=str(path.parent.parent / "ray"),
            callbacks=[TuneReportCallback()],
            failure_config=ray.train.FailureConfig(max_failures=_RETRIES),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )


def _work(loop: dict[str, Any]) -> None:
    """What each worker runs."""
    from raysweep.training.distributed import PeerLost

    config, path = RunConfig.model_validate_json(loop["config"]), storage.at(loop["path"])
    try:
        _share(config, path, loop)
    except TrainingFailed as error:
        # All workers at once.
        _report({FAILED: str(error), "epoch": 0})
    except (PeerLost, storage.StoreFailed):
        raise
    except Exception as error:
        # Perhaps this one's alone: the others wait for it, and only the end of the group frees them.
        keep(path, explain(error, config, path))
        raise


def _share(config: RunConfig, path: Path, loop: dict[str, Any]) -> None:
    """One worker's part of the training."""
    import torch

    from raysweep.training.distributed import GroupWorkers, first_says

    torch.set_num_threads(loop["threads"])
    workers, device = GroupWorkers(), ray.train.torch.get_device()
    if workers.rank == 0:
        _hold(path)
    if first_says(len(kept(path)), workers, device):
        # The last group ended by an error of this trial, and so would each after it.
        _report({**kept(path), "epoch": 0})
        return
    # A report waits for the next poll: when a group dies, its last two may not have got through.
    known = Run(path).history() if workers.rank == 0 else []
    missed = known[-2:]
    for number in range(first_says(len(missed), workers, device)):
        _report(missed[number] if missed else {})
    data = loop["source"].load(config.data) if loop["source"] else None
    fit(config, path, _report, data=data, device=device, workers=workers, prefixes=loop["prefixes"])


def _report(metrics: Mapping[str, float | str], saved: Checkpoint | None = None) -> None:
    """Ray Train's report, which waits for all workers."""
    from raysweep.training.distributed import together

    with together():
        ray.train.report(dict(metrics))


def _hold(path: Path) -> None:
    """Write down which placement group this worker lives in."""
    group = get_current_placement_group()
    assert group is not None
    path.mkdir(parents=True, exist_ok=True)
    (path / _HELD).write_text(group.id.hex())
    storage.push(path / _HELD)


def held(path: Path) -> PlacementGroup | None:
    """The placement group of the workers that train, or trained last, in the folder `path`."""
    storage.pull_file(path / _HELD)
    try:
        name = (path / _HELD).read_text()
        return PlacementGroup(ray.PlacementGroupID(bytes.fromhex(name)))
    except (OSError, ValueError):
        return None


def release(group: PlacementGroup | None) -> None:
    """Free a placement group whose trial is over, if nobody has."""
    if is_held(group):
        ray.util.remove_placement_group(group)


def is_held(group: PlacementGroup | None) -> bool:
    return group is not None and placement_group_table(group).get("state") not in (None, "REMOVED")


class Release(tune.Callback):
    """Frees the workers of trials that were stopped (ray-project/ray #54305).

    Ray does so itself within a second or two where its dashboard runs. Not at once: a Train controller that is still
    alive would take the end of its workers for a failure and start new ones.
    """

    def __init__(self, trials: Path, grace: float = 5.0) -> None:
        self._trials = trials
        self._grace = grace
        self._ended: list[tuple[float, PlacementGroup]] = []

    def on_trial_complete(self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any) -> None:
        group = held(self._trials / f"{trial.config['number']:04d}")
        if group is not None:
            self._ended.append((time.monotonic() + self._grace, group))

    on_trial_error = on_trial_complete

    def on_step_end(self, iteration: int, trials: list[RayTrial], **info: Any) -> None:
        while self._ended and self._ended[0][0] <= time.monotonic():
            release(self._ended.pop(0)[1])

    def on_experiment_end(self, trials: list[RayTrial], **info: Any) -> None:
        while any(is_held(group) for _, group in self._ended):
            time.sleep(0.1)
            self.on_step_end(0, trials)
