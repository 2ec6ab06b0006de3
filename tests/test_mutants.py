"""The mutation run draws wrong versions that compile, in their lines, and the list of equivalent ones fits the code."""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from mutants import EQUIVALENT, read_equivalent  # noqa: E402
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
