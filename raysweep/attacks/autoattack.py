"""AutoAttack (Croce & Hein 2020a) and the other evaluations that have a name."""

from collections.abc import Callable
from typing import Literal, get_args

from raysweep.attacks.apgd import APGD
from raysweep.attacks.base import Norm
from raysweep.attacks.fab import FAB
from raysweep.attacks.pgd import PGD
from raysweep.attacks.square import Square
from raysweep.attacks.worst_case import SingleAttack, WorstCase, restarts
from raysweep.spec import SpecError, unknown_name

Version = Literal["standard", "plus", "rand"]


def autoattack(eps: float = 8 / 255, norm: Norm = "Linf", version: Version = "standard") -> WorstCase:
    """The attacks of an official version, in its order and with its settings."""
    attacks: dict[str, dict[str, SingleAttack]] = {
        "standard": {
            "apgd-ce": APGD(eps=eps, norm=norm, loss="ce"),
            "apgd-t": APGD(eps=eps, norm=norm, loss="dlr-targeted"),
            "fab-t": FAB(eps=eps, norm=norm),
            "square": Square(eps=eps, norm=norm),
        },
        "plus": {
            "apgd-ce": APGD(eps=eps, norm=norm, loss="ce", restarts=5),
            "apgd-dlr": APGD(eps=eps, norm=norm, loss="dlr", restarts=5),
            "fab": FAB(eps=eps, norm=norm, targets=None, restarts=5),
            "square": Square(eps=eps, norm=norm),
            "apgd-t": APGD(eps=eps, norm=norm, loss="dlr-targeted"),
            "fab-t": FAB(eps=eps, norm=norm),
        },
        "rand": {
            "apgd-ce": APGD(eps=eps, norm=norm, loss="ce", samples=20),
            "apgd-dlr": APGD(eps=eps, norm=norm, loss="dlr", samples=20),
        },
    }
    if version not in attacks:
        raise SpecError(unknown_name("AutoAttack version", version, get_args(Version)))
    return WorstCase(attacks=attacks[version])


def custom(names: list[str], eps: float = 8 / 255, norm: Norm = "Linf") -> WorstCase:
    """A cascade of one's own from the names of official attacks; `autoattack` stands for those of its standard version.

    A name again is a restart: `square` and then `square-2`, each with random numbers of its own.
    """
    standard = autoattack(eps, norm, "standard").attacks
    known = standard | {
        "apgd-dlr": APGD(eps=eps, norm=norm, loss="dlr"),
        "apgd-cw": APGD(eps=eps, norm=norm, loss="cw"),
        "fab": FAB(eps=eps, norm=norm, targets=None),
    }
    names = [part for name in names for part in (standard if name == "autoattack" else [name])]
    problems = [unknown_name("attack", name, list(known)) for name in names if name not in known]
    if problems or not names:
        raise SpecError(problems or "a cascade needs at least one attack")
    times = [names[: i + 1].count(name) for i, name in enumerate(names)]
    return WorstCase(
        attacks={name if n == 1 else f"{name}-{n}": known[name] for name, n in zip(names, times, strict=True)}
    )


PRESETS: dict[str, Callable[[float, Norm], WorstCase]] = {
    "autoattack": autoattack,
    "pgd20": lambda eps, norm: WorstCase(attacks={"pgd20": PGD(eps=eps, norm=norm, steps=20, step_size=eps / 4)}),
    "cw20": lambda eps, norm: WorstCase(
        attacks={"cw20": PGD(eps=eps, norm=norm, steps=20, step_size=eps / 4, loss="cw")}
    ),
    # tau 0: right after every one of the 5 x 40 steps (G app. C).
    "pgd+": lambda eps, norm: restarts(PGD(eps=eps, norm=norm, steps=40, step_size=0.01, tau=0), 5, "pgd+"),
    "apgd-ce": lambda eps, norm: custom(["apgd-ce"], eps, norm),
    "apgd-t": lambda eps, norm: custom(["apgd-t"], eps, norm),
    "square": lambda eps, norm: custom(["square"], eps, norm),
}


def preset(name: str, eps: float = 8 / 255, norm: Norm = "Linf", version: Version = "standard") -> WorstCase:
    """The named evaluation; names of official attacks joined by commas make a cascade of one's own (see `custom`)."""
    # Refuses a wrong radius or norm in one line.
    APGD.load({"eps": eps, "norm": norm})
    if name == "autoattack":
        return autoattack(eps, norm, version)
    if name in PRESETS:
        return PRESETS[name](eps, norm)
    if "," in name:
        return custom([part.strip() for part in name.split(",")], eps, norm)
    raise SpecError(unknown_name("attack", name, list(PRESETS)))
