"""The sum over terms: normalisation over the global batch, views, what carries a gradient."""

import math
import threading

import pytest
import torch
import torch.nn.functional as F

from raysweep.attacks import PGD, freeze_model, true_class_confidence, true_class_margin
from raysweep.catalog import METHODS
from raysweep.instance_weights import (
    GeometryWeight,
    RemainderWeight,
    VulnerabilityWeight,
    WeightInputs,
)
from raysweep.method import Method, Term
from raysweep.rng import ExampleRng
from raysweep.spec import apply_overrides


def gradients(method: Method, net, x, y, rng, **kwargs) -> list[torch.Tensor]:
    net.zero_grad()
    method(net, x, y, rng, **kwargs).loss.backward()
    return [parameter.grad.clone() for parameter in net.parameters()]


@pytest.mark.parametrize("shape", ["tanh", "sigmoid"])
def test_gairat_with_infinite_lambda_is_at_bit_for_bit(shape, net, batch) -> None:
    at = METHODS["at"]()
    gairat = apply_overrides(
        METHODS["gairat"](),
        {
            "attacks.pgd": at.attacks["pgd"].to_json_dict(),
            "terms.pgd.weight.lam": math.inf,
            "terms.pgd.weight.shape": shape,
            "terms.pgd.weight.burn_in": 0,
        },
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(gradients(at, net, *batch), gradients(gairat, net, *batch), strict=True)
    )


def test_geometry_weights_are_the_papers_equations() -> None:
    kappa, steps = torch.arange(11), 10
    look = WeightInputs(
        torch.zeros(11, 3, dtype=torch.float64), torch.zeros(11, dtype=torch.int64), kappa, steps
    )
    k = kappa.double()
    argument = 1.5 + 5 * (1 - 2 * k / steps)
    assert torch.allclose(
        GeometryWeight(lam=1.5)(look), (1 + torch.tanh(argument)) / 2, rtol=0, atol=1e-12
    )
    assert torch.allclose(
        GeometryWeight(shape="linear")(look), 1 - k / (steps + 1), rtol=0, atol=1e-12
    )
    assert torch.allclose(
        GeometryWeight(shape="sigmoid", lam=1.5)(look),
        1 / (1 + torch.exp(-argument)),
        rtol=0,
        atol=1e-12,
    )
    table = GeometryWeight(shape="piecewise", table=(1.0, 1.0, 0.5, 0.1))(look)
    assert table.tolist() == [1.0, 1.0, 0.5] + [0.1] * 8


def test_a_very_negative_lambda_still_weighs_a_batch_of_guarded_points(net, batch) -> None:
    """All kappa = K at lambda = -5 is 0/0 in float32 when written with tanh."""
    look = WeightInputs(
        torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64), torch.full((4,), 10), 10
    )
    assert (GeometryWeight(lam=-5.0)(look) > 0).all()


def test_lrat_is_equation_5_divided_by_equation_17(net, batch) -> None:
    x, y, rng = batch
    net = net.double().train()
    x = x.double()
    settings = {
        "terms.bound.weight.total": 4.5,
        "terms.pgd.weight.alpha": 1.5,
        "terms.cw.weight.beta": 2.0,
    }
    method = apply_overrides(METHODS["lrat"](), settings)
    step = method(net, x, y, rng)

    p = {name: F.softmax(step.logits[name].detach(), 1) for name in ("pgd", "cw")}
    true = {name: probabilities.gather(1, y[:, None])[:, 0] for name, probabilities in p.items()}
    other = p["cw"].scatter(1, y[:, None], 0).amax(1)
    w_pgd = 1.5 * (1 - true["pgd"]) ** 0.5
    w_cw = 2.0 * (1 - (true["cw"] - other)) ** 2.0
    w_nat = (4.5 - w_pgd - w_cw).clamp_min(0)
    assert (w_nat > 0).any()
    ce = {
        name: F.cross_entropy(logits, y, reduction="none") for name, logits in step.logits.items()
    }
    expected = (w_nat * ce["natural"] + w_pgd * ce["pgd"] + w_cw * ce["cw"]).mean() / (
        w_nat + w_pgd + w_cw
    ).mean()
    assert torch.allclose(step.loss, expected, rtol=1e-12)


