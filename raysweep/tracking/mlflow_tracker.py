"""Write runs, figures and models to an MLflow store.

Only the driver writes. Runs are found again by their tags, so that none is created twice.
"""

import getpass
import importlib.metadata
import json
import logging
import math
import os
import re
import sqlite3
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple
from urllib.parse import quote, urlsplit

from raysweep.data import DatasetSplits, DataSpec
from raysweep.disk_space import is_disk_full_error
from raysweep.errors import (
    InfrastructureError,
    RaysweepError,
    get_first_line,
)
from raysweep.folder_lock import require_no_links
from raysweep.formatting import shorten_value
from raysweep.record_queue import RecordStoreUnavailable
from raysweep.redaction import redact_secrets
from raysweep.spec import SpecError, flatten_spec, is_safe_name
from raysweep.stores import StorePath
from raysweep.stores.folder_store import find_sqlite_file, hold_file_lock
from raysweep.tracking.mlflow_database import (
    URI_VARIABLE,
    get_experiment_name,
    is_usable_database,
    relocate_artifacts,
    require_own_artifacts,
)
from raysweep.tracking.mlflow_model import MODEL_FOLDER, write_mlflow_model
from raysweep.training.checkpoint import TrainingCheckpoint, describe_environment
from raysweep.training.config import TrainingConfig
from raysweep.training.diagnostics import read_histograms
from raysweep.uri_passwords import fill_in_passwords
from raysweep.visible_text import escape_markdown

# MLflow's error codes for a run, model or artifact that a store does not have.
_MISSING_ENTRY_CODES = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
_DESCRIPTION_TAG = "mlflow.note.content"
_EXPERIMENT_DESCRIPTION = (
    "Runs of raysweep. A sweep has its trials under it; a pipeline's results are in its report."
)
_INVALID_METRIC_CHARACTERS = re.compile(r"[^\w./ -]")
_COST_METRICS = ("shared", "validation_seconds")
# MLflow accepts at most this many params and metrics in a batch.
_MAX_PARAMS_PER_BATCH, _MAX_METRICS_PER_BATCH = 100, 1000
# Runs in one answer to a search.
_RUNS_PER_PAGE = 500
logger = logging.getLogger(__name__)
_MLFLOW_ENVIRONMENT = {
    # Otherwise MLflow sends usage statistics to its makers.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # By default a request to a server that is gone takes four minutes. Records wait for the next
    # attempt (see `RecordQueue`).
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
}
# Seconds in which another process may create or upgrade a database.
_MIGRATION_TIMEOUT = 600.0
RunStatus = Literal["FINISHED", "FAILED", "KILLED"]


class EpochRecord(NamedTuple):
    """Metrics of one epoch for MLflow. Writing it twice is harmless.

    Attributes:
        metrics: Values by name.
        epoch: 1-based number of the epoch, or 0 for metrics without one.
        time_ms: When they were reported, in milliseconds since 1970.
    """

    metrics: Mapping[str, float]
    epoch: int
    time_ms: int


class FoundRun(NamedTuple):
    """A run of MLflow.

    Attributes:
        run_id: Its id.
        status: `RUNNING`, or how it ended.
        tags: Its tags.
    """

    run_id: str
    status: str
    tags: dict[str, str]


def current_time_ms() -> int:
    """Return the milliseconds since 1970, which MLflow calls a timestamp."""
    return int(time.time() * 1000)


def tracking_uri(folder: Path) -> str:
    """Return the URI of the MLflow store.

    Args:
        folder: Output folder.

    Returns:
        `MLFLOW_TRACKING_URI` if it is set; otherwise that of an SQLite database in the folder,
        where `mlflow ui` without arguments finds it.

    Raises:
        SpecError: The path of the folder has a `?`, behind which a URI of SQLite has options.
    """
    if uri := os.environ.get(URI_VARIABLE):
        return uri
    database = (folder / "mlflow.db").resolve()
    if "?" in str(database):
        raise SpecError(
            f"--out {folder}: MLflow's database cannot lie in a path with '?': {database.parent}; "
            f"use another folder, or set {URI_VARIABLE}"
        )
    return f"sqlite:///{database}"


