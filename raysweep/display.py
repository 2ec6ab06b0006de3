"""What a person sees while a sweep or run goes on: live on a terminal, plain lines in a pipe; and tables."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from raysweep import storage
from raysweep.sweep.ledger import Ledger, Trial
from raysweep.sweep.space import labels
from raysweep.wording import clock, counted

_ROWS = 20
_COLUMNS = ("clean", "pgd", "cw", "robust_worst", "masking_gap")
# Of a table in a pipe: rich would break it at 80 columns.
_WIDE = 1000
_STYLE = {"running": "cyan", "finished": "green", "stopped": "dim", "failed": "red"}


class Progress:
    """A listener that shows each trial as it goes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._trials: dict[int, Trial] = {}
        self._began = time.monotonic()

    def started(self, ledger: Ledger, concurrent: int) -> None:
        self._ledger = ledger
        self._epochs = ledger.space.config({}).epochs
        self._trials = {trial.number: trial for trial in ledger.trials()}
        self._console.print(
            f"sweep {ledger.name}: {counted(ledger.space.total, 'trial')} of up to {counted(self._epochs, 'epoch')}, "
            f"{concurrent} at a time, in {storage.name(ledger.path)}",
            highlight=False,
            soft_wrap=True,
        )
        if self._console.is_terminal:
            self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=2, transient=True)
            self._live.start()

    def trial_changed(self, trial: Trial, metrics: dict[str, float] | None) -> None:
        self._trials[trial.number] = trial
        if self._live is None and (metrics is not None or trial.state != "running" or trial.reason):
            self._console.print(self._line(trial), highlight=False, soft_wrap=True, markup=False)

    def ended(self, ledger: Ledger) -> None:
        if self._live is not None:
            self._live.stop()

    def _line(self, trial: Trial) -> str:
        since = clock(time.monotonic() - self._began)
        numbers = figures(trial.latest if trial.state == "running" else trial.best)
        reason = f": {trial.reason}" if trial.reason else ""
        if trial.state == "running" and reason:
            return f"[{since}] trial {trial.number:04d} starts again after epoch {trial.epoch}{reason}"
        what = f"epoch {trial.epoch}/{self._epochs}" if trial.state == "running" else f"{trial.state}{reason}, best"
        return f"[{since}] trial {trial.number:04d} {what} {numbers}"

    def _render(self) -> RenderableType:
        ended = [t for t in self._trials.values() if t.state != "running"]
        running = [t for t in self._trials.values() if t.state == "running"]
        metric = self._ledger.space.objectives[0]
        rest = sorted(ended, key=lambda t: -t.score(metric))[: max(0, _ROWS - len(running))]
        table = trial_table(self._ledger, [*running, *rest])
        elapsed = time.monotonic() - self._began
        left = f", about {clock(elapsed / len(ended) * (self._ledger.space.total - len(ended)))} left" if ended else ""
        table.caption = (
            f"{len(ended)} of {self._ledger.space.total} trials done in {clock(elapsed)}{left}; Ctrl-C stops"
        )
        return table


@contextmanager
def step_bar(console: Console, epochs: int, steps: int) -> Iterator[Callable[[int, int], None]]:
    """A bar for a training run of so many steps an epoch, on a terminal only: `fit(..., stepped=bar)`."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task(f"epoch 1/{epochs}", total=epochs * steps)

        def show(epoch: int, done: int) -> None:
            bars.update(task, description=f"epoch {epoch}/{epochs}", completed=(epoch - 1) * steps + done)

        yield show


def trial_table(ledger: Ledger, trials: list[Trial]) -> Table:
    """Trials with the settings that differ and the metrics of their best epoch (running ones: of the latest)."""
    names = labels(list(ledger.space.space))
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("trial")
    for path in ledger.space.space:
        table.add_column(names[path], justify="right")
    table.add_column("epoch", justify="right")
    for name in _COLUMNS:
        table.add_column(name.replace("_", " "), justify="right")
    table.add_column("state")
    for trial in trials:
        shown = trial.latest if trial.state == "running" else trial.best
        epoch = trial.epoch if trial.state == "running" else int(shown.get("epoch", trial.epoch))
        table.add_row(
            f"{trial.number:04d}",
            *(short(trial.settings.get(path)) for path in ledger.space.space),
            str(epoch),
            *(f"{shown[name]:.3f}" if name in shown else "" for name in _COLUMNS),
            Text(trial.state + (f": {trial.reason}" if trial.reason else ""), style=_STYLE[trial.state]),
        )
    return table


def table_console() -> Console:
    """Where tables go: stdout, as wide as the terminal; in a pipe no cell is cut or broken."""
    return Console(width=None if sys.stdout.isatty() else _WIDE)


def figures(metrics: Mapping[str, float]) -> str:
    """An epoch's accuracies in a line."""
    return " ".join(f"{name} {metrics[name]:.3f}" for name in _COLUMNS if name in metrics)


def short(value: Any) -> str:
    """A setting in a table; `-` for one that the trial does not have."""
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
