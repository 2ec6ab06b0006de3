"""Losses: every equation against a transcription, and whole training steps against the authors'
code.
"""

import math

import pytest
import torch
from oracle import stored
from torch.nn.functional import cross_entropy

from raysweep import losses
from raysweep.catalog import METHODS
from raysweep.instance_weights import (
    GeometryWeight,
    RemainderWeight,
    VulnerabilityWeight,
    WeightInputs,
)
from raysweep.method import Method, Term
from raysweep.spec import SpecError, apply_overrides

G_ATTACK = {"*.eps": 0.031, "*.step_size": 0.007}
SHAPES = {"Tanh": "tanh", "Sigmoid": "sigmoid", "Discrete": "linear"}


def mail(name, term):
    """MAIL as its code has it: weights from the first epoch on, three times a sigmoid, not
    normalised.
    """
    path = f"terms.{term}.weight"
    return apply_overrides(
        METHODS[name](), {f"{path}.burn_in": 0, f"{path}.normalise": False, f"{path}.scale": 3.0}
    )


def gairat(key):
    lam, function = key.rsplit(".", 1)
    if function == "AT":
        return apply_overrides(METHODS["at"](), G_ATTACK)
    weight = {"burn_in": 0, "lam": float(lam.removeprefix("lam")), "shape": SHAPES[function]}
    return apply_overrides(
        METHODS["gairat"](), {f"terms.pgd.weight.{k}": v for k, v in weight.items()}
    )


def gair_rst(key):
    """GAIR-RST as its code has it: the first attack ascends the KL, not the CE that the paper
    names.
    """
    weight = {"terms.kl.weight.burn_in": 0, "terms.kl.weight.lam": float(key)}
    return apply_overrides(METHODS["gair-rst"](), {"attacks.pgd.loss": "kl", **weight})


STEPS = {
    "mart": lambda: METHODS["mart"](),
    "trades": lambda: METHODS["trades"](),
    "mail-at": lambda: mail("mail-at", "pgd"),
    "mail-trades": lambda: mail("mail-trades", "kl"),
    "mail-mart": lambda: mail("mail-mart", "pgd"),
    **{f"gair-rst.{lam}": lambda lam=lam: gair_rst(lam) for lam in ("0.0", "3.0", "100.0")},
    **{
        f"gairat.{key}": lambda key=key: gairat(key)
        for key in (
            "lam-1.0.Sigmoid",
            "lam-1.0.Tanh",
            "lam0.0.Discrete",
            "lam0.0.Tanh",
            "lamburnin.AT",
            "laminf.Tanh",
        )
    },
}


# What is stored of each step: gradients of three parameters, and the state afterwards. TRADES and
# GAIR-RST run a view twice, so that their running statistics are not ours; only GAIRAT's step was
# taken with its optimiser.
GRADIENTS = {"conv1.weight", "bn2.weight", "linear.bias"}
STATISTICS = {
    f"bn{n}.{name}"
    for n in (1, 2)
    for name in ("running_mean", "running_var", "num_batches_tracked")
}
STEPPED = {
    "conv1.weight",
    "linear.bias",
    *(f"bn{n}.{name}" for n in (1, 2) for name in ("weight", "bias")),
}


def stored_of(name):
    """What is stored of a step: loss parts, gradients, and the state afterwards."""
    if name.startswith("gairat"):
        return {"loss", "weights"}, GRADIENTS, STATISTICS | STEPPED
    if name.startswith("gair-rst"):
        return {"loss", "kappa"}, GRADIENTS, set()
    return {"loss"}, GRADIENTS, set() if name == "trades" else STATISTICS


