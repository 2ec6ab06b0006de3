"""Measure how a package reads: names, docstrings and dense expressions.

    python benchmarks/readability.py                      # the package as it is here
    python benchmarks/readability.py d5c5dbc HEAD     # revisions of this repository
    python benchmarks/readability.py --package FOLDER     # any other Python package

Counts are of all functions and methods, dunder methods left out. A name of one word has no
underscore inside. A docstring has sections if it contains `Args:`, `Returns:`, `Raises:` or
`Attributes:`; the share is of public functions, classes and methods that have a docstring.
"""

import ast
import io
import subprocess
import tarfile
from collections.abc import Iterable
from pathlib import Path

from command_line import create_parser

ROOT = Path(__file__).parent.parent
SECTIONS = ("Args:", "Returns:", "Raises:", "Attributes:", "Yields:")
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def read_revision(revision: str) -> list[str]:
    """Return the texts of the package's Python files in a revision."""
    command = ["git", "-C", str(ROOT), "archive", revision, "raysweep"]
    archive = subprocess.run(command, capture_output=True, check=True).stdout
    texts = []
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        for member in files.getmembers():
            file = files.extractfile(member)
            if file is not None and member.name.endswith(".py"):
                texts.append(file.read().decode())
    return texts


def measure_package(texts: Iterable[str]) -> dict[str, float]:
    """Compute the measures of some Python files."""
    trees, n_lines = [], 0
    for text in texts:
        trees.append(ast.parse(text))
        n_lines += len(text.splitlines())
    nodes = [node for tree in trees for node in ast.walk(tree)]
    functions = [
        node
        for node in nodes
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("__")
    ]
    one_word = [node for node in functions if "_" not in node.name.strip("_")]
    documented = [
        docstring
        for node in nodes
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        if (docstring := ast.get_docstring(node))
    ]
    with_sections = [text for text in documented if any(section in text for section in SECTIONS)]
    ternaries = sum(isinstance(node, ast.IfExp) for node in nodes)
    comprehensions = sum(isinstance(node, COMPREHENSIONS) for node in nodes)
    lengths = sorted((node.end_lineno or 0) - node.lineno + 1 for node in functions)
    return {
        "lines": n_lines,
        "functions and methods": len(functions),
        "names of one word, %": 100 * len(one_word) / len(functions),
        "public docstrings with sections, %": 100 * len(with_sections) / len(documented),
        "ternaries per 1,000 lines": 1000 * ternaries / n_lines,
        "comprehensions per 1,000 lines": 1000 * comprehensions / n_lines,
        "longest function, lines": lengths[-1],
        "functions of more than 50 lines": sum(length > 50 for length in lengths),
    }


def main() -> None:
    """Print a Markdown table with one column for each package."""
    parser = create_parser(__doc__)
    parser.add_argument("revisions", nargs="*", help="git revisions (default: the files here)")
    parser.add_argument("--package", type=Path, default=ROOT / "raysweep")
    args = parser.parse_args()
    columns = {revision: read_revision(revision) for revision in args.revisions}
    if not columns:
        files = sorted(args.package.rglob("*.py"))
        columns[args.package.name] = [file.read_text() for file in files]
    measures = {name: measure_package(texts) for name, texts in columns.items()}
    print(f"| measure | {' | '.join(measures)} |")
    print(f"| --- |{' --- |' * len(measures)}")
    for measure in next(iter(measures.values())):
        print(f"| {measure} | {' | '.join(f'{m[measure]:.0f}' for m in measures.values())} |")


if __name__ == "__main__":
    main()
