"""Figures whose texts are shown as they are: a `$` in a name starts no formula."""

from typing import Any

from matplotlib.figure import Figure
from matplotlib.text import Text

from raysweep.visible_text import show_characters


class TextFigure(Figure):
    """A figure whose labels may come from files of strangers.

    matplotlib would read text between two dollar signs as a formula, and fail if it is none.
    """

    def draw(self, renderer: Any) -> None:
        """Draw the figure; matplotlib calls this to show or save it."""
        self._show_texts_as_they_are()
        super().draw(renderer)

    def _show_texts_as_they_are(self) -> None:
        """Switch formulas off, except in the numbers that matplotlib writes at log scales."""
        numbers: set[Text] = set()
        for axes in self.axes:
            for axis in (axes.xaxis, axes.yaxis):
                if axis.get_scale() == "log":
                    numbers |= set(axis.get_ticklabels(which="both"))
        for text in self.findobj(Text):
            assert isinstance(text, Text)
            if text not in numbers:
                text.set_parse_math(False)
                text.set_text(show_characters(text.get_text(), line_breaks=True))
