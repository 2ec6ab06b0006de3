"""Advice: each line on the numbers that call for it, and silence otherwise."""

import pytest

from raysweep.training.advice import advise
from raysweep.training.config import run_config

GOOD = {
    "epoch": 8.0, "clean": 0.95, "pgd": 0.7, "cw": 0.69, "robust_worst": 0.68, "masking_gap": 0.02,
    "zero_gradient": 0.0, "train/kappa_pgd": 5.0, "train/ess_robust": 0.7, "train/ess_pgd": 0.7, "train/ess_cw": 0.7,
    "train/active_bound": 0.4,
}  # fmt: skip


@pytest.mark.parametrize(
    ("method", "changes", "word"),
    [
        ("lrat", {"train/active_bound": 0.0}, "bound is inert: active on 0.0% of samples with total 0.1"),
        ("lrat", {"train/ess_pgd": 0.18}, "effective sample size 18% (pgd): the weights fit few points"),
        ("lrat", {"train/ess_cw": 0.995}, "effective sample size 99.5% (cw): the weights are all but equal"),
        ("gairat", {"masking_gap": 0.09, "robust_worst": 0.61}, "PGD overstates the worst case by 9.0 points"),
        ("gairat", {"cw": 0.6}, "PGD-CW gap 10.0 points"),
        ("gairat", {"zero_gradient": 0.2}, "20.0% of right answers have no gradient"),
        ("gairat", {"train/kappa_pgd": 9.9}, "kappa of pgd is 9.9 of 10: the attack hardly ever succeeds"),
        ("gairat", {"train/kappa_pgd": 0.2}, "kappa of pgd is 0.2 of 10: nearly all examples fall at once"),
        ("gairat", {"epoch": 2.0}, "have not acted: epoch 2 is within the burn-in"),
    ],
)
def test_a_line_for_what_stands_out(method, changes, word) -> None:
    config = run_config(method)
    assert advise(config, [GOOD]) == []
    (line,) = advise(config, [{**GOOD, **changes}])
    assert word in line


def test_robust_overfitting() -> None:
    rows = [{**GOOD, "epoch": float(e), "robust_worst": r} for e, r in ((6, 0.6), (7, 0.68), (8, 0.63))]
    (line,) = advise(run_config("at"), rows)
    assert "fell by 5.0 points after epoch 7" in line


def test_nothing_to_say_of_nothing() -> None:
    assert advise(run_config("at"), []) == []
