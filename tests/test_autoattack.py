"""The attacks of AutoAttack: what each promises, their parts against slow transcriptions, and the
official verdict.
"""

import math

import pytest
import torch
from contracts import AttackContract
from pydantic import TypeAdapter
from robust_digits import OFFICIAL, digits, robust_digits
from torch import nn

from raysweep.attacks import (
    APGD,
    ATTACK_DESCRIPTIONS,
    FAB,
    PGD,
    AnyAttack,
    AttackCascade,
    Square,
    autoattack,
    build_custom_cascade,
    build_named_attack,
    true_class_margin,
)
from raysweep.attacks.apgd import _step_size_checkpoints
from raysweep.attacks.base import sample_on_sphere
from raysweep.attacks.fab import compute_projection_step
from raysweep.rng import ExampleRng
from raysweep.schedules import PiecewiseSchedule
from raysweep.spec import SpecError

PGDS = [
    PGD(eps=0.2, step_size=0.05, steps=5),
    PGD(eps=0.2, step_size=0.05, steps=5, loss="cw"),
    PGD(eps=0.2, step_size=0.05, steps=5, tau=0),
    PGD(eps=0.7, step_size=0.2, steps=5, norm="L2"),
]
APGDS = [
    APGD(eps=0.2, steps=10),
    APGD(eps=0.2, steps=8, loss="cw", restarts=2),
    APGD(eps=0.2, steps=8, loss="dlr"),
    APGD(eps=0.2, steps=5, loss="ce", samples=2),
    APGD(eps=0.2, steps=5, loss="dlr-targeted", targets=3),
    APGD(eps=0.7, steps=10, norm="L2"),
]
OTHERS = [
    FAB(eps=0.25, steps=5, targets=2),
    FAB(eps=0.9, steps=5, targets=2, norm="L2"),
    FAB(eps=0.25, steps=3, targets=None, restarts=2),
    Square(eps=0.25, queries=20),
    Square(eps=0.9, queries=15, norm="L2", restarts=2),
    AttackCascade(
        attacks={"pgd": PGDS[0], "apgd": APGDS[0], "square": Square(eps=0.2, queries=20)}
    ),
]


class TestContract(AttackContract):
    @pytest.fixture(params=[*PGDS, *APGDS, *OTHERS], ids=repr)
    def attack(self, request):
        return request.param


def rng(count: int, seed: int = 0) -> ExampleRng:
    return ExampleRng.for_examples(torch.arange(count), seed)


def test_apgd_looks_at_the_step_size_where_the_official_code_does():
    assert sorted(_step_size_checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]


def test_apgd_matches_a_slow_transcription():
    """Alg. 1 of Croce & Hein for one row at a time, with every loss kept, on rows that hold out."""
    model, (x, y) = robust_digits().double(), digits(8)
    x = x.double()
    attack = APGD(eps=0.1, steps=60)
    result = attack(model, x, y, rng(8))
    held = (model(result.x_adv).argmax(1) == y).nonzero()[:, 0][:4]
    assert len(held) == 4
    start = sample_on_sphere(
        x, attack.eps, attack.norm, rng(8).derive_stream("target", 0, "restart", 0)
    )
    for i in held.tolist():
        assert torch.allclose(
            result.x_adv[i],
            slow_apgd(model, x[i : i + 1], y[i : i + 1], start[i : i + 1], 0.1, 60)[0],
            atol=1e-6,
        )


