"""`raysweep sync`: write to MLflow what it lacks."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from raysweep.commands.options import (
    CommandParsers,
    add_command,
    add_json_option,
    add_location_options,
    add_verbose_option,
)

if TYPE_CHECKING:
    from raysweep.errors import RaysweepError
    from raysweep.tracking import Tracker
    from raysweep.unrecorded_work import UnrecordedWork

logger = logging.getLogger(__name__)

SUMMARY = "write to MLflow what it lacks after an outage or a killed driver"
DESCRIPTION = (
    "Work never waits for MLflow, so an outage, a killed driver or a slow store may leave records "
    "out. This command writes them from the files of sweeps, training runs, evaluations and "
    "pipelines. It trains and attacks nothing. Without names it writes all that MLflow lacks."
)
EXAMPLES = ("raysweep sync", "raysweep sync g1", "raysweep sync digits --storage s3://lab/sweeps")


@dataclass(frozen=True)
class SyncRequest:
    """What the user asked `raysweep sync` to do.

    Attributes:
        names: Names of sweeps, training runs and pipelines; empty for all that MLflow lacks.
        out: Folder of `runs` and `mlflow.db`.
        storage: Folder or URI of sweeps; None for `runs` in `out`.
        as_json: Whether to print JSON on stdout.
    """

    names: tuple[str, ...]
    out: Path
    storage: str | None
    as_json: bool

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> SyncRequest:
        """Convert parsed arguments."""
        names = tuple(name.removeprefix("runs/").rstrip("/") for name in args.names)
        return cls(names=names, out=args.out, storage=args.storage, as_json=args.json)


def add_parser(parsers: CommandParsers) -> None:
    """Add the arguments of `raysweep sync` to the command line."""
    parser = add_command(
        parsers, "sync", run_command, summary=SUMMARY, description=DESCRIPTION, examples=EXAMPLES
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="a sweep, training run or pipeline with its evaluations (default: all)",
    )
    add_location_options(parser)
    add_json_option(parser)
    add_verbose_option(parser)


def run_command(args: argparse.Namespace) -> None:
    """Run `raysweep sync`.

    Raises:
        SpecError: There is no work of a name.
        InfrastructureError: MLflow or a bucket does not answer, or MLflow refused a record.
        RaysweepError: Some work could not be recorded, for example because one of its files is
            damaged. All other work is recorded. One line for each failure.
    """
    request = SyncRequest.from_args(args)
    from raysweep.commands.common import make_writable_folder, resolve_runs_folder
    from raysweep.errors import InfrastructureError
    from raysweep.tracking import Tracker, tracking_uri
    from raysweep.unrecorded_work import list_unrecorded_work

    out = make_writable_folder(request.out)
    runs_folder = resolve_runs_folder(request.out, request.storage, for_writing=False)
    works = list_unrecorded_work(out, runs_folder)
    if request.names:
        _check_names(request.names, works, out, request)
        works = [work for work in works if any(map(work.belongs_to, request.names))]
    written: list[str] = []
    errors: list[RaysweepError] = []
    if works:
        tracker = Tracker(tracking_uri(out), out / "mlruns").wait_until_ready()
        for work in works:
            print(f"{work.title} ...", file=sys.stderr)
            error = _try_to_record(work, tracker)
            if error is None:
                written.append(work.title)
            else:
                errors.append(error)
    problems = [problem for error in errors for problem in error.problems]
    if request.as_json:
        print(json.dumps({"written": written, "failed": problems}, indent=1))
    else:
        lines = [f"MLflow has all records of {title}" for title in written]
        if not works:
            lines = ["MLflow lacks nothing"]
        print(*lines, sep="\n", end="\n" if lines else "")
    if errors:
        # The exit code of an InfrastructureError says that the same command may succeed later.
        temporary = (error for error in errors if isinstance(error, InfrastructureError))
        raise type(next(temporary, errors[0]))(problems)


def _try_to_record(work: UnrecordedWork, tracker: Tracker) -> RaysweepError | None:
    """Write the records of a work that MLflow lacks; return the error if this fails, or None."""
    from raysweep.commands.session import find_expected_error
    from raysweep.errors import is_interruption
    from raysweep.output_streams import OutputClosed
    from raysweep.unrecorded_work import record_work

    try:
        record_work(work, tracker)
    except OutputClosed:
        raise
    except Exception as error:
        expected = find_expected_error(error, "sync")
        if expected is None or is_interruption(error):
            raise
        logger.info("the records of %s cannot be written", work.title, exc_info=error)
        return expected.with_prefix(f"{work.title}: ")
    return None


def _check_names(
    names: Sequence[str], works: Sequence[UnrecordedWork], out: Path, request: SyncRequest
) -> None:
    """Raise SpecError for names of which there is no work, whether MLflow lacks records or not."""
    from raysweep.commands.common import resolve_runs_folder
    from raysweep.spec import SpecError, describe_unknown_name

    runs_folder = resolve_runs_folder(request.out, request.storage, for_writing=False)
    known = {
        *runs_folder.list_folders_containing("sweep.json"),
        *runs_folder.list_folders_containing("run.json"),
        *(folder.name for folder in (out / "runs" / "pipelines").glob("[!.]*")),
    }
    for name in names:
        if name not in known and not any(work.belongs_to(name) for work in works):
            noun = "sweep, training run or pipeline"
            raise SpecError(describe_unknown_name(noun, name, sorted(known)))
