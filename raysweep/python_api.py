"""Run sweeps, trainings and pipelines from Python: `raysweep.tune`, `train` and `run`.

Each function builds the request of the command of its name and runs it as the command line does. It
prints progress but not the result, and raises errors.
"""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from raysweep.argument_types import (
    accept_scalars,
    check_argument_type,
    to_plain_scalar,
    to_plain_value,
)
from raysweep.code_files import CodeFile, open_code_file, open_function_file
from raysweep.commands.run import EndedPipeline, RunRequest, run_pipeline_request
from raysweep.commands.session import command_session
from raysweep.commands.train import TrainRequest, run_train_request
from raysweep.commands.tune import TuneRequest, run_tune_request
from raysweep.data import DATASET_LOADERS
from raysweep.data.array_folder import ARRAYS_FOLDER, ImageArrays, write_array_folder
from raysweep.errors import WorkFailed, WorkInterrupted
from raysweep.formatting import shorten_value
from raysweep.result_loading import Sweep, TrainingRun, load_training_run
from raysweep.spec import SpecError, describe_unknown_name
from raysweep.stores import is_uri
from raysweep.sweep.conclusions import describe_complete_failure
from raysweep.user_folders import expand_home
from raysweep.yaml_files import check_key

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

Data: TypeAlias = "str | Path | ImageArrays"
"""A data set: its name, its folder, or its images as arrays."""
Code: TypeAlias = "str | Path | Callable[..., nn.Module]"
"""A Python file with a network, or the network's function."""

# A call sets the umask, the log and Ray's cluster of the whole process.
_running_call = threading.Lock()
# What arguments may be, by their names: classes, and what messages call them.
_Types: TypeAlias = tuple[tuple[type, ...], str]
_TEXT: _Types = ((str,), "a text")
_PATH: _Types = ((str, Path), "a path")
_FLAG: _Types = ((bool,), "True or False")
_NUMBER: _Types = ((int, float), "a number")
_WHOLE_NUMBER: _Types = ((int,), "a whole number")
_ARGUMENT_TYPES: dict[str, _Types] = {
    "method": ((str, Path), "a name or a file"),
    "pipeline": ((str, Path), "a name or a file"),
    "settings": ((Mapping,), "a mapping {dotted path: value}"),
    "warm_start": ((list, tuple), "a list of names"),
    "first_stage": ((str, int), "the kind or the number of a stage"),
    "code": ((str, Path, Callable), "a file or a function"),  # type: ignore[dict-item]
    "space": _PATH,
    "out": _PATH,
    "storage": _PATH,
    "name": _TEXT,
    "resume": _TEXT,
    "address": _TEXT,
    "optuna": _TEXT,
    "retry_failed": _FLAG,
    "wait": _FLAG,
    "verbose": _FLAG,
    "trials": _WHOLE_NUMBER,
    "workers": _WHOLE_NUMBER,
    "max_seconds": _NUMBER,
    "max_gpu_hours": _NUMBER,
    "cpus_per_trial": _NUMBER,
    "gpus_per_trial": _NUMBER,
}


@dataclass(frozen=True)
class FinishedStageInfo:
    """A stage of a pipeline that is done.

    Attributes:
        kind: Its kind, such as `tune` or `autoattack`.
        folder: Folder of its artifact.
        seconds: Wall time in seconds that it took.
        was_done_before: Whether an earlier run had made the artifact.
    """

    kind: str
    folder: Path
    seconds: float
    was_done_before: bool


@dataclass(frozen=True)
class PipelineResult:
    """Result of a run of a pipeline.

    Attributes:
        name: Name of the pipeline.
        stages: Its stages, in their order.
        evaluations: One row for each evaluated checkpoint, with the columns `candidate` (its
            title), `attack`, `clean` and `robust` (accuracies in [0, 1] on the test images),
            `examples` (their number) and `checkpoint` (its folder or URI).
        report: HTML report; None if the pipeline has no stage `report`.
        regressions: What got worse since the report before, a line each; empty if nothing did.
    """

    name: str
    stages: tuple[FinishedStageInfo, ...]
    evaluations: pd.DataFrame
    report: Path | None
    regressions: tuple[str, ...]


