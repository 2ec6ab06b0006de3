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
from raysweep.pipeline.pipeline import Step, load_pipeline, run_pipeline, steps
from raysweep.pipeline.report import HTML, MARKDOWN
from raysweep.pipeline.stage import Settings, StageFailed
from raysweep.tracking import embedded_store


def run(args: Namespace) -> int:
    name, pipeline, around = load_pipeline(args.what, settings(args))
    for stage, before in pipeline.planned(around):
        for line in dict.fromkeys(line for config in stage.configs(around, before) for line in config.warnings()):
            print(f"raysweep: warning: {stage.kind}: {line}", file=sys.stderr)
    if args.plan:
        folder = args.out.expanduser().resolve() / "runs" / "pipelines" / name
        return _plan(args, name, steps(pipeline, around, folder, pipeline.salt()), around)
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


def _plan(args: Namespace, name: str, planned: list[Step], around: Settings) -> int:
    """What would run; nothing is written."""
    found = [Artifact.read(step.folder) for step in planned]
    rows = [
        {
            "number": step.number,
            "kind": step.kind,
            "digest": step.digest,
            "done": artifact is not None,
            "seconds": artifact.seconds if artifact else None,
            "what": step.stage.describe(around),
        }
        for step, artifact in zip(planned, found, strict=True)
    ]
    if args.json:
        print(json.dumps({"pipeline": name, "stages": rows}, indent=1))
        return 0
    for row in rows:
        state = f"done in {row['seconds']:.0f} s" if row["done"] else "to run"
        line = f"{row['number']:02d} {row['kind']:<11} {state:<14} {row['what']}"
        print(textwrap.fill(line, _width(), subsequent_indent=" " * 30))
    return 0


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
