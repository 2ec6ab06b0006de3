"""AutoAttack (Croce & Hein 2020a), and the other attacks that users can choose by name."""

from collections import Counter
from typing import Literal, get_args

from raysweep.attacks.apgd import APGD
from raysweep.attacks.base import Norm
from raysweep.attacks.cascade import AttackCascade, SingleAttack, build_restart_cascade
from raysweep.attacks.fab import FAB
from raysweep.attacks.multi_targeted import MultiTargeted
from raysweep.attacks.pgd import PGD
from raysweep.attacks.square import Square
from raysweep.attacks.step_size import EpsMultiple
from raysweep.schedules import resolved_value
from raysweep.spec import SpecError, describe_unknown_name

AutoAttackVersion = Literal["standard", "plus", "rand", "tf32"]


def autoattack(
    eps: float = 8 / 255, norm: Norm = "Linf", version: AutoAttackVersion = "standard"
) -> AttackCascade:
    """Return a version of AutoAttack with the attacks, order and settings of the official code.

    Args:
        eps: Radius of the ball, in pixel values.
        norm: Norm of the ball.
        version: `standard`, `plus` and `rand` as in the official code; `tf32` is `standard` with
            the attacks computed in TF32.

    Returns:
        The cascade of the version's attacks, in their official order.

    Raises:
        SpecError: If `version` is unknown, or `eps` or `norm` is invalid.
    """
    if version == "tf32":
        return autoattack(eps, norm).replace(tf32=True)
    single = _named_single_attacks(eps, norm)
    attacks: dict[str, dict[str, SingleAttack]] = {
        "standard": {name: single[name] for name in ("apgd-ce", "apgd-t", "fab-t", "square")},
        "plus": {
            "apgd-ce": APGD(eps=eps, norm=norm, loss="ce", restarts=5),
            "apgd-dlr": APGD(eps=eps, norm=norm, loss="dlr", restarts=5),
            "fab": FAB(eps=eps, norm=norm, targets=None, restarts=5),
            **{name: single[name] for name in ("square", "apgd-t", "fab-t")},
        },
        "rand": {
            "apgd-ce": APGD(eps=eps, norm=norm, loss="ce", samples=20),
            "apgd-dlr": APGD(eps=eps, norm=norm, loss="dlr", samples=20),
        },
    }
    if version not in attacks:
        raise SpecError(
            describe_unknown_name("AutoAttack version", version, get_args(AutoAttackVersion))
        )
    return AttackCascade(attacks=attacks[version])


def objective_attacks(eps: float = 8 / 255, norm: Norm = "Linf") -> dict[str, SingleAttack]:
    """Return the attacks of the sweeps' default objective, `robust_worst`, by name and in order.

    The first two are metrics of their own. The last one was chosen on a table of outcomes beside
    AutoAttack (`benchmarks/objective.md`).

    Args:
        eps: Radius of the ball, in pixel values.
        norm: Norm of the ball.

    Raises:
        pydantic.ValidationError: `eps` or `norm` is invalid.
    """
    pgd = PGD(eps=eps, norm=norm, steps=20, step_size=EpsMultiple(factor=0.25))
    return {
        "pgd": pgd,
        "cw": pgd.replace(loss="cw"),
        "multi_targeted": MultiTargeted(eps=eps, norm=norm),
    }


def build_custom_cascade(
    attack_names: list[str], eps: float = 8 / 255, norm: Norm = "Linf"
) -> AttackCascade:
    """Return a cascade of named attacks.

    Args:
        attack_names: Keys of `ATTACK_DESCRIPTIONS`, in order. `autoattack`, `objective` and `pgd+`
            are replaced by the attacks that they consist of. A repeated name is a restart with
            other random numbers: the second `square` is called `square-2`.
        eps: Radius of the ball, in pixel values.
        norm: Norm of the ball.

    Returns:
        The cascade of these attacks, in order.

    Raises:
        SpecError: If a name is unknown, or `attack_names` is empty.
    """
    cascades = _named_cascades(eps, norm)
    attacks_by_name = _named_single_attacks(eps, norm)
    for cascade in cascades.values():
        attacks_by_name |= cascade.attacks
    problems = [
        describe_unknown_name("attack", name, list(ATTACK_DESCRIPTIONS))
        for name in attack_names
        if name not in ATTACK_DESCRIPTIONS
    ]
    if problems or not attack_names:
        raise SpecError(problems or "a cascade needs at least one attack")
    single_names: list[str] = []
    for name in attack_names:
        single_names += cascades[name].attacks if name in cascades else [name]
    attacks: dict[str, SingleAttack] = {}
    counts: Counter[str] = Counter()
    for name in single_names:
        counts[name] += 1
        key = name if counts[name] == 1 else f"{name}-{counts[name]}"
        attacks[key] = attacks_by_name[name]
    return AttackCascade(attacks=attacks)


