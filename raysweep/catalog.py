"""The published methods as compositions. A new one is a function here, named in `METHODS`.

Defaults are the papers' (G: GAIRAT, L: LRAT) for CIFAR-10; what another data set needs instead is
in `training.profiles`, and what a single table of the papers used is in `pipelines/presets`.
"""

from collections.abc import Callable

from raysweep.attacks import PGD, MinimalPerturbation
from raysweep.method import Method, Term
from raysweep.schedules import PiecewiseSchedule
from raysweep.weights import (
    GeometryWeight,
    ProbabilisticMarginWeight,
    RemainderWeight,
    VulnerabilityWeight,
    WithinMarginWeight,
)

# 0.031 is not 8/255: G trains with the one, L with the other.
GAIRAT_PGD = PGD(eps=0.031, step_size=0.007)
LRAT_PGD = PGD(eps=8 / 255, step_size=8 / 2550)
GAUSSIAN_START_PGD = PGD(eps=0.031, step_size=0.007, start="gaussian")
FAT_TAU_SCHEDULE = PiecewiseSchedule(boundaries=(40, 70), values=(0, 3, 6))


def standard() -> Method:
    """Training without an adversary: CE at natural data."""
    return Method(name="standard", terms={"natural": Term(on="natural")})


def at() -> Method:
    """Adversarial training (Madry et al. 2018): CE at PGD-10 data (G eq. 1-2)."""
    return Method(name="at", attacks={"pgd": PGD()}, terms={"pgd": Term(on="pgd")})


def fat() -> Method:
    """Friendly AT (Zhang et al. 2020): CE at early-stopped PGD-10-tau data, tau 0-3-6 at epochs 0,
    40, 70 (G C.6).
    """
    return Method(
        name="fat",
        attacks={"pgd": GAIRAT_PGD.replace(tau=FAT_TAU_SCHEDULE)},
        terms={"pgd": Term(on="pgd")},
    )


def gairat() -> Method:
    """Geometry-aware instance-reweighted AT (Zhang et al. 2021): w(kappa) CE at GA-PGD data (G eq.
    5, alg. 1-2).
    """
    return Method(
        name="gairat",
        attacks={"pgd": GAIRAT_PGD},
        terms={"pgd": Term(on="pgd", weight=GeometryWeight(lam=-1.0, burn_in=30))},
    )


def gair_fat() -> Method:
    """Geometry-aware FAT: w(kappa) CE at early-stopped data, kappa counted until the row stops (G
    alg. 3, C.6).
    """
    return Method(
        name="gair-fat",
        attacks=fat().attacks,
        terms={"pgd": Term(on="pgd", weight=GeometryWeight(lam=0.0, burn_in=70))},
    )


def trades() -> Method:
    """TRADES (Zhang et al. 2019): CE at natural data + beta KL(p(x) || p(x~)), x~ by ascent on the
    KL (L eq. 13-16).
    """
    return Method(
        name="trades",
        attacks={"kl": GAUSSIAN_START_PGD.replace(loss="kl")},
        terms={"natural": Term(on="natural"), "kl": Term(loss="kl", on="kl", coef=6.0)},
    )


def gair_trades() -> Method:
    """Geometry-aware TRADES: kappa of the KL attack weights the *natural* CE (G alg. 4-5), sums
    read as means.
    """
    return Method(
        name="gair-trades",
        attacks=trades().attacks,
        terms={
            "natural": Term(on="natural", weight=GeometryWeight(lam=-1.0, burn_in=75, by="kl")),
            "kl": Term(loss="kl", on="kl", coef=6.0),
        },
    )


def mart() -> Method:
    """MART (Wang et al. 2020): boosted CE at PGD data + beta (1 - p_y(x)) KL (G eq. 9)."""
    return Method(
        name="mart",
        attacks={"pgd": GAUSSIAN_START_PGD},
        terms={
            "pgd": Term(loss="bce", on="pgd"),
            "kl": Term(loss="kl_misclassified", on="pgd", coef=5.0),
        },
    )


def gair_mart() -> Method:
    """Geometry-aware MART: w(kappa) on the -log p_y part of the boosted CE alone (G eq. 10)."""
    return Method(
        name="gair-mart",
        attacks={"pgd": GAUSSIAN_START_PGD},
        terms={
            "pgd": Term(on="pgd", weight=GeometryWeight(lam=-1.0, burn_in=75)),
            "margin": Term(loss="margin", on="pgd"),
            "kl": Term(loss="kl_misclassified", on="pgd", coef=5.0),
        },
    )


def mart_gair_kl() -> Method:
    """MART with w(kappa) in the place of 1 - p_y(x) (G eq. 11)."""
    return Method(
        name="mart-gair-kl",
        attacks={"pgd": GAUSSIAN_START_PGD},
        terms={
            "pgd": Term(loss="bce", on="pgd"),
            "kl": Term(loss="kl", on="pgd", coef=5.0, weight=GeometryWeight(lam=-1.0, burn_in=75)),
        },
    )


