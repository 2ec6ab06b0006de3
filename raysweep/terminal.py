"""Progress of sweeps and training runs, and tables of trials, as text for people.

On a terminal and in a notebook the progress is a live display; in a pipe it is plain lines.
"""

import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from raysweep.formatting import format_clock, format_count
from raysweep.notebook_display import NotebookDisplay, is_notebook
from raysweep.plain_console import PlainConsole
from raysweep.sweep.epoch_counts import count_epochs
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.search_space import param_labels
from raysweep.sweep.spread_summary import (
    SpreadSummary,
    describe_settings_share,
    summarize_spread,
)
from raysweep.sweep.time_left import SweepTimer
from raysweep.sweep.trial import RunKind, Trial
from raysweep.training.epoch_progress import EpochProgress, read_epoch_progress
from raysweep.training.metric_history import EpochMetrics
from raysweep.visible_text import show_characters

_MAX_ROWS = 20
# Lines of a live display besides the rows of its table: the header and the lines below.
_OTHER_LINES = 9
_METRIC_COLUMNS = ("clean", "pgd", "cw", "robust_worst", "masking_gap")
# Titles of the columns that are left out first where all are too wide, and one after the other.
_SINGLE_ATTACK_TITLES = ("pgd", "cw")
_LESS_IMPORTANT_TITLES = ("before weights act", "masking gap", "clean")
# Width of tables in a pipe, in characters; rich's default of 80 would break their lines.
_PIPE_WIDTH = 1000
# Narrowest columns, in characters: of a metric, 0.123, and of a state, which wraps.
_METRIC_WIDTH = 5
_STATE_WIDTH = 8
_STATE_STYLES = {
    "running": "cyan",
    "finished": "green",
    "stopped": "dim",
    "failed": "red",
    "interrupted": "yellow",
}