def _find_artifact_folder(artifact_root: Path) -> Path:
    """Return the folder below `artifact_root` for the experiment, whose name may have any form."""
    name = get_experiment_name()
    if not is_safe_name(name):
        name = quote(name, safe="").replace(".", "%2E")
    return artifact_root / name


class Tracker:
    """Client of one MLflow store.

    It connects in a thread, because the first connection takes seconds. Methods wait for it. If
    the store is a SQLite database that is known to work, the first method that is called connects.

    Args:
        uri: URI of the store.
        artifact_root: Folder for the artifacts of an SQLite store.

    Attributes:
        uri: URI of the store.
    """

    def __init__(self, uri: str, artifact_root: Path) -> None:
        self.uri = uri
        self._artifact_root = artifact_root
        self._lock = threading.Lock()
        self._started_connection: Future[tuple[Any, str]] | None = None
        if not self._is_known_to_work():
            self._start_connecting()

    def wait_until_ready(self) -> "Tracker":
        """Wait until the store answers.

        Returns:
            This tracker.

        Raises:
            SpecError: If the store cannot be used, in one line.
        """
        self._start_connecting().result()
        return self

    def require_working_store(self) -> None:
        """Wait until the store answers, unless it is a SQLite database that is known to work.

        Importing MLflow and creating a database take three processor seconds, which would delay the
        start of a sweep.

        Raises:
            SpecError: If the store cannot be used, in one line.
        """
        if not self._is_known_to_work():
            self.wait_until_ready()

    def get_last_epoch(self, run_id: str) -> int:
        """Return the last epoch that the run has metrics of; 0 before the first."""
        client, _ = self._open_store()
        history = client.get_metric_history(run_id, "train/loss")
        return max((point.step for point in history), default=0)

    def get_or_create_run(
        self, name: str, tags: Mapping[str, str], parent_run_id: str | None = None
    ) -> str:
        """Return the id of the run with these tags; create it if there is none.

        An existing run is set to running again.

        Args:
            name: Name of a new run.
            tags: Tags that identify the run.
            parent_run_id: Run under which MLflow shows a new run.

        Returns:
            Id of the run.
        """
        client, experiment_id = self._open_store()
        if run_id := self.find_run(tags):
            client.update_run(run_id, status="RUNNING")
            return run_id
        all_tags = {
            **tags,
            "mlflow.user": _current_user(),
            "mlflow.source.name": "raysweep",
            "mlflow.source.type": "LOCAL",
        }
        if revision := describe_environment()["git_revision"]:
            all_tags["mlflow.source.git.commit"] = revision
        if parent_run_id:
            all_tags["mlflow.parentRunId"] = parent_run_id
        return str(client.create_run(experiment_id, run_name=name, tags=all_tags).info.run_id)

    def log_config(
        self, run_id: str, config: TrainingConfig, dataset: DatasetSplits | None = None
    ) -> None:
        """Log a config as params under dotted paths, and as `config.json`.

        Also logs `environment.json`. MLflow's params cannot be changed: a value that differs from
        the logged one, for example when a sweep gets more epochs, becomes a tag `now.PATH`.

        Args:
            run_id: The run.
            config: Its config.
            dataset: Its data; None to log no data set.
        """
        from mlflow.entities import Param

        client, _ = self._open_store()
        logged = client.get_run(run_id).data.params
        values = {
            key: format_mlflow_param(value)
            for key, value in flatten_spec(config).items()
            if value is not None
        }
        params = [Param(key, value) for key, value in values.items() if key not in logged]
        for start in range(0, len(params), _MAX_PARAMS_PER_BATCH):
            client.log_batch(run_id, params=params[start : start + _MAX_PARAMS_PER_BATCH])
        changed = {key: value for key, value in values.items() if logged.get(key, value) != value}
        tags = {f"now.{key}": value for key, value in changed.items()}
        if config.validation.split == "test":
            tags["raysweep.best_epoch_chosen_on"] = "test"
        self.set_tags(run_id, tags)
        client.log_dict(run_id, config.to_json_dict(), "config.json")
        client.log_dict(run_id, describe_environment(), "environment.json")
        if dataset is not None:
            client.log_inputs(run_id, _make_dataset_inputs(config.data, dataset))

    def log_epochs(self, run_id: str, epochs: Sequence[EpochRecord]) -> None:
        """Log the finite metrics of epochs, several in one request.

        Args:
            run_id: The run.
            epochs: The epochs, in their order. Metrics called `epoch` are ignored.
        """
        client, _ = self._open_store()
        batch: list[Any] = []
        for record in epochs:
            metrics = _make_metrics(record)
            if len(batch) + len(metrics) > _MAX_METRICS_PER_BATCH:
                client.log_batch(run_id, metrics=batch)
                batch = []
            batch += metrics
        if batch:
            client.log_batch(run_id, metrics=batch)

    def log_final(self, run_id: str, metrics: Mapping[str, float]) -> None:
        """Log metrics that belong to no epoch.

        They get step 0, because the UI draws bars for metrics with this step only, and otherwise a
        line with one point.

        Args:
            run_id: The run.
            metrics: Values by name.
        """
        self.log_epochs(run_id, [EpochRecord(metrics, 0, current_time_ms())])

    def log_best(self, run_id: str, metrics: Mapping[str, float]) -> None:
        """Log the main metrics of a run's best epoch as `best/NAME`.

        Args:
            run_id: The run.
            metrics: All metrics of the epoch; details (`GROUP/NAME`) and costs are left out.
        """
        self.log_final(
            run_id,
            {
                f"best/{name}": value
                for name, value in metrics.items()
                if "/" not in name and name not in _COST_METRICS
            },
        )

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set tags of a run."""
        from mlflow.entities import RunTag

        client, _ = self._open_store()
        entries = [RunTag(key, redact_secrets(value)) for key, value in tags.items()]
        client.log_batch(run_id, tags=entries)

    def delete_tags(self, run_id: str, names: Sequence[str]) -> None:
        """Delete those tags of a run that it has."""
        client, _ = self._open_store()
        tags = client.get_run(run_id).data.tags
        for name in names:
            if name in tags:
                client.delete_tag(run_id, name)

    def set_description(self, run_id: str, lines: Sequence[str]) -> None:
        """Replace the run's description in the UI by a list with one item per line."""
        self.set_tags(
            run_id, {_DESCRIPTION_TAG: "\n".join(f"- {escape_markdown(line)}" for line in lines)}
        )

    def log_folder(self, run_id: str, folder: Path, artifact_folder: str) -> None:
        """Upload the files of a folder as artifacts of a run.

        Args:
            run_id: The run.
            folder: Local folder.
            artifact_folder: Folder in the run's artifacts that receives the files.
        """
        client, _ = self._open_store()
        client.log_artifacts(run_id, str(folder), artifact_folder)

    def log_model(
        self, run_id: str, checkpoint: TrainingCheckpoint, dataset: DatasetSplits | None
    ) -> None:
        """Upload the weights of a checkpoint, as a model that MLflow can load and serve.

        Args:
            run_id: The run; its artifacts get the folder `checkpoint`.
            checkpoint: The checkpoint. Its momentum is not uploaded.
            dataset: Data set of the training; without it only raysweep can load the model.
        """
        with TemporaryDirectory() as folder:
            model_folder = Path(folder) / MODEL_FOLDER
            write_mlflow_model(checkpoint, dataset, model_folder)
            self.log_folder(run_id, model_folder, MODEL_FOLDER)

    def log_training_plots(
        self, run_id: str, run_path: StorePath, history: Sequence[Mapping[str, float]]
    ) -> None:
        """Upload the figures of a training run.

        Args:
            run_id: The run.
            run_path: Its folder, which holds the histograms.
            history: Metrics of each epoch.
        """
        from raysweep.plots import plot_run_figures

        self.log_figures(run_id, plot_run_figures(history, read_histograms(run_path)))

    def log_figures(self, run_id: str, figures: Mapping[str, Any]) -> None:
        """Upload figures as `plots/NAME.png`, which the UI shows on the run's page.

        Args:
            run_id: The run.
            figures: Matplotlib figures by name.
        """
        client, _ = self._open_store()
        for name, figure in figures.items():
            client.log_figure(run_id, figure, f"plots/{name}.png")

    def log_json(self, run_id: str, content: Any, file_name: str) -> None:
        """Upload a value as a JSON file.

        Args:
            run_id: The run.
            content: The value; anything that can be written as JSON.
            file_name: Path of the file in the run's artifacts.
        """
        client, _ = self._open_store()
        client.log_dict(run_id, content, file_name)

    def log_text(self, run_id: str, text: str, file_name: str) -> None:
        """Upload a text as a file.

        Args:
            run_id: The run.
            text: The text.
            file_name: Path of the file in the run's artifacts.
        """
        client, _ = self._open_store()
        client.log_text(run_id, redact_secrets(text), file_name)

    def log_file(self, run_id: str, path: Path, artifact_folder: str | None = None) -> None:
        """Upload a file as an artifact of a run.

        Args:
            run_id: The run.
            path: Local file.
            artifact_folder: Folder in the run's artifacts; None for their root.
        """
        client, _ = self._open_store()
        client.log_artifact(run_id, str(path), artifact_folder)

    def find_chart_url(self, sweep_key: str, objective: str) -> str:
        """Return the page of MLflow with the charts of a sweep, its best trials first.

        Args:
            sweep_key: `Ledger.key`.
            objective: Metric by whose best value the trials are sorted. Unsorted, MLflow would hide
                them below the run of the sweep, and their charts with them.

        Returns:
            A URL of the server; for other stores that of `mlflow ui` on this machine.
        """
        _, experiment_id = self._start_connecting().result()
        server = self.uri.rstrip("/") if self.uri.startswith("http") else "http://127.0.0.1:5000"
        search = quote(_make_filter({"raysweep.sweep": sweep_key}), safe="")
        order = quote(f"metrics.`best/{objective}`", safe="")
        return (
            f"{redact_secrets(server)}/#/experiments/{experiment_id}/runs"
            f"?searchFilter={search}&orderByKey={order}&orderByAsc=false&compareRunsMode=CHART"
        )

    def find_run(self, tags: Mapping[str, str]) -> str | None:
        """Find a run by its tags.

        Args:
            tags: Tags that the run must have; it may have more.

        Returns:
            Id of the newest such run; None if there is none.
        """
        client, experiment_id = self._open_store()
        runs = client.search_runs([experiment_id], filter_string=_make_filter(tags), max_results=1)
        return str(runs[0].info.run_id) if runs else None

    def list_runs(self, tags: Mapping[str, str]) -> list[FoundRun]:
        """List all runs with these tags, the newest first.

        Args:
            tags: Tags that the runs must have; they may have more.
        """
        client, experiment_id = self._open_store()
        found: list[FoundRun] = []
        page_token = None
        while True:
            page = client.search_runs(
                [experiment_id],
                filter_string=_make_filter(tags),
                max_results=_RUNS_PER_PAGE,
                page_token=page_token,
            )
            found += [
                FoundRun(str(run.info.run_id), str(run.info.status), dict(run.data.tags))
                for run in page
            ]
            page_token = page.token
            if not page_token:
                return found

    def download_checkpoint(self, reference: str, target_folder: Path) -> tuple[str, Path]:
        """Download the checkpoint of a run or of a registered model.

        Args:
            reference: `ID` or `runs:/ID` of a run; `models:/NAME@ALIAS` or `models:/NAME/VERSION`
                of a model. `models:/NAME` is its champion.
            target_folder: Folder that receives a folder with the run's id as its name.

        Returns:
            Id of the run, and path of the checkpoint.

        Raises:
            SpecError: If there is no such checkpoint, in one line.
            InfrastructureError: If the store does not answer, in one line.
            DamagedFileError: If the folder is or has a link, in one line.
        """
        from mlflow.exceptions import MlflowException

        client, _ = self._start_connecting().result()
        try:
            run_id = self._resolve_run_id(reference)
            if not is_safe_name(run_id):
                # A stranger's store might name a folder elsewhere.
                raise SpecError(f"{reference}: {shorten_value(run_id)} is no id of an MLflow run")
            folder = target_folder / run_id
            require_no_links(folder, target_folder.parent)
            folder.mkdir(parents=True, exist_ok=True)
            return run_id, Path(client.download_artifacts(run_id, MODEL_FOLDER, str(folder)))
        except (MlflowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise _missing_entry_error_type(error)(
                f"{reference}: no checkpoint in MLflow store {self.uri}: {reason}; it has those of "
                "the best trials of each sweep: name another trial as SWEEP/0003"
            ) from error

    def register_model(
        self, model_name: str, run_id: str, tags: Mapping[str, str], description: str = ""
    ) -> str:
        """Register a run's checkpoint as a version of a model, unless that was done before.

        Args:
            model_name: Name of the registered model, which is created if it is new.
            run_id: Run whose artifact `checkpoint` becomes the version.
            tags: Tags to set on the version.
            description: Description of a new model.

        Returns:
            The version.

        Raises:
            RecordStoreUnavailable: The store does not answer.
        """
        client, _ = self._open_store()
        try:
            client.get_registered_model(model_name)
        except RecordStoreUnavailable as error:
            if not error.is_final:
                raise
            logger.info("the model %s is new: %s", model_name, error)
            client.create_registered_model(model_name, description=description)
        versions = [
            str(entry.version)
            for entry in client.search_model_versions(f"name='{model_name}'")
            if entry.run_id == run_id
        ]
        if versions:
            version = versions[0]
        else:
            source = f"{client.get_run(run_id).info.artifact_uri}/{MODEL_FOLDER}"
            version = str(client.create_model_version(model_name, source, run_id).version)
        for key, value in tags.items():
            client.set_model_version_tag(model_name, version, key, value)
        return version

    def set_version_description(self, model_name: str, version: str, description: str) -> None:
        """Replace the description of a model's version."""
        client, _ = self._open_store()
        client.update_model_version(model_name, version, description=escape_markdown(description))

    def set_model_alias(self, model_name: str, alias: str, version: str) -> None:
        """Give a version of a model an alias; the version that had it before loses it."""
        client, _ = self._open_store()
        client.set_registered_model_alias(model_name, alias, version)

    def find_model_by_alias(
        self, model_name: str, alias: str
    ) -> tuple[str, str, dict[str, str]] | None:
        """Find the version of a model that has an alias.

        Args:
            model_name: Name of the registered model.
            alias: Such as `champion`.

        Returns:
            Version, id of its run, and its tags; None if no version has the alias.

        Raises:
            RecordStoreUnavailable: The store does not answer.
        """
        client, _ = self._open_store()
        try:
            entry = client.get_model_version_by_alias(model_name, alias)
        except RecordStoreUnavailable as error:
            if not error.is_final:
                raise
            logger.info("no version of %s is its %s: %s", model_name, alias, error)
            return None
        return str(entry.version), str(entry.run_id), dict(entry.tags)

    def download_artifact(self, run_id: str, artifact_path: str, target_folder: Path) -> Path:
        """Download an artifact of a run.

        Args:
            run_id: The run.
            artifact_path: Path of the artifact in the run.
            target_folder: Folder to download to.

        Returns:
            Path of the local copy.

        Raises:
            SpecError: If the run has no such artifact, in one line.
            InfrastructureError: If the store does not answer, in one line.
        """
        from mlflow.exceptions import MlflowException

        client, _ = self._start_connecting().result()
        target_folder.mkdir(parents=True, exist_ok=True)
        try:
            return Path(client.download_artifacts(run_id, artifact_path, str(target_folder)))
        except (MlflowException, OSError) as error:
            raise _missing_entry_error_type(error)(
                f"run {run_id} has no {artifact_path} in MLflow store {self.uri}: {error}"
            ) from error

    def end_run(self, run_id: str, status: RunStatus) -> None:
        """End a run.

        Args:
            run_id: The run.
            status: Its final status.
        """
        client, _ = self._open_store()
        client.set_terminated(run_id, status)

    def _open_store(self) -> tuple[Any, str]:
        """Wait for the connection; return a client that raises our errors, and the experiment."""
        connection = self._start_connecting()
        try:
            client, experiment_id = connection.result()
        except InfrastructureError as error:
            with self._lock:
                if self._started_connection is connection:
                    self._started_connection = None
            raise RecordStoreUnavailable(error.problems) from error
        return _CheckedClient(client, self.uri), experiment_id

    def _start_connecting(self) -> "Future[tuple[Any, str]]":
        """Start to connect, unless that has started before; return the connection."""
        with self._lock:
            if self._started_connection is None:
                pool = ThreadPoolExecutor(1, thread_name_prefix="mlflow")
                self._started_connection = pool.submit(self._connect)
                pool.shutdown(wait=False)
            return self._started_connection

    def _is_known_to_work(self) -> bool:
        """Return whether the store is a SQLite database that MLflow can use or create."""
        database = find_sqlite_file(self.uri)
        if database is None:
            return False
        is_uri_of_user = bool(os.environ.get(URI_VARIABLE))
        return is_usable_database(database, None if is_uri_of_user else self._artifact_root)

    def _resolve_run_id(self, reference: str) -> str:
        """Return the id of the run that a reference of `download_checkpoint` names."""
        if not reference.startswith("models:/"):
            return reference.removeprefix("runs:/").split("/")[0]
        client, _ = self._start_connecting().result()
        name, _, alias = reference.removeprefix("models:/").partition("@")
        name, _, version = name.partition("/")
        if version:
            entry = client.get_model_version(name, version)
        else:
            entry = client.get_model_version_by_alias(name, alias or "champion")
        return entry.run_id  # type: ignore[no-any-return]

    def _connect(self) -> tuple[Any, str]:
        """Return MLflow's client and the id of the experiment, which is created if it is new."""
        _prepare_mlflow()
        logger.info("connecting to the MLflow store %s", self.uri)
        if self.uri.startswith("http"):
            # MLflow's own requests are repeated, and say less.
            _request_server_version(self.uri)
        # Two processes that create or upgrade a database at once fail in its migrations.
        database = find_sqlite_file(self.uri)
        lock = hold_file_lock(database, _MIGRATION_TIMEOUT) if database else nullcontext()
        with lock:
            client, experiment_id = self._open_experiment()
        is_uri_of_user = bool(os.environ.get(URI_VARIABLE))
        if database is not None and not is_uri_of_user:
            require_own_artifacts(database, self._artifact_root)
        return client, experiment_id

    def _open_experiment(self) -> tuple[Any, str]:
        """Return MLflow's client and the id of the experiment, which is created if it is new."""
        from alembic.util.exc import CommandError
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        database = find_sqlite_file(self.uri)
        try:
            if database is not None and database.parent == self._artifact_root.parent.resolve():
                relocate_artifacts(database, _find_artifact_folder(self._artifact_root))
            client = MlflowClient(tracking_uri=fill_in_passwords(self.uri, URI_VARIABLE))
            experiment = client.get_experiment_by_name(get_experiment_name())
            if experiment is not None and experiment.lifecycle_stage == "deleted":
                raise InfrastructureError(
                    f"MLflow store {self.uri}: its experiment "
                    f"{get_experiment_name()!r} was deleted; restore it with "
                    f"`{URI_VARIABLE}={self.uri} mlflow experiments restore "
                    f"--experiment-id {experiment.experiment_id}`, or use another --out"
                )
            if experiment is not None:
                return client, str(experiment.experiment_id)
            location = None
            if self.uri.startswith("sqlite"):
                location = _find_artifact_folder(self._artifact_root).resolve().as_uri()
            tags = {
                # Without this tag some versions of the UI open their pages for language models.
                "mlflow.experimentKind": "custom_model_development",
                _DESCRIPTION_TAG: _EXPERIMENT_DESCRIPTION,
            }
            return client, str(
                client.create_experiment(
                    get_experiment_name(), artifact_location=location, tags=tags
                )
            )
        except (
            *(MlflowException, SQLAlchemyError, CommandError),
            *(sqlite3.Error, OSError, ValueError),
        ) as error:
            logger.error("the MLflow store does not answer", exc_info=error)
            hint = "set MLFLOW_TRACKING_URI to a server or sqlite:///FILE, or leave it out"
            raise InfrastructureError(
                f"MLflow store {self.uri}: {get_first_line(error)}; {hint}"
            ) from error


class _CheckedClient:
    """MLflow's client, whose methods raise RecordStoreUnavailable in place of other errors."""

    def __init__(self, client: Any, uri: str) -> None:
        self._client = client
        self._uri = uri

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)

        def call_method(*arguments: Any, **options: Any) -> Any:
            from mlflow.exceptions import MlflowException
            from sqlalchemy.exc import SQLAlchemyError

            try:
                return method(*arguments, **options)
            except (MlflowException, SQLAlchemyError, OSError) as error:
                is_final = _missing_entry_error_type(error) is SpecError
                is_full = is_disk_full_error(error)
                reason = "its disk is full" if is_full else get_first_line(error)
                raise RecordStoreUnavailable(
                    f"MLflow store {self._uri}: {reason}", is_final
                ) from error

        return call_method


