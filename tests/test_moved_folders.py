"""Sweeps, MLflow stores and data in other folders than those where they were made."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from raysweep.cli import main
from raysweep.spec import SpecError
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.search_space import SearchSpace
from raysweep.sweep.trial import Trial
from raysweep.tracking import Tracker, tracking_uri
from raysweep.training.trainer import train_model


@pytest.mark.mlflow
@pytest.mark.parametrize("is_copied", [False, True])
def test_a_moved_store_takes_its_artifacts_along(
    is_copied: bool, workdir: Path, empty_store: Callable[[Path], None]
) -> None:
    from mlflow import MlflowClient
    from mlflow.tracking._tracking_service import utils

    old, new = workdir / "old place", workdir / "new"
    old.mkdir()
    empty_store(old / "mlflow.db")
    tags = {"raysweep.kind": "train"}
    first = Tracker(tracking_uri(old), old / "mlruns")
    run_id = first.get_or_create_run("r", tags)
    first.log_text(run_id, "before", "before.txt")
    (shutil.copytree if is_copied else shutil.move)(old, new)
    before = sorted(old.rglob("*"))
    # Another process would not know where this one has written.
    utils._artifact_repos_cache.clear()

    second = Tracker(tracking_uri(new), new / "mlruns")
    assert second.get_or_create_run("r", tags) == run_id
    second.log_text(run_id, "after", "after.txt")
    other = second.get_or_create_run("other", {"raysweep.kind": "sweep"})
    second.log_text(other, "after", "after.txt")
    assert sorted(old.rglob("*")) == before and old.exists() == is_copied
    artifacts = new / "mlruns" / "raysweep"
    assert {str(file.relative_to(artifacts)) for file in artifacts.rglob("*.txt")} == {
        f"{run_id}/artifacts/before.txt",
        f"{run_id}/artifacts/after.txt",
        f"{other}/artifacts/after.txt",
    }
    client = MlflowClient(tracking_uri(new))
    assert Path(client.download_artifacts(run_id, "before.txt")).read_text() == "before"


@pytest.fixture
def data(workdir: Path) -> Path:
    """Data of three classes, in files of the user's own."""
    folder = workdir / "data"
    folder.mkdir()
    (workdir / "more").mkdir()
    rng = np.random.default_rng(0)
    for name, n_examples in (("data/train", 120), ("data/test", 30), ("more/unlabeled", 60)):
        x = rng.integers(0, 255, (n_examples, 1, 8, 8), dtype=np.uint8)
        np.savez(workdir / f"{name}.npz", x=x, y=np.arange(n_examples) % 3)
    return folder


def make_sweep(folder: Path, data: Path) -> Ledger:
    settings = {"data.name": "arrays", "data.data_dir": str(data), "data.val_size": 30,
                "data.unlabeled": str(data.parent / "more" / "unlabeled.npz"),
                "model.name": "digits_cnn", "batch_size": 32, "epochs": 1, "*.attacks.*.steps": 1,
                "validation.finish.*.steps": 2}  # fmt: skip
    content = {"method": "at", "trials": 2, "base": settings,
               "space": {"optim.lr": {"float": [0.01, 0.5]}}}  # fmt: skip
    ledger = Ledger.create(folder, SearchSpace.from_data(content))
    trial = Trial(0, {"optim.lr": 0.1}, burn_in=0)
    config = ledger.space.trial_config(trial.params)
    last = train_model(config, ledger.trial_path(0)).last_checkpoint
    rule = ledger.space.find_selection_rule(trial.params)
    ledger.save_trial(trial.with_epoch(last.history[0], rule))
    return ledger


def test_a_sweep_takes_data_that_moved_and_refuses_other_data(
    workdir: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = make_sweep(workdir / "runs" / "s", data)
    moved = data.rename(workdir / "moved")
    unlabeled = (workdir / "more").rename(workdir / "moved-more") / "unlabeled.npz"
    setting = f"data.unlabeled={unlabeled}"
    resume = ["tune", "--resume", "s", "--plan", "--json", "--set", setting, "--data-dir"]
    assert main([*resume, str(moved)]) == 0
    assert json.loads(capsys.readouterr().out)["trials_left"] == 2

    space = ledger.space.with_overrides(
        {"data.data_dir": str(moved), "data.unlabeled": str(unlabeled)}
    )
    ledger.extend_space(space)
    config = Ledger.open(ledger.path).space.trial_config({"optim.lr": 0.1})
    assert config.data.data_dir == moved
    longer = train_model(config.replace(epochs=2), ledger.trial_path(0))
    assert [row["epoch"] for row in longer.last_checkpoint.history] == [1, 2], "it resumes"

    with np.load(moved / "train.npz") as arrays:
        changed = {"x": arrays["x"] ^ 1, "y": arrays["y"]}
    np.savez(moved / "train.npz", **changed)
    assert main([*resume, str(moved)]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"raysweep: error: {ledger.path} holds a sweep on other 'arrays' data: give the folder of "
        "the same data as --data-dir, or choose another --name"
    )
    with pytest.raises(SpecError, match="other 'arrays' data"):
        train_model(config.replace(epochs=3), ledger.trial_path(0))
