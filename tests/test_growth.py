"""Which changes a resumed sweep may have: each change by itself, and the line that refuses it."""

from typing import Any

import pytest

from raysweep.spec import SpecError
from raysweep.sweep.extension_checks import check_extension
from raysweep.sweep.search_space import SearchSpace

LR, DECAY, MOMENTUM = "optim.lr", "optim.weight_decay", "optim.momentum"
DATA: dict[str, Any] = {
    "method": "at",
    "trials": 4,
    "max_masking_gap": 0.1,
    "base": {"epochs": 8, "batch_size": 64},
    "space": {
        LR: {"float": [0.01, 0.5]},
        "optim.nesterov": {"categorical": [True, False]},
        DECAY: {"float": [0.0, 0.01], "when": {"optim.nesterov": True}},
        "seed": {"int": [0, 4]},
    },
    "points_to_evaluate": [{LR: 0.1}],
}
TRIED = {
    0: {LR: 0.1, "optim.nesterov": True, DECAY: 0.005, "seed": 0},
    7: {LR: 0.25, "optim.nesterov": False, "seed": 3},
}


def problems(changes: dict[str, Any], tried: dict[int, dict[str, Any]] | None = None) -> list[str]:
    """Why a sweep of `DATA` cannot resume with these changes; `space` and `base` are changed entry
    by entry.
    """
    data = {**DATA, **changes}
    for part in ("space", "base"):
        merged = {**DATA[part], **changes.get(part, {})}
        data[part] = {key: value for key, value in merged.items() if value is not ...}
    try:
        check_extension(
            SearchSpace.from_data(DATA),
            SearchSpace.from_data(data),
            TRIED if tried is None else tried,
        )
    except SpecError as error:
        return error.problems
    return []


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"trials": 9},
        {"trials": 1},
        {"share_prefixes": False, "prefix_gib": 1.0, "disk_reserve_gib": 0.0},
        {"points_to_evaluate": []},
        {"points_to_evaluate": [{LR: 0.2}, {"seed": 4}]},
        {"base": {"epochs": 9}},
        {"space": {LR: {"float": [0.001, 1.0]}}},
        {"space": {LR: {"float": [0.1, 0.25]}}},
        {"space": {LR: {"float": [0.01, 0.5], "log": True}}},
        {"space": {LR: {"float": [0.05, 0.5], "step": 0.05}}},
        {"space": {"seed": {"int": [0, 3], "step": 3}}},
        {"space": {"optim.nesterov": {"categorical": [False, True]}}},
    ],
    ids=str,
)
def test_changes_that_are_allowed(changes: dict[str, Any]) -> None:
    assert problems(changes) == []


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"metric": "clean"}, "metric = 'clean': the sweep has 'robust_worst'"),
        (
            {"metric": ["robust_worst", "clean"]},
            "metric = ['robust_worst', 'clean']: the sweep has 'robust_worst'",
        ),
        ({"max_masking_gap": None}, "max_masking_gap = None: the sweep has 0.1"),
        ({"method": "trades"}, "method = 'trades': the sweep has 'at'"),
        ({"sampler": {"kind": "random"}}, "sampler = "),
        ({"sampler": {"seed": 1}}, "sampler = "),
        ({"scheduler": {"grace_period": 4}}, "scheduler = "),
        ({"base": {"epochs": 7}}, "epochs = 7: the sweep has 8 and can only have more"),
        ({"base": {"batch_size": 65}}, "batch_size = 65: the sweep has 64"),
        ({"base": {MOMENTUM: 0.5}}, "optim.momentum = 0.5: the sweep has 0.9"),
        (
            {"space": {MOMENTUM: {"float": [0.0, 0.9]}}},
            "optim.momentum is now searched: only its range can change",
        ),
        ({"space": {"seed": ...}}, "seed is no longer searched: only its range can change"),
        (
            {"space": {"seed": {"categorical": [0, 3]}}},
            "space.seed: its kind and its `when` cannot change",
        ),
        (
            {"space": {DECAY: {"float": [0.0, 0.01]}}},
            f"space.{DECAY}: its kind and its `when` cannot change",
        ),
        (
            {"space": {DECAY: {"float": [0.0, 0.01], "when": {"optim.nesterov": False}}}},
            f"space.{DECAY}: its kind and its `when` cannot change",
        ),
        (
            {"space": {LR: {"float": [0.11, 0.5]}}},
            f"space.{LR}: 0.1 of trial 0000 is outside [0.11, 0.5]",
        ),
        (
            {"space": {LR: {"float": [0.01, 0.2]}}},
            f"space.{LR}: 0.25 of trial 0007 is outside [0.01, 0.2]",
        ),
        (
            {"space": {LR: {"float": [0.01, 0.5], "step": 0.02}}},
            f"space.{LR}: 0.1 of trial 0000 is outside [0.01, 0.5]",
        ),
        (
            {"space": {"seed": {"int": [0, 4], "step": 2}}},
            "space.seed: 3 of trial 0007 is outside [0, 4]",
        ),
        (
            {"space": {"optim.nesterov": {"categorical": [False]}}},
            "space.optim.nesterov: True of trial 0000 is outside [False]",
        ),
    ],
    ids=str,
)
def test_changes_that_are_refused(changes: dict[str, Any], line: str) -> None:
    found = problems(changes)
    assert len(found) == 1 and found[0].startswith(line)


def test_without_trials_any_range_is_allowed_and_other_changes_are_not() -> None:
    assert problems({"space": {LR: {"float": [0.3, 0.4]}, "seed": {"int": [5, 9]}}}, {}) == []
    assert len(problems({"base": {"epochs": 7}}, {})) == 1


def test_all_reasons_come_at_once_and_each_once() -> None:
    lines = problems(
        {
            "metric": "clean",
            "scheduler": {"grace_period": 4},
            "space": {"seed": ..., MOMENTUM: {"float": [0, 0.5]}},
        }
    )
    assert [line.split()[0] for line in lines] == ["metric", "scheduler", "optim.momentum", "seed"]
    lines = problems(
        {"base": {"epochs": 7, "batch_size": 65}, "space": {LR: {"float": [0.11, 0.2]}}}
    )
    assert [line.split(":")[0] for line in lines] == [
        "epochs = 7",
        "batch_size = 65",
        f"space.{LR}",
        f"space.{LR}",
    ]


def test_a_base_setting_that_only_some_trials_use_cannot_change() -> None:
    """Trials in which the decay is not searched have that of the base."""
    (line,) = problems({"base": {DECAY: 0.002}})
    assert line.startswith(f"{DECAY} = 0.002: the sweep has 0.0005")


def test_a_number_cannot_become_a_schedule() -> None:
    """This removes one setting and adds others, though none changes its value."""
    schedule = {"kind": "piecewise", "boundaries": [4], "values": [0.002, 0.001]}
    lines = problems({"base": {"method.attacks.pgd.step_size": schedule}})
    assert any(
        line.startswith("method.attacks.pgd.step_size = None: the sweep has ") for line in lines
    )
    assert any(
        line.startswith("method.attacks.pgd.step_size.kind = 'piecewise': the sweep has None")
        for line in lines
    )
