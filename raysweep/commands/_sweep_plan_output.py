"""Print the plan of a sweep for `raysweep tune --plan`."""

import json
import math
from typing import TYPE_CHECKING

from raysweep.disk_space import describe_needed_space, find_free_bytes
from raysweep.formatting import format_count, format_duration

if TYPE_CHECKING:
    from pathlib import Path

    from raysweep.spec import JsonDict
    from raysweep.sweep.plan import SweepPlan


def print_sweep_plan(
    plan: "SweepPlan", as_json: bool = False, folder: "Path | None" = None
) -> None:
    """Print a plan to stdout.

    Args:
        plan: What `raysweep.sweep.plan.plan_sweep` computed.
        as_json: Whether to print one JSON object instead of sentences.
        folder: Folder of the sweep on this machine; None for a bucket.
    """
    if as_json:
        print(json.dumps(_plan_to_json(plan, folder), indent=1))
    else:
        print("\n".join(_describe_plan(plan, folder)))


def _plan_to_json(plan: "SweepPlan", folder: "Path | None") -> "JsonDict":
    """Return the keys of `raysweep tune --plan --json`, rounded for reading."""
    return {
        "method": plan.method_name,
        "trials": plan.n_trials,
        "trials_left": plan.n_trials_left,
        "epochs_per_trial": plan.epochs_per_trial,
        "epochs_expected": plan.expected_epochs,
        "base_runs": plan.n_base_runs,
        "repeats": plan.n_repeats,
        "finalists": plan.n_finalists,
        "searched": plan.distributions,
        "train_examples": plan.n_train_examples,
        "validation_examples": plan.n_validation_examples,
        "workers_per_trial": plan.resources.workers,
        "cpus_per_trial": plan.resources.cpus,
        "gpus_per_trial": plan.resources.gpus,
        "trials_at_once": plan.concurrency,
        "seconds_per_epoch": _round_or_none(plan.seconds_per_epoch, 2),
        "trial_hours": _round_or_none(plan.remaining_trial_seconds / 3600, 3),
        "wall_hours": _round_or_none(plan.wall_seconds / 3600, 3),
        "objective_95_half_width": round(plan.objective_half_width, 4),
        "image_shape": plan.image_shape,
        "train_examples_per_class": plan.train_class_counts,
        "validation_examples_per_class": plan.validation_class_counts,
        "threat": plan.threat,
        "checkpoint_bytes": plan.checkpoint_bytes,
        "prefix_bytes": plan.prefix_bytes,
        "free_bytes": None if folder is None else find_free_bytes(folder),
        "warnings": plan.warnings,
    }


def _round_or_none(number: float, digits: int) -> float | None:
    """Round a number; None for nan."""
    return None if math.isnan(number) else round(number, digits)


def _describe_plan(plan: "SweepPlan", folder: "Path | None") -> list[str]:
    """Describe the plan in lines of at most 80 columns."""
    from raysweep.training.training_summary import wrap_plan_line

    resources = plan.resources
    trials = f"{format_count(plan.n_trials, 'trial')} of"
    if plan.has_existing_trials:
        trials = f"{plan.n_trials_left} of {plan.n_trials} trials are left:"
    epochs = format_count(plan.epochs_per_trial, "epoch")
    lines = [
        f"{trials} {plan.method_name} on {plan.dataset_name}, {epochs} each, {plan.model_name}"
    ]
    lines += plan.summary
    lines.append("searched")
    lines += [f"  {path}: {values}" for path, values in plan.ranges.items()]
    lines += [f"warning: {line}" for line in plan.warnings]
    sharing = f", shared by {resources.workers} workers" if resources.workers > 1 else ""
    lines += [
        f"95% interval of the objective: +-{plan.objective_half_width:.3f}",
        f"a trial holds {resources.cpus:g} CPU(s) and {resources.gpus:g} GPU(s){sharing}; "
        f"{plan.concurrency} run at once",
        *_describe_time(plan),
    ]
    if plan.n_base_epochs:
        runs = format_count(plan.n_base_runs, "base run")
        lines.append(
            f"of these, {format_count(plan.n_base_epochs, 'epoch')} are {runs} of "
            f"{plan.base_method_name}, with which the best trial is compared"
        )
    if plan.n_repeat_epochs:
        lines.append(
            f"of these, at most {format_count(plan.n_repeat_epochs, 'epoch')} repeat the best "
            f"trials with other seeds ({format_count(plan.n_repeats, 'repeat')})"
        )
    if plan.n_finalists:
        best = format_count(plan.n_finalists, "best trial")
        if plan.n_repeats:
            best += ", each of their seeds"
        if plan.n_base_runs:
            best += " and the base runs"
        lines.append(f"then full AutoAttack on the validation images, on the {best}")
    lines.append(describe_needed_space(plan.checkpoint_bytes, folder, plan.prefix_bytes))
    return [part for line in lines for part in wrap_plan_line(line)]


def _describe_time(plan: "SweepPlan") -> list[str]:
    """Describe the epochs of all trials and, if it is known, the time that they take."""
    from raysweep.training.training_summary import UNKNOWN_TIME

    epochs = f"about {format_count(plan.expected_epochs, 'epoch')} in all"
    if plan.expected_epochs < plan.max_epochs:
        epochs += f" ({plan.max_epochs} without early stopping)"
    if math.isnan(plan.seconds_per_epoch):
        return [f"{epochs}; {UNKNOWN_TIME}"]
    return [
        f"one epoch with validation takes about {plan.seconds_per_epoch:.1f} s, "
        "estimated from a few steps of one worker here",
        f"{epochs}: {format_duration(plan.remaining_trial_seconds)} of trials, "
        f"{format_duration(plan.wall_seconds)} from start to end",
    ]
