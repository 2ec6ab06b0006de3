"""The mutation run draws changes that compile, from files that exist; the list of equivalent ones fits the code."""

import subprocess
import sys
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
    made = [_make_mutant("f.py", source, site, edit) for site in find_sites(source) for edit in site.edits]
    return [(mutant.operator, mutant.line, " ".join(mutant.after)) for mutant in made if isinstance(mutant, Mutant)]


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
    source = "def f(a,\n  b):\n  return g(\n    a,\n    key=b,  # one, two\n  ) if (\n    a and\n    b\n  ) else 0\n"
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
        lines = [stripped for line in (ROOT / file).read_text().splitlines() if (stripped := line.strip())]
        assert any(tuple(lines[at : at + len(before)]) == before for at in range(len(lines))), f"{file}: {before}"
        assert before != after and len(why) > 20


def test_every_pattern_of_the_core_matches_a_file() -> None:
    files = find_core_files(ROOT)
    assert len(files) >= len(CORE) and all((ROOT / file).is_file() for file in files)


def test_a_pattern_without_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "raysweep").mkdir()
    (tmp_path / "raysweep" / "one.py").touch()
    assert find_core_files(tmp_path, ["raysweep/one.py", "raysweep/*.py"]) == ["raysweep/one.py"]
    for wrong in ("raysweep/two.py", "raysweep/two/*.py"):
        with pytest.raises(ValueError, match=f"CORE lists {wrong.replace('*', '.')}, which matches no file"):
            find_core_files(tmp_path, ["raysweep/one.py", wrong])


def test_only_names_modules_or_packages_that_exist() -> None:
    files = ["raysweep/attacks/pgd.py", "raysweep/sweep/plan.py", "raysweep/sweep/planner.py", "raysweep/weights.py"]
    assert select_files(files, []) == files
    assert select_files(files, ["weights", "sweep/plan"]) == ["raysweep/sweep/plan.py", "raysweep/weights.py"]
    assert select_files(files, ["sweep"]) == files[1:3]
    with pytest.raises(ValueError, match="--only sweep/trial: no module of the core has this name"):
        select_files(files, ["weights", "sweep/trial"])


def test_a_process_that_multiprocessing_starts_runs_in_the_copy(tmp_path: Path) -> None:
    """It imports the main module of its parent again, and what that imports is no part of the copy."""
    (tmp_path / "project").mkdir()
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    found = subprocess.run([sys.executable, script, ROOT / "benchmarks", tmp_path], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == ["forkserver", "0", "spawn", "0"], found.stdout


SCRIPT = """
import multiprocessing
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])

import mutants

KINDS = ("forkserver", "spawn")


def start_processes(folder):
    codes = {}
    for kind in KINDS:
        process = multiprocessing.get_context(kind).Process(target=os.getpid)
        process.start()
        process.join()
        codes[kind] = process.exitcode
    return codes


if __name__ == "__main__":
    folder = Path(sys.argv[2])
    os.environ[mutants._FONTS] = str(folder)
    pool = mutants.Pool(folder / "project", folder / "scratch", jobs=1)
    pool.tasks.append(mutants.Task(start_processes, lambda found, seconds: print(*sum(found.items(), ()))))
    pool.run()
"""
