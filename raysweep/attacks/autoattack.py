"""AutoAttack (Croce & Hein 2020a) and the other evaluations that have a name."""

from typing import Literal, get_args

from raysweep.attacks.apgd import APGD
from raysweep.attacks.base import Norm
from raysweep.attacks.cascade import AttackCascade, SingleAttack, build_restart_cascade
from raysweep.attacks.fab import FAB
from raysweep.attacks.pgd import PGD
from raysweep.attacks.square import Square
from raysweep.schedules import resolved_value
from raysweep.spec import SpecError, describe_unknown_name

AutoAttackVersion = Literal["standard", "plus", "rand", "tf32"]


def autoattack(
    eps: float = 8 / 255, norm: Norm = "Linf", version: AutoAttackVersion = "standard"
) -> AttackCascade:
    """The attacks of an official version, in its order and with its settings; `tf32`: the
    standard's, in TF32.
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


def build_custom_cascade(
    attack_names: list[str], eps: float = 8 / 255, norm: Norm = "Linf"
) -> AttackCascade:
    """A cascade of one's own from names in `ATTACKS`; `autoattack` stands for the attacks of its
    standard version.

    A name again is a restart: `square` and then `square-2`, each with random numbers of its own.
    """
    single, several = _named_single_attacks(eps, norm), _named_cascades(eps, norm)
    known = single | {
        name: attack for cascade in several.values() for name, attack in cascade.attacks.items()
    }
    problems = [
        describe_unknown_name("attack", name, list(ATTACK_DESCRIPTIONS))
        for name in attack_names
        if name not in ATTACK_DESCRIPTIONS
    ]
    if problems or not attack_names:
        raise SpecError(problems or "a cascade needs at least one attack")
    attack_names = [
        part
        for name in attack_names
        for part in (several[name].attacks if name in several else [name])
    ]
    times = [attack_names[: i + 1].count(name) for i, name in enumerate(attack_names)]
    return AttackCascade(
        attacks={
            name if n == 1 else f"{name}-{n}": known[name]
            for name, n in zip(attack_names, times, strict=True)
        }
    )


def _named_single_attacks(eps: float, norm: Norm) -> dict[str, SingleAttack]:
    """Official attacks, and those of the papers' tables."""
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
    return {
        "autoattack": autoattack(eps, norm),
        # tau 0: right after every one of the 5 x 40 steps (G app. C).
        "pgd+": build_restart_cascade(
            PGD(eps=eps, norm=norm, steps=40, step_size=0.01, tau=0), 5, "pgd+"
        ),
    }


# What `--attack` and pipelines know by name.
ATTACK_DESCRIPTIONS = {
    "autoattack": "AutoAttack's standard version: apgd-ce, apgd-t, fab-t and square; --version names others.",
    "apgd-ce": "APGD on the cross-entropy, 100 steps.",
    "apgd-t": "APGD on the targeted DLR loss, 9 targets of 100 steps.",
    "apgd-dlr": "APGD on the DLR loss, 100 steps.",
    "apgd-cw": "APGD on the margin of the logits, 100 steps.",
    "fab": "FAB: the nearest boundary, 100 steps.",
    "fab-t": "FAB towards 9 targets, 100 steps each.",
    "square": "Square: 5000 queries, no gradients.",
    "pgd20": "PGD-20 on the cross-entropy: for comparison with tables only, as the next two.",
    "cw20": "PGD-20 on the margin of the logits.",
    "pgd+": "PGD+: 5 starts of 40 steps of 0.01, judged after each step (G app. C).",
}


def attack_by_name(
    name: str, eps: float = 8 / 255, norm: Norm = "Linf", version: AutoAttackVersion = "standard"
) -> AttackCascade:
    """The evaluation of a name in `ATTACKS`; names joined by commas make a cascade of one's own
    (see `custom`).

    version: of AutoAttack alone.
    """
    # Refuses a wrong radius or norm in one line, and reads "8/255".
    eps = resolved_value(APGD.from_data({"eps": eps, "norm": norm}).eps)
    if name == "autoattack":
        return autoattack(eps, norm, version)
    if version != "standard":
        raise SpecError(f"version {version!r} is of autoattack alone: leave it out for {name!r}")
    return build_custom_cascade([part.strip() for part in name.split(",")], eps, norm)
