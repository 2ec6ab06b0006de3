"""Print the result of a sweep for `raysweep tune`."""

from __future__ import annotations

import json
import shlex
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raysweep.commands.tune import TuneRequest
    from raysweep.sweep.ledger import Ledger
    from raysweep.sweep.trial import Trial
    from raysweep.sweep.tune_callbacks import SweepEndReason
    from raysweep.tracking import Tracker

_MAX_TRIALS_PRINTED = 5


def print_sweep_result(request: TuneRequest, ledger: Ledger, tracker: Tracker) -> None:
    """Print the best trials, what they show, the epochs that sharing saved, and the next commands.

    Args:
        request: What the user asked for.
        ledger: The sweep.
        tracker: Where its records are, for the command that shows them.
    """
    from raysweep.commands.common import format_location_flags, format_ui_command
    from raysweep.result_loading import (
        describe_guessing,
        describe_masking_effect_on_ranking,
        sweep_to_json,
    )
    from raysweep.sweep.conclusions import describe_conclusions
    from raysweep.sweep.epoch_counts import count_epochs
    from raysweep.sweep.trial_advice import advise_on_trial

    if request.as_json:
        print(json.dumps(sweep_to_json(ledger), indent=1))
        return
    ranked, trials = ledger.rank_trials(), ledger.load_trials()
    best = ledger.find_best_trial()
    if best is None:
        return
    _print_best_trials(ledger, ranked, len(trials))
    for line in [
        *describe_conclusions(ledger),
        *describe_guessing(ledger),
        *describe_masking_effect_on_ranking(ledger),
    ]:
        print(line)
    for line in advise_on_trial(ledger, best.number):
        print(f"trial {best.number:04d}: {line}")
    print(count_epochs(ledger.load_all_runs()))
    flags = format_location_flags(request.out, request.storage)
    print(f"\nbest checkpoint\n  {ledger.best_checkpoint_path(best)}")
    print(f"next\n  raysweep eval {ledger.name}/{best.number:04d}{flags}")
    print(f"  raysweep show {ledger.name}{flags}\n  {format_ui_command(tracker.uri)}")
    print(f"charts\n  {tracker.find_chart_url(ledger.key, ledger.space.objectives[0])}")


def _print_best_trials(ledger: Ledger, ranked: list[Trial], n_trials: int) -> None:
    """Print a table of the best trials: the Pareto front if there are several objectives."""
    from raysweep.sweep.finalist_summary import describe_ranking
    from raysweep.sweep.spread_summary import summarize_spread
    from raysweep.terminal import TrialTable, create_table_console

    objectives = ledger.space.objectives
    names = [name.replace("_", " ") for name in objectives]
    if len(objectives) > 1:
        best = ledger.unmasked_pareto_front()
        front = f"the Pareto front of {' and '.join(names)}"
        print(f"\n{len(best)} of {n_trials} trials on {front}")
    else:
        best = ranked[:_MAX_TRIALS_PRINTED]
        print(f"\nbest {len(best)} of {n_trials} trials by {describe_ranking(ledger)}")
    rows = [*best, *ledger.load_base_runs(), *ledger.load_repeats()]
    table = TrialTable(ledger, rows, spread=summarize_spread(ledger))
    create_table_console().print(table)


def report_sweep_end(request: TuneRequest, ledger: Ledger, end_reason: SweepEndReason) -> None:
    """Print how to resume a sweep whose budget is spent.

    Args:
        request: What the user asked for.
        ledger: The sweep.
        end_reason: Why the sweep ended.

    Raises:
        WorkInterrupted: The sweep was interrupted.
        WorkFailed: No trial has a result, and some failed.
    """
    from raysweep.commands.common import format_location_flags
    from raysweep.errors import WorkFailed, WorkInterrupted
    from raysweep.formatting import format_count
    from raysweep.sweep.conclusions import describe_complete_failure

    trials = ledger.load_trials()
    if end_reason != "done":
        n_ended = sum(trial.state != "running" for trial in trials)
        location = format_location_flags(request.out, request.storage)
        resources = _format_resume_flags(request)
        done = f"{n_ended} of {ledger.space.n_trials} trials done"
        if n_base_runs := ledger.count_base_runs_left():
            done += f", {format_count(n_base_runs, 'base run')} left"
        if n_repeats := ledger.count_repeats_left():
            done += f", {format_count(n_repeats, 'repeat')} left"
        if n_waiting := len(ledger.find_waiting_finalists()):
            done += f", AutoAttack on {format_count(n_waiting, 'finalist')} is left"
        progress = (
            f"{done}; resume with\n  raysweep tune --resume {ledger.name}{location}{resources}"
        )
        if end_reason == "interrupted":
            raise WorkInterrupted(progress)
        print(f"raysweep: {progress}", file=sys.stderr)
    if failure := describe_complete_failure(ledger):
        raise WorkFailed(failure)


def _format_resume_flags(request: TuneRequest) -> str:
    """Return the flags that a sweep's folder does not store, with a space before each."""
    from raysweep.redaction import redact_secrets

    flags = []
    if request.address:
        flags.append(f"--address {shlex.quote(redact_secrets(request.address))}")
    if request.workers > 1:
        flags.append(f"--workers {request.workers}")
    if request.cpus_per_trial != 1:
        flags.append(f"--cpus-per-trial {request.cpus_per_trial:g}")
    if request.gpus_per_trial is not None:
        flags.append(f"--gpus-per-trial {request.gpus_per_trial:g}")
    if request.optuna_url:
        flags.append(f"--optuna {shlex.quote(redact_secrets(request.optuna_url))}")
    return "".join(f" {flag}" for flag in flags)
