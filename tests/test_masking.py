"""Symptoms of masked gradients in the metrics of an epoch."""

import pytest
import torch
from robust_digits import OFFICIAL, Wrapped, robust_digits

from raysweep.attacks import PGD
from raysweep.data import Split
from raysweep.evaluation.float32_precision import disable_tf32_and_autocast
from raysweep.training.gradient_masking import estimate_scaling_gap
from raysweep.training.validation import Validation


def test_scaling_the_logits_exposes_a_cross_entropy_that_saturates() -> None:
    """Logits times 1000 decide the same and leave PGD without a gradient, until they are scaled
    back.
    """
    x, y = (torch.tensor(OFFICIAL[name][:60]) for name in ("x_test", "y_test"))
    images = Split(x, y, torch.arange(60), pixel_max=16)
    step = {"eps": 0.2, "step_size": 0.04, "steps": 10}
    attacks = {"pgd": PGD(**step), "cw": PGD(**step, loss="cw")}
    judge = Validation(attacks=attacks, finish={}, scales=(1e-3, 10.0), scaled_share=1.0)
    honest, masked = (
        judge(robust_digits(), images),
        judge(Wrapped(lambda model, x: 1000 * model(x)), images),
    )
    assert masked["clean"] == honest["clean"] and masked["cw"] == honest["cw"]
    assert honest["val/scaling_gap"] < 0.1 and masked["val/scaling_gap"] > 0.3, (honest, masked)
    assert (
        masked["val/ce_cw_gap"] == pytest.approx(masked["pgd"] - masked["cw"])
        and masked["val/ce_cw_gap"] > 0.3
    )
    without = judge.model_copy(update={"scales": ()})(robust_digits(), images)
    assert "val/scaling_gap" not in without and without["pgd"] == honest["pgd"]


def test_tf32_is_for_attacks_and_has_no_say_in_verdicts() -> None:
    """A model that TF32 turns round: attacks walk the wrong way, and what they end at is judged as
    it is.
    """

    def flipped_in_tf32(model, x):
        return model(x) * (-1 if torch.backends.cudnn.conv.fp32_precision == "tf32" else 1)

    x, y = (torch.tensor(OFFICIAL[name][:60]) for name in ("x_test", "y_test"))
    images = Split(x, y, torch.arange(60), pixel_max=16)
    judge = Validation(
        attacks={"pgd": PGD(eps=0.2, step_size=0.04, steps=10)}, finish={}, scales=()
    )
    with disable_tf32_and_autocast(torch.device("cpu")):
        float32 = judge(Wrapped(flipped_in_tf32), images)
        tf32 = judge.model_copy(update={"tf32": True})(Wrapped(flipped_in_tf32), images)
    assert tf32["clean"] == float32["clean"] and tf32["pgd"] > 0.9 > 0.7 > float32["pgd"]


def test_workers_who_divide_a_split_find_the_gap_of_one() -> None:
    x, y = (torch.tensor(OFFICIAL[name][:60]) for name in ("x_test", "y_test"))
    model, attack, survived = (
        robust_digits().eval(),
        PGD(eps=0.2, step_size=0.04, steps=3),
        torch.ones(60) > 0,
    )
    whole = estimate_scaling_gap(
        model, Split(x, y, torch.arange(60), 16), attack, survived, (0.1,), 0.5
    )
    halves = [
        estimate_scaling_gap(
            model,
            Split(x[r::2], y[r::2], torch.arange(60)[r::2], 16),
            attack,
            survived[r::2],
            (0.1,),
            0.5,
        )
        for r in range(2)
    ]
    assert sum(halves) / 2 == pytest.approx(whole) and whole > 0
