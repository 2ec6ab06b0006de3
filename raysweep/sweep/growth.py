"""What a sweep may take over when it goes on: more trials, more epochs, other ranges that hold what was tried."""

from collections.abc import Iterable, Mapping

from raysweep.spec import SpecError, flatten
from raysweep.sweep.space import SearchSpace, Settings

# Nothing of these changes what a trial is, or they are looked at one by one.
_FREE = {"trials", "start", "base", "space", "share_prefixes", "prefix_gib"}
_ELSE = "choose another --name for that"


def check_growth(old: SearchSpace, new: SearchSpace, tried: Mapping[int, Settings]) -> None:
    """Raises SpecError, one line for each reason, unless a sweep of `old` can go on as `new`.

    tried: settings of its trials by number. Each must remain the run that it is, but for more epochs, and lie within
    the new ranges: else the sampler would learn from points that its distributions do not have.
    """
    lines = [*_judgement(old, new), *_searched(old, new)]
    if not lines:
        for settings in ({}, *tried.values()):
            lines += _run(old, new, settings)
        lines += [line for number, settings in tried.items() for line in _outside(new, number, settings)]
    if lines:
        raise SpecError(list(dict.fromkeys(lines)))


def _judgement(old: SearchSpace, new: SearchSpace) -> Iterable[str]:
    before, after = old.json_dict(), new.json_dict()
    for key in sorted(before.keys() - _FREE):
        if before[key] != after[key]:
            yield f"{key} = {after[key]!r}: the sweep has {before[key]!r}; {_ELSE}"


def _searched(old: SearchSpace, new: SearchSpace) -> Iterable[str]:
    for path in sorted(old.space.keys() ^ new.space.keys()):
        yield f"{path} is {'no longer' if path in old.space else 'now'} searched: only its range can change; {_ELSE}"
    for path in sorted(old.space.keys() & new.space.keys()):
        one, two = old.space[path], new.space[path]
        if (one.kind, one.when) != (two.kind, two.when):
            yield f"space.{path}: its kind and its `when` cannot change; {_ELSE}"


def _run(old: SearchSpace, new: SearchSpace, settings: Settings) -> Iterable[str]:
    """What would make the run with these settings another one."""
    before, after = flatten(old.config(settings)), flatten(new.config(settings))
    if after["epochs"] < before["epochs"]:
        yield f"epochs = {after['epochs']}: the sweep has {before['epochs']} and can only have more; {_ELSE}"
    for path in sorted((before.keys() | after.keys()) - {"epochs"}):
        if before.get(path) != after.get(path):
            yield f"{path} = {after.get(path)!r}: the sweep has {before.get(path)!r}; {_ELSE}"


def _outside(new: SearchSpace, number: int, settings: Settings) -> Iterable[str]:
    for path, value in settings.items():
        if not new.space[path].holds(value):
            yield f"space.{path}: {value!r} of trial {number:04d} is outside {new.space[path].ends()}; keep it inside"