def get_mlflow_version(uri: str) -> str:
    """Return the version of MLflow behind a store, after checking that the store answers.

    A server is asked once, without retries.

    Args:
        uri: URI of the store.

    Returns:
        The version of a server, or the installed one for other stores.

    Raises:
        InfrastructureError: If the store does not answer, in one line.
    """
    if uri.startswith("sqlite") and not Path(uri.removeprefix("sqlite:///")).exists():
        return importlib.metadata.version("mlflow")
    if not uri.startswith("http"):
        with TemporaryDirectory() as folder:
            Tracker(uri, Path(folder)).wait_until_ready()
        return importlib.metadata.version("mlflow")
    _prepare_mlflow()
    response = _request_server_version(uri)
    if response.status_code != 200:
        raise InfrastructureError(
            f"MLflow store {uri}: answers {response.status_code} {response.reason}"
        )
    return str(response.text).strip()


def _request_server_version(uri: str) -> Any:
    """Ask a server once for its version; InfrastructureError if it does not answer."""
    import requests

    full_uri = fill_in_passwords(uri, URI_VARIABLE).rstrip("/")
    # The credentials that MLflow's own client reads; those of the URI come first.
    headers, login = {}, None
    if token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
        headers["Authorization"] = f"Bearer {token}"
    if (user := os.environ.get("MLFLOW_TRACKING_USERNAME")) and urlsplit(full_uri).username is None:
        login = (user, os.environ.get("MLFLOW_TRACKING_PASSWORD", ""))
    is_insecure = os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1")
    certificates = os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH") or True
    try:
        return requests.get(
            f"{full_uri}/version",
            headers=headers,
            auth=login,
            verify=False if is_insecure else certificates,
            cert=os.environ.get("MLFLOW_TRACKING_CLIENT_CERT_PATH"),
            timeout=5,
        )
    except OSError as error:
        errno_match = re.search(r"\[Errno \d+\] ([\w ]+)", str(error))
        reason = errno_match[1] if errno_match else get_first_line(error)
        raise InfrastructureError(f"MLflow store {uri}: does not answer: {reason}") from error


