"""The published methods, composed of attacks, losses and weights.

Each function returns a method with its paper's settings for CIFAR-10. `raysweep list` prints the
first line of its docstring. To add a method, write a function here and list it in `METHODS`.
`training.dataset_defaults` replaces the radius and the step size of all attacks, so that methods
can be compared on each data set; settings of single tables and figures are in `pipelines/presets`.

Citations: G is GAIRAT (Zhang et al. 2021), L is LRAT (Gao et al. 2021). CE is the cross-entropy, KL
is KL(p(x) || p(x~)), x are natural images, x~ adversarial images.
"""

from collections.abc import Callable, Mapping

from raysweep.attacks import PGD, AnyAttack, MinimalPerturbation
from raysweep.instance_weights import (
    GeometryWeight,
    ProbabilisticMarginWeight,
    RemainderWeight,
    VulnerabilityWeight,
    WithinMarginWeight,
)
from raysweep.method import Method, Term
from raysweep.schedules import PiecewiseSchedule

# G trains with eps = 0.031 and L with eps = 8/255, which is slightly larger.
GAIRAT_PGD = PGD(eps=0.031, step_size=0.007)
LRAT_PGD = PGD(eps=8 / 255, step_size=8 / 2550)
GAUSSIAN_START_PGD = PGD(eps=0.031, step_size=0.007, start="gaussian")
FAT_TAU_SCHEDULE = PiecewiseSchedule(boundaries=(40, 70), values=(0, 3, 6))


def standard() -> Method:
    """Standard training: CE on natural images."""
    return Method(name="standard", terms={"natural": Term(on="natural")})


def at() -> Method:
    """Adversarial training, AT (Madry et al. 2018): CE on PGD-10 images (G eq. 1-2)."""
    return Method(name="at", attacks={"pgd": PGD()}, terms={"pgd": Term(on="pgd")})


def fat() -> Method:
    """Friendly AT (Zhang et al. 2020): CE on images of PGD-10 that stops early (G app. C.6).

    tau is 0, 3 and 6 from epochs 0, 40 and 70 (0-based), as in the authors' code.
    """
    return Method(
        name="fat",
        attacks={"pgd": GAIRAT_PGD.replace(tau=FAT_TAU_SCHEDULE)},
        terms={"pgd": Term(on="pgd")},
    )


def gairat() -> Method:
    """Geometry-aware instance-reweighted AT (Zhang et al. 2021): w(kappa) CE on PGD-10 images.

    G eq. 5-6, alg. 1-2.
    """
    return Method(
        name="gairat",
        attacks={"pgd": GAIRAT_PGD},
        terms={"pgd": Term(on="pgd", weight=GeometryWeight(lam=-1.0, burn_in=30))},
    )


def gair_fat() -> Method:
    """Geometry-aware FAT: w(kappa) CE on images of PGD-10 that stops early (G alg. 3, app. C.6).

    kappa counts the correct iterates until the row stops.
    """
    return Method(
        name="gair-fat",
        attacks=fat().attacks,
        terms={"pgd": Term(on="pgd", weight=GeometryWeight(lam=0.0, burn_in=70))},
    )


def trades() -> Method:
    """TRADES (Zhang et al. 2019): CE on natural images + beta KL (L eq. 13-16).

    The attack maximises the KL. beta is 6.
    """
    return Method(
        name="trades",
        attacks={"kl": GAUSSIAN_START_PGD.replace(loss="kl")},
        terms={"natural": Term(on="natural"), "kl": Term(loss="kl", on="kl", coef=6.0)},
    )


def gair_trades() -> Method:
    """Geometry-aware TRADES: w(kappa) CE on natural images + beta KL (G alg. 4-5).

    kappa is counted by the attack on the KL. G alg. 5 sums the terms over a batch; here, as in
    TRADES, they are means.
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
    """MART (Wang et al. 2020): boosted CE on PGD-10 images + beta (1 - p_y(x)) KL (G eq. 9)."""
    return Method(
        name="mart",
        attacks={"pgd": GAUSSIAN_START_PGD},
        terms={
            "pgd": Term(loss="bce", on="pgd"),
            "kl": Term(loss="kl_misclassified", on="pgd", coef=5.0),
        },
    )


def gair_mart() -> Method:
    """Geometry-aware MART: w(kappa) weights the -log p_y part of the boosted CE (G eq. 10).

    The weights act from epoch 75 onward, counted from 1 (G app. C.7).
    """
    return Method(
        name="gair-mart",
        attacks={"pgd": GAUSSIAN_START_PGD},
        terms={
            "pgd": Term(on="pgd", weight=GeometryWeight(lam=-1.0, burn_in=74)),
            "margin": Term(loss="margin", on="pgd"),
            "kl": Term(loss="kl_misclassified", on="pgd", coef=5.0),
        },
    )


def mart_gair_kl() -> Method:
    """MART with w(kappa) in place of 1 - p_y(x) (G eq. 11)."""
    return Method(
        name="mart-gair-kl",
        attacks={"pgd": GAUSSIAN_START_PGD},
        terms={
            "pgd": Term(loss="bce", on="pgd"),
            "kl": Term(loss="kl", on="pgd", coef=5.0, weight=GeometryWeight(lam=-1.0, burn_in=74)),
        },
    )


def mma() -> Method:
    """Max-margin AT (Ding et al. 2020): 1/3 natural CE + 2/3 CE on nearest misclassified images.

    The nearest misclassified point of a misclassified image is the image itself. An image without
    such a point within d_max has weight 0.
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
    """Robust self-training, RST (Carmon et al. 2019): the loss of TRADES on PGD-10 images.

    G eq. 12. Set `data.unlabeled` to train on pseudo-labelled images as well.
    """
    return Method(
        name="rst",
        attacks={"pgd": GAUSSIAN_START_PGD},
        terms={"natural": Term(on="natural"), "kl": Term(loss="kl", on="pgd", coef=6.0)},
    )


