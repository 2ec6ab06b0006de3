"""What raysweep prints and which exceptions it does not pass on: read from its source."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "raysweep"
FILES = sorted(ROOT.rglob("*.py"))
LIST = Path(__file__).parent / "data" / "swallowed_exceptions.txt"
# The command line: its output is its purpose.
PRINTING = ("commands", "terminal.py", "cli.py", "shell_completion.py")


def read_reasons() -> dict[tuple[str, str], str]:
    """(file, `function: exceptions`) -> why nobody has to be told."""
    lines = [line.split(" | ") for line in LIST.read_text().splitlines() if line[0] != "#"]
    return {(file, place): reason for file, place, reason in lines}


REASONS = read_reasons()


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def called_names(nodes: list[ast.stmt]) -> set[str]:
    """`f` and `a.f` of all calls, as far as they are written so."""
    calls = [node.func for one in nodes for node in ast.walk(one) if isinstance(node, ast.Call)]
    return {ast.unparse(function) for function in calls}


def used_names(nodes: list[ast.stmt]) -> set[str]:
    return {node.id for one in nodes for node in ast.walk(one) if isinstance(node, ast.Name)}


def is_passed_on(handler: ast.ExceptHandler) -> bool:
    """Whether it raises, logs, or gives the exception itself to somebody."""
    raises = any(isinstance(node, ast.Raise) for one in handler.body for node in ast.walk(one))
    logs = any(name.startswith("logger.") for name in called_names(handler.body))
    return raises or logs or (handler.name or "") in used_names(handler.body)


def swallowed(path: Path) -> Iterator[str]:
    """`function: exceptions` of each exception that ends in this file without a trace."""

    def visit(node: ast.AST, place: str) -> Iterator[str]:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            place = f"{place}.{node.name}".lstrip(".")
        if isinstance(node, ast.ExceptHandler) and not is_passed_on(node):
            yield f"{place}: {ast.unparse(node.type) if node.type else 'everything'}"
        if isinstance(node, ast.With):
            for item in node.items:
                call = item.context_expr
                if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("suppress"):
                    yield f"{place}: {', '.join(map(ast.unparse, call.args))}"
        for child in ast.iter_child_nodes(node):
            yield from visit(child, place)

    text = path.read_text()
    if "except" in text or "suppress" in text:
        yield from visit(ast.parse(text), "")


def test_only_the_command_line_prints() -> None:
    printing = {
        name_of(path)
        for path in FILES
        if path.relative_to(ROOT).parts[0] not in PRINTING
        and ("print" in path.read_text() or "stdout" in path.read_text())
        for name in called_names(ast.parse(path.read_text()).body)
        if name in ("print", "rich.print", "sys.stdout.write")
    }
    assert not printing, "log it: logging.getLogger(__name__)"


def test_every_module_that_logs_has_a_logger_of_its_own_name() -> None:
    for path in FILES:
        text = path.read_text()
        if re.search(r"\blogger\.", text) and re.search(r"\blogger = ", text):
            assert "\nlogger = logging.getLogger(__name__)\n" in text, name_of(path)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_exception_is_swallowed_without_a_trace(path: Path) -> None:
    """Raise it, log it, pass it on as a value, or give a reason here."""
    name = name_of(path)
    allowed = {place for file, place in REASONS if file == name}
    found = set(swallowed(path))
    assert not found - allowed, f"{name}: log it, or add it to {LIST.name} with a reason"
    assert not allowed - found, f"{name}: {LIST.name} names what is not there any more"


def test_the_reasons_name_files_that_exist() -> None:
    assert {file for file, _ in REASONS} <= {name_of(path) for path in FILES}
    assert all(reason.strip() for reason in REASONS.values())


def test_what_counts_as_swallowed(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text(
        "def f():\n    try: g()\n    except OSError: return None\n"
        "    try: g()\n    except KeyError: raise ValueError from None\n"
        "    try: g()\n    except ValueError as e: logger.info('no: %s', e)\n"
        "    try: g()\n    except TypeError as e: return e\n"
        "class C:\n    def h(self):\n        with suppress(IndexError): g()\n"
    )
    assert list(swallowed(tmp_path / "m.py")) == ["f: OSError", "C.h: IndexError"]