def mma() -> Method:
    """Max-margin AT (Ding et al. 2020): 1/3 CE at natural data + 2/3 CE at the nearest wrong point
    within d_max.

    A row that is wrong already is its own nearest wrong point; one with none within d_max has
    weight 0.
    """
    return Method(
        name="mma",
        attacks={"minimal": MinimalPerturbation()},
        terms={
            "natural": Term(on="natural", coef=1 / 3),
            "minimal": Term(on="minimal", coef=2 / 3, weight=WithinMarginWeight()),
        },
    )


def rst() -> Method:
    """Robust self-training (Carmon et al. 2019): TRADES' loss at PGD data (G eq. 12), with
    `data.unlabeled`.
    """
    return Method(
        name="rst",
        attacks={"pgd": GAUSSIAN_START_PGD},
        terms={"natural": Term(on="natural"), "kl": Term(loss="kl", on="pgd", coef=6.0)},
    )


def gair_rst() -> Method:
    """Geometry-aware RST: beta (w KL at PGD data + (1 - w) KL at CW data) (G eq. 13), with
    `data.unlabeled`.

    w is not normalised, so that w and 1 - w share each example, as in the authors' code.
    """
    return Method(
        name="gair-rst",
        attacks={
            "pgd": GAUSSIAN_START_PGD,
            "cw": GAUSSIAN_START_PGD.replace(loss="cw"),
        },
        terms={
            "natural": Term(on="natural"),
            "kl": Term(
                loss="kl",
                on="pgd",
                coef=6.0,
                weight=GeometryWeight(lam=3.0, burn_in=100, normalise=False),
            ),
            "kl_cw": Term(
                loss="kl", on="cw", coef=6.0, weight=RemainderWeight(total=1.0, of=("kl",))
            ),
        },
    )


def lrat() -> Method:
    """Locally reweighted AT (Gao et al. 2021): g(V) CE at PGD and CW data, C - sum g at the bound's
    view (L eq. 5, 17).

    `terms.bound.on` is what L table 4 varies: natural, pgd, natural+pgd (L appendix C);
    `terms.bound.weight.total` is C, and 0 leaves the bound out.
    """
    return Method(
        name="lrat",
        attacks={"pgd": LRAT_PGD, "cw": LRAT_PGD.replace(loss="cw")},
        terms={
            "pgd": Term(on="pgd", weight=VulnerabilityWeight()),
            "cw": Term(on="cw", weight=VulnerabilityWeight()),
            "bound": Term(on="natural", weight=RemainderWeight(total=0.1, of=("pgd", "cw"))),
        },
        normalise=True,
    )


def lrat_trades() -> Method:
    """LRAT for TRADES: as `lrat`, with KL at PGD and CW data and CE at natural data (L alg. 4).

    The CE is this method's only sight of the labels, and with lrat's C = 0.1 its weight is 0: the
    same probabilities for every image then have no loss, and training ends at chance (it does, on
    digits). C = 5 is more than two weights with alpha 2 and beta 0.5 can add up to, so that natural
    data always count.
    """
    base = lrat()
    robust = {name: base.terms[name].replace(loss="kl") for name in ("pgd", "cw")}
    return Method(
        name="lrat-trades",
        attacks=base.attacks,
        terms={
            **robust,
            "bound": Term(on="natural", weight=RemainderWeight(total=5.0, of=("pgd", "cw"))),
        },
        normalise=True,
    )


def mail_at() -> Method:
    """MAIL (Wang et al. 2021) on AT: the probabilistic margin at PGD data weights their CE."""
    return Method(
        name="mail-at",
        attacks={"pgd": GAUSSIAN_START_PGD},
        terms={
            "pgd": Term(
                on="pgd", weight=ProbabilisticMarginWeight(slope=10.0, bias=-0.5, burn_in=75)
            )
        },
    )


def mail_trades() -> Method:
    """MAIL on TRADES: the probabilistic margin weights the KL term."""
    return Method(
        name="mail-trades",
        attacks=trades().attacks,
        terms={
            "natural": Term(on="natural"),
            "kl": Term(
                loss="kl",
                on="kl",
                coef=5.0,
                weight=ProbabilisticMarginWeight(slope=2.0, bias=0.0, burn_in=75),
            ),
        },
    )


def mail_mart() -> Method:
    """MAIL on MART: the probabilistic margin weights the boosted CE."""
    return Method(
        name="mail-mart",
        attacks={"pgd": GAUSSIAN_START_PGD},
        terms={
            "pgd": Term(
                loss="bce",
                on="pgd",
                weight=ProbabilisticMarginWeight(slope=1.0, bias=-1.5, burn_in=75),
            ),
            "kl": Term(loss="kl_misclassified", on="pgd", coef=5.0),
        },
    )


METHODS: dict[str, Callable[[], Method]] = {
    "standard": standard,
    "at": at,
    "fat": fat,
    "gairat": gairat,
    "gair-fat": gair_fat,
    "trades": trades,
    "gair-trades": gair_trades,
    "mart": mart,
    "gair-mart": gair_mart,
    "mart-gair-kl": mart_gair_kl,
    "mma": mma,
    "rst": rst,
    "gair-rst": gair_rst,
    "lrat": lrat,
    "lrat-trades": lrat_trades,
    "mail-at": mail_at,
    "mail-trades": mail_trades,
    "mail-mart": mail_mart,
}
