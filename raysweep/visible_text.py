"""Show texts of strangers as they are: nothing in them commands a terminal, a page or a figure.

Names, notes and errors may come from files and bucket listings of anybody.
"""

import html
import re
import unicodedata

# Characters that have no shape of their own, and can hide or reorder others: controls (C0, C1,
# DEL), format characters such as bidirectional overrides, separators of lines, surrogates and
# private use.
_HIDDEN_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})
_LINE_BREAKS = "\n\t"
_MARKDOWN_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|~$])")
# Renderers turn addresses into links without any sign.
_ADDRESS = re.compile(r"(?i)(?:\b(https?|ftp|mailto|file|javascript|data):|\b(www)\.|(\w)@(?=\w))")


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


def escape_markdown(text: str) -> str:
    r"""Write a text in Markdown so that its page shows the text: no link, table, HTML or image.

    Args:
        text: Any text; line breaks become spaces.

    Returns:
        One line of Markdown.
    """
    line = show_characters(" ".join(text.split()))
    line = _MARKDOWN_SPECIAL.sub(r"\\\1", html.escape(line, quote=False))
    return _ADDRESS.sub(_break_address, line)


def escape_mathtext(text: str) -> str:
    r"""Write a text so that a figure of matplotlib shows it, also if it has dollar signs.

    Args:
        text: Any text.

    Returns:
        The text, with `\$` in place of `$`, and without characters that no font has.
    """
    return show_characters(text, line_breaks=True).replace("$", r"\$")


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
    return f"{match[2]}&#46;" if match[2] else f"{match[3]}&#64;"
