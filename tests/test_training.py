"""The loop: deterministic, resumable after kill -9, checkpoints that are whole or refused."""

import io
import itertools
import json
import os
import shutil
import signal
import sys
import threading
from pathlib import Path
from types import FrameType

import forked_processes
import pytest
import torch
from conftest import TINY, tiny
from rich.console import Console
from safetensors.torch import load_file

from raysweep.catalog import METHODS
from raysweep.data import DatasetSplits, load_data
from raysweep.errors import DamagedFileError
from raysweep.spec import SpecError
from raysweep.sweep.search_space import load_space
from raysweep.terminal import training_progress_bar
from raysweep.training import checkpoint
from raysweep.training.callbacks import FunctionCallback
from raysweep.training.checkpoint import RunDirectory
from raysweep.training.config import TrainingConfig, build_training_config
from raysweep.training.eager_sgd import EagerSGD
from raysweep.training.selection import find_best_epoch
from raysweep.training.trainer import TrainingFailed, train_model


def same_weights(one: Path, two: Path) -> bool:
    a, b = load_file(one / "weights.safetensors"), load_file(two / "weights.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def run_of_at(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, to copy."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train_model(tiny("at"), folder)
    return folder


def test_training_is_deterministic_and_depends_on_its_seed(tmp_path) -> None:
    a, b, c = (
        train_model(
            tiny("lrat", seed=s, validation__every=2), tmp_path / name
        ).last_checkpoint.local_folder
        for name, s in (("a", 0), ("b", 0), ("c", 1))
    )
    assert same_weights(a, b)
    assert not same_weights(a, c)


def test_gairat_with_infinite_lambda_trains_at_bit_for_bit(tmp_path) -> None:
    at = train_model(tiny("at", validation__every=2), tmp_path / "at").last_checkpoint
    changes = {"method__terms__pgd__weight__lam": "inf", "method__terms__pgd__weight__burn_in": 0}
    gairat = train_model(
        tiny("gairat", **changes, validation__every=2), tmp_path / "gairat"
    ).last_checkpoint
    assert same_weights(at.local_folder, gairat.local_folder)
    assert at.last_metrics["robust_worst"] == gairat.last_metrics["robust_worst"]


def test_the_learning_rate_may_change_after_every_step(tmp_path, monkeypatch) -> None:
    """Step i of n in epoch e (from 0) has the rate of the schedule at e + i / n."""
    rates: list[float] = []
    step = EagerSGD.step

    def record_rate(optimizer: EagerSGD) -> None:
        rates.append(optimizer.param_groups[0]["lr"])
        step(optimizer)

    monkeypatch.setattr(EagerSGD, "step", record_rate)
    cycle = {"kind": "interpolated", "epochs": [0, 1, 2], "values": [0.0, 0.2, 0.0]}
    changes = {"optim__lr": cycle, "data__train_size": 96, "validation__every": 2}
    by_step = train_model(tiny("at", **changes, optim__lr_per_step=True), tmp_path / "a")
    assert rates == pytest.approx([0.2 / 3, 0.4 / 3, 0.2, 0.4 / 3, 0.2 / 3, 0.0])
    assert [row["train/lr"] for row in by_step.last_checkpoint.history] == pytest.approx([0.2, 0.0])
    rates.clear()
    train_model(tiny("at", **changes), tmp_path / "b")
    assert rates == [0.0, 0.0, 0.0, 0.2, 0.2, 0.2]


def test_burn_in_is_adversarial_training_until_it_ends(tmp_path) -> None:
    at = train_model(tiny("at", epochs=1), tmp_path / "at").last_checkpoint.local_folder
    changes = {"method__terms__pgd__weight__burn_in": 1, "method__terms__pgd__weight__lam": -1.0}
    train_model(tiny("gairat", **changes, epochs=1), tmp_path / "one")
    assert same_weights(at, tmp_path / "one" / "epoch-0001")
    longer_at, longer = (
        train_model(config, tmp_path / name).last_checkpoint.local_folder
        for name, config in {
            "at2": tiny("at", validation__every=2),
            "two": tiny("gairat", **changes, validation__every=2),
        }.items()
    )
    assert not same_weights(longer_at, longer)


def test_metrics_are_what_they_say(tmp_path) -> None:
    rows = []
    config = tiny("lrat")
    fitted = train_model(
        config, tmp_path / "run", FunctionCallback(lambda metrics, saved: rows.append(metrics))
    )
    assert [row["epoch"] for row in rows] == [1, 2]
    for row in rows:
        assert row["robust_worst"] <= min(row["pgd"], row["cw"]) <= row["clean"]
        assert row["masking_gap"] == pytest.approx(row["pgd"] - row["robust_worst"])
    assert rows == fitted.last_checkpoint.history
    assert fitted.best_checkpoint.epoch == find_best_epoch(config, rows)


def test_the_attacks_of_the_objective_start_the_same_for_every_checkpoint(run_of_at) -> None:
    config = tiny("at")
    data = load_data(config.data)
    saved = RunDirectory(run_of_at).read_last_checkpoint()
    assert saved is not None
    model = saved.load_weights(config.model.build_model(1, 10, 0))
    scores = [config.validation(model, data.val) for _ in range(2)]
    assert scores[0] == scores[1]
    assert scores[0]["robust_worst"] == saved.last_metrics["robust_worst"]


def train_until_killed(config: TrainingConfig, path: Path, function: str) -> None:
    """Training that kills its process when a function is called the second time after the report
    of epoch 3, in any thread.
    """
    calls, is_reported = itertools.count(1), threading.Event()

    def kill_at_second_call(frame: FrameType, event: str, argument: object) -> None:
        is_call = event == "call" and frame.f_code.co_name == function
        if is_call and is_reported.is_set() and next(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch_epochs(metrics: dict[str, float], saved: checkpoint.TrainingCheckpoint) -> None:
        if saved.epoch == 3:
            is_reported.set()

    threading.setprofile(kill_at_second_call)
    sys.setprofile(kill_at_second_call)
    train_model(config, path, FunctionCallback(watch_epochs))


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    return train_model(tiny("lrat", epochs=5), folder / "run").last_checkpoint.local_folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "possible"),
    # A checkpoint is written beside the steps of the next epoch.
    [("compute_step_gradients", {3, 4}), ("_save_tensors", {3}), ("_write_meta", {4})],
    ids=["amid an epoch", "amid a checkpoint", "amid the next checkpoint"],
)
def test_killed_with_sigkill_it_resumes_to_the_weights_of_a_run_never_stopped(
    function: str, possible: set[int], whole_run: Path, tmp_path: Path
) -> None:
    config = tiny("lrat", epochs=5)
    process = forked_processes.start_function(
        train_until_killed, config, tmp_path / "killed", function
    )
    assert process.wait() == -signal.SIGKILL, process.err
    last_saved = RunDirectory(tmp_path / "killed").list_saved_epochs()[-1]
    assert last_saved in possible
    epochs = []
    train_model(
        config,
        tmp_path / "killed",
        FunctionCallback(lambda metrics, saved: epochs.append(saved.epoch)),
        n_reported_epochs=last_saved,
    )
    assert epochs[0] == last_saved + 1, "only the epoch it was in is done again"
    assert same_weights(tmp_path / "killed" / "epoch-0005", whole_run)
    assert not list((tmp_path / "killed").glob(".epoch-*")), "what the crash left is cleaned up"


