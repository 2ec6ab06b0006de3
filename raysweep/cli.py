"""The command line: parses and calls. Commands live in `raysweep.commands`, imported when they are
needed.
"""

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import NoReturn

from raysweep import __version__
from raysweep.command_help import add_command_help
from raysweep.shell_completion import SUPPORTED_SHELLS, PrintCompletion

_DESCRIPTION = """\
Find the hyper-parameters of instance-reweighted adversarial training on a cluster, and prove the winners.

Start with `raysweep tune lrat`: it needs no data, no GPU and no network. Everything can be changed with
`--set path=value`; `raysweep show lrat` prints all paths. In a path `*` stands for any run of characters, so
`--set '*.eps=8/255'` sets every epsilon at once. Results go to ./runs and to ./mlflow.db (see them with `mlflow ui`),
or where --out and MLFLOW_TRACKING_URI say.
"""
_EPILOG = "Exit codes: 0 done; 1 the work failed; 2 a setting or a file is wrong, nothing was started; 130 interrupted."


class _OneLineErrorParser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line, as the commands do."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"raysweep: error: {message}; see `{self.prog} --help`\n")


def build_parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser: argparse.ArgumentParser = _OneLineErrorParser(
        "raysweep", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=formatter
    )
    parser.add_argument("--version", action="version", version=f"raysweep {__version__}")
    parser.add_argument(
        "--print-completion",
        action=PrintCompletion,
        choices=SUPPORTED_SHELLS,
        help="a completion script, for `eval` or a file",
    )
    commands = parser.add_subparsers(
        title="commands", dest="command", required=True, metavar="COMMAND"
    )

    p = commands.add_parser(
        "list",
        help="methods, models, data sets, attacks, metrics, search spaces, presets, pipelines",
    )
    _add_json_option(p)

    p = commands.add_parser(
        "show",
        help="a method, preset, space or pipeline with all its settings; or how a sweep or trial stands",
    )
    p.add_argument(
        "what",
        metavar="WHAT",
        help="a method, preset or pipeline of `raysweep list` (preset:NAME or space:NAME where a name is several of "
        "these), a YAML file, a sweep, or a trial: SWEEP/0003",
    )
    _add_override_options(p)
    _add_out_option(p)
    _add_storage_option(p)
    _add_json_option(p)

    p = commands.add_parser("train", help="one training run, in this process")
    p.add_argument(
        "method",
        metavar="METHOD",
        help="a method or preset of `raysweep list`, or a YAML file of settings",
    )
    p.add_argument(
        "--name",
        help="name of the run's folder (default: the method and the digest of the settings)",
    )
    _add_override_options(p)
    _add_out_option(p)
    _add_storage_option(p)
    _add_json_option(p)

    p = commands.add_parser("tune", help="a sweep: Ray Tune and Optuna search, MLflow records")
    p.add_argument(
        "method",
        nargs="?",
        metavar="METHOD",
        help="a method of `raysweep list`; not needed with --space or --resume",
    )
    p.add_argument(
        "--space",
        type=_parse_path,
        metavar="FILE",
        help="search space, a file or one of `raysweep list` (default: the one shipped for the method)",
    )
    p.add_argument(
        "--trials",
        type=_parse_positive_int,
        metavar="N",
        help="number of trials (default: the space's)",
    )
    p.add_argument(
        "--max-trials",
        type=_parse_positive_int,
        dest="trials",
        metavar="N",
        help="the same as --trials",
    )
    p.add_argument(
        "--max-time",
        type=_parse_duration,
        metavar="T",
        help="end after a time such as 90s, 30m or 2h; --resume goes on",
    )
    p.add_argument(
        "--max-gpu-hours",
        type=_parse_non_negative,
        metavar="H",
        help="end when the trials have held GPUs for H hours",
    )
    group = p.add_mutually_exclusive_group()
    group.add_argument("--name", help="name of the sweep (default: the method and the time)")
    group.add_argument(
        "--resume",
        metavar="NAME",
        help="go on with a sweep; --trials, --set epochs= and --space extend it",
    )
    p.add_argument(
        "--plan",
        action="store_true",
        help="say what would run, on what and for how long; run nothing",
    )
    _add_address_option(p)
    p.add_argument(
        "--cpus-per-trial",
        type=_parse_non_negative,
        default=1.0,
        metavar="N",
        help="logical CPUs that each trial holds (default: 1)",
    )
    p.add_argument(
        "--gpus-per-trial",
        type=_parse_non_negative,
        metavar="N",
        help="GPUs that each trial holds, may be a fraction (default: one for each worker, if there are any)",
    )
    p.add_argument(
        "--optuna",
        metavar="URL",
        help="write the trials to this Optuna storage too: sqlite:///optuna.db",
    )
    p.add_argument(
        "--workers",
        type=_parse_positive_int,
        default=1,
        metavar="N",
        help="processes that share a trial (default: 1)",
    )
    _add_override_options(p)
    _add_out_option(p)
    _add_storage_option(p)
    _add_json_option(p)

    p = commands.add_parser(
        "run",
        help="a pipeline: tune, promote, AutoAttack, register, report; what is done stays done",
    )
    p.add_argument("what", metavar="WHAT", help="a pipeline of `raysweep list`, or a YAML file")
    p.add_argument(
        "--plan", action="store_true", help="check everything and say what would run; run nothing"
    )
    p.add_argument(
        "--from",
        dest="first",
        metavar="STAGE",
        help="make the artifacts of STAGE (a kind or number) and of those after it again, from the runs and attacks "
        "that are there (docs/scheduling.md says how to do those again)",
    )
    p.add_argument(
        "--wait", action="store_true", help="if this pipeline is running already, wait for its end"
    )
    _add_address_option(p)
    _add_override_options(p)
    _add_out_option(p)
    _add_storage_option(p)
    _add_json_option(p)

    p = commands.add_parser(
        "doctor", help="check a cluster before a sweep: nodes, storage, data, MLflow, open doors"
    )
    _add_address_option(p)
    _add_override_options(p)
    _add_out_option(p)
    _add_storage_option(p)
    _add_json_option(p)

    p = commands.add_parser(
        "eval", help="a checkpoint, MLflow run or model of your own under attack, on the test set"
    )
    p.add_argument(
        "what",
        metavar="WHAT",
        help="a sweep (its best trial), a trial (SWEEP/0003), the folder of a run or checkpoint, an MLflow run id, "
        "models:/NAME@ALIAS, or module:factory",
    )
    p.add_argument(
        "--attack",
        default="autoattack",
        help="an attack of `raysweep list` or several with commas, a name twice being a restart: apgd-ce,square "
        "(default: autoattack)",
    )
    p.add_argument(
        "--version",
        default="standard",
        choices=("standard", "plus", "rand", "tf32"),
        help="which AutoAttack; tf32: the standard's attacks in TF32 on NVIDIA's GPUs, each claim verified in float32 "
        "(default: standard)",
    )
    p.add_argument(
        "--eps",
        type=_parse_fraction,
        help="0.031 or 8/255, in pixels of [0, 1] (default: the training's)",
    )
    p.add_argument(
        "--norm", default="Linf", choices=("Linf", "L2"), help="the norm of --eps (default: Linf)"
    )
    p.add_argument(
        "--n", type=_parse_positive_int, help="only the first N test examples (default: all)"
    )
    p.add_argument(
        "--batch-size",
        type=_parse_positive_int,
        default=500,
        metavar="N",
        help="examples at a time (default: 500)",
    )
    p.add_argument(
        "--pseudo-label",
        type=Path,
        metavar="FILE",
        help="attack nothing: label the images x of FILE, for data.unlabeled",
    )
    p.add_argument(
        "--keep-adversarial", action="store_true", help="save the adversarial examples too"
    )
    p.add_argument(
        "--bundle",
        type=Path,
        metavar="DIR",
        help="write card, weights and adversarial examples for others",
    )
    p.add_argument(
        "--verify",
        action="store_true",
        help="WHAT is a bundle: check each of its claims, attack nothing",
    )
    p.add_argument(
        "--address",
        metavar="ADDR",
        help="spread over this Ray cluster (default: $RAY_ADDRESS, else the cores of this machine)",
    )
    p.add_argument(
        "--gpus-per-task",
        type=_parse_non_negative,
        default=1.0,
        metavar="N",
        help="GPUs of a task on a cluster, may be a fraction (default: 1)",
    )
    _add_override_options(p)
    _add_out_option(p)
    _add_storage_option(p)
    _add_json_option(p)
    add_command_help(commands)
    return parser


