"""A display that updates in place in the output of a notebook's cell, without ipywidgets."""

import io
import sys
import threading
from collections.abc import Callable
from contextvars import copy_context
from typing import Any

from rich.console import RenderableType

from raysweep.plain_console import PlainConsole

# Width of the text in characters, as rich has it in notebooks.
_WIDTH = 115
_REFRESH_SECONDS = 1.0
_HTML_FORMAT = (
    '<pre style="white-space:pre;overflow-x:auto;line-height:normal;'
    "font-family:Menlo,'DejaVu Sans Mono',consolas,'Courier New',monospace\">{code}</pre>"
)


def is_notebook() -> bool:
    """Return whether this process is the kernel of a notebook."""
    if "IPython" not in sys.modules:
        return False
    from IPython import get_ipython

    return getattr(get_ipython(), "kernel", None) is not None


class NotebookDisplay:
    """Shows something in a cell's output and renders it again every second.

    Its methods are those of `rich.live.Live`, which needs ipywidgets in a notebook. The last state
    stays in the notebook.
    """

    def __init__(self, get_renderable: Callable[[], RenderableType]) -> None:
        """Prepare the display.

        Args:
            get_renderable: Returns what to show now; called in a thread of its own, and at the end
                in the thread of the caller.
        """
        self._get_renderable = get_renderable
        self._handle: Any = None
        self._is_stopped = threading.Event()
        # The kernel finds the cell of an output in the context of the thread.
        self._thread = threading.Thread(
            target=copy_context().run, args=(self._refresh_until_stopped,), daemon=True
        )

    def start(self) -> None:
        """Show the display in the cell that runs now."""
        from IPython.display import DisplayHandle

        handle_class: Any = DisplayHandle
        self._handle = handle_class()
        self._handle.display(self._render(), raw=True)
        self._thread.start()

    def stop(self) -> None:
        """Show the last state, and update it no more."""
        self._is_stopped.set()
        self._thread.join()
        self._handle.update(self._render(), raw=True)

    def _refresh_until_stopped(self) -> None:
        """Update the display every second."""
        while not self._is_stopped.wait(_REFRESH_SECONDS):
            self._handle.update(self._render(), raw=True)

    def _render(self) -> dict[str, str]:
        """Return the present state as HTML, and as text for viewers without HTML."""
        console = PlainConsole(
            file=io.StringIO(), record=True, width=_WIDTH, force_terminal=True, force_jupyter=False
        )
        console.print(self._get_renderable())
        return {
            "text/html": console.export_html(
                inline_styles=True, code_format=_HTML_FORMAT, clear=False
            ),
            "text/plain": console.export_text(),
        }