class SweepDisplay:
    """Listener of a sweep (`SweepListener`) that shows its trials while they run."""

    def __init__(self, console: Console) -> None:
        """Prepare the display.

        Args:
            console: Where to print, usually stderr.
        """
        self._console = console
        self._live: Live | NotebookDisplay | None = None
        # Trials, base runs and repeats by their keys.
        self._runs: dict[str, Trial] = {}
        self._spread: SpreadSummary | None = None
        # Reason of a failure or restart -> the first trial that had it.
        self._trials_by_reason: dict[str, str] = {}
        self._start_time = time.monotonic()

    def announce(self, text: str) -> None:
        """Print a line about what the sweep waits for."""
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def on_sweep_start(self, ledger: Ledger, concurrency: int) -> None:
        """Print a line about the sweep; on a terminal or in a notebook, also start the table."""
        self._ledger = ledger
        self._max_epochs = ledger.space.trial_config({}).epochs
        self._runs = {run.key: run for run in ledger.load_all_runs()}
        self._timer = SweepTimer(
            ledger.space, self._max_epochs, max(concurrency, 1), list(self._runs.values())
        )
        trials = format_count(ledger.space.n_trials, "trial")
        epochs = format_count(self._max_epochs, "epoch")
        if not concurrency:
            self.announce(f"sweep {ledger.name}: all of {trials} have ended, in {ledger.path}")
            return
        self.announce(
            f"sweep {ledger.name}: {trials} of up to {epochs}, "
            f"{concurrency} at a time, in {ledger.path}"
        )
        self.announce("starting the processes of the trials ...")
        if is_notebook():
            self._live = NotebookDisplay(self._render_table)
        elif self._console.is_interactive:
            self._live = Live(
                console=self._console,
                get_renderable=self._render_table,
                refresh_per_second=2,
                transient=True,
            )
        if self._live is not None:
            self._live.start()

    def on_trial_update(self, trial: Trial, epoch_metrics: EpochMetrics | None) -> None:
        """Update the live table; in a pipe, print a line, except for a trial's first start."""
        self._update_run(trial, epoch_metrics)
        if self._live is not None and trial.state != "running":
            self._spread = self._summarize_spread()

    def on_base_run_update(self, run: Trial, epoch_metrics: EpochMetrics | None) -> None:
        """Update the live table; in a pipe, print a line, except for the run's first start."""
        self._update_run(run, epoch_metrics)

    def on_repeat_update(self, run: Trial, epoch_metrics: EpochMetrics | None) -> None:
        """Update the live table; in a pipe, print a line, except for the repeat's first start."""
        self._update_run(run, epoch_metrics)
        if self._live is not None and run.state != "running":
            # The repeat may have completed a round, and its trial has a mean over the seeds then.
            self._runs |= {trial.key: trial for trial in self._ledger.load_trials()}
            self._spread = self._summarize_spread()

    def _update_run(self, run: Trial, epoch_metrics: EpochMetrics | None) -> None:
        """Update the live table; in a pipe, print a line, except for the run's first start."""
        self._runs[run.key] = run
        if self._live is None and (
            epoch_metrics is not None or run.state != "running" or run.reason
        ):
            self.announce(self._format_trial_line(run))

    def _list_runs(self, kind: RunKind) -> list[Trial]:
        """Return the trials, the base runs or the repeats."""
        return [run for run in self._runs.values() if run.kind == kind]

    def on_finalist_update(self, trial: Trial, n_left: int) -> None:
        """Print that AutoAttack begins with a finalist, or what it found."""
        self._runs[trial.key] = trial
        if trial.robust_under_autoattack is not None:
            result = f"{trial.robust_under_autoattack:.3f} under AutoAttack"
        elif trial.finalist is not None and trial.finalist.error:
            result = f"AutoAttack failed: {trial.finalist.error}"
        else:
            result = f"AutoAttack on the validation images begins; {n_left} left to attack"
        elapsed = format_clock(time.monotonic() - self._start_time)
        self.announce(f"[{elapsed}] {self._name_trial(trial)} {result}")

    def on_sweep_end(self, ledger: Ledger, error: BaseException | None = None) -> None:
        """Remove the live table."""
        if self._live is not None:
            self._live.stop()

    def _summarize_spread(self) -> SpreadSummary | None:
        """Compare the trials that have ended, example by example."""
        ended = [trial for trial in self._list_runs("trial") if trial.best]
        return summarize_spread(self._ledger, sorted(ended, key=self._ledger.rank_trial))

    def _format_trial_line(self, trial: Trial) -> str:
        """Return a line about the trial's epoch, restart or end, with the time since the start."""
        elapsed = format_clock(time.monotonic() - self._start_time)
        head = f"[{elapsed}] {self._name_trial(trial)}"
        reason = self._format_reason(trial)
        if trial.state != "running":
            best = f", best {format_accuracies(trial.best)}" if trial.best else ""
            return f"{head} {trial.state}{reason}{best}"
        if reason:
            return f"{head} starts again after epoch {trial.epoch}{reason}"
        accuracies = format_accuracies(trial.latest)
        return f"{head} epoch {trial.epoch}/{self._max_epochs} {accuracies}"

    def _name_trial(self, trial: Trial) -> str:
        """Return what begins the lines of a trial: `trial 0003`, or `at (base) seed 0`."""
        return self._ledger.describe_row(trial) if trial.kind == "base run" else trial.title

    def _format_reason(self, trial: Trial) -> str:
        """Return `: REASON`; the number of the first trial with the same reason for others."""
        if not trial.reason:
            return ""
        first = self._trials_by_reason.setdefault(trial.reason, trial.title)
        return f": {trial.reason}" if first == trial.title else f": as {first}"

    def _render_table(self) -> "TrialTable":
        """Return a table of the running and the best ended trials, with an estimate of the end."""
        trials = self._list_runs("trial")
        base_runs, repeats = self._list_runs("base run"), self._list_runs("repeat")
        running = [trial for trial in trials if trial.state == "running"]
        ended = [trial for trial in trials if trial.state != "running"]
        ranked = sorted(ended, key=self._ledger.rank_trial)
        max_rows = _MAX_ROWS
        if self._console.is_terminal:
            max_rows = max(1, min(max_rows, self._console.height - _OTHER_LINES))
        best = ranked[: max(1, max_rows - len(running) - len(base_runs) - len(repeats))]
        rows = [*running, *best, *base_runs, *repeats]
        progress = {
            run.key: read_epoch_progress(self._ledger.run_path(run), run.epoch + 1)
            for run in rows
            if run.state == "running"
        }
        return TrialTable(
            self._ledger,
            rows,
            "\n".join(self._describe_progress(trials, base_runs, repeats)),
            spread=self._spread,
            progress={key: found for key, found in progress.items() if found is not None},
            is_live=True,
        )

    def _describe_progress(
        self, trials: list[Trial], base_runs: list[Trial], repeats: list[Trial]
    ) -> list[str]:
        """Return the lines below the live table: what is done, the best so far, what is shared."""
        space = self._ledger.space
        n_ended = sum(trial.state != "running" for trial in trials)
        elapsed = format_clock(time.monotonic() - self._start_time)
        done = f"{n_ended} of {space.n_trials} trials done in {elapsed}"
        if repeats:
            n_ended = sum(run.state != "running" for run in repeats)
            done += f", {n_ended} of {format_count(len(repeats), 'repeat')}"
        others = [*base_runs, *repeats]
        seconds = self._timer.estimate_seconds_left(trials, others)
        if seconds is not None:
            attack_seconds = self._timer.estimate_autoattack_seconds_left(trials, others)
            done += f", about {format_clock(seconds + (attack_seconds or 0))} left"
            if attack_seconds:
                done += f" with {format_clock(attack_seconds)} of AutoAttack"
            elif attack_seconds is None:
                done += " and AutoAttack"
        lines = [f"{done}; Ctrl-C stops"]
        objective = space.objectives[0]
        scored = [trial for trial in trials if objective in trial.best and trial.state != "failed"]
        if scored:
            best = min(scored, key=self._ledger.rank_trial)
            lines += [
                f"best so far: {best.title}, {space.score_name.replace('_', ' ')} "
                f"{best.score(objective):.3f} {space.describe_score_epochs(best.best['epoch'])}",
                f"  {format_params(best, param_labels(list(space.space)))}",
            ]
        counts = count_epochs([*trials, *base_runs, *repeats])
        if counts.completed:
            lines.append(str(counts))
        if self._spread is not None and self._spread.split is not None:
            lines += describe_settings_share(self._spread)
        return lines