# Libraries that only some commands need: {module: (name for messages, requirement for pip)}.
_OPTIONAL_REQUIREMENTS = {"ray": ("Ray", "ray[default,tune,train]"), "mlflow": ("MLflow", "mlflow")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; user mistakes become lines on stderr and exit code 2."""
    args = _parse_arguments(arguments)
    from raysweep.spec import SpecError
    from raysweep.storage import BucketUnavailable

    try:
        command = importlib.import_module(f"raysweep.commands.{args.command}")
        return int(command.run_command(args))
    except SpecError as error:
        for problem in error.problems:
            print(f"raysweep: error: {problem}", file=sys.stderr)
        return 2
    except BucketUnavailable as error:
        print(
            f"raysweep: error: {error}; what the bucket has is whole: run it again (a sweep: with --resume)",
            file=sys.stderr,
        )
        return 1
    except ModuleNotFoundError as error:
        if error.name not in _OPTIONAL_REQUIREMENTS:
            raise
        title, requirement = _OPTIONAL_REQUIREMENTS[error.name]
        print(
            f"raysweep: error: `raysweep {args.command}` needs {title}, which is not installed: "
            f"pip install '{requirement}'",
            file=sys.stderr,
        )
        return 2
    except BrokenPipeError:
        # Whoever read our output has seen enough (`raysweep list | head`); nothing is left to say
        # on the way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        goes_on = args.command in ("train", "run", "eval")
        print(
            f"raysweep: interrupted{'; the same command goes on' if goes_on else ''}",
            file=sys.stderr,
        )
        return 130


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; an option that there is not is refused with the nearest that there is."""
    parser = build_parser()
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        command = commands.choices[args.command]
        near = difflib.get_close_matches(
            unknown[0].partition("=")[0], command._option_string_actions, n=1
        )
        command.error(
            f"unrecognized arguments: {' '.join(unknown)}{f'; nearest: {near[0]}' if near else ''}"
        )
    return args


def _add_override_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="change a setting (repeatable)",
    )
    parser.add_argument(
        "--data-dir",
        type=_parse_path,
        metavar="DIR",
        help="where the data set is: short for --set data.data_dir=",
    )