def _named_single_attacks(eps: float, norm: Norm) -> dict[str, SingleAttack]:
    """Return the attacks of AutoAttack and of the papers' tables by name."""
    return {
        "apgd-ce": APGD(eps=eps, norm=norm, loss="ce"),
        "apgd-t": APGD(eps=eps, norm=norm, loss="dlr-targeted"),
        "fab-t": FAB(eps=eps, norm=norm),
        "square": Square(eps=eps, norm=norm),
        "apgd-dlr": APGD(eps=eps, norm=norm, loss="dlr"),
        "apgd-cw": APGD(eps=eps, norm=norm, loss="cw"),
        "fab": FAB(eps=eps, norm=norm, targets=None),
        "pgd20": PGD(eps=eps, norm=norm, steps=20, step_size=eps / 4),
        "cw20": PGD(eps=eps, norm=norm, steps=20, step_size=eps / 4, loss="cw"),
    }


def _named_cascades(eps: float, norm: Norm) -> dict[str, AttackCascade]:
    """Return the cascades that have a name."""
    return {
        "autoattack": autoattack(eps, norm),
        "objective": AttackCascade(attacks=objective_attacks(eps, norm)),
        # G app. C counts a row as broken if any of the 5 x 40 iterates is misclassified. Therefore
        # tau = 0, which stops a row at its first misclassified iterate.
        "pgd+": build_restart_cascade(
            PGD(eps=eps, norm=norm, steps=40, step_size=0.01, tau=0), 5, "pgd+"
        ),
    }


# Attack name that `--attack` and pipelines accept -> description for `raysweep list`.
ATTACK_DESCRIPTIONS = {
    "autoattack": (
        "AutoAttack, standard version: apgd-ce, apgd-t, fab-t, square; --version selects others."
    ),
    "objective": "The default objective of sweeps: PGD-20, CW-20 and MultiTargeted.",
    "apgd-ce": "APGD on the cross-entropy, 100 steps.",
    "apgd-t": "APGD on the targeted DLR loss, 9 targets of 100 steps.",
    "apgd-dlr": "APGD on the DLR loss, 100 steps.",
    "apgd-cw": "APGD on the margin of the logits, 100 steps.",
    "fab": "FAB towards the nearest boundary, 100 steps.",
    "fab-t": "FAB towards 9 targets, 100 steps each.",
    "square": "Square: 5000 queries, no gradients.",
    "pgd20": "PGD-20 on the cross-entropy: for comparison with tables only.",
    "cw20": "PGD-20 on the margin of the logits: for comparison with tables only.",
    "pgd+": "PGD+: 5 starts of 40 steps of 0.01, evaluated after each step (G app. C).",
}


def build_named_attack(
    name: str, eps: float = 8 / 255, norm: Norm = "Linf", version: AutoAttackVersion = "standard"
) -> AttackCascade:
    """Return the cascade of one or several named attacks.

    Args:
        name: A key of `ATTACK_DESCRIPTIONS`, or several joined by commas.
        eps: Radius of the ball, in pixel values; text such as "8/255" is accepted.
        norm: Norm of the ball.
        version: Version of AutoAttack; only for the name `autoattack`.

    Returns:
        The cascade, also for a single attack.

    Raises:
        SpecError: If a name, the radius, the norm or the version is not valid.
    """
    # `from_data` parses "8/255", and rejects a wrong radius or norm with a one-line message.
    eps = resolved_value(APGD.from_data({"eps": eps, "norm": norm}).eps)
    if name == "autoattack":
        return autoattack(eps, norm, version)
    if version != "standard":
        raise SpecError(f"version {version!r} is only for autoattack: leave it out for {name!r}")
    return build_custom_cascade([part.strip() for part in name.split(",")], eps, norm)
