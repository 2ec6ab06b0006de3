"""Single examples as a model sees them: logits, geometry value and vulnerability, for the papers' maps."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raysweep.attacks import PGD, frozen, vulnerability
from raysweep.data import Split
from raysweep.rng import Rng


@dataclass(frozen=True)
class Instances:
    """Row by row: logits (N, classes) of natural data, y (N,), and under each attack kappa and V, (N,)."""

    logits: Tensor
    y: Tensor
    kappa: dict[str, Tensor]
    v: dict[str, Tensor]

    def confused(self) -> tuple[int, int]:
        """The two classes that are most often each other's runner-up."""
        classes = self.logits.shape[1]
        rivals = self.logits.scatter(1, self.y[:, None], -torch.inf).argmax(1)
        counts = torch.zeros(classes, classes).index_put_(
            (self.y, rivals), torch.ones(len(self.y)), accumulate=True
        )  # fmt: skip
        first, second = divmod(int((counts + counts.T).argmax()), classes)
        return min(first, second), max(first, second)


def instances(model: nn.Module, split: Split, attacks: Mapping[str, PGD], count: int) -> Instances:
    """The first `count` examples of `split` under each attack, with the same random starts each time; on the CPU."""
    rows = slice(0, count)
    x, y = split.images(rows), split.y[rows]
    kappa, v = {}, {}
    with frozen(model):
        with torch.no_grad():
            logits = model(x)
        for name, attack in attacks.items():
            found = attack(model, x, y, Rng.for_examples(split.index[rows], 0, "instances", name))
            assert found.kappa is not None
            kappa[name] = found.kappa.cpu()
            with torch.no_grad():
                v[name] = vulnerability(model(found.x), y, attack.view).cpu()
    return Instances(logits.cpu(), y.cpu(), kappa, v)
