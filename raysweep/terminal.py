"""What a person sees while a sweep or run goes on: live on a terminal, plain lines in a pipe; and
tables.
"""

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
from raysweep.formatting import format_clock, format_count
from raysweep.sweep.ledger import Ledger, Trial
from raysweep.sweep.search_space import param_labels
from raysweep.training.epoch_metrics import EpochMetrics

_MAX_ROWS = 20
_METRIC_COLUMNS = ("clean", "pgd", "cw", "robust_worst", "masking_gap")
# Of a table in a pipe: rich would break it at 80 columns.
_PIPE_WIDTH = 1000
_STATE_STYLES = {"running": "cyan", "finished": "green", "stopped": "dim", "failed": "red"}


class SweepDisplay:
    """A listener that shows each trial as it goes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._trials: dict[int, Trial] = {}
        self._began = time.monotonic()

    def on_sweep_start(self, ledger: Ledger, concurrency: int) -> None:
        self._ledger = ledger
        self._epochs = ledger.space.trial_config({}).epochs
        self._trials = {trial.number: trial for trial in ledger.load_trials()}
        self._console.print(
            f"sweep {ledger.name}: {format_count(ledger.space.n_trials, 'trial')} of up to {format_count(self._epochs, 'epoch')}, "
            f"{concurrency} at a time, in {storage.uri_of(ledger.path)}",
            highlight=False,
            soft_wrap=True,
        )
        if self._console.is_terminal:
            self._live = Live(
                console=self._console,
                get_renderable=self._render_table,
                refresh_per_second=2,
                transient=True,
            )
            self._live.start()

    def on_trial_update(self, trial: Trial, epoch_metrics: EpochMetrics | None) -> None:
        self._trials[trial.number] = trial
        if self._live is None and (
            epoch_metrics is not None or trial.state != "running" or trial.reason
        ):
            self._console.print(
                self._format_trial_line(trial), highlight=False, soft_wrap=True, markup=False
            )

    def on_sweep_end(self, ledger: Ledger) -> None:
        if self._live is not None:
            self._live.stop()

    def _format_trial_line(self, trial: Trial) -> str:
        since = format_clock(time.monotonic() - self._began)
        numbers = format_accuracies(trial.latest if trial.state == "running" else trial.best)
        reason = f": {trial.reason}" if trial.reason else ""
        if trial.state == "running" and reason:
            return (
                f"[{since}] trial {trial.number:04d} starts again after epoch {trial.epoch}{reason}"
            )
        what = (
            f"epoch {trial.epoch}/{self._epochs}"
            if trial.state == "running"
            else f"{trial.state}{reason}, best"
        )
        return f"[{since}] trial {trial.number:04d} {what} {numbers}"

    def _render_table(self) -> RenderableType:
        ended = [t for t in self._trials.values() if t.state != "running"]
        running = [t for t in self._trials.values() if t.state == "running"]
        metric = self._ledger.space.objectives[0]
        rest = sorted(ended, key=lambda t: -t.score(metric))[: max(0, _MAX_ROWS - len(running))]
        table = build_trial_table(self._ledger, [*running, *rest])
        elapsed = time.monotonic() - self._began
        left = (
            f", about {format_clock(elapsed / len(ended) * (self._ledger.space.n_trials - len(ended)))} left"
            if ended
            else ""
        )
        table.caption = f"{len(ended)} of {self._ledger.space.n_trials} trials done in {format_clock(elapsed)}{left}; Ctrl-C stops"
        return table


@contextmanager
def training_progress_bar(
    console: Console, epochs: int, steps_per_epoch: int
) -> Iterator[Callable[[int, int], None]]:
    """A bar for a training run of so many steps an epoch, on a terminal only: `fit(...,
    stepped=bar)`.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task(f"epoch 1/{epochs}", total=epochs * steps_per_epoch)

        def show(epoch: int, done: int) -> None:
            bars.update(
                task,
                description=f"epoch {epoch}/{epochs}",
                completed=(epoch - 1) * steps_per_epoch + done,
            )

        yield show


def build_trial_table(ledger: Ledger, trials: list[Trial]) -> Table:
    """Trials with the settings that differ and the metrics of their best epoch (running ones: of
    the latest).
    """
    names = param_labels(list(ledger.space.space))
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("trial")
    for path in ledger.space.space:
        table.add_column(names[path], justify="right")
    table.add_column("epoch", justify="right")
    for name in _METRIC_COLUMNS:
        table.add_column(name.replace("_", " "), justify="right")
    table.add_column("state")
    for trial in trials:
        shown = trial.latest if trial.state == "running" else trial.best
        epoch = trial.epoch if trial.state == "running" else int(shown.get("epoch", trial.epoch))
        table.add_row(
            f"{trial.number:04d}",
            *(format_param(trial.params.get(path)) for path in ledger.space.space),
            str(epoch),
            *(f"{shown[name]:.3f}" if name in shown else "" for name in _METRIC_COLUMNS),
            Text(
                trial.state + (f": {trial.reason}" if trial.reason else ""),
                style=_STATE_STYLES[trial.state],
            ),
        )
    return table


def create_table_console() -> Console:
    """Where tables go: stdout, as wide as the terminal; in a pipe no cell is cut or broken."""
    return Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH)


def format_accuracies(metrics: Mapping[str, float]) -> str:
    """An epoch's accuracies in a line."""
    return " ".join(f"{name} {metrics[name]:.3f}" for name in _METRIC_COLUMNS if name in metrics)


def format_param(value: Any) -> str:
    """A setting in a table; `-` for one that the trial does not have."""
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
