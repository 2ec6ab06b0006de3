"""Find the places of a Python source that a mutation can change, and the text that each change puts
there.

A change never adds or removes a line, so that line numbers and coverage stay valid. Not changed:
annotations, decorators, docstrings and other strings, texts of `raise`, warnings and log lines, and
`TYPE_CHECKING` blocks.
"""

import ast
import io
import random
import re
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

COMPARISONS: dict[type[ast.cmpop], tuple[tuple[str, str], ...]] = {
    ast.Lt: ((r"<", "<="), (r"<", ">")),
    ast.LtE: ((r"<=", "<"), (r"<=", ">=")),
    ast.Gt: ((r">", ">="), (r">", "<")),
    ast.GtE: ((r">=", ">"), (r">=", "<=")),
    ast.Eq: ((r"==", "!="),),
    ast.NotEq: ((r"!=", "=="),),
    ast.Is: ((r"\bis\b", "is not"),),
    ast.IsNot: ((r"\bis\s+not\b", "is"),),
    ast.In: ((r"\bin\b", "not in"),),
    ast.NotIn: ((r"\bnot\s+in\b", "in"),),
}
ARITHMETIC: dict[type[ast.operator], tuple[str, tuple[str, ...]]] = {
    ast.Add: ("+", ("-",)),
    ast.Sub: ("-", ("+",)),
    ast.Mult: ("*", ("/",)),
    ast.Div: ("/", ("*",)),
    ast.FloorDiv: ("//", ("/", "*")),
    ast.Mod: ("%", ("//",)),
    ast.Pow: ("**", ("*",)),
    ast.BitAnd: ("&", ("|",)),
    ast.BitOr: ("|", ("&",)),
}
_PAIRS = (
    "min max",
    "any all",
    "amin amax",
    "argmin argmax",
    "minimum maximum",
    "clamp_min clamp_max",
    "floor ceil",
)
SWAPPED = {a: b for pair in _PAIRS for a, b in (pair.split(), reversed(pair.split()))}
# Names that `/` joins to a path: any other operator fails at once.
_PATH = re.compile("path|folder|file|home|dir$|root", re.I)
# Calls and keywords whose arguments are texts for people: there is no behaviour to test.
_TELLING = {"print", "warn", "debug", "info", "warning", "error", "exception", "log"}
# Calls whose first two arguments can be swapped without effect, or which then fail at once.
_SYMMETRIC = {"min", "max", "minimum", "maximum", "equal", "zip", "isinstance", "issubclass"}
_WORDS = {"description", "title", "examples", "help"}


@dataclass(frozen=True)
class Edit:
    """Replaces source[start:end] with `text`; offsets in characters."""

    start: int
    end: int
    text: str


@dataclass(frozen=True)
class Site:
    """A place that can be changed.

    lines: those of its statement, without the body of a compound one. body: first and last line of
    the function whose tests can notice the change; None if it runs when the module is imported.
    edits: the changes to draw one from.
    """

    operator: str
    lines: tuple[int, int]
    body: tuple[int, int] | None
    edits: tuple[Edit, ...]


@dataclass(frozen=True)
class Mutant:
    """One change of one file. `before` and `after` are the changed lines, stripped."""

    file: str
    operator: str
    line: int
    lines: tuple[int, int]
    body: tuple[int, int] | None
    edit: Edit
    before: tuple[str, ...]
    after: tuple[str, ...]

    def apply(self, source: str) -> str:
        """Return the mutated source."""
        return source[: self.edit.start] + self.edit.text + source[self.edit.end :]


def find_sites(source: str) -> list[Site]:
    """List all sites of a source, in the order of their text."""
    collector = _Collector(source)
    collector.visit(ast.parse(source))
    return sorted(
        collector.sites, key=lambda site: (site.edits[0].start, site.edits[0].end, site.operator)
    )


def draw_mutants(sources: Mapping[str, str], count: int, seed: int) -> list[Mutant]:
    """Draw mutants: from each file in proportion to its number of sites, at least one; uniformly
    within a file.

    A larger `count` draws the same mutants and more, as far as the shares of the files allow.
    """
    sites = {file: find_sites(source) for file, source in sources.items()}
    shares = _allocate({file: len(found) for file, found in sites.items()}, count)
    drawn = []
    for file, share in shares.items():
        chance = random.Random(f"{seed} {file}")
        chance.shuffle(sites[file])
        candidates = (
            _make_mutant(file, sources[file], site, chance.choice(site.edits))
            for site in sites[file]
        )
        different = {
            (mutant.line, mutant.after): mutant for mutant in candidates if mutant
        }.values()
        valid = (mutant for mutant in different if _compiles(mutant.apply(sources[file])))
        drawn += sorted(
            (m for m, _ in zip(valid, range(share), strict=False)), key=lambda m: m.edit.start
        )
    return drawn