def _make_dataset_inputs(spec: DataSpec, dataset: DatasetSplits) -> list[Any]:
    """Return MLflow's entities for the training and any test set, as `mlflow.data` reads them."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    if spec.data_dir is None:
        # It comes with a library, or is downloaded by one.
        source_type = "code"
        source: dict[str, Any] = {"tags": {"raysweep.data": spec.name}}
    else:
        source_type, source = "local", {"uri": Path(spec.data_dir).absolute().as_uri()}
    inputs = []
    for context, split in {"training": dataset.train, "testing": dataset.test}.items():
        if not len(split):
            continue
        shape = [-1, *split.x.shape[1:]]
        schema = {
            "mlflow_tensorspec": {
                "features": _describe_tensor("uint8", shape),
                "targets": _describe_tensor("int64", [-1]),
            }
        }
        profile = {
            "features_shape": list(split.x.shape),
            "targets_shape": list(split.y.shape),
            "classes": dataset.classes,
        }
        entity = Dataset(
            name=f"{spec.name} {context}",
            digest=dataset.fingerprint,
            source_type=source_type,
            source=json.dumps(source),
            schema=json.dumps(schema),
            profile=json.dumps(profile),
        )
        inputs.append(DatasetInput(entity, [InputTag("mlflow.data.context", context)]))
    return inputs


def _describe_tensor(dtype: str, shape: list[int]) -> str:
    """Return MLflow's JSON of a tensor's type."""
    return json.dumps([{"type": "tensor", "tensor-spec": {"dtype": dtype, "shape": shape}}])


def _make_metrics(record: EpochRecord) -> list[Any]:
    """Return MLflow's entities for the finite metrics of an epoch."""
    from mlflow.entities import Metric

    metrics = []
    # The UI proposes the metric that it received first: log the objective before the details.
    for name in sorted(record.metrics, key=lambda name: ("/" in name, name != "robust_worst")):
        if name != "epoch" and math.isfinite(record.metrics[name]):
            # Six digits: a float32 share then reads 0.495 in the UI, not 0.4950000047683716.
            value = float(f"{record.metrics[name]:.6g}")
            key = _INVALID_METRIC_CHARACTERS.sub("-", name)
            metrics.append(Metric(key, value, record.time_ms, record.epoch))
    return metrics


def _make_filter(tags: Mapping[str, str]) -> str:
    """Return the condition of a search for runs with these tags."""
    return " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())


def format_mlflow_param(value: Any) -> str:
    """Format a value for MLflow's parameters, floats with six digits.

    Args:
        value: Value of a setting.

    Returns:
        Text such as `0.0313725`.
    """
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _prepare_mlflow() -> None:
    """Set the environment variables of MLflow that the user has not set.

    MLflow reads the first two when it is imported, which the user may have done before.
    """
    disables_telemetry = "MLFLOW_DISABLE_TELEMETRY" not in os.environ
    for name, value in _MLFLOW_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    # It prints a traceback for each request that a locked database refuses; we log the error.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    if disables_telemetry:
        from mlflow.telemetry import set_telemetry_client

        set_telemetry_client()


def _missing_entry_error_type(error: Exception) -> type[RaysweepError]:
    """Return SpecError if a store says that it lacks an entry, else InfrastructureError."""
    code = getattr(error, "error_code", "")
    if isinstance(error, FileNotFoundError) or code in _MISSING_ENTRY_CODES:
        return SpecError
    return InfrastructureError


def _current_user() -> str:
    """Return the name of this process's user, or the number of one without a name (containers)."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
