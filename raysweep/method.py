"""A method is a sum over terms: coef x mean(weight x loss), a term looking at natural or attacked data."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Protocol, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from raysweep.attacks import Adversarial, AnyAttack
from raysweep.losses import LOSSES, LossName
from raysweep.rng import Rng
from raysweep.schedules import Schedule, now, within
from raysweep.spec import Spec, SpecError, is_plain, unknown_name
from raysweep.weights import Look, Remainder, Uniform, Weight

NATURAL = "natural"
# Kinds of weights that look at kappa, and the attacks whose kappa is what they mean.
_COUNT_KAPPA = {"geometry": ("pgd",), "within_margin": ("pgd", "minimal")}


class Workers(Protocol):
    """The processes that share one global batch; rank counts them from 0."""

    @property
    def size(self) -> int: ...

    @property
    def rank(self) -> int: ...

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a detached tensor over all workers, the same on each. All of them call it equally often."""
        ...


class OneWorker:
    """A process by itself: the local batch is the global batch."""

    size = 1
    rank = 0

    def sum(self, value: Tensor) -> Tensor:
        return value


ONE_WORKER = OneWorker()


class Term(Spec):
    """coef x mean(weight x loss) over a view: `natural`, an attack's name, or several joined by `+` (losses add)."""

    loss: LossName = "ce"
    on: str
    coef: Annotated[Schedule, within(0)] = 1.0
    weight: Weight = Field(default_factory=Uniform)

    @property
    def views(self) -> tuple[str, ...]:
        return tuple(part.strip() for part in self.on.split("+"))


@dataclass(frozen=True)
class Step:
    """One training step: the loss to differentiate, and what the method saw of the local rows.

    natural_logits, logits: (N, C), still in the graph; weights: (N,) without gradient; rows: of the global batch.
    """

    loss: Tensor
    natural_logits: Tensor | None
    logits: Mapping[str, Tensor]
    adversarial: Mapping[str, Adversarial]
    weights: Mapping[str, Tensor]
    rows: Tensor


class Method(Spec):
    """Attacks and terms. Terms are taken in order: a `remainder` weight names terms before it.

    normalise: divide the loss by the mean, over the global batch, of the summed weights of all terms (L eq. 17).
    """

    name: str = "inline"
    attacks: dict[str, AnyAttack] = Field(default_factory=dict)
    terms: Annotated[dict[str, Term], Field(min_length=1)]
    normalise: bool = False

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        # It becomes a part of folders' names.
        if not is_plain(name):
            raise ValueError("use letters, digits, '-', '_' and '.', not starting with '.'")
        return name

    @field_validator("attacks", "terms")
    @classmethod
    def _plain_names(cls, named: dict[str, object]) -> dict[str, object]:
        for name in named:
            if name == NATURAL and not isinstance(named[name], Term):
                raise ValueError(f"{NATURAL!r} is the name of the clean view, not of an attack")
            if not name.isidentifier():
                raise ValueError(f"{name!r} is not a plain name: use letters, digits and _")
        return named

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = []
        known = [NATURAL, *self.attacks]
        before: list[str] = []
        for name, term in self.terms.items():
            problems += [f"terms.{name}.on: {unknown_name('view', v, known)}" for v in term.views if v not in known]
            if isinstance(term.weight, Remainder):
                missing = [other for other in term.weight.of if other not in before]
                problems += [f"terms.{name}.weight.of: {m!r} is not a term before it" for m in missing]
            if _decides(term) not in known and _decides(term) not in term.views:
                problems.append(f"terms.{name}.weight.by: {unknown_name('view', _decides(term), known)}")
            elif problem := self._kappa_problem(term):
                problems.append(f"terms.{name}.weight: {problem}")
            before.append(name)
        used = {view for term in self.terms.values() for view in (*term.views, _decides(term))}
        problems += [f"attacks.{name}: no term looks at it" for name in self.attacks if name not in used]
        if problems:
            raise SpecError(problems)
        return self

    def _kappa_problem(self, term: Term) -> str | None:
        """Why the attack that decides the term's weight does not have the kappa that such weights need."""
        decides, counting = _decides(term), _COUNT_KAPPA.get(term.weight.kind)
        attack = self.attacks.get(decides)
        if counting and decides == NATURAL:
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
        rng: Rng,
        workers: Workers = ONE_WORKER,
        attacked: nn.Module | None = None,
    ) -> Step:
        """Attack, then one forward in the model's own mode for each view, then the weighted sum of losses.

        The loss is scaled so that the mean of its gradient over workers is the gradient of the global batch.
        attacked: the model in eval mode in a form that is faster, for the attacks that want that mode.
        """
        adversarial: dict[str, Adversarial] = {}
        for name, attack in self.attacks.items():
            met = model if attacked is None or getattr(attack, "mode", "eval") == "train" else attacked
            adversarial[name] = attack(met, x, y, rng.stream("attack", name))
        needs_natural = any(
            NATURAL in (*term.views, _decides(term)) or term.loss.startswith("kl") for term in self.terms.values()
        )
        logits: dict[str, Tensor] = {NATURAL: model(x)} if needs_natural else {}
        logits |= {name: model(result.x) for name, result in adversarial.items()}

        natural = logits.get(NATURAL)
        rows = workers.sum(x.new_full((), len(y)))
        total, tiny = x.new_zeros(()), torch.finfo(x.dtype).tiny
        pair_weight = x.new_zeros(len(y))
        weights: dict[str, Tensor] = {}
        for name, term in self.terms.items():
            weight = self._weight(term, logits, y, adversarial, weights)
            weights[name] = weight
            if getattr(term.weight, "normalise", False):
                weight = weight * rows / workers.sum(weight.sum()).clamp_min(tiny)
            pair_weight = pair_weight + weight
            loss = sum(LOSSES[term.loss](logits[v], logits[v] if natural is None else natural, y) for v in term.views)
            total = total + now(term.coef) * (weight * loss).sum()
        scale = workers.sum(pair_weight.sum()).clamp_min(tiny) if self.normalise else rows
        return Step(total * workers.size / scale, natural, logits, adversarial, weights, rows)

    def _weight(
        self,
        term: Term,
        logits: dict[str, Tensor],
        y: Tensor,
        adversarial: dict[str, Adversarial],
        before: dict[str, Tensor],
    ) -> Tensor:
        view = _decides(term)
        attack = self.attacks.get(view)
        look = Look(
            logits=logits[view].detach(),
            y=y,
            kappa=adversarial[view].kappa if attack else None,
            steps=attack.steps if attack else 0,
            view=attack.view if attack else "probability",
            weights=before,
        )
        return term.weight(look)


def _decides(term: Term) -> str:
    """The view that the term's weight looks at."""
    return getattr(term.weight, "by", None) or term.views[0]
