"""Attacks of the default objective of new training runs and sweeps.

The defaults of `Validation` itself are those of raysweep 0.1 and must not change: sweeps store only
what differs from them, so a sweep of 0.1 keeps its objective when it resumes.
"""

import copy
import functools
from collections.abc import Mapping
from typing import Any

from raysweep.attacks import objective_attacks
from raysweep.spec import JsonDict
from raysweep.training.validation import Validation

# Name of an attack of `Validation.finish` that only the objective of 0.1 has.
_FORMER_ATTACK_PATH = "validation.finish.apgd_t"
FORMER_OBJECTIVE: Mapping[str, Any] = {f"{_FORMER_ATTACK_PATH}.steps": 20}
"""A setting that selects the objective of 0.1 and changes nothing of it."""


def find_objective_defaults(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Find the settings of the default objective.

    Args:
        changes: Settings that users wrote, by dotted path.

    Returns:
        Dotted path -> value. {} if `changes` has a setting of the last attack of 0.1: who wrote it
        means the objective of 0.1, which `Validation` has.
    """
    names_former = any(
        path == _FORMER_ATTACK_PATH or path.startswith(f"{_FORMER_ATTACK_PATH}.")
        for path in changes
    )
    if names_former:
        return {}
    return copy.deepcopy(_build_settings())


@functools.cache
def _build_settings() -> JsonDict:
    """Return the settings by dotted path. Callers must not change the result."""
    attacks = {name: attack.to_json_dict() for name, attack in objective_attacks().items()}
    measured = Validation().attacks
    step_sizes = {
        f"validation.attacks.{name}.step_size": attacks[name]["step_size"] for name in measured
    }
    finish = {name: attack for name, attack in attacks.items() if name not in measured}
    return {"validation.finish": finish, **step_sizes}
