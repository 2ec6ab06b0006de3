"""Methods: training losses that are sums of weighted terms over natural and adversarial images.

The inputs of a term are batches of images: `natural`, or the adversarial images of an attack, which
have the attack's name. "G eq." and "L eq." cite the papers of GAIRAT and LRAT.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Self

from pydantic import Field, field_validator, model_validator

from raysweep.attacks import AnyAttack, AttackResult
from raysweep.instance_weights import AnyWeight, RemainderWeight, UniformWeight, WeightInputs
from raysweep.lazy_modules import torch
from raysweep.losses import LOSSES, LossName
from raysweep.rng import ExampleRng
from raysweep.schedules import Schedule, bounded, resolved_value
from raysweep.spec import Spec, SpecError, describe_unknown_name, is_safe_name
from raysweep.worker_group import SINGLE_WORKER, WorkerGroup

if TYPE_CHECKING:
    from torch import Tensor, nn

NATURAL_INPUT = "natural"
# Kind of a weight that uses kappa -> kinds of attacks whose kappa has the meaning that it expects.
_KAPPA_ATTACK_KINDS = {"geometry": ("pgd",), "within_margin": ("pgd", "minimal")}


class Term(Spec):
    """One term of the loss: coef x mean(weight x loss).

    If the term has several inputs, the losses of an example at all inputs are added.
    """

    loss: LossName = "ce"
    """Loss of an example: `ce`, cross-entropy; `margin`, MART's margin term; `bce`, the sum of both
    (boosted cross-entropy); `kl`, KL(p(x) || p(x~)); `kl_misclassified`, the same times 1 - p_y(x)
    (MART)."""

    on: str
    """Inputs of the loss: `natural`, the name of an attack, or several of them joined by `+`."""

    coef: Annotated[Schedule, bounded(0)] = 1.0
    """Factor of the term, at least 0."""

    weight: AnyWeight = Field(default_factory=UniformWeight)
    """Instance weight of the examples."""

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs, in the order of `on`."""
        return tuple(part.strip() for part in self.on.split("+"))

    @property
    def deciding_input_name(self) -> str:
        """Name of the input that decides the weight: `weight.by` if set, else the first input."""
        return getattr(self.weight, "by", None) or self.input_names[0]

    @property
    def needs_natural_logits(self) -> bool:
        """Whether the loss or the weight of the term uses the logits of natural images."""
        input_names = (*self.input_names, self.deciding_input_name)
        return NATURAL_INPUT in input_names or self.loss.startswith("kl")


@dataclass(frozen=True)
class MethodOutput:
    """Result of a method for one training step; rows are those of the local batch.

    Attributes:
        loss: Scalar to differentiate.
        natural_logits: Logits of natural images (N, classes) with gradient; None if no term uses
            them.
        logits: Input name -> logits (N, classes) with gradient.
        attack_results: Attack name -> its result; without attacks that no term uses in this epoch.
        weights: Term name -> instance weights (N,) without gradient, before normalisation.
        global_batch_size: Number of rows on all workers, a scalar tensor.
    """

    loss: Tensor
    natural_logits: Tensor | None
    logits: Mapping[str, Tensor]
    attack_results: Mapping[str, AttackResult]
    weights: Mapping[str, Tensor]
    global_batch_size: Tensor


