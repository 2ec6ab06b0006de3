"""Every method of the catalog: identities between methods, one step each, JSON and YAML."""

import math

import pytest
import torch
import yaml

from raysweep.catalog import METHODS
from raysweep.method import Method
from raysweep.models import ModelSpec
from raysweep.rng import ExampleRng
from raysweep.spec import SpecError, apply_overrides
from raysweep.training.config import TrainingConfig, build_training_config

# The rows of the table of methods; a method that is added or renamed is meant to change this list.
NAMES = [
    "standard",
    "at",
    "fat",
    "gairat",
    "gair-fat",
    "trades",
    "gair-trades",
    "mart",
    "gair-mart",
    "mart-gair-kl",
    "mma",
    "rst",
    "gair-rst",
    "lrat",
    "lrat-trades",
    "mail-at",
    "mail-trades",
    "mail-mart",
]


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(3)
    return torch.rand(24, 1, 8, 8, generator=generator), torch.randint(
        10, (24,), generator=generator
    )


def step(method, batch, epoch=0):
    """Loss, gradients and the step's record, from the same weights and the same random starts."""
    x, y = batch
    model = ModelSpec().build_model(1, 10, seed=0)
    result = method.resolve_at(epoch)(model, x, y, ExampleRng.for_examples(torch.arange(len(y)), 0))
    result.loss.backward()
    return result, [p.grad for p in model.parameters()]


def same_step(first, second, batch, epoch=0, exact=True):
    (a, grads_a), (b, grads_b) = step(first, batch, epoch), step(second, batch, epoch)
    close = torch.equal if exact else lambda u, v: torch.allclose(u, v, rtol=1e-5, atol=1e-7)
    return close(a.loss, b.loss) and all(close(u, v) for u, v in zip(grads_a, grads_b, strict=True))


def weight(method, term, **changes):
    return apply_overrides(
        method, {f"terms.{term}.weight.{key}": value for key, value in changes.items()}
    )


