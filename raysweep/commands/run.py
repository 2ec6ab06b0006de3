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

from raysweep.commands import runs_in, settings, ui_command, writable
from raysweep.pipeline.artifact import Artifact
from raysweep.pipeline.pipeline import Step, load_pipeline, run_pipeline
from raysweep.pipeline.plan import planned
from raysweep.pipeline.report import HTML, MARKDOWN
from raysweep.pipeline.stage import StageFailed
from raysweep.spec import Json, SpecError
from raysweep.tracking import embedded_store
from raysweep.wording import duration


def run(args: Namespace) -> int:
    if args.plan and args.wait:
        raise SpecError("--wait: --plan runs nothing and waits for nothing")
    name, pipeline, around = load_pipeline(args.what, settings(args))
    for stage, before in pipeline.planned(around):
        for line in dict.fromkeys(line for config in stage.configs(around, before) for line in config.warnings()):
            print(f"raysweep: warning: {stage.kind}: {line}", file=sys.stderr)
    if args.plan:
        runs_in(args, write=False)
        folder = args.out.expanduser().resolve() / "runs" / "pipelines" / name
        return _plan(args, name, *planned(pipeline, around, folder, args.address, args.first))
    out, runs = writable(args.out), runs_in(args)
    console = Console(stderr=True)
    done: list[tuple[Step, Artifact, bool]] = []
    options: dict[str, Any] = {"runs": runs, "address": args.address, "first": args.first, "wait": args.wait}
    try:
        for step, artifact, ready in run_pipeline(name, pipeline, around, out, console, **options):
            done.append((step, artifact, ready))
            how = "done before" if ready else f"done in {artifact.seconds:.1f} s"
            console.print(f"[{time.strftime('%H:%M:%S')}] {step.number:02d} {step.kind}: {how}", markup=False,
                          highlight=False, soft_wrap=True)  # fmt: skip
    except StageFailed as error:
        print(f"raysweep: {pipeline.stages[len(done)].kind} failed: {error}", file=sys.stderr)
        return 1
    return _end(args, name, out, done)


def _plan(args: Namespace, name: str, rows: list[Json], has: dict[str, float]) -> int:
    """What would run, on what and for about how long."""
    if args.json:
        print(json.dumps({"pipeline": name, "stages": rows}, indent=1))
        return 0
    for row in rows:
        done = f"done in {row['seconds']:.0f} s" if row["done"] else "to make again" if row["again"] else "to run"
        line = f"{row['number']:02d} {row['kind']:<11} {done:<14} {row['what']}{_effort(row)}"
        print(textwrap.fill(line, _width(), subsequent_indent=" " * 30))
    times = [row["expected_seconds"] for row in rows if "expected_seconds" in row]
    if times:
        known = None not in times
        how_long = f"about {duration(sum(times))} of training" if known else "how long cannot be told here"
        print(f"on {has.get('CPU', 0):g} CPUs and {has.get('GPU', 0):g} GPUs: {how_long}; attacks come on top")
    return 0


def _effort(row: Json) -> str:
    if "trials_at_once" not in row:
        return ""
    seconds = row["expected_seconds"]
    held = f"{row['cpus_per_trial']:g} CPU(s) and {row['gpus_per_trial']:g} GPU(s)"
    time = "" if seconds is None else f", about {duration(seconds)}"
    return f"; a trial holds {held}, {row['trials_at_once']} run at once{time}"


def _width() -> int:
    """Lines are broken for people, not for programs."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize


def _end(args: Namespace, name: str, out: Path, done: list[tuple[Step, Artifact, bool]]) -> int:
    """Where everything is; exit code 1 if a report saw a regression."""
    reports = [(step, artifact) for step, artifact, _ in done if step.kind == "report"]
    regressions = [line for _, artifact in reports for line in artifact.facts["regressions"]]
    if args.json:
        stages = [
            {"kind": step.kind, "folder": str(step.folder), "seconds": artifact.seconds, "done_before": ready}
            for step, artifact, ready in done
        ]
        reported = {"reports": [str(step.folder / HTML) for step, _ in reports], "regressions": regressions}
        print(json.dumps({"pipeline": name, "stages": stages, **reported}, indent=1))
    else:
        for step, artifact in reports:
            best = artifact.facts["best"]
            print(
                f"{best['candidate']['label']}: {best['robust']:.2%} under {best['attack']}, {best['clean']:.2%} clean"
            )
            print(f"report\n  {step.folder / HTML}\n  {step.folder / MARKDOWN}")
        print(f"compare with\n  {ui_command(embedded_store(out))}")
    for line in regressions:
        print(f"raysweep: regression: {line}", file=sys.stderr)
    return 1 if regressions else 0
