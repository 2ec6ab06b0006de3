"""Give raysweep wrong settings and damaged files, and count how it answers.

    python benchmarks/fuzz_inputs.py --inputs 10000 --seed 0 --out fuzz.json

Runs `show`, `tune --plan`, `run --plan` and `train --plan` in this process, with `--set` values,
YAML files, JSON files of a sweep and data sets (.npz) that are mutated at random. Prints the table
of fuzz_inputs.md: how many were accepted (exit code 0) and refused (a line on stderr, exit codes 2
to 4), and the faults: tracebacks, refusals without a line or with several lines for one problem
(silent), and answers that took more than five seconds of processor time (slow). Each input is a
function of the seed and its number; faults are printed so that `--only NUMBER` repeats one.
"""

import contextlib
import io
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from command_line import create_parser
from measure import describe_machine, format_table
from ruamel.yaml import YAML

from raysweep.cli import main as run_command_line

ROOT = Path(__file__).parent.parent
STORED_SWEEPS = ROOT / "tests" / "data" / "written_by_0_1" / "runs"
SLOW_SECONDS = 5.0
# After these seconds of processor time an input is given up.
LIMIT_SECONDS = 30
# What keeps a plan that is accepted cheap.
TINY = ("data.train_size=64", "data.val_size=50", "batch_size=16", "*.steps=1")
# How often each command is drawn: plans take a hundred times as long as `show`.
COMMANDS = (*("show",) * 27, "tune", "train", "run")
SPACES = ("at", "lrat", "gairat")
PIPELINES = ("digits", "gairat-fig10")
TARGETS = ("lrat", "gairat", "preset:lrat-table1", "space:lrat", "digits", "space:gairat")


def nest(depth: int) -> str:
    return "[" * depth + "]" * depth


def alias_bomb() -> str:
    names = "abcdefghi"
    lines = ["a: &a [x,x,x,x,x,x,x,x,x,x]"]
    for former, name in itertools.pairwise(names):
        lines.append(f"{name}: &{name} [{','.join([f'*{former}'] * 10)}]")
    return "\n".join(lines)


ATOMS = (
    *("0", "-1", "1", "2", "3.5", "1e30", "-1e30", "1e400", ".inf", "-.inf", ".nan", "1e-320"),
    *("9" * 30, "9" * 400, "9" * 100_000, "0x7fffffffffffffff", "0o17", "010", "1:30", "1_000"),
    *("2001-01-01", "2001-99-99", "2001-01-01T00:00:00Z", "on", "off", "yes", "no", "true"),
    *("null", "~", "''", "' '", "x", "digits", "lrat", "natural", "8/255", "1/0", "nan", "inf"),
    *("[]", "{}", "[1]", "[[]]", "[null]", "[1, a]", "{a: 1}", "{kind: x}", "{1: 2}"),
    *("{kind: [1]}", "{kind: {a: 1}}", "{kind: pgd}", "{kind: piecewise}", "{float: [0, 1]}"),
    *("{[1]: 2}", "{a: 1, a: 2}", "&a [*a]", "&a {b: *a}", "*a", "{<<: 1}", "{<<: {a: 1}}"),
    *("!!str 1", "!!int x", "!!python/name:os.system x", "!!binary aGk=", "!x y", "!!float 1"),
    *(nest(20), nest(40), nest(3000), "[" * 50, "{a: " * 40, "x" * 300, "x" * 200_000),
    *('"\\0"', '"\\u202e"', '"a\\nb"', "\udcff", "é", "😀", "\x1b[31m", "'", '"', "a: b: c"),
    *("~nosuch/x", "~", "/dev/null", "/dev/zero", "/proc/self/mem", "/", "..", "/nosuch/x"),
    *("[1e400]", "[.nan, 1]", "[2, 1]", "[0, 1e308]", "[-1e308, 1e308]", "[a, b]", "[on, off]"),
    *("- 1", "? a", "# x", "---", "--- a\n--- b", "%YAML 1.1", "|", ">", "@", "`", "%", "\t", ","),
)  # fmt: skip