@accept_scalars
def tune(
    method: str | None = None,
    *,
    data: Data | None = None,
    trials: int | None = None,
    settings: Mapping[str, Any] | None = None,
    name: str | None = None,
    space: str | Path | None = None,
    resume: str | None = None,
    retry_failed: bool = False,
    warm_start: Sequence[str] = (),
    max_seconds: float | None = None,
    max_gpu_hours: float | None = None,
    address: str | None = None,
    cpus_per_trial: float = 1.0,
    gpus_per_trial: float | None = None,
    workers: int = 1,
    optuna: str | None = None,
    code: Code | None = None,
    out: str | Path = ".",
    storage: str | Path | None = None,
    verbose: bool = False,
) -> Sweep:
    """Run a sweep, as `raysweep tune` does.

    On a terminal and in a notebook a table shows the trials while they run. Ctrl-C, or the button
    that interrupts a notebook, ends the sweep so that it can be resumed.

    Args:
        method: Name of the method, such as `gairat`; not needed with `space` or `resume`.
        data: Name of a data set (`digits`); its folder; or arrays of images, {"train": (x, y),
            "test": (x, y)} or only (x, y) without test images, which are written below
            `runs/.arrays` (see `write_array_folder`). None for the data set of `settings`, of the
            space, or the default.
        trials: Number of trials, at least 1; None for that of the space.
        settings: {dotted path: value} of settings, as with `--set`: training settings such as
            `epochs` or `*.eps`, and settings of the sweep such as `finalists`.
        name: Name of a new sweep; None for the method and the time.
        space: Search space: a YAML file, or a name of `raysweep list`; None for the method's own.
        resume: Name of a sweep to resume; `trials`, `settings` and `space` extend it.
        retry_failed: Whether `resume` runs all failed trials again, also those that failed by their
            settings.
        warm_start: Names of earlier sweeps whose results a new one begins with.
        max_seconds: Wall time in seconds, above 0, after which the sweep ends; `resume` runs the
            rest.
        max_gpu_hours: GPU hours, at least 0, that the trials may hold before the sweep ends.
        address: Ray cluster, `auto` or `host:port`; None for $RAY_ADDRESS or this machine.
        cpus_per_trial: Logical CPUs that each trial holds, at least 0.
        gpus_per_trial: GPUs that each trial holds, at least 0, may be a fraction; None for one per
            worker, if there are any.
        workers: Number of processes that share a trial, at least 1.
        optuna: URL of an Optuna storage to which the trials are also written.
        code: File of your own with the network that `model.name` names, or its function.
        out: Folder of `runs` and `mlflow.db`.
        storage: Folder or URI of sweeps; None for `runs` in `out`.
        verbose: Whether to print what is logged, not only warnings.

    Returns:
        The sweep. If its budget was spent before its end, its `state` is "interrupted".

    Raises:
        SpecError: A setting is wrong, and nothing was started.
        InfrastructureError: A cluster, store, package or disk is missing, full or does not answer.
        DamagedFileError: A file of the resumed sweep or of the data is damaged.
        WorkFailed: The sweep failed, or no trial has a result and some failed.
        WorkInterrupted: The sweep was interrupted; it can be resumed.
    """
    with _function_session("tune", locals(), verbose):
        if name is not None and resume is not None:
            raise SpecError("name: has no effect with resume, which names the sweep; leave one out")
        for warm_start_name in warm_start:
            check_argument_type("warm_start", warm_start_name, *_TEXT)
        _check_range("trials", trials, 1)
        _check_range("workers", workers, 1)
        _check_range("max_seconds", max_seconds, 0, excludes_least=True)
        for option, amount in (
            ("max_gpu_hours", max_gpu_hours),
            ("cpus_per_trial", cpus_per_trial),
            ("gpus_per_trial", gpus_per_trial),
        ):
            _check_range(option, amount, 0)
        from raysweep.sweep.search_space import resolve_space_path

        code_file = _open_code(code)
        ended = run_tune_request(
            TuneRequest(
                method=method,
                space_file=None if space is None else resolve_space_path(expand_home(space)),
                trials=trials,
                max_seconds=max_seconds,
                max_gpu_hours=max_gpu_hours,
                name=name,
                resume=resume,
                plan_only=False,
                address=address,
                cpus_per_trial=cpus_per_trial,
                gpus_per_trial=gpus_per_trial,
                workers=workers,
                optuna_url=optuna,
                overrides=_collect_overrides(settings, data, code_file, out),
                code=code_file,
                out=expand_home(out),
                storage=None if storage is None else str(storage),
                as_json=False,
                retry_failed=retry_failed,
                warm_start=tuple(warm_start),
            )
        )
        ledger = ended.ledger
        if ended.end_reason == "interrupted":
            raise WorkInterrupted(
                f"{ledger.count_ended_trials()} of {ledger.space.n_trials} trials done; resume "
                f"with raysweep.tune(resume={ledger.name!r}, ...), and see them with "
                f"raysweep.load_sweep({str(ledger.path)!r})"
            )
        if failure := describe_complete_failure(ledger):
            raise WorkFailed(failure)
        return Sweep(ledger)


