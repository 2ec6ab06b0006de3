"""raysweep run"""

import json
import shutil
import sys
import textwrap
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from rich.console import Console

from raysweep.commands import (
    format_ui_command,
    make_writable_folder,
    parse_overrides,
    resolve_runs_folder,
)
from raysweep.formatting import format_duration
from raysweep.pipeline.artifact import Artifact
from raysweep.pipeline.pipeline import PlannedStage, load_pipeline, run_pipeline
from raysweep.pipeline.plan import plan_pipeline
from raysweep.pipeline.report.stage import HTML_FILE, MARKDOWN_FILE
from raysweep.pipeline.stage import StageFailed
from raysweep.spec import JsonDict, SpecError
from raysweep.tracking import tracking_uri


def run_command(args: Namespace) -> int:
    if args.plan and args.wait:
        raise SpecError("--wait: --plan runs nothing and waits for nothing")
    name, pipeline, around = load_pipeline(args.what, parse_overrides(args))
    for stage, before in pipeline.iter_upstream_configs(around):
        for line in dict.fromkeys(
            line
            for config in stage.list_training_configs(around, before)
            for line in config.list_warnings()
        ):
            print(f"raysweep: warning: {stage.kind}: {line}", file=sys.stderr)
    if args.plan:
        resolve_runs_folder(args, for_writing=False)
        folder = args.out.expanduser().resolve() / "runs" / "pipelines" / name
        return _print_plan(
            args, name, *plan_pipeline(pipeline, around, folder, args.address, args.first)
        )
    out, runs = make_writable_folder(args.out), resolve_runs_folder(args)
    console = Console(stderr=True)
    done: list[tuple[PlannedStage, Artifact, bool]] = []
    options: dict[str, Any] = {
        "runs_folder": runs,
        "address": args.address,
        "first_stage": args.first,
        "wait": args.wait,
    }
    try:
        for step, artifact, ready in run_pipeline(name, pipeline, around, out, console, **options):
            done.append((step, artifact, ready))
            how = "done before" if ready else f"done in {artifact.seconds:.1f} s"
            console.print(f"[{time.strftime('%H:%M:%S')}] {step.number:02d} {step.kind}: {how}", markup=False,
                          highlight=False, soft_wrap=True)  # fmt: skip
    except StageFailed as error:
        print(f"raysweep: {pipeline.stages[len(done)].kind} failed: {error}", file=sys.stderr)
        return 1
    return _print_outcome(args, name, out, done)


def _print_plan(
    args: Namespace,
    pipeline_name: str,
    stage_rows: list[JsonDict],
    cluster_resources: dict[str, float],
) -> int:
    """What would run, on what and for about how long."""
    if args.json:
        print(json.dumps({"pipeline": pipeline_name, "stages": stage_rows}, indent=1))
        return 0
    for row in stage_rows:
        done = (
            f"done in {row['seconds']:.0f} s"
            if row["done"]
            else "to make again"
            if row["again"]
            else "to run"
        )
        line = f"{row['number']:02d} {row['kind']:<11} {done:<14} {row['what']}{_format_stage_effort(row)}"
        print(textwrap.fill(line, _get_line_width(), subsequent_indent=" " * 30))
    times = [row["expected_seconds"] for row in stage_rows if "expected_seconds" in row]
    if times:
        known = None not in times
        how_long = (
            f"about {format_duration(sum(times))} of training"
            if known
            else "how long cannot be told here"
        )
        print(
            f"on {cluster_resources.get('CPU', 0):g} CPUs and {cluster_resources.get('GPU', 0):g} GPUs: {how_long}; attacks come on top"
        )
    return 0


def _format_stage_effort(stage_row: JsonDict) -> str:
    if "trials_at_once" not in stage_row:
        return ""
    seconds = stage_row["expected_seconds"]
    held = f"{stage_row['cpus_per_trial']:g} CPU(s) and {stage_row['gpus_per_trial']:g} GPU(s)"
    time = "" if seconds is None else f", about {format_duration(seconds)}"
    return f"; a trial holds {held}, {stage_row['trials_at_once']} run at once{time}"


def _get_line_width() -> int:
    """Lines are broken for people, not for programs."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize


def _print_outcome(
    args: Namespace,
    pipeline_name: str,
    out: Path,
    finished_stages: list[tuple[PlannedStage, Artifact, bool]],
) -> int:
    """Where everything is; exit code 1 if a report saw a regression."""
    reports = [(step, artifact) for step, artifact, _ in finished_stages if step.kind == "report"]
    regressions = [line for _, artifact in reports for line in artifact.facts["regressions"]]
    if args.json:
        stages = [
            {
                "kind": step.kind,
                "folder": str(step.folder),
                "seconds": artifact.seconds,
                "done_before": ready,
            }
            for step, artifact, ready in finished_stages
        ]
        reported = {
            "reports": [str(step.folder / HTML_FILE) for step, _ in reports],
            "regressions": regressions,
        }
        print(json.dumps({"pipeline": pipeline_name, "stages": stages, **reported}, indent=1))
    else:
        for step, artifact in reports:
            best = artifact.facts["best"]
            print(
                f"{best['candidate']['label']}: {best['robust']:.2%} under {best['attack']}, {best['clean']:.2%} clean"
            )
            print(f"report\n  {step.folder / HTML_FILE}\n  {step.folder / MARKDOWN_FILE}")
        print(f"compare with\n  {format_ui_command(tracking_uri(out))}")
    for line in regressions:
        print(f"raysweep: regression: {line}", file=sys.stderr)
    return 1 if regressions else 0
