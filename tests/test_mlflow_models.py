"""Models that MLflow itself loads and serves, and its records of data sets."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import mlflow
import numpy as np
import pytest
import torch
from conftest import tiny
from free_ports import choose_free_port

from raysweep.data import DatasetSplits, load_data
from raysweep.stores import open_path
from raysweep.tracking import RunRecorder, Tracker, training_run_tags
from raysweep.tracking.mlflow_tracker import EpochRecord, _make_metrics
from raysweep.training.checkpoint import RunDirectory, read_checkpoint
from raysweep.training.model_loading import load_trained_model
from raysweep.training.trainer import TrainingResult, train_model

pytestmark = pytest.mark.mlflow


@pytest.fixture
def trained(workdir: Path) -> tuple[TrainingResult, DatasetSplits]:
    config = tiny("at", epochs=1)
    data = load_data(config.data)
    return train_model(config, workdir / "runs" / "r", data=data), data


@pytest.fixture
def champion(
    trained: tuple[TrainingResult, DatasetSplits],
    workdir: Path,
    empty_store: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Tracker]:
    """The store of a run whose model is the champion of `digits`, which is MLflow's default."""
    result, data = trained
    empty_store(workdir / "mlflow.db")
    tracker = Tracker(f"sqlite:///{workdir / 'mlflow.db'}", workdir / "mlruns")
    folder = open_path(workdir / "runs" / "r")
    tags = training_run_tags(RunDirectory(folder))
    run = RunRecorder(tracker, "r", tags, folder)
    run.open(result.best_checkpoint.config, data)
    run.log_result(
        result.best_checkpoint.config, result.best_checkpoint, result.last_checkpoint, data
    )
    assert run.finish() == 0
    version = tracker.register_model("digits", tracker.find_run(tags) or "", {})
    tracker.set_model_alias("digits", "champion", version)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracker.uri)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(tracker.uri)
    yield tracker
    mlflow.set_tracking_uri(before)


def expected_logits(trained: tuple[TrainingResult, DatasetSplits], x: torch.Tensor) -> np.ndarray:
    result, data = trained
    with torch.inference_mode():
        return load_trained_model(result.best_checkpoint, data)(x).numpy()


def test_mlflow_loads_the_champion(
    champion: Tracker, trained: tuple[TrainingResult, DatasetSplits], tmp_path: Path
) -> None:
    model = mlflow.pyfunc.load_model("models:/digits@champion")
    inputs = model.metadata.get_input_schema().inputs
    assert [(spec.type, spec.shape) for spec in inputs] == [(np.dtype("float32"), (-1, 1, 8, 8))]
    (output,) = model.metadata.get_output_schema().inputs
    assert (output.type, output.shape) == (np.dtype("float32"), (-1, 10))
    x = trained[1].test.get_float_images(slice(0, 300))
    np.testing.assert_allclose(model.predict(x.numpy()), expected_logits(trained, x), atol=1e-5)
    with pytest.raises(mlflow.exceptions.MlflowException):
        model.predict(np.zeros((1, 3, 8, 8), np.float32))
    with pytest.raises(Exception, match="expected \\[0, 1\\]: divide by 255"):
        model.predict(255 * x.numpy())
    with pytest.raises(Exception, match=r"pixels from 0 to 1\.5; expected"):
        model.predict(1.5 * x.numpy())
    _, folder = champion.download_checkpoint("models:/digits", tmp_path / "from")
    again = read_checkpoint(folder)
    assert again.meta["history"] == trained[0].best_checkpoint.meta["history"]
    sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
    assert sizes["state.safetensors"] < 100 < sizes["weights.safetensors"], "without momentum"
    assert not any(name.endswith((".pkl", ".pickle", ".pt", ".py")) for name in sizes)


def test_a_model_with_a_network_of_somebodys_code_is_not_imported(
    champion: Tracker, tmp_path: Path
) -> None:
    _, folder = champion.download_checkpoint("models:/digits", tmp_path / "from")
    file = folder / "meta.json"
    meta = json.loads(file.read_text())
    meta["config"]["model"] |= {"name": "make_network", "code": "0" * 64}
    file.write_text(json.dumps(meta))
    (folder / "network.source").write_text("raise SystemExit('imported')")
    with pytest.raises(Exception, match="--code"):
        mlflow.pyfunc.load_model(str(folder))


