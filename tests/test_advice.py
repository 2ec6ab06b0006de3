"""Advice: each line on the numbers that call for it, and silence otherwise."""

import pytest

from raysweep.training.config import build_training_config
from raysweep.training.metric_advice import advise_on_training

GOOD = {
    "epoch": 8.0, "clean": 0.95, "pgd": 0.7, "cw": 0.69, "robust_worst": 0.68, "masking_gap": 0.02,
    "zero_gradient": 0.0, "train/kappa_pgd": 5.0, "train/ess_robust": 0.7, "train/ess_pgd": 0.7,
    "train/ess_cw": 0.7, "train/active_bound": 0.4,
}  # fmt: skip


@pytest.mark.parametrize(
    ("method", "changes", "word"),
    [
        (
            "lrat",
            {"train/active_bound": 0.0},
            "bound is inert: active on 0.0% of samples with total 0.1",
        ),
        (
            "lrat",
            {"train/ess_pgd": 0.18},
            "effective sample size 18% (pgd): the weights fit few points",
        ),
        (
            "lrat",
            {"train/ess_cw": 0.995},
            "effective sample size 99.5% (cw): the weights are nearly equal",
        ),
        (
            "gairat",
            {"masking_gap": 0.09, "robust_worst": 0.61},
            "PGD overstates the worst case by 9.0 points",
        ),
        ("gairat", {"cw": 0.6}, "PGD-CW gap 10.0 points"),
        ("gairat", {"zero_gradient": 0.2}, "20.0% of examples are correct and have no gradient"),
        (
            "gairat",
            {"train/kappa_pgd": 9.9},
            "kappa of pgd is 9.9 of 10: the attack hardly ever succeeds",
        ),
        (
            "gairat",
            {"train/kappa_pgd": 0.2},
            "kappa of pgd is 0.2 of 10: the attack succeeds at once on nearly all examples",
        ),
        ("gairat", {"epoch": 2.0}, "have not acted: epoch 2 is within the burn-in"),
    ],
)
def test_a_line_for_what_stands_out(method, changes, word) -> None:
    config = build_training_config(method)
    assert advise_on_training(config, [GOOD]) == []
    (line,) = advise_on_training(config, [{**GOOD, **changes}])
    assert word in line


def test_robust_overfitting() -> None:
    rows = [
        {**GOOD, "epoch": float(e), "robust_worst": r} for e, r in ((6, 0.6), (7, 0.68), (8, 0.63))
    ]
    (line,) = advise_on_training(build_training_config("at"), rows)
    assert "fell by 5.0 points after epoch 7" in line


def test_nothing_to_say_of_nothing() -> None:
    assert advise_on_training(build_training_config("at"), []) == []


def test_a_method_without_weights_has_no_burn_in() -> None:
    assert advise_on_training(build_training_config("at"), [{**GOOD, "epoch": 1.0}]) == []


@pytest.mark.parametrize(
    ("method", "changes", "lines"),
    [
        ("at", {"masking_gap": 0.05}, 1),
        ("at", {"masking_gap": 0.0499}, 0),
        ("at", {"pgd": 0.741}, 1),
        ("at", {"pgd": 0.739}, 0),
        ("at", {"zero_gradient": 0.05}, 1),
        ("at", {"zero_gradient": 0.0499}, 0),
        ("gairat", {"train/ess_pgd": 0.299}, 1),
        ("gairat", {"train/ess_pgd": 0.3}, 0),
        ("gairat", {"train/ess_pgd": 0.98}, 0),
        ("gairat", {"train/ess_pgd": 0.981}, 1),
        ("at", {"train/ess_pgd": 1.0}, 0),
        ("lrat", {"train/active_bound": 0.01}, 0),
        ("lrat", {"train/active_bound": 0.0099}, 1),
        ("lrat", {"train/ess_bound": 0.01}, 0),
        ("lrat", {"train/kappa_cw": 9.5}, 1),
        ("at", {"train/kappa_pgd": 9.49}, 0),
        ("at", {"train/kappa_pgd": 9.5}, 1),
        ("at", {"train/kappa_pgd": 0.51}, 0),
        ("at", {"train/kappa_pgd": 0.5}, 1),
        ("gairat", {"epoch": 4.0}, 0),
        ("gairat", {"epoch": 3.0}, 1),
        ("gairat", {"epoch": 3.0, "train/ess_pgd": 1.0}, 1),
        ("gairat", {"epoch": 4.0, "train/ess_pgd": 1.0}, 1),
    ],
)
def test_a_line_begins_at_its_own_threshold(method, changes, lines) -> None:
    """On digits, where PGD takes 10 steps and weights act after epoch 3."""
    assert len(advise_on_training(build_training_config(method), [{**GOOD, **changes}])) == lines


def test_an_attack_of_one_step_has_no_kappa_to_speak_of() -> None:
    for steps, lines in ((1, 0), (2, 1)):
        config = build_training_config("at", {"method.attacks.pgd.steps": steps})
        assert len(advise_on_training(config, [{**GOOD, "train/kappa_pgd": float(steps)}])) == lines


def test_masking_is_judged_by_the_best_epoch_and_weights_by_the_last() -> None:
    before = {**GOOD, "epoch": 7.0, "robust_worst": 0.69}
    masked, heavy = {"masking_gap": 0.08}, {"train/ess_pgd": 0.1}
    config = build_training_config("gairat")
    assert len(advise_on_training(config, [{**before, **masked}, GOOD])) == 1
    assert advise_on_training(config, [before, {**GOOD, **masked}]) == []
    assert advise_on_training(config, [{**before, **heavy}, GOOD]) == []
    assert len(advise_on_training(config, [before, {**GOOD, **heavy}])) == 1


@pytest.mark.parametrize(("last", "lines"), [(0.651, 0), (0.649, 1)])
def test_a_fall_of_three_points_is_overfitting(last, lines) -> None:
    """The fall is from the best epoch to the last one that was measured."""
    rows = [
        {**GOOD, "epoch": float(e), "robust_worst": r} for e, r in ((5, 0.6), (6, 0.68), (7, last))
    ]
    unmeasured = {key: value for key, value in GOOD.items() if key != "robust_worst"}
    assert len(advise_on_training(build_training_config("at"), [*rows, unmeasured])) == lines
    by_clean = build_training_config("at", {"validation.objective": "clean"})
    assert advise_on_training(by_clean, rows) == []
