"""Callbacks of training, and the sums of epochs that a sweep reports."""

import gc
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny

from raysweep.data import DatasetSplits
from raysweep.errors import InfrastructureError
from raysweep.stores import StorePath
from raysweep.sweep.epoch_counts import count_epochs
from raysweep.sweep.trial import Trial
from raysweep.training import checkpoint
from raysweep.training.callbacks import FunctionCallback, TrainingCallback
from raysweep.training.checkpoint import RunDirectory, TrainingCheckpoint
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


def save_first_epoch_after(event: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the checkpoint of the first epoch only once the event is set."""
    save = checkpoint.save_checkpoint

    def save_late(path: StorePath, *args: Any, **kwargs: Any) -> TrainingCheckpoint:
        if path.name == "epoch-0001":
            assert event.wait(600)
        return save(path, *args, **kwargs)

    monkeypatch.setattr(checkpoint, "save_checkpoint", save_late)


def test_a_checkpoint_is_written_beside_the_next_epoch_and_then_reported(
    tmp_path: Path, digits: DatasetSplits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its write ends after a step of the next epoch. An interruption reports the epoch first."""
    calls: list[str] = []
    is_next_epoch = threading.Event()
    save_first_epoch_after(is_next_epoch, monkeypatch)

    def on_epoch_end(metrics: EpochMetrics, saved: TrainingCheckpoint) -> None:
        assert saved.local_folder.is_dir()
        calls.append(f"epoch {metrics['epoch']}")

    def on_step_end(epoch: int, steps: int) -> None:
        calls.append(f"step {epoch} {steps}")
        if epoch == 2:
            is_next_epoch.set()

    callback = FunctionCallback(on_epoch_end, on_step_end, is_next_epoch.is_set)
    with pytest.raises(TrainingInterrupted, match="in epoch 2 after 1 step"):
        train_model(tiny("at", epochs=2), tmp_path / "late", callback, data=digits)
    assert calls == ["step 1 1", "step 1 2", "step 2 1", "epoch 1"]
    resumed = train_model(tiny("at", epochs=2), tmp_path / "late", data=digits).last_checkpoint
    alone = train_model(tiny("at", epochs=2), tmp_path / "alone", data=digits).last_checkpoint
    assert resumed.meta["sha256"] == alone.meta["sha256"]


def test_an_epoch_is_reported_although_the_next_one_fails(
    tmp_path: Path, digits: DatasetSplits, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported: list[float] = []
    has_failed = threading.Event()
    save_first_epoch_after(has_failed, monkeypatch)

    def fail_in_second_epoch(epoch: int, steps: int) -> None:
        if epoch == 2:
            has_failed.set()
            raise MemoryError("a bug")

    callback = FunctionCallback(
        lambda metrics, saved: reported.append(metrics["epoch"]), fail_in_second_epoch
    )
    with pytest.raises(MemoryError, match="a bug"):
        train_model(tiny("at", epochs=2), tmp_path, callback, data=digits)
    assert reported == [1]


def test_the_memory_of_a_training_is_free_at_its_end(tmp_path: Path, digits: DatasetSplits) -> None:
    """Without the garbage collector, which a full GPU does not call."""
    # `get_objects` lists none of those that are there already.
    gc.freeze()
    gc.disable()
    try:
        train_model(tiny("at", epochs=1), tmp_path, data=digits)
        assert not [found for found in gc.get_objects() if isinstance(found, torch.optim.SGD)]
    finally:
        gc.enable()


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_checkpoint_that_cannot_be_written_ends_the_training(
    tmp_path: Path, digits: DatasetSplits, monkeypatch: pytest.MonkeyPatch, epochs: int
) -> None:
    """By its own line, and its epoch is not reported."""

    def fail(*args: Any, **kwargs: Any) -> TrainingCheckpoint:
        raise InfrastructureError("the disk is full")

    reported: list[EpochMetrics] = []
    monkeypatch.setattr(checkpoint, "save_checkpoint", fail)
    callback = FunctionCallback(lambda metrics, saved: reported.append(metrics))
    with pytest.raises(InfrastructureError, match=r"^the disk is full$"):
        train_model(tiny("at", epochs=epochs), tmp_path, callback, data=digits)
    assert not reported and not RunDirectory(tmp_path).list_saved_epochs()
    assert not [t for t in threading.enumerate() if t.name.startswith("checkpoint")]


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