@pytest.mark.parametrize("name", STEPS)
def test_one_step_is_the_authors(oracle, name):
    """Attack, kappa, weights, loss, gradients, and for methods that run each view once, batch norms
    and SGD's step.
    """
    data = {
        key.removeprefix(f"{name}."): value
        for key, value in stored("steps").items()
        if key.startswith(f"{name}.")
    }
    parts, gradients, state = stored_of(name)
    model = oracle.model
    parameters = dict(model.named_parameters())
    assert set(data) == {
        *parts,
        *(f"gradnorm.{key}" for key in parameters),
        *(f"grad.{key}" for key in gradients),
        *(f"after.{key}" for key in state),
    }
    step = STEPS[name]().resolve_at(0)(model, oracle.x, oracle.y, oracle.noise)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-4)
    step.loss.backward()
    torch.testing.assert_close(step.loss.detach(), data["loss"], rtol=1e-9, atol=0)
    for key, parameter in parameters.items():
        torch.testing.assert_close(
            parameter.grad.norm(), data[f"gradnorm.{key}"], rtol=1e-8, atol=1e-10
        )
    for key in gradients:
        torch.testing.assert_close(parameters[key].grad, data[f"grad.{key}"], rtol=1e-8, atol=1e-10)
    if "kappa" in parts:
        assert torch.equal(step.attack_results["pgd"].kappa, data["kappa"])
    if "weights" in parts:
        weight = step.weights["pgd"] / step.weights["pgd"].mean()
        torch.testing.assert_close(weight, data["weights"].double(), rtol=1e-9, atol=1e-12)
    if state >= STEPPED:
        optimizer.step()
    for key in state:
        torch.testing.assert_close(
            model.state_dict()[key], data[f"after.{key}"], rtol=1e-9, atol=1e-12
        )


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    adversarial, natural = (
        torch.randn(16, 10, generator=generator, dtype=torch.float64) * 3 for _ in range(2)
    )
    return adversarial, natural, torch.randint(10, (16,), generator=generator)


def probabilities(logits):
    e = (logits - logits.amax(1, keepdim=True)).exp()
    return e / e.sum(1, keepdim=True)


def test_transcriptions(logits):
    """G eq. 1, 9 and L eq. 16, class by class."""
    adversarial, natural, y = logits
    p, q = probabilities(adversarial), probabilities(natural)
    for i in range(len(y)):
        true = int(y[i])
        others = [k for k in range(10) if k != true]
        ce = -math.log(p[i, true])
        margin = -math.log(1 - max(p[i, k] for k in others) + 1e-4)
        kl = sum(q[i, k] * math.log(q[i, k] / p[i, k]) for k in range(10)).item()
        assert losses.cross_entropy(*logits)[i].item() == pytest.approx(ce, rel=1e-12)
        assert losses.mart_margin(*logits)[i].item() == pytest.approx(margin, rel=1e-9)
        assert losses.boosted_cross_entropy(*logits)[i].item() == pytest.approx(
            ce + margin, rel=1e-9
        )
        assert losses.kl_divergence(*logits)[i].item() == pytest.approx(kl, rel=1e-9)
        assert losses.misclassification_weighted_kl(*logits)[i].item() == pytest.approx(
            kl * (1 - q[i, true].item()), rel=1e-5
        )


@pytest.mark.parametrize("name", losses.LOSSES)
def test_contract(logits, name):
    """(N,), finite and differentiable, even at logits that saturate the softmax; kl(x, x) = 0."""
    adversarial, natural, y = logits
    for scale in (1.0, 100.0):
        view = (adversarial * scale).requires_grad_()
        loss = losses.LOSSES[name](view, natural * scale, y)
        assert loss.shape == (16,)
        loss.sum().backward()
        assert loss.isfinite().all()
        assert view.grad.isfinite().all()
    if name.startswith("kl"):
        assert losses.LOSSES[name](natural, natural, y).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        # sigma(2 x 5), sigma(0), sigma(2 x -5), for (1 + tanh(a)) / 2 = sigma(2 a); then sigma(5),
        # sigma(0), sigma(-5).
        ("tanh", [0.9999546021312976, 0.5, 4.5397868702434395e-05]),
        ("sigmoid", [0.9933071490757153, 0.5, 0.0066928509242848554]),
    ],
)
def test_official_geometry_weights_of_an_attack_of_two_steps(shape, expected):
    """h = floor(2 / 2) = 1: the fewest steps that the authors' code accepts; there it equals the
    paper's formula.
    """
    kappa = torch.arange(3)
    look = WeightInputs(
        torch.zeros(3, 4, dtype=torch.float64),
        torch.zeros(3, dtype=torch.int64),
        kappa,
        attack_steps=2,
    )
    for official in (True, False):
        assert GeometryWeight(shape=shape, official=official)(look).tolist() == pytest.approx(
            expected, rel=1e-12
        )
    method = apply_overrides(
        METHODS["gairat"](), {"attacks.pgd.steps": 2, "terms.pgd.weight.official": True}
    )
    assert method.terms["pgd"].weight.official
    with pytest.raises(SpecError, match=r"floor\(steps / 2\): attacks.pgd.steps must be 2 or more"):
        apply_overrides(method, {"attacks.pgd.steps": 1})


class Views(torch.nn.Module):
    """Stands for a network: the 'image' of row i says which stored logits it has."""

    def __init__(self, tables):
        super().__init__()
        self.tables = torch.nn.Parameter(tables)

    def forward(self, x):
        return self.tables[x[:, 0, 0, 0].long(), x[:, 0, 0, 1].long()]


