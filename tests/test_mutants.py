"""The mutation run draws changes that compile, from files that exist; the list of equivalent ones
fits the code.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from mutants import CORE, EQUIVALENT, find_core_files, read_equivalent, select_files  # noqa: E402
from mutation_operators import Mutant, _make_mutant, draw_mutants, find_sites  # noqa: E402

SOURCE = '''
"""Ω: a docstring with 1 < 2."""

def first(values: list[int] = [1 + 1], limit=3) -> int:
    """Not 1."""
    if not values or limit < len(values):
        raise ValueError(f"more than {limit + 1}")
    for value in sorted(values, key=abs):
        total = max(value, values[0]) - limit  # Ω < 1
    return total
'''


def changes(source: str) -> list[tuple[str, int, str]]:
    """(operator, line, changed line) of all mutants that could be drawn."""
    made = [
        _make_mutant("f.py", source, site, edit)
        for site in find_sites(source)
        for edit in site.edits
    ]
    return [
        (mutant.operator, mutant.line, " ".join(mutant.after))
        for mutant in made
        if isinstance(mutant, Mutant)
    ]


def test_all_changes_of_a_small_source() -> None:
    head, loop = "def first(values: list[int] = ", "for value in sorted(values, key=abs):"
    total = "total = max(value, values[0]) - limit  # Ω < 1"
    assert sorted(changes(SOURCE)) == sorted(
        [
            ("arithmetic swapped", 4, f"{head}[1 - 1], limit=3) -> int:"),
            ("number changed", 4, f"{head}[2 + 1], limit=3) -> int:"),
            ("number changed", 4, f"{head}[1 + 2], limit=3) -> int:"),
            ("number changed", 4, f"{head}[1 + 1], limit=4) -> int:"),
            ("condition replaced", 6, "if True:"),
            ("condition replaced", 6, "if False:"),
            ("not dropped", 6, "if values or limit < len(values):"),
            ("and/or swapped", 6, "if not values and limit < len(values):"),
            ("comparison swapped", 6, "if not values or limit <= len(values):"),
            ("comparison swapped", 6, "if not values or limit > len(values):"),
            ("raise deleted", 7, "pass"),
            ("order reversed", 8, f"{loop[:-1]}[::-1]:"),
            ("keyword dropped", 8, "for value in sorted(values):"),
            ("arithmetic swapped", 9, total.replace("-", "+")),
            ("max swapped", 9, total.replace("max", "min")),
            ("first/last swapped", 9, total.replace("[0]", "[-1]")),
            ("None returned", 10, "return None"),
        ]
    )


def test_lines_stay_where_they_are() -> None:
    source = (
        "def f(a,\n  b):\n  return g(\n    a,\n    key=b,  # one, two\n"
        "  ) if (\n    a and\n    b\n  ) else 0\n"
    )
    for site in find_sites(source):
        for edit in site.edits:
            mutated = source[: edit.start] + edit.text + source[edit.end :]
            compile(mutated, "f.py", "exec")
            assert mutated.count("\n") == source.count("\n")


def test_a_draw_repeats_and_takes_from_each_file_by_its_size() -> None:
    sources = {"small.py": "x = 1\n", "large.py": SOURCE, "empty.py": ""}
    drawn = draw_mutants(sources, 12, seed=0)
    assert drawn == draw_mutants(sources, 12, seed=0) != draw_mutants(sources, 12, seed=1)
    assert [mutant.file for mutant in drawn] == ["small.py"] + ["large.py"] * 11
    assert {m.edit for m in draw_mutants(sources, 8, seed=0)} < {m.edit for m in drawn}
    for mutant in drawn:
        assert mutant.apply(sources[mutant.file]) != sources[mutant.file]


def test_equivalent_mutants_are_of_lines_that_exist() -> None:
    known = read_equivalent(EQUIVALENT.read_text())
    for (file, before, after), why in known.items():
        lines = [
            stripped
            for line in (ROOT / file).read_text().splitlines()
            if (stripped := line.strip())
        ]
        assert any(tuple(lines[at : at + len(before)]) == before for at in range(len(lines))), (
            f"{file}: {before}"
        )
        assert before != after and len(why) > 20


def test_every_pattern_of_the_core_matches_a_file() -> None:
    files = find_core_files(ROOT)
    assert len(files) >= len(CORE) and all((ROOT / file).is_file() for file in files)


def test_a_pattern_without_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "raysweep").mkdir()
    (tmp_path / "raysweep" / "one.py").touch()
    assert find_core_files(tmp_path, ["raysweep/one.py", "raysweep/*.py"]) == ["raysweep/one.py"]
    for wrong in ("raysweep/two.py", "raysweep/two/*.py"):
        with pytest.raises(
            ValueError, match=f"CORE lists {wrong.replace('*', '.')}, which matches no file"
        ):
            find_core_files(tmp_path, ["raysweep/one.py", wrong])


def test_only_names_modules_or_packages_that_exist() -> None:
    files = [
        "raysweep/attacks/pgd.py",
        "raysweep/sweep/plan.py",
        "raysweep/sweep/planner.py",
        "raysweep/instance_weights.py",
    ]
    assert select_files(files, []) == files
    assert select_files(files, ["instance_weights", "sweep/plan"]) == [
        "raysweep/sweep/plan.py",
        "raysweep/instance_weights.py",
    ]
    assert select_files(files, ["sweep"]) == files[1:3]
    with pytest.raises(ValueError, match="--only sweep/trial: no module of the core has this name"):
        select_files(files, ["instance_weights", "sweep/trial"])


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder with a short path: that of a fork server's socket has at most 107 characters."""
    with tempfile.TemporaryDirectory(prefix="m") as folder:
        yield Path(folder)


