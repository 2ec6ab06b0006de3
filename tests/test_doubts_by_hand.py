"""The thresholds of an evaluation's warnings, on networks just within and just beyond them."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from ladder_network import LadderNetwork, ladder_images
from torch import Tensor, nn

from raysweep.attacks import APGD, FAB, PGD, SingleAttack, Square
from raysweep.evaluation.model_inspection import (
    ModelProperties,
    adapt_attack,
    check_labels,
    find_collapse_warning,
    find_square_masking_warning,
    inspect_model,
)
from raysweep.rng import ExampleRng
from raysweep.spec import SpecError


class Scripted(nn.Module):
    """A model that returns f(x, number of forwards before this one)."""

    def __init__(self, f: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.f, self.calls = f, 0
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.f(x, self.calls - 1) * self.weight


def plain_logits(x: Tensor) -> Tensor:
    """Ten logits of images (N, 1, 2, 2), up to 10 in size."""
    return 10 * x.flatten(1) @ torch.eye(4, 10) - 5 * torch.arange(10) / 9


IMAGES, LABELS = (
    torch.rand(12, 1, 2, 2, generator=torch.Generator().manual_seed(0)),
    torch.arange(12) % 4,
)


def inspect_function(
    f: Callable[[Tensor, int], Tensor],
    attacks: tuple[SingleAttack, ...] = (PGD(),),
    x: Tensor = IMAGES,
    y: Tensor = LABELS,
    eps: float = 0.0,
) -> ModelProperties:
    return inspect_model(
        Scripted(f), x, y, ExampleRng.for_examples(torch.arange(len(x)), 0), eps, attacks
    )


def test_a_sound_model_is_not_doubted() -> None:
    assert inspect_function(lambda x, call: plain_logits(x)) == ModelProperties(10, False, True, ())


@pytest.mark.parametrize(("share", "random"), [(3e-5, True), (3e-6, False)])
@pytest.mark.parametrize("call", [1, 4])
def test_a_model_is_random_if_one_of_five_answers_differs_by_a_hundred_thousandth(
    share, random, call
) -> None:
    def drifting_logits(x: Tensor, number: int) -> Tensor:
        logits = plain_logits(x)
        shift = torch.zeros_like(logits)
        shift[-1, 0] = share * float(plain_logits(IMAGES).abs().max()) * (number == call)
        return logits + shift

    found = inspect_function(drifting_logits)
    assert found.is_random is random and len(found.warnings) == random
    assert not random or "answers differently each time" in found.warnings[0]


def test_only_five_answers_are_compared() -> None:
    assert not inspect_function(lambda x, call: plain_logits(x) + (call == 5)).is_random


def test_a_random_model_gives_no_warning_if_every_attack_averages() -> None:
    rand, plain = APGD(samples=20), APGD()
    for attacks, doubts in (
        ((rand,), 0),
        ((rand, rand), 0),
        ((rand, plain), 1),
        ((plain,), 1),
        ((Square(),), 1),
    ):
        found = inspect_function(lambda x, call: plain_logits(x) + call, attacks)
        assert found.is_random and len(found.warnings) == doubts, attacks


def shares(x: Tensor) -> Tensor:
    return plain_logits(x).softmax(1)


@pytest.mark.parametrize(
    ("f", "probabilities"),
    [
        (shares, True),
        (lambda x: shares(x) * (1 + 5e-6), True),
        (lambda x: shares(x) * (1 + 1e-4), False),
        (lambda x: shares(x) * (1 - 1e-4), False),
        (lambda x: plain_logits(x).sigmoid(), False),
        # Rows that sum to 1, and one that does not.
        (lambda x: shares(x) + 0.01 * (torch.arange(12) == 11)[:, None], False),
        # Rows that sum to 1, with numbers below 0.
        (lambda x: plain_logits(x) - plain_logits(x).mean(1, keepdim=True) + 0.1, False),
    ],
)
def test_probabilities_are_at_least_0_and_sum_to_1(f, probabilities: bool) -> None:
    warnings = inspect_function(lambda x, call: f(x)).warnings
    assert any("outputs are probabilities" in warning for warning in warnings) is probabilities


@pytest.mark.parametrize(("spread", "constant"), [(0.0, True), (1e-4, False)])
def test_a_model_is_constant_if_all_examples_have_the_same_logits(
    spread: float, constant: bool
) -> None:
    def flat(x: Tensor, call: int) -> Tensor:
        logits = 0 * plain_logits(x) + torch.arange(10.0)
        return logits + spread * (torch.arange(len(x)) == len(x) - 1)[:, None]

    warnings = inspect_function(flat).warnings
    assert any("it is constant" in warning for warning in warnings) is constant
    alone = inspect_function(flat, x=IMAGES[:1], y=LABELS[:1]).warnings
    assert not any("it is constant" in warning for warning in alone), "one example cannot show it"


# Of eight images the first two are wrong; four are steep, three of them among those that are right.
DISTANCES, WHICH, STEEP = (
    [-0.1, -0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.2],
    [0, 1] * 4,
    [1, 0, 1, 1, 1, 0, 0, 0],
)


def warnings_of(
    model: nn.Module, attacks: tuple[SingleAttack, ...] = (PGD(),), eps: float = 0.0
) -> tuple[str, ...]:
    x, y = ladder_images(DISTANCES, WHICH, STEEP)
    return inspect_model(
        model, x, y, ExampleRng.for_examples(torch.arange(8), 0), eps, attacks
    ).warnings


def test_examples_without_a_gradient_are_counted_among_those_that_are_right() -> None:
    (warning,) = warnings_of(LadderNetwork())
    assert warning == (
        "3 of 8 examples looked at have zero CE gradient (its softmax saturates): attacks on the "
        "CE loss are unreliable"
    )
    assert warnings_of(LadderNetwork(), (Square(),)) == (), "Square needs no gradient"
    assert warnings_of(LadderNetwork(), (Square(), FAB())) == (warning,)


def test_a_masked_gradient_is_told_from_a_saturated_softmax() -> None:
    class Rounded(LadderNetwork):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward((x * 1000).round() / 1000)

    for warning, loss in zip(warnings_of(Rounded()), ("CE", "margin"), strict=True):
        assert warning == (
            f"6 of 8 examples looked at have zero {loss} gradient (its gradient is masked): "
            f"attacks on the {loss} loss are unreliable"
        )


def test_gradients_are_measured_near_the_images_and_not_at_them() -> None:
    """At the images themselves, multiples of 1/16, the gradient is zero; eps away it is not."""

    def trapped_logits(x: Tensor, call: int) -> Tensor:
        at_grid = ((x * 16).round() / 16 - x).abs().flatten(1).amax(1, keepdim=True) < 1e-6
        return torch.where(at_grid, plain_logits(x).detach() + 0 * x.sum(), plain_logits(x))

    x = (IMAGES * 16).round() / 16
    assert inspect_function(trapped_logits, x=x, eps=0.01).warnings == ()
    assert len(inspect_function(trapped_logits, x=x, eps=0.0).warnings) == 2


def test_only_square_attacks_a_model_without_a_gradient() -> None:
    found = inspect_function(lambda x, call: plain_logits(x.detach()))
    assert not found.is_differentiable
    assert found.warnings == (
        "the model has no gradient with respect to its input: only Square can be run",
    )
    assert inspect_function(lambda x, call: plain_logits(x.detach()), (Square(),)).warnings == ()


def test_which_attacks_a_model_allows() -> None:
    def nature(classes: int, differentiable: bool = True) -> ModelProperties:
        return ModelProperties(classes, False, differentiable, ())

    dlr, targeted, ce = APGD(loss="dlr", steps=7), APGD(loss="dlr-targeted", eps=0.1), APGD()
    for attack, least in (
        (dlr, 3),
        (targeted, 4),
        (ce, 2),
        (APGD(loss="cw"), 2),
        (PGD(), 2),
        (FAB(), 2),
        (Square(), 2),
    ):
        assert adapt_attack(attack, nature(least)) == (attack, None)
        if least > 2:
            message = (
                f"the {attack.loss} loss needs {least} logits, the model has {least - 1}: "
                "run with the cw loss"
            )
            assert adapt_attack(attack, nature(least - 1)) == (
                attack.model_copy(update={"loss": "cw"}),
                message,
            )
    for attack in (dlr, targeted, ce, PGD(), FAB()):
        assert adapt_attack(attack, nature(2, differentiable=False)) == (
            None,
            "left out: it needs a gradient",
        )
    assert adapt_attack(Square(), nature(2, differentiable=False)) == (Square(), None)


def test_labels_without_a_logit_are_refused() -> None:
    for labels in ([0, 3], [3], [0]):
        check_labels(np.array(labels), 4)
    for labels, low, high in (([0, 4], 0, 4), ([-1, 3], -1, 3)):
        with pytest.raises(
            SpecError, match=rf"y must lie in 0..3, as the model has 4 logits; got {low} to {high}"
        ):
            check_labels(torch.tensor(labels), 4)


def test_when_a_model_has_collapsed() -> None:
    one, several = np.array([2, 2, 2]), np.array([0, 2, 2])
    assert (
        find_collapse_warning(one, several)
        == "the model predicts class 2 for every example: it has collapsed"
    )
    assert find_collapse_warning(several, several) is None
    assert find_collapse_warning(one, one) is None, (
        "the model is right: all examples are of that class"
    )
    assert find_collapse_warning(one[:1], several[:1]) is None


def test_how_many_examples_square_may_break_after_the_others() -> None:
    assert (
        find_square_masking_warning(0.5, 0.4981) is None
        and find_square_masking_warning(0.5, 0.5) is None
    )
    line = find_square_masking_warning(0.5, 0.4978)
    assert line is not None and line.startswith("Square lowered robust accuracy by 0.22 points")


@pytest.mark.parametrize(
    ("f", "words"),
    [
        (
            lambda x: plain_logits(x)[:, :1],
            "must return (N, 2 or more) logits, it returned (12, 1)",
        ),
        (lambda x: plain_logits(x)[:, 0], "must return (N, 2 or more) logits, it returned (12,)"),
        (
            lambda x: plain_logits(x) + torch.tensor([torch.nan] + 9 * [0.0]),
            "returns logits that are not finite",
        ),
        (
            lambda x: plain_logits(x) - torch.tensor(9 * [0.0] + [torch.inf]),
            "returns logits that are not finite",
        ),
    ],
)
def test_models_that_cannot_be_attacked_are_refused(f, words: str) -> None:
    with pytest.raises(SpecError) as error:
        inspect_function(lambda x, call: f(x))
    assert words in str(error.value)


def test_a_model_is_examined_in_eval_mode_and_left_as_it_was() -> None:
    class Moody(LadderNetwork):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + (torch.rand(()) * 1e6 if self.training else 0)

    model = Moody().train()
    x, y = ladder_images([0.1, 0.1], [0, 1])
    assert (
        inspect_model(
            model, x, y, ExampleRng.for_examples(torch.arange(2), 0), 0.01, (PGD(),)
        ).warnings
        == ()
    )
    assert (
        model.training
        and model.scale.requires_grad
        and model.scale.grad is None
        and not x.requires_grad
    )
