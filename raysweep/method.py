"""A method is a sum over terms: coef x mean(weight x loss), a term looking at natural or attacked
data.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from raysweep.attacks import AnyAttack, AttackResult
from raysweep.losses import LOSSES, LossName
from raysweep.rng import ExampleRng
from raysweep.schedules import Schedule, bounded, resolved_value
from raysweep.spec import Spec, SpecError, describe_unknown_name, is_safe_name
from raysweep.weights import AnyWeight, RemainderWeight, UniformWeight, WeightInputs
from raysweep.worker_group import SINGLE_WORKER, WorkerGroup

NATURAL_INPUT = "natural"
# Kinds of weights that look at kappa, and the attacks whose kappa is what they mean.
_KAPPA_ATTACK_KINDS = {"geometry": ("pgd",), "within_margin": ("pgd", "minimal")}


class Term(Spec):
    """coef x mean(weight x loss) over a view: `natural`, an attack's name, or several joined by `+`
    (losses add).
    """

    loss: LossName = "ce"
    on: str
    coef: Annotated[Schedule, bounded(0)] = 1.0
    weight: AnyWeight = Field(default_factory=UniformWeight)

    @property
    def input_names(self) -> tuple[str, ...]:
        return tuple(part.strip() for part in self.on.split("+"))


@dataclass(frozen=True)
class MethodOutput:
    """One training step: the loss to differentiate, and what the method saw of the local rows.

    natural_logits, logits: (N, C), still in the graph; weights: (N,) without gradient; rows: of the
    global batch.
    """

    loss: Tensor
    natural_logits: Tensor | None
    logits: Mapping[str, Tensor]
    attack_results: Mapping[str, AttackResult]
    weights: Mapping[str, Tensor]
    global_batch_size: Tensor


class Method(Spec):
    """Attacks and terms. Terms are taken in order: a `remainder` weight names terms before it.

    normalise: divide the loss by the mean, over the global batch, of the summed weights of all
    terms (L eq. 17).
    """

    name: str = "inline"
    attacks: dict[str, AnyAttack] = Field(default_factory=dict)
    terms: Annotated[dict[str, Term], Field(min_length=1)]
    normalise: bool = False

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        # It becomes a part of folders' names.
        if not is_safe_name(name):
            raise ValueError("use letters, digits, '-', '_' and '.', not starting with '.'")
        return name

    @field_validator("attacks", "terms")
    @classmethod
    def _check_part_names(cls, parts: dict[str, object]) -> dict[str, object]:
        for name in parts:
            if name == NATURAL_INPUT and not isinstance(parts[name], Term):
                raise ValueError(
                    f"{NATURAL_INPUT!r} is the name of the clean view, not of an attack"
                )
            if not name.isidentifier():
                raise ValueError(f"{name!r} is not a plain name: use letters, digits and _")
        return parts

    @model_validator(mode="after")
    def _check_terms(self) -> Self:
        problems = []
        known = [NATURAL_INPUT, *self.attacks]
        before: list[str] = []
        for name, term in self.terms.items():
            problems += [
                f"terms.{name}.on: {describe_unknown_name('view', v, known)}"
                for v in term.input_names
                if v not in known
            ]
            if isinstance(term.weight, RemainderWeight):
                missing = [other for other in term.weight.of if other not in before]
                problems += [
                    f"terms.{name}.weight.of: {m!r} is not a term before it" for m in missing
                ]
            if (
                _weight_input_name(term) not in known
                and _weight_input_name(term) not in term.input_names
            ):
                problems.append(
                    f"terms.{name}.weight.by: {describe_unknown_name('view', _weight_input_name(term), known)}"
                )
            elif problem := self._find_kappa_problem(term):
                problems.append(f"terms.{name}.weight: {problem}")
            before.append(name)
        used = {
            view
            for term in self.terms.values()
            for view in (*term.input_names, _weight_input_name(term))
        }
        problems += [
            f"attacks.{name}: no term looks at it" for name in self.attacks if name not in used
        ]
        if problems:
            raise SpecError(problems)
        return self

    def _find_kappa_problem(self, term: Term) -> str | None:
        """Why the attack that decides the term's weight does not have the kappa that such weights
        need.
        """
        decides, counting = _weight_input_name(term), _KAPPA_ATTACK_KINDS.get(term.weight.kind)
        attack = self.attacks.get(decides)
        if counting and decides == NATURAL_INPUT:
            return f"{term.weight.kind} weights need kappa; set `by` to an attack"
        if not counting or attack is None:
            return None
        if attack.kind not in counting:
            return f"{term.weight.kind} weights take kappa from {' or '.join(counting)}; {decides!r} is {attack.kind}"
        if getattr(term.weight, "official", False) and attack.steps < 2:
            return f"official weights divide by floor(steps / 2): attacks.{decides}.steps must be 2 or more"
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
        """Attack, then one forward in the model's own mode for each view, then the weighted sum of
        losses.

        The loss is scaled so that the mean of its gradient over workers is the gradient of the
        global batch. attacked: the model in eval mode in a form that is faster, for the attacks
        that want that mode.
        """
        adversarial: dict[str, AttackResult] = {}
        for name, attack in self.attacks.items():
            met = (
                model
                if attack_model is None or getattr(attack, "mode", "eval") == "train"
                else attack_model
            )
            adversarial[name] = attack(met, x, y, rng.derive_stream("attack", name))
        needs_natural = any(
            NATURAL_INPUT in (*term.input_names, _weight_input_name(term))
            or term.loss.startswith("kl")
            for term in self.terms.values()
        )
        logits: dict[str, Tensor] = {NATURAL_INPUT: model(x)} if needs_natural else {}
        logits |= {name: model(result.x_adv) for name, result in adversarial.items()}

        natural = logits.get(NATURAL_INPUT)
        rows = workers.all_reduce_sum(x.new_full((), len(y)))
        total, tiny = x.new_zeros(()), torch.finfo(x.dtype).tiny
        pair_weight = x.new_zeros(len(y))
        weights: dict[str, Tensor] = {}
        for name, term in self.terms.items():
            weight = self._compute_weight(term, logits, y, adversarial, weights)
            weights[name] = weight
            if getattr(term.weight, "normalise", False):
                weight = weight * rows / workers.all_reduce_sum(weight.sum()).clamp_min(tiny)
            pair_weight = pair_weight + weight
            loss = sum(
                LOSSES[term.loss](logits[v], logits[v] if natural is None else natural, y)
                for v in term.input_names
            )
            total = total + resolved_value(term.coef) * (weight * loss).sum()
        scale = (
            workers.all_reduce_sum(pair_weight.sum()).clamp_min(tiny) if self.normalise else rows
        )
        return MethodOutput(
            total * workers.size / scale, natural, logits, adversarial, weights, rows
        )

    def _compute_weight(
        self,
        term: Term,
        logits: dict[str, Tensor],
        y: Tensor,
        attack_results: dict[str, AttackResult],
        earlier_weights: dict[str, Tensor],
    ) -> Tensor:
        view = _weight_input_name(term)
        attack = self.attacks.get(view)
        look = WeightInputs(
            logits=logits[view].detach(),
            y=y,
            kappa=attack_results[view].kappa if attack else None,
            attack_steps=attack.steps if attack else 0,
            vulnerability_kind=attack.vulnerability_kind if attack else "probability",
            earlier_weights=earlier_weights,
        )
        return term.weight(look)


def _weight_input_name(term: Term) -> str:
    """The view that the term's weight looks at."""
    return getattr(term.weight, "by", None) or term.input_names[0]
