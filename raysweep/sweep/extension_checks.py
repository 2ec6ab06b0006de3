"""What a sweep may take over when it goes on: more trials, more epochs, other ranges that hold what
was tried.
"""

from collections.abc import Iterable, Mapping

from raysweep.spec import SpecError, flatten_spec
from raysweep.sweep.search_space import Params, SearchSpace

# Nothing of these changes what a trial is, or they are looked at one by one.
_EXTENDABLE_KEYS = {"trials", "points_to_evaluate", "base", "space", "share_prefixes", "prefix_gib"}
_NEW_NAME_HINT = "choose another --name for that"


def check_extension(
    old_space: SearchSpace, new_space: SearchSpace, trial_params: Mapping[int, Params]
) -> None:
    """Raises SpecError, one line for each reason, unless a sweep of `old` can go on as `new`.

    tried: settings of its trials by number. Each must remain the run that it is, but for more
    epochs, and lie within the new ranges: else the sampler would learn from points that its
    distributions do not have.
    """
    lines = [
        *_find_changed_options(old_space, new_space),
        *_find_changed_distributions(old_space, new_space),
    ]
    if not lines:
        for settings in ({}, *trial_params.values()):
            lines += _find_changed_config(old_space, new_space, settings)
        lines += [
            line
            for number, settings in trial_params.items()
            for line in _find_excluded_params(new_space, number, settings)
        ]
    if lines:
        raise SpecError(list(dict.fromkeys(lines)))


def _find_changed_options(old_space: SearchSpace, new_space: SearchSpace) -> Iterable[str]:
    before, after = old_space.to_json_dict(), new_space.to_json_dict()
    for key in sorted(before.keys() - _EXTENDABLE_KEYS):
        if before[key] != after[key]:
            yield f"{key} = {after[key]!r}: the sweep has {before[key]!r}; {_NEW_NAME_HINT}"


def _find_changed_distributions(old_space: SearchSpace, new_space: SearchSpace) -> Iterable[str]:
    for path in sorted(old_space.space.keys() ^ new_space.space.keys()):
        yield f"{path} is {'no longer' if path in old_space.space else 'now'} searched: only its range can change; {_NEW_NAME_HINT}"
    for path in sorted(old_space.space.keys() & new_space.space.keys()):
        one, two = old_space.space[path], new_space.space[path]
        if (one.kind, one.when) != (two.kind, two.when):
            yield f"space.{path}: its kind and its `when` cannot change; {_NEW_NAME_HINT}"


def _find_changed_config(
    old_space: SearchSpace, new_space: SearchSpace, params: Params
) -> Iterable[str]:
    """What would make the run with these settings another one."""
    before, after = (
        flatten_spec(old_space.trial_config(params)),
        flatten_spec(new_space.trial_config(params)),
    )
    if after["epochs"] < before["epochs"]:
        yield f"epochs = {after['epochs']}: the sweep has {before['epochs']} and can only have more; {_NEW_NAME_HINT}"
    for path in sorted((before.keys() | after.keys()) - {"epochs"}):
        if before.get(path) != after.get(path):
            yield f"{path} = {after.get(path)!r}: the sweep has {before.get(path)!r}; {_NEW_NAME_HINT}"


def _find_excluded_params(
    new_space: SearchSpace, trial_number: int, params: Params
) -> Iterable[str]:
    for path, value in params.items():
        if not new_space.space[path].can_propose(value):
            yield f"space.{path}: {value!r} of trial {trial_number:04d} is outside {new_space.space[path].bounds_or_choices()}; keep it inside"
