"""Check what a sweep may change when it is extended.

It may have more trials, more epochs, and other ranges that still contain the tried params. The
files of the data may move, too: `check_same_data` compares the data itself.
"""

from collections.abc import Iterator, Mapping

from raysweep.spec import SpecError, flatten_spec
from raysweep.sweep.search_space import Params, SearchSpace

CHANGEABLE_SWEEP_SETTINGS = (
    *("finalists", "base_runs", "until", "repeat"),
    *("share_prefixes", "prefix_gib", "disk_reserve_gib"),
)
"""Settings of a sweep itself that do not change what a trial is."""
KEPT_SWEEP_SETTINGS = (*CHANGEABLE_SWEEP_SETTINGS, "score_epochs", "margin_factor")
"""Settings of a sweep itself that a resumed sweep keeps unless its file or `--set` has them."""
# The same, and keys that are checked one by one.
_EXTENDABLE_KEYS = {
    *CHANGEABLE_SWEEP_SETTINGS,
    *("trials", "points_to_evaluate", "base", "space"),
}
_NEW_NAME_HINT = "choose another --name for that"


def check_extension(
    old_space: SearchSpace, new_space: SearchSpace, trial_params: Mapping[int, Params]
) -> None:
    """Check that a sweep can continue with another search space.

    Apart from more epochs, each trial must keep its training config. Its params must lie within the
    new ranges, because the sampler cannot learn from points outside its distributions.

    Args:
        old_space: The search space of the sweep.
        new_space: The search space to continue with.
        trial_params: Params of the sweep's trials, by number.

    Raises:
        SpecError: One line for each reason against the extension.
    """
    lines = [
        *_find_changed_options(old_space, new_space),
        *_find_changed_distributions(old_space, new_space),
        *new_space.find_finalist_problems(),
        *new_space.find_base_run_problems(),
        *new_space.find_until_problems(),
        *new_space.find_repeat_problems(),
    ]
    if (new_space.base_runs or 0) < (old_space.base_runs or 0):
        lines.append(
            f"base_runs = {new_space.base_runs}: the sweep has {old_space.base_runs} and can only "
            "have more"
        )
    if not lines:
        for params in ({}, *trial_params.values()):
            lines += _find_changed_config(old_space, new_space, params)
        for number, params in trial_params.items():
            lines += _find_excluded_params(new_space, number, params)
    if lines:
        raise SpecError(list(dict.fromkeys(lines)))


def _find_changed_options(old_space: SearchSpace, new_space: SearchSpace) -> Iterator[str]:
    """Yield a line for each option that differs and cannot be changed."""
    old, new = old_space.to_json_dict(), new_space.to_json_dict()
    for key in sorted(old.keys() - _EXTENDABLE_KEYS):
        if old[key] != new[key]:
            yield f"{key} = {new[key]!r}: the sweep has {old[key]!r}; {_NEW_NAME_HINT}"


def _find_changed_distributions(old_space: SearchSpace, new_space: SearchSpace) -> Iterator[str]:
    """Yield a line for each parameter that is searched in another way than before."""
    for path in sorted(old_space.space.keys() ^ new_space.space.keys()):
        change = "no longer" if path in old_space.space else "now"
        yield f"{path} is {change} searched: only its range can change; {_NEW_NAME_HINT}"
    for path in sorted(old_space.space.keys() & new_space.space.keys()):
        old, new = old_space.space[path], new_space.space[path]
        if (old.kind, old.when) != (new.kind, new.when):
            yield f"space.{path}: its kind and its `when` cannot change; {_NEW_NAME_HINT}"


def _find_changed_config(
    old_space: SearchSpace, new_space: SearchSpace, params: Params
) -> Iterator[str]:
    """Yield a line for each setting that would differ in the trial with these params; none if they
    were never valid together, so that the trial has failed.
    """
    try:
        old = flatten_spec(old_space.trial_config(params))
    except SpecError:
        return
    new = flatten_spec(new_space.trial_config(params))
    if new["epochs"] < old["epochs"]:
        yield (
            f"epochs = {new['epochs']}: the sweep has {old['epochs']} and can only have more; "
            f"{_NEW_NAME_HINT}"
        )
    for path in sorted((old.keys() | new.keys()) - {"epochs", "data.data_dir", "data.unlabeled"}):
        if old.get(path) != new.get(path):
            yield f"{path} = {new.get(path)!r}: the sweep has {old.get(path)!r}; {_NEW_NAME_HINT}"


def _find_excluded_params(
    new_space: SearchSpace, trial_number: int, params: Params
) -> Iterator[str]:
    """Yield a line for each param of the trial that the new space could not propose."""
    for path, value in params.items():
        distribution = new_space.space[path]
        if not distribution.can_propose(value):
            yield (
                f"space.{path}: {value!r} of trial {trial_number:04d} is outside "
                f"{distribution.bounds_or_choices()}; keep it inside"
            )
