"""The published methods as compositions. A new one is a function here, named in `METHODS`.

Defaults are the papers' (G: GAIRAT, L: LRAT) for CIFAR-10; what another data set
needs instead is in `training.profiles`.
"""

from collections.abc import Callable

from raysweep.attacks import PGD
from raysweep.method import Method, Term
from raysweep.weights import Geometry, Remainder, Vulnerability


def at() -> Method:
    """Adversarial training (Madry et al. 2018): CE at PGD-10 data (G eq. 1-2)."""
    return Method(name="at", attacks={"pgd": PGD()}, terms={"pgd": Term(on="pgd")})


def gairat() -> Method:
    """Geometry-aware instance-reweighted AT (Zhang et al. 2021): w(kappa) CE at GA-PGD data (G eq. 5, alg. 1-2)."""
    return Method(
        name="gairat",
        attacks={"pgd": PGD(eps=0.031, step_size=0.007)},
        terms={"pgd": Term(on="pgd", weight=Geometry(lam=-1.0, burn_in=30))},
    )


def lrat() -> Method:
    """Locally reweighted AT (Gao et al. 2021): g(V) CE at PGD and CW data, C - sum g at the bound's view (L eq. 5, 17).

    `terms.bound.on` is what L table 4 varies: natural, pgd, natural+pgd (L appendix C); `terms.bound.weight.total`
    is C, and 0 leaves the bound out.
    """
    pgd = PGD(eps=8 / 255, step_size=8 / 2550)
    return Method(
        name="lrat",
        attacks={"pgd": pgd, "cw": pgd.model_copy(update={"loss": "cw"})},
        terms={
            "pgd": Term(on="pgd", weight=Vulnerability()),
            "cw": Term(on="cw", weight=Vulnerability()),
            "bound": Term(on="natural", weight=Remainder(total=0.1, of=("pgd", "cw"))),
        },
        normalise=True,
    )


METHODS: dict[str, Callable[[], Method]] = {"at": at, "gairat": gairat, "lrat": lrat}