def slow_apgd(model, x, y, start, eps, steps):
    def loss_and_gradient(z):
        z = z.detach().requires_grad_()
        loss = nn.functional.cross_entropy(model(z), y)
        return loss.item(), torch.autograd.grad(loss, z)[0]

    def clip(z):
        return z.clamp(x - eps, x + eps).clamp(0, 1)

    gap, least, less = (
        max(int(0.22 * steps), 1),
        max(int(0.06 * steps), 1),
        max(int(0.03 * steps), 1),
    )
    losses = [0.0] * steps
    z = old = best = start
    best_loss, grad = loss_and_gradient(z)
    best_grad, step, since, reduced, checked = grad, 2 * eps, 0, True, best_loss
    for i in range(steps):
        momentum = 0.75 if i else 1.0
        moved = clip(z + momentum * (clip(z + step * grad.sign()) - z) + (1 - momentum) * (z - old))
        old, z = z, moved
        losses[i], grad = loss_and_gradient(z)
        if losses[i] > best_loss:
            best, best_grad, best_loss = z, grad, losses[i]
        since += 1
        if since == gap:
            rises = sum(
                losses[j] > losses[j - 1] for j in range(i - gap + 1, i + 1)
            )  # j = 0 wraps round, as officially
            stalled = not reduced and checked >= best_loss
            reduced, checked = rises <= 0.75 * gap or stalled, best_loss
            if reduced:
                step, z, grad = step / 2, best, best_grad
            gap, since = max(gap - less, least), 0
    return best


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_projection_onto_a_plane_in_the_box(norm):
    points = torch.rand(50, 12, dtype=torch.float64)
    normal = torch.randn(50, 12, dtype=torch.float64)
    normal[:, 3] = 0
    offset = (normal * torch.rand(50, 12, dtype=torch.float64)).sum(1)
    gap = (normal * points).sum(1) - offset
    move = compute_projection_step(points, normal, gap, norm)
    moved = points + move
    assert torch.allclose((normal * moved).sum(1), offset, atol=1e-9)
    assert moved.min() >= -1e-12 and moved.max() <= 1 + 1e-12
    size = move.abs().amax(1) if norm == "Linf" else move.norm(dim=1)
    # The least move by bisection on the size: what a ball in the box reaches along the normal.
    for i in range(50):
        towards = -normal[i].sign() * gap[i].sign()
        room = torch.where(towards > 0, 1 - points[i], points[i])
        low, high = 0.0, 100.0
        for _ in range(80):
            time = (low + high) / 2
            reach = torch.minimum(
                torch.full_like(room, time) if norm == "Linf" else time * normal[i].abs(), room
            )
            low, high = (
                (time, high) if (normal[i].abs() * reach).sum() < gap[i].abs() else (low, time)
            )
        reach = torch.minimum(
            torch.full_like(room, high) if norm == "Linf" else high * normal[i].abs(), room
        )
        reach = reach * (normal[i] != 0)
        assert math.isclose(size[i], reach.max() if norm == "Linf" else reach.norm(), abs_tol=1e-9)


def test_projection_gives_the_corner_where_the_plane_misses_the_box():
    points, normal = torch.full((1, 2), 0.5), torch.tensor([[1.0, -1.0]])
    for norm in ("Linf", "L2"):
        assert torch.equal(
            compute_projection_step(points, normal, torch.tensor([-9.0]), norm),
            torch.tensor([[0.5, -0.5]]),
        )


def test_square_spends_no_forward_on_proposals_that_cannot_matter():
    """The same points, bit for bit, as evaluating every proposal, with fewer forward passes."""
    model, (x, y) = robust_digits(), digits(16)
    attack, eps, queries = Square(eps=0.1, queries=400), 0.1, 400
    result = attack(model, x, y, rng(16))
    stream = rng(16).derive_stream("restart", 0)
    right = (true_class_margin(model(x), y) > 0).nonzero()[:, 0]
    low, high = (x - eps).clamp(0, 1), (x + eps).clamp(0, 1)
    best_x = torch.where(stream.derive_stream("start").uniform((1, 1, 8)) < 0.5, low, high)
    with torch.no_grad():
        best = true_class_margin(model(best_x), y)
        for query, draws in enumerate(attack._draw_shared_numbers(stream, 3)):
            side = attack._window_side(query, 64)
            top, left = int(draws[0] * (8 - side)), int(draws[1] * (8 - side))
            area = (..., slice(top, top + side), slice(left, left + side))
            candidate = best_x.clone()
            candidate[area] = (low if draws[2] < 0.5 else high)[area]
            loss = true_class_margin(model(candidate), y)
            better = (loss < best) & (best > 0)
            best_x[better], best[better] = candidate[better], loss[better]
    held = right[best[right] < true_class_margin(model(x[right]), y[right])]
    assert len(held) >= 12 and torch.equal(result.x_adv[held], best_x[held])
    assert result.queries.max() < queries / 2


