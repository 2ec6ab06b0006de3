"""Mutation testing: count how many wrong versions (mutants) of the core the tests notice.

    nice -n 19 python benchmarks/mutants.py     # 150 mutants, seed 0; the tables of mutants.md
    python benchmarks/mutants.py -n 40 --only losses --only instance_weights
    python benchmarks/mutants.py --list         # the mutants that would be drawn; runs nothing
    python benchmarks/mutants.py --show 3       # the diff of one of them
    python benchmarks/mutants.py --survivors                       # those of the last run

Takes a copy of the project first, so that the tree may change meanwhile and is never written to. A
coverage run of each test file records which test runs which line (minutes; kept by file in the
cache and redone for what has changed). Each mutant is then a process of its own, forked from one
that has imported the libraries: it runs the tests that cover the changed line, cheapest first,
until one fails. Processes that a test starts import the mutant as well (PYTHONPATH), unless the
test gives them an environment without it. A test that catches a mutant must pass alone on the
original code.

If no test runs the changed line, all tests that run its module are tried. A mutant also counts as
caught, under a name of its own, if its tests need more than 4 times their usual processor time and
20 s, wait that long without working, or take too much memory: a busy machine alone does not make
them reach these limits. Results are written as they come: after an interruption the same command
resumes, and it repeats only what changes of the project could affect. Mutants in
mutants_equivalent.txt behave like the original code and do not count.
"""

import argparse
import ctypes
import difflib
import gc
import hashlib
import importlib.util
import json
import os
import platform
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import types
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from command_line import create_parser

os.environ.setdefault("OMP_NUM_THREADS", "1")

import psutil
import pytest
from mutation_operators import Mutant, draw_mutants, find_function_lines

ROOT = Path(__file__).parent.parent
EQUIVALENT = Path(__file__).parent / "mutants_equivalent.txt"
# The modules that mutants are drawn from: patterns of files, each of which must match one.
CORE = [
    *(
        f"raysweep/{n}.py"
        for n in (
            "spec",
            "schedules",
            "rng",
            "instance_weights",
            "losses",
            "method",
            "leases",
            "folder_lock",
            "bucket_lease",
            "process_identity",
        )
    ),
    *(f"raysweep/{n}.py" for n in ("result_loading", "checkpoint_evaluation")),
    "raysweep/robustness_bundle/*.py",
    *(
        f"raysweep/{package}/*.py"
        for package in ("attacks", "training", "evaluation", "data", "stores")
    ),
    *(
        f"raysweep/sweep/{n}.py"
        for n in ("search_space", "optuna_search", "optuna_study", "asha", "ledger", "plan")
    ),
    *(
        f"raysweep/sweep/{n}.py"
        for n in ("tune_callbacks", "extension_checks", "resources", "multi_worker_trial", "tuner")
    ),
    *(f"raysweep/sweep/{n}.py" for n in ("spread_summary", "base_comparison", "base_run_search")),
    *(
        f"raysweep/pipeline/{n}.py"
        for n in ("statistics", "promote", "published_results", "artifact", "stage", "register")
    ),
    "raysweep/pipeline/paired_comparison.py",
    *(
        f"raysweep/{n}.py"
        for n in (
            "atomic_files",
            "bounded_files",
            "catalog",
            "code_files",
            "disk_space",
            "file_privacy",
            "record_queue",
            "redaction",
            "run_comparison",
            "stored_data",
            "unrecorded_work",
            "visible_text",
            "yaml_files",
        )
    ),
    *(
        f"raysweep/sweep/{n}.py"
        for n in ("finalist_attacks", "finalist_summary", "optuna_export", "repeat_plan", "trial")
    ),
    *(
        f"raysweep/sweep/{n}.py"
        for n in ("repeat_summary", "space_warnings", "time_left", "warm_start")
    ),
    *(
        f"raysweep/pipeline/{n}.py"
        for n in ("autoattack", "facts", "pipeline", "plan", "stage_sweep")
    ),
    *(f"raysweep/pipeline/report/{n}.py" for n in ("ablations", "contents")),
    "raysweep/tracking/*.py",
]
# Not copied with the project.
LEFT_OUT = (".git", ".venv", "__pycache__", ".*_cache", ".hypothesis", "*.egg-info", "mlruns",
            "mlflow.db", "build", "dist", "/runs")  # fmt: skip
QUICK = "not slow and not ray"
OUTCOMES = ("caught", "timed out", "crashed", "survived", "equivalent")
MEMORY, PROCESSES, FILE = 12 * 2**30, 300, 4 * 2**30
_DIE_WITH_PARENT = 1
# Seconds between two checks of what a process has used.
POLL = 0.5
# Seconds above which a shared fixture is expensive: its tests run one after the other, so that it
# is set up once.
EXPENSIVE = 0.2
MARK = "RAYSWEEP_MUTANTS_JOB"
Json = dict[str, Any]


# The project


