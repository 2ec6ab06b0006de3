"""`raysweep run`: run a pipeline."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from raysweep.commands.options import (
    CommandParsers,
    add_address_option,
    add_code_option,
    add_command,
    add_json_option,
    add_location_options,
    add_override_options,
    add_verbose_option,
)

if TYPE_CHECKING:
    from rich.console import Console

    from raysweep.code_files import CodeFile
    from raysweep.pipeline.artifact import Artifact
    from raysweep.pipeline.pipeline import Pipeline, PlannedStage
    from raysweep.pipeline.stage import TrainingOverrides
    from raysweep.spec import JsonDict

    # A stage, its artifact, and whether an earlier run had made the artifact.
    FinishedStage: TypeAlias = tuple[PlannedStage, Artifact, bool]

SUMMARY = "run a pipeline: tune, promote, AutoAttack, register, report; finished stages are kept"
DESCRIPTION = (
    "Runs the stages of a pipeline after checking all of them. Each stage writes an artifact to "
    "runs/pipelines/NAME that is named after a digest of its inputs: a second run does nothing, a "
    "killed run resumes, and after a change only the stages that depend on it run again. "
    "--set stages.STAGE.SETTING= changes a stage, any other path the training runs of all stages. "
    "If a report finds a regression, the exit code is 5."
)
EXAMPLES = (
    "raysweep run digits",
    "raysweep run nightly --set stages.tune.trials=20 --plan",
)

# Columns before what a stage does.
_PLAN_INDENT = 30


@dataclass(frozen=True)
class RunRequest:
    """What the user asked `raysweep run` or the function `raysweep.run` to do.

    Attributes:
        pipeline: Name or YAML file of the pipeline.
        plan_only: Whether to print what would run and to run nothing.
        first_stage: Kind or number of the first stage to make again; None to keep all artifacts.
        wait: Whether to wait if another process runs this pipeline.
        address: Ray cluster, `auto` or `host:port`; None for $RAY_ADDRESS or this machine.
        overrides: {dotted path: value} of `--set`, `--data-dir` and `--code`.
        code: The file of `--code`; or None.
        out: Folder of `runs` and `mlflow.db`.
        storage: Folder or URI of sweeps; None for `runs` in `out`.
        as_json: Whether to print JSON on stdout.
    """

    pipeline: str
    plan_only: bool
    first_stage: str | None
    wait: bool
    address: str | None
    overrides: dict[str, Any]
    code: CodeFile | None
    out: Path
    storage: str | None
    as_json: bool

    def __post_init__(self) -> None:
        """Raise SpecError if parts of the request contradict each other."""
        from raysweep.spec import SpecError

        if self.plan_only and self.wait:
            raise SpecError("--wait: --plan runs nothing and waits for nothing")

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> RunRequest:
        """Convert parsed arguments. Raises SpecError if they contradict each other."""
        from raysweep.code_files import open_code_file
        from raysweep.commands.common import parse_overrides

        code = None if args.code is None else open_code_file(args.code)
        return cls(
            pipeline=args.what,
            plan_only=args.plan,
            first_stage=args.first,
            wait=args.wait,
            address=args.address,
            overrides=parse_overrides(args.set, args.data_dir, code),
            code=code,
            out=args.out,
            storage=args.storage,
            as_json=args.json,
        )


def add_parser(parsers: CommandParsers) -> None:
    """Add the arguments of `raysweep run` to the command line."""
    parser = add_command(
        parsers, "run", run_command, summary=SUMMARY, description=DESCRIPTION, examples=EXAMPLES
    )
    parser.add_argument(
        "what", metavar="WHAT", help="a pipeline of `raysweep list`, or a YAML file"
    )
    parser.add_argument(
        "--plan", action="store_true", help="check everything and print what would run; run nothing"
    )
    parser.add_argument(
        "--from",
        dest="first",
        metavar="STAGE",
        help="make the artifacts of STAGE (a kind or number) and of later stages again, from the "
        "existing training runs and evaluations (docs/scheduling.md explains how to repeat those)",
    )
    parser.add_argument(
        "--wait", action="store_true", help="if another process runs this pipeline, wait for it"
    )
    add_address_option(parser)
    add_override_options(parser)
    add_code_option(parser)
    add_location_options(parser)
    add_json_option(parser)
    add_verbose_option(parser)


@dataclass(frozen=True)
class EndedPipeline:
    """A pipeline whose stages are all done.

    Attributes:
        name: Its name.
        out: Folder of `runs` and `mlflow.db`.
        finished: Its stages in their order, with their artifacts, and whether an earlier run had
            made them.
        regressions: One line of a report for each result that is worse than an earlier one.
    """

    name: str
    out: Path
    finished: list[FinishedStage]
    regressions: list[str]


def run_command(args: argparse.Namespace) -> None:
    """Run `raysweep run`. Raises RegressionFound if a report found a regression."""
    from raysweep.errors import RegressionFound

    request = RunRequest.from_args(args)
    if request.plan_only:
        _plan_stages(request, *_load_checked_pipeline(request))
        return
    ended = run_pipeline_request(request)
    if request.as_json:
        _print_stages_as_json(ended)
    else:
        _print_reports(ended)
    if ended.regressions:
        raise RegressionFound(ended.regressions)


def _load_checked_pipeline(request: RunRequest) -> tuple[str, Pipeline, TrainingOverrides]:
    """Load and check a pipeline: its name, its stages, and the settings of all its trainings."""
    from raysweep.pipeline.builtin_pipelines import find_pipeline_file

    # A wrong name is reported before anything imports what the stages need.
    find_pipeline_file(request.pipeline)
    from raysweep.commands.common import check_code
    from raysweep.pipeline.pipeline import check_rankings, load_pipeline

    name, pipeline, training_overrides = load_pipeline(request.pipeline, request.overrides)
    check_code(request.code, pipeline.list_networks(training_overrides))
    check_rankings(pipeline, training_overrides)
    if not request.plan_only:
        _print_config_warnings(pipeline, training_overrides)
    return name, pipeline, training_overrides


def _print_config_warnings(pipeline: Pipeline, training_overrides: TrainingOverrides) -> None:
    """Print the warnings about the training settings of each stage, every text once per stage."""
    from raysweep.commands.common import print_warnings

    for stage, upstream in pipeline.iter_stages_with_received_configs(training_overrides):
        warnings = stage.list_warnings(training_overrides, upstream)
        print_warnings(f"{stage.kind}: {line}" for line in dict.fromkeys(warnings))


def _plan_stages(
    request: RunRequest, name: str, pipeline: Pipeline, training_overrides: TrainingOverrides
) -> None:
    """Print what would run, on which resources and for about how long."""
    from raysweep.commands.common import print_warnings, resolve_runs_folder
    from raysweep.disk_space import describe_needed_space
    from raysweep.pipeline.plan import plan_pipeline
    from raysweep.sweep.plan import limit_prefix_bytes
    from raysweep.training.training_summary import wrap_plan_line

    runs_folder = resolve_runs_folder(request.out, request.storage, for_writing=False)
    folder = request.out.resolve() / "runs" / "pipelines" / name
    stage_rows, cluster_resources = plan_pipeline(
        pipeline, training_overrides, folder, request.address, request.first_stage
    )
    for row in stage_rows:
        print_warnings(f"{row['kind']}: {line}" for line in row.get("warnings", []))
    if request.as_json:
        print(json.dumps({"pipeline": name, "stages": stage_rows}, indent=1))
        return
    for row in stage_rows:
        print("\n".join(wrap_plan_line(_format_plan_row(row), _PLAN_INDENT)))
        for line in row.get("summary", []):
            print(f"   {line}")
    times = [row["expected_seconds"] for row in stage_rows if "expected_seconds" in row]
    if times:
        cpus, gpus = cluster_resources.get("CPU", 0), cluster_resources.get("GPU", 0)
        line = f"on {cpus:g} CPUs and {gpus:g} GPUs: {_format_training_time(times)}"
        print("\n".join(wrap_plan_line(line)))
    sizes = [row["checkpoint_bytes"] for row in stage_rows if "checkpoint_bytes" in row]
    states = [row["state_bytes"] for row in stage_rows if "state_bytes" in row]
    if sizes and None not in (*sizes, *states):
        prefix_bytes = limit_prefix_bytes(sum(states))
        line = describe_needed_space(sum(sizes), runs_folder.local_path, prefix_bytes)
        print("\n".join(wrap_plan_line(line)))


def _format_plan_row(row: JsonDict) -> str:
    """Return the line about a stage of a plan."""
    if row["done"]:
        state = f"done in {row['seconds']:.0f} s"
    else:
        state = "to make again" if row["again"] else "to run"
    return f"{row['number']:02d} {row['kind']:<11} {state:<14} {row['what']}{_format_effort(row)}"


def _format_effort(row: JsonDict) -> str:
    """Return what the trials of a stage hold and how long they take; "" for other stages."""
    from raysweep.formatting import format_duration

    if "trials_at_once" not in row:
        return ""
    seconds = row["expected_seconds"]
    duration = "" if seconds is None else f", about {format_duration(seconds)}"
    resources = f"{row['cpus_per_trial']:g} CPU(s) and {row['gpus_per_trial']:g} GPU(s)"
    return f"; a trial holds {resources}, {row['trials_at_once']} run at once{duration}"


def _format_training_time(times: list[float | None]) -> str:
    """Return the training time of all stages; `times` are seconds, None if not estimated."""
    from raysweep.formatting import format_duration

    seconds = [time for time in times if time is not None]
    if len(seconds) < len(times):
        return "the training time cannot be estimated on this machine; attacks take extra time"
    return f"about {format_duration(sum(seconds))} of training; attacks take extra time"


def run_pipeline_request(request: RunRequest) -> EndedPipeline:
    """Run all stages, and print their progress but not their results.

    Args:
        request: What the user asked for, other than a plan.

    Raises:
        StageFailed: A stage failed.
        RaysweepError: A setting is wrong, and nothing was started; or the run was interrupted.
    """
    from raysweep.commands.common import make_writable_folder, resolve_runs_folder
    from raysweep.pipeline.pipeline import run_pipeline
    from raysweep.pipeline.stage import StageFailed
    from raysweep.terminal import create_progress_console

    name, pipeline, training_overrides = _load_checked_pipeline(request)
    out = make_writable_folder(request.out)
    runs_folder = resolve_runs_folder(request.out, request.storage)
    console = create_progress_console()
    finished: list[FinishedStage] = []
    try:
        for finished_stage in run_pipeline(
            name,
            pipeline,
            training_overrides,
            out,
            console,
            runs_folder=runs_folder,
            address=request.address,
            first_stage=request.first_stage,
            wait=request.wait,
        ):
            finished.append(finished_stage)
            _print_finished_stage(console, finished_stage)
    except StageFailed as error:
        kind = pipeline.stages[len(finished)].kind
        raise error.with_prefix(f"{kind} failed: ") from error
    return EndedPipeline(name, out, finished, _list_regressions(finished))


def _print_finished_stage(console: Console, finished_stage: FinishedStage) -> None:
    """Print the time at which a stage ended and how long it took."""
    stage, artifact, done_before = finished_stage
    state = "done before" if done_before else f"done in {artifact.seconds:.1f} s"
    console.print(
        f"[{time.strftime('%H:%M:%S')}] {stage.number:02d} {stage.kind}: {state}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _list_regressions(finished: list[FinishedStage]) -> list[str]:
    """Return the regressions that reports found, a line each."""
    from raysweep.pipeline.facts import ReportFacts

    regressions: list[str] = []
    for stage, artifact, _ in finished:
        if stage.kind == "report":
            regressions += artifact.read_facts(ReportFacts).regressions
    return regressions


def _print_stages_as_json(ended: EndedPipeline) -> None:
    """Print each stage's folder and time, the reports, and the regressions."""
    from raysweep.pipeline.report.stage import HTML_FILE

    stages, reports = [], []
    for stage, artifact, done_before in ended.finished:
        stages.append(
            {
                "kind": stage.kind,
                "folder": str(stage.folder),
                "seconds": artifact.seconds,
                "done_before": done_before,
            }
        )
        if stage.kind == "report":
            reports.append(str(stage.folder / HTML_FILE))
    summary = {
        "pipeline": ended.name,
        "stages": stages,
        "reports": reports,
        "regressions": ended.regressions,
    }
    print(json.dumps(summary, indent=1))


def _print_reports(ended: EndedPipeline) -> None:
    """Print the result of each report, where its files are, and how to open MLflow."""
    from raysweep.commands.common import format_ui_command
    from raysweep.pipeline.facts import ReportFacts
    from raysweep.pipeline.report.stage import HTML_FILE, MARKDOWN_FILE
    from raysweep.tracking import tracking_uri

    for stage, artifact, _ in ended.finished:
        if stage.kind == "report":
            best = artifact.read_facts(ReportFacts).best
            print(
                f"{best.candidate.label}: {best.robust:.2%} under {best.attack}, "
                f"{best.clean:.2%} clean"
            )
            print(f"report\n  {stage.folder / HTML_FILE}\n  {stage.folder / MARKDOWN_FILE}")
    print(f"compare with\n  {format_ui_command(tracking_uri(ended.out))}")
