"""The sweep's objective: a short, diverse set of attacks on the validation split."""

from collections.abc import Mapping
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from raysweep.attacks import APGD, PGD, AnyAttack, freeze_model, maybe_tf32
from raysweep.data import Split
from raysweep.losses import cross_entropy
from raysweep.rng import ExampleRng
from raysweep.schedules import Number
from raysweep.spec import Spec
from raysweep.training.gradient_masking import estimate_scaling_gap
from raysweep.training.input_gradients import input_gradient_norm

ObjectiveName = Literal["robust_worst", "clean", "pgd", "cw"]
OBJECTIVE_DESCRIPTIONS: dict[str, str] = {
    "robust_worst": "Right under PGD-20, CW-PGD-20 and a short targeted APGD: what a sweep maximises by default.",
    "clean": "Right on natural images.",
    "pgd": "Right under PGD-20, which reweighting fools.",
    "cw": "Right under CW-PGD-20.",
}
DEFAULT_OBJECTIVE: ObjectiveName = "robust_worst"
_MIN_DLR_CLASSES = 4


def _default_attacks() -> dict[str, AnyAttack]:
    pgd = PGD(steps=20)
    return {"pgd": pgd, "cw": pgd.replace(loss="cw")}


def _default_finish_attacks() -> dict[str, AnyAttack]:
    return {"apgd_t": APGD(steps=20, loss="dlr-targeted", targets=3)}


class Validation(Spec):
    """Which attacks judge a checkpoint while training, on the first `size` validation examples
    (null: all).

    attacks: face every example that is classified correctly, so that each has an accuracy of its
    own. finish: face what those left. Together the default ranks models nearly as AutoAttack does,
    which plain PGD does not: it overstates reweighted models most. objective: decides which epoch
    is the best. flatness: also how steep the loss is at friendly and at most adversarial data.
    scales: the first cross-entropy PGD of `attacks` is repeated, on a `scaled_share` of the images,
    against the logits times each of these (none: not at all). tf32: `attacks` and `finish` compute
    in TF32 (NVIDIA's GPUs), several times faster there; whether an example is still right is
    decided in float32 all the same.
    """

    attacks: Annotated[dict[str, AnyAttack], Field(min_length=1)] = Field(
        default_factory=_default_attacks
    )
    finish: dict[str, AnyAttack] = Field(default_factory=_default_finish_attacks)
    size: Annotated[int, Field(ge=1)] | None = None
    every: Annotated[int, Field(ge=1)] = 1
    batch_size: Annotated[int, Field(ge=1)] = 512
    objective: ObjectiveName = DEFAULT_OBJECTIVE
    flatness: bool = False
    scales: tuple[Annotated[Number, Field(gt=0)], ...] = (0.1, 10.0)
    scaled_share: Annotated[Number, Field(gt=0, le=1)] = 0.25
    tf32: bool = False

    @model_validator(mode="after")
    def _check_objective(self) -> Self:
        if self.objective not in ("robust_worst", "clean", *self.attacks):
            raise ValueError(
                f"objective = {self.objective!r}: none of `attacks`: {', '.join(self.attacks)}"
            )
        return self

    def __call__(self, model: nn.Module, split: Split) -> dict[str, float]:
        """Shares of the examples, in [0, 1]. Every checkpoint faces the same random starts.

        `clean`; accuracy under each of `attacks`, by name; `robust_worst`, right whatever the
        attack; `masking_gap`, what the first attack alone overstates that by; `zero_gradient`,
        right ones whose cross-entropy has no gradient. More symptoms of masked gradients:
        `val/ce_cw_gap`, accuracy under PGD on the cross-entropy less that under PGD on the margin;
        `val/scaling_gap`, what PGD breaks more when the logits it sees are scaled (Hitaj et al.
        2021), which moves no decision.
        """
        count = len(split) if self.size is None else min(self.size, len(split))
        parts: dict[str, list[Tensor]] = {}
        with freeze_model(model):
            for start in range(0, count, self.batch_size):
                rows = slice(start, min(start + self.batch_size, count))
                for name, part in self._validate_batch(model, split, rows).items():
                    parts.setdefault(name, []).append(part)
            flags = {name: torch.cat(several) for name, several in parts.items()}
            symptoms = self._compute_masking_gaps(model, split, flags)
        shares = {name: flag.float().mean().item() for name, flag in flags.items()}
        shares["masking_gap"] = shares[next(iter(self.attacks))] - shares["robust_worst"]
        shares |= symptoms
        if self.flatness:
            first = next(
                (attack for attack in self.attacks.values() if isinstance(attack, PGD)), PGD()
            )
            shares |= input_gradient_norm(model, split, first, count, self.batch_size)
        return shares

    def _compute_masking_gaps(
        self, model: nn.Module, split: Split, correct_masks: Mapping[str, Tensor]
    ) -> dict[str, float]:
        """The gaps of `val/`, as far as there are such attacks."""
        pgds = {name: attack for name, attack in self.attacks.items() if isinstance(attack, PGD)}
        ce_name, cw_name = (
            next((n for n, a in pgds.items() if a.loss == loss), None) for loss in ("ce", "cw")
        )
        if ce_name is None:
            return {}
        found = {}
        if cw_name is not None:
            found["val/ce_cw_gap"] = (
                (correct_masks[ce_name].float() - correct_masks[cw_name].float()).mean().item()
            )
        if self.scales:
            found["val/scaling_gap"] = estimate_scaling_gap(
                model,
                split,
                pgds[ce_name],
                correct_masks[ce_name],
                self.scales,
                self.scaled_share,
                self.batch_size,
            )
        return found

    def _validate_batch(self, model: nn.Module, split: Split, rows: slice) -> dict[str, Tensor]:
        x, y, index = split.get_float_images(rows), split.y[rows], split.index[rows]
        correct, classes, zero = _find_zero_gradients(model, x, y)
        flags = {"clean": correct, "zero_gradient": zero}
        worst = correct.clone()
        for name, attack in {**self.attacks, **self.finish}.items():
            alone = name in self.attacks
            where = (correct if alone else worst).nonzero()[:, 0]
            survived = torch.zeros_like(correct)
            if len(where):
                rng = ExampleRng.for_examples(index[where], 0, "validation", name)
                with maybe_tf32(self.tf32):
                    found = _replace_unsupported_dlr(attack, classes)(
                        model, x[where], y[where], rng
                    )
                with torch.no_grad():
                    survived[where] = model(found.x_adv).argmax(1) == y[where]
            worst &= survived
            if alone:
                flags[name] = survived
        return {**flags, "robust_worst": worst}


def _find_zero_gradients(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, int, Tensor]:
    """Rows that are right, the number of classes, and right rows without a gradient."""
    x = x.detach().requires_grad_()
    logits = model(x)
    (grad,) = torch.autograd.grad(cross_entropy(logits, logits, y).sum(), x)
    correct = logits.detach().argmax(1) == y
    return correct, logits.shape[1], correct & (grad.flatten(1) == 0).all(1)


def _replace_unsupported_dlr(attack: AnyAttack, n_classes: int) -> AnyAttack:
    """The targeted DLR loss compares four logits; with fewer classes the margin loss stands in."""
    if isinstance(attack, APGD) and attack.loss.startswith("dlr") and n_classes < _MIN_DLR_CLASSES:
        return attack.replace(loss="cw")
    return attack