def test_the_bound_may_look_at_several_views_and_still_weighs_once(net, batch) -> None:
    x, y, rng = batch
    method = apply_overrides(
        METHODS["lrat"](), {"terms.bound.weight.total": 4.0, "terms.bound.on": "natural+pgd"}
    )
    step = method(net, x, y, rng)
    ce = {
        name: F.cross_entropy(logits, y, reduction="none") for name, logits in step.logits.items()
    }
    w = step.weights
    total = w["pgd"] * ce["pgd"] + w["cw"] * ce["cw"] + w["bound"] * (ce["natural"] + ce["pgd"])
    assert torch.allclose(
        step.loss, total.mean() / (w["pgd"] + w["cw"] + w["bound"]).mean(), rtol=1e-5
    )


def test_weights_carry_no_gradient(net, batch) -> None:
    step = METHODS["lrat"]()(net, *batch)
    assert not any(weight.requires_grad for weight in step.weights.values())


def test_vulnerability_is_equations_8_and_9() -> None:
    logits, y = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 1.0]]), torch.tensor([0, 0])
    p = F.softmax(logits, 1)
    assert torch.allclose(true_class_confidence(logits, y, "probability"), p[:, 0])
    assert torch.allclose(
        true_class_confidence(logits, y, "margin"),
        torch.stack([p[0, 0] - p[0, 2], p[1, 0] - p[1, 1]]),
    )
    assert torch.allclose(true_class_margin(logits, y), torch.tensor([1.0, -3.0]))


class ThreadWorkers:
    """Two workers in two threads of one process: each sum waits for both."""

    size = 2

    def __init__(self) -> None:
        self._barrier = threading.Barrier(2)
        self._values: dict[str, torch.Tensor] = {}

    def all_reduce_sum(self, value: torch.Tensor) -> torch.Tensor:
        self._values[threading.current_thread().name] = value
        self._barrier.wait()
        total = sum(self._values[name] for name in sorted(self._values))
        self._barrier.wait()
        return total


