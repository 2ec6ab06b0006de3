"""Show texts of strangers as they are: nothing in them commands a terminal, a page or a figure.

Names, notes and errors may come from files and bucket listings of anybody.
"""

import html
import re
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

# Characters that have no shape of their own, and can hide or reorder others: controls (C0, C1,
# DEL), format characters such as bidirectional overrides, separators of lines, surrogates and
# private use.
_HIDDEN_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})
_LINE_BREAKS = "\n\t"
# Characters of a line that are kept of its start and its end, where its cause and its remedy are.
_KEPT_START = 1500
_KEPT_END = 500
# An underscore or number within a word is text, as is a dash within a line.
_MARKDOWN_SPECIAL = re.compile(r"([\\`*\[\]|~$]|(?<!\w)_|_(?!\w)|^[-+#=]|^\d+(?=[.)](?:\s|$)))")
# Renderers turn addresses into links without any sign.
_ADDRESS = re.compile(r"(?i)\b(https?|ftp|mailto|file|javascript|data):|\b(www)\.|@(?=\w)")


def show_characters(text: str, line_breaks: bool = False) -> str:
    r"""Replace characters that a terminal would obey, or that nobody would see, by their escapes.

    Args:
        text: Any text.
        line_breaks: Whether newlines and tabs stay as they are.

    Returns:
        The text with `\x1b` in place of an escape character, and so on. What is printable, in any
        script, is unchanged.
    """
    if text.isascii() and text.isprintable():
        return text
    kept = _LINE_BREAKS if line_breaks else ""
    return "".join(
        character if character in kept or not _is_hidden(character) else _escape(character)
        for character in text
    )


def shorten_line(line: str) -> str:
    """Cut the middle out of a line that is too long to be read.

    Args:
        line: Any line; one of up to 2,000 characters stays whole.

    Returns:
        Its start, how many characters were left out, and its end.
    """
    n_left_out = len(line) - _KEPT_START - _KEPT_END
    if n_left_out <= 0:
        return line
    return f"{line[:_KEPT_START]}... ({n_left_out} characters) ...{line[-_KEPT_END:]}"


def escape_markdown(text: str) -> str:
    r"""Write a text in Markdown so that its page shows the text: no link, table, HTML or image.

    Args:
        text: Any text; line breaks become spaces.

    Returns:
        One line of Markdown.
    """
    line = show_characters(" ".join(text.split()))
    line = _MARKDOWN_SPECIAL.sub(_escape_special, html.escape(line, quote=False))
    return _ADDRESS.sub(_break_address, line)


def _is_hidden(character: str) -> bool:
    """Return whether a character has no shape of its own."""
    return unicodedata.category(character) in _HIDDEN_CATEGORIES


def _escape(character: str) -> str:
    r"""Return `\n`, `\x1b`, `\u202e` and so on."""
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def _break_address(match: re.Match[str]) -> str:
    """Write the sign that makes an address of a text as an entity."""
    if match[1]:
        return f"{match[1]}&#58;"
    return f"{match[2]}&#46;" if match[2] else "&#64;"


def _escape_special(match: re.Match[str]) -> str:
    """Write a sign of Markdown as text; a number at the start of a line would be that of a list."""
    sign = match[0]
    return f"{sign}\\" if sign.isdigit() else f"\\{sign}"


class VisibleStream:
    """Text stream that writes to another one what `show_characters` makes of a text.

    Everything else is the other stream's.

    Attributes:
        raw_stream: The other stream.
    """

    def __init__(self, raw_stream: TextIO) -> None:
        self.raw_stream = raw_stream

    def write(self, text: str) -> int:
        """Write a text with escapes in place of hidden characters."""
        self.raw_stream.write(show_characters(text, line_breaks=True))
        return len(text)

    def writelines(self, lines: Iterator[str]) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw_stream, name)


@contextmanager
def visible_output() -> Iterator[None]:
    """Print in this block what is printable, so that no name of a stranger commands the terminal.

    Consoles of rich, which write commands of their own, take the stream below (`PlainConsole`).
    """
    previous = sys.stdout, sys.stderr
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, VisibleStream):
            setattr(sys, name, VisibleStream(stream))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = previous