def gair_rst() -> Method:
    """Geometry-aware RST: CE + beta (w KL on PGD images + (1 - w) KL on CW images) (G eq. 13).

    w is not normalised, so that the two weights of each example add up to 1, as in the authors'
    code. Set `data.unlabeled` to train on pseudo-labelled images as well.
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
                weight=GeometryWeight(lam=3.0, burn_in=99, normalise=False),
            ),
            "kl_cw": Term(
                loss="kl", on="cw", coef=6.0, weight=RemainderWeight(total=1.0, of=("kl",))
            ),
        },
    )


def lrat() -> Method:
    """Locally reweighted AT (Gao et al. 2021): g(V) CE on PGD and CW images, and a lower bound C.

    L eq. 5 and 17. The term `bound` has the weight [C - sum of g(V)]_+. C is
    `terms.bound.weight.total`; 0 turns the bound off. L table 4 compares inputs of this term,
    `terms.bound.on`: natural, pgd and natural+pgd (L app. C).
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
    """LRAT for TRADES: g(V) KL on PGD and CW images, and CE on natural images (L alg. 4).

    Only the CE uses the labels. With C = 0.1, as in `lrat`, the weight of the CE is 0 for every
    example whose other weights sum to 0.1 or more. A model that predicts the same probabilities for
    every image then has loss 0, and accuracy falls to chance (observed on digits). Here C is 5. The
    largest sum of the two weights for alpha = 2 and beta = 0.5 is 2 + 2 sqrt(2) < 5, so the weight
    of the CE is always positive.
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
    """MAIL (Wang et al. 2021) on AT: the probabilistic margin weights the CE on PGD-10 images."""
    return Method(
        name="mail-at",
        attacks={"pgd": GAUSSIAN_START_PGD},
        terms={
            "pgd": Term(
                on="pgd", weight=ProbabilisticMarginWeight(slope=10.0, bias=-0.5, burn_in=76)
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
                weight=ProbabilisticMarginWeight(slope=2.0, bias=0.0, burn_in=76),
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
                weight=ProbabilisticMarginWeight(slope=1.0, bias=-1.5, burn_in=76),
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

BASE_METHODS: Mapping[str, str] = {
    "gairat": "at",
    "lrat": "at",
    "mail-at": "at",
    "gair-fat": "fat",
    "gair-trades": "trades",
    "lrat-trades": "trades",
    "mail-trades": "trades",
    "gair-mart": "mart",
    "mart-gair-kl": "mart",
    "mail-mart": "mart",
    "gair-rst": "rst",
}
"""Reweighting method -> the method without its instance weights, to which it is compared."""


def build_base_method(method: Method) -> Method | None:
    """Build the method that a reweighting method is compared to, at the same budget.

    It has the settings of the reweighting method wherever it has the same part: attacks of the same
    name and loss, and the factor of terms of the same name, loss and inputs. Its other attacks get
    norm, radius and steps of the method's first attack. Where the weights are still 1, in a
    burn-in, GAIRAT and MAIL then train what their base method trains.

    Args:
        method: The method; its name is looked up in `BASE_METHODS`.

    Returns:
        The base method; None if the method has none.
    """
    name = BASE_METHODS.get(method.name)
    if name is None:
        return None
    base = METHODS[name]()
    attacks = {key: _match_attack(key, attack, method) for key, attack in base.attacks.items()}
    terms = {}
    for key, term in base.terms.items():
        same = method.terms.get(key)
        if same is not None and (same.loss, same.on) == (term.loss, term.on):
            term = term.replace(coef=same.coef)
        terms[key] = term
    return base.replace(attacks=attacks, terms=terms)


def _match_attack(name: str, attack: AnyAttack, method: Method) -> AnyAttack:
    """Return an attack of a base method with the settings that a method's attacks have."""
    same = method.attacks.get(name)
    if same is not None and getattr(same, "loss", None) == getattr(attack, "loss", None):
        return same
    first = next(iter(method.attacks.values()))
    shared = ("norm", "eps", "steps", "step_size")
    return attack.replace(**{key: getattr(first, key) for key in shared if hasattr(first, key)})