class Snapshot:
    """A copy of the project as it is now, and digests of the files that results depend on."""

    def __init__(self, folder: Path, tests: list[str]) -> None:
        self.folder, self._tests = folder, tests
        shutil.copytree(ROOT, folder, ignore=_leave_out, symlinks=True)

    @cached_property
    def sources(self) -> dict[str, str]:
        """{path: text} of the files of the core."""
        return {file: (self.folder / file).read_text() for file in find_core_files(self.folder)}

    @cached_property
    def test_files(self) -> list[str]:
        """Paths of the test files that were asked for: all, unless some were named."""
        files = sorted(self.folder.glob("tests/test_*.py"))
        asked = {f"test_{name.removeprefix('test_').removesuffix('.py')}" for name in self._tests}
        return [f"tests/{path.name}" for path in files if not asked or path.stem in asked]

    @cached_property
    def code_digest(self) -> str:
        """Digest of everything but the test files themselves: the package, what tests share and
        what they read.
        """
        names = ("raysweep", "search_spaces", "pipelines", "tests", "pyproject.toml")
        files = [
            path
            for name in names
            for path in [self.folder / name, *(self.folder / name).rglob("*")]
        ]
        tests = {*self.folder.glob("tests/test_*.py")}
        return self._digest(path for path in files if path.is_file() and path not in tests)

    @cached_property
    def tests_digest(self) -> str:
        return self._digest(self.folder / name for name in self.test_files)

    def file_digest(self, name: str) -> str:
        return self._digest([self.folder / name])

    def _digest(self, files: Iterable[Path]) -> str:
        state = hashlib.sha256()
        for path in sorted(files):
            if path.suffix != ".pyc":
                state.update(
                    f"{path.relative_to(self.folder)}\0".encode() + path.read_bytes() + b"\0"
                )
        return state.hexdigest()[:16]


def find_core_files(folder: Path, patterns: Iterable[str] = CORE) -> list[str]:
    """Paths, relative to `folder`, of the files of the core. Raises ValueError if a pattern matches
    none.
    """
    found: set[str] = set()
    for pattern in patterns:
        files = {path.relative_to(folder).as_posix() for path in folder.glob(pattern)}
        if not files:
            raise ValueError(
                f"CORE lists {pattern}, which matches no file: correct the list in "
                "benchmarks/mutants.py"
            )
        found |= files
    return sorted(found)


def _leave_out(folder: str, names: list[str]) -> set[str]:
    found = shutil.ignore_patterns(*(name for name in LEFT_OUT if name[0] != "/"))(folder, names)
    at_root = {name[1:] for name in LEFT_OUT if name[0] == "/"} if Path(folder) == ROOT else set()
    return found | at_root & set(names)


# Processes


@dataclass
class Task:
    """A function to run in a process of its own, in a fresh copy of the project.

    work: called with the folder of that copy; returns JSON. done: called with what `work` returned,
    or {"killed": why} or {"died": code}, and with the processor seconds. limit: the most processor
    seconds, and the most seconds of idle waiting. edit: a file and its new text, to write into the
    copy.
    """

    work: Callable[[Path], Json]
    done: Callable[[Json, float], None]
    limit: float = 600.0
    edit: tuple[str, str] | None = None


@dataclass
class _Running:
    task: Task
    folder: Path
    pid: int
    process: psutil.Process
    looked: float = field(default_factory=time.monotonic)
    spent: float = 0.0
    idle: float = 0.0


class Pool:
    """Runs tasks, `jobs` at a time, in forks of this process."""

    ending = threading.Event()

    def __init__(self, template: Path, scratch: Path, jobs: int) -> None:
        self.template, self.scratch, self.jobs = template, scratch, jobs
        self.memory = min(MEMORY, psutil.virtual_memory().total // (2 * jobs))
        self.tasks: deque[Task] = deque()
        self._running: list[_Running] = []
        self._started = 0

    def run(self) -> None:
        """Run until no task is left; `done` may add tasks."""
        try:
            while self.tasks or self._running:
                while self.tasks and len(self._running) < self.jobs:
                    self._running.append(self._start(self.tasks.popleft()))
                time.sleep(0.05)
                if self.ending.is_set():
                    raise SystemExit(143)
                for one in [*self._running]:
                    self._check_process(one)
        finally:
            for one in self._running:
                self._kill_and_clean(one)

    def _start(self, task: Task) -> _Running:
        self._started += 1
        folder = self.scratch / str(self._started)
        shutil.copytree(self.template, folder / "p", symlinks=True)
        if task.edit:
            name, text = task.edit
            path = folder / "p" / name
            path.write_text(text)
            Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)
        sys.stdout.flush()
        if (pid := os.fork()) == 0:
            _work_in_fork(task.work, folder, self.memory)
        return _Running(task, folder, pid, psutil.Process(pid))

    def _check_process(self, one: _Running) -> None:
        """Handle a process that has ended, or kill one that exceeds a limit."""
        ended, status, used = os.wait4(one.pid, os.WNOHANG)
        if ended:
            one.spent = max(one.spent, used.ru_utime + used.ru_stime)
            result = one.folder / "result.json"
            if result.exists():
                found = json.loads(result.read_text())
            else:
                found = {
                    "died": os.waitstatus_to_exitcode(status),
                    "log": _read_end(one.folder / "log"),
                }
        elif time.monotonic() - one.looked > POLL and (why := self._exceeded_limit(one)):
            found = {"killed": why}
        else:
            return
        one.task.done(found, one.spent)
        self._running.remove(one)
        self._kill_and_clean(one)

    def _exceeded_limit(self, one: _Running) -> str:
        """Name of the limit that the process and its children exceed, or ''."""
        memory, count, spent, busy, family = 0, 0, 0.0, False, _living_processes(one)
        for process in family:
            with suppress(psutil.Error):
                times = process.cpu_times()
                spent += times.user + times.system + times.children_user + times.children_system
                memory += process.memory_info().rss
                busy |= process.status() in (psutil.STATUS_RUNNING, psutil.STATUS_DISK_SLEEP)
                count += 1
        # A process that waits for a processor is not idle, however long it waits.
        passed = time.monotonic() - one.looked
        one.looked += passed
        one.idle += 0.0 if busy or spent - one.spent > 0.01 * passed else passed
        one.spent = max(one.spent, spent)
        if one.spent > one.task.limit or one.idle > one.task.limit:
            return "timed out"
        if count > PROCESSES:
            return "processes"
        # `rss` counts pages that forks share in each of them. The exact sum is slow, so it comes
        # second.
        return (
            "memory" if memory > self.memory and _proportional_memory(family) > self.memory else ""
        )

    def _kill_and_clean(self, one: _Running) -> None:
        """End the process and all that it started, and remove its folder."""
        for _ in range(10):
            left = [*_living_processes(one), *_stray_processes(one)]
            for process in left:
                with suppress(psutil.Error):
                    process.kill()
            if not left:
                break
            time.sleep(0.02)
            with suppress(ChildProcessError):
                os.waitpid(one.pid, os.WNOHANG)
        shutil.rmtree(one.folder, ignore_errors=True)