class Method(Spec):
    """A training method: named attacks, and the named terms of its loss."""

    name: str = "inline"
    """Name of the method in folders and tables: letters, digits and `- _ .`, not starting with
    `.`."""

    attacks: dict[str, AnyAttack] = Field(default_factory=dict)
    """Name -> attack that makes adversarial images in each step. Each must be used by a term."""

    terms: Annotated[dict[str, Term], Field(min_length=1)]
    """Name -> term of the loss. The order matters for `remainder` weights, which use the weights of
    earlier terms."""

    normalise: bool = False
    """Divide the loss by the mean, over the global batch, of the summed weights of all terms
    (L eq. 17)."""

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        """Reject names that folders cannot have, because folders of runs contain the name."""
        if not is_safe_name(name):
            raise ValueError("use letters, digits, '-', '_' and '.', not starting with '.'")
        return name

    @field_validator("attacks", "terms")
    @classmethod
    def _check_attack_and_term_names(cls, parts: dict[str, object]) -> dict[str, object]:
        """Reject names that paths of settings cannot contain, and an attack called `natural`."""
        for name in parts:
            if name == NATURAL_INPUT and not isinstance(parts[name], Term):
                raise ValueError(
                    f"{NATURAL_INPUT!r} is the name of the natural images, not of an attack"
                )
            if not name.isidentifier():
                raise ValueError(f"{name!r} is not a plain name: use letters, digits and _")
        return parts

    @model_validator(mode="after")
    def _check_terms(self) -> Self:
        """Reject references to unknown inputs or terms, wrong kappa and unused attacks."""
        problems: list[str] = []
        earlier_terms: list[str] = []
        used_inputs: set[str] = set()
        for name, term in self.terms.items():
            problems += self._find_term_problems(name, term, earlier_terms)
            earlier_terms.append(name)
            used_inputs.update(term.input_names, [term.deciding_input_name])
        for name in self.attacks:
            if name not in used_inputs:
                problems.append(f"attacks.{name}: no term uses it")
        if problems:
            raise SpecError(problems)
        return self

    def _find_term_problems(self, name: str, term: Term, earlier_terms: list[str]) -> list[str]:
        """Return one line for each problem of a term."""
        input_names = [NATURAL_INPUT, *self.attacks]
        problems = [
            f"terms.{name}.on: {describe_unknown_name('input', input_name, input_names)}"
            for input_name in term.input_names
            if input_name not in input_names
        ]
        if isinstance(term.weight, RemainderWeight):
            problems += [
                f"terms.{name}.weight.of: {other!r} is not a term before it"
                for other in term.weight.of
                if other not in earlier_terms
            ]
        weight_input = term.deciding_input_name
        if weight_input not in input_names and weight_input not in term.input_names:
            suggestion = describe_unknown_name("input", weight_input, input_names)
            problems.append(f"terms.{name}.weight.by: {suggestion}")
        elif problem := self._find_kappa_problem(term):
            problems.append(f"terms.{name}.weight: {problem}")
        return problems

    def _find_kappa_problem(self, term: Term) -> str | None:
        """Return why the weight cannot use the kappa of its input, or None if it can."""
        weight_input = term.deciding_input_name
        attack_kinds = _KAPPA_ATTACK_KINDS.get(term.weight.kind)
        attack = self.attacks.get(weight_input)
        if attack_kinds and weight_input == NATURAL_INPUT:
            return f"{term.weight.kind} weights need kappa; set `by` to an attack"
        if not attack_kinds or attack is None:
            return None
        if attack.kind not in attack_kinds:
            return (
                f"{term.weight.kind} weights take kappa from {' or '.join(attack_kinds)}; "
                f"{weight_input!r} is {attack.kind}"
            )
        if getattr(term.weight, "official", False) and attack.steps < 2:
            return (
                "official weights divide by floor(steps / 2): "
                f"attacks.{weight_input}.steps must be 2 or more"
            )
        return None

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        rng: ExampleRng,
        workers: WorkerGroup = SINGLE_WORKER,
        attack_model: nn.Module | None = None,
    ) -> MethodOutput:
        """Run the attacks, then one forward pass for each input, and return the weighted loss.

        Terms whose `coef` or weight is 0 in this epoch are left out with the attacks that only they
        use, so that these cost no time and their images do not enter the batch norms.

        The loss is scaled so that the mean of its gradients over workers is the gradient of the
        global batch.

        Args:
            model: The model to train. Losses use the mode that it is in.
            x: Natural images of the local batch, (N, C, H, W) in [0, 1].
            y: True labels, (N,) int64.
            rng: Random numbers of the N examples.
            workers: The workers that share the global batch.
            attack_model: A module that equals the model in eval mode and is faster. Attacks in eval
                mode use it; None for the model itself.

        Returns:
            The loss, and the logits, attack results and weights from which it was computed.
        """
        loss_terms = self._find_loss_terms()
        term_names = self._list_used_terms(loss_terms)
        input_names = self._list_used_inputs(term_names, loss_terms)
        attack_results: dict[str, AttackResult] = {}
        for name, attack in self.attacks.items():
            if name not in input_names:
                continue
            target = model
            if attack_model is not None and getattr(attack, "mode", "eval") == "eval":
                target = attack_model
            attack_results[name] = attack(target, x, y, rng.derive_stream("attack", name))
        logits: dict[str, Tensor] = {}
        if NATURAL_INPUT in input_names:
            logits[NATURAL_INPUT] = model(x)
        logits |= {name: model(result.x_adv) for name, result in attack_results.items()}
        weights = self._compute_weights(term_names, logits, y, attack_results)
        global_batch_size = workers.all_reduce_sum(x.new_full((), len(y)))
        loss = self._compute_loss(loss_terms, logits, y, weights, global_batch_size, workers)
        return MethodOutput(
            loss=loss,
            natural_logits=logits.get(NATURAL_INPUT),
            logits=logits,
            attack_results=attack_results,
            weights=weights,
            global_batch_size=global_batch_size,
        )

    def _find_loss_terms(self) -> set[str]:
        """Return the terms that add to the loss in this epoch; all if none would.

        Left out are those whose `coef` is 0, unless `normalise` needs their weights, and those
        whose weight is 0 for every example.
        """
        names = set()
        for name, term in self.terms.items():
            has_coef = self.normalise or resolved_value(term.coef) != 0
            if has_coef and self._find_constant_weight(name) != 0:
                names.add(name)
        return names or set(self.terms)

    def _find_constant_weight(self, term_name: str) -> float | None:
        """Return a term's weight if it is the same for every example, else None."""
        weight = self.terms[term_name].weight
        if isinstance(weight, UniformWeight):
            return 1.0
        if not isinstance(weight, RemainderWeight):
            return None
        subtracted = [self._find_constant_weight(name) for name in weight.of]
        constants = [value for value in subtracted if value is not None]
        if len(constants) < len(subtracted):
            return None
        return max(resolved_value(weight.total) - sum(constants), 0.0)

    def _list_used_terms(self, loss_terms: set[str]) -> list[str]:
        """Return the terms of the loss, and those whose weights a `remainder` of them needs."""
        used = set(loss_terms)
        # A remainder refers to earlier terms only.
        for name, term in reversed(self.terms.items()):
            if name in used and isinstance(term.weight, RemainderWeight):
                used.update(term.weight.of)
        return [name for name in self.terms if name in used]

    def _list_used_inputs(self, term_names: list[str], loss_terms: set[str]) -> set[str]:
        """Return the inputs that the losses and the weights of some terms need."""
        input_names: set[str] = set()
        for name in term_names:
            term = self.terms[name]
            input_names.add(term.deciding_input_name)
            if name in loss_terms:
                input_names.update(term.input_names)
                if term.needs_natural_logits:
                    input_names.add(NATURAL_INPUT)
        return input_names

    def _compute_loss(
        self,
        loss_terms: set[str],
        logits: Mapping[str, Tensor],
        y: Tensor,
        weights: Mapping[str, Tensor],
        global_batch_size: Tensor,
        workers: WorkerGroup,
    ) -> Tensor:
        """Return the scaled sum of the terms."""
        tiny = torch.finfo(global_batch_size.dtype).tiny
        total = global_batch_size.new_zeros(())
        summed_weights = global_batch_size.new_zeros(len(y))
        for name, term in self.terms.items():
            if name not in loss_terms:
                continue
            weight = weights[name]
            if getattr(term.weight, "normalise", False):
                weight_sum = workers.all_reduce_sum(weight.sum()).clamp_min(tiny)
                weight = weight * global_batch_size / weight_sum
            summed_weights = summed_weights + weight
            loss_function = LOSSES[term.loss]
            # Without natural logits, no loss uses this argument (see `needs_natural_logits`).
            loss = sum(
                loss_function(logits[v], logits.get(NATURAL_INPUT, logits[v]), y)
                for v in term.input_names
            )
            total = total + resolved_value(term.coef) * (weight * loss).sum()
        scale = global_batch_size
        if self.normalise:
            scale = workers.all_reduce_sum(summed_weights.sum()).clamp_min(tiny)
        return total * workers.size / scale

    def _compute_weights(
        self,
        term_names: list[str],
        logits: Mapping[str, Tensor],
        y: Tensor,
        attack_results: Mapping[str, AttackResult],
    ) -> dict[str, Tensor]:
        """Return the instance weights (N,) of some terms, before normalisation."""
        weights: dict[str, Tensor] = {}
        for name in term_names:
            term = self.terms[name]
            input_name = term.deciding_input_name
            inputs = WeightInputs(logits[input_name].detach(), y, earlier_weights=weights)
            if input_name in self.attacks:
                attack = self.attacks[input_name]
                inputs = replace(
                    inputs,
                    kappa=attack_results[input_name].kappa,
                    attack_steps=attack.steps,
                    vulnerability_kind=attack.vulnerability_kind,
                )
            weights[name] = term.weight(inputs)
        return weights
