"""Callbacks of training, and the sums of epochs that a sweep reports."""

from pathlib import Path

import pytest
from conftest import tiny

from raysweep.data import DatasetSplits
from raysweep.sweep.epoch_counts import count_epochs
from raysweep.sweep.trial import Trial
from raysweep.training.callbacks import FunctionCallback, TrainingCallback
from raysweep.training.checkpoint import TrainingCheckpoint
from raysweep.training.metric_history import EpochMetrics
from raysweep.training.mid_epoch_checkpoint import TrainingInterrupted
from raysweep.training.trainer import train_model


class SecondStepCallback(TrainingCallback):
    """Interrupts after the second step, and does nothing else."""

    steps = 0

    def on_step_end(self, epoch: int, steps: int) -> None:
        self.steps += 1

    def should_interrupt(self) -> bool:
        return self.steps == 2


def test_a_subclass_overrides_the_methods_that_it_needs(
    tmp_path: Path, digits: DatasetSplits
) -> None:
    with pytest.raises(TrainingInterrupted, match="in epoch 1 after 2 steps"):
        train_model(tiny("at", batch_size=10), tmp_path, SecondStepCallback(), data=digits)


def test_functions_are_called_in_the_order_of_training(
    tmp_path: Path, digits: DatasetSplits
) -> None:
    calls: list[str] = []

    def on_epoch_end(metrics: EpochMetrics, checkpoint: TrainingCheckpoint) -> None:
        assert checkpoint.last_metrics == metrics and checkpoint.local_folder.is_dir()
        calls.append(f"epoch {metrics['epoch']}")

    def should_interrupt() -> bool:
        calls.append("asked")
        return False

    callback = FunctionCallback(
        on_epoch_end, lambda epoch, steps: calls.append(f"step {epoch} {steps}"), should_interrupt
    )
    train_model(tiny("at", epochs=1), tmp_path, callback, data=digits)
    assert calls == ["step 1 1", "asked", "step 1 2", "asked", "epoch 1"]


def test_a_callback_without_functions_does_nothing(tmp_path: Path, digits: DatasetSplits) -> None:
    (metrics,) = train_model(
        tiny("at", epochs=1), tmp_path, FunctionCallback(), data=digits
    ).last_checkpoint.history
    assert metrics["epoch"] == 1


def test_reused_epochs_are_completed_but_not_trained() -> None:
    trials = [
        Trial(0, {}, epoch=3, trained_epochs=3),
        Trial(1, {}, state="stopped", epoch=2, trained_epochs=1),
    ]
    counts = count_epochs(trials)
    assert (counts.completed, counts.trained, counts.reused) == (5, 4, 1)
    assert str(counts) == "epochs: 5 completed, 4 trained, 1 reused from other trials"
    assert count_epochs([]).completed == 0