def _living_processes(one: _Running) -> list[psutil.Process]:
    try:
        found = [one.process, *one.process.children(recursive=True)]
        return [process for process in found if process.status() != psutil.STATUS_ZOMBIE]
    except psutil.Error:
        return []


def _read_end(path: Path) -> list[str]:
    """The last lines of a file that may be large."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 8000))
        return file.read().decode(errors="replace").splitlines()[-30:]


def _proportional_memory(processes: list[psutil.Process]) -> int:
    """Bytes of memory, each page divided among those that share it."""
    total = 0
    for process in processes:
        with suppress(psutil.Error):
            total += process.memory_full_info().pss
    return total


def _stray_processes(one: _Running) -> Iterator[psutil.Process]:
    """Processes of its session, or with its mark in their environment, that are no longer its
    children.
    """
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            ours = os.getsid(process.pid) == one.pid or process.environ().get(MARK) == str(
                one.folder
            )
            if ours and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                yield process


def _work_in_fork(work: Callable[[Path], Json], folder: Path, memory: int) -> None:
    """Do the work of a task and end the process; never returns."""
    code = 1
    try:
        os.setsid()
        with suppress(AttributeError, OSError):
            ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
        _isolate_process(folder, memory)
        result = work(folder)
        part = folder / "result.part"
        part.write_text(json.dumps(result))
        part.rename(folder / "result.json")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _isolate_process(folder: Path, memory: int) -> None:
    """Limit this process: it imports the project only from the copy, writes only there, and has
    bounded resources.
    """
    project = folder / "p"
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for kind, limit in (
        (resource.RLIMIT_DATA, memory),
        (resource.RLIMIT_FSIZE, FILE),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (limit, limit))
    with (folder / "log").open("wb") as log, Path(os.devnull).open("rb") as nothing:
        for number, file in enumerate((nothing, log, log)):
            os.dup2(file.fileno(), number)
    places = {
        "TMPDIR": folder / "t",
        "HOME": folder / "h",
        "XDG_CACHE_HOME": folder / "h" / ".cache",
    }
    for name, path in places.items():
        path.mkdir(parents=True, exist_ok=True)
        os.environ[name] = str(path)
    guard = folder / "guard"
    guard.mkdir()
    (guard / "sitecustomize.py").write_text(_GUARD + _NAME_TEST)
    os.environ.update(
        PYTHONPATH=f"{project}:{guard}",
        PYTHONDONTWRITEBYTECODE="1",
        MPLCONFIGDIR=os.environ[_FONTS],
    )
    os.environ[MARK] = str(folder)
    tempfile.tempdir = None
    sys.dont_write_bytecode = True
    sys.path[:] = [
        str(project),
        *(path for path in sys.path if Path(path or ".").resolve() != ROOT / "benchmarks"),
    ]
    importlib.invalidate_caches()
    # A process that multiprocessing starts imports the main module of its parent again. This script
    # is no part of the copy and cannot be imported there.
    sys.modules["__main__"] = types.ModuleType("__main__")
    os.chdir(project)
    exec(compile(_GUARD, "sitecustomize.py", "exec"), {})


_FONTS = "RAYSWEEP_MUTANTS_FONTS"
# A mutant must not write or remove files outside of its copy, whatever path it computes.
_GUARD = f"""
import os, sys
def _set_guard(home, fonts):
    allowed = (home + "/", fonts, "/dev/", "/proc/", "/tmp/ray")
    writes = os.O_WRONLY | os.O_RDWR | os.O_TRUNC
    def refuse_others(event, args):
        if event in ("shutil.rmtree", "os.remove", "os.rmdir", "os.rename"):
            # A path below an open folder is one that `rmtree` was asked for.
            if args[-1] not in (-1, None):
                paths = ()
            else:
                paths = args[:2] if event == "os.rename" else args[:1]
        elif event == "open" and isinstance(args[2], int) and args[2] & writes:
            paths = args[:1]
        else:
            return
        for path in paths:
            named = isinstance(path, (str, bytes, os.PathLike))
            if named and not os.path.abspath(os.fsdecode(path)).startswith(allowed):
                raise PermissionError(f"{{event}} outside of the copy: {{path!r}}")
    sys.addaudithook(refuse_others)
