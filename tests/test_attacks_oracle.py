"""PGD in all its forms against the authors' code (tests/data/losses), and MMA's search by what it
promises.
"""

import pytest
import torch
from oracle import Noise, stored

from raysweep.attacks import PGD, MinimalPerturbation, freeze_model, true_class_margin
from raysweep.rng import ExampleRng

G = PGD(eps=0.031, step_size=0.007)


def check_pixels(name, x_adv):
    """Stored pixels are float32: up to 3e-8 off each, 3072 of them in a sum. A step the other way
    would be 0.014.
    """
    data = stored("attacks")
    torch.testing.assert_close(x_adv.sum((1, 2, 3)), data[f"{name}.row_sums"], atol=1e-4, rtol=0)
    if f"{name}.x_adv" in data:
        torch.testing.assert_close(
            x_adv[data["rows"]], data[f"{name}.x_adv"].double(), atol=1e-7, rtol=0
        )


@pytest.mark.parametrize("loss", ["ce", "cw"])
@pytest.mark.parametrize(("name", "start"), [("rs", "uniform"), ("nors", "natural")])
def test_ga_pgd(oracle, loss, name, start):
    """G alg. 1 with CE and with the margin loss (L eq. 12): iterates, kappa, final logits."""
    result = G.model_copy(update={"loss": loss, "start": start})(
        oracle.model, oracle.x, oracle.y, oracle.noise
    )
    data, key = stored("attacks"), f"{loss}_{name}"
    check_pixels(key, result.x_adv)
    assert torch.equal(result.kappa, data[f"{key}.kappa"])
    assert oracle.model.training
    with torch.no_grad(), freeze_model(oracle.model):
        logits = oracle.model(result.x_adv)
    torch.testing.assert_close(logits, data[f"{key}.logits"], atol=1e-6, rtol=1e-6)


def test_margin_loss_is_equation_12(oracle):
    """sum of -max(z_y - max z_j + 50, 0), which the attack ascends."""
    logits = stored("attacks")["logits_clean"]
    ours = -(true_class_margin(logits, oracle.y) + 50).clamp_min(0).sum()
    torch.testing.assert_close(ours, stored("attacks")["cwloss_sum_clean"])


def test_kl_attack(oracle):
    """TRADES: ascent on KL(p(x) || p(x~)) from x + 0.001 N(0, I)."""
    attack = G.model_copy(update={"loss": "kl", "start": "gaussian"})
    check_pixels("kl", attack(oracle.model, oracle.x, oracle.y, oracle.noise).x_adv)


@pytest.mark.parametrize("tau", [0, 1, 3])
def test_early_stopping(oracle, tau):
    """FAT's own code, rows put back in the order of the input; a row that has stopped costs one
    forward to notice.
    """
    result = G.model_copy(update={"tau": float(tau)})(
        oracle.model, oracle.x, oracle.y, oracle.noise
    )
    check_pixels(f"fat{tau}", result.x_adv)
    noticed = int(result.queries.sum() - stored("attacks")[f"fat{tau}.count"])
    assert int((result.queries < G.steps).sum()) <= noticed <= len(oracle.y)
    assert bool((result.kappa <= result.queries).all())


def test_early_stopped_kappa_is_algorithm_3(oracle):
    """kappa by G alg. 3 run row by row, as it is printed."""
    eps, alpha, steps = 0.031, 0.007, 10
    tau = 1
    result = G.model_copy(update={"tau": float(tau), "start": "natural"})(
        oracle.model, oracle.x, oracle.y, oracle.noise
    )
    for row in range(8):
        x, y = oracle.x[row : row + 1], oracle.y[row : row + 1]
        x_adv, kappa, slack = x.clone(), 0, tau
        with freeze_model(oracle.model):
            for _ in range(steps):
                x_adv.requires_grad_()
                logits = oracle.model(x_adv)
                wrong = logits.argmax(1).item() != y.item()
                if wrong and slack == 0:
                    break
                if wrong:
                    slack -= 1
                else:
                    kappa += 1
                (grad,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, y), x_adv)
                x_adv = torch.clamp(x_adv.detach() + alpha * grad.sign(), x - eps, x + eps).clamp(
                    0, 1
                )
        assert result.kappa[row] == kappa
        torch.testing.assert_close(result.x_adv[row], x_adv.detach()[0], atol=1e-12, rtol=0)


def test_early_stopping_without_room_is_pgd(oracle):
    """tau = K never stops a row."""
    plain = G(oracle.model, oracle.x, oracle.y, oracle.noise)
    patient = G.model_copy(update={"tau": 10.0})(oracle.model, oracle.x, oracle.y, oracle.noise)
    assert torch.equal(plain.x_adv, patient.x_adv)
    assert torch.equal(plain.kappa, patient.kappa)


def test_pgd_plus_keeps_a_row_only_if_every_iterate_is_right(oracle):
    """One start of PGD+ (40 steps of 0.01): tau = 0 stops at the first wrong iterate, which is what
    is returned.
    """
    data = stored("attacks")
    rows = data["plus.rows"]
    attack = PGD(eps=0.031, step_size=0.01, steps=40, tau=0.0)
    x, y = oracle.x.float()[rows], oracle.y[rows]
    model = oracle.model.float().eval()
    result = attack(model, x, y, Noise(uniforms=data["plus.uniform"]))
    with torch.no_grad():
        robust = model(result.x_adv).argmax(1) == y
    assert torch.equal(robust, data["plus.correct"].all(1))
    assert robust.any()
    assert not robust.all()


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_minimal_perturbation(oracle, norm):
    """Wrong rows stay; found rows are wrong, and right just before; the others are at most d_max
    away.
    """
    d_max = 0.1 if norm == "Linf" else 1.5
    attack = MinimalPerturbation(d_max=d_max, norm=norm, bisections=20)
    x, y = oracle.x, oracle.y
    result = attack(oracle.model, x, y, ExampleRng.for_examples(torch.arange(len(y)), 0))
    delta = result.x_adv - x
    length = delta.abs().amax((1, 2, 3)) if norm == "Linf" else delta.flatten(1).norm(dim=1)
    with torch.no_grad(), freeze_model(oracle.model):
        natural, final = (oracle.model(v).argmax(1) == y for v in (x, result.x_adv))
        before = oracle.model(x + delta * (1 - 1e-4)).argmax(1) == y
    found = natural & (result.kappa < attack.steps)
    assert found.any()
    assert torch.equal(length == 0, ~natural)
    assert bool((length <= d_max + 1e-9).all())
    assert not final[found].any()
    assert before[found].all()
    assert final[result.kappa == attack.steps].all()
    assert torch.equal(result.kappa[found], (length[found] / d_max * attack.steps).long())
    assert bool((result.x_adv >= 0).all() & (result.x_adv <= 1).all())
    assert oracle.model.training


def test_minimal_distance_falls_with_a_finer_search(oracle):
    x, y, rng = oracle.x, oracle.y, ExampleRng.for_examples(torch.arange(len(oracle.y)), 0)
    coarse, fine = (
        MinimalPerturbation(d_max=0.1, bisections=b)(oracle.model, x, y, rng).x_adv - x
        for b in (1, 12)
    )
    assert bool((fine.abs().amax((1, 2, 3)) <= coarse.abs().amax((1, 2, 3)) + 1e-12).all())