@pytest.mark.parametrize("name", ["at", "gairat", "lrat"])
@pytest.mark.parametrize("cut", [16, 11])
def test_two_workers_give_the_gradient_of_one(name, cut, net, batch) -> None:
    """Also with unequal shares; the network is in eval mode, for batch norm's own statistics are
    per worker.
    """
    x, y, _ = batch
    x, net = x.double(), net.double()
    method = METHODS[name]()
    if name == "gairat":
        method = apply_overrides(method, {"terms.pgd.weight.burn_in": 0})
    if name == "lrat":
        method = apply_overrides(method, {"terms.bound.weight.total": 4.5})
    index = torch.arange(len(x))
    whole = gradients(method, net, x, y, ExampleRng.for_examples(index, 0))

    workers, found = ThreadWorkers(), {}
    networks = [
        torch.nn.Sequential(*__import__("copy").deepcopy(list(net))).eval() for _ in range(2)
    ]

    def work(rank: int) -> None:
        part = slice(0, cut) if rank == 0 else slice(cut, None)
        rng = ExampleRng.for_examples(index[part], 0)
        found[rank] = gradients(method, networks[rank], x[part], y[part], rng, workers=workers)

    threads = [
        threading.Thread(target=work, args=(rank,), name=f"worker{rank}") for rank in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, a, b in zip(whole, found[0], found[1], strict=True):
        assert torch.allclose(one, (a + b) / 2, rtol=0, atol=1e-12)


def test_pgd_counts_the_iterates_that_are_right_and_stays_in_the_ball(net, batch) -> None:
    x, y, rng = batch
    y = net(x).argmax(1)
    y[:8] = (y[:8] + 1) % 10
    attack = PGD(eps=0.1, step_size=0.03, steps=6)
    seen = []
    handle = net.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    result = attack(net, x, y, rng)
    handle.remove()
    assert len(seen) == 6, "one forward a step"
    kappa = sum((net(iterate).argmax(1) == y).long() for iterate in seen)
    assert torch.equal(result.kappa, kappa)
    assert (
        (result.x_adv - x).abs().max() <= 0.1 + 1e-6
        and result.x_adv.min() >= 0
        and result.x_adv.max() <= 1
    )
    assert result.queries.tolist() == [6] * len(x)


def test_kappa_can_go_on_counting_after_a_wrong_iterate() -> None:
    class Seesaw(torch.nn.Module):
        """Right, wrong, right, ... by the number of calls."""

        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            right = 1.0 if self.calls % 2 else -1.0
            return torch.stack([x.sum((1, 2, 3)) * 0 + right, x.sum((1, 2, 3)) * 0], 1)

    x = torch.rand(3, 1, 2, 2)
    result = PGD(steps=7)(
        Seesaw(), x, torch.zeros(3, dtype=torch.int64), ExampleRng.for_examples(torch.arange(3), 0)
    )
    assert result.kappa.tolist() == [4, 4, 4]


def test_early_stopped_pgd_keeps_rows_in_order_and_stops_tau_steps_after_the_first_error(
    net, batch
) -> None:
    x, _, rng = batch
    y = net(x).argmax(1)
    attack = PGD(eps=0.3, step_size=0.02, steps=10, start="natural")
    for tau in (0, 2):
        result = attack.model_copy(update={"tau": float(tau)})(net, x, y, rng)
        assert len(set(result.queries.tolist())) > 1, "some rows stop early, not all at once"
        for row in range(len(x)):
            current, right, budget, taken = x[row : row + 1], 0, tau, 0
            for _ in range(10):
                leaf = current.clone().requires_grad_()
                logits = net(leaf)
                taken += 1
                if logits.argmax(1) == y[row]:
                    right += 1
                elif budget == 0:
                    break
                else:
                    budget -= 1
                (grad,) = torch.autograd.grad(F.cross_entropy(logits, y[row : row + 1]), leaf)
                low, high = x[row : row + 1] - 0.3, x[row : row + 1] + 0.3
                current = (current + 0.02 * grad.sign()).clamp(low, high).clamp(0, 1)
            assert result.kappa[row] == right and result.queries[row] == taken
            assert torch.allclose(result.x_adv[row], current[0], atol=1e-6)


def test_frozen_puts_the_model_back(net) -> None:
    net.train()
    net[2].eval()
    net[1].weight.requires_grad_(False)
    with freeze_model(net):
        assert not net.training and not any(p.requires_grad for p in net.parameters())
    assert net.training and not net[2].training
    assert [p.requires_grad for p in net[1].parameters()] == [False, True]


def test_remainder_completes_to_its_total(net, batch) -> None:
    method = Method(
        attacks={"pgd": PGD()},
        terms={
            "a": Term(on="pgd", weight=VulnerabilityWeight(alpha=0.2)),
            "b": Term(on="natural", weight=RemainderWeight(total=1.0, of=("a",))),
        },
    )
    weights = method(net, *batch).weights
    assert torch.allclose(weights["a"] + weights["b"], torch.ones(32))


def test_natural_data_may_decide_the_weight_of_an_attacks_term() -> None:
    """Its logits are needed then, though no loss looks at them."""
    method = Method.from_data(
        {
            "attacks": {"pgd": {"kind": "pgd", "steps": 2}},
            "terms": {
                "robust": {
                    "on": "pgd",
                    "weight": {"kind": "margin", "by": "natural", "normalise": False},
                }
            },
        }
    )
    torch.manual_seed(0)
    net, x, y = (
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3)),
        torch.rand(5, 3, 2, 2),
        torch.arange(5) % 3,
    )
    step = method(net, x, y, ExampleRng.for_examples(torch.arange(5), 0))
    p = net(x).softmax(1)
    others = p.masked_fill(torch.nn.functional.one_hot(y, 3).bool(), 0).amax(1)
    expected = torch.sigmoid(10 * (others - p.gather(1, y[:, None])[:, 0] - 0.5))
    assert torch.allclose(step.weights["robust"], expected, atol=1e-6)