def test_a_finished_run_trains_no_more_and_reports_what_was_not_reported(tmp_path) -> None:
    first = train_model(tiny("at"), tmp_path / "run").last_checkpoint
    told = []
    again = train_model(
        tiny("at"), tmp_path / "run", FunctionCallback(lambda metrics, saved: told.append(metrics))
    )
    assert told == first.history, "whoever was told may have died with what it knew"
    train_model(
        tiny("at"),
        tmp_path / "run",
        FunctionCallback(lambda metrics, saved: told.append(metrics)),
        n_reported_epochs=1,
    )
    assert told == [*first.history, first.history[1]]
    assert again.last_checkpoint.local_folder == first.local_folder


def test_only_the_last_and_the_best_checkpoint_are_kept(tmp_path) -> None:
    fitted = train_model(tiny("at", epochs=4), tmp_path / "run")
    assert set(RunDirectory(tmp_path / "run").list_saved_epochs()) == {
        4,
        fitted.best_checkpoint.epoch,
    }


def test_a_checkpoint_says_all_that_decided_it(run_of_at) -> None:
    saved = RunDirectory(run_of_at).read_last_checkpoint()
    assert saved is not None and saved.epoch == 2
    meta = json.loads((saved.local_folder / "meta.json").read_text())
    assert meta["config"] == tiny("at").to_stored_dict()
    assert torch.__version__.startswith(meta["environment"]["torch"])
    assert len(meta["data_fingerprint"]) == 16
    assert checkpoint.read_checkpoint(saved.local_folder) == saved


@pytest.mark.parametrize("file", ["weights.safetensors", "state.safetensors", "meta.json"])
def test_a_truncated_checkpoint_is_refused_in_one_line(file, run_of_at, tmp_path) -> None:
    path = shutil.copytree(run_of_at, tmp_path / "run") / "epoch-0002"
    content = (path / file).read_bytes()
    (path / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(DamagedFileError) as error:
        train_model(tiny("at"), tmp_path / "run")
    assert len(error.value.problems) == 1 and str(path) in str(error.value)


def test_a_folder_with_another_configs_run_is_refused(run_of_at) -> None:
    with pytest.raises(SpecError, match="a run with other settings"):
        train_model(tiny("at", seed=1), run_of_at)


def test_a_loss_of_nan_fails_with_its_reason(tmp_path) -> None:
    with pytest.raises(
        TrainingFailed, match=r"the loss became (nan|inf) in epoch \d; a smaller optim.lr may help"
    ):
        train_model(tiny("at", optim__lr=1e20, epochs=4), tmp_path / "run")


def test_a_model_that_stays_at_chance_fails_after_its_warm_up_and_keeps_its_log(tmp_path) -> None:
    config = tiny("at", epochs=6, collapse_after=2, optim__lr=1e-7)
    rows = []
    for _ in range(2):  # the second time it is known from the checkpoint
        with pytest.raises(
            TrainingFailed,
            match=r"collapsed: 0\.\d+ of .* right in epoch 4, no more than by chance",
        ):
            train_model(config, tmp_path, FunctionCallback(lambda m, c: rows.append(m)))
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4] * 2
    last = RunDirectory(tmp_path).read_last_checkpoint()
    assert last is not None and last.epoch == 4