@contextmanager
def training_progress_bar(
    console: Console, epochs: int, steps_per_epoch: int
) -> Iterator[Callable[[int, int], None]]:
    """Context manager that shows a progress bar of a training run, on a terminal only.

    Args:
        console: Console of the bar.
        epochs: Number of epochs of the run.
        steps_per_epoch: Number of optimizer steps per epoch.

    Yields:
        A function `update(epoch, step)`, to call after each step; both numbers start at 1.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    is_disabled = not console.is_interactive
    with Progress(*columns, console=console, transient=True, disable=is_disabled) as progress:
        task = progress.add_task(f"epoch 1/{epochs}", total=epochs * steps_per_epoch)

        def update(epoch: int, step: int) -> None:
            progress.update(
                task,
                description=f"epoch {epoch}/{epochs}",
                completed=(epoch - 1) * steps_per_epoch + step,
            )

        yield update


class TrialTable:
    """Table with one row for each trial: settings, state, epoch and accuracies.

    Base runs and repeats have rows, too. `score` or `score with margin` is what the sweep ranks by
    before AutoAttack, if that is not the objective of the best epoch.

    Accuracies are those of the best epoch, `best@3 of 4`: the third of four that have ended. A
    trial without a value of the objective has its last epoch, `4`. If trials have burn-ins,
    `before weights act` is what the objective reached there: adversarial training. `mean (seeds)`
    is the mean score of the trials that were repeated, and the number of their seeds. `AA` is
    the accuracy under AutoAttack of the trials that it attacked at the end of the sweep,
    `corrected` their scores, lowered by as much as AutoAttack lowers the objective: these rank the
    finalists. `like best` marks the trials that cannot be told apart from the best one.

    Where the table is too wide, the searched settings stand below it; a live table leaves them out.
    Where it is still too wide, the accuracies under single attacks are left out, and then, one
    after the other, the columns that say least about the ranking.
    """

    def __init__(
        self,
        ledger: Ledger,
        trials: list[Trial],
        caption: str | None = None,
        is_interrupted: bool = False,
        spread: SpreadSummary | None = None,
        progress: Mapping[str, EpochProgress] = MappingProxyType({}),
        is_live: bool = False,
    ) -> None:
        """Prepare the table.

        Args:
            ledger: The sweep.
            trials: Its trials in the order of the rows.
            caption: Line below the table.
            is_interrupted: Whether no process works on the trials that have not ended.
            spread: Which trials cannot be told apart; None for a table without this column.
            progress: How far running trials are in their epochs, by `Trial.key`.
            is_live: Whether the table is part of a live display, which must not be high.
        """
        self._progress = progress
        self._is_live = is_live
        self._is_interrupted = is_interrupted
        self._ledger = ledger
        self._trials = trials
        self._objective = ledger.space.objectives[0]
        self._has_burn_in = any(trial.best_in_burn_in for trial in trials)
        self._has_finalists = any(trial.robust_under_autoattack is not None for trial in trials)
        self._has_repeats = any(trial.repeats for trial in trials)
        self._has_score = any(trial.averages for trial in trials)
        self._has_corrected = self._has_score and any(
            trial.find_corrected_score(self._objective) is not None for trial in trials
        )
        self._labels = param_labels(list(ledger.space.space))
        self._spread = spread
        self.caption = caption

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Lay the table out for the width of the console."""
        table = self._build_table(list(self._labels))
        is_narrow = not self._fits(table, console, options)
        if is_narrow:
            table = self._build_narrow_table(console, options)
        yield table
        if is_narrow and not self._is_live:
            yield ""
            settings_table = self._build_settings_table()
            if not self._fits(settings_table, console, options):
                settings_table = self._build_wrapped_settings_table()
            yield settings_table
        if self.caption:
            yield Text(show_characters(self.caption, line_breaks=True), style="italic")

    def _fits(
        self,
        table: Table,
        console: Console,
        options: ConsoleOptions,
        is_state_wrapped: bool = False,
    ) -> bool:
        """Return whether the console is wide enough for a table."""
        size = console.measure(table, options=options.update(width=_PIPE_WIDTH))
        return (size.minimum if is_state_wrapped else size.maximum) <= options.max_width

    def _build_narrow_table(self, console: Console, options: ConsoleOptions) -> Table:
        """Build the table without settings, and without as many columns as are too wide."""
        omitted: list[str] = []
        for titles in ((), _SINGLE_ATTACK_TITLES):
            omitted += titles
            table = self._build_table([], omitted)
            if self._fits(table, console, options):
                return table
        # Beside a mean over seeds, the score of the first seed matters less.
        score = [self._ledger.space.score_name] if self._has_repeats else []
        optional = [*_LESS_IMPORTANT_TITLES, *score, "robust worst", "like best"]
        table = self._build_table([], omitted, has_narrow_titles=True)
        while optional and not self._fits(table, console, options, is_state_wrapped=True):
            if table.collapse_padding:
                omitted.append(optional.pop(0))
            table = self._build_table([], omitted, has_narrow_titles=True, has_narrow_gaps=True)
        return table

    def _build_table(
        self,
        paths: list[str],
        omitted: Collection[str] = (),
        has_narrow_titles: bool = False,
        has_narrow_gaps: bool = False,
    ) -> Table:
        """Build the table with the columns of some searched settings.

        Args:
            paths: The settings.
            omitted: Titles of other columns that are left out.
            has_narrow_titles: Whether each word of a title has a line of its own.
            has_narrow_gaps: Whether one space is between columns, not two.
        """
        table = Table(
            box=None, pad_edge=False, header_style="bold", collapse_padding=has_narrow_gaps
        )
        names = [self._ledger.describe_row(trial) for trial in self._trials]
        table.add_column("trial", no_wrap=True, min_width=max(map(len, ["trial", *names])))
        for path in paths:
            table.add_column(self._labels[path], justify="right")
        titles = [title for title in self._list_titles() if title not in omitted]
        cells_by_trial = [self._format_cells(trial) for trial in self._trials]
        for title in titles:
            # A title may take several lines, a cell never.
            width = max([_METRIC_WIDTH, *(len(cells[title]) for cells in cells_by_trial)])
            table.add_column(
                title.replace(" ", "\n") if has_narrow_titles else title,
                justify="right",
                min_width=max(width, *map(len, title.split())),
                no_wrap=title == "epoch",
            )
        table.add_column("state", min_width=_STATE_WIDTH)
        for name, trial, cells in zip(names, self._trials, cells_by_trial, strict=True):
            settings = [format_param(trial.params.get(path)) for path in paths]
            table.add_row(
                name,
                *settings,
                *(cells[title] for title in titles),
                self._state(trial),
            )
        return table

    def _build_settings_table(self) -> Table:
        """Build a table with a column for each of the searched settings."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("trial", no_wrap=True)
        for label in self._labels.values():
            table.add_column(label, justify="right")
        for trial in self._trials:
            if trial.kind == "trial":
                values = [format_param(trial.params.get(path)) for path in self._labels]
                table.add_row(f"{trial.number:04d}", *values)
        return table

    def _build_wrapped_settings_table(self) -> Table:
        """Build a table with all searched settings of a trial in one column, where they wrap."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("trial", no_wrap=True)
        table.add_column("settings", overflow="fold")
        for trial in self._trials:
            if trial.kind != "trial":
                continue
            table.add_row(f"{trial.number:04d}", format_params(trial, self._labels))
        return table

    def _list_titles(self) -> list[str]:
        """Return the titles of the columns between the settings and the state."""
        shown = {
            self._ledger.space.score_name: self._has_score,
            "epoch": True,
            **dict.fromkeys((name.replace("_", " ") for name in _METRIC_COLUMNS), True),
            "before weights act": self._has_burn_in,
            "mean (seeds)": self._has_repeats,
            "AA": self._has_finalists,
            "corrected": self._has_corrected,
            "like best": self._spread is not None,
        }
        return [title for title, is_shown in shown.items() if is_shown]

    def _format_cells(self, trial: Trial) -> dict[str, str]:
        """Return the cells of these columns by their titles."""
        metrics, epoch = trial.latest, str(trial.epoch)
        if "epoch" in trial.best:
            metrics = trial.best
            epoch = f"best@{int(metrics['epoch'])} of {trial.epoch}"
        own_score = replace(trial, repeats=()).averages.get(self._objective)
        mean, n_seeds = trial.score(self._objective), len(trial.trainings)
        return {
            self._ledger.space.score_name: format_metric(own_score),
            "epoch": epoch,
            **{
                name.replace("_", " "): format_metric(metrics.get(name)) for name in _METRIC_COLUMNS
            },
            "before weights act": format_metric(trial.best_in_burn_in.get(self._objective)),
            "mean (seeds)": f"{mean:.3f} ({n_seeds})" if trial.repeats else "",
            "AA": format_metric(trial.robust_under_autoattack),
            "corrected": format_metric(trial.find_corrected_score(self._objective)),
            "like best": "" if self._spread is None else self._spread.describe_mark(trial),
        }

    def _state(self, trial: Trial) -> Text:
        """Return the cell of the state, with a mark of how the best epoch was chosen."""
        reason = f": {trial.reason}" if trial.reason else ""
        choice = self._ledger.describe_choice(trial)
        mark = f", {choice}" if choice and trial.state != "running" else ""
        state = trial.describe_state(self._is_interrupted)
        style = "yellow" if mark else _STATE_STYLES[state]
        now = self._progress.get(trial.key)
        if now is not None:
            state = f"epoch {now.epoch}: {now.step / now.steps:.0%}"
        return Text(show_characters(f"{state}{mark}{reason}"), style=style)