def test_the_catalog_is_complete():
    assert list(METHODS) == NAMES
    assert all(METHODS[name]().name == name for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("epoch", [0, 150])
def test_one_step(name, epoch, batch):
    """Finite loss, a finite gradient for every parameter, attacks within reach, and weights without
    gradient.
    """
    method = METHODS[name]()
    result, gradients = step(method, batch, epoch)
    assert result.loss.isfinite()
    assert all(g is not None and g.isfinite().all() for g in gradients)
    assert any(g.abs().max() > 0 for g in gradients)
    assert not any(w.requires_grad for w in result.weights.values())
    for key, adversarial in result.attack_results.items():
        attack = method.resolve_at(epoch).attacks[key]
        reach = getattr(attack, "eps", None) or attack.d_max
        assert (adversarial.x_adv - batch[0]).abs().max() <= reach + 1e-6
        assert adversarial.kappa is not None
        assert int(adversarial.kappa.max()) <= attack.steps


@pytest.mark.parametrize("name", NAMES)
def test_round_trips(name, batch):
    """JSON and YAML give the same method, with the same digest and the same step."""
    method = METHODS[name]()
    again = Method.from_data(method.to_json_dict())
    from_yaml = Method.from_data(
        yaml.safe_load(yaml.safe_dump(method.to_json_dict(), sort_keys=False))
    )
    assert again == method == from_yaml
    assert again.digest() == method.digest()
    assert same_step(method, again, batch, 100)
    assert (
        TrainingConfig.from_data({"method": method.to_json_dict()}).method
        == TrainingConfig.from_data({"method": name}).method
    )


@pytest.mark.parametrize("name", ["gairat", "gair-fat"])
def test_infinite_lambda_is_the_base_method(name, batch):
    """G section 3.3: lambda = inf recovers AT (FAT), bitwise; so does the burn-in."""
    method = METHODS[name]()
    base = method.model_copy(update={"terms": METHODS["at"]().terms})
    assert same_step(weight(method, "pgd", burn_in=0, lam=math.inf), base, batch)
    assert same_step(method, base, batch, epoch=10)
    assert not same_step(weight(method, "pgd", burn_in=0, lam=-1.0), base, batch)


@pytest.mark.parametrize(
    ("name", "base", "burn_in"),
    [("gair-trades", "trades", 75), ("mail-trades", "trades", 76), ("mail-mart", "mart", 76)],
)
def test_burn_in_is_the_base_method(name, base, burn_in, batch):
    method = METHODS[name]()
    plain = apply_overrides(METHODS[base](), {"terms.kl.coef": method.terms["kl"].coef})
    assert same_step(method, plain, batch, epoch=burn_in - 1)
    assert not same_step(method, plain, batch, epoch=burn_in)


def test_mail_without_slope_is_at(batch):
    """sigma(0) is one half for every row, and the mean is divided out."""
    mail = weight(METHODS["mail-at"](), "pgd", slope=0.0, burn_in=0)
    at = METHODS["mail-at"]().model_copy(update={"terms": METHODS["at"]().terms})
    assert same_step(mail, at, batch)


def test_trades_without_beta_is_standard_training(batch):
    assert same_step(
        apply_overrides(METHODS["trades"](), {"terms.kl.coef": 0.0}),
        METHODS["standard"](),
        batch,
        exact=False,
    )


def test_rst_is_trades_with_another_attack(batch):
    assert same_step(
        apply_overrides(METHODS["rst"](), {"attacks.pgd.loss": "kl"}),
        trades_with_rst_attack_name(METHODS["trades"]()),
        batch,
    )


def trades_with_rst_attack_name(trades):
    """TRADES whose attack has RST's name: random starts are keyed by it."""
    data = trades.to_json_dict()
    data["attacks"] = {"pgd": data["attacks"]["kl"]}
    data["terms"]["kl"]["on"] = "pgd"
    return Method.from_data(data)


def test_gair_mart_without_weights_is_mart(batch):
    """G eq. 9 and 10 differ by omega on -log p_y alone."""
    assert same_step(
        weight(METHODS["gair-mart"](), "pgd", burn_in=0, lam=math.inf),
        METHODS["mart"](),
        batch,
        exact=False,
    )


def test_gair_rst_shares_each_example(batch):
    """G eq. 13: w and 1 - w add up to 1; in burn-in the CW half has no weight and is left out."""
    result, _ = step(weight(METHODS["gair-rst"](), "kl", burn_in=0, lam=0.0), batch)
    torch.testing.assert_close(result.weights["kl"] + result.weights["kl_cw"], torch.ones(24))
    before, _ = step(METHODS["gair-rst"](), batch)
    assert set(before.weights) == {"natural", "kl"}


def test_lrat_bound_fills_up_to_c(batch):
    """L eq. 5: the weights of an instance add up to at least C."""
    result, _ = step(apply_overrides(METHODS["lrat"](), {"terms.bound.weight.total": 4.0}), batch)
    total = sum(result.weights.values())
    assert bool((total >= 4.0 - 1e-5).all())
    filled = result.weights["bound"] > 0
    torch.testing.assert_close(total[filled], torch.full((int(filled.sum()),), 4.0))


def test_lrat_with_one_attack_and_unit_weights_is_at(batch):
    """L section 4.2: omega = 1, C < 1, m = 1 recovers SAT."""
    data = METHODS["lrat"]().to_json_dict()
    del data["attacks"]["cw"], data["terms"]["cw"]
    data["terms"]["pgd"]["weight"] = {"kind": "uniform"}
    data["terms"]["bound"]["weight"] |= {"total": 0.9, "of": ["pgd"]}
    lrat = Method.from_data(data)
    at = lrat.model_copy(
        update={"terms": {"pgd": METHODS["at"]().terms["pgd"]}, "normalise": False}
    )
    assert same_step(lrat, at, batch, exact=False)


def test_lrat_takes_any_list_of_attacks(batch):
    data = METHODS["lrat"]().to_json_dict()
    data["attacks"]["kl"] = data["attacks"]["pgd"] | {"loss": "kl", "start": "gaussian"}
    data["terms"] = {"kl": {"on": "kl", "weight": {"kind": "vulnerability", "alpha": 1.0}}} | data[
        "terms"
    ]
    data["terms"]["bound"]["weight"]["of"] = ["pgd", "cw", "kl"]
    result, _ = step(Method.from_data(data), batch)
    assert result.loss.isfinite()
    assert set(result.weights) == {"kl", "pgd", "cw", "bound"}


def test_gairat_driven_by_cw(batch):
    """L fig. 5: kappa and data from the CW attack."""
    driven = apply_overrides(
        weight(METHODS["gairat"](), "pgd", burn_in=0), {"attacks.pgd.loss": "cw"}
    )
    assert not same_step(driven, weight(METHODS["gairat"](), "pgd", burn_in=0), batch)


def test_mma_weighs_only_rows_within_reach(batch):
    result, _ = step(METHODS["mma"](), batch)
    within = result.attack_results["minimal"].kappa < 10
    assert torch.equal(result.weights["minimal"], within.float())


INLINE = """
method:
  name: cw-gairat
  attacks:
    cw: {kind: pgd, eps: 8/255, step_size: 2/255, loss: cw}
    pgd: {kind: pgd, eps: 8/255, step_size: 2/255}
  terms:
    adversarial:
      "on": pgd + cw
      weight:
        {kind: geometry, shape: sigmoid, by: cw, burn_in: 10,
         lam: {kind: linear, first: 2, last: -1, end: 60}}
    rest: {"on": natural, weight: {kind: remainder, total: 1.0, of: [adversarial]}}
model: {name: digits_cnn}
epochs: 60
"""


def test_a_method_written_inline(batch):
    """A new combination needs YAML and no Python, and may be searched and overridden like one of
    the catalog.
    """
    config = TrainingConfig.from_data(yaml.safe_load(INLINE))
    assert config.method.attacks["cw"].eps == 8 / 255
    result, _ = step(config.method, batch, epoch=20)
    assert result.loss.isfinite()
    again = build_training_config(
        yaml.safe_load(INLINE)["method"], {"method.terms.adversarial.weight.burn_in": 2}
    )
    assert again.method.terms["adversarial"].weight.burn_in == 2
    assert (
        build_training_config(config.method.to_json_dict()).method
        == build_training_config(yaml.safe_load(INLINE)["method"]).method
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"terms.pgd.on": "pdg"}, "pgd"),
        ({"terms.pgd.weight.by": "natural"}, "kappa"),
        ({"terms.pgd.weight.lamb": 1}, "lam"),
        ({"attacks.pgd.kind": "pdg"}, "pgd"),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(SpecError, match=message):
        apply_overrides(METHODS["gairat"](), change)
