"""The sweep's objective: a short, diverse set of attacks on the validation split."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from raysweep.attacks import PGD, AnyAttack, frozen
from raysweep.data import Split
from raysweep.evaluation.flatness import flatness
from raysweep.rng import Rng
from raysweep.spec import Spec

METRICS = ("robust_worst", "clean", "pgd", "cw", "masking_gap")


def _attacks() -> dict[str, AnyAttack]:
    pgd = PGD(steps=20)
    return {"pgd": pgd, "cw": pgd.model_copy(update={"loss": "cw"})}


class Validation(Spec):
    """Which attacks judge a checkpoint while training, on the first `size` validation examples (null: all).

    `robust_worst` is the accuracy that is left when each example faces all the attacks; `masking_gap` is what the first
    attack alone overstates it by. flatness: also how steep the loss is at friendly and at most adversarial data.
    """

    attacks: Annotated[dict[str, AnyAttack], Field(min_length=1)] = Field(default_factory=_attacks)
    size: Annotated[int, Field(ge=1)] | None = None
    every: Annotated[int, Field(ge=1)] = 1
    batch_size: Annotated[int, Field(ge=1)] = 512
    flatness: bool = False

    def __call__(self, model: nn.Module, split: Split) -> dict[str, float]:
        """Accuracies in [0, 1]: `clean`, one for each attack by name, `robust_worst`; and `masking_gap`.

        Every checkpoint faces the same random starts, so that two of them can be compared.
        """
        count = len(split) if self.size is None else min(self.size, len(split))
        robust: dict[str, list[Tensor]] = {name: [] for name in ("clean", *self.attacks)}
        with frozen(model):
            for start in range(0, count, self.batch_size):
                rows = slice(start, min(start + self.batch_size, count))
                x, y = split.images(rows), split.y[rows]
                correct = _correct(model, x, y)
                robust["clean"].append(correct)
                where = correct.nonzero()[:, 0]
                for name, attack in self.attacks.items():
                    survived = correct.clone()
                    rng = Rng.for_examples(split.index[rows][where], 0, "validation", name)
                    adversarial = attack(model, x[where], y[where], rng)
                    survived[where] = _correct(model, adversarial.x, y[where])
                    robust[name].append(survived)
        survivors = {name: torch.cat(parts) for name, parts in robust.items()}
        accuracy = {name: part.float().mean().item() for name, part in survivors.items()}
        accuracy["robust_worst"] = torch.stack(list(survivors.values())).all(0).float().mean().item()
        accuracy["masking_gap"] = accuracy[next(iter(self.attacks))] - accuracy["robust_worst"]
        if self.flatness:
            first = next((attack for attack in self.attacks.values() if isinstance(attack, PGD)), PGD())
            accuracy |= flatness(model, split, first, count, self.batch_size)
        return accuracy


def _correct(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        right: Tensor = model(x).argmax(1) == y
    return right