class CountingNet(torch.nn.Module):
    """A small network with batch norm that counts forward passes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(64, 16), torch.nn.BatchNorm1d(16), torch.nn.ReLU(),
            torch.nn.Linear(16, 10),
        )  # fmt: skip
        self.n_forwards = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.n_forwards += 1
        return self.layers(x)


def train_step(method: Method, batch) -> tuple[list[torch.Tensor], list[torch.Tensor], int]:
    """Gradients, state with the statistics of the batch norm, and forward passes of one step."""
    model = CountingNet().train()
    found = gradients(method, model, *batch)
    return found, [value.clone() for value in model.state_dict().values()], model.n_forwards


def check_same_step(method: Method, other: Method, batch) -> None:
    ours, theirs = train_step(method, batch), train_step(other, batch)
    assert all(torch.equal(a, b) for a, b in zip(ours[0], theirs[0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(ours[1], theirs[1], strict=True))
    assert ours[2] == theirs[2], "forward passes"


def test_in_the_burn_in_gair_rst_is_rst_without_the_attack_of_weight_zero(batch) -> None:
    """Its weights are w = 1 and 1 - w = 0: no CW images, neither in time nor in the batch norms."""
    method = METHODS["gair-rst"]()
    without = Method(
        name="without",
        attacks={"pgd": method.attacks["pgd"]},
        terms={
            "natural": Term(on="natural"),
            "kl": Term(loss="kl", on="pgd", coef=6.0),
        },
    )
    check_same_step(method.resolve_at(0), without, batch)
    after = method.resolve_at(method.terms["kl"].weight.burn_in)
    # PGD and CW-PGD take 10 forward passes each, beside those of the losses and the KL's targets.
    assert train_step(after, batch)[2] >= train_step(without, batch)[2] + 11


def test_a_term_of_coef_zero_is_left_out_unless_another_needs_its_weight(batch) -> None:
    pgd = PGD(eps=0.1, step_size=0.05, steps=3)
    weighted = Term(on="pgd", coef=0.0, weight=VulnerabilityWeight())
    alone = Method(attacks={"pgd": pgd}, terms={"natural": Term(on="natural"), "pgd": weighted})
    check_same_step(alone, Method(terms={"natural": Term(on="natural")}), batch)
    remainder = Term(on="natural", weight=RemainderWeight(total=2.0, of=("pgd",)))
    needed = Method(attacks={"pgd": pgd}, terms={"pgd": weighted, "rest": remainder})
    output = needed(CountingNet(), *batch)
    assert set(output.attack_results) == {"pgd"} and set(output.weights) == {"pgd", "rest"}
    assert torch.allclose(output.weights["rest"], (2 - output.weights["pgd"]).clamp_min(0))
    normalised = Method(
        attacks={"pgd": pgd}, terms={"natural": Term(on="natural"), "pgd": weighted}, normalise=True
    )
    output = normalised(CountingNet(), *batch)
    natural = F.cross_entropy(output.logits["natural"], batch[1], reduction="sum")
    assert output.loss.item() == pytest.approx(
        (natural / (1 + output.weights["pgd"]).sum()).item(), rel=1e-5
    ), "equation 17 divides by the weights of all terms"


def test_terms_that_are_all_zero_still_have_a_gradient(batch) -> None:
    method = Method(terms={"natural": Term(on="natural", coef=0.0)})
    assert all(not gradient.any() for gradient in gradients(method, CountingNet(), *batch))