@pytest.mark.slow
def test_lines_that_a_fork_server_runs_are_of_the_test_that_asked_for_them(
    short_folder: Path,
) -> None:
    """Its forks import the main module of their parent again: the script must not be it, for it is
    not in the copy.
    """
    for name, text in {
        "raysweep/work.py": PACKAGE,
        "tests/test_work.py": TESTS,
        "../script.py": SCRIPT,
    }.items():
        (short_folder / "project" / name).parent.mkdir(parents=True, exist_ok=True)
        (short_folder / "project" / name).write_text(text)
    arguments = [sys.executable, short_folder / "script.py", ROOT / "benchmarks", short_folder]
    # A path of the caller would hide the package of the small project, and plugins of the caller
    # may lie there.
    callers = {"PYTHONPATH", "PYTEST_ADDOPTS", "PYTEST_PLUGINS"}
    environment = {name: value for name, value in os.environ.items() if name not in callers}
    ended = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found["code"] == 0, "\n".join(found["log"])
    assert all(test["passed"] for test in found["tests"].values()), "\n".join(found["log"])
    lines = {
        name.partition("::")[2]: set(files["raysweep/work.py"])
        for name, files in found["lines"].items()
    }
    assert {name: run & {2, 5} for name, run in lines.items()} == {
        "test_first": {2},
        "test_second": {5},
    }


PACKAGE = """def first():
    return 1

def second():
    return 2
"""
TESTS = """import multiprocessing
from raysweep import work

def ends_well(target):
    process = multiprocessing.get_context("forkserver").Process(target=target)
    process.start()
    process.join()
    return process.exitcode == 0

def test_first():
    assert ends_well(work.first)

def test_second():
    assert ends_well(work.second)
"""
SCRIPT = """import json
import os
import sys
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])

from mutants import _FONTS, Pool, Task, record_coverage

if __name__ == "__main__":
    folder = Path(sys.argv[2])
    os.environ[_FONTS] = str(folder / "fonts")
    pool = Pool(folder / "project", folder / "scratch", jobs=1)
    work = partial(record_coverage, "tests/test_work.py", "")
    pool.tasks.append(Task(work, lambda found, seconds: print(json.dumps(found))))
    pool.run()
"""