def _add_address_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--address",
        metavar="ADDR",
        help="Ray cluster: auto or host:port (default: $RAY_ADDRESS, else local)",
    )


def _add_out_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        type=_parse_path,
        default=Path(),
        metavar="DIR",
        help="where runs/ and mlflow.db go (default: .)",
    )


def _add_storage_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--storage",
        metavar="WHERE",
        help="where sweeps and checkpoints go instead of runs/: a folder, s3://BUCKET/PATH or gs://BUCKET/PATH",
    )


def _add_json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON on stdout")


def _parse_path(text: str) -> Path:
    return Path(os.path.expanduser(text))  # noqa: PTH111 - Path's own raises where there is no such user


def _parse_positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _parse_duration(text: str) -> float:
    units = {"s": 1, "m": 60, "h": 3600}
    try:
        seconds = float(text[:-1]) * units[text[-1:]]
    except (ValueError, KeyError):
        seconds = -1.0
    if seconds <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 90s, 30m or 2h")
    return seconds


def _parse_fraction(text: str) -> float:
    try:
        value = float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        value = -1.0
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number such as 0.031 or 8/255")
    return value


def _parse_non_negative(text: str) -> float:
    try:
        amount = float(text)
    except ValueError:
        amount = -1.0
    if not 0 <= amount < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return amount


if __name__ == "__main__":
    sys.exit(main())