@pytest.mark.slow
def test_mlflow_serves_the_champion(
    champion: Tracker, trained: tuple[TrainingResult, DatasetSplits], workdir: Path
) -> None:
    port = choose_free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local"]
    command += ["--model-uri", "models:/digits@champion", "--port", str(port), "--workers", "1"]
    with (workdir / "serve.log").open("wb") as log:
        server = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            start_new_session=True,
            # It starts the `uvicorn` of this environment.
            env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        )
    try:
        while True:
            try:
                urlopen(f"http://127.0.0.1:{port}/ping", timeout=5).read()
                break
            except OSError:
                assert server.poll() is None, (workdir / "serve.log").read_text()
                time.sleep(0.1)
        x = trained[1].test.get_float_images(slice(0, 5))

        def ask(images: torch.Tensor) -> Any:
            request = Request(
                f"http://127.0.0.1:{port}/invocations",
                json.dumps({"inputs": images.tolist()}).encode(),
                {"Content-Type": "application/json"},
            )
            return json.loads(urlopen(request, timeout=60).read())

        answer = np.array(ask(x)["predictions"])
        np.testing.assert_allclose(answer, expected_logits(trained, x), atol=1e-5)
        with pytest.raises(HTTPError, match="400"):
            ask(255 * x)
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def test_mlflow_reads_the_records_of_the_training_and_the_test_set(
    champion: Tracker, trained: tuple[TrainingResult, DatasetSplits], tmp_path: Path
) -> None:
    (run,) = mlflow.search_runs(experiment_names=["raysweep"], output_format="list")
    data = trained[1]
    found = {entry.tags[0].value: entry.dataset for entry in run.inputs.dataset_inputs}
    assert set(found) == {"training", "testing"}
    for context, split in {"training": data.train, "testing": data.test}.items():
        source = mlflow.data.get_source(found[context])
        assert source.to_dict() == {"tags": {"raysweep.data": "digits"}}
        assert found[context].digest == data.fingerprint
        assert json.loads(found[context].profile)["features_shape"] == [len(split), 1, 8, 8]
    files = tiny("at").data.replace(name="mnist", data_dir=str(tmp_path))
    config = tiny("at").replace(data=files)
    run_id = champion.get_or_create_run("other", {"a": "b"})
    champion.log_config(run_id, config, data)
    for entry in mlflow.get_run(run_id).inputs.dataset_inputs:
        assert mlflow.data.get_source(entry.dataset).load() == str(tmp_path)


def test_the_name_of_the_experiment_is_that_of_the_user(
    workdir: Path, empty_store: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    empty_store(workdir / "mlflow.db")
    uri = f"sqlite:///{workdir / 'mlflow.db'}"
    for name in ("my lab", "/Users/me/robust", ".."):
        monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", name)
        tracker = Tracker(uri, workdir / "mlruns")
        run_id = tracker.get_or_create_run("x", {"a": "b"})
        tracker.log_text(run_id, "text", "file.txt")
        assert Tracker(uri, workdir / "mlruns").find_run({"a": "b"}) == run_id
        client = mlflow.MlflowClient(uri)
        experiment = client.get_experiment_by_name(name)
        assert [run.info.run_id for run in client.search_runs([experiment.experiment_id])] == [
            run_id
        ]
    files = [file.relative_to(workdir) for file in workdir.rglob("file.txt")]
    assert len(files) == 3 and {file.parts[0] for file in files} == {"mlruns"}


def test_mlflow_gets_the_objective_of_an_epoch_first() -> None:
    """Its page proposes the metric that came first."""
    values = {"train/loss": 1.0, "clean": 0.9, "robust_worst": 0.5, "epoch": 3.0, "pgd": math.nan}
    metrics = _make_metrics(EpochRecord(values, 3, 1000))
    assert [metric.key for metric in metrics] == ["robust_worst", "clean", "train/loss"]
    assert {(metric.step, metric.timestamp) for metric in metrics} == {(3, 1000)}
