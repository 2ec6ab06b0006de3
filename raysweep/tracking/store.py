"""Runs, figures and models in one MLflow store. One writer, the driver; runs are found again by tag, never doubled."""

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

from raysweep.spec import SpecError, flatten
from raysweep.training.checkpoint import environment
from raysweep.training.config import RunConfig
from raysweep.training.diagnostics import read_histograms

EXPERIMENT = "raysweep"
_NOTE = "mlflow.note.content"
_ABOUT = "Runs of raysweep. A sweep has its trials under it; a pipeline's results are in its report."
_ILLEGAL = re.compile(r"[^\w./ -]")
_COSTS = ("shared", "validation_seconds")
_SECRET = re.compile(r"(://[^\s:/@]*:)\S*(?=@)|(password=)[^\s&]*")
Status = Literal["FINISHED", "FAILED", "KILLED"]


def embedded_store(folder: Path) -> str:
    """The default store: SQLite in `folder`, where a bare `mlflow ui` started there finds it."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(folder / 'mlflow.db').resolve()}"


def masked(text: str) -> str:
    """A store's URI, or a line that has one in it, without its password."""
    return _SECRET.sub(r"\1\2***", text)


class Tracker:
    """Runs in one MLflow store. Connecting takes seconds the first time, so it happens beside other work."""

    def __init__(self, uri: str, artifacts: Path) -> None:
        self.uri = uri
        self._artifacts = artifacts
        with ThreadPoolExecutor(1) as pool:
            self._connected: Future[tuple[Any, str]] = pool.submit(self._connect)
            pool.shutdown(wait=False)

    def ready(self) -> "Tracker":
        """Wait until the store answers. Raises SpecError in one line if it does not."""
        self._connected.result()
        return self

    def last_step(self, run: str) -> int:
        """The last epoch that the run has numbers of; 0 before the first."""
        steps = [point.step for point in self._connected.result()[0].get_metric_history(run, "train/loss")]
        return max(steps, default=0)

    def run(self, name: str, tags: Mapping[str, str], parent: str | None = None) -> str:
        """Id of the run with these tags, made if there is none."""
        client, experiment = self._connected.result()
        if found := self.find(tags):
            client.update_run(found, status="RUNNING")
            return found
        version = environment()["git_revision"]
        more = {
            "mlflow.user": _user(),
            "mlflow.source.name": "raysweep",
            "mlflow.source.type": "LOCAL",
            **({"mlflow.source.git.commit": version} if version else {}),
            **({"mlflow.parentRunId": parent} if parent else {}),
        }
        return str(client.create_run(experiment, run_name=name, tags={**tags, **more}).info.run_id)

    def config(self, run: str, config: RunConfig, fingerprint: str = "") -> None:
        """Every setting as a parameter under its dotted path, and the whole as `config.json`; versions beside it.

        MLflow's parameters are for good: what has changed since (a sweep that got more epochs) is a tag `now.PATH`.
        """
        from mlflow.entities import Dataset, DatasetInput, Param

        client, _ = self._connected.result()
        known = client.get_run(run).data.params
        values = {key: text_of(value) for key, value in flatten(config).items() if value is not None}
        params = [Param(key, value) for key, value in values.items() if key not in known]
        for start in range(0, len(params), 100):
            client.log_batch(run, params=params[start : start + 100])
        self.tag(run, {f"now.{key}": value for key, value in values.items() if known.get(key, value) != value})
        client.log_dict(run, config.json_dict(), "config.json")
        client.log_dict(run, environment(), "environment.json")
        if fingerprint:
            source = json.dumps({"data_dir": str(config.data.data_dir or "")})
            dataset = Dataset(name=config.data.name, digest=fingerprint, source_type="local", source=source)
            client.log_inputs(run, [DatasetInput(dataset)])

    def metrics(self, run: str, metrics: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        client, _ = self._connected.result()
        now = int(time.time() * 1000)
        # The UI proposes the metric that it met first: the objective before the details.
        order = sorted(metrics, key=lambda name: ("/" in name, name != "robust_worst"))
        finite = [name for name in order if name != "epoch" and math.isfinite(metrics[name])]
        # Six digits: a share that was float32 reads 0.495 in the UI, not 0.4950000047683716.
        logged = [Metric(_ILLEGAL.sub("-", name), float(f"{metrics[name]:.6g}"), now, step) for name in finite]
        client.log_batch(run, metrics=logged)

    def results(self, run: str, metrics: Mapping[str, float]) -> None:
        """Metrics that have no epoch: of those at step 0 alone the UI draws bars, of others a point each on a line."""
        self.metrics(run, metrics, 0)

    def best(self, run: str, metrics: Mapping[str, float]) -> None:
        """The headline metrics of a run's best epoch, as its results `best/...`; not what the epoch cost."""
        headline = {name: value for name, value in metrics.items() if "/" not in name and name not in _COSTS}
        self.results(run, {f"best/{name}": value for name, value in headline.items()})

    def tag(self, run: str, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        self._connected.result()[0].log_batch(run, tags=[RunTag(k, v) for k, v in tags.items()])

    def describe(self, run: str, lines: Sequence[str]) -> None:
        """The run's description in the UI, in place of an earlier one: one point a line."""
        self.tag(run, {_NOTE: "\n".join(f"- {line}" for line in lines)})

    def artifacts(self, run: str, folder: Path, under: str) -> None:
        self._connected.result()[0].log_artifacts(run, str(folder), under)

    def plots(self, run: str, run_path: Path, history: Sequence[Mapping[str, float]]) -> None:
        """The papers' figures of a training run, as images."""
        from raysweep.plots import all_figures

        self.figures(run, all_figures(history, read_histograms(run_path)))

    def figures(self, run: str, figures: Mapping[str, Any]) -> None:
        """matplotlib's figures, by name, where MLflow's page of the run shows them."""
        client, _ = self._connected.result()
        for name, figure in figures.items():
            client.log_figure(run, figure, f"plots/{name}.png")

    def artifact(self, run: str, data: Any, name: str) -> None:
        self._connected.result()[0].log_dict(run, data, name)

    def file(self, run: str, path: Path, under: str | None = None) -> None:
        self._connected.result()[0].log_artifact(run, str(path), under)

    def find(self, tags: Mapping[str, str]) -> str | None:
        """Id of the run with these tags, if there is one."""
        client, experiment = self._connected.result()
        where = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        found = client.search_runs([experiment], filter_string=where, max_results=1)
        return str(found[0].info.run_id) if found else None

    def checkpoint(self, what: str, into: Path) -> tuple[str, Path]:
        """Run id and local copy of the checkpoint of a run (`ID`, `runs:/ID`) or model (`models:/NAME@ALIAS`).

        Raises SpecError in one line if there is none.
        """
        from mlflow.exceptions import MlflowException

        client, _ = self._connected.result()
        try:
            run = what.removeprefix("runs:/").split("/")[0]
            if what.startswith("models:/"):
                name, _, alias = what.removeprefix("models:/").partition("@")
                name, _, version = name.partition("/")
                if version:
                    run = client.get_model_version(name, version).run_id
                else:
                    run = client.get_model_version_by_alias(name, alias or "champion").run_id
            folder = into / run
            folder.mkdir(parents=True, exist_ok=True)
            return run, Path(client.download_artifacts(run, "checkpoint", str(folder)))
        except (MlflowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise SpecError(masked(f"{what}: no checkpoint in MLflow store {self.uri}: {reason}")) from None

    def register(self, name: str, run: str, tags: Mapping[str, str], description: str = "") -> str:
        """Version of the registered model `name` that is this run's checkpoint, made if there is none.

        description: of the model, if it is new.
        """
        from mlflow.exceptions import MlflowException

        client, _ = self._connected.result()
        try:
            client.get_registered_model(name)
        except MlflowException:
            client.create_registered_model(name, description=description)
        known = [v for v in client.search_model_versions(f"name='{name}'") if v.run_id == run]
        if known:
            version = str(known[0].version)
        else:
            source = f"{client.get_run(run).info.artifact_uri}/checkpoint"
            version = str(client.create_model_version(name, source, run).version)
        for key, value in tags.items():
            client.set_model_version_tag(name, version, key, value)
        return version

    def describe_version(self, name: str, version: str, text: str) -> None:
        self._connected.result()[0].update_model_version(name, version, description=text)

    def alias(self, name: str, alias: str, version: str) -> None:
        self._connected.result()[0].set_registered_model_alias(name, alias, version)

    def model_at(self, name: str, alias: str) -> tuple[str, str, dict[str, str]] | None:
        """Version, run and tags of the model that has this alias; None if none has."""
        from mlflow.exceptions import MlflowException

        try:
            found = self._connected.result()[0].get_model_version_by_alias(name, alias)
        except MlflowException:
            return None
        return str(found.version), str(found.run_id), dict(found.tags)

    def download(self, run: str, path: str, into: Path) -> Path:
        """Local copy of a run's artifact. Raises SpecError in one line if it has none."""
        from mlflow.exceptions import MlflowException

        into.mkdir(parents=True, exist_ok=True)
        try:
            return Path(self._connected.result()[0].download_artifacts(run, path, str(into)))
        except (MlflowException, OSError) as error:
            raise SpecError(masked(f"run {run} has no {path} in MLflow store {self.uri}: {error}")) from None

    def closed(self, run: str) -> bool:
        return str(self._connected.result()[0].get_run(run).info.status) != "RUNNING"

    def close(self, run: str, status: Status) -> None:
        self._connected.result()[0].set_terminated(run, status)

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
            found = client.get_experiment_by_name(EXPERIMENT)
            if found is not None:
                return client, str(found.experiment_id)
            local = self.uri.startswith("sqlite")
            where = (self._artifacts / EXPERIMENT).resolve().as_uri() if local else None
            # Without this tag some versions of the UI open their pages for language models.
            tags = {"mlflow.experimentKind": "custom_model_development", _NOTE: _ABOUT}
            return client, str(client.create_experiment(EXPERIMENT, artifact_location=where, tags=tags))
        except (MlflowException, OSError, ValueError) as error:
            hint = "set MLFLOW_TRACKING_URI to a server or sqlite:///FILE, or leave it out"
            raise SpecError(masked(f"MLflow store {self.uri}: {str(error).splitlines()[0]}; {hint}")) from None


def store_version(uri: str) -> str:
    """The version of MLflow behind a store that answers: a server's own, or this one's. Raises SpecError if none does.

    One try: who asks wants to know, not to wait.
    """
    if uri.startswith("sqlite") and not Path(uri.removeprefix("sqlite:///")).exists():
        return importlib.metadata.version("mlflow")
    if not uri.startswith("http"):
        with TemporaryDirectory() as folder:
            Tracker(uri, Path(folder)).ready()
        return importlib.metadata.version("mlflow")
    from mlflow.exceptions import MlflowException
    from mlflow.tracking._tracking_service.utils import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    try:
        answer = http_request(get_default_host_creds(uri), "/version", "GET", max_retries=0, timeout=5)
    except (MlflowException, OSError) as error:
        known = re.search(r"\[Errno \d+\] ([\w ]+)", str(error))
        reason = known[1] if known else str(error).splitlines()[0]
        raise SpecError(masked(f"MLflow store {uri}: does not answer: {reason}")) from None
    if answer.status_code != 200:
        raise SpecError(masked(f"MLflow store {uri}: answers {answer.status_code} {answer.reason}"))
    return str(answer.text).strip()


def _user() -> str:
    """Who runs this; in a container that may be a number without a name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def text_of(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
