"""What raysweep prints and which exceptions it does not pass on: read from its source."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent / "raysweep"
FILES = sorted(ROOT.rglob("*.py"))
# The command line: its output is its purpose.
PRINTING = ("commands", "terminal.py", "cli.py", "shell_completion.py")


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

    yield from visit(ast.parse(path.read_text()), "")


if __name__ == "__main__":
    for path in FILES:
        for line in swallowed(path):
            print(name_of(path), "|", line)