if os.environ.get("{MARK}"):
    _set_guard(os.environ["{MARK}"], os.environ["{_FONTS}"])
"""
_CONTEXT_FILE = "MUTANTS_CONTEXT_FILE"
# One fork server starts the processes of many tests: each of them learns from a file which test is
# running.
_NAME_TEST = f"""
if os.environ.get("{_CONTEXT_FILE}"):
    def _name_test():
        coverage = sys.modules.get("coverage")
        recorded = coverage and coverage.Coverage.current()
        if recorded:
            with open(os.environ["{_CONTEXT_FILE}"]) as file:
                recorded.switch_context(file.read())
    os.register_at_fork(after_in_child=_name_test)
"""


# Coverage


class Recorder:
    """pytest plugin: records seconds, outcome and shared fixtures of each test; tells coverage
    which test runs.
    """

    def __init__(self, coverage: Any) -> None:
        self.coverage = coverage
        self.tests: dict[str, Json] = {}
        self.fixtures: dict[str, float] = {}
        self.names: list[str] = []
        self._shared = 0.0
        self._switch("")

    def _switch(self, name: str) -> None:
        self.coverage.switch_context(name)
        os.environ["MUTANTS_CONTEXT"] = name or "outside"
        Path(os.environ[_CONTEXT_FILE]).write_text(name or "outside")

    def _context(self, name: str) -> str:
        self.names.append(name)
        return f"c{len(self.names) - 1}"

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: Any, nextitem: Any) -> Iterator[None]:
        _clear_caches()
        self._current = self._context(item.nodeid)
        self._switch(self._current)
        self._shared, before = 0.0, _seconds()
        slow = any(item.get_closest_marker(name) for name in ("slow", "ray"))
        test = self.tests[item.nodeid] = {
            "fixtures": _shared_fixtures(item),
            "passed": False,
            "slow": slow,
        }
        yield
        test["seconds"] = max(_seconds() - before - self._shared, 0.001)
        self._switch("")

    @pytest.hookimpl(hookwrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> Iterator[None]:
        if fixturedef.scope == "function":
            yield
            return
        outer, shared = os.environ["MUTANTS_CONTEXT"], self._shared
        name = f"{request.node.nodeid}::{fixturedef.argname}"
        self._switch(self._context(name))
        before = _seconds()
        yield
        whole = _seconds() - before
        # The seconds of fixtures that this one requested are counted under their own names.
        self.fixtures[name] = whole - (self._shared - shared)
        self._shared = shared + whole
        self._switch("" if outer == "outside" else outer)

    def pytest_runtest_logreport(self, report: Any) -> None:
        test = self.tests[report.nodeid]
        if report.when == "call":
            test["passed"] = report.passed
        elif not report.passed:
            test["passed"] = False


def _seconds() -> float:
    """Processor seconds of this process and the children that it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _shared_fixtures(item: Any) -> list[str]:
    """Names, in the form that Recorder uses, of the test's fixtures that several tests share."""
    found = []
    for name, definitions in item._fixtureinfo.name2fixturedefs.items():
        scope = definitions[-1].scope
        if scope != "function":
            kind = {"module": pytest.Module, "class": pytest.Class}.get(scope)
            node = (item.getparent(kind) or item.getparent(pytest.Module)) if kind else item.session
            found.append(f"{node.nodeid}::{name}")
    return found


def _clear_caches() -> None:
    """Empty the package's function caches, so that each test runs all lines that it would run
    alone.
    """
    for name, module in [*sys.modules.items()]:
        if name.startswith("raysweep"):
            for value in [*vars(module).values()]:
                if callable(getattr(value, "cache_clear", None)):
                    value.cache_clear()


def record_coverage(test_file: str, expression: str, folder: Path) -> Json:
    """Run a test file and report, for each test, its seconds and the lines of the package that it
    ran.
    """
    import coverage

    project, data = folder / "p", folder / "coverage"
    data.mkdir()
    settings = folder / "coveragerc"
    settings.write_text(
        f"[run]\nparallel = true\ndata_file = {data}/sub\ninclude = {project}/raysweep/*\n"
        "context = ${MUTANTS_CONTEXT-outside}\npatch = _exit\n"
        "disable_warnings = no-data-collected\n"
    )
    os.environ[_CONTEXT_FILE] = str(folder / "context")
    recorded = coverage.Coverage(
        data_file=str(data / "main"), include=[f"{project}/raysweep/*"], config_file=False
    )
    recorded.start()
    recorder = Recorder(recorded)
    os.environ["COVERAGE_PROCESS_START"] = str(settings)
    code = pytest.main([*_ARGUMENTS, "-m", expression, test_file], plugins=[recorder])
    recorded.stop()
    recorded.save()
    lines: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for file in data.iterdir():
        found = coverage.CoverageData(str(file))
        with suppress(coverage.CoverageException):
            found.read()
            for path in found.measured_files():
                name = Path(path).relative_to(project).as_posix()
                for line, contexts in found.contexts_by_lineno(path).items():
                    # In a fork: what its server was started with, and after a bar what was running
                    # at the fork.
                    for context in {context.rpartition("|")[2] for context in contexts}:
                        if context.startswith("c"):
                            lines[recorder.names[int(context[1:])]][name].append(line)
    log = _read_end(folder / "log")
    return {
        "code": int(code),
        "tests": recorder.tests,
        "fixtures": recorder.fixtures,
        "lines": lines,
        "log": log,
    }


