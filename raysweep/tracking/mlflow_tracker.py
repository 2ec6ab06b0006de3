"""Runs, figures and models in one MLflow store. One writer, the driver; runs are found again by
tag, never doubled.
"""

import getpass
import importlib.metadata
import json
import logging
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from raysweep.formatting import redact_secrets
from raysweep.spec import SpecError, flatten_spec
from raysweep.training.checkpoint import describe_environment
from raysweep.training.config import TrainingConfig
from raysweep.training.diagnostics import read_histograms

EXPERIMENT_NAME = "raysweep"
_DESCRIPTION_TAG = "mlflow.note.content"
_EXPERIMENT_DESCRIPTION = (
    "Runs of raysweep. A sweep has its trials under it; a pipeline's results are in its report."
)
_INVALID_METRIC_CHARACTERS = re.compile(r"[^\w./ -]")
_COST_METRICS = ("shared", "validation_seconds")
RunStatus = Literal["FINISHED", "FAILED", "KILLED"]


def tracking_uri(folder: Path) -> str:
    """The default store: SQLite in `folder`, where a bare `mlflow ui` started there finds it."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(folder / 'mlflow.db').resolve()}"


class Tracker:
    """Runs in one MLflow store. Connecting takes seconds the first time, so it happens beside other
    work.
    """

    def __init__(self, uri: str, artifact_root: Path) -> None:
        self.uri = uri
        self._artifact_root = artifact_root
        with ThreadPoolExecutor(1) as pool:
            self._connection: Future[tuple[Any, str]] = pool.submit(self._connect)
            pool.shutdown(wait=False)

    def wait_until_ready(self) -> "Tracker":
        """Wait until the store answers. Raises SpecError in one line if it does not."""
        self._connection.result()
        return self

    def get_last_epoch(self, run_id: str) -> int:
        """The last epoch that the run has numbers of; 0 before the first."""
        steps = [
            point.step
            for point in self._connection.result()[0].get_metric_history(run_id, "train/loss")
        ]
        return max(steps, default=0)

    def get_or_create_run(
        self, name: str, tags: Mapping[str, str], parent_run_id: str | None = None
    ) -> str:
        """Id of the run with these tags, made if there is none."""
        client, experiment = self._connection.result()
        if found := self.find_run(tags):
            client.update_run(found, status="RUNNING")
            return found
        version = describe_environment()["git_revision"]
        more = {
            "mlflow.user": _current_user(),
            "mlflow.source.name": "raysweep",
            "mlflow.source.type": "LOCAL",
            **({"mlflow.source.git.commit": version} if version else {}),
            **({"mlflow.parentRunId": parent_run_id} if parent_run_id else {}),
        }
        return str(client.create_run(experiment, run_name=name, tags={**tags, **more}).info.run_id)

    def log_config(self, run_id: str, config: TrainingConfig, fingerprint: str = "") -> None:
        """Every setting as a parameter under its dotted path, and the whole as `config.json`;
        versions beside it.

        MLflow's parameters are for good: what has changed since (a sweep that got more epochs) is a
        tag `now.PATH`.
        """
        from mlflow.entities import Dataset, DatasetInput, Param

        client, _ = self._connection.result()
        known = client.get_run(run_id).data.params
        values = {
            key: format_mlflow_param(value)
            for key, value in flatten_spec(config).items()
            if value is not None
        }
        params = [Param(key, value) for key, value in values.items() if key not in known]
        for start in range(0, len(params), 100):
            client.log_batch(run_id, params=params[start : start + 100])
        self.set_tags(
            run_id,
            {
                f"now.{key}": value
                for key, value in values.items()
                if known.get(key, value) != value
            },
        )
        client.log_dict(run_id, config.to_json_dict(), "config.json")
        client.log_dict(run_id, describe_environment(), "environment.json")
        if fingerprint:
            source = json.dumps({"data_dir": str(config.data.data_dir or "")})
            dataset = Dataset(
                name=config.data.name, digest=fingerprint, source_type="local", source=source
            )
            client.log_inputs(run_id, [DatasetInput(dataset)])

    def log_metrics(self, run_id: str, metrics: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        client, _ = self._connection.result()
        now = int(time.time() * 1000)
        # The UI proposes the metric that it met first: the objective before the details.
        order = sorted(metrics, key=lambda name: ("/" in name, name != "robust_worst"))
        finite = [name for name in order if name != "epoch" and math.isfinite(metrics[name])]
        # Six digits: a share that was float32 reads 0.495 in the UI, not 0.4950000047683716.
        logged = [
            Metric(
                _INVALID_METRIC_CHARACTERS.sub("-", name), float(f"{metrics[name]:.6g}"), now, step
            )
            for name in finite
        ]
        client.log_batch(run_id, metrics=logged)

    def log_final(self, run_id: str, metrics: Mapping[str, float]) -> None:
        """Metrics that have no epoch: of those at step 0 alone the UI draws bars, of others a point
        each on a line.
        """
        self.log_metrics(run_id, metrics, 0)

    def log_best(self, run_id: str, metrics: Mapping[str, float]) -> None:
        """The headline metrics of a run's best epoch, as its results `best/...`; not what the epoch
        cost.
        """
        headline = {
            name: value
            for name, value in metrics.items()
            if "/" not in name and name not in _COST_METRICS
        }
        self.log_final(run_id, {f"best/{name}": value for name, value in headline.items()})

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        self._connection.result()[0].log_batch(run_id, tags=[RunTag(k, v) for k, v in tags.items()])

    def set_description(self, run_id: str, lines: Sequence[str]) -> None:
        """The run's description in the UI, in place of an earlier one: one point a line."""
        self.set_tags(run_id, {_DESCRIPTION_TAG: "\n".join(f"- {line}" for line in lines)})

    def log_folder(self, run_id: str, folder: Path, artifact_folder: str) -> None:
        self._connection.result()[0].log_artifacts(run_id, str(folder), artifact_folder)

    def log_training_plots(
        self, run_id: str, run_path: Path, history: Sequence[Mapping[str, float]]
    ) -> None:
        """The papers' figures of a training run, as images."""
        from raysweep.plots import plot_run_figures

        self.log_figures(run_id, plot_run_figures(history, read_histograms(run_path)))

    def log_figures(self, run_id: str, figures: Mapping[str, Any]) -> None:
        """matplotlib's figures, by name, where MLflow's page of the run shows them."""
        client, _ = self._connection.result()
        for name, figure in figures.items():
            client.log_figure(run_id, figure, f"plots/{name}.png")

    def log_json(self, run_id: str, content: Any, file_name: str) -> None:
        self._connection.result()[0].log_dict(run_id, content, file_name)

    def log_file(self, run_id: str, path: Path, artifact_folder: str | None = None) -> None:
        self._connection.result()[0].log_artifact(run_id, str(path), artifact_folder)

    def find_run(self, tags: Mapping[str, str]) -> str | None:
        """Id of the run with these tags, if there is one."""
        client, experiment = self._connection.result()
        where = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        found = client.search_runs([experiment], filter_string=where, max_results=1)
        return str(found[0].info.run_id) if found else None

    def download_checkpoint(self, reference: str, target_folder: Path) -> tuple[str, Path]:
        """Run id and local copy of the checkpoint of a run (`ID`, `runs:/ID`) or model
        (`models:/NAME@ALIAS`).

        Raises SpecError in one line if there is none.
        """
        from mlflow.exceptions import MlflowException

        client, _ = self._connection.result()
        try:
            run = reference.removeprefix("runs:/").split("/")[0]
            if reference.startswith("models:/"):
                name, _, alias = reference.removeprefix("models:/").partition("@")
                name, _, version = name.partition("/")
                if version:
                    run = client.get_model_version(name, version).run_id
                else:
                    run = client.get_model_version_by_alias(name, alias or "champion").run_id
            folder = target_folder / run
            folder.mkdir(parents=True, exist_ok=True)
            return run, Path(client.download_artifacts(run, "checkpoint", str(folder)))
        except (MlflowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise SpecError(
                redact_secrets(f"{reference}: no checkpoint in MLflow store {self.uri}: {reason}")
            ) from None

    def register_model(
        self, model_name: str, run_id: str, tags: Mapping[str, str], description: str = ""
    ) -> str:
        """Version of the registered model `name` that is this run's checkpoint, made if there is
        none.

        description: of the model, if it is new.
        """
        from mlflow.exceptions import MlflowException

        client, _ = self._connection.result()
        try:
            client.get_registered_model(model_name)
        except MlflowException:
            client.create_registered_model(model_name, description=description)
        known = [
            v for v in client.search_model_versions(f"name='{model_name}'") if v.run_id == run_id
        ]
        if known:
            version = str(known[0].version)
        else:
            source = f"{client.get_run(run_id).info.artifact_uri}/checkpoint"
            version = str(client.create_model_version(model_name, source, run_id).version)
        for key, value in tags.items():
            client.set_model_version_tag(model_name, version, key, value)
        return version

    def set_version_description(self, model_name: str, version: str, description: str) -> None:
        self._connection.result()[0].update_model_version(
            model_name, version, description=description
        )

    def set_model_alias(self, model_name: str, alias: str, version: str) -> None:
        self._connection.result()[0].set_registered_model_alias(model_name, alias, version)

    def find_model_by_alias(
        self, model_name: str, alias: str
    ) -> tuple[str, str, dict[str, str]] | None:
        """Version, run and tags of the model that has this alias; None if none has."""
        from mlflow.exceptions import MlflowException

        try:
            found = self._connection.result()[0].get_model_version_by_alias(model_name, alias)
        except MlflowException:
            return None
        return str(found.version), str(found.run_id), dict(found.tags)

    def download_artifact(self, run_id: str, artifact_path: str, target_folder: Path) -> Path:
        """Local copy of a run's artifact. Raises SpecError in one line if it has none."""
        from mlflow.exceptions import MlflowException

        target_folder.mkdir(parents=True, exist_ok=True)
        try:
            return Path(
                self._connection.result()[0].download_artifacts(
                    run_id, artifact_path, str(target_folder)
                )
            )
        except (MlflowException, OSError) as error:
            raise SpecError(
                redact_secrets(
                    f"run {run_id} has no {artifact_path} in MLflow store {self.uri}: {error}"
                )
            ) from None

    def has_run_ended(self, run_id: str) -> bool:
        return str(self._connection.result()[0].get_run(run_id).info.status) != "RUNNING"

    def end_run(self, run_id: str, status: RunStatus) -> None:
        self._connection.result()[0].set_terminated(run_id, status)

    def _connect(self) -> tuple[Any, str]:
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        for name in ("alembic", "mlflow.store.db.utils"):
            # Also where the caller had imported MLflow before.
            logging.getLogger(name).setLevel(logging.WARNING)
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        try:
            client = MlflowClient(tracking_uri=self.uri)
            found = client.get_experiment_by_name(EXPERIMENT_NAME)
            if found is not None:
                return client, str(found.experiment_id)
            local = self.uri.startswith("sqlite")
            where = (self._artifact_root / EXPERIMENT_NAME).resolve().as_uri() if local else None
            # Without this tag some versions of the UI open their pages for language models.
            tags = {
                "mlflow.experimentKind": "custom_model_development",
                _DESCRIPTION_TAG: _EXPERIMENT_DESCRIPTION,
            }
            return client, str(
                client.create_experiment(EXPERIMENT_NAME, artifact_location=where, tags=tags)
            )
        except (MlflowException, OSError, ValueError) as error:
            hint = "set MLFLOW_TRACKING_URI to a server or sqlite:///FILE, or leave it out"
            raise SpecError(
                redact_secrets(f"MLflow store {self.uri}: {str(error).splitlines()[0]}; {hint}")
            ) from None


def get_mlflow_version(uri: str) -> str:
    """The version of MLflow behind a store that answers: a server's own, or this one's. Raises
    SpecError if none does.

    One try: who asks wants to know, not to wait.
    """
    if uri.startswith("sqlite") and not Path(uri.removeprefix("sqlite:///")).exists():
        return importlib.metadata.version("mlflow")
    if not uri.startswith("http"):
        with TemporaryDirectory() as folder:
            Tracker(uri, Path(folder)).wait_until_ready()
        return importlib.metadata.version("mlflow")
    from mlflow.exceptions import MlflowException
    from mlflow.tracking._tracking_service.utils import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    try:
        answer = http_request(
            get_default_host_creds(uri), "/version", "GET", max_retries=0, timeout=5
        )
    except (MlflowException, OSError) as error:
        known = re.search(r"\[Errno \d+\] ([\w ]+)", str(error))
        reason = known[1] if known else str(error).splitlines()[0]
        raise SpecError(redact_secrets(f"MLflow store {uri}: does not answer: {reason}")) from None
    if answer.status_code != 200:
        raise SpecError(
            redact_secrets(f"MLflow store {uri}: answers {answer.status_code} {answer.reason}")
        )
    return str(answer.text).strip()


def _current_user() -> str:
    """Who runs this; in a container that may be a number without a name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def format_mlflow_param(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