@accept_scalars
def train(
    method: str | Path,
    *,
    data: Data | None = None,
    settings: Mapping[str, Any] | None = None,
    name: str | None = None,
    code: Code | None = None,
    out: str | Path = ".",
    storage: str | Path | None = None,
    verbose: bool = False,
) -> TrainingRun:
    """Train one model in this process, as `raysweep train` does; resume it if it was interrupted.

    Args:
        method: Name of a method or preset of `raysweep list`, or a YAML file of settings.
        data: Name of a data set, its folder, or arrays of images (see `tune`).
        settings: {dotted path: value} of settings, as with `--set`.
        name: Name of the run's folder; None for the method and the digest of the settings.
        code: File of your own with the network that `model.name` names, or its function.
        out: Folder of `runs` and `mlflow.db`.
        storage: Folder or URI of checkpoints; None for `runs` in `out`.
        verbose: Whether to print what is logged, not only warnings.

    Returns:
        The run, with its best epoch and checkpoint; `raysweep.load(run.path)` loads the model.

    Raises:
        SpecError: A setting is wrong, and nothing was started.
        InfrastructureError: A store, package or disk is missing, full or does not answer.
        DamagedFileError: A file of the run or of the data is damaged.
        WorkFailed: The training failed.
        WorkInterrupted: It was interrupted; the same call resumes it.
    """
    with _function_session("train", locals(), verbose):
        code_file = _open_code(code)
        ended = run_train_request(
            TrainRequest(
                method=str(method),
                name=name,
                overrides=_collect_overrides(settings, data, code_file, out),
                code=code_file,
                out=expand_home(out),
                storage=None if storage is None else str(storage),
                as_json=False,
                plan_only=False,
            )
        )
        return load_training_run(ended.run_folder)


@accept_scalars
def run(
    pipeline: str | Path,
    *,
    data: Data | None = None,
    settings: Mapping[str, Any] | None = None,
    first_stage: str | int | None = None,
    wait: bool = False,
    address: str | None = None,
    code: Code | None = None,
    out: str | Path = ".",
    storage: str | Path | None = None,
    verbose: bool = False,
) -> PipelineResult:
    """Run a pipeline, as `raysweep run` does; finished stages are kept.

    Args:
        pipeline: Name of a pipeline of `raysweep list`, or a YAML file.
        data: Name of a data set, its folder, or arrays of images (see `tune`).
        settings: {dotted path: value} of settings, as with `--set`: `stages.STAGE.SETTING` changes
            a stage, any other path the trainings of all stages.
        first_stage: Kind or number of the first stage to make again, as with `--from`; None to keep
            all artifacts.
        wait: Whether to wait while another process runs this pipeline.
        address: Ray cluster, `auto` or `host:port`; None for $RAY_ADDRESS or this machine.
        code: File of your own with the network that `model.name` names, or its function.
        out: Folder of `runs` and `mlflow.db`.
        storage: Folder or URI of sweeps; None for `runs` in `out`.
        verbose: Whether to print what is logged, not only warnings.

    Returns:
        The stages and results. Regressions that a report found are in it, and are no error.

    Raises:
        SpecError: A setting is wrong, and nothing was started.
        InfrastructureError: A cluster, store, package or disk is missing, full or does not answer.
        DamagedFileError: A file of the pipeline or of the data is damaged.
        WorkFailed: A stage failed.
        WorkInterrupted: It was interrupted; the same call resumes it.
    """
    with _function_session("run", locals(), verbose):
        code_file = _open_code(code)
        ended = run_pipeline_request(
            RunRequest(
                pipeline=str(pipeline),
                plan_only=False,
                first_stage=None if first_stage is None else str(first_stage),
                wait=wait,
                address=address,
                overrides=_collect_overrides(settings, data, code_file, out),
                code=code_file,
                out=expand_home(out),
                storage=None if storage is None else str(storage),
                as_json=False,
            )
        )
        return _summarize_pipeline(ended)