def test_square_window_shrinks_after_the_official_queries():
    attack = Square()
    sides = [
        attack._window_side(query, 32 * 32)
        for query in (0, 10, 11, 50, 51, 200, 201, 500, 501, 1001, 2001, 4001)
    ]
    assert sides == [29, 29, 20, 20, 14, 14, 10, 10, 7, 5, 4, 3]


def test_fab_finds_only_what_lies_within_eps():
    model, (x, y) = robust_digits(), digits(40)
    result = FAB(eps=0.12, steps=15, targets=2)(model, x, y, rng(40))
    broken = (model(result.x_adv).argmax(1) != y) & (model(x).argmax(1) == y)
    moved = (result.x_adv != x).flatten(1).any(1)
    assert broken.any() and torch.equal(broken, moved)
    assert (result.x_adv - x).abs().max() <= 0.12 * (1 + 1e-6)


def test_each_attack_of_a_cascade_sees_only_survivors():
    model, (x, y) = robust_digits(), digits(60)
    seen = []
    handle = model.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    result = short_cascade()(model, x, y, rng(60))
    handle.remove()
    first, second = result.robust_after.values()
    assert (
        not (second & ~first).any() and second.sum() < first.sum() < (model(x).argmax(1) == y).sum()
    )
    assert seen[-2] <= first.sum()
    assert torch.equal(model(result.x_adv).argmax(1) == y, second)


def short_cascade() -> AttackCascade:
    return AttackCascade(
        attacks={
            "ce": APGD(eps=0.2, steps=15),
            "t": APGD(eps=0.2, steps=15, loss="dlr-targeted", targets=3),
        }
    )


@pytest.mark.parametrize(
    "attack",
    [
        APGD(eps=0.2, steps=30),
        APGD(eps=0.2, loss="dlr-targeted", targets=2, steps=25),
        FAB(eps=0.2, targets=2, steps=21),
        Square(eps=0.2, queries=120),
        Square(eps=0.7, queries=120, norm="L2"),
    ],
    ids=repr,
)
def test_leaving_the_batch_late_changes_no_verdict(attack, monkeypatch):
    """On a GPU broken rows stay for a while, so that the host need not wait for the device."""
    model, (x, y) = robust_digits(), digits(40)
    early = model(attack(model, x, y, rng(40)).x_adv).argmax(1) == y
    for module in ("base", "apgd", "fab", "square"):
        monkeypatch.setattr(f"raysweep.attacks.{module}.is_on_cpu", lambda x: False)
    late = model(attack(model, x, y, rng(40)).x_adv).argmax(1) == y
    assert early.sum() < 38 and torch.equal(early, late)


def test_pgd_plus_needs_every_iterate_to_be_right():
    model, (x, y) = robust_digits(), digits(20)
    plus, once = build_named_attack("pgd+", 0.2), PGD(eps=0.2, step_size=0.01, steps=40)
    left = plus(model, x, y, rng(20)).robust_after
    alone = model(once(model, x, y, rng(20).derive_stream("pgd+-1")).x_adv).argmax(1) == y
    assert list(left) == [f"pgd+-{i}" for i in range(1, 6)]
    assert not (left["pgd+-1"] & ~alone).any() and left["pgd+-5"].sum() <= left["pgd+-1"].sum()