def create_progress_console() -> Console:
    """Create a console for progress on stderr.

    Returns:
        A console with colors and live displays only if stderr is a terminal. `FORCE_COLOR` does not
        make a file one: it would get a copy of the display for every change.
    """
    return PlainConsole(stderr=True, force_terminal=None if sys.stderr.isatty() else False)


def create_table_console() -> Console:
    """Create a console for tables on stdout.

    Returns:
        A console as wide as the terminal; in a pipe so wide that cells are not cut or wrapped.
    """
    return PlainConsole(width=None if sys.stdout.isatty() else _PIPE_WIDTH)


def format_accuracies(metrics: Mapping[str, float]) -> str:
    """Format the accuracies of an epoch as one line.

    Args:
        metrics: Metrics of the epoch; those that are missing are left out.

    Returns:
        Such as `clean 0.988 pgd 0.500`.
    """
    return " ".join(f"{name} {metrics[name]:.3f}" for name in _METRIC_COLUMNS if name in metrics)


def format_param(value: Any) -> str:
    """Format a setting for a table.

    Args:
        value: Value of the setting; None if the trial does not have it.

    Returns:
        A float with three digits; `-` for None.
    """
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def format_params(trial: Trial, labels: Mapping[str, str]) -> str:
    """Format the searched settings of a trial.

    Args:
        trial: The trial.
        labels: Short names of all searched settings, by path.

    Returns:
        Such as `alpha=0.5  lr=0.1`; settings that the trial does not have are left out.
    """
    return "  ".join(
        f"{label}={format_param(trial.params.get(path))}"
        for path, label in labels.items()
        if trial.params.get(path) is not None
    )


def format_metric(value: float | None) -> str:
    """Format a metric for a table, with three digits; a missing one is empty."""
    return "" if value is None else f"{value:.3f}"
