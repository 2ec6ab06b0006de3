"""Where an evaluation stands, and a bar that shows it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars


@dataclass(frozen=True)
class EvaluationProgress:
    """Rows of this attack done, and examples still robust."""

    attack: str
    done: int
    total: int
    robust: int
    examples: int

    @property
    def robust_accuracy(self) -> float:
        return self.robust / self.examples


@contextmanager
def show_evaluation_progress(
    console: Console | None = None,
) -> Iterator[Callable[[EvaluationProgress], None]]:
    """`with bar() as progress: evaluate(..., progress=progress)`: bars on a terminal, a line an
    attack in a pipe.
    """
    console = console or Console(stderr=True)
    columns = (
        TextColumn("{task.description:>10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    tasks: dict[str, int] = {}
    with Bars(
        *columns,
        TextColumn("{task.fields[robust]:.2%} robust"),
        console=console,
        disable=not console.is_terminal,
    ) as bars:

        def show(now: EvaluationProgress) -> None:
            if now.attack == "clean":
                return
            if not console.is_terminal:
                if now.done == now.total:
                    console.print(
                        f"{now.attack}: {now.robust_accuracy:.2%} robust", highlight=False
                    )
                return
            if now.attack not in tasks:
                tasks[now.attack] = bars.add_task(
                    now.attack, total=now.total, robust=now.robust_accuracy
                )
            bars.update(tasks[now.attack], completed=now.done, robust=now.robust_accuracy)  # type: ignore[arg-type]

        yield show