def test_official_versions():
    assert list(autoattack(version="plus").attacks) == [
        "apgd-ce",
        "apgd-dlr",
        "fab",
        "square",
        "apgd-t",
        "fab-t",
    ]
    assert autoattack(version="plus").attacks["apgd-dlr"].restarts == 5
    assert {a.samples for a in autoattack(version="rand").attacks.values()} == {20}
    assert {a.norm for a in autoattack(0.5, "L2").attacks.values()} == {"L2"}
    assert list(build_named_attack("square, apgd-dlr").attacks) == ["square", "apgd-dlr"]
    with pytest.raises(
        SpecError, match="'plus' is only for autoattack: leave it out for 'autoattack,square'"
    ):
        build_named_attack("autoattack,square", version="plus")


@pytest.mark.parametrize("name", ATTACK_DESCRIPTIONS)
def test_a_name_alone_and_in_a_list_is_the_same_attack(name):
    alone = build_named_attack(name).attacks
    assert build_named_attack(f"{name},apgd-dlr").attacks.items() >= alone.items()


def test_a_radius_as_one_writes_it():
    assert build_named_attack("pgd20", "8/255") == build_named_attack("pgd20", 8 / 255)


def test_a_name_again_is_a_restart():
    attacks = build_named_attack("autoattack,square, square").attacks
    assert list(attacks) == ["apgd-ce", "apgd-t", "fab-t", "square", "square-2", "square-3"]
    assert attacks["square"] == attacks["square-2"]
    model, (x, y) = robust_digits(), digits(20)
    first, second = (
        Square(eps=0.2, queries=5)(model, x, y, rng(20).derive_stream(name)).x_adv
        for name in ("square", "square-2")
    )
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", ["a/b", "clean", "robust", "", "x" * 65, "é:"])
def test_names_that_cannot_be_files(name):
    with pytest.raises(SpecError, match="cannot name an attack"):
        AttackCascade.from_data({"attacks": {name: {"kind": "fab"}}})


def test_unknown_names_are_refused_with_the_nearest():
    for make, near in (
        (lambda: build_named_attack("autoatack"), "autoattack"),
        (lambda: build_custom_cascade(["fab_t"]), "fab-t"),
    ):
        with pytest.raises(SpecError, match=near):
            make()


def test_too_few_logits_for_the_dlr_losses():
    model, (x, y) = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), digits(4)
    with pytest.raises(
        SpecError, match="dlr-targeted loss needs 4 logits or more, the model has 3; use cw"
    ):
        APGD(loss="dlr-targeted")(model, x, y % 3, rng(4))
    assert APGD(loss="dlr", steps=3)(model, x, y % 3, rng(4)).x_adv.shape == x.shape


def test_attacks_are_told_apart_by_kind():
    adapter = TypeAdapter(AnyAttack)
    cascade = adapter.validate_python(
        {"kind": "worst_case", "attacks": {"a": {"kind": "fab"}, "b": {"kind": "square"}}}
    )
    assert isinstance(cascade, AttackCascade) and isinstance(cascade.attacks["b"], Square)
    assert isinstance(adapter.validate_python({"steps": 3}), PGD)
    with pytest.raises(SpecError, match=r"no setting 'attacks.a.queries'; nearest: .*restarts"):
        AttackCascade.from_data({"attacks": {"a": {"kind": "apgd", "queries": 3}}})
    assert isinstance(
        APGD(eps=PiecewiseSchedule(boundaries=(1,), values=(0.1, 0.2))).resolve_at(3).eps, float
    )


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.2), ("L2", 0.7)])
def test_apgd_ce_breaks_about_as_many_as_the_official(norm, eps):
    """With the same starts the outcome is the same; other starts move it by up to 14 of 450."""
    model, (x, y) = robust_digits(), digits()
    result = APGD(eps=eps, norm=norm)(model, x, y, rng(450))
    robust = int((model(result.x_adv).argmax(1) == y).sum())
    assert abs(robust - int(OFFICIAL[f"{norm}.apgd-ce"].sum())) <= 16