_ARGUMENTS = [
    "-p",
    "no:cacheprovider",
    "-n",
    "0",
    "-o",
    "addopts=",
    "-q",
    "--strict-markers",
    "-W",
    "ignore",
]


@dataclass
class Test:
    """A test that passes on the unchanged code. seconds: of the processor; fixtures: the shared
    ones that it needs.
    """

    name: str
    seconds: float
    fixtures: list[str]
    slow: bool

    @property
    def file(self) -> str:
        return self.name.partition("::")[0]


class Suite:
    """The tests, what they cost and which lines each of them runs."""

    def __init__(self, sources: dict[str, str]) -> None:
        self.tests: dict[str, Test] = {}
        self.fixtures: dict[str, float] = {}
        self._runs: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
        self._in_functions = {file: find_function_lines(source) for file, source in sources.items()}

    def add(self, record: Json) -> None:
        """Take in what `record_coverage` reported of a file."""
        self.fixtures |= record["fixtures"]
        for name, found in record["tests"].items():
            if not found["passed"]:
                continue
            self.tests[name] = Test(name, found["seconds"], found["fixtures"], found["slow"])
            for context in (name, *found["fixtures"]):
                for file, lines in record["lines"].get(context, {}).items():
                    for line in lines:
                        self._runs[file][line].add(name)

    def covering(self, mutant: Mutant) -> tuple[set[str], bool]:
        """Names of the tests to run, and whether they are known to run the changed line."""
        runs, inside = self._runs[mutant.file], self._in_functions[mutant.file]
        first, last = mutant.lines
        if mutant.body is not None:
            # The default of an argument is evaluated outside of the function, and its effect shows
            # in the body.
            span = (
                range(first, last + 1)
                if first >= mutant.body[0]
                else range(mutant.body[0], mutant.body[1] + 1)
            )
            if found := set[str]().union(*(runs[line] for line in span if line in runs)):
                return found, True
        # What runs at import may have an effect in every test that runs any function of the module.
        found = set[str]().union(*(runs[line] for line in inside if line in runs))
        return found, mutant.body is None and bool(found)

    def order(self, names: Iterable[str]) -> list[str]:
        """Cheapest first; tests that share an expensive fixture stay together."""

        def cost(name: str) -> tuple[bool, float, str, float]:
            test = self.tests[name]
            dear = [f for f in test.fixtures if self.fixtures.get(f, 0.0) > EXPENSIVE]
            shared = sum(self.fixtures[f] for f in dear)
            return test.slow, shared or test.seconds, " ".join(dear), test.seconds

        return sorted((name for name in names if name in self.tests), key=cost)

    def seconds(self, names: Iterable[str]) -> float:
        tests = [self.tests[name] for name in names]
        shared = {fixture for test in tests for fixture in test.fixtures}
        return sum(test.seconds for test in tests) + sum(
            self.fixtures.get(fixture, 0.0) for fixture in shared
        )


def collect_suite(snapshot: Snapshot, pool: Pool, cache: Path, every_test: bool) -> Suite:
    """Record the coverage of each test file that the cache does not know."""
    expression, suite, begun = (
        "" if every_test else QUICK,
        Suite(snapshot.sources),
        time.monotonic(),
    )
    records: dict[str, Json] = {}
    total = [0.0]

    def keep(file: str, path: Path, record: Json, seconds: float) -> None:
        total[0] += seconds
        records[file] = record
        # Broken files are tried again next time.
        if record.get("code") in (0, 1, 5):
            path.write_text(json.dumps(record | {"spent": seconds}))
        print(f"  coverage of {file}: {seconds:.0f} s, {_summary(record)}", flush=True)

    cache.mkdir(parents=True, exist_ok=True)
    for file in snapshot.test_files:
        key = hashlib.sha256(
            f"{snapshot.code_digest} {snapshot.file_digest(file)} {expression}".encode()
        )
        name = f"coverage-{'all' if every_test else 'quick'}-{Path(file).stem}"
        path = cache / f"{name}-{key.hexdigest()[:16]}.json"
        if path.exists():
            records[file] = json.loads(path.read_text())
            continue
        for old in cache.glob(f"{name}-{'[0-9a-f]' * 16}.json"):
            old.unlink()
        pool.tasks.append(
            Task(partial(record_coverage, file, expression), partial(keep, file, path), 1800)
        )
    pool.run()
    for file in snapshot.test_files:
        if "tests" in records[file]:
            suite.add(records[file])
    left_out = sum(
        not test["passed"]
        for record in records.values()
        for test in record.get("tests", {}).values()
    )
    if not suite.tests:
        raise RuntimeError("no test passes")
    print(
        f"Coverage: {len(suite.tests)} tests that pass, in {suite.seconds(suite.tests):.0f} "
        f"processor s; {left_out} "
        f"skipped or failing. Took {total[0]:.0f} processor s, {time.monotonic() - begun:.0f} s.",
        flush=True,
    )
    return suite


