"""Validation during training: a few fast, different attacks. Sweeps rank trials by the results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import Field, field_validator, model_validator

from raysweep.attacks import (
    APGD,
    PGD,
    AnyAttack,
    Norm,
    freeze_model,
    maybe_tf32,
    true_class_margin,
)
from raysweep.data import DatasetSplits, Split, choose_subset_rows
from raysweep.lazy_modules import torch
from raysweep.losses import cross_entropy
from raysweep.rng import ExampleRng
from raysweep.schedules import Number, resolved_value
from raysweep.spec import Spec
from raysweep.training.input_gradient_norms import input_gradient_norm

if TYPE_CHECKING:
    from torch import Tensor, nn

ObjectiveName = Literal["robust_worst", "clean", "pgd", "cw"]
OBJECTIVE_DESCRIPTIONS: dict[str, str] = {
    "robust_worst": "Accuracy under the worst of PGD-20, CW-PGD-20 and MultiTargeted; the default "
    "of sweeps.",
    "clean": "Accuracy on natural images.",
    "pgd": "Accuracy under PGD-20, which overestimates reweighted models.",
    "cw": "Accuracy under CW-PGD-20.",
}
DEFAULT_OBJECTIVE: ObjectiveName = "robust_worst"
_NATURAL_OBJECTIVE = "clean"
_MIN_DLR_CLASSES = 4
# Of smaller data sets 1,000 images would take a notable part of the time of an epoch.
_DEFAULT_TRAIN_EXAMPLES, _MIN_TRAIN_IMAGES_BY_DEFAULT = 1000, 40_000
# 0.0314 stands for 8/255; 0.031 is another radius.
_SAME_EPS_TOLERANCE = 1e-3


def _default_attacks() -> dict[str, AnyAttack]:
    """Return PGD-20 on the cross-entropy and on the margin loss."""
    pgd = PGD(steps=20)
    return {"pgd": pgd, "cw": pgd.replace(loss="cw")}


def _default_finish_attacks() -> dict[str, AnyAttack]:
    """Return a short targeted APGD."""
    return {"apgd_t": APGD(steps=20, loss="dlr-targeted", targets=3)}


def is_robust_objective(metric: str) -> bool:
    """Return whether an objective is an accuracy under attacks, which AutoAttack can lower."""
    return metric != _NATURAL_OBJECTIVE


class ValidationResult(NamedTuple):
    """Result of a validation.

    Attributes:
        metrics: As `Validation.__call__` returns.
        correct: Whether each example counts as correct by the objective, (N,) bool.
    """

    metrics: dict[str, float]
    correct: Tensor


class Validation(Spec):
    """How checkpoints are evaluated during training, on validation examples.

    The default attacks together rank models nearly as AutoAttack does. PGD alone does not: it
    overestimates the robustness of reweighted models more than that of others.
    """

    later_fields: ClassVar[frozenset[str]] = frozenset(
        {"split", "window", "train_examples", "train_steps"}
    )

    attacks: Annotated[dict[str, AnyAttack], Field(min_length=1)] = Field(
        default_factory=_default_attacks
    )
    """Name -> attack. Each attack runs on all correctly classified examples, so that its accuracy
    is a metric."""

    finish: dict[str, AnyAttack] = Field(default_factory=_default_finish_attacks)
    """Name -> further attack, which runs only on examples that survive all attacks before it. New
    trainings and sweeps have `multi_targeted` here, a MultiTargeted attack; those of raysweep 0.1
    keep `apgd_t`, and so does a file that sets it."""

    size: Annotated[int, Field(ge=1)] | None = None
    """Number of examples, equally many of each class. null: all."""

    every: Annotated[int, Field(ge=1)] = 1
    """Evaluate after every n-th epoch. The last epoch is always evaluated, and so are those before
    and after each drop of a piecewise learning rate."""

    batch_size: Annotated[int, Field(ge=1)] = 512
    """Examples in a batch."""

    objective: ObjectiveName = DEFAULT_OBJECTIVE
    """Metric that decides which epoch is the best; larger is better."""

    split: Literal["val", "test"] = "val"
    """Images that decide which epoch is the best: a part of the training images, or the test images
    as in the papers. With `test`, the best epoch is chosen on the images of the final results, so
    these are too high."""

    window: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = None
    """First and last epoch, from 1, among which the best epoch is chosen. null: all after the
    burn-in."""

    flatness: bool = False
    """Also measure the norm of the loss's input gradient at friendly adversarial examples (PGD-20
    that stops at the first misclassification) and at those of PGD-20."""

    train_examples: Annotated[int, Field(ge=0)] | None = None
    """Number of training images on which `train/robust` is measured: the accuracy under PGD, in
    eval mode and without augmentation. They are the first ones, or equally many of each class if
    the first ones lack one. null: 1,000 if there are at least 40,000 training images, where this
    takes less than 5% of the time of PGD training; otherwise none."""

    train_steps: Annotated[int, Field(ge=1)] = 20
    """Number of steps of the PGD of `train/robust`; its other settings are those of the first
    cross-entropy PGD of `attacks`."""

    scales: tuple[Annotated[Number, Field(gt=0)], ...] = (0.1, 10.0)
    """Factors for a test of masked gradients: the first cross-entropy PGD of `attacks` also attacks
    the model with its logits multiplied by each factor. Empty: no test."""

    scaled_share: Annotated[Number, Field(gt=0, le=1)] = 0.25
    """Share of the examples that the test with `scales` uses."""

    tf32: bool = False
    """Compute the attacks in TF32, which is several times faster on NVIDIA's GPUs. Whether an
    example survives is still decided in float32."""

    @field_validator("window")
    @classmethod
    def _check_window(cls, window: tuple[int, int] | None) -> tuple[int, int] | None:
        """Reject a window that ends before it begins."""
        if window is not None and window[0] > window[1]:
            raise ValueError(f"the first epoch, {window[0]}, comes after the last, {window[1]}")
        return window

    @model_validator(mode="after")
    def _check_objective(self) -> Self:
        """Reject an objective that none of the attacks measures."""
        if self.objective not in ("robust_worst", "clean", *self.attacks):
            raise ValueError(
                f"objective = {self.objective!r}: none of `attacks`: {', '.join(self.attacks)}"
            )
        return self

    def select_split(self, data: DatasetSplits) -> Split:
        """Return the images of a data set that `split` names, the ones to validate on first."""
        if self.split == "val":
            return data.val
        # The first validation images have all classes; test sets are often sorted by class.
        test = data.require_test()
        if self.size is None or self.size >= len(test):
            return test
        return test.select_rows(choose_subset_rows(test.y, self.size))

    @property
    def threat(self) -> str:
        """Norm and radius of the attacks, such as `Linf eps 0.031`; "" if none has a radius."""
        for attack in self._find_sized_attacks().values():
            return f"{attack.norm} eps {_format_setting(attack.eps)}"
        return ""

    def find_threat_model(self) -> tuple[float, Norm] | None:
        """Return radius (in pixels of [0, 1]) and norm of the first attack that has them.

        Returns:
            Radius and norm, after `resolve_at`; None if no attack has a radius.
        """
        for attack in self._find_sized_attacks().values():
            return float(resolved_value(attack.eps)), attack.norm
        return None

    def _find_sized_attacks(self) -> dict[str, Any]:
        """Return all attacks that have a radius, also those in cascades, by dotted path."""
        attacks: dict[str, Any] = {}
        for part, named_attacks in (("attacks", self.attacks), ("finish", self.finish)):
            for name, attack in named_attacks.items():
                attacks[f"{part}.{name}"] = attack
                for inner_name, inner in getattr(attack, "attacks", {}).items():
                    attacks[f"{part}.{name}.attacks.{inner_name}"] = inner
        return {path: attack for path, attack in attacks.items() if hasattr(attack, "eps")}

    def find_threat_problem(self) -> str | None:
        """Describe attacks of different radius or norm, whose results do not belong together.

        Files of raysweep 0.1 may have them, so this is no check of the class itself.

        Returns:
            One line with the path of the setting; None if all attacks have one threat model.
        """
        sized = self._find_sized_attacks()
        first_path = next(iter(sized), "")
        for path, attack in sized.items():
            first = sized[first_path]
            for key in ("eps", "norm"):
                value, expected = getattr(attack, key), getattr(first, key)
                if not _is_same_setting(value, expected):
                    return (
                        f"validation.{path}.{key} = {_format_setting(value)}: "
                        f"validation.{first_path} has {_format_setting(expected)}; one validation "
                        f"has one {key}: set 'validation.*.{key}'"
                    )
        return None

    def __call__(self, model: nn.Module, split: Split) -> dict[str, float]:
        """Evaluate a model. The attacks' random starts are the same for all checkpoints.

        Args:
            model: Maps images in [0, 1], (N, C, H, W), to logits.
            split: The validation split, of which the first `size` examples are used.

        Returns:
            Shares of the examples, in [0, 1] except for gaps:

            * `clean`: accuracy on natural images.
            * The name of each of `attacks`: accuracy under it.
            * `robust_worst`: share that survives all attacks.
            * `robust_margin`: margin z_y - max_{i != y} z_i of an example under the worst attack
              divided by its margin without an attack, averaged over the examples; 0 for an example
              that does not survive. It does not depend on the scale of the logits, and breaks ties
              of `robust_worst`.
            * `masking_gap`: accuracy under the first attack minus `robust_worst`.
            * `zero_gradient`: share of examples that are correct and whose cross-entropy has zero
              gradient.
            * `val/ce_cw_gap`: accuracy under PGD on the cross-entropy minus that under PGD on the
              margin loss.
            * `val/scaling_gap`: share that PGD breaks only on scaled logits (Hitaj et al. 2021).
            * `flatness_friendly`, `flatness_adversarial`: see `input_gradient_norm`.
        """
        return self.measure(model, split).metrics

    def measure(self, model: nn.Module, split: Split) -> ValidationResult:
        """Evaluate a model, and say which examples it gets right by the objective.

        Args:
            model: As for `__call__`.
            split: As for `__call__`.

        Returns:
            The metrics, and the verdicts on the first `size` examples.
        """
        n_examples = len(split) if self.size is None else min(self.size, len(split))
        batches: dict[str, list[Tensor]] = {}
        with freeze_model(model):
            for start in range(0, n_examples, self.batch_size):
                rows = slice(start, min(start + self.batch_size, n_examples))
                for name, mask in self._validate_batch(model, split, rows).items():
                    batches.setdefault(name, []).append(mask)
            masks = {name: torch.cat(parts) for name, parts in batches.items()}
            masking_gaps = self._compute_masking_indicators(model, split, masks)
        metrics = {name: mask.float().mean().item() for name, mask in masks.items()}
        metrics["robust_margin"] = round(metrics["robust_margin"], 6)
        metrics["masking_gap"] = metrics[next(iter(self.attacks))] - metrics["robust_worst"]
        metrics |= masking_gaps
        if self.flatness:
            pgd = next(iter(self._pgd_attacks().values()), PGD())
            metrics |= input_gradient_norm(model, split, pgd, n_examples, self.batch_size)
        return ValidationResult(metrics, masks[self.objective])

    def count_train_examples(self, n_train: int) -> int:
        """Return the number of images that `measure_training_accuracy` is meant for.

        Args:
            n_train: Number of training images.

        Returns:
            `train_examples` or its default, and no more than there are; 0 without a PGD on the
            cross-entropy in `attacks`.
        """
        if self._find_ce_pgd() is None:
            return 0
        wanted = self.train_examples
        if wanted is None:
            is_cheap = n_train >= _MIN_TRAIN_IMAGES_BY_DEFAULT
            wanted = _DEFAULT_TRAIN_EXAMPLES if is_cheap else 0
        return min(wanted, n_train)

    def measure_training_accuracy(self, model: nn.Module, split: Split) -> float:
        """Measure the accuracy on training images under PGD with `train_steps` steps.

        Args:
            model: Maps images in [0, 1], (N, C, H, W), to logits; attacked in eval mode.
            split: The training images to measure, without augmentation.

        Returns:
            The accuracy, in [0, 1]. The random starts are the same in each call.
        """
        ce_pgd = self._find_ce_pgd()
        assert ce_pgd is not None
        attack = ce_pgd.replace(steps=self.train_steps, tau=None)
        n_correct = 0
        with freeze_model(model):
            for start in range(0, len(split), self.batch_size):
                rows = slice(start, start + self.batch_size)
                y = split.y[rows]
                rng = ExampleRng.for_examples(split.index[rows], 0, "training accuracy")
                with maybe_tf32(self.tf32):
                    x_adv = attack(model, split.get_float_images(rows), y, rng).x_adv
                with torch.no_grad():
                    n_correct += int((model(x_adv).argmax(1) == y).sum())
        return n_correct / len(split)

    def _find_ce_pgd(self) -> PGD | None:
        """Return the first of `attacks` that is PGD on the cross-entropy."""
        of_ce = (attack for attack in self._pgd_attacks().values() if attack.loss == "ce")
        return next(of_ce, None)

    def _pgd_attacks(self) -> dict[str, PGD]:
        """Return the attacks of `attacks` that are PGD."""
        return {name: attack for name, attack in self.attacks.items() if isinstance(attack, PGD)}

    def _compute_masking_indicators(
        self, model: nn.Module, split: Split, correct_masks: Mapping[str, Tensor]
    ) -> dict[str, float]:
        """Compute `val/ce_cw_gap` and `val/scaling_gap`, if there are attacks for them."""
        pgd_attacks = self._pgd_attacks()
        name_by_loss: dict[str, str] = {}
        for name, attack in pgd_attacks.items():
            name_by_loss.setdefault(attack.loss, name)
        if "ce" not in name_by_loss:
            return {}
        ce_name = name_by_loss["ce"]
        ce_mask = correct_masks[ce_name]
        gaps = {}
        if "cw" in name_by_loss:
            cw_mask = correct_masks[name_by_loss["cw"]]
            gaps["val/ce_cw_gap"] = (ce_mask.float() - cw_mask.float()).mean().item()
        if self.scales:
            from raysweep.training.gradient_masking import estimate_scaling_gap

            gaps["val/scaling_gap"] = estimate_scaling_gap(
                model,
                split,
                pgd_attacks[ce_name],
                ce_mask,
                self.scales,
                self.scaled_share,
                self.batch_size,
            )
        return gaps

    def _validate_batch(self, model: nn.Module, split: Split, rows: slice) -> dict[str, Tensor]:
        """Return metric name -> values (N,) of one batch: bool, but float for `robust_margin`.

        Metrics are the means of these values.
        """
        x, y, index = split.get_float_images(rows), split.y[rows], split.index[rows]
        logits, zero_gradient = _find_zero_gradients(model, x, y)
        correct, clean_margin = logits.argmax(1) == y, true_class_margin(logits, y)
        masks = {"clean": correct, "zero_gradient": zero_gradient}
        survives_all, margin = correct.clone(), clean_margin.clone()
        for name, attack in {**self.attacks, **self.finish}.items():
            has_own_metric = name in self.attacks
            targets = (correct if has_own_metric else survives_all).nonzero()[:, 0]
            survives = torch.zeros_like(correct)
            if len(targets):
                rng = ExampleRng.for_examples(index[targets], 0, "validation", name)
                supported_attack = _replace_unsupported_dlr(attack, logits.shape[1])
                with maybe_tf32(self.tf32):
                    result = supported_attack(model, x[targets], y[targets], rng)
                with torch.no_grad():
                    attacked_logits = model(result.x_adv)
                survives[targets] = attacked_logits.argmax(1) == y[targets]
                attacked_margin = true_class_margin(attacked_logits, y[targets])
                margin[targets] = torch.minimum(margin[targets], attacked_margin)
            survives_all &= survives
            if has_own_metric:
                masks[name] = survives
        kept_share = (margin / clean_margin).clamp(0, 1)
        # A tie between two classes is no margin: 0 / 0.
        has_margin = survives_all & (clean_margin > 0)
        robust_margin = torch.where(has_margin, kept_share, torch.zeros_like(kept_share))
        return {**masks, "robust_worst": survives_all, "robust_margin": robust_margin}


def _is_same_setting(value: Any, other: Any) -> bool:
    """Return whether two settings are equal; numbers may differ by 0.1%."""
    if isinstance(value, float) and isinstance(other, float):
        return abs(value - other) <= _SAME_EPS_TOLERANCE * max(abs(value), abs(other))
    return bool(value == other)


def _format_setting(value: Any) -> str:
    """Format a number with four digits, anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _find_zero_gradients(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits, and which rows are correct and have zero gradient."""
    x = x.detach().requires_grad_()
    logits = model(x)
    (grad,) = torch.autograd.grad(cross_entropy(logits, logits, y).sum(), x)
    logits = logits.detach()
    return logits, (logits.argmax(1) == y) & (grad.flatten(1) == 0).all(1)


def _replace_unsupported_dlr(attack: AnyAttack, n_classes: int) -> AnyAttack:
    """Replace a DLR loss by the margin loss if there are too few classes: DLR compares 4 logits."""
    if isinstance(attack, APGD) and attack.loss.startswith("dlr") and n_classes < _MIN_DLR_CLASSES:
        return attack.replace(loss="cw")
    return attack
