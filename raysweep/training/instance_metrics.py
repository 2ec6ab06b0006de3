"""Single examples as a model sees them: logits, geometry value and vulnerability, for the papers'
maps.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raysweep.attacks import PGD, freeze_model, true_class_confidence
from raysweep.data import Split
from raysweep.rng import ExampleRng


@dataclass(frozen=True)
class InstanceMetrics:
    """Row by row: logits (N, classes) of natural data, y (N,), and under each attack kappa and V,
    (N,).
    """

    logits: Tensor
    y: Tensor
    kappa: dict[str, Tensor]
    v: dict[str, Tensor]

    def find_most_confused_classes(self) -> tuple[int, int]:
        """The two classes that are most often each other's runner-up."""
        classes = self.logits.shape[1]
        rivals = self.logits.scatter(1, self.y[:, None], -torch.inf).argmax(1)
        counts = torch.zeros(classes, classes).index_put_(
            (self.y, rivals), torch.ones(len(self.y)), accumulate=True
        )  # fmt: skip
        first, second = divmod(int((counts + counts.T).argmax()), classes)
        return min(first, second), max(first, second)


def compute_instance_metrics(
    model: nn.Module, split: Split, attacks: Mapping[str, PGD], n_examples: int
) -> InstanceMetrics:
    """The first `count` examples of `split` under each attack, with the same random starts each
    time; on the CPU.
    """
    rows = slice(0, n_examples)
    x, y = split.get_float_images(rows), split.y[rows]
    kappa, v = {}, {}
    with freeze_model(model):
        with torch.no_grad():
            logits = model(x)
        for name, attack in attacks.items():
            found = attack(
                model, x, y, ExampleRng.for_examples(split.index[rows], 0, "instances", name)
            )
            assert found.kappa is not None
            kappa[name] = found.kappa.cpu()
            with torch.no_grad():
                v[name] = true_class_confidence(
                    model(found.x_adv), y, attack.vulnerability_kind
                ).cpu()
    return InstanceMetrics(logits.cpu(), y.cpu(), kappa, v)