def _summary(record: Json) -> str:
    if "tests" not in record:
        return f"failed: {record}"
    outcome = Counter(test["passed"] for test in record["tests"].values())
    text = f"{outcome[True]} tests pass" + (
        f", {outcome[False]} skipped or failing" if outcome[False] else ""
    )
    return (
        text
        if record["code"] in (0, 5)
        else text + "".join(f"\n    {line}" for line in record["log"][-8:])
    )


# Mutants


class SelectedTests:
    """pytest plugin: runs only the selected tests, in their order, and records which one failed."""

    def __init__(self, names: list[str]) -> None:
        self.places = {name: place for place, name in enumerate(names)}
        self.failed, self.why, self.ran = "", "", 0

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        picked = [item for item in items if item.nodeid in self.places]
        # The mutant may have changed the names of parametrised tests: then all tests of their
        # files.
        items[:] = sorted(picked, key=lambda item: self.places[item.nodeid]) if picked else items

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and not self.failed:
            self.failed, self.why = report.nodeid, str(report.longrepr)[-200:]

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.ran += report.when == "call"
        if report.failed and not self.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.failed, self.why = (
                report.nodeid,
                str(crash.message if crash else report.longrepr)[:200],
            )


def run_tests(names: list[str], expression: str, folder: Path) -> Json:
    """Run tests in this process until one fails."""
    picked = SelectedTests(names)
    files = sorted({name.partition("::")[0] for name in names})
    code = pytest.main([*_ARGUMENTS, "-x", "-m", expression, *files], plugins=[picked])
    return {"code": int(code), "failed": picked.failed, "why": picked.why, "ran": picked.ran}


class Run:
    """Runs mutants and keeps their results."""

    def __init__(self, snapshot: Snapshot, suite: Suite, pool: Pool, results: "Results") -> None:
        self.snapshot, self.suite, self.pool, self.results = snapshot, suite, pool, results
        self.sound: set[str] = set()
        self.unsound: set[str] = set()
        self._waiting: dict[str, list[Callable[[], None]]] = defaultdict(list)
        self._count = self._total = 0

    def work(self, mutants: list[Mutant]) -> None:
        self._total = len(mutants)
        most = sum(self.suite.seconds(self.suite.covering(mutant)[0]) for mutant in mutants)
        print(
            f"Running all their tests for all {len(mutants)} mutants would take {most:.0f} "
            "processor s",
            flush=True,
        )
        for mutant in mutants:
            self._submit(mutant, 0.0)
        self.pool.run()

    def _submit(self, mutant: Mutant, spent: float) -> None:
        covering, reached = self.suite.covering(mutant)
        names = self.suite.order(covering - self.unsound)
        if not names:
            self._finish(
                mutant, {"outcome": "survived", "seconds": spent, "tests": 0, "reached": False}
            )
            return
        limit = self._limit(names)
        edit = (mutant.file, mutant.apply(self.snapshot.sources[mutant.file]))
        done = partial(self._judge, mutant, {"tests": len(names), "reached": reached}, spent)
        self.pool.tasks.append(
            Task(partial(run_tests, names, self._expression(names)), done, limit, edit)
        )

    def _judge(
        self, mutant: Mutant, facts: Json, spent: float, found: Json, seconds: float
    ) -> None:
        facts |= {"seconds": round(spent + seconds, 1)}
        failed = found.get("failed", "")
        if failed in self.unsound:
            self._submit(mutant, spent + seconds)
            return
        if "killed" in found:
            outcome = "timed out" if found["killed"] == "timed out" else "crashed"
        elif "died" in found:
            outcome = "crashed"
        else:
            outcome = "survived" if found["code"] == 0 else "caught"
        if outcome == "caught" and found["code"] == 5:
            raise RuntimeError(f"no test was collected for {mutant}")
        finish = partial(self._finish, mutant, {"outcome": outcome, **facts, **found})
        if failed in self.suite.tests and failed not in self.sound:
            self._check_alone(failed, finish, partial(self._submit, mutant, spent + seconds))
        else:
            finish()

    def _check_alone(
        self, test: str, finish: Callable[[], None], again: Callable[[], None]
    ) -> None:
        """A test that fails alone on the unchanged code, too, has caught nothing."""

        def done(found: Json, seconds: float) -> None:
            sound = found.get("code") == 0
            (self.sound if sound else self.unsound).add(test)
            if not sound:
                print(
                    f"  {test} fails alone on the unchanged code and is left out: {found}",
                    flush=True,
                )
            for ended, submit in self._waiting.pop(test):
                (ended if sound else submit)()

        self._waiting[test].append((finish, again))
        if len(self._waiting[test]) == 1:
            work = partial(run_tests, [test], self._expression([test]))
            self.pool.tasks.appendleft(Task(work, done, self._limit([test])))

    def _limit(self, names: list[str]) -> float:
        return 4 * self.suite.seconds(names) + 20

    def _expression(self, names: list[str]) -> str:
        return "" if any(self.suite.tests[name].slow for name in names) else QUICK

    def _finish(self, mutant: Mutant, result: Json) -> None:
        self._count += 1
        self.results.add(mutant, result)
        by = result.get("failed") or ("" if result["reached"] else "no test runs this line")
        print(f"  {self._count}/{self._total} {result['outcome']}  "
              f"{mutant.file}:{mutant.line} {mutant.operator}, "
              f"{result['seconds']:.1f} s, {result['tests']} tests  {by}", flush=True)  # fmt: skip