def _allocate(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """Split `count` in proportion to sizes by largest remainders, at least one for each that is not
    empty.
    """
    filled = {name: size for name, size in sizes.items() if size}
    total = sum(filled.values())
    exact = {name: count * size / total for name, size in filled.items()}
    shares = {name: min(filled[name], max(1, int(share))) for name, share in exact.items()}
    for name in sorted(filled, key=lambda name: int(exact[name]) - exact[name]):
        if sum(shares.values()) < count and exact[name] >= 1 and shares[name] < filled[name]:
            shares[name] += 1
    return shares


def _make_mutant(file: str, source: str, site: Site, edit: Edit) -> Mutant | None:
    """Build the mutant, or None if the edit changes nothing."""
    first, last = source.count("\n", 0, edit.start), source.count("\n", 0, edit.end)
    mutated = source[: edit.start] + edit.text + source[edit.end :]
    before, after = (
        tuple(stripped for line in text.split("\n")[first : last + 1] if (stripped := line.strip()))
        for text in (source, mutated)
    )
    if before == after:
        return None
    return Mutant(file, site.operator, first + 1, site.lines, site.body, edit, before, after)


def _compiles(source: str) -> bool:
    try:
        compile(source, "<mutant>", "exec")
    except (SyntaxError, ValueError):
        return False
    return True


class _Collector(ast.NodeVisitor):
    """Walks a module and collects its sites."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.sites: list[Site] = []
        lines = source.split("\n")
        self._starts = [0]
        for line in lines:
            self._starts.append(self._starts[-1] + len(line) + 1)
        self._lines = lines
        self._code = self._blank_text()
        self._statement = (1, 1)
        self._body: tuple[int, int] | None = None
        self._function = ""

    # Positions in the source

    def _offset(self, line: int, column: int) -> int:
        """Offset in characters of a position of `ast`, whose columns are bytes of UTF-8."""
        text = self._lines[line - 1]
        return self._starts[line - 1] + (
            column if text.isascii() else len(text.encode()[:column].decode())
        )

    def _blank_text(self) -> str:
        """The source with comments and strings blanked out, so that commas and operators can be
        searched for.
        """
        blanked = list(self.source)
        for token in tokenize.generate_tokens(io.StringIO(self.source).readline):
            if token.type in (tokenize.COMMENT, tokenize.STRING):
                (first, column), (last, end) = token.start, token.end
                for at in range(self._starts[first - 1] + column, self._starts[last - 1] + end):
                    blanked[at] = blanked[at] if blanked[at] == "\n" else " "
        return "".join(blanked)

    def _start(self, node: ast.AST) -> int:
        return self._offset(node.lineno, node.col_offset)

    def _end(self, node: ast.AST) -> int:
        return self._offset(node.end_lineno, node.end_col_offset)

    def _text(self, node: ast.AST) -> str:
        return self.source[self._start(node) : self._end(node)]

    def _add(self, operator: str, *edits: Edit) -> None:
        if edits:
            self.sites.append(Site(operator, self._statement, self._body, edits))

    def _replace(self, node: ast.AST, text: str) -> Edit:
        """Replace a node by `text`, adding line breaks in parentheses to keep the line count."""
        breaks = self._text(node).count("\n")
        return Edit(
            self._start(node), self._end(node), f"({text}" + "\n" * breaks + ")" if breaks else text
        )

    def _replace_between(
        self, left: ast.AST, right: ast.AST, pattern: str, text: str
    ) -> Iterator[Edit]:
        """Replace what `pattern` finds between two operands."""
        gap = self._end(left)
        if found := re.search(pattern, self._code[gap : self._start(right)]):
            yield Edit(gap + found.start(), gap + found.end(), text)

    # Statements

    def visit(self, node: ast.AST) -> None:
        if not isinstance(node, ast.stmt):
            super().visit(node)
            return
        outer = self._statement
        body = getattr(node, "body", None)
        last = body[0].lineno - 1 if isinstance(body, list) and body else node.end_lineno
        self._statement = (node.lineno, max(node.lineno, last))
        super().visit(node)
        self._statement = outer

    def _visit_all(self, nodes: Iterable[ast.AST | None]) -> None:
        for node in nodes:
            if node is not None:
                self.visit(node)

    def _visit_body(self, body: list[ast.stmt]) -> None:
        """Visit statements, but neither the docstring nor strings that document attributes."""
        self._visit_all(node for node in body if not _is_text(node))

    def visit_Module(self, node: ast.Module) -> None:
        self._visit_body(node.body)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._visit_body(node.body)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outer_body, outer_function = self._body, self._function
        last = node.body[-1].end_lineno
        self._body, self._function = (node.body[0].lineno, last), node.name
        self._visit_all([*node.args.defaults, *node.args.kw_defaults])
        self._visit_body(node.body)
        self._body, self._function = outer_body, outer_function

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self._visit_all([node.value])

    def visit_Assign(self, node: ast.Assign) -> None:
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets):
            return
        if (
            any(isinstance(t, ast.Subscript | ast.Attribute) for t in node.targets)
            and "init__" not in self._function
        ):
            self._add("assignment deleted", self._delete(node))
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self._add("assignment deleted", self._delete(node))
        symbol, others = ARITHMETIC.get(type(node.op), ("", ()))
        for other in others:
            edits = self._replace_between(
                node.target, node.value, re.escape(f"{symbol}="), f"{other}="
            )
            self._add("arithmetic swapped", *edits)
        self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call) and _called(node.value) in _TELLING - {"warn"}:
            return
        if not isinstance(node.value, ast.Constant):
            self._add("statement deleted", self._delete(node))
        self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> None:
        self._add("raise deleted", self._delete(node))

    def visit_Continue(self, node: ast.Continue) -> None:
        self._add("continue deleted", self._delete(node))

    def visit_Break(self, node: ast.Break) -> None:
        self._add("break deleted", self._delete(node))

    def _delete(self, node: ast.stmt) -> Edit:
        return Edit(
            self._start(node), self._end(node), "pass" + "\n" * self._text(node).count("\n")
        )

    def visit_Return(self, node: ast.Return) -> None:
        if node.value is not None and not (
            isinstance(node.value, ast.Constant) and node.value.value is None
        ):
            self._add("None returned", self._replace(node.value, "None"))
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" in self._text(node.test) or "__name__" in self._text(node.test):
            self._visit_all(node.orelse)
            return
        self._force(node.test, "True", "False")
        self.generic_visit(node)

    def visit_While(self, node: ast.While) -> None:
        self._force(node.test, "False")
        self.generic_visit(node)

    def visit_Assert(self, node: ast.Assert) -> None:
        self.visit(node.test)

    def visit_Import(self, node: ast.Import) -> None:
        pass

    visit_ImportFrom = visit_Import
    visit_AsyncFunctionDef = visit_FunctionDef

    # Expressions

    def _force(self, test: ast.expr, *values: str) -> None:
        if not isinstance(test, ast.Constant):
            self._add("condition replaced", *(self._replace(test, value) for value in values))

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._force(node.test, "True", "False")
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for test in node.ifs:
            self._force(test, "True", "False")
        self.generic_visit(node)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Skip f-strings: they are text, and before Python 3.12 positions inside them are wrong."""

    def visit_Compare(self, node: ast.Compare) -> None:
        for left, op, right in zip(
            [node.left, *node.comparators], node.ops, node.comparators, strict=False
        ):
            edits = [
                self._replace_between(left, right, pattern, text)
                for pattern, text in COMPARISONS[type(op)]
            ]
            self._add("comparison swapped", *(edit for found in edits for edit in found))
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        symbol, others = ARITHMETIC.get(type(node.op), ("", ()))
        is_path = symbol == "/" and _PATH.search(self._text(node.left))
        if (
            symbol
            and not is_path
            and not any(_is_text_or_type(side) for side in (node.left, node.right))
        ):
            pattern = re.escape(symbol)
            edits = [
                self._replace_between(node.left, node.right, pattern, other) for other in others
            ]
            self._add("arithmetic swapped", *(edit for found in edits for edit in found))
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        word, other = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in zip(node.values, node.values[1:], strict=False):
            self._add("and/or swapped", *self._replace_between(left, right, rf"\b{word}\b", other))
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        words: dict[type[ast.unaryop], str] = {ast.Not: "not", ast.Invert: "~", ast.USub: "-"}
        if word := words.get(type(node.op)):
            start = self._start(node)
            space = len(word) + (word == "not" and self.source[start + 3] == " ")
            self._add(
                "sign dropped" if word == "-" else f"{word} dropped", Edit(start, start + space, "")
            )
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        value = node.value
        if isinstance(value, bool):
            self._add("True/False flipped", self._replace(node, str(not value)))
        elif isinstance(value, int):
            self._add("number changed", self._replace(node, str(value + 1)))
        elif isinstance(value, float):
            texts = [repr(2 * value), f"(-{value!r})"] if value else ["1.0"]
            self._add("number changed", *(self._replace(node, text) for text in texts))

    def visit_Subscript(self, node: ast.Subscript) -> None:
        self.visit(node.value)
        text = self._text(node.slice)
        if text in ("0", "-1"):
            self._add("first/last swapped", self._replace(node.slice, "-1" if text == "0" else "0"))
            return
        self.visit(node.slice)

    def visit_Slice(self, node: ast.Slice) -> None:
        for bound in (node.lower, node.upper):
            if bound is None:
                continue
            text = self._text(bound)
            number = (
                bound.value
                if isinstance(bound, ast.Constant) and isinstance(bound.value, int)
                else None
            )
            texts = [f"({text}) + 1", f"({text}) - 1"] if number is None else [str(number + 1)]
            self._add(
                "slice bound moved",
                *(Edit(self._start(bound), self._end(bound), text) for text in texts),
            )
            if not isinstance(bound, ast.Constant | ast.UnaryOp):
                self.visit(bound)
        self._visit_all([node.step])

    def visit_Call(self, node: ast.Call) -> None:
        name = _called(node)
        if name in _TELLING or name in ("cast", "TypeVar", "NewType"):
            return
        self._swap_name(node.func, name)
        if name == "sorted":
            end = self._end(node)
            if not any(keyword.arg == "reverse" for keyword in node.keywords):
                self._add("order reversed", Edit(end, end, "[::-1]"))
        self._swap_arguments(node)
        for keyword in node.keywords:
            is_lint = name == "zip" and keyword.arg == "strict"
            if keyword.arg is None or keyword.arg in _WORDS or is_lint:
                continue
            self._add("keyword dropped", self._drop_keyword(node, keyword))
            if name in ("clamp", "clamp_", "clip") and keyword.arg in ("min", "max"):
                start = self._start(keyword)
                self._add("min/max swapped", Edit(start, start + 3, SWAPPED[keyword.arg]))
        self.visit(node.func)
        self._visit_all(node.args[:1] if name in ("isinstance", "issubclass") else node.args)
        kept = (
            k
            for k in node.keywords
            if k.arg not in _WORDS and not (name == "zip" and k.arg == "strict")
        )
        self._visit_all(keyword.value for keyword in kept)

    def _swap_name(self, func: ast.expr, name: str) -> None:
        base = name.removesuffix("_")
        if base in SWAPPED:
            end = self._end(func)
            self._add(
                f"{base} swapped", Edit(end - len(name), end, SWAPPED[base] + name[len(base) :])
            )
        elif name == "reversed":
            self._add("order reversed", self._replace(func, "list"))

    def _swap_arguments(self, node: ast.Call) -> None:
        """Swap the first two positional arguments, if both are on one line and not numbers or
        words.
        """
        if len(node.args) < 2 or any(isinstance(arg, ast.Starred) for arg in node.args[:2]):
            return
        first, second = node.args[:2]
        whole = self.source[self._start(first) : self._end(second)]
        plain = not any(
            isinstance(arg, ast.Constant | ast.JoinedStr | ast.Lambda) for arg in (first, second)
        )
        same = self._text(first) == self._text(second) or _called(node) in _SYMMETRIC
        if plain and not same and "\n" not in whole:
            middle = self.source[self._end(first) : self._start(second)]
            text = self._text(second) + middle + self._text(first)
            self._add("arguments swapped", Edit(self._start(first), self._end(second), text))

    def _drop_keyword(self, node: ast.Call, keyword: ast.keyword) -> Edit:
        arguments = sorted([*node.args, *node.keywords], key=self._start)
        at = arguments.index(keyword)
        start, end = self._start(keyword), self._end(node) - 1
        if at + 1 < len(arguments):
            end = self._code.rindex(",", self._end(keyword), self._start(arguments[at + 1])) + 1
        elif at:
            start = self._code.rindex(",", self._end(arguments[at - 1]), start)
        return Edit(start, end, "\n" * self.source.count("\n", start, end))


def _called(node: ast.Call) -> str:
    """Last part of the dotted name of the called function."""
    func = node.func
    return (
        func.attr
        if isinstance(func, ast.Attribute)
        else func.id
        if isinstance(func, ast.Name)
        else ""
    )


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_text_or_type(node: ast.expr) -> bool:
    """Whether an operand is a string (part of a path, text for people) or belongs to a union of
    types.
    """
    if isinstance(node, ast.Constant):
        return node.value is None or isinstance(node.value, str)
    return isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Subscript) and "Annotated" in ast.dump(node.value)
    )


def find_function_lines(source: str) -> set[int]:
    """Lines inside the bodies of functions: those that do not run when the module is imported."""
    functions = (
        n
        for n in ast.walk(ast.parse(source))
        if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    return {line for node in functions for line in range(node.body[0].lineno, node.end_lineno + 1)}