def test_more_epochs_go_on_with_the_run_and_fewer_are_refused(run_of_at, tmp_path) -> None:
    shutil.copytree(run_of_at, tmp_path / "grown")
    grown = train_model(tiny("at", epochs=3), tmp_path / "grown").last_checkpoint
    assert same_weights(
        grown.local_folder,
        train_model(tiny("at", epochs=3), tmp_path / "at once").last_checkpoint.local_folder,
    )
    with pytest.raises(SpecError, match="holds a run with other settings"):
        train_model(tiny("at"), tmp_path / "grown")


def test_settings_without_effect_are_pointed_out() -> None:
    config = build_training_config("gairat", {**TINY, "method.terms.pgd.weight.burn_in": 9})
    assert config.list_warnings()[0] == (
        "method.terms.pgd.weight.burn_in = 9: the weights never act in 2 epochs"
    )


def test_a_method_written_out_in_yaml_trains(tmp_path) -> None:
    method = {
        "attacks": {"weak": {"kind": "pgd", "steps": 1}},
        "terms": {
            "clean": {"on": "natural", "coef": 0.5},
            "robust": {"on": "weak", "weight": {"kind": "geometry"}},
        },
    }
    saved = train_model(tiny(method), tmp_path / "run").last_checkpoint
    assert saved.config.method.name == "inline" and saved.epoch == 2


def test_the_objective_decides_which_epoch_is_kept(tmp_path) -> None:
    config = tiny("at", epochs=5, validation__objective="clean", data__train_size=200)
    fitted = train_model(config, tmp_path / "run")
    clean = [row["clean"] for row in fitted.last_checkpoint.history]
    assert fitted.best_checkpoint.epoch == clean.index(max(clean)) + 1
    assert fitted.best_checkpoint.local_folder.is_dir()


def test_other_data_are_not_trained_on_in_the_same_run(run_of_at) -> None:
    import dataclasses

    config = tiny("at")
    other = dataclasses.replace(load_data(config.data), fingerprint="other")
    with pytest.raises(SpecError, match="holds a run on other 'digits' data"):
        train_model(config, run_of_at, data=other)


def test_a_foreign_meta_is_refused_in_one_line(tmp_path) -> None:
    for meta in (
        {"format": 1},
        {
            "format": 1,
            "config": {},
            "epoch": 1,
            "history": [],
            "data_fingerprint": "",
            "sha256": {},
        },
    ):
        (tmp_path / "meta.json").write_text(json.dumps(meta))
        with pytest.raises(DamagedFileError, match="not a raysweep checkpoint"):
            checkpoint.read_checkpoint(tmp_path)


def test_validation_is_at_the_epsilon_of_the_training() -> None:
    config = build_training_config(
        "gairat", {"data.name": "cifar10", "method.attacks.pgd.eps": 0.031}
    )
    assert config.method.attacks["pgd"].eps == config.validation.attacks["cw"].eps == 0.031
    validation = build_training_config("lrat", {"data.name": "cifar10"}).validation
    assert validation.finish["multi_targeted"].eps == 8 / 255
    apart = build_training_config(
        "gairat", {"data.name": "cifar10", "validation.attacks.pgd.eps": 0.05}
    )
    assert apart.validation.attacks["pgd"].eps == 0.05
    with pytest.raises(
        SpecError, match=r"eps = 8: epsilon means pixels in \[0, 1\]; did you mean 8/255"
    ):
        build_training_config("gairat", {"*.eps": 8})


def test_the_objective_is_measured_at_every_rung_of_the_spaces_for_cifar10() -> None:
    for name in METHODS:
        space = load_space(name, {"data.name": "cifar10"})
        assert space.trial_config({}).validation.every == 2
        assert space.scheduler.grace_period % 2 == 0


def test_steps_are_told_and_a_terminal_has_a_bar_of_them(
    tmp_path: Path, digits: DatasetSplits
) -> None:
    told: list[tuple[int, int]] = []
    train_model(
        tiny("at"),
        tmp_path,
        FunctionCallback(on_step_end=lambda epoch, steps: told.append((epoch, steps))),
        data=digits,
    )
    assert told == [(1, 1), (1, 2), (2, 1), (2, 2)]
    for terminal in (True, False):
        file = io.StringIO()
        with training_progress_bar(
            Console(file=file, force_terminal=terminal, width=80), 2, 2
        ) as bar:
            for step in told[:3]:
                bar(*step)
        assert ("epoch 2/2" in file.getvalue() and "3/4" in file.getvalue()) is terminal, (
            "no bar in a pipe"
        )