class Results:
    """The results of mutants, in a file of JSON lines; the last line about a mutant counts."""

    def __init__(self, path: Path, snapshot: Snapshot) -> None:
        self.path, self.snapshot = path, snapshot
        self._found: dict[str, Json] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                with suppress(ValueError):
                    entry = json.loads(line)
                    self._found[entry["key"]] = entry

    def _key(self, mutant: Mutant) -> str:
        return f"{self.snapshot.code_digest} {mutant.file} {mutant.edit}"

    def get(self, mutant: Mutant) -> Json | None:
        """The result, if nothing has changed that it depends on."""
        found = self._found.get(self._key(mutant))
        if found is None or found["all_tests"] == self.snapshot.tests_digest:
            return found
        # A mutant that an unchanged test file catches stays caught, whatever tests are added.
        file = found.get("failed", "").partition("::")[0]
        same = file in self.snapshot.test_files and found["test_file"] == self.snapshot.file_digest(
            file
        )
        return found if same else None

    def add(self, mutant: Mutant, result: Json) -> None:
        file = result.get("failed", "").partition("::")[0]
        digest = self.snapshot.file_digest(file) if file in self.snapshot.test_files else ""
        entry = {
            "key": self._key(mutant),
            "all_tests": self.snapshot.tests_digest,
            "test_file": digest,
            **result,
        }
        entry |= {"mutant": asdict(mutant)}
        self._found[entry["key"]] = entry
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def read_equivalent(text: str) -> dict[tuple[str, tuple[str, ...], tuple[str, ...]], str]:
    """Return {(file, lines before, lines after): why no test can tell them apart}."""
    found = {}
    for block in text.split("\n\n"):
        lines = [line.strip() for line in block.strip().splitlines() if not line.startswith("#")]
        before, after = (
            tuple(line[1:].strip() for line in lines if line[0] == sign) for sign in "-+"
        )
        if before:
            found[lines[0].partition(":")[0], before, after] = " ".join(
                line for line in lines[1:] if line[0] not in "-+"
            )
    return found


# What is printed


def describe(mutant: Mutant, note: str = "") -> str:
    """Format a mutant as in mutants_equivalent.txt, where a line with the reason follows it."""
    lines = [f"{mutant.file}:{mutant.line} {mutant.operator}{note}"]
    lines += [f"- {line}" for line in mutant.before] + [f"+ {line}" for line in mutant.after]
    return "\n".join(lines)


def report(found: list[tuple[Mutant, Json]]) -> str:
    """Markdown: a table by module, the score, and the survivors."""
    by_file: dict[str, Counter[str]] = defaultdict(Counter)
    for mutant, result in found:
        by_file[mutant.file][result["outcome"]] += 1
    total = sum(by_file.values(), Counter())
    rows = [
        [file, count.total(), *(count[outcome] or "" for outcome in OUTCOMES)]
        for file, count in by_file.items()
    ]
    rows.append(["all", total.total(), *(total[outcome] for outcome in OUTCOMES)])
    table = [["module", "mutants", *OUTCOMES], ["---", *["---:"] * (len(OUTCOMES) + 1)], *rows]
    noticed = sum(total[outcome] for outcome in ("caught", "timed out", "crashed"))
    count = total.total() - total["equivalent"]
    parts = ["\n".join(f"| {' | '.join(map(str, row))} |" for row in table)]
    parts.append(f"{noticed} of {count} noticed" + (f" ({noticed / count:.0%})." if count else "."))
    for mutant, result in found:
        if result["outcome"] == "survived":
            parts.append(describe(mutant, "" if result["reached"] else "; no test runs this line"))
    return "\n\n".join(parts)


def show(mutant: Mutant, source: str) -> str:
    before, after = source.splitlines(), mutant.apply(source).splitlines()
    return "\n".join(
        difflib.unified_diff(before, after, mutant.file, f"{mutant.operator}", lineterm="")
    )


def list_libraries(files: list[str], folder: Path) -> Json:
    """Compile the package and collect the quick tests; report which installed modules that
    imported.
    """
    import compileall

    project = folder / "p"
    sys.dont_write_bytecode = False
    compileall.compile_dir(project / "raysweep", quiet=2)
    pytest.main([*_ARGUMENTS, "--collect-only", "-m", QUICK, *files])
    installed = tuple(path for path in sys.path if path.endswith("site-packages"))
    names = [
        n
        for n, m in sys.modules.items()
        if str(getattr(m, "__file__", "") or "").startswith(installed)
    ]
    return {"modules": names, "project": str(project)}


