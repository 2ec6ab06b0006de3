"""A console of rich that shows texts as they are: no markup, no commands of terminals in them."""

from typing import IO, Any

from rich.console import Console
from rich.text import Text

from raysweep.visible_text import VisibleStream, show_characters


class PlainConsole(Console):
    """A console for texts that may come from files of strangers.

    `[bold]` and `:smile:` are printed as they are, and characters that a terminal would obey as
    escapes. Texts in tables are, too. Styles come from `rich.text.Text` only, whose content the
    caller passes through `show_characters`.
    """

    def __init__(self, **options: Any) -> None:
        """Create a console; the arguments are those of `rich.console.Console`."""
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    @property
    def file(self) -> IO[str]:
        """The stream, below the one that hides commands: those of styles are this console's."""
        stream = super().file
        return stream.raw_stream if isinstance(stream, VisibleStream) else stream

    @file.setter
    def file(self, new_file: IO[str]) -> None:
        self._file = new_file

    def render_str(self, text: str, **options: Any) -> Text:
        """Convert a text; the arguments are those of `rich.console.Console.render_str`."""
        return super().render_str(show_characters(text, line_breaks=True), **options)
