"""Progress of an evaluation, and a progress bar that shows it."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from raysweep.plain_console import PlainConsole
from raysweep.visible_text import show_characters


@dataclass(frozen=True)
class EvaluationProgress:
    """Progress of the current attack.

    Attributes:
        attack: Name of the attack; "clean" for the predictions on the clean images.
        done: Number of examples that this attack has finished.
        total: Number of examples that this attack runs on.
        robust: Number of examples that no attack has broken so far.
        examples: Number of all examples of the evaluation.
    """

    attack: str
    done: int
    total: int
    robust: int
    examples: int

    @property
    def robust_accuracy(self) -> float:
        """Fraction of all examples that no attack has broken so far, in [0, 1]."""
        return self.robust / self.examples


@contextmanager
def show_evaluation_progress(
    console: Console | None = None,
) -> Iterator[Callable[[EvaluationProgress], None]]:
    """Show a progress bar per attack on a terminal; elsewhere print a line per finished attack.

    Example:
        with show_evaluation_progress() as progress:
            evaluate(..., progress=progress)

    Args:
        console: Where to print; standard error by default.

    Yields:
        The function for `evaluate(..., progress=...)`.
    """
    if console is None:
        # `FORCE_COLOR` does not make a file a terminal.
        console = PlainConsole(stderr=True, force_terminal=None if sys.stderr.isatty() else False)
    columns = (
        TextColumn("{task.description:>10}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(
        *columns,
        TextColumn("{task.fields[robust]:.2%} robust"),
        console=console,
        disable=not console.is_interactive,
    ) as bars:

        def show(progress: EvaluationProgress) -> None:
            """Update the bar of the current attack, or print its line when it has finished."""
            name, accuracy = progress.attack, progress.robust_accuracy
            if name == "clean":
                return
            if not console.is_interactive:
                if progress.done == progress.total:
                    console.print(f"{name}: {accuracy:.2%} robust", highlight=False)
                return
            if name not in tasks:
                tasks[name] = bars.add_task(
                    show_characters(name), total=progress.total, robust=accuracy
                )
            bars.update(tasks[name], completed=progress.done, robust=accuracy)

        yield show