@dataclass
class Fault:
    """An answer that no input should get."""

    number: int
    surface: str
    what: str
    detail: str
    arguments: list[str]


@dataclass
class Tally:
    """Counts of one surface."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[Fault] = field(default_factory=list)
    slowest: float = 0.0


class TooSlow(BaseException):
    """An input that was given up."""


def list_setting_paths() -> list[str]:
    """The dotted paths of all settings and their parts, and paths that are nearly settings."""
    from raysweep.spec import flatten_spec
    from raysweep.training.presets import resolve_training_config

    paths: set[str] = set()
    for method in ("lrat", "gairat", "trades"):
        for path in flatten_spec(resolve_training_config(method, {})):
            parts = path.split(".")
            paths |= {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
    return sorted(paths)


def list_defaults(target: str) -> dict[str, Any]:
    """The settings of a target with their values."""
    from raysweep.spec import flatten_spec
    from raysweep.training.presets import resolve_training_config

    name = target.rpartition(":")[2]
    config = resolve_training_config("lrat" if name == "digits" else name, {})
    return flatten_spec(config)


SPACE_PATHS = (
    *("trials", "sampler", "sampler.kind", "sampler.seed", "scheduler", "scheduler.kind", "base"),
    *("scheduler.reduction_factor", "metric", "space", "prefix_gib", "points_to_evaluate", "for"),
)
STAGE_PATHS = (
    *("stages.tune.trials", "stages.0.space", "stages.autoattack.n", "stages.*.label", "rerun"),
    *(
        "stages",
        "stages.tune",
        "stages.9.x",
        "stages.0.set",
        "stages.report.figures",
        "keep_nights",
    ),
    *("stages.autoattack.attacks", "stages.promote.top", "stages.tune.set.*", "stages.tune.kind"),
)
ODD_PATHS = (
    *("*", "*.*", "*.eps", "**", "[", "[a-", "*[", "?", ".", "..", ".a", "a.", "a..b", "", "é"),
    *("x" * 300, "x" * 5000, ".".join("a" * 2000), "\udcff", "\n", "\x1b", "*." * 200, "method.*"),
    *("kind", "*.kind", "data.*", "optim.*", "*name", "protocol", "extends", "notes"),
)  # fmt: skip


class Mutator:
    """Random wrong inputs."""

    def __init__(self, rng: random.Random, paths: Sequence[str]) -> None:
        self.rng = rng
        self.paths = paths

    def atom(self) -> str:
        if self.rng.random() < 0.1:
            length = self.rng.randrange(1, 12)
            return "".join(
                self.rng.choice(" abc019.:,-[]{}&*!|>'\"%#?~\n\t\\éß") for _ in range(length)
            )
        return self.rng.choice(ATOMS)

    def path(self, kind: str) -> str:
        pick = self.rng.random()
        if pick < 0.15:
            return self.rng.choice(ODD_PATHS)
        if pick < 0.4 and kind in ("space", "pipeline"):
            return self.rng.choice(SPACE_PATHS if kind == "space" else STAGE_PATHS)
        path = self.rng.choice(self.paths)
        if pick < 0.5:
            parts = path.split(".")
            parts[self.rng.randrange(len(parts))] = self.rng.choice(("*", "x", "", "kind", "0"))
            return ".".join(parts)
        return path

    def assignment(self, kind: str, defaults: Mapping[str, Any]) -> str:
        pick = self.rng.random()
        if pick < 0.02:
            return self.atom()
        if pick < 0.6:
            path = self.rng.choice(sorted(defaults))
            value = self.near(defaults[path]) if pick < 0.3 else self.atom()
            return f"{path}={value}"
        return f"{self.path(kind)}={self.atom()}"

    def near(self, value: Any) -> str:
        """A value that is nearly right."""
        if isinstance(value, bool) or value is None:
            return self.rng.choice(("on", "off", "yes", "No", "true", "0", "1", "null", "2"))
        if isinstance(value, int | float):
            factor = self.rng.choice((-1, 0, 0.5, 1, 2, 10, 1e3, 1e9, 1e18))
            changed = value * factor
            return self.rng.choice(
                (str(changed), f"{changed:e}", f"{int(changed)}", f"{changed}/3")
            )
        text = str(value)
        return self.rng.choice(
            (text.upper(), text[:-1], f"'{text}'", f"[{text}]", f"{text} ", text)
        )

    def change_value(self, data: Any) -> Any:
        """Plain data with one node replaced, removed, added or wrapped."""
        nodes = list(iter_containers(data))
        container = self.rng.choice(nodes)
        keys = list(container) if isinstance(container, dict) else list(range(len(container)))
        action = self.rng.random()
        if not keys or action < 0.15:
            value = Raw(self.atom())
            if isinstance(container, dict):
                container[self.rng.choice((self.path("space"), "kind", "on", "x"))] = value
            else:
                container.append(value)
        else:
            key = self.rng.choice(keys)
            if action < 0.7:
                container[key] = Raw(self.atom())
            elif action < 0.8:
                del container[key]
            elif action < 0.9:
                container[key] = [container[key]]
            else:
                container[key] = {self.rng.choice(("x", "kind", "a")): container[key]}
        return data

    def change_bytes(self, content: bytes) -> bytes:
        """A text or binary file with some bytes replaced, inserted, removed, or cut off."""
        data = bytearray(content)
        for _ in range(self.rng.randrange(1, 4)):
            where = self.rng.randrange(len(data) + 1)
            action = self.rng.random()
            if action < 0.3:
                data[where:where] = self.atom().encode(errors="surrogateescape")
            elif action < 0.6 and where < len(data):
                data[where] = self.rng.randrange(256)
            elif action < 0.85:
                del data[where : where + self.rng.randrange(1, 30)]
            elif action < 0.95:
                data[where:where] = data[where : where + self.rng.randrange(1, 200)]
            else:
                del data[where:]
        return bytes(data)


class Raw(str):
    """Text that stands in a file as it is."""


def iter_containers(data: Any) -> Iterator[Any]:
    if isinstance(data, dict | list):
        yield data
        for value in data.values() if isinstance(data, dict) else data:
            yield from iter_containers(value)


def write_flow(data: Any) -> str:
    """YAML or JSON in flow style, with `Raw` values as they are."""
    if isinstance(data, Raw):
        return str(data)
    if isinstance(data, dict):
        return (
            "{" + ", ".join(f"{json.dumps(str(k))}: {write_flow(v)}" for k, v in data.items()) + "}"
        )
    if isinstance(data, list):
        return "[" + ", ".join(map(write_flow, data)) + "]"
    return json.dumps(data)


def write_block(data: Any) -> str:
    """YAML whose top mapping is in block style."""
    if not isinstance(data, dict):
        return write_flow(data)
    return "".join(
        f"{key if key.isidentifier() else json.dumps(key)}: {write_flow(value)}\n"
        for key, value in data.items()
    )


def read_plain(path: Path) -> Any:
    return YAML(typ="safe", pure=True).load(path.read_text("utf-8"))


class Inputs:
    """Command lines by surface; files that they name are made in a folder."""

    def __init__(self, folder: Path, commands: Sequence[str] = COMMANDS) -> None:
        self.folder = folder
        self.commands = commands
        self.paths = list_setting_paths()
        self.defaults = {target: list_defaults(target) for target in (*TARGETS, *SPACES)}
        self.yaml_files = {
            "space": [ROOT / "search_spaces" / f"{name}.yaml" for name in SPACES],
            "preset": sorted((ROOT / "pipelines" / "presets").glob("*.yaml"))[::9],
            "pipeline": [ROOT / "pipelines" / f"{name}.yaml" for name in PIPELINES],
        }
        self.sweeps = [STORED_SWEEPS / "sweep", STORED_SWEEPS / "train"]

    def mutator(self, seed: int, number: int) -> Mutator:
        return Mutator(random.Random(f"{seed}/{number}"), self.paths)

    def settings(self, mutator: Mutator) -> list[str]:
        """`--set` with one to three wrong values."""
        rng = mutator.rng
        command = rng.choice(self.commands)
        if command == "show":
            target = rng.choice(TARGETS)
            kind = "pipeline" if target == "digits" else target.split(":")[0]
            arguments = ["show", target]
        else:
            kind = {"tune": "space", "train": "method", "run": "pipeline"}[command]
            target = "digits" if command == "run" else rng.choice(SPACES)
            arguments = [command, target, "--plan", *tiny_settings()]
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            arguments += ["--set", mutator.assignment(kind, self.defaults[target])]
        return arguments

    def yaml(self, mutator: Mutator) -> list[str]:
        """A YAML file with changed values or bytes."""
        rng = mutator.rng
        kind = rng.choice(list(self.yaml_files))
        source = rng.choice(self.yaml_files[kind])
        path = self.folder / "settings.yaml"
        pick = rng.random()
        if pick < 0.03:
            path.write_bytes(rng.choice((alias_bomb(), nest(3000), "", "- 1")).encode())
        elif pick < 0.35:
            path.write_bytes(mutator.change_bytes(source.read_bytes()))
        else:
            data = read_plain(source)
            for _ in range(rng.choice((1, 1, 2))):
                data = mutator.change_value(data)
            path.write_bytes(write_block(data).encode(errors="surrogateescape"))
        if rng.choice(self.commands) == "show":
            return ["show", str(path)]
        if kind == "space":
            return ["tune", "--space", str(path), "--plan", *tiny_settings()]
        command = "run" if kind == "pipeline" else "train"
        return [command, str(path), "--plan", *tiny_settings()]

    def json(self, mutator: Mutator) -> list[str]:
        """A sweep or training run with a damaged JSON file."""
        rng = mutator.rng
        source = rng.choice(self.sweeps)
        runs = self.folder / "runs"
        shutil.rmtree(runs, ignore_errors=True)
        shutil.copytree(source, runs / source.name)
        file = rng.choice(sorted(runs.rglob("*.json")))
        damage_json(file, mutator)
        place = ["--out", str(self.folder)]
        name = source.name
        if name == "sweep":
            name = rng.choice(("sweep", "sweep", "sweep/0000", "sweep/0001"))
            if rng.choice(self.commands) == "tune":
                return ["tune", "--resume", "sweep", "--plan", *place, *tiny_settings()]
        return ["show", name, *place, *rng.choice(((), ("--json",)))]

    def npz(self, mutator: Mutator) -> list[str]:
        """A data set with a damaged .npz file."""
        folder = self.folder / "images"
        folder.mkdir(exist_ok=True)
        write_images(folder)
        damage_npz(folder / mutator.rng.choice(("train.npz", "test.npz")), mutator)
        return [
            *("train", "at", "--plan", "--data-dir", str(folder)),
            *tiny_settings(),
            *("--set", "model.name=digits_cnn"),
        ]


def tiny_settings() -> list[str]:
    return [word for value in TINY for word in ("--set", value)]


def damage_json(file: Path, mutator: Mutator) -> None:
    """Change a value or bytes of a JSON file."""
    content = file.read_bytes()
    if mutator.rng.random() < 0.3:
        file.write_bytes(mutator.change_bytes(content))
        return
    data = mutator.change_value([json.loads(content)])
    text = write_flow(data[0] if data else None)
    file.write_bytes(text.encode(errors="surrogateescape"))


def write_images(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for name, n in (("train", 200), ("test", 60)):
        x = rng.integers(0, 256, (n, 8, 8, 1), np.uint8)
        np.savez(folder / f"{name}.npz", x=x, y=np.arange(n) % 5)


def damage_npz(file: Path, mutator: Mutator) -> None:
    """Change arrays or bytes of a .npz file."""
    rng = mutator.rng
    if rng.random() < 0.4:
        file.write_bytes(mutator.change_bytes(file.read_bytes()))
        return
    with np.load(file) as arrays:
        x, y = arrays["x"], arrays["y"]
    changes: list[Callable[[], dict[str, Any]]] = [
        lambda: {"x": x},
        lambda: {"y": y},
        lambda: {"x": x, "y": y[:-1]},
        lambda: {"x": x[:0], "y": y[:0]},
        lambda: {"x": x, "y": y.astype(rng.choice(("float32", "object", "U3", "bool", "uint64")))},
        lambda: {"x": x.astype(rng.choice(("float32", "object", "U3", "int64", "bool"))), "y": y},
        lambda: {"x": x, "y": np.where(y == 0, rng.choice((-1, 10**6, 10**18)), y)},
        lambda: {"x": x.reshape(len(x), -1), "y": y},
        lambda: {"x": x[..., None], "y": y},
        lambda: {"x": x, "y": y[:, None]},
        lambda: {"x": x.transpose(0, 3, 1, 2), "y": y},
        lambda: {"x": x, "y": np.full_like(y, rng.choice((0, 4)))},
        lambda: {"x": np.array(3), "y": np.array(4)},
        lambda: {"x": x[:1], "y": y[:1]},
        lambda: {"x": x, "y": y, "z": np.array([object()])},
        lambda: {"images": x, "labels": y},
        lambda: {"x": x.view([("a", "u1")]), "y": y},
        lambda: {"x": x[:, :1, :1], "y": y},
        lambda: {"x": np.repeat(x, 7, -1), "y": y},
    ]
    np.savez(file, **rng.choice(changes)())


def answer(arguments: Sequence[str]) -> tuple[str, str, float]:
    """Run a command line; return what it did, a detail, and its processor seconds."""
    stdout, stderr = io.StringIO(), io.StringIO()
    start = time.process_time()
    what, detail = "accepted", ""

    def give_up(number: int, frame: object) -> None:
        raise TooSlow

    previous = signal.signal(signal.SIGPROF, give_up)
    signal.setitimer(signal.ITIMER_PROF, LIMIT_SECONDS)
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            code = int(run_command_line(list(arguments)))
        what, detail = classify_exit(code, stderr.getvalue())
    except SystemExit as error:
        what, detail = classify_exit(int(error.code or 0), stderr.getvalue())
    except TooSlow:
        what, detail = "slow", describe_frames(sys.exc_info()[2])
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        what = "traceback"
        detail = (
            f"{type(error).__name__}: {str(error)[:150]!r} {describe_frames(error.__traceback__)}"
        )
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)
    seconds = time.process_time() - start
    if what in ("accepted", "refused") and seconds > SLOW_SECONDS:
        return "slow", f"{what} after {seconds:.1f} s", seconds
    return what, detail, seconds


def classify_exit(code: int, errors: str) -> tuple[str, str]:
    """Return `accepted`, `refused` or a fault, and a detail."""
    if code == 0:
        return "accepted", ""
    lines = [line for line in errors.splitlines() if line.startswith("raysweep: error: ")]
    others = [
        line
        for line in errors.splitlines()
        if line and not line.startswith(("raysweep: ", "usage: "))
    ]
    if code == 1:
        return "traceback", f"exit code 1: {errors[-300:]!r}"
    if not lines:
        return "silent", f"exit code {code} without a line: {errors[-300:]!r}"
    if others:
        return "silent", f"lines that belong to none: {others[:2]!r}"
    if max(map(len, lines)) > 3000:
        return "silent", f"a line of {max(map(len, lines))} characters: {lines[0][:150]!r}"
    return "refused", ""


def describe_frames(trace: Any) -> str:
    """Return the innermost frame of raysweep, and the innermost one at all."""
    frames = traceback.extract_tb(trace)
    own = [frame for frame in frames if "/raysweep/" in frame.filename] or frames
    places = dict.fromkeys(f"{Path(f.filename).name}:{f.lineno}" for f in (own[-1], frames[-1]))
    return " ".join(places)


@contextlib.contextmanager
def known_model_of_stored_sweeps() -> Iterator[None]:
    """Have the model by the name that the sweeps in tests/data were trained with."""
    from raysweep.models import MODELS

    MODELS["tiny"] = MODELS["digits_cnn"]
    try:
        yield
    finally:
        del MODELS["tiny"]


def run_inputs(
    n_inputs: int,
    seed: int,
    surfaces: Sequence[str],
    only: int | None = None,
    commands: Sequence[str] = COMMANDS,
) -> dict[str, Tally]:
    """Answer all inputs; surfaces take turns."""
    tallies = {surface: Tally() for surface in surfaces}
    home = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name, known_model_of_stored_sweeps():
        inputs = Inputs(Path(name), commands)
        os.chdir(name)
        try:
            # What is imported and compiled once is no part of an answer.
            answer(inputs.npz(inputs.mutator(seed, -1)))
            for number in range(n_inputs) if only is None else [only]:
                surface = surfaces[number % len(surfaces)]
                answer_one(inputs, tallies[surface], surface, seed, number, only is not None)
                if number % 500 == 499:
                    print(f"{number + 1} inputs", file=sys.stderr, flush=True)
        finally:
            os.chdir(home)
    return tallies


def answer_one(
    inputs: Inputs, tally: Tally, surface: str, seed: int, number: int, verbose: bool
) -> None:
    arguments = getattr(inputs, surface)(inputs.mutator(seed, number))
    if verbose:
        print([argument[:200] for argument in arguments])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        what, detail, seconds = answer(arguments)
    tally.counts[what] += 1
    tally.slowest = max(tally.slowest, seconds)
    if what not in ("accepted", "refused"):
        short = [argument[:200] for argument in arguments]
        tally.faults.append(Fault(number, surface, what, detail, short))
        print(f"{number} {what}: {detail} {short}", file=sys.stderr, flush=True)
    elif verbose:
        print(what)


def print_table(tallies: dict[str, Tally]) -> None:
    kinds = ("accepted", "refused", "traceback", "silent", "slow")
    rows = []
    total: Counter[str] = Counter()
    for surface, tally in tallies.items():
        total += tally.counts
        rows.append(
            [
                surface,
                sum(tally.counts.values()),
                *(tally.counts[kind] for kind in kinds),
                f"{tally.slowest:.1f}",
            ]
        )
    slowest = max(tally.slowest for tally in tallies.values())
    rows.append(["all", sum(total.values()), *(total[kind] for kind in kinds), f"{slowest:.1f}"])
    print(
        format_table(
            ["what", "inputs", "accepted", "refused", "tracebacks", "silent", "slow", "slowest, s"],
            [[str(cell) for cell in row] for row in rows],
        )
    )


SURFACES = ("settings", "yaml", "settings", "yaml", "json", "settings", "yaml", "npz")


def main() -> None:
    parser = create_parser(__doc__)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="repeat one input by its number")
    parser.add_argument("--out", type=Path, help="file for the faults, as JSON")
    args = parser.parse_args()
    tallies = run_inputs(args.inputs, args.seed, SURFACES, args.only)
    if args.out is not None:
        faults = [asdict(fault) for tally in tallies.values() for fault in tally.faults]
        args.out.write_text(json.dumps(faults, indent=1), encoding="utf-8")
    print(f"\n{describe_machine()}; seed {args.seed}\n")
    print_table(tallies)


if __name__ == "__main__":
    main()