def lrat_loss(data, key, method):
    """The method's loss on stored logits of natural, PGD and CW data: attacks are replaced by
    tables.
    """
    names = ("nat", "pgd", "cw")
    tables = torch.stack([data[f"{key}.logits_{n}"] for n in names])
    y = data[f"{key}.y"]
    model = Views(tables)

    def images(view):
        x = torch.zeros(len(y), 1, 1, 2, dtype=torch.float64)
        x[:, 0, 0, 0], x[:, 0, 0, 1] = names.index(view), torch.arange(len(y))
        return x

    from raysweep.attacks.base import AttackResult
    from raysweep.attacks.pgd import PGD

    class Table(PGD):
        def __call__(self, model, x, y, rng):
            return AttackResult(images("cw" if self.loss == "cw" else "pgd"), torch.zeros_like(y))

    attacks = {name: Table(loss=attack.loss) for name, attack in method.attacks.items()}
    method = method.model_copy(update={"attacks": attacks})
    from oracle import Noise

    return method(model, images("nat"), y, Noise())


def lrat(alpha, beta, c, on="natural", normalise=False, loss="ce"):
    weight = VulnerabilityWeight(alpha=alpha, beta=beta)
    return Method(
        attacks=METHODS["lrat"]().attacks,
        terms={
            "pgd": Term(on="pgd", loss=loss, weight=weight),
            "cw": Term(on="cw", loss=loss, weight=weight),
            "bound": Term(on=on, weight=RemainderWeight(total=c, of=("pgd", "cw"))),
        },
        normalise=normalise,
    )


def test_lrat_with_the_papers_settings():
    """L eq. 5 and 17 with alpha 2, beta 0.5, C 0.1 on attacked logits."""
    data = stored("lrat")
    for normalise, key in ((False, "loss_raw"), (True, "loss_normalised")):
        step = lrat_loss(data, "1", lrat(2.0, 0.5, 0.1, normalise=normalise))
        torch.testing.assert_close(step.loss.detach(), data[f"1.{key}"], rtol=1e-12, atol=0)
    for term, key in (("pgd", "w_pgd"), ("cw", "w_cw"), ("bound", "w_nat")):
        torch.testing.assert_close(step.weights[term], data[f"1.{key}"], rtol=1e-10, atol=1e-12)
    both = lrat_loss(data, "1", lrat(2.0, 0.5, 0.1, on="natural+pgd"))
    torch.testing.assert_close(
        both.loss.detach(), data["1.loss_natural_term_is_nat_plus_pgd_raw"], rtol=1e-12, atol=0
    )


@pytest.mark.parametrize(
    ("alpha", "beta", "c"), [(2.0, 0.5, 0.1), (2.0, 0.5, 0.6), (1.5, 1.5, 0.2), (0.25, 4.0, 0.4)]
)
def test_lrat_formulas_where_the_bound_acts(alpha, beta, c):
    """L eq. 5, 7-10, 17, appendix C's variants of the bound, and algorithm 4, in float64."""
    data, key = stored("lrat"), f"2.a{alpha}.b{beta}.C{c}"
    variants = {
        "lrat_loss_raw": {},
        "lrat_loss_normalised_eq17": {"normalise": True},
        "lrat_loss_natterm_pgd_raw": {"on": "pgd"},
        "lrat_loss_natterm_nat_plus_pgd_raw": {"on": "natural+pgd"},
        "lrat_trades_loss_raw": {"loss": "kl"},
    }
    for name, settings in variants.items():
        step = lrat_loss(data, "2", lrat(alpha, beta, c, **settings))
        torch.testing.assert_close(step.loss.detach(), data[f"{key}.{name}"], rtol=1e-12, atol=0)
    total = sum(step.weights.values()).mean()
    torch.testing.assert_close(total, data[f"{key}.mean_weight_sum"], rtol=1e-12, atol=0)


def test_lrat_weights_carry_no_gradient():
    """(1 - V)^0.5 has infinite slope at V = 1: the gradient is that of the losses alone."""
    data = stored("lrat")
    step = lrat_loss(data, "2", lrat(2.0, 0.5, 0.6))
    assert not any(w.requires_grad for w in step.weights.values())
    leaves = [data[f"2.logits_{n}"].clone().requires_grad_() for n in ("nat", "pgd", "cw")]
    y = data["2.y"]
    by_hand = sum(
        (step.weights[t] * cross_entropy(v, y, reduction="none")).mean()
        for t, v in zip(("bound", "pgd", "cw"), leaves, strict=True)
    )
    torch.testing.assert_close(step.loss.detach(), by_hand.detach())
