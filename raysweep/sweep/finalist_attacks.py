"""Attack the best trials of a sweep with full AutoAttack on the validation images."""

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import ray
import torch

from raysweep.attacks import Norm, build_named_attack
from raysweep.data import Split
from raysweep.data.dataset_cache import CachedDataset
from raysweep.errors import InfrastructureError, get_first_line, is_infrastructure_error
from raysweep.evaluation import RobustnessReport, ShardMapper, evaluate
from raysweep.evaluation.progress import EvaluationProgress
from raysweep.sweep.finalist_result import FinalistResult
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.trial import Trial
from raysweep.sweep.tune_callbacks import LedgerCallback, SweepListener
from raysweep.training.checkpoint import TrainingCheckpoint, read_checkpoint
from raysweep.training.example_verdicts import ExampleVerdicts
from raysweep.training.model_loading import load_trained_model

logger = logging.getLogger(__name__)

_SHARD_FOLDER = "finalist-shards"


class _LimitReached(Exception):
    """The budget of the sweep is spent in the middle of an attack."""


class _Target(NamedTuple):
    """What AutoAttack attacks.

    Attributes:
        model: Maps images in [0, 1], (N, C, H, W), to logits.
        images: The validation images of the objective.
        eps: Radius, in pixels of [0, 1].
        norm: "Linf" or "L2".
    """

    model: torch.nn.Module
    images: Split
    eps: float
    norm: Norm


def attack_finalists(
    ledger: Ledger,
    dataset: CachedDataset,
    ledger_callback: LedgerCallback,
    listeners: Sequence[SweepListener],
    mapper: ShardMapper,
) -> None:
    """Attack the finalists that have no result yet, one after the other, each on the whole cluster.

    Each result is written to the ledger at once. An attack that the budget or Ctrl-C cuts off keeps
    its finished shards, from which the next call continues.

    Args:
        ledger: A sweep, whose trials have ended; otherwise nothing happens.
        dataset: Data of the sweep.
        ledger_callback: Knows the budget, to which the attacks are counted.
        listeners: Objects that are notified before and after each attack.
        mapper: Runs the shards of an attack; each holds what a trial holds.

    Raises:
        InfrastructureError: If tasks lose their processes again and again, or a disk is full.
    """
    waiting = ledger.find_waiting_finalists()
    if not waiting:
        return
    with ledger_callback.hold_resources(getattr(mapper, "width", 1)):
        for n_done, trial in enumerate(waiting):
            if ledger_callback.update_limit_reached():
                return
            n_left = len(waiting) - n_done
            _notify(listeners, trial, n_left)
            try:
                result = _attack_trial(ledger, trial, dataset, ledger_callback, mapper)
            except _LimitReached:
                return
            attacked_trial = replace(trial, finalist=result)
            ledger.save_trial(attacked_trial)
            (ledger.run_path(trial) / _SHARD_FOLDER).delete_folder()
            _log_result(attacked_trial, result)
            _notify(listeners, attacked_trial, n_left - 1)


def _notify(listeners: Sequence[SweepListener], trial: Trial, n_left: int) -> None:
    """Tell all listeners of a finalist."""
    for listener in listeners:
        listener.on_finalist_update(trial, n_left)


def _attack_trial(
    ledger: Ledger,
    trial: Trial,
    dataset: CachedDataset,
    ledger_callback: LedgerCallback,
    mapper: ShardMapper,
) -> FinalistResult:
    """Attack the best checkpoint of a trial, and return the result or why there is none."""
    started_at = time.monotonic()

    def stop_at_limit(progress: EvaluationProgress) -> None:
        if ledger_callback.update_limit_reached():
            raise _LimitReached

    checkpoint = read_checkpoint(ledger.best_checkpoint_path(trial))
    target = _load_target(checkpoint, dataset)
    shard_folder = ledger.run_path(trial).working_path / _SHARD_FOLDER
    robust, verdicts, error = None, None, ""
    try:
        report: RobustnessReport = evaluate(
            target.model,
            target.images.get_float_images(slice(None)),
            target.images.y,
            build_named_attack("autoattack", target.eps, target.norm),
            index=target.images.index,
            resume_dir=shard_folder,
            map=mapper,
            progress=stop_at_limit,
        )
        robust = report.robust_accuracy
        verdicts = ExampleVerdicts.from_mask(
            "autoattack", checkpoint.epoch, report.robust, report.index
        )
    except (_LimitReached, InfrastructureError):
        raise
    except ray.exceptions.RayTaskError as task_error:
        error = get_first_line(task_error.cause or task_error)
    except ray.exceptions.RayError as ray_error:
        raise InfrastructureError(
            f"AutoAttack on {trial.title} lost its processes: "
            f"{get_first_line(ray_error)}; the sweep's `--resume` continues it"
        ) from ray_error
    except Exception as own_error:
        if is_infrastructure_error(own_error):
            raise
        error = get_first_line(own_error)
        logger.warning("AutoAttack on %s failed", trial.title, exc_info=own_error)
    return FinalistResult(
        epoch=checkpoint.epoch,
        robust=robust,
        n_examples=len(target.images),
        eps=target.eps,
        norm=target.norm,
        seconds=time.monotonic() - started_at,
        error=error,
        verdicts=verdicts,
    )


def _load_target(checkpoint: TrainingCheckpoint, dataset: CachedDataset) -> _Target:
    """Load a model and the validation images and threat model of its objective."""
    config = checkpoint.config
    data = dataset.load_shared(config.data)
    validation = config.resolve_at(checkpoint.epoch - 1).validation
    images = validation.select_split(data)
    if validation.size is not None and validation.size < len(images):
        images = images.select_rows(torch.arange(validation.size))
    threat_model = validation.find_threat_model()
    assert threat_model is not None  # checked by `SearchSpace.find_problems`
    return _Target(load_trained_model(checkpoint, data), images, *threat_model)


def _log_result(trial: Trial, result: FinalistResult) -> None:
    """Log the result of a finalist."""
    logger.info(
        "%s under AutoAttack: %s",
        trial.title,
        result.error or f"{result.robust:.4f} of {result.n_examples} validation images",
        extra={
            "event": "finalist",
            "trial": trial.number,
            "epoch": result.epoch,
            "robust": result.robust,
            "seconds": result.seconds,
            "is_shown_elsewhere": True,
        },
    )
