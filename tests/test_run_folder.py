"""The folder of a run: what is measured, kept, resumed and refused, in runs of a fraction of a
second.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from raysweep.data import DatasetSplits
from raysweep.errors import DamagedFileError
from raysweep.method import Method
from raysweep.spec import SpecError, apply_overrides
from raysweep.training import checkpoint
from raysweep.training.callbacks import FunctionCallback
from raysweep.training.checkpoint import (
    OPTIMIZER_FILE,
    WEIGHTS_FILE,
    RunDirectory,
    TrainingCheckpoint,
)
from raysweep.training.config import TrainingConfig, build_training_config
from raysweep.training.mid_epoch_checkpoint import TrainingInterrupted
from raysweep.training.prefix_cache import prefix_keys
from raysweep.training.selection import find_best_epoch
from raysweep.training.trainer import (
    TrainingFailed,
    check_resumable,
    train_model,
)

Row = dict[str, float]
QUICK: dict[str, Any] = {
    "data.train_size": 64,
    "data.val_size": 50,
    "batch_size": 32,
    "validation.attacks": {"pgd": {"kind": "pgd", "steps": 1}},
    "validation.finish": {},
    "validation.scales": [],
    "validation.objective": "clean",
}


def quick_config(**changes: Any) -> TrainingConfig:
    """Training without an attack; `__` in a name stands for a dot."""
    return build_training_config(
        "standard", QUICK, {key.replace("__", "."): value for key, value in changes.items()}
    )


def write(
    path: Path, config: TrainingConfig, rows: Sequence[Row], data: DatasetSplits
) -> TrainingCheckpoint:
    """Save a checkpoint of an untrained network with the given history."""
    model = config.model.build_model(1, 10, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return checkpoint.save_checkpoint(
        path,
        config,
        checkpoint.TrainingState.copy_from(model, optimizer),
        list(rows),
        data.fingerprint,
    )


def rows_of(*clean: float | None, first: int = 1) -> list[Row]:
    """A row for each epoch; None stands for an epoch that was not measured."""
    return [
        {"epoch": float(epoch)} | ({} if share is None else {"clean": share})
        for epoch, share in enumerate(clean, first)
    ]


@pytest.mark.parametrize(
    ("every", "epochs", "measured"),
    [(1, 2, [1, 2]), (2, 5, [2, 4, 5]), (2, 4, [2, 4]), (3, 2, [2]), (4, 5, [4, 5])],
)
def test_every_nth_epoch_and_the_last_are_measured(
    every: int, epochs: int, measured: list[int], tmp_path: Path, digits: DatasetSplits
) -> None:
    fitted = train_model(
        quick_config(epochs=epochs, validation__every=every), tmp_path, data=digits
    )
    history = fitted.last_checkpoint.history
    for metric in ("clean", "pgd", "robust_worst", "train/natural", "validation_seconds"):
        assert [row["epoch"] for row in history if metric in row] == measured, metric
    assert len(history) == epochs and all("train/loss" in row for row in history)
    assert fitted.best_checkpoint.epoch in measured


def test_a_run_that_grows_keeps_what_was_measured_at_its_former_end(
    tmp_path: Path, digits: DatasetSplits
) -> None:
    train_model(quick_config(epochs=3, validation__every=2), tmp_path, data=digits)
    grown = train_model(
        quick_config(epochs=5, validation__every=2), tmp_path, data=digits
    ).last_checkpoint.history
    assert [row["epoch"] for row in grown if "clean" in row] == [2, 3, 4, 5]


@pytest.mark.parametrize(
    ("clean", "best"),
    [
        ((0.2, 0.5, 0.4), 2),
        ((0.5, 0.5, 0.5), 1),
        ((0.4, 0.5, 0.5), 2),
        ((None, 0.3, None, 0.4), 4),
        ((None, 0.4, None, 0.4), 2),
        ((None, 0.0), 2),
        ((0.7,), 1),
    ],
)
def test_the_best_epoch_is_the_first_of_the_highest(
    clean: tuple[float | None, ...], best: int
) -> None:
    assert find_best_epoch(quick_config(), rows_of(*clean)) == best


def test_the_best_epoch_is_by_the_objective_alone() -> None:
    rows = [{"clean": 0.9, "pgd": 0.1}, {"clean": 0.8, "pgd": 0.3}, {"clean": 0.7, "pgd": 0.2}]
    assert find_best_epoch(quick_config(), rows) == 1
    assert find_best_epoch(quick_config(validation__objective="pgd"), rows) == 2


# Chance is 0.1. Two standard deviations above it are 0.1849 for 50 images and 0.2342 for 20.
@pytest.mark.parametrize(
    ("clean", "changes", "collapsed"),
    [
        ((0.9, 0.9, 0.9, 0.18, 0.18), {}, True),
        ((0.9, 0.9, 0.9, 0.19, 0.18), {}, False),
        ((0.9, 0.9, 0.9, 0.18, 0.19), {}, False),
        ((0.18, 0.18, 0.18, 0.9, 0.9), {}, False),
        ((0.1, 0.1, 0.1, 0.1), {}, False),
        ((0.1, 0.1, 0.1, 0.1), {"collapse_after": 2}, True),
        ((0.1, 0.1, 0.1, 0.1), {"collapse_after": None}, False),
        ((0.1,), {"collapse_after": 0}, False),
        ((0.1, 0.1), {"collapse_after": 0}, True),
        ((0.9, 0.9, None, 0.1, None, 0.1), {}, True),
        ((0.9, 0.9, None, 0.1, None, 0.2), {}, False),
        ((None, None, None, None, None, 0.1), {}, False),
        ((0.9, 0.9, 0.9, 0.23, 0.23), {"validation.size": 20}, True),
        ((0.9, 0.9, 0.9, 0.24, 0.24), {"validation.size": 20}, False),
        ((0.9, 0.9, 0.9, 0.18, 0.18), {"validation.size": 1000}, True),
        ((0.9, 0.9, 0.9, 0.19, 0.19), {"validation.size": 1000}, False),
    ],
)
def test_a_collapse_is_two_measured_epochs_no_better_than_chance(
    clean: tuple[float | None, ...],
    changes: dict[str, Any],
    collapsed: bool,
    tmp_path: Path,
    digits: DatasetSplits,
) -> None:
    config = apply_overrides(quick_config(epochs=len(clean), collapse_after=3), changes)
    rows = rows_of(*clean)
    for epoch in {find_best_epoch(config, rows), len(rows)}:
        write(RunDirectory(tmp_path).epoch_path(epoch), config, rows[:epoch], digits)
    if collapsed:
        with pytest.raises(
            TrainingFailed,
            match=f"collapsed: {clean[-1]:.3f} of .* right in epoch {len(clean)}, no",
        ):
            train_model(config, tmp_path, data=digits)
    else:
        train_model(config, tmp_path, data=digits)


@pytest.mark.parametrize(("clean", "kept"), [((0.3, 0.9, 0.5), {2, 4}), ((0.9, 0.9, 0.5), {1, 4})])
def test_pruning_keeps_the_best_and_the_last_and_removes_leftovers_of_crashes(
    clean: tuple[float, ...], kept: set[int], tmp_path: Path, digits: DatasetSplits
) -> None:
    config, rows = quick_config(epochs=4, optim__lr=1e-9), rows_of(*clean)
    run = RunDirectory(tmp_path)
    for epoch in (1, 2, 3):
        write(run.epoch_path(epoch), config, rows[:epoch], digits)
    key = run.run_key
    left = [tmp_path / name for name in (".epoch-0004.17", ".half.17", "half")]
    for folder in left:
        folder.mkdir()
        (folder / "weights.safetensors").write_bytes(b"half")
    fitted = train_model(config, tmp_path, data=digits)
    assert fitted.last_checkpoint.last_metrics["clean"] < 0.5, (
        "the network of epoch 4 is as good as untrained"
    )
    assert set(run.list_saved_epochs()) == kept and fitted.best_checkpoint.epoch == min(kept)
    assert not any(folder.exists() for folder in left)
    assert run.run_key == key and (tmp_path / "histograms" / "epoch-0004.json").is_file()


def test_when_an_epoch_is_reported_it_and_the_best_so_far_are_saved(
    tmp_path: Path, digits: DatasetSplits
) -> None:
    config = quick_config(epochs=5, optim__lr=0.3, data__train_size=32)
    found: list[tuple[set[int], int]] = []

    def record_saved_epochs(metrics: Row, saved: TrainingCheckpoint) -> None:
        found.append((set(RunDirectory(tmp_path).list_saved_epochs()), saved.epoch))

    train_model(config, tmp_path, FunctionCallback(record_saved_epochs), data=digits)
    history = RunDirectory(tmp_path).read_history()
    for number, (epochs, told) in enumerate(found, 1):
        clean = [row["clean"] for row in history[:number]]
        assert epochs == {number, clean.index(max(clean)) + 1} and told == number


class Enough(Exception):
    """Raised by a report: the process ends here."""


def test_a_run_that_stops_after_each_epoch_has_the_same_bits_as_one_that_does_not(
    tmp_path: Path, digits: DatasetSplits
) -> None:
    changes = {
        "optim.lr": {"kind": "piecewise", "boundaries": [1, 2], "values": [0.1, 0.05, 0.01]},
        "epochs": 4,
    }
    config = build_training_config(
        "at", QUICK, {"method.attacks.pgd.steps": 1, "data.augment": True, **changes}
    )
    data = replace(digits, augment=True)
    whole = train_model(config, tmp_path / "whole", data=data)

    def stop(metrics: Row, saved: TrainingCheckpoint) -> None:
        raise Enough

    for epoch in range(1, 5):
        with pytest.raises(Enough):
            train_model(
                config,
                tmp_path / "parts",
                FunctionCallback(stop),
                data=data,
                n_reported_epochs=epoch - 1,
            )
        assert RunDirectory(tmp_path / "parts").list_saved_epochs()[-1] == epoch
    parts = train_model(config, tmp_path / "parts", data=data)
    assert parts.last_checkpoint.meta["sha256"] == whole.last_checkpoint.meta["sha256"]
    assert (
        parts.best_checkpoint.meta["sha256"] == whole.best_checkpoint.meta["sha256"]
        and parts.best_checkpoint.epoch == whole.best_checkpoint.epoch
    )
    untimed = [
        [{k: v for k, v in r.items() if "seconds" not in k} for r in f.last_checkpoint.history]
        for f in (parts, whole)
    ]
    assert untimed[0] == untimed[1]


def test_an_epoch_that_failed_leaves_no_checkpoint(tmp_path: Path, digits: DatasetSplits) -> None:
    lr = {"kind": "piecewise", "boundaries": [1], "values": [0.01, 1e30]}
    with pytest.raises(TrainingFailed, match="in epoch 2"):
        train_model(quick_config(epochs=3, optim__lr=lr), tmp_path, data=digits)
    assert RunDirectory(tmp_path).list_saved_epochs() == [1]


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"batch_size": 31},
        {"optim.weight_decay": 0.1},
        {"optim.nesterov": True},
        {"method.terms.natural.coef": 2},
        {"method.name": "other"},
        {"data.train_size": 63},
        {"data.split_seed": 1},
        {"model.mean": [0.5], "model.std": [0.5]},
        {"validation.every": 2},
        {"compute.fold": False},
        {"collapse_after": 5},
        {"epochs": 2},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_run_does_not_resume_with_other_settings(
    changes: dict[str, Any], tmp_path: Path, digits: DatasetSplits
) -> None:
    config = quick_config(epochs=6)
    saved = write(tmp_path / "run" / "epoch-0003", config, rows_of(0.5, 0.5, 0.5), digits)
    with pytest.raises(SpecError) as error:
        check_resumable(saved, apply_overrides(config, changes), digits.fingerprint)
    (line,) = error.value.problems
    assert (
        line == f"{tmp_path / 'run'} holds a run with other settings: choose another --name, "
        "or delete the folder"
    )


def test_a_run_resumes_with_as_many_or_more_epochs_and_on_its_own_data_only(
    tmp_path: Path, digits: DatasetSplits
) -> None:
    config = quick_config(epochs=6)
    saved = write(tmp_path / "epoch-0003", config, rows_of(0.5, 0.5, 0.5), digits)
    for epochs in (3, 5, 6, 60):
        check_resumable(saved, apply_overrides(config, {"epochs": epochs}), digits.fingerprint)
    with pytest.raises(SpecError, match="holds a run on other 'digits' data"):
        check_resumable(saved, config, "0" * 16)


def interrupt_after(steps: int, config: TrainingConfig, path: Path, data: DatasetSplits) -> None:
    """Train this many steps, then leave the run in the middle of an epoch."""
    left = [steps]

    def interrupted() -> bool:
        left[0] -= 1
        return left[0] == 0

    with pytest.raises(TrainingInterrupted):
        train_model(config, path, FunctionCallback(should_interrupt=interrupted), data=data)


def steps_told(config: TrainingConfig, path: Path, data: DatasetSplits) -> list[tuple[int, int]]:
    told: list[tuple[int, int]] = []
    train_model(
        config,
        path,
        FunctionCallback(on_step_end=lambda epoch, steps: told.append((epoch, steps))),
        data=data,
    )
    return told


def test_half_an_epoch_is_resumed_also_with_more_epochs(
    tmp_path: Path, digits: DatasetSplits
) -> None:
    interrupt_after(6, quick_config(epochs=2, batch_size=16), tmp_path, digits)
    assert steps_told(quick_config(epochs=3, batch_size=16), tmp_path, digits) == [
        *((2, step) for step in (3, 4)),
        *((3, step) for step in (1, 2, 3, 4)),
    ]


def test_half_an_epoch_on_other_data_starts_again(tmp_path: Path, digits: DatasetSplits) -> None:
    config = quick_config(epochs=1, batch_size=16)
    interrupt_after(2, config, tmp_path, digits)
    other = replace(digits, fingerprint="0" * 16)
    assert steps_told(config, tmp_path, other) == [(1, 1), (1, 2), (1, 3), (1, 4)]


def test_half_of_an_epoch_that_was_saved_is_ignored(tmp_path: Path, digits: DatasetSplits) -> None:
    """A process died after it had saved the epoch, before it deleted the half."""
    config = quick_config(epochs=2, batch_size=16)
    interrupt_after(2, config, tmp_path, digits)
    whole = train_model(config, tmp_path / "whole", data=digits)
    first = train_model(
        quick_config(epochs=1, batch_size=16), tmp_path / "first", data=digits
    ).last_checkpoint
    first.local_folder.rename(tmp_path / "epoch-0001")
    assert steps_told(config, tmp_path, digits) == [(2, 1), (2, 2), (2, 3), (2, 4)]
    last = RunDirectory(tmp_path).read_last_checkpoint()
    assert last is not None and last.meta["sha256"] == whole.last_checkpoint.meta["sha256"]


def test_the_time_of_an_epoch_is_the_sum_over_all_processes_that_trained_it(
    tmp_path: Path, digits: DatasetSplits
) -> None:
    config = quick_config(epochs=1, batch_size=16)
    interrupt_after(2, config, tmp_path, digits)
    seen = tmp_path / "half" / "seen.safetensors"
    with safe_open(seen, "pt") as file:
        facts = file.metadata()
    save_file(load_file(seen), seen, facts | {"seconds": "1000.0"})
    (row,) = train_model(config, tmp_path, data=digits).last_checkpoint.history
    assert 1000 < row["train/seconds"] < 1100


class TestCheckpoint:
    @pytest.fixture
    def saved(self, tmp_path: Path, digits: DatasetSplits) -> TrainingCheckpoint:
        return write(tmp_path / "run" / "epoch-0002", quick_config(), rows_of(0.2, 0.3), digits)

    def test_it_is_read_as_it_was_written(
        self, saved: TrainingCheckpoint, digits: DatasetSplits
    ) -> None:
        again = checkpoint.read_checkpoint(saved.local_folder)
        assert (
            again == saved
            and again.epoch == 2
            and again.last_metrics == {"epoch": 2.0, "clean": 0.3}
        )
        assert again.meta["format"] == 1 and again.meta["data_fingerprint"] == digits.fingerprint

    @pytest.mark.parametrize("number", [0, 2, 3, "1", None, [1]])
    def test_another_format_is_refused(self, number: object, saved: TrainingCheckpoint) -> None:
        self.change(saved, format=number)
        with pytest.raises(DamagedFileError, match="not a raysweep checkpoint of format 1"):
            checkpoint.read_checkpoint(saved.local_folder)

    @pytest.mark.parametrize(
        "key", ["format", "config", "epoch", "history", "data_fingerprint", "sha256"]
    )
    def test_a_missing_key_is_named(self, key: str, saved: TrainingCheckpoint) -> None:
        meta = json.loads((saved.local_folder / "meta.json").read_text())
        del meta[key]
        (saved.local_folder / "meta.json").write_text(json.dumps(meta))
        with pytest.raises(DamagedFileError, match=r"not a raysweep checkpoint.*" + key):
            checkpoint.read_checkpoint(saved.local_folder)

    def test_files_that_are_exchanged_altered_or_gone_are_refused(
        self, saved: TrainingCheckpoint
    ) -> None:
        weights, state = (
            (saved.local_folder / name).read_bytes() for name in (WEIGHTS_FILE, OPTIMIZER_FILE)
        )
        (saved.local_folder / WEIGHTS_FILE).write_bytes(state)
        (saved.local_folder / OPTIMIZER_FILE).write_bytes(weights)
        with pytest.raises(DamagedFileError, match="truncated or altered"):
            checkpoint.read_checkpoint(saved.local_folder)
        (saved.local_folder / WEIGHTS_FILE).write_bytes(weights)
        with pytest.raises(DamagedFileError, match=rf"{OPTIMIZER_FILE} is truncated or altered"):
            checkpoint.read_checkpoint(saved.local_folder)
        (saved.local_folder / OPTIMIZER_FILE).unlink()
        with pytest.raises(DamagedFileError, match=rf"{OPTIMIZER_FILE} is truncated or altered"):
            checkpoint.read_checkpoint(saved.local_folder)
        flipped = bytearray(weights)
        flipped[-1] ^= 1
        (saved.local_folder / OPTIMIZER_FILE).write_bytes(state)
        (saved.local_folder / WEIGHTS_FILE).write_bytes(flipped)
        with pytest.raises(DamagedFileError, match=rf"{WEIGHTS_FILE} is truncated or altered"):
            checkpoint.read_checkpoint(saved.local_folder)

    @pytest.mark.parametrize("names", [[WEIGHTS_FILE], [WEIGHTS_FILE, OPTIMIZER_FILE, "more"], []])
    def test_hashes_of_other_files_are_refused(
        self, names: list[str], saved: TrainingCheckpoint
    ) -> None:
        self.change(saved, sha256={name: saved.meta["sha256"].get(name, "0") for name in names})
        with pytest.raises(DamagedFileError, match=r"meta\.json lacks hashes"):
            checkpoint.read_checkpoint(saved.local_folder)

    def test_files_that_are_not_json_objects_are_refused(self, saved: TrainingCheckpoint) -> None:
        folder = saved.local_folder
        for text, words, kind in (
            ("[1]", "is not JSON", DamagedFileError),
            ("{", "is not JSON", DamagedFileError),
            (None, "is missing", SpecError),
        ):
            if text is None:
                (folder / "meta.json").unlink()
            else:
                (folder / "meta.json").write_text(text)
            with pytest.raises(kind, match=words):
                checkpoint.read_checkpoint(folder)

    @staticmethod
    def change(saved: TrainingCheckpoint, **values: object) -> None:
        (saved.local_folder / "meta.json").write_text(json.dumps({**saved.meta, **values}))

    def test_momentum_goes_back_to_the_parameter_it_belongs_to(self, tmp_path: Path) -> None:
        """Also if some parameters have no momentum yet."""
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        generator = torch.Generator().manual_seed(0)
        expected = {}
        for name, parameter in model.named_parameters():
            if name != "1.bias":
                expected[name] = torch.rand(parameter.shape, generator=generator)
                optimizer.state[parameter]["momentum_buffer"] = expected[name]
        saved = checkpoint.save_checkpoint(
            tmp_path / "c",
            quick_config(),
            checkpoint.TrainingState.copy_from(model, optimizer),
            rows_of(0.1),
            "f",
            {"more.txt": b"more"},
        )
        other = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
        into = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
        saved.load_training_state(other, into)
        assert all(
            torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
        )
        for name, parameter in other.named_parameters():
            if name in expected:
                assert torch.equal(into.state[parameter]["momentum_buffer"], expected[name])
            else:
                assert "momentum_buffer" not in into.state[parameter]
        assert (tmp_path / "c" / "more.txt").read_bytes() == b"more"

    def test_a_reused_state_costs_nothing_and_is_marked(
        self, saved: TrainingCheckpoint, tmp_path: Path
    ) -> None:
        config = quick_config(seed=7)
        timed = [{**row, "train/seconds": 5.0} for row in saved.history]
        self.change(saved, history=timed)
        all_of_it = checkpoint.reuse_checkpoint(tmp_path / "all", saved.local_folder, config)
        assert all_of_it == checkpoint.read_checkpoint(tmp_path / "all")
        assert all_of_it.history == [{**row, "train/seconds": 0.0, "shared": 1.0} for row in timed]
        own = {"epoch": 1.0, "clean": 0.25, "train/seconds": 9.0}
        last = checkpoint.reuse_checkpoint(tmp_path / "last", saved.local_folder, config, [own])
        assert last.history == [own, {**timed[1], "train/seconds": 0.0, "shared": 1.0}]
        assert (
            last.epoch == 2
            and last.config == config
            and last.meta["sha256"] == saved.meta["sha256"]
        )
        assert last.meta["data_fingerprint"] == saved.meta["data_fingerprint"]
        for name in (WEIGHTS_FILE, OPTIMIZER_FILE):
            assert (tmp_path / "last" / name).read_bytes() == (
                saved.local_folder / name
            ).read_bytes()


def test_epochs_are_numbers_of_whole_checkpoints(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert (
        run.list_saved_epochs() == []
        and run.read_last_checkpoint() is None
        and run.read_history() == []
    )
    for name in (
        "epoch-0009",
        "epoch-10000",
        "epoch-0010",
        "epoch-last",
        ".epoch-0011.5",
        "other-0012",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "meta.json").write_text("{}")
    (tmp_path / "epoch-0013").mkdir()
    assert run.list_saved_epochs() == [9, 10, 10000]
    assert [run.epoch_path(epoch).name for epoch in (9, 10, 10000)] == [
        "epoch-0009",
        "epoch-0010",
        "epoch-10000",
    ]


def test_a_run_keeps_its_key_and_has_another_than_any_other(tmp_path: Path) -> None:
    one, two = RunDirectory(tmp_path / "one").run_key, RunDirectory(tmp_path / "two").run_key
    assert RunDirectory(tmp_path / "one").run_key == one != two and len(one) == 32


def test_a_renamed_method_is_another_run_but_the_same_training() -> None:
    """The name is a setting that a folder checks, but it does not decide the weights."""
    config = quick_config(epochs=2)
    renamed = config.model_copy(
        update={"method": Method.from_data(config.method.to_json_dict() | {"name": "other"})}
    )
    assert prefix_keys(config, "data") == prefix_keys(renamed, "data") and config != renamed