def prepare(template: Path, with_ray: bool, found: Json, seconds: float) -> None:
    """Copy compiled files, and import the libraries so that forks have them."""
    if "died" in found:
        raise RuntimeError("the tests cannot be collected:\n" + "\n".join(found["log"]))
    project = Path(found["project"])
    for cached in project.rglob("__pycache__"):
        shutil.copytree(cached, template / cached.relative_to(project), dirs_exist_ok=True)
    for name in found["modules"]:
        root = name.partition(".")[0]
        if root != "raysweep" and (root != "ray" or with_ray):
            with suppress(Exception):
                importlib.import_module(name)
    gc.collect()
    gc.freeze()


def main() -> None:
    parser = create_parser(__doc__)
    parser.add_argument("-n", type=int, default=150, help="mutants (150)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="MODULE",
        help="instance_weights, attacks/pgd, sweep",
    )
    parser.add_argument(
        "--tests", action="append", default=[], metavar="NAME", help="only these files of tests"
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--all", action="store_true", help="use slow tests and those with Ray, too")
    parser.add_argument("--list", action="store_true", help="print the mutants and end")
    parser.add_argument(
        "--show", type=int, metavar="K", help="print the diff of a mutant of the list and end"
    )
    parser.add_argument(
        "--survivors", action="store_true", help="print the survivors of the last run and end"
    )
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parser.add_argument(
        "--cache", type=Path, default=home / "raysweep-mutants", help=f"({home}/raysweep-mutants)"
    )
    args = parser.parse_args()
    last = args.cache / "last.md"
    if args.survivors:
        print(
            last.read_text().partition("noticed")[2].partition("\n\n")[2]
            if last.exists()
            else "no run yet"
        )
        return
    # Raised in the loop, not in the handler: inside a destructor an exception would be lost.
    signal.signal(signal.SIGTERM, lambda *_: Pool.ending.set())
    scratch = Path(tempfile.mkdtemp(prefix="mutants-"))
    try:
        snapshot = Snapshot(scratch / "0", args.tests)
        try:
            sources = {
                file: snapshot.sources[file] for file in select_files(snapshot.sources, args.only)
            }
        except ValueError as error:
            parser.error(str(error))
        mutants = draw_mutants(sources, args.n, args.seed)
        if args.list or args.show is not None:
            chosen = range(len(mutants)) if args.list else [args.show]
            for number in chosen:
                mutant = mutants[number]
                print(
                    f"{number}: {describe(mutant)}\n"
                    if args.list
                    else show(mutant, sources[mutant.file])
                )
            return
        text = work(snapshot, mutants, scratch, args)
        last.write_text(text + "\n")
        print(
            f"\n{date.today()}, Python {platform.python_version()}, n {args.n}, "
            f"seed {args.seed}\n\n{text}"
        )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def work(snapshot: Snapshot, mutants: list[Mutant], scratch: Path, args: argparse.Namespace) -> str:
    """Run the mutants whose results are not known yet and return the report on all of them."""
    began, spent = time.monotonic(), _seconds()
    os.environ[_FONTS] = str(scratch / "fonts")
    args.cache.mkdir(parents=True, exist_ok=True)
    results = Results(args.cache / ("results-all.jsonl" if args.all else "results.jsonl"), snapshot)
    equivalent = read_equivalent(EQUIVALENT.read_text() if EQUIVALENT.exists() else "")
    known = {
        m: {"outcome": "equivalent"} for m in mutants if (m.file, m.before, m.after) in equivalent
    }
    known |= {m: found for m in mutants if m not in known and (found := results.get(m))}
    left = [mutant for mutant in mutants if mutant not in known]
    print(f"{len(mutants)} mutants, {len(left)} to run", flush=True)
    if left:
        pool = Pool(snapshot.folder, scratch, args.jobs)
        pool.tasks.append(
            Task(
                partial(list_libraries, snapshot.test_files),
                partial(prepare, snapshot.folder, not args.all),
            )
        )
        pool.run()
        print(f"Libraries are in after {time.monotonic() - began:.0f} s", flush=True)
        suite = collect_suite(snapshot, pool, args.cache, args.all)
        Run(snapshot, suite, pool, results).work(left)
        print(
            f"{time.monotonic() - began:.0f} s, {_seconds() - spent:.0f} s of the processor in all"
        )
    return report([(m, known.get(m) or results.get(m) or {"outcome": "not run"}) for m in mutants])


def select_files(files: Iterable[str], only: list[str]) -> list[str]:
    """The files of the modules and packages named in `only`; all if none are. Raises ValueError if
    a name has no file.

    only: without "raysweep/" and ".py", as in instance_weights, attacks/pgd, sweep.
    """
    modules = {file: file.removeprefix("raysweep/").removesuffix(".py") for file in files}
    selected = {
        name: {f for f, m in modules.items() if m == name or m.startswith(f"{name}/")}
        for name in only
    }
    for name, found in selected.items():
        if not found:
            raise ValueError(
                f"--only {name}: no module of the core has this name; allowed: "
                f"{', '.join(modules.values())}"
            )
    return [
        file for file in modules if not only or any(file in found for found in selected.values())
    ]


if __name__ == "__main__":
    main()
