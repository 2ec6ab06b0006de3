"""The worst case over several attacks against the same attacks run one by one on one row."""

import numpy as np
import pytest
import torch
from slow_attacks import SmallNet, draw_images, recorded_inputs

from raysweep.attacks import (
    APGD,
    FAB,
    PGD,
    AttackCascade,
    Square,
    build_restart_cascade,
    fp32_precision,
)
from raysweep.rng import ExampleRng

SHAPE = (1, 5, 5)
NET = SmallNet.draw(25, 5, seed=0)
X = draw_images(12, SHAPE, seed=1)
# The last row is wrong from the start.
Y = np.array([NET.predict(x) for x in X])
Y[-1] = (Y[-1] + 1) % 5
WEAK, STRONG = PGD(eps=0.01, step_size=0.01, steps=2), PGD(eps=0.04, step_size=0.02, steps=3)


def rng(rows, seed=5):
    return ExampleRng.for_examples(torch.tensor(rows), seed)


def run(attack, rows):
    return attack(NET.module(), torch.from_numpy(X[rows]), torch.from_numpy(Y[rows]), rng(rows))


def margins(points):
    return [NET.margin(x, int(y)) for x, y in zip(np.asarray(points), Y, strict=True)]


@pytest.mark.parametrize(
    "attacks",
    [
        {"weak": WEAK, "strong": STRONG},
        {"strong": STRONG, "weak": WEAK},
        {
            "fab": FAB(eps=0.05, steps=4, targets=2),
            "square": Square(eps=0.05, queries=9),
            "apgd": APGD(eps=0.05, steps=5),
        },
        {f"pgd-{i}": PGD(eps=0.05, step_size=0.05, steps=1) for i in range(4)},
    ],
    ids=lambda attacks: "+".join(attacks),
)
def test_a_cascade_is_its_attacks_one_by_one(attacks):
    """Each attack gets the rows that are still right, with its own random numbers; the least margin
    is kept.
    """
    result = run(AttackCascade(attacks=attacks), list(range(12)))
    for row in range(12):
        y, best, queries, robust = int(Y[row]), X[row], 1, {}
        least = NET.margin(best, y)
        for name, attack in attacks.items():
            if least > 0:
                found = attack(
                    NET.module(),
                    torch.from_numpy(X[[row]]),
                    torch.from_numpy(Y[[row]]),
                    rng([row]).derive_stream(name),
                )
                # One more pass for the verdict.
                queries += int(found.queries) + 1
                if NET.margin(found.x_adv[0].numpy(), y) < least:
                    best, least = found.x_adv[0].numpy(), NET.margin(found.x_adv[0].numpy(), y)
            robust[name] = least > 0
        np.testing.assert_allclose(result.x_adv[row], best, atol=1e-9)
        assert int(result.queries[row]) == queries
        assert {name: bool(flags[row]) for name, flags in result.robust_after.items()} == robust
    last = list(result.robust_after.values())[-1]
    assert list(result.robust_after) == list(attacks) and 0 < last.sum() < 12


def test_attacks_that_fail_leave_the_point_of_least_margin():
    """Whether the stronger one comes first or last."""
    weaker, stronger = (attack.model_copy(update={"start": "natural"}) for attack in (WEAK, STRONG))
    rows = [
        row for row, left in enumerate(margins(run(stronger, list(range(12))).x_adv)) if left > 0
    ]
    assert len(rows) >= 3
    alone = {"w": run(weaker, rows), "s": run(stronger, rows)}
    orders = {"w": weaker, "s": stronger}, {"s": stronger, "w": weaker}
    both = [run(AttackCascade(attacks=order), rows) for order in orders]
    for i, row in enumerate(rows):
        y = int(Y[row])
        weak, strong = (NET.margin(alone[name].x_adv[i].numpy(), y) for name in ("w", "s"))
        assert 0 < strong < weak < NET.margin(X[row], y)
        for result in both:
            assert torch.equal(result.x_adv[i], alone["s"].x_adv[i])


def test_a_result_with_a_larger_margin_is_dropped():
    """The image itself is kept where the attack's point has a larger margin: here a wrong sign
    leads PGD uphill.
    """

    class Uphill(PGD):
        def __call__(self, model, x, y, rng):
            found = super().__call__(model, x, y, rng)
            return type(found)(2 * x - found.x_adv, found.queries, found.kappa)

    cascade = AttackCascade(attacks={"up": STRONG}).model_copy(
        update={"attacks": {"up": Uphill(eps=0.02, step_size=0.02, steps=1, start="natural")}}
    )
    result = run(cascade, list(range(12)))
    worse = [a >= b for a, b in zip(margins(result.x_adv), margins(X), strict=True)]
    assert sum(worse) > 6 and torch.equal(result.x_adv[worse], torch.from_numpy(X)[worse])


def test_a_margin_of_zero_is_broken():
    """A margin of 0 counts as broken, and is attacked no more."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(25, 3)).double()
    torch.nn.init.zeros_(model[1].weight)
    torch.nn.init.zeros_(model[1].bias)
    with recorded_inputs(model) as seen:
        result = AttackCascade(attacks={"a": WEAK})(
            model, torch.from_numpy(X[:4]), torch.zeros(4, dtype=torch.long), rng([0, 1, 2, 3])
        )
    assert (
        result.robust_after["a"].tolist() == [False] * 4
        and result.queries.tolist() == [1] * 4
        and len(seen) == 1
    )


def test_properties_of_a_cascade_and_names_of_restarts():
    cascade = AttackCascade(
        attacks={"a": PGD(steps=7), "b": APGD(steps=9), "c": Square(queries=8), "d": FAB(steps=3)}
    )
    assert cascade.steps == 9 and cascade.vulnerability_kind == "margin" and cascade.tf32 is False
    several = build_restart_cascade(STRONG, 3, "again").attacks
    assert list(several) == ["again-1", "again-2", "again-3"] and set(several.values()) == {STRONG}
    assert list(build_restart_cascade(STRONG, 2).attacks) == ["pgd-1", "pgd-2"]


class Failing(torch.nn.Module):
    """Records the precision of each pass; may raise an error in one of them."""

    def __init__(self, fails_at=-1):
        super().__init__()
        self.inner, self.fails_at, self.seen = NET.module(), fails_at, []

    def forward(self, x):
        self.seen.append(
            (torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision)
        )
        if len(self.seen) == self.fails_at:
            raise RuntimeError("out of order")
        return self.inner(x)


def test_tf32_is_for_the_attacks_alone():
    """The clean pass and the verdicts use the caller's precision, which is restored even after an
    error.
    """
    x, y = torch.from_numpy(X[:3]), torch.from_numpy(Y[:3])
    attacks = {"a": WEAK, "b": WEAK}
    before = torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision
    with fp32_precision("ieee"):
        for tf32, inside in ((True, "tf32"), (False, "ieee")):
            model = Failing()
            AttackCascade(attacks=attacks, tf32=tf32)(model, x, y, rng([0, 1, 2]))
            plain, coarse = ("ieee", "ieee"), (inside, inside)
            assert model.seen == [plain, *[coarse] * 2, plain, *[coarse] * 2, plain]
        with pytest.raises(RuntimeError, match="out of order"):
            AttackCascade(attacks=attacks, tf32=True)(Failing(fails_at=3), x, y, rng([0, 1, 2]))
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.backends.cudnn.conv.fp32_precision == "ieee"
    assert (
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.cudnn.conv.fp32_precision,
    ) == before