@contextmanager
def _function_session(command: str, arguments: Mapping[str, Any], verbose: bool) -> Iterator[None]:
    """Context manager for the work of a function, logged as the command of its name.

    Raises:
        SpecError: An argument has a wrong type, or another thread is in such a call.
    """
    defaults = inspect.signature(globals()[command]).parameters
    for name, value in arguments.items():
        if name in _ARGUMENT_TYPES and (value is not None or defaults[name].default is not None):
            check_argument_type(name, value, *_ARGUMENT_TYPES[name])
    given = [
        f"{name}={shorten_value(value)}"
        for name, value in arguments.items()
        if value is not defaults[name].default and name != "data"
    ]
    if arguments["data"] is not None:
        data = arguments["data"]
        given.append(f"data={data!r}" if isinstance(data, str | Path) else "data=<arrays>")
    if not _running_call.acquire(blocking=False):
        raise SpecError(
            f"raysweep.{command}: this process runs another call of raysweep; wait for its end, or "
            "use another process"
        )
    try:
        with command_session(command, f"raysweep.{command}({', '.join(given)})", verbose):
            yield
    finally:
        _running_call.release()


def _check_range(
    name: str, value: float | None, least: float, *, excludes_least: bool = False
) -> None:
    """Raise SpecError if a number is below its least value, or equal to it if that is excluded."""
    if value is None:
        return
    if not math.isfinite(value) or value < least or (excludes_least and value == least):
        kind = _ARGUMENT_TYPES[name][1]
        limit = f"above {least:g}" if excludes_least else f"of at least {least:g}"
        raise SpecError(f"{name} = {shorten_value(value)}: is not {kind} {limit}")


def _open_code(code: Code | None) -> CodeFile | None:
    """Open the user's file with a network, or the file of its function; None without one."""
    if code is None:
        return None
    if callable(code):
        return open_function_file(code)
    return open_code_file(expand_home(code))


def _collect_overrides(
    settings: Mapping[str, Any] | None, data: Data | None, code: CodeFile | None, out: str | Path
) -> dict[str, Any]:
    """Return {dotted path: value} of all settings, as `parse_overrides` reads the command line."""
    overrides = {
        check_key(to_plain_scalar(path)): to_plain_value(path, value)
        for path, value in (settings or {}).items()
    }
    if data is not None:
        overrides |= _find_data_overrides(data, expand_home(out) / "runs" / ARRAYS_FOLDER)
    if code is not None:
        overrides["model.code"] = code.sha256
    return overrides


def _find_data_overrides(data: Data, arrays_folder: Path) -> dict[str, Any]:
    """Return the settings of a data set; write one of arrays to a folder first."""
    if isinstance(data, str) and data in DATASET_LOADERS:
        return {"data.name": data}
    if isinstance(data, str | Path):
        folder = expand_home(data).resolve()
        if isinstance(data, str) and not folder.exists():
            problem = describe_unknown_name("data set", data, list(DATASET_LOADERS))
            raise SpecError(f"data: {problem}, and there is no such folder")
        return {"data.data_dir": str(folder)}
    folder = write_array_folder(data, arrays_folder.resolve())
    return {"data.name": "arrays", "data.data_dir": str(folder)}


def _summarize_pipeline(ended: EndedPipeline) -> PipelineResult:
    """Build the result from the artifacts of the stages."""
    import pandas as pd

    from raysweep.pipeline.report.stage import HTML_FILE

    stages = tuple(
        FinishedStageInfo(stage.kind, stage.folder, artifact.seconds, was_done_before)
        for stage, artifact, was_done_before in ended.finished
    )
    evaluations = [
        {
            "candidate": evaluation.candidate.title,
            "attack": evaluation.attack,
            "clean": evaluation.clean,
            "robust": evaluation.robust,
            "examples": evaluation.examples,
            "checkpoint": _locate_checkpoint(evaluation.candidate.checkpoint, ended.out),
        }
        for _, artifact, _ in ended.finished
        for evaluation in artifact.evaluations
    ]
    reports = [stage.folder / HTML_FILE for stage in stages if stage.kind == "report"]
    return PipelineResult(
        ended.name,
        stages,
        pd.DataFrame(evaluations),
        reports[-1] if reports else None,
        tuple(ended.regressions),
    )


def _locate_checkpoint(checkpoint: str, out: Path) -> str:
    """Return the folder or URI of a candidate's checkpoint, which `raysweep.load` takes."""
    return checkpoint if is_uri(checkpoint) else str(out / checkpoint)
